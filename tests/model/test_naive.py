"""The network in loops, compared with what can be computed by hand and with its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from networks import NETWORKS, random_tensors
from refllm.model.config import ModelConfig
from refllm.model.naive import empty_cache, naive_logits, next_logits, rms_norm, rotate

TINY = ModelConfig("llama", 7, 4, 6, 2, 2, 1, 2)
ids = st.lists(st.integers(0, 6), min_size=1, max_size=6)


@pytest.mark.theorem(
    "Logits after a token do not depend on the tokens that follow it",
    source="Vaswani et al. 2017, section 3.2.3 (causal masking)",
)
@given(tokens=ids, more=ids)
def test_invariance_what_follows_changes_nothing(tokens, more):
    tensors = random_tensors(TINY, 0)
    both = naive_logits(TINY, tensors, tokens + more)
    assert np.array_equal(both[: len(tokens)], naive_logits(TINY, tensors, tokens))


@pytest.mark.theorem(
    "A first token attends to itself alone: what it reads is its own value, whatever q and k are",
    source="softmax of one score is 1",
)
def test_a_first_token_reads_its_own_value():
    tensors = random_tensors(TINY, 1)
    other = dict(tensors)
    for name in tensors:
        if "q_proj" in name or "k_proj" in name:
            other[name] = -3.0 * tensors[name]
    first = naive_logits(TINY, tensors, [3])
    np.testing.assert_allclose(naive_logits(TINY, other, [3]), first, rtol=1e-12)
    assert (
        np.abs(naive_logits(TINY, other, [3, 1])[1] - naive_logits(TINY, tensors, [3, 1])[1]).max()
        > 1e-6
    )


@pytest.mark.theorem(
    "A rotation keeps the length of a head, and scores depend on the distance of positions alone",
    source="Su et al. 2021, eq. 16",
)
@given(i=st.integers(0, 50), j=st.integers(0, 50), shift=st.integers(0, 50), seed=st.integers(0, 9))
def test_invariance_scores_depend_on_distance(i, j, shift, seed):
    config = ModelConfig("llama", 7, 8, 6, 1, 2, 1, 8)
    q, k = np.random.default_rng(seed).standard_normal((2, 8))
    score = rotate(q, i, config) @ rotate(k, j, config)
    moved = rotate(q, i + shift, config) @ rotate(k, j + shift, config)
    assert abs(score - moved) <= 200 * np.finfo(float).eps * np.linalg.norm(q) * np.linalg.norm(k)
    assert math.isclose(np.linalg.norm(rotate(q, i, config)), np.linalg.norm(q), rel_tol=1e-12)


def test_a_norm_by_hand():
    """The mean square is 25/4; with ε = 11/4 the root is 3."""
    config = ModelConfig("llama", 7, 4, 6, 2, 2, 1, 2, rms_norm_eps=2.75)
    normed = rms_norm(np.array([3.0, 4.0, 0.0, 0.0]), np.full(4, 2.0), config)
    assert normed.tolist() == pytest.approx([2.0, 8 / 3, 0.0, 0.0])


@pytest.mark.parametrize("name", NETWORKS)
def test_one_token_at_a_time_is_the_whole_sequence(name):
    config = NETWORKS[name]
    tensors = random_tensors(config, 2)
    cache = empty_cache(config)
    tokens = [3, 1, 4, 1, 5]
    one_by_one = [next_logits(config, tensors, token, cache) for token in tokens]
    assert np.array_equal(np.stack(one_by_one), naive_logits(config, tensors, tokens))
    assert all(len(keys) == len(values) == len(tokens) for keys, values in cache)
    assert all(len(heads) == config.num_key_value_heads for keys, _ in cache for heads in keys)
