"""Formulas: negation, counts, absorption."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.json_schema.formulas import (
    FALSE,
    TRUE,
    And,
    Apply,
    Count,
    Evaluation,
    ExactlyOne,
    Or,
    absorb,
    count_of,
    flattened,
    implies,
)


@dataclass(frozen=True)
class Letter:
    """An atom that is true where its letter is."""

    name: str
    positive: bool = True

    def negated(self):
        return Letter(self.name, not self.positive)


LETTERS = "abc"
atoms = st.builds(Letter, st.sampled_from(LETTERS), st.booleans())
formulas = st.recursive(
    atoms,
    lambda inside: (
        st.builds(And, st.lists(inside, max_size=3).map(tuple))
        | st.builds(Or, st.lists(inside, max_size=3).map(tuple))
        | st.builds(implies, inside, inside)
    ),
    max_leaves=8,
)
WORLDS = [dict(zip(LETTERS, bits, strict=True)) for bits in product([False, True], repeat=3)]


def true(formula, world) -> bool:
    match formula:
        case And(parts):
            return all(true(part, world) for part in parts)
        case Or(parts):
            return any(true(part, world) for part in parts)
        case Letter(name, positive):
            return world[name] == positive
        case Apply(name, positive):
            return world[name] == positive
        case ExactlyOne(parts, positive):
            return (sum(true(part, world) for part in parts) == 1) == positive
    raise TypeError(formula)


@given(formulas, formulas)
@pytest.mark.theorem(
    "The negation of a formula is true exactly where the formula is false.",
    source="De Morgan",
)
def test_a_negated_formula_is_its_opposite(one, other) -> None:
    for world in WORLDS:
        assert true(one.negated(), world) == (not true(one, world))
        assert true(one.negated().negated(), world) == true(one, world)
        assert true(implies(one, other), world) == (not true(one, world) or true(other, world))
    assert true(TRUE, {})
    assert not true(FALSE, {})
    if isinstance(one, And):
        assert [true(part, WORLDS[5]) for part in flattened(one)].count(False) == 0 or not true(
            one, WORLDS[5]
        )
        assert not any(isinstance(part, And) for part in flattened(one))


@pytest.mark.parametrize("signs", [*product([False, True], repeat=3)])
def test_exactly_one_and_its_opposite(signs) -> None:
    parts = tuple(Apply(name, sign) for name, sign in zip(LETTERS, signs, strict=True))
    formula = ExactlyOne(parts)
    for world in WORLDS:
        one = sum(true(part, world) for part in parts) == 1
        assert true(formula, world) == one
        assert true(formula.negated(), world) == (not one)
        assert true(formula.negated().none_or_two(), world) == (not one)
        assert true(formula.negated().negated(), world) == one


def test_a_negated_schema_evaluates_nothing_even_when_negated_again() -> None:
    assert Apply("a").evaluates
    again = Apply("a").negated().negated()
    assert (again.positive, again.evaluates) == (True, False)
    parts = ExactlyOne((Apply("a"), Apply("b"))).negated().negated().parts
    assert [part.evaluates for part in parts] == [False, False]
    assert Evaluation().negated() == FALSE


limits = st.none() | st.integers(0, 4)
counts = st.builds(Count, st.integers(0, 4), limits)


@given(counts, counts)
def test_counts_are_ranges(one, other) -> None:
    numbers = range(10)
    for n in numbers:
        expected = one.minimum <= n and (one.maximum is None or n <= one.maximum)
        assert one.contains(n) == expected
        assert one.narrowed(other).contains(n) == (expected and other.contains(n))
        assert any(part.contains(n) for part in one.negated().parts) == (not expected)
    assert one.empty == (not any(map(one.contains, numbers)))
    assert count_of(frozenset({one, other, Letter("a")})) == one.narrowed(other)


@dataclass(frozen=True)
class Noted(Evaluation):
    """An evaluation of one letter."""

    name: str


conjunctions = st.frozensets(atoms | st.builds(Noted, st.sampled_from(LETTERS)), max_size=4)


@given(st.lists(conjunctions, max_size=8))
def test_absorption_keeps_what_holds_and_what_is_evaluated(found) -> None:
    """For each conjunction one is left that asks no more and evaluates no less."""

    def split(conjunction):
        noted = {atom for atom in conjunction if isinstance(atom, Noted)}
        return conjunction - noted, noted

    kept = absorb(found)
    assert len(set(kept)) == len(kept)
    assert set(kept) <= set(found)
    for asked, noted in map(split, found):
        assert any(less <= asked and noted <= more for less, more in map(split, kept))
    for one, other in product(map(split, kept), repeat=2):
        assert one == other or not (one[0] <= other[0] and other[1] <= one[1])
    many = [*found, frozenset({Letter("z")}), frozenset()]
    assert set(absorb(many, most=0)) == set(many), "long lists lose duplicates alone"
