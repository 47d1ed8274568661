"""Sets of keys as symbols, against the keys that they contain."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.json_schema.key_sets import ALL_KEYS, KeySet, named, union

KEYS = ["", "a", "b", "ab", "ba", "aab", "c"]
names = st.frozensets(st.sampled_from(KEYS), max_size=3)
bases = st.frozensets(st.sampled_from(["^a", "b$", "^.$"]), max_size=2)
key_sets = st.builds(KeySet, names, bases, st.booleans())


def members(keys: KeySet) -> set[str]:
    return {k for k in KEYS if keys.contains(k, lambda base, key: bool(re.search(base, key)))}


def expected(keys: KeySet) -> set[str]:
    """What the class's docstring says."""
    found = {key for key in KEYS if key in keys.names or any(re.search(b, key) for b in keys.bases)}
    return set(KEYS) - found if keys.negated else found


@given(key_sets, key_sets)
def test_sets_have_the_keys_that_their_symbols_say(one, other) -> None:
    assert members(one) == expected(one)
    assert members(one.complement()) == set(KEYS) - members(one)
    if one.within(other):
        assert members(one) <= members(other)
    if one.nothing:
        assert not members(one)
    if one.everything:
        assert members(one) == set(KEYS)
    only = one.only()
    if only is not None:
        assert members(one) == {only}


def test_what_symbols_tell() -> None:
    """The answers that the algebra relies on to stay small."""
    assert named("a").within(named("a", "b"))
    assert not named("a", "b").within(named("a"))
    assert named("a").within(named("b").complement())
    assert not named("a").within(named("a").complement())
    assert not KeySet(bases=frozenset({"^a"})).within(named("b").complement()), "unknown"
    assert named("a", "b").complement().within(named("a").complement())
    assert not named("a").complement().within(named("a", "b").complement())
    assert KeySet(bases=frozenset({"x"})).within(KeySet(named("a").names, frozenset({"x", "y"})))
    assert not ALL_KEYS.within(named("a").complement())
    assert named("a").within(ALL_KEYS)
    assert KeySet().within(named("a"))
    assert KeySet().nothing
    assert not ALL_KEYS.nothing
    assert ALL_KEYS.everything
    assert not named("a").complement().everything
    assert named("a").only() == "a"
    assert named("a", "b").only() is named("a").complement().only() is None
    assert KeySet(named("a").names, frozenset({"x"})).only() is None


@given(st.lists(st.builds(KeySet, names, bases), max_size=3), st.booleans())
def test_a_union_has_the_keys_of_all_parts(parts, everything) -> None:
    parts = [*parts, ALL_KEYS] if everything else parts
    assert members(union(parts)) == set().union(*map(members, parts))


def test_a_union_with_a_negated_set_has_no_symbol() -> None:
    with pytest.raises(ValueError, match="no symbol"):
        union([named("a").complement()])
