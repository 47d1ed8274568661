"""Whether any value fits a node: the least fixed point over recursive schemas.

A node is inhabited if a literal, a string or a number fits it, or if one of its array or object
shapes can be filled with values of inhabited nodes. Where schemas are recursive this is a least
fixed point: start with no node inhabited, look again at a node whenever one that it asked about
turns out to be inhabited, and stop when nothing changes. A recursion that is required without
end, such as an object that requires a copy of itself, never becomes inhabited.

A shape asks only about what it needs: ``{}`` fits an object shape without required keys,
whatever its properties are.

**Objects.** Each witness ("some key of K has a value that fits W") is given to one key, and keys
that are given several of them must have a value that fits all. Required keys and witnesses' keys
together must not exceed ``maximum``, and enough other keys must be possible for ``minimum``.

**Arrays.** Counts of matching items (``contains``) are followed item by item: after each item,
the set of vectors of counts that are possible. For ``uniqueItems`` the values of finite nodes are
listed, and items are matched to values that differ.

Left out: sizes of the values that fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Protocol

from refllm.decode.grammar.json_schema import array_inhabitation, object_inhabitation
from refllm.decode.grammar.json_schema.finite_values import FiniteValues
from refllm.decode.grammar.json_schema.formulas import Conjunction
from refllm.decode.grammar.json_schema.shapes import (
    ANYTHING,
    NOTHING,
    ArrayShape,
    Node,
    NumberShape,
    ObjectShape,
    StringShape,
)

Ask = Callable[[Node], bool]


class Shapes(Protocol):
    """What inhabitation asks of the algebra: shapes, of which arrays and objects may be empty."""

    def node(self, schemas: Iterable[tuple[object, bool]]) -> Node: ...
    def fitting(self, node: Node, kind: str) -> list[Conjunction]: ...
    def literals(self, node: Node) -> frozenset[str]: ...
    def string_shapes(self, node: Node) -> tuple[StringShape, ...]: ...
    def number_shapes(self, node: Node) -> tuple[NumberShape, ...]: ...
    def array_shapes(self, node: Node) -> tuple[ArrayShape, ...]: ...
    def object_shapes(self, node: Node) -> tuple[ObjectShape, ...]: ...


class Inhabitation:
    """Which nodes, arrays and objects of an algebra any value fits; answers are kept."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.known: dict[Node, bool] = {ANYTHING: True, NOTHING: False}

    def node(self, node: Node) -> bool:
        """Whether any value fits a node."""
        if node not in self.known:
            self._fixed_point([node])
        return self.known[node]

    def object(self, shape: ObjectShape) -> bool:
        """Whether any object fits a shape."""
        return self._solve(lambda ask: object_inhabitation.inhabited(shape, self.join, ask))

    def array(self, shape: ArrayShape) -> bool:
        """Whether any array fits a shape."""
        return self._solve(lambda ask: array_inhabitation.inhabited(shape, self, ask))

    def values(self, node: Node, limit: int, ask: Ask) -> list[Hashable] | None:
        """All values that fit a node, or None if there are ``limit`` of them or more."""
        return FiniteValues(self.shapes, ask, limit).values(node)

    def join(self, *nodes: Node) -> Node:
        """The node of the values that fit all nodes."""
        return self.shapes.node(schema for node in nodes for schema in node)

    def _solve(self, question: Callable[[Ask], bool]) -> bool:
        """Answer a question about nodes, after all that it depends on is known for good."""
        missing: list[Node] = []

        def ask(node: Node) -> bool:
            if node not in self.known:
                missing.append(node)
            return self.known.get(node, False)

        while True:
            missing.clear()
            answer = question(ask)
            if answer or not missing:
                return answer
            self._fixed_point(missing)

    def _fixed_point(self, first: list[Node]) -> None:
        """Decide ``first`` and every node that the answers depend on.

        New nodes go first, so that a node is looked at again after all that it asked about.
        """
        asked_by: defaultdict[Node, set[Node]] = defaultdict(set)
        found: set[Node] = set()
        new = list(dict.fromkeys(first))
        again: dict[Node, None] = {}  # an ordered set
        seen = set(new)
        while new or again:
            node = new.pop() if new else again.popitem()[0]

            def ask(other: Node, node: Node = node) -> bool:
                if other in self.known:
                    return self.known[other]
                if other not in found:
                    asked_by[other].add(node)
                    if other not in seen:
                        seen.add(other)
                        new.append(other)
                return other in found

            if node not in found and self._fits(node, ask):
                found.add(node)
                again.update(dict.fromkeys(asked_by.pop(node, ())))
        for node in seen:
            self.known[node] = node in found

    def _fits(self, node: Node, ask: Ask) -> bool:
        """Whether a value fits a node, given which nodes are known to be inhabited."""
        shapes = self.shapes
        return bool(
            shapes.literals(node)
            or shapes.string_shapes(node)
            or shapes.number_shapes(node)
            or any(
                object_inhabitation.inhabited(each, self.join, ask)
                for each in shapes.object_shapes(node)
            )
            or any(
                array_inhabitation.inhabited(each, self, ask) for each in shapes.array_shapes(node)
            )
        )
