"""Conjunctions keep their meaning while they are made simple, negated and multiplied."""

from __future__ import annotations

import pytest
from atoms import OF_KIND, fitting, holds, small_document
from hypothesis import given
from hypothesis import strategies as st
from strategies_of_atoms import of_kind

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
