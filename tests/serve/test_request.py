"""Requests say which field is wrong; a sequence is two counters."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.serve.request import Request, Sequence


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", True),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 0.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", "x"),
        ("stop", [""]),
        ("stop", [3]),
        ("n", 0),
        ("n", 1.0),
        ("length_penalty", math.nan),
        ("priority", 0.5),
        ("arrival", -1),
        ("arrival", math.inf),
        ("timeout", -1),
        ("timeout", math.nan),
        ("best_of", 0),
        ("best_of", 1.5),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("min_tokens", -1),
        ("min_tokens", 17),  # of max_tokens 16
        ("stop_token_ids", [-1]),
        ("logprobs", -2),
        ("prompt_logprobs", 0.5),
        ("logprobs_mode", "all"),
        ("output", {"stop": "x"}),
        ("salt", 3),
    ],
)
def test_a_field_that_makes_no_sense_is_named(field, value):
    with pytest.raises(ValueError, match=rf"request 'r': {field} must be .*got"):
        Request([1], request_id="r", **{field: value})


SETTINGS = {
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
}


def test_the_keywords_of_sampling_are_a_shorthand_for_it():
    assert Request([1]).sampling == SamplingParams()
    for name, value in SETTINGS.items():
        assert Request([1], **{name: value}).sampling == SamplingParams(**{name: value})
    sampling = SamplingParams(**SETTINGS)
    assert Request([1], **SETTINGS) == Request([1], sampling=sampling)
    assert Request([1], sampling=sampling).sampling is sampling


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(top_k=2)])
def test_sampling_and_its_shorthand_together_are_an_error(sampling):
    with pytest.raises(ValueError, match=r"request 'r': give either sampling=.*\(top_k, min_p\)"):
        Request([1], request_id="r", sampling=sampling, top_k=2, min_p=0.0)


@pytest.mark.parametrize("wrong", [0.7, {"temperature": 0.7}, ()])
def test_sampling_must_be_sampling_params(wrong):
    with pytest.raises(ValueError, match=r"request None: sampling must be a SamplingParams"):
        Request([1], sampling=wrong)
    with pytest.raises(TypeError, match="temprature"):
        Request([1], temprature=0.7)


def test_a_request_with_another_id_is_the_same_but_for_that():
    asked = Request(
        [1], 5, sampling=SamplingParams(0.7), seed=3, stop="x", n=2, arrival=2.0, salt="s"
    )
    named = replace(asked, request_id="a")
    assert named.request_id == "a"
    assert replace(named, request_id=None) == asked
    with pytest.raises(FrozenInstanceError):
        asked.sampling = GREEDY


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ([], "empty"),
        (range(0), "empty"),
        ("", "empty"),
        (b"text", "token ids, text or messages, got bytes"),
        (3, "token ids, text or messages"),
        ([{"role": "user"}, 3], "messages alone"),
        ([1, 2.0], "2.0 at position 1"),
        ([1, -1], "-1 at position 1"),
        ([True], "True at position 0"),
        (range(3, -2, -1), "0 or more"),
        (np.zeros((2, 2), int), "position 0"),
    ],
)
def test_an_invalid_prompt_is_rejected(prompt, why):
    with pytest.raises(ValueError, match=why):
        Request(prompt)


def test_defaults():
    asked = Request([1])
    assert (asked.max_tokens, asked.request_id, asked.seed, asked.ignore_eos) == (
        16,
        None,
        None,
        False,
    )
    assert (asked.n, asked.beam, asked.length_penalty) == (1, False, 1.0)
    assert (asked.priority, asked.arrival, asked.salt) == (0, 0.0, None)


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 0}, {"seed": 0}, {"n": 1}, {"priority": -3}, {"length_penalty": -1}]
)
def test_values_at_the_ends_of_their_ranges_are_allowed(fields):
    (name, value), *_ = fields.items()
    assert getattr(Request([0], **fields), name) == value


def test_no_stop_string_is_none_or_empty():
    assert Request([1], stop=None).stop == Request([1]).stop == ()


class UnnamedId:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def test_an_id_must_have_a_repr_for_messages():
    for fields in ({}, {"n": 0}):
        with pytest.raises(ValueError, match=r"request \(an id of class UnnamedId\): "):
            Request([1], 2, UnnamedId(), **fields)


def test_an_id_must_be_hashable():
    with pytest.raises(ValueError, match="hashable"):
        Request([1], request_id=[])


@given(prompt=st.lists(st.integers(0, 9), min_size=1), longest=st.integers(0, 9))
def test_bound_the_last_token_is_never_computed(prompt, longest):
    request = Request(np.array(prompt), longest, stop="end")
    assert request.prompt == tuple(prompt)
    assert all(type(token) is int for token in request.prompt)
    assert request.max_cached_tokens == len(prompt) + max(longest - 1, 0)
    assert request.stop == ("end",)


def test_a_range_stays_a_range():
    assert Request(range(5)).prompt == range(5)


def test_a_sequence_is_behind_by_what_it_has_not_computed():
    sequence = Sequence(Request([1, 2, 3], 4, request_id="a", n=2), 0, 0)
    assert (sequence.total, sequence.output, sequence.remaining, sequence.key, sequence.slots) == (
        3,
        [],
        4,
        ("a", 0),
        2,
    )
    sequence.tokens.append(7)
    sequence.drafts = [8, 9]
    assert (sequence.total, sequence.output, sequence.remaining) == (6, [7], 3)
    assert repr(sequence) == "Sequence('a'.0, 0/6, waiting)"


@pytest.mark.parametrize("value", [Fraction(1, 2), np.float32(0.5)])
@pytest.mark.parametrize("name", ["length_penalty", "arrival"])
def test_fields_of_a_request_become_plain_numbers(name, value):
    field = getattr(Request([1], **{name: value}), name)
    assert type(field) is float
    assert field == 0.5


def test_strings_and_integers_of_other_classes_become_plain_ones():
    class Text(str):
        """Its hash fails, and so would every table that it is a key of."""

        def __hash__(self) -> int:
            raise RuntimeError("no hash")

    request = Request([1], np.int64(3), salt=Text("tenant"), stop=Text("x"), seed=np.uint8(7))
    assert (request.max_tokens, request.salt, request.stop, request.seed) == (
        3,
        "tenant",
        ("x",),
        7,
    )
    assert {type(v) for v in (request.salt, *request.stop)} == {str}
    assert type(request.max_tokens) is type(request.seed) is int


@pytest.mark.parametrize("name", ["length_penalty", "arrival"])
def test_a_number_that_no_float_holds_is_rejected(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Request([1], **{name: 10**400})
