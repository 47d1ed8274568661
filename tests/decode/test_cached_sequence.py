"""A sequence that is computed once: what it generates is what a fresh start would, and the
network sees each token one time.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_models import computed_tokens
from refllm.decode import cached_sequence
from refllm.decode.cached_sequence import CachedSequence, common_prefix
from refllm.decode.generate import generate_tokens
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.errors import InputError
from tiny_models import tiny_model

V = 257
MODEL = tiny_model()
ids = st.lists(st.integers(0, V - 1), max_size=10)


def fresh(prompt: list[int], count: int, sampling=GREEDY, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [
        token
        for (token,) in generate_tokens(MODEL.weights, MODEL.config, [prompt], count, sampling, rng)
    ]


def continued(sequence: CachedSequence, prompt: list[int], count: int, seed: int = 0) -> list[int]:
    return list(sequence.generate(prompt, count, GREEDY, np.random.default_rng(seed)))


@pytest.mark.theorem(
    "a sequence that keeps what it computed generates what a fresh one does",
    source="the longest common prefix of two prompts has the same keys and values",
)
@given(st.lists(st.tuples(ids, ids, st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=4))
def test_it_generates_what_a_fresh_sequence_does(turns):
    """Prompts that continue the sequence, cut it back, or share nothing with it."""
    sequence = CachedSequence(MODEL.weights, MODEL.config)
    for new, other, kept, count in turns:
        base = other if kept > 9 else sequence.ids[: len(sequence.ids) - kept]
        prompt = [*base, *new, 7]
        cached = sequence.ids[: sequence.cache.lengths[0]]
        shared = min(common_prefix(cached, prompt), len(prompt) - 1)
        result = continued(sequence, prompt, count)
        assert result == fresh(prompt, count)
        assert sequence.ids == prompt + result
        assert (sequence.reused, sequence.computed) == (shared, len(prompt) - shared)
        assert sequence.cache.lengths[0] <= len(sequence.ids)


def test_each_token_is_computed_once(monkeypatch):
    sequence = CachedSequence(MODEL.weights, MODEL.config)
    with computed_tokens(monkeypatch) as passes:
        first = continued(sequence, [1, 2, 3], 4)
        assert passes == [3, 1, 1, 1]
        passes.clear()
        continued(sequence, [1, 2, 3, *first, 9, 9], 2)
        assert passes == [3, 1]  # the last token of the answer was sampled, and not computed
        passes.clear()
        continued(sequence, [1, 2, 8], 1)
        assert passes == [1]
        passes.clear()
        continued(sequence, [1, 2, 8], 1)  # nothing new: the last token again
        assert passes == [1]


def test_sampling_is_that_of_a_fresh_sequence():
    sampling = SamplingParams(temperature=1.0, repetition_penalty=1.5)
    sequence = CachedSequence(MODEL.weights, MODEL.config)
    continued(sequence, [5, 6, 7], 5)
    rng = np.random.default_rng(3)
    result = list(sequence.generate([5, 6, 9, 9], 8, sampling, rng))
    assert result == fresh([5, 6, 9, 9], 8, sampling, seed=3)


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_an_interrupted_answer_leaves_a_sequence_that_can_be_continued(stop_after):
    sequence = CachedSequence(MODEL.weights, MODEL.config)
    tokens = sequence.generate([1, 2, 3, 4], 9, GREEDY, np.random.default_rng(0))
    taken = [next(tokens) for _ in range(stop_after)]
    tokens.close()
    prompt = [1, 2, 3, 4, *taken, 6]
    assert continued(sequence, prompt, 3) == fresh(prompt, 3)
    assert sequence.reused == (3 + stop_after if stop_after else 0)


def test_an_exception_in_the_middle_of_a_step_leaves_what_was_computed(monkeypatch):
    """Ctrl-C comes at any time: here within the second pass of a prefill."""
    monkeypatch.setattr("refllm.decode.generate.PREFILL_TOKENS", 4)
    sequence = CachedSequence(MODEL.weights, MODEL.config)
    advance = sequence.cache.advance
    prompt = list(range(1, 13))

    def interrupted(counts):
        if sequence.cache.lengths[0] >= 4:
            raise KeyboardInterrupt
        advance(counts)

    monkeypatch.setattr(sequence.cache, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        continued(sequence, prompt, 2)
    monkeypatch.undo()
    assert sequence.cache.lengths == [4]
    assert continued(sequence, prompt, 2) == fresh(prompt, 2)
    assert sequence.reused == 4


def test_the_cache_grows_with_the_sequence_up_to_the_models_positions(monkeypatch):
    monkeypatch.setattr(cached_sequence, "MIN_CAPACITY", 4)
    config = tiny_model(max_position_embeddings=30).config
    sequence = CachedSequence(MODEL.weights, config)
    capacities = []
    prompt: list[int] = []
    for count in (1, 3, 3, 9, 9):
        prompt = [*prompt, 5]
        prompt += continued(sequence, prompt, count)
        capacities.append(sequence.cache.capacity)
    assert capacities == [4, 8, 16, 32 - 2, 30]
    assert prompt == [*prompt[:-9], *fresh(prompt[:-9], 9)]
    assert (
        CachedSequence(MODEL.weights, tiny_model(max_position_embeddings=3).config).cache.capacity
        == 3
    )


def test_what_is_rejected_changes_nothing():
    sequence = CachedSequence(MODEL.weights, MODEL.config)
    continued(sequence, [1, 2, 3], 2)
    before = list(sequence.ids), list(sequence.cache.lengths)
    for prompt, count in (([], 1), ([V], 1), ([1], 10**6), ([1], -1)):
        with pytest.raises(InputError):
            continued(sequence, prompt, count)
        assert (sequence.ids, sequence.cache.lengths) == before
