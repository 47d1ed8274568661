"""Log-probabilities of outputs and prompts: log_softmax of a full forward, wherever they are
computed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from processing import processed
from refllm.api import Model
from refllm.decode import logprobs as module
from refllm.decode.completion import CompletionOutput
from refllm.decode.logprobs import (
    Logprob,
    processed_log_probabilities,
    token_logprobs,
)
from refllm.decode.output_params import OutputParams
from refllm.decode.sampling import log_probabilities, process_logits
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from strategies import seeds
from tiny_models import tiny_model

# Float64 logits of these networks are of size 1; two ways to sum their some hundred products
# differ by less than 1e-13.
TOLERANCE = 1e-12
V = 257


def network(seed: int = 3) -> Model:
    record = tiny_model(seed, vocab_size=V, max_position_embeddings=96, eos_token_ids=())
    return Model(record.config, record.weights, record.tokenizer)


MODEL = network()


def log_softmax(z: np.ndarray) -> np.ndarray:
    """By its definition; math.fsum adds without rounding on the way."""
    peak = max(z)
    total = math.fsum(math.exp(x - peak) for x in z)
    return np.array([x - peak - math.log(total) for x in z])


def ranked(log_p: np.ndarray) -> list[int]:
    """Token ids, the most probable first, of equal ones the lowest first."""
    return sorted(range(len(log_p)), key=lambda token: (-log_p[token], token))


def check_entry(entry: dict[int, Logprob], token: int, log_p: np.ndarray, k: int) -> None:
    order = ranked(log_p)
    wanted = order if k < 0 else order[:k]
    assert next(iter(entry)) == token
    assert set(entry) == {token, *wanted}
    assert [t for t in entry if t != token] == [t for t in wanted if t != token]
    for t, one in entry.items():
        assert one.rank == 1 + order.index(t)
        assert abs(one.logprob - log_p[t]) <= TOLERANCE


def entries(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, count - 1), min_size=1, max_size=4)


@given(z=st.lists(st.integers(-3, 3), min_size=1, max_size=6), k=st.integers(-1, 8), data=st.data())
def test_an_entry_has_the_token_and_the_best_with_ties_by_id(xp, z, k, data):
    tokens = data.draw(entries(len(z)))
    log_p = log_probabilities(xp.asarray(np.array([z, z[::-1]], dtype=float)))
    rows = [i % 2 for i in range(len(tokens))]
    for row, token, entry in zip(rows, tokens, token_logprobs(log_p, rows, tokens, k), strict=True):
        check_entry(entry, token, to_host(log_p)[row], k)


@pytest.mark.theorem(
    "Log-probabilities of an output equal log_softmax of a full forward of the tokens before, "
    "with drafts or without, in a batch or alone, within 1e-12 in float64",
    source="the chain rule; vLLM's logprobs, mode raw_logprobs",
)
@pytest.mark.parametrize("k", [0, 3, -1])
@pytest.mark.parametrize("drafter", [None, "model", "n-gram", "tree"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_logprobs_are_those_of_a_full_forward(k, drafter, temperature):
    draft = {
        None: lambda: None,
        "model": lambda: ModelDrafter(network(5), 3),
        "n-gram": lambda: NGramDrafter(3, shortest=1),
        "tree": lambda: TreeDrafter(network(5), 4, confidence=0.99),
    }[drafter]()
    prompt = [1, 2, 3, 1, 2]
    found = MODEL.generate(
        prompt,
        9,
        temperature=temperature,
        rng=2,
        logprobs=k,
        details=True,
        drafter=draft,
        # masked tokens and biases do not show in raw log-probabilities
        bad_words=[(7,)],
        logit_bias={8: 2.0},
    )
    assert len(found.tokens) == len(found.logprobs) == 9
    total = 0.0
    for i, (token, entry) in enumerate(zip(found.tokens, found.logprobs, strict=True)):
        log_p = log_softmax(MODEL.logits([*prompt, *found.tokens[:i]])[-1])
        check_entry(entry, token, log_p, k)
        total += log_p[token]
    assert abs(found.cumulative_logprob - total) <= 9 * TOLERANCE


@pytest.mark.theorem(
    "Log-probabilities of a prompt equal log_softmax of a full forward, in chunks and in a "
    "batch of unequal prompts, within 1e-12 in float64",
    source="vLLM's prompt_logprobs",
)
@pytest.mark.parametrize("chunk", [256, 3])
@pytest.mark.parametrize("rows", [256, 2])
def test_prompt_logprobs_are_those_of_a_full_forward(chunk, rows, monkeypatch):
    monkeypatch.setattr("refllm.decode.generate.PREFILL_TOKENS", chunk)
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", rows)
    prompts = [[1, 2, 3, 1, 2, 9, 9], [4], [5, 6, 7]]
    outputs = MODEL.generate_batch(prompts, 2, prompt_logprobs=2, logprobs=1, details=True)
    alone = MODEL.generate(prompts[0], 2, prompt_logprobs=2, details=True)
    for prompt, output in [*zip(prompts, outputs, strict=True), (prompts[0], alone)]:
        z = MODEL.logits(prompt)
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for i, entry in enumerate(output.prompt_logprobs[1:]):
            check_entry(entry, prompt[i + 1], log_softmax(z[i]), 2)
        for i, entry in enumerate(output.logprobs or []):
            z = MODEL.logits([*prompt, *output.tokens[:i]])[-1]
            check_entry(entry, output.tokens[i], log_softmax(z), 1)
    assert alone.logprobs is None


@pytest.mark.parametrize("chunk", [256, 3])
@pytest.mark.parametrize("start", [0, 1, 2, 5, 7, 9])
def test_prompt_logprobs_from_a_start_are_the_same_without_those_before(start, chunk, monkeypatch):
    monkeypatch.setattr("refllm.decode.generate.PREFILL_TOKENS", chunk)
    prompts = [[1, 2, 3, 1, 2, 9, 9], [4], [5, 6, 7]]
    whole = MODEL.generate_batch(prompts, 1, prompt_logprobs=2, details=True)
    found = MODEL.generate_batch(
        prompts, 1, prompt_logprobs=2, prompt_logprobs_start=start, details=True
    )
    for one, other, prompt in zip(found, whole, prompts, strict=True):
        first = min(max(1, start), len(prompt))
        assert len(one.prompt_logprobs) == len(prompt)
        assert one.prompt_logprobs[:first] == [None] * first
        for entry, expected in zip(
            one.prompt_logprobs[first:], other.prompt_logprobs[first:], strict=True
        ):
            assert [*entry] == [*expected]
            assert all(abs(entry[t].logprob - expected[t].logprob) <= 1e-12 for t in entry)


@given(seed=seeds)
def test_processed_logprobs_are_of_the_distribution_that_is_drawn_from(xp, seed):
    z = np.random.default_rng(seed).standard_normal((3, 9))
    settings = [GREEDY, SamplingParams(0.7, top_k=3), SamplingParams(1.0)]
    found = to_host(processed_log_probabilities(xp.asarray(z), settings))
    np.testing.assert_allclose(found[0], log_softmax(z[0]), atol=TOLERANCE)
    p = process_logits(z[1], 0.7, 3)
    assert (np.isneginf(found[1]) == (p == 0)).all()
    np.testing.assert_allclose(np.exp(found[1]), p, atol=TOLERANCE)
    np.testing.assert_allclose(found[2], log_softmax(z[2]), atol=TOLERANCE)
    one = to_host(processed_log_probabilities(xp.asarray(z), settings[1]))
    np.testing.assert_allclose(np.exp(one[1]), p, atol=TOLERANCE)
    assert (to_host(processed_log_probabilities(xp.asarray(z), GREEDY))[0] == found[0]).all()


@pytest.mark.parametrize("drafter", [None, NGramDrafter(3, shortest=1)])
def test_processed_logprobs_see_every_processor_and_filter(drafter):
    sampling = SamplingParams(
        temperature=0.8, top_k=20, presence_penalty=0.5, logit_bias={3: 1.0}, bad_words=[(9,)]
    )
    prompt = [1, 2, 3]
    found = MODEL.generate(
        prompt,
        6,
        sampling=sampling,
        rng=1,
        logprobs=2,
        logprobs_mode="processed_logprobs",
        details=True,
        drafter=drafter,
    )
    for i, (token, entry) in enumerate(zip(found.tokens, found.logprobs, strict=True)):
        output = found.tokens[:i]
        z = processed(MODEL.logits([*prompt, *output])[-1], sampling, prompt, output)
        p = process_logits(z, 0.8, 20)
        assert abs(entry[token].logprob - math.log(p[token])) <= 1e-11
        assert list(entry)[1:] == [t for t in ranked(np.log(p + 1e-300))[:2] if t != token]


def test_an_output_that_ends_early_has_the_logprob_of_its_end_token():
    prompt = [1, 2, 3]
    free = MODEL.generate(prompt, 5, details=True, logprobs=0)
    end = free.tokens[2]
    first = free.tokens.index(end)
    found = MODEL.generate(prompt, 5, stop_token_ids=[end], details=True, logprobs=0)
    assert found.tokens == free.tokens[:first]
    assert found.logprobs == free.logprobs[: first + 1]
    assert (found.finish_reason, found.stop_reason) == ("stop", end)
    kept = MODEL.generate(
        prompt,
        5,
        stop_token_ids=[end],
        details=True,
        logprobs=0,
        include_stop_str_in_output=True,
    )
    assert kept.tokens == free.tokens[: first + 1]
    assert kept.logprobs == found.logprobs


def test_streamed_chunks_have_the_logprobs_of_their_tokens():
    whole = MODEL.generate("ab", 6, details=True, logprobs=2)
    chunks = list(MODEL.stream("ab", 6, details=True, logprobs=2))
    assert [t for c in chunks for t in c.tokens] == whole.tokens
    assert [entry for c in chunks for entry in c.logprobs] == whole.logprobs
    assert [c.finish_reason for c in chunks] == [None] * 6 + ["length"]


def test_without_log_probabilities_there_is_no_sum():
    assert CompletionOutput(0, [1], "a", "length").cumulative_logprob is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": -2}, "logprobs must be None, a number of tokens"),
        ({"logprobs": True}, "logprobs must be None"),
        ({"prompt_logprobs": 1.0}, "prompt_logprobs must be None"),
        (
            {"logprobs_mode": "raw_logits"},
            "logprobs_mode must be raw_logprobs or processed_logprobs",
        ),
    ],
)
def test_bad_wishes_are_rejected_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        OutputParams(**options)
