"""Hypothesis strategies of atoms, per kind of value."""

from __future__ import annotations

from hypothesis import strategies as st

from refllm.decode.grammar.json_schema.array_rules import (
    ALWAYS,
    NEVER,
    Item,
    Items,
    Matches,
    Unique,
)
from refllm.decode.grammar.json_schema.formulas import Count
from refllm.decode.grammar.json_schema.key_sets import KeySet
from refllm.decode.grammar.json_schema.number_rules import Integer, Multiple, Range, Values
from refllm.decode.grammar.json_schema.object_rules import Member, Members, Required
from refllm.decode.grammar.json_schema.string_rules import Pattern, Words

small = st.integers(0, 3)
limits = st.none() | small
counts = st.builds(Count, small, limits)
strings = st.one_of(
    counts,
    st.builds(Words, st.frozensets(st.sampled_from(["", "a", "b", "ab", "aab"])), st.booleans()),
    st.builds(Pattern, st.sampled_from(["a", "^a*$", "b$", "^.$"]), st.booleans()),
)
bounds = st.none() | st.sampled_from([0, 1, 1.5, 2, -1, 3])
numbers = st.one_of(
    st.builds(Integer, st.booleans(), st.booleans()),
    st.builds(Range, bounds, bounds, st.booleans(), st.booleans()),
    st.builds(Multiple, st.sampled_from([1, 2, 3, 1.5]), st.booleans()),
    st.builds(Values, st.frozensets(st.sampled_from([0, 1, 1.5, 2, 6])), st.booleans()),
)
names = st.frozensets(st.sampled_from(["a", "b", "ab"]), max_size=2)


def of_kind(kind: str, locations: list) -> st.SearchStrategy:
    """Atoms of a kind, with the schemas at ``locations`` (the last one is for keys)."""
    schemas = st.tuples(st.sampled_from(locations[:-1]), st.booleans())
    schemas |= st.sampled_from([NEVER, ALWAYS])
    bases = st.sampled_from(["a", "^a*$", "b$", (locations[-1], True), (locations[-1], False)])
    keys = st.builds(KeySet, names, st.frozensets(bases, max_size=1), st.booleans())
    return {
        "string": strings,
        "number": numbers,
        "array": st.one_of(
            counts,
            st.builds(Item, small, schemas),
            st.builds(Items, small, schemas),
            st.builds(Matches, st.integers(0, 1), schemas, small, limits),
            st.builds(Unique, st.booleans()),
        ),
        "object": st.one_of(
            counts,
            st.builds(Required, st.sampled_from(["a", "b", "ab"])),
            st.builds(Members, keys, schemas),
            st.builds(Member, keys, schemas),
        ),
    }[kind]
