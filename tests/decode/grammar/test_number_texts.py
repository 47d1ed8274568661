"""All texts of a number, and one text per number."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.json_scalars import json_numbers
from refllm.decode.grammar.json_scalars.number_texts import (
    TEXTS_PER_NUMBER,
    canonical,
    short_texts,
    texts_of,
)

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@given(numbers)
def test_what_json_dumps_writes_is_a_text_of_the_number(value) -> None:
    assert texts_of(value).matches(json.dumps(value).encode())
    assert json.dumps(value).encode() in short_texts(value)
    for text in short_texts(value):
        assert texts_of(value).matches(text)
        assert float(json.loads(text)) == float(value)


@given(st.integers(-30, 30), st.integers(-30, 30))
def test_a_text_has_one_value(one, other) -> None:
    one, other = one / 4, other / 4
    for text in short_texts(other):
        assert texts_of(one).matches(text) == (one == other)


@given(st.sampled_from([0, 1, -2, 2.5, -0.25, 1e16, 3e-7, 120]), st.integers(0, 99))
def test_all_texts_are_read_as_the_value(value, at) -> None:
    words = texts_of(value).words(100)
    assert float(json.loads(bytes(words[min(at, len(words) - 1)]))) == value


@pytest.mark.parametrize("values", [(0,), (1, 2), (2.5, 1, 0), (1e-7, 10**16), tuple(range(30))])
def test_canonical_texts_are_as_finite_as_the_values(values) -> None:
    language = canonical(json_numbers.values(values))
    assert language.finite
    found = [json.loads(bytes(word)) for word in language.words(9999)]
    assert set(found) == set(values)
    assert len(found) <= TEXTS_PER_NUMBER * len(values)
    assert not canonical(json_numbers.interval(0, 1)).finite
    assert not canonical(json_numbers.integer()).finite


@given(numbers)
def test_a_canonical_text_of_each_number_is_left(value) -> None:
    assert any(canonical(json_numbers.number()).matches(text) for text in short_texts(value))


def test_infinity_has_no_texts() -> None:
    assert short_texts(float("inf")) == {b"inf"}
