"""JSON Schema as a boolean algebra: which shapes the values of a node have.

A *node* is a set of signed schemas that one value fits (``shapes.py``). Expanding it takes four
steps, all of them lazy and memoised:

1. ``keyword_formulas.py`` writes each schema as a formula, per kind of value;
2. ``conjunctions.py`` writes the formula, or its negation, as a list of conjunctions of atoms;
3. the lists of all schemas of the node are multiplied;
4. each conjunction becomes a shape; ``inhabitation.py`` drops those that no value fits.

So ``not``, ``oneOf`` and ``if`` are exact, not approximated. ``unevaluatedProperties: U`` holds
for a value if in *some* set of alternatives that all hold, each key that they do not evaluate has
a value that fits U; therefore each conjunction carries what it evaluates.

Left out: dialects, identifiers and references (``schema_documents.py``); what cannot be written
as shapes (a negated ``uniqueItems``, formulas with too many alternatives) raises a
``GrammarError`` that names keyword and JSON Pointer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_operations import never, union, with_length
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema import (
    array_rules,
    number_rules,
    object_conjunctions,
    string_rules,
)
from refllm.decode.grammar.json_schema.formulas import Conjunction
from refllm.decode.grammar.json_schema.inhabitation import Inhabitation
from refllm.decode.grammar.json_schema.key_sets import Base
from refllm.decode.grammar.json_schema.keyword_formulas import KINDS
from refllm.decode.grammar.json_schema.schema_errors import located, unenforceable
from refllm.decode.grammar.json_schema.schema_expansion import SchemaExpansion
from refllm.decode.grammar.json_schema.schema_nodes import Documents
from refllm.decode.grammar.json_schema.shapes import (
    ArrayShape,
    Location,
    Node,
    NumberShape,
    ObjectShape,
    StringShape,
    ValueShapes,
)
from refllm.decode.grammar.patterns import regex


class SchemaAlgebra(SchemaExpansion):
    """The shapes of nodes of one document; the ``NodeExpander`` of the frames."""

    def __init__(self, documents: Documents) -> None:
        super().__init__(documents)
        self.inhabitation = Inhabitation(self)
        self._shapes: dict[tuple[Node, str], tuple[object, ...]] = {}
        self._expanded: dict[Node, ValueShapes] = {}

    def key_language(self, base: Base) -> DFA:
        """The DFA over characters of the keys of a pattern or of a schema."""
        if isinstance(base, str):
            return regex.from_pattern(base, search=True)
        shapes = self.string_shapes(self.node([base]))
        if not shapes:
            return never(CHARACTERS)
        return union(*(with_length(each.dfa, each.minimum, each.maximum) for each in shapes))

    def literals(self, node: Node) -> frozenset[str]:
        """Which of null, true and false fit a node."""
        return frozenset(kind for kind in KINDS[:3] if self.fitting(node, kind))

    def string_shapes(self, node: Node) -> tuple[StringShape, ...]:
        """The shapes of the strings that fit a node; each of them is fitted by some string."""
        return cast(tuple[StringShape, ...], self._memoised(node, "string"))

    def number_shapes(self, node: Node) -> tuple[NumberShape, ...]:
        """The shape of the numbers that fit a node: one, or none."""
        return cast(tuple[NumberShape, ...], self._memoised(node, "number"))

    def array_shapes(self, node: Node) -> tuple[ArrayShape, ...]:
        """The shapes of the arrays that fit a node; some of them may be empty."""
        return cast(tuple[ArrayShape, ...], self._memoised(node, "array"))

    def object_shapes(self, node: Node) -> tuple[ObjectShape, ...]:
        """The shapes of the objects that fit a node; some of them may be empty."""
        return cast(tuple[ObjectShape, ...], self._memoised(node, "object"))

    def _memoised(self, node: Node, kind: str) -> tuple[object, ...]:
        """The shapes of one kind, made once."""
        key = node, kind
        if key not in self._shapes:
            found = self.fitting(node, kind)
            location = min(node, key=repr)[0] if node else None
            try:
                self._shapes[key] = tuple(self._shapes_of(found, kind, location))
            except GrammarError as error:
                raise located(error, location) from None
        return self._shapes[key]

    def _shapes_of(
        self, found: list[Conjunction], kind: str, location: Location
    ) -> Iterable[object]:
        """Shapes of conjunctions of one kind."""
        match kind:
            case "string":
                shapes = map(string_rules.shape, string_rules.merge(found))
                yield from (each for each in shapes if string_rules.inhabited(each))
            case "number":
                if found and not number_rules.union_language(frozenset(found)).empty:
                    yield NumberShape(number_rules.union_language(frozenset(found)))
            case "array":
                for each in found:
                    yield array_rules.shape(
                        each, self, lambda key: unenforceable(location, key, "is negated")
                    )
            case "object":
                yield from (object_conjunctions.shape(each, self) for each in found)

    def expand(self, node: Node) -> ValueShapes:
        """The shapes of a node, those that no value fits left out."""
        if node not in self._expanded:
            inhabited = self.inhabitation
            self._expanded[node] = ValueShapes(
                literals=self.literals(node),
                strings=self.string_shapes(node),
                numbers=self.number_shapes(node),
                arrays=tuple(filter(inhabited.array, self.array_shapes(node))),
                objects=tuple(filter(inhabited.object, self.object_shapes(node))),
            )
        return self._expanded[node]

    def inhabited(self, node: Node) -> bool:
        """Whether any value fits a node."""
        return self.inhabitation.node(node)
