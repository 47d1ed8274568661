"""Strings: lengths that a pattern can have, counted patterns, formats that are known in part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from naive_schemas import node_accepts

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_scalars.formats import format_rule
from refllm.decode.grammar.json_schema.formulas import Count, count_of
from refllm.decode.grammar.json_schema.schema_algebra import SchemaAlgebra
from refllm.decode.grammar.json_schema.schema_documents import SchemaDocument
from refllm.decode.grammar.json_schema.shapes import StringShape
from refllm.decode.grammar.json_schema.string_rules import (
    Pattern,
    Words,
    inhabited,
    merge,
    string_formula,
)
from refllm.decode.grammar.patterns.regex import from_pattern

PATTERNS = [
    "^a*$",
    "^(aa)*$",
    "^(aaa|aaaaa)*$",
    "^a{3}$",
    "^(a|b{4})$",
    "^$",
    "^a{2,5}$",
    "^a(bc)*$",
]


def accepts(schema: object, *values: object) -> list[bool]:
    document = SchemaDocument(schema)
    algebra = SchemaAlgebra(document)
    return [node_accepts(algebra, algebra.start(document.root), value) for value in values]


@given(st.sampled_from(PATTERNS), st.integers(0, 30), st.none() | st.integers(0, 30))
@pytest.mark.theorem(
    "A string shape is inhabited exactly where its DFA accepts a word of an allowed length.",
    source="sets of states after each length, which repeat",
)
def test_some_string_has_an_allowed_length(pattern, minimum, maximum) -> None:
    dfa = from_pattern(pattern, search=True)
    lengths = {0: {dfa.start}}
    for length in range(80):
        lengths[length + 1] = {s for state in lengths[length] for s in dfa.successors[state]}
    expected = any(
        minimum <= length <= (80 if maximum is None else maximum)
        and any(map(dfa.accepting, states))
        for length, states in lengths.items()
    )
    assert inhabited(StringShape(dfa, minimum, maximum)) == expected


def test_long_lengths_are_found_without_counting_to_them() -> None:
    dfa = from_pattern("^(aa)*b?$", search=True)
    assert inhabited(StringShape(dfa, 10**12, 10**12))
    even = from_pattern("^(aa)*$", search=True)
    assert inhabited(StringShape(even, 10**12, 10**12))
    assert not inhabited(StringShape(even, 10**12 + 1, 10**12 + 1))
    assert inhabited(StringShape(even, 10**12 + 1, 10**12 + 2))
    assert inhabited(StringShape(even, 10**12 + 1, None))
    assert not inhabited(StringShape(from_pattern("^a{3}$", search=True), 4, None))
    assert not inhabited(StringShape(from_pattern("a^", search=True), 0, None))


def test_a_counted_pattern_is_a_pattern_and_a_count() -> None:
    (formula,) = string_formula({"pattern": "^[a-z]{2,1000}$"})
    atoms = frozenset(formula.parts)
    assert count_of(atoms) == Count(2, 1000)
    schema = {"type": "string", "pattern": "^[a-z]{2,1000}$"}
    values = ["a", "ab", "a" * 1000, "a" * 1001, "a1", ""]
    expected = [False, True, True, False, False, False]
    assert accepts(schema, *values) == expected
    assert accepts({"type": "string", "not": schema}, *values) == [not x for x in expected]


def test_constants_of_alternatives_are_one_shape() -> None:
    words = [frozenset({Words(frozenset({each}))}) for each in "abc"]
    other = frozenset({Pattern("x"), Count(1, 2)})
    assert merge([words[0], other, *words[1:]]) == [frozenset({Words(frozenset("abc"))}), other]
    assert merge([other]) == [other]
    assert merge([]) == []


UUID = "12345678-1234-1234-1234-123456789012"
UNSURE = "?2345678-1234-1234-1234-123456789012"  # in neither automaton of the format


def test_alternatives_are_not_disjoint_where_a_format_is_not_sure() -> None:
    rule = format_rule("uuid")
    assert rule is not None
    for languages in (rule.accepted, rule.rejected()):
        assert not any(dfa.matches(UNSURE) for dfa, _, _ in languages)
    one_of = {"type": "string", "oneOf": [{"enum": [UNSURE, "a"]}, {"format": "uuid"}]}
    assert accepts(one_of, "a", UUID, UNSURE) == [True, True, False]
    member = {"required": ["k"], "type": "object"}
    objects = {
        "oneOf": [
            {**member, "properties": {"k": {"enum": [UNSURE, "a"]}}},
            {**member, "properties": {"k": {"format": "uuid"}}},
        ]
    }
    values = [{"k": "a"}, {"k": UUID}, {"k": UNSURE}]
    assert accepts(objects, *values) == [True, True, False]
    assert accepts({"const": UNSURE, "format": "uuid"}, UNSURE) == [False]
    assert accepts({"const": UNSURE, "not": {"format": "uuid"}}, UNSURE) == [False]


def test_the_opposite_of_a_format_that_is_not_known_is_rejected_by_name() -> None:
    with pytest.raises(GrammarError) as raised:
        accepts({"type": "string", "not": {"format": "regex"}}, "a")
    assert (raised.value.keyword, raised.value.pointer) == ("format", "#/not")
    assert accepts({"type": "string", "format": "no such format"}, "a") == [True]
    assert accepts({"not": {"format": "ipv4"}}, "1.2.3.4", "1.2.3.400", 1) == [False, True, False]
    hosts = ["a." * 126 + "a", "a." * 126 + "aa"]
    assert accepts({"format": "hostname"}, *hosts) == [True, False]
