"""Conjunctions keep their meaning while they are made simple, negated and multiplied."""

from __future__ import annotations

import pytest
from atoms import OF_KIND, fitting, holds, small_document
from hypothesis import given
from hypothesis import strategies as st
from strategies_of_atoms import of_kind

from refllm.decode.grammar.json_schema.array_rules import Items, Matches, Unique
from refllm.decode.grammar.json_schema.formulas import Apply, Count, Evaluation
from refllm.decode.grammar.json_schema.key_sets import ALL_KEYS, named
from refllm.decode.grammar.json_schema.number_rules import Integer, Range
from refllm.decode.grammar.json_schema.object_rules import Member, Members, Required
from refllm.decode.grammar.json_schema.schema_algebra import SchemaAlgebra
from refllm.decode.grammar.json_schema.schema_documents import SchemaDocument

ALGEBRA, LOCATIONS = small_document()
KINDS = list(OF_KIND)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@pytest.mark.theorem(
    "Atomic constraints of JSON Schema are closed under negation.",
    source="not (every key of K has a value in S) = some key of K has a value outside S, …",
)
def test_a_negated_atom_fits_exactly_the_other_values(kind, data) -> None:
    atom = data.draw(of_kind(kind, LOCATIONS))
    opposite = atom.negated()
    again = opposite.negated()
    for value in OF_KIND[kind]:
        fits = holds(ALGEBRA, atom, value)
        assert holds(ALGEBRA, opposite, value) == (not fits), value
        assert holds(ALGEBRA, again, value) == fits, value


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@pytest.mark.theorem(
    "A conjunction made simple fits the same values, and none where it is called empty.",
    source="definition",
)
def test_simplifying_keeps_the_meaning(kind, data) -> None:
    conjunction = data.draw(st.frozensets(of_kind(kind, LOCATIONS), max_size=5))
    simple = ALGEBRA.simplify(kind, conjunction)
    assert fitting(ALGEBRA, simple, kind) == fitting(ALGEBRA, conjunction, kind)
    if simple is not None:
        assert ALGEBRA.simplify(kind, simple) is not None, "nothing is left to be seen"


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@pytest.mark.theorem(
    "A conjunction implies an atom only if each of its values fits the atom.", source="definition"
)
def test_an_implied_atom_asks_nothing_more(kind, data) -> None:
    conjunction = data.draw(st.frozensets(of_kind(kind, LOCATIONS), min_size=1, max_size=4))
    simple = ALGEBRA.simplify(kind, conjunction)
    atom = data.draw(of_kind(kind, LOCATIONS) | st.sampled_from(sorted(conjunction, key=repr)))
    if simple is not None and ALGEBRA.implied(kind, simple, atom):
        found = fitting(ALGEBRA, simple, kind)
        assert found == fitting(ALGEBRA, simple | {atom}, kind)


TEXT, ONE = (LOCATIONS[1], True), (LOCATIONS[0], True)
ANY_BUT_A = named("a").complement()


@pytest.mark.parametrize(
    ("kind", "atoms"),
    [
        ("object", {Members(ANY_BUT_A, TEXT), Member(ALL_KEYS, ONE)}),
        ("object", {Members(ANY_BUT_A, TEXT), Member(named("a", "b"), ONE)}),
        ("object", {Members(ANY_BUT_A, (LOCATIONS[3], True)), Member(ALL_KEYS, TEXT)}),
        ("array", {Unique(), Count(0, 2)}),
        ("array", {Unique(False), Count(0, 2)}),
        ("number", {Integer(), Range(0, 1, exclusive_minimum=True)}),
        ("number", {Integer(), Range(1, 2, exclusive_maximum=True)}),
        ("number", {Range(maximum=2), Range(maximum=1)}),
        ("number", {Range(maximum=1), Range(maximum=1, exclusive_maximum=True)}),
        ("number", {Range(minimum=1), Range(minimum=1, exclusive_minimum=True)}),
    ],
)
def test_what_is_easily_lost_by_simplifying(kind, atoms) -> None:
    found = fitting(ALGEBRA, atoms, kind)
    assert found
    assert fitting(ALGEBRA, ALGEBRA.simplify(kind, frozenset(atoms)), kind) == found


@pytest.mark.parametrize(
    ("kind", "atoms"),
    [
        ("string", {Count(2, None), Count(0, 1)}),
        ("array", {Count(2, None), Unique(False), Count(0, 1)}),
        ("array", {Count(0, 1), Unique(False)}),
        ("array", {Matches(0, ONE, 1, None), Items(0, (ONE[0], False))}),
        ("array", {Matches(1, ONE, 2, None), Count(0, 2)}),
        ("object", {Count(0, 0), Required("a")}),
        ("object", {Count(0, 0), Member(ALL_KEYS, ONE)}),
        ("object", {Required("a"), Members(named("a"), ONE), Members(ALL_KEYS, TEXT)}),
        ("object", {Member(named("a"), ONE), Members(ALL_KEYS, (ONE[0], False))}),
        ("number", {Integer(), Range(0, 1, exclusive_minimum=True, exclusive_maximum=True)}),
        ("number", {Integer(), Integer(positive=False)}),
        ("number", {Range(1, 1, exclusive_minimum=True)}),
    ],
)
def test_contradictions_that_are_seen_at_once(kind, atoms) -> None:
    assert fitting(ALGEBRA, atoms, kind) == []
    assert ALGEBRA.simplify(kind, frozenset(atoms)) is None


def test_what_is_evaluated_is_noted_only_where_it_is_asked_for() -> None:
    document = SchemaDocument(
        {"properties": {"a": {"type": "string"}}, "prefixItems": [{"type": "null"}]}
    )
    algebra = SchemaAlgebra(document)
    for kind in ("object", "array"):
        for tracking in (False, True):
            (found,) = algebra.conjunctions(Apply(document.root), kind, tracking=tracking)
            assert any(isinstance(atom, Evaluation) for atom in found) == tracking
