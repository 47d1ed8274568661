"""Frozen values are equal exactly if JSON calls them equal."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.json_scalars.json_values import freeze, read_value

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, 0.5, "", "1"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=4,
)


def equal(one, other) -> bool:
    """Instance equality of JSON Schema (2020-12, 4.2.2), by type and then by parts."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | dict) or isinstance(other, list | dict):
        return False
    return one == other


@given(json_values, json_values)
def test_frozen_values_are_equal_as_json_values_are(one, other) -> None:
    assert (freeze(one) == freeze(other)) == equal(one, other)
    if equal(one, other):
        assert hash(freeze(one)) == hash(freeze(other))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1", "1.0", True),
        ("1", "true", False),
        ("0", "false", False),
        ("[]", "{}", False),
        ("null", "[]", False),
        ('{"a": 1, "b": [2]}', '{"b": [2.0], "a": 1}', True),
        ('[["a", 1]]', '{"a": 1}', False),
        ("-0.0", "0", True),
        ("9007199254740993", "9007199254740992.0", False),
    ],
)
def test_known_pairs(one, other, same) -> None:
    assert (read_value(one.encode()) == read_value(other.encode())) == same


@given(json_values)
def test_a_value_is_read_from_its_text(value) -> None:
    assert read_value(json.dumps(value).encode()) == freeze(value)


def test_integers_that_python_does_not_read_count_as_equal() -> None:
    assert read_value(b"1" * 5000) == read_value(b"2" * 5000) == float("inf")
