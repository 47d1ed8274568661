"""All values of a node, if they are few: what ``uniqueItems`` needs to know.

Values are listed in a form that is equal exactly where JSON values are: 1 is 1.0, but not true.
A node is given up (None) as soon as it is known to have ``limit`` values or more. A node that
contains itself has no longest value, so it has infinitely many, if it is inhabited at all.

Left out: objects and arrays with more than ``MOST_COMBINATIONS`` ways to be filled, and those
with witnesses, counts, or limits on the number of keys; a ``GrammarError`` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from fractions import Fraction
from itertools import product
from math import ceil, floor
from typing import Protocol

from refllm.decode.grammar.automata.dfa_operations import with_length
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema import number_rules
from refllm.decode.grammar.json_schema.formulas import Conjunction
from refllm.decode.grammar.json_schema.number_rules import Integer, Multiple, Range, Values
from refllm.decode.grammar.json_schema.shapes import ArrayShape, Node, ObjectShape, StringShape

MOST_COMBINATIONS = 10_000
ABSENT = ("absent",)


class Shapes(Protocol):
    """What is asked of the algebra; all shapes are inhabited, and so are the nodes in question."""

    def literals(self, node: Node) -> frozenset[str]: ...
    def string_shapes(self, node: Node) -> tuple[StringShape, ...]: ...
    def fitting(self, node: Node, kind: str) -> list[Conjunction]: ...
    def array_shapes(self, node: Node) -> tuple[ArrayShape, ...]: ...
    def object_shapes(self, node: Node) -> tuple[ObjectShape, ...]: ...


class _TooMany(Exception):
    """There are ``limit`` values or more."""


class FiniteValues:
    """The search for the values of a node; ``ask(node)`` says whether a node is inhabited."""

    def __init__(self, shapes: Shapes, ask: Callable[[Node], bool], limit: int) -> None:
        self.shapes = shapes
        self.ask = ask
        self.limit = limit
        self._inside: set[Node] = set()

    def values(self, node: Node) -> list[Hashable] | None:
        """All values of a node, or None if there are ``limit`` of them or more."""
        try:
            return list(self._values(node))
        except _TooMany:
            return None

    def _values(self, node: Node) -> set[Hashable]:
        if not self.ask(node):
            return set()
        if node in self._inside:
            raise _TooMany
        self._inside.add(node)
        try:
            found: set[Hashable] = {("literal", name) for name in self.shapes.literals(node)}
            for each in self._all(node):
                found.add(each)
                if len(found) >= self.limit:
                    break
        finally:
            self._inside.discard(node)
        if len(found) >= self.limit:
            raise _TooMany
        return found

    def _all(self, node: Node) -> Iterator[Hashable]:
        """The values of a node that are not literals, some of them twice."""
        for conjunction in self.shapes.fitting(node, "number"):
            for number in _numbers(conjunction, self.limit):
                yield "number", number
        for string in self.shapes.string_shapes(node):
            yield from self._strings(string)
        for array in self.shapes.array_shapes(node):
            yield from self._arrays(array)
        for each in self.shapes.object_shapes(node):
            yield from self._objects(each)

    def _strings(self, shape: StringShape) -> Iterator[Hashable]:
        unbounded = not shape.dfa.finite
        if unbounded and (shape.maximum is None or shape.maximum >= self.limit):
            raise _TooMany
        words = with_length(shape.dfa, shape.minimum, shape.maximum).words(self.limit)
        for word in words:
            yield "string", word

    def _arrays(self, shape: ArrayShape) -> Iterator[Hashable]:
        if shape.counts:
            raise _unknown("contains")
        if shape.maximum == 0 or not all(map(self.ask, shape.prefix[: shape.minimum])):
            longest = 0
        elif self.ask(shape.rest) and shape.maximum is None:
            raise _TooMany
        else:
            longest = len(shape.prefix) if shape.maximum is None else shape.maximum
        items: list[list[Hashable]] = []
        combinations = 1
        for length in range(longest + 1):
            if length >= shape.minimum:
                for values in product(*items):
                    if not shape.unique or len(set(values)) == length:
                        yield "array", values
            if length < longest:
                node = shape.prefix[length] if length < len(shape.prefix) else shape.rest
                items.append(list(self._values(node)))
                combinations *= len(items[-1])
                if combinations == 0:
                    return
                if combinations > MOST_COMBINATIONS:
                    raise _unknown("items")

    def _objects(self, shape: ObjectShape) -> Iterator[Hashable]:
        if not all(self.ask(shape.named[key]) for key in shape.required):
            return
        if shape.witnesses:
            raise _unknown("not")
        nodes = {key: node for key, node in shape.named.items() if self.ask(node)}
        full = shape.maximum is not None and shape.maximum <= len(shape.required)
        for each in shape.classes:
            if not full and self.ask(each.value):
                if not each.keys.finite:
                    raise _TooMany
                texts = ("".join(map(chr, word)) for word in each.keys.words(MOST_COMBINATIONS))
                nodes.update((text, each.value) for text in texts if text not in shape.named)
        choices: list[list[Hashable]] = []
        combinations = 1
        for key, node in nodes.items():
            optional = [] if key in shape.required else [ABSENT]
            choices.append([*optional, *self._values(node)])
            combinations *= len(choices[-1])
            if combinations > MOST_COMBINATIONS:
                raise _unknown("properties")
        for values in product(*choices):
            pairs = [pair for pair in zip(nodes, values, strict=True) if pair[1] != ABSENT]
            if (
                shape.minimum
                <= len(pairs)
                <= (len(pairs) if shape.maximum is None else shape.maximum)
            ):
                yield "object", frozenset(pairs)


def _unknown(keyword: str) -> GrammarError:
    return GrammarError(
        "items that must differ from each other have values that cannot be counted "
        f"(by reason of {keyword!r})",
        keyword="uniqueItems",
    )


def _numbers(conjunction: Conjunction, limit: int) -> Iterator[Fraction]:
    """The numbers of a simplified conjunction; ``_TooMany`` if there are too many."""
    for atom in conjunction:
        if isinstance(atom, Values) and atom.positive:
            yield from map(Fraction, atom.values)
            return
    steps = [
        Fraction(str(a.divisor)) for a in conjunction if isinstance(a, Multiple) and a.positive
    ]
    if any(isinstance(atom, Integer) and atom.positive for atom in conjunction):
        steps.append(Fraction(1))
    limits = next((atom for atom in conjunction if isinstance(atom, Range)), Range())
    low, high = limits.minimum, limits.maximum
    if low is None or high is None or (low != high and not steps):
        raise _TooMany
    step = max(steps, default=Fraction(1))
    first = ceil(Fraction(low) / step)
    last = floor(Fraction(high) / step)
    if last - first > 4 * limit + 4:
        raise _TooMany
    tested = conjunction - {Integer(draft4=True)}
    candidates = {step * i for i in range(first, last + 1)} | {Fraction(low), Fraction(high)}
    for value in candidates:
        number = int(value) if value.denominator == 1 else float(value)
        if all(number_rules.accepts(atom, number) for atom in tested):
            yield value
