"""From schemas to conjunctions: which atoms hold for the values of a node.

The first three steps of ``schema_algebra.py``, all of them memoised:

1. ``keyword_formulas.py`` writes each schema as a formula, per kind of value;
2. ``conjunctions.py`` writes the formula, or its negation, as a list of conjunctions of atoms;
3. the lists of all schemas of a node are multiplied (``fitting``).

``unevaluatedProperties: U`` holds for a value if in *some* set of alternatives that all hold, each
key that they do not evaluate has a value that fits U. Therefore each conjunction carries what it
evaluates, and U joins each of them for the other keys.

While a conjunction is simplified, ``quickly_empty`` looks into the nodes of required keys and
items, so that alternatives that exclude each other are seen at once. It may answer False for a
node that is empty, never True for one that is not.

Left out: shapes (``schema_algebra.py``); whether recursive nodes are empty (``inhabitation.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema import (
    array_rules,
    number_rules,
    object_conjunctions,
    object_rules,
    string_rules,
)
from refllm.decode.grammar.json_schema.conjunctions import (
    EVERYTHING,
    Expansion,
    TooManyConjunctions,
)
from refllm.decode.grammar.json_schema.formulas import (
    TRUE,
    Apply,
    Atom,
    Conjunction,
    Evaluation,
    Formula,
    absorb,
    either,
    every,
)
from refllm.decode.grammar.json_schema.key_sets import Base, KeySet, named
from refllm.decode.grammar.json_schema.keyword_formulas import KINDS, Keywords, keyword_formula
from refllm.decode.grammar.json_schema.schema_errors import located, unenforceable
from refllm.decode.grammar.json_schema.schema_nodes import Documents, SchemaNodes
from refllm.decode.grammar.json_schema.shapes import NOTHING, Location, Node
from refllm.decode.grammar.json_schema.unevaluated import EVALUATED, other_items, other_members
from refllm.decode.grammar.json_schema.unevaluated import KEYWORDS as UNEVALUATED
from refllm.decode.grammar.patterns import regex

MOST_WORK = 200_000  # conjunctions made for one document
MOST_EXPANSIONS = 300_000  # of nodes, each kind of value counted by itself
DEEPEST_LOOK = 20  # nodes inside each other that are looked into to see at once that they are empty
MULTIPLYING = ("oneOf", "anyOf", "dependentSchemas", "dependentRequired", "not", "if", "allOf")


class _Unfinished(Exception):
    """Looking into a node needs the conjunctions of a schema that are just being made."""


class SchemaExpansion(SchemaNodes):
    """The conjunctions of the schemas and nodes of one document."""

    def __init__(self, documents: Documents) -> None:
        super().__init__(documents)
        self._work = 0
        self._position = 0  # of the next key of any ``properties``
        self._looking: list[Node] = []  # nodes that ``quickly_empty`` is looking into
        self._formulas: dict[tuple[Location, str], Formula] = {}
        self._conjunctions: dict[tuple[Location, bool, str, bool], list[Conjunction]] = {}
        self._expanding: dict[tuple[Location, bool, str, bool], int] = {}  # → len(_looking)
        self._failed: dict[tuple[Location, bool, str, bool], GrammarError] = {}
        self._fitting: dict[tuple[Node, str], list[Conjunction]] = {}
        self._empty: dict[Node, bool] = {}
        self._facts: dict[Conjunction, object_conjunctions.ObjectFacts] = {}

    # --- schema → formula → conjunctions ----------------------------------------------------------

    def conjunctions(self, schema: Apply, kind: str, *, tracking: bool) -> list[Conjunction]:
        """The values of a kind that fit, or do not fit, a schema."""
        location, positive = self.simplest((schema.location, schema.positive))
        key = location, positive, kind, tracking
        if key in self._conjunctions:
            return self._conjunctions[key]
        if key in self._failed:
            raise self._failed[key]
        begun = self._expanding.get(key)
        if begun is not None and begun < len(self._looking):
            raise _Unfinished
        if begun is not None:
            raise unenforceable(location, "$ref", "leads back to itself and never to a value")
        self._expanding[key] = len(self._looking)
        try:
            found = self._expand_schema(location, positive, kind, tracking=tracking)
        except TooManyConjunctions:
            self._failed[key] = self._too_many(location)
            raise self._failed[key] from None
        except GrammarError as error:
            self._failed[key] = located(error, location)
            raise self._failed[key] from None
        finally:
            del self._expanding[key]
        self._conjunctions[key] = found
        return found

    def _expand_schema(
        self, location: Location, positive: bool, kind: str, *, tracking: bool
    ) -> list[Conjunction]:
        """What ``conjunctions`` memoises."""
        keywords = self.keywords(location)
        if isinstance(keywords, bool):
            return [EVERYTHING] if keywords == positive else []
        unevaluated = UNEVALUATED.get(kind)
        if unevaluated in keywords:
            found = self._with_unevaluated(location, keywords, kind, tracking and positive)
            if positive:
                return found
            opposite = either(every(each) for each in found).negated()
            return Expansion(self, kind).extend([EVERYTHING], opposite)
        formula = self._formula(location, kind)
        expansion = Expansion(self, kind, tracking and positive)
        return expansion.extend([EVERYTHING], formula if positive else formula.negated())

    def _formula(self, location: Location, kind: str) -> Formula:
        """The formula of a schema, ``unevaluated*`` left out."""
        key = location, kind
        if key not in self._formulas:
            keywords = self.keywords(location)
            assert not isinstance(keywords, bool)
            position = self._position
            self._position += len(cast(Mapping[str, Location], keywords.get("properties", {})))
            try:
                self._formulas[key] = keyword_formula(keywords, kind, location, position)
            except GrammarError as error:
                raise located(error, location) from None
            if kind == "object" and "propertyNames" in keywords:
                names = self._property_names(keywords["propertyNames"])
                self._formulas[key] = every((self._formulas[key], names))
        return self._formulas[key]

    def _property_names(self, schema: Location) -> Formula:
        """All keys fit a schema: no key is outside its language."""
        fitting = self.fitting(self.start(schema), "string")
        words = [string_rules.constants(each) for each in fitting]
        if all(each is not None for each in words):
            names = frozenset[str]().union(*(each for each in words if each is not None))
            return object_rules.Members(named(*names).complement(), array_rules.NEVER)
        unlike = KeySet(bases=frozenset({(schema, False)}))
        if not self.fitting(self.node([(schema, False)]), "string"):
            return TRUE
        return object_rules.Members(unlike, array_rules.NEVER)

    def _with_unevaluated(
        self, location: Location, keywords: Keywords, kind: str, tracking: bool
    ) -> list[Conjunction]:
        """The conjunctions of a schema with ``unevaluatedProperties`` or ``unevaluatedItems``."""
        schema = keywords[UNEVALUATED[kind]]
        found = []
        siblings = Expansion(self, kind, True).extend([EVERYTHING], self._formula(location, kind))
        for each in siblings:
            evaluated = frozenset(atom for atom in each if isinstance(atom, Evaluation))
            rest = other_members if kind == "object" else other_items
            simple = self.simplify(kind, each - evaluated | rest(evaluated, schema))
            if simple is not None:
                noted = {EVALUATED[kind]} if tracking else set()
                found.append(simple | noted)
        return absorb(found)

    # --- rules of the kinds -----------------------------------------------------------------------

    def simplify(self, kind: str, conjunction: Conjunction) -> Conjunction | None:
        """An equal conjunction with fewer atoms; None if it is cheap to see that none fits."""
        match kind:
            case "string":
                return string_rules.simplify(conjunction)
            case "number":
                return number_rules.simplify(conjunction)
            case "array":
                return array_rules.simplify(conjunction, self)
            case "object":
                return object_conjunctions.simplify(conjunction, self)
        return conjunction

    def implied(self, kind: str, conjunction: Conjunction, atom: Atom) -> bool:
        """Whether all values of a conjunction fit an atom, as far as is seen."""
        match kind:
            case "string":
                return string_rules.implied(conjunction, atom)
            case "number":
                return number_rules.implied(conjunction, atom)
            case "array":
                return array_rules.implied(conjunction, atom, self)
            case "object":
                return object_conjunctions.implied(conjunction, atom, self)
        return False

    def disjoint(self, kind: str, one: Conjunction, other: Conjunction) -> bool:
        """Whether it is cheap to see that no value fits two conjunctions of ``oneOf``."""
        if kind != "object":
            return False
        for each in (one, other):
            if each not in self._facts:
                self._facts[each] = object_conjunctions.ObjectFacts(each, self)
        return object_conjunctions.disjoint(self._facts[one], self._facts[other])

    def count_work(self) -> None:
        """Count one conjunction that is made, so that no document takes forever."""
        self._work += 1
        if self._work > MOST_WORK:
            raise TooManyConjunctions

    def key_matches(self, base: Base, key: str) -> bool:
        """Whether a key is in the language of a pattern or fits a schema."""
        if isinstance(base, str):
            return regex.from_pattern(base, search=True).matches(key)
        return any(
            all(string_rules.accepts(atom, key) for atom in each)
            for each in self.fitting(self.node([base]), "string")
        )

    # --- node → conjunctions ----------------------------------------------------------------------

    def fitting(self, node: Node, kind: str) -> list[Conjunction]:
        """The conjunctions of the values of a kind that fit all schemas of a node."""
        key = node, kind
        if key not in self._fitting:
            if len(self._fitting) > MOST_EXPANSIONS:
                raise GrammarError(
                    "the schema combines its subschemas in too many ways: write fewer alternatives"
                )
            found = [EVERYTHING]
            factors: list[list[Conjunction]] = []
            for location, sign in sorted(node, key=repr):  # in the same order in every run
                factors.append(self.conjunctions(Apply(location, sign), kind, tracking=False))
                if not factors[-1]:
                    break
            try:
                for factor in sorted(factors, key=len):
                    found = Expansion(self, kind).product(found, factor)
                    if not found:
                        break
            except TooManyConjunctions:
                raise self._too_many(min(node, key=repr)[0]) from None
            self._fitting[key] = found
        return self._fitting[key]

    def quickly_empty(self, node: Node) -> bool:
        """Whether it is cheap to see that no value fits; False does not say that one does."""
        if not node or node == NOTHING:
            return node == NOTHING
        known = self._empty.get(node)
        if known is not None:
            return known
        if node in self._looking or len(self._looking) >= DEEPEST_LOOK:
            return False
        self._looking.append(node)
        try:
            self._empty[node] = not any(self.fitting(node, kind) for kind in KINDS)
        except (_Unfinished, GrammarError):
            return False  # an error is raised where the node is really needed
        finally:
            self._looking.pop()
        return self._empty[node]

    def _too_many(self, location: Location) -> GrammarError:
        """The error of a schema with too many cases, and the keyword that is likely to blame."""
        keywords = self.keywords(location)
        known = () if isinstance(keywords, bool) else keywords
        keyword = next((key for key in MULTIPLYING if key in known), "allOf")
        return unenforceable(location, keyword, "has too many cases")
