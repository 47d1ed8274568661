"""The logits processors against their definitions, row by row."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from networks import EPS
from processing import processed
from refllm.decode.logits_processors import (
    LogitsProcessors,
    Row,
    call_processor,
    process_rows,
    with_token_ids,
)
from refllm.decode.sampling_params import GREEDY, SamplingParams
from strategies import seeds

V = 7
tokens = st.integers(0, V - 1)
texts = st.lists(tokens, max_size=6)
halves = st.integers(-4, 4).map(lambda i: i / 2)
powers = st.sampled_from([0.5, 1.0, 2.0, 4.0])  # products with them are exact


def doubles(output, z):
    return z + z


def shifts_the_first(prompt, output, z):
    z[0] = z[0] + len(prompt) - len(output)  # in place
    return z


settings = st.builds(
    SamplingParams,
    repetition_penalty=powers,
    presence_penalty=halves,
    frequency_penalty=halves,
    logit_bias=st.none() | st.dictionaries(tokens, halves, max_size=3),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=4),
    logits_processors=st.lists(st.sampled_from([doubles, shifts_the_first]), max_size=2),
)
processors = st.builds(LogitsProcessors, settings, st.integers(0, 4), st.frozensets(tokens))


@pytest.mark.theorem(
    "In a batch, with drafts or without, each row gets the processors of its own request after "
    "its own prefix, in vLLM's order; other rows stay as they are",
    source="vllm/v1/sample/sampler.py; decode/logits_processors.py",
)
@given(seed=seeds, rows=st.lists(st.none() | st.builds(Row, processors, texts, texts), max_size=4))
def test_rows_of_a_batch_are_processed_as_each_alone(xp, seed, rows):
    z = np.random.default_rng(seed).integers(-8, 9, (len(rows), V)) / 4  # exact in every order
    before = z.copy()
    found = to_host(process_rows(xp.asarray(z), rows)) if rows else z
    for i, row in enumerate(rows):
        expected = z[i]
        if row is not None:
            one = row.processors
            expected = processed(
                z[i], one.sampling, row.prompt, row.output, one.min_tokens, one.end_tokens
            )
        np.testing.assert_array_equal(found[i], expected)
    np.testing.assert_array_equal(z, before)


def test_the_order_shows_where_processors_do_not_commute():
    """A bias of 3 makes z positive, so the penalty divides; a processor sees biased logits."""
    seen = []

    def notes(output, z):
        seen.append(to_host(z).tolist())
        return z

    sampling = SamplingParams(
        logit_bias={0: 3.0}, repetition_penalty=2.0, presence_penalty=0.5, logits_processors=[notes]
    )
    row = Row(LogitsProcessors(sampling), [0], [0, 1])
    z = process_rows(np.array([[-1.0, -1.0, -1.0]]), [row])
    assert seen == [[2.0, -1.0, -1.0]]
    assert z.tolist() == [[2.0 / 2 - 0.5, -2.0 - 0.5, -1.0]]


@pytest.mark.parametrize(("length", "masked"), [(0, True), (2, True), (3, False), (4, False)])
def test_min_tokens_masks_end_tokens_until_the_output_has_them(length, masked):
    one = LogitsProcessors(GREEDY, min_tokens=3, end_tokens=frozenset([1, 4]))
    (z,) = process_rows(np.zeros((1, V)), [Row(one, [9] * 5, [0] * length)]).tolist()
    assert [i for i, x in enumerate(z) if x == -math.inf] == ([1, 4] if masked else [])


def test_a_bad_word_counts_in_the_output_alone():
    """The first tokens of a word in the prompt do not ban its last one, as in vLLM."""
    one = LogitsProcessors(SamplingParams(bad_words=[(3, 4)]))
    across, within = process_rows(np.zeros((2, V)), [Row(one, [3], []), Row(one, [], [3])])
    assert across.tolist() == [0.0] * V
    assert within[4] == -math.inf


def test_bad_words_are_spelled_with_and_without_a_space():
    spelled = {"tree": [1, 2], " tree": [3, 2], "same": [4], " same": [0, 4], "a": [5], " a": [5]}
    tokenizer = SimpleNamespace(encode=lambda text: spelled[text])
    sampling = SamplingParams(bad_words=["tree", " same", "a", (6, 6)])
    found = with_token_ids(sampling, tokenizer).bad_words
    # " same" is longer than "same" and " a" has the same first token: neither counts
    assert found == ((1, 2), (3, 2), (4,), (5,), (6, 6))
    assert with_token_ids(GREEDY, None) is GREEDY
    with pytest.raises(ValueError, match="'tree' has no tokens"):
        with_token_ids(sampling, SimpleNamespace(encode=lambda text: []))
    with pytest.raises(ValueError, match="need a tokenizer"):
        LogitsProcessors(sampling)


def test_an_error_in_a_processor_names_its_row_and_spares_the_others():
    def fails(output, z):
        raise KeyError("lost")

    bad = LogitsProcessors(SamplingParams(logits_processors=[fails]))
    good = LogitsProcessors(SamplingParams(logit_bias={0: 1.0}))
    rows = [Row(good, [], []), Row(bad, [], [])]
    errors = []
    z = process_rows(np.zeros((2, 2)), rows, lambda i, error: errors.append((i, str(error))))
    assert errors == [(1, "'lost'")]
    assert z[0].tolist() == [1.0, 0.0]
    with pytest.raises(KeyError, match="lost"):
        process_rows(np.zeros((2, 2)), rows)


@pytest.mark.parametrize(
    "function", [lambda: 0, lambda a: 0, lambda a, b, c, d: 0, lambda a, b, c, d, *e: 0]
)
def test_a_processor_of_other_arguments_is_rejected(function):
    with pytest.raises(ValueError, match=r"takes \(output, logits\) or \(prompt, output, logits\)"):
        call_processor(function, [], [], np.zeros(2))


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (lambda output, z: z, 2),
        (lambda prompt, output, z: z, 3),
        (lambda output, z, scale=1: z, 2),
        (lambda *args: args[-1], 3),
    ],
)
def test_a_processor_gets_the_prompt_where_it_asks_for_it(function, given):
    seen = []

    def count(*args):
        seen.append(len(args))
        return function(*args)

    count.__signature__ = __import__("inspect").signature(function)
    call_processor(count, [1], [2], np.zeros(2))
    assert seen == [given]


def test_a_processor_must_return_logits_of_the_same_shape():
    for wrong in (lambda output, z: None, lambda output, z: z[:1]):
        with pytest.raises(ValueError, match=r"must return logits of shape \(2,\)"):
            call_processor(wrong, [], [], np.zeros(2))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logit_bias", [1], "must map token ids"),
        ("logit_bias", {-1: 0.0}, "0 or more, to numbers, got -1"),
        ("logit_bias", {True: 0.0}, "got True"),
        ("logit_bias", {1: math.nan}, "bias must be finite, got nan for token 1"),
        ("logit_bias", {1: "2"}, "bias must be a number"),
        ("bad_words", "word", "a list of words"),
        ("bad_words", [""], "not empty"),
        ("bad_words", [[]], "not empty"),
        ("bad_words", [[-1]], r"got \[-1\]"),
        ("bad_words", [3], "got 3"),
        ("logits_processors", [3], "a list of functions"),
        ("logits_processors", len, "a list of functions"),
        ("presence_penalty", math.inf, "presence_penalty must be finite"),
        ("frequency_penalty", "1", "frequency_penalty must be a number"),
    ],
)
def test_bad_settings_are_rejected_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{field: value})


def test_settings_are_copies():
    bias = {1: 2.0}
    words = [[1]]
    sampling = SamplingParams(logit_bias=bias, bad_words=words)
    bias[1] = 3.0
    words.append([2])
    assert (sampling.logit_bias, sampling.bad_words) == ({1: 2.0}, ((1,),))
    assert hash(sampling) == hash(SamplingParams(bad_words=[[1]]))


def test_tokens_outside_the_vocabulary_are_rejected():
    for sampling in (SamplingParams(logit_bias={V: 1.0}), SamplingParams(bad_words=[(0, V)])):
        LogitsProcessors(sampling).check_vocabulary(V + 1)
        with pytest.raises(ValueError, match=f"token {V} is outside the vocabulary of {V}"):
            LogitsProcessors(sampling).check_vocabulary(V)


def test_float32_logits_stay_float32(xp):
    one = LogitsProcessors(SamplingParams(logit_bias={0: 0.1}, presence_penalty=0.3))
    z = process_rows(xp.zeros((1, 3), dtype=xp.float32), [Row(one, [], [2])])
    assert z.dtype == xp.float32
    eps = EPS * 2**29  # of float32
    np.testing.assert_allclose(to_host(z)[0], [0.1, 0.0, -0.3], rtol=eps, atol=0)
