"""Batched attention against attention of each sequence by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.kv import batched_attention
from refllm.kv.batched_attention import (
    MAX_SCORES,
    all_equal,
    attend_batched,
    batched_bias,
    can_batch,
)
from refllm.model.attention import attention
from strategies import seeds

EPS = float(np.finfo(np.float64).eps)
windows = st.one_of(st.none(), st.integers(1, 6))


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    count=st.integers(1, 4),
    groups=st.integers(1, 2),
    sharing=st.integers(1, 3),
    dim=st.sampled_from([2, 4]),
    window=windows,
    in_place=st.booleans(),
    queries=st.sampled_from([1, 2, 3, 64]),
    long=st.sampled_from([1, 4, 256]),
    equal=st.booleans(),
    seed=seeds,
)
def test_invariance_batched_is_each_sequence_alone(
    xp, lengths, count, groups, sharing, dim, window, in_place, queries, long, equal, seed
):
    """With both kinds of kernels: with AVX-512 the heads of a key head are one product,
    without it one product each. The size of the query tiles does not matter.
    """
    lengths = lengths[:1] * len(lengths) if equal else lengths
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    longest = max(lengths) + count
    q = rng.standard_normal((batch * count, groups * sharing, dim))
    # slots past the end of a sequence hold garbage
    k, v = (rng.standard_normal((batch, longest, groups, dim)) for _ in "kv")
    bias = batched_bias(lengths, count, window, xp.zeros(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched_attention, "has_small_kernels", lambda: in_place)
        patch.setattr(batched_attention, "QUERY_TILE", queries)
        patch.setattr(batched_attention, "LONG", long)
        o = attend_batched(
            xp.asarray(q.copy()),
            xp.asarray(k).transpose(0, 2, 3, 1),
            xp.asarray(v).transpose(0, 2, 1, 3),
            bias,
        )
    assert o.shape == q.shape
    for b, past in enumerate(lengths):
        rows = slice(b * count, (b + 1) * count)
        seen = past + count
        alone, _ = attention(q[rows], k[b, :seen], v[b, :seen], start=past, window=window)
        # scores are below 64, so their error, and that of a weight, is below 64·(D + S)·eps
        np.testing.assert_allclose(
            to_host(o)[rows], alone, rtol=0, atol=64 * (dim + longest) * EPS * 8
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("lengths", "count"), [([5, 5], 1), ([5, 2], 1), ([5, 2], 3), ([4, 4], 3)])
def test_large_scores_stay_finite(xp, dtype, lengths, count):
    """exp of a score of 1,000 overflows; relative to the largest one it does not."""
    rng = np.random.default_rng(0)
    longest = max(lengths) + count
    q = (1000 * rng.standard_normal((2 * count, 4, 4))).astype(dtype)
    k, v = (rng.standard_normal((2, longest, 2, 4)).astype(dtype) for _ in "kv")
    bias = batched_bias(lengths, count, None, xp.zeros(1, dtype=dtype))
    keys = xp.asarray(k).transpose(0, 2, 3, 1)
    values = xp.asarray(v).transpose(0, 2, 1, 3)
    o = to_host(attend_batched(xp.asarray(q.copy()), keys, values, bias))
    for b, past in enumerate(lengths):
        rows = slice(b * count, (b + 1) * count)
        seen = past + count
        alone, _ = attention(
            *(x.astype("float64") for x in (q[rows], k[b, :seen], v[b, :seen])), start=past
        )
        # scores are below 10⁴, so their error, and that of a weight, is below 10⁴·(D + S)·eps
        atol = 1e4 * (4 + longest) * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(o[rows], alone, rtol=0, atol=atol)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 4), windows)
def test_there_is_a_bias_exactly_where_a_key_is_hidden(xp, lengths, count, window):
    longest = max(lengths) + count
    hidden = [
        [
            [not (p - (window or math.inf) < j <= p) for j in range(longest)]
            for p in range(n, n + count)
        ]
        for n in lengths
    ]
    bias = batched_bias(lengths, count, window, xp.zeros(1))
    assert (bias is None) == (not np.any(hidden))
    if bias is not None:
        alike = all_equal(lengths) and (window is None or longest <= window)
        assert bias.shape == (
            (1, 1, 1, count, count) if alike else (len(lengths), 1, 1, count, longest)
        )
        unbiased = longest - bias.shape[-1]
        assert not np.any(np.asarray(hidden)[..., :unbiased])
        last = np.asarray(hidden)[: bias.shape[0], :, unbiased:]
        np.testing.assert_array_equal(to_host(bias)[:, 0, 0] < -1e29, last)
        assert set(np.unique(to_host(bias)).tolist()) <= {-1e30, 0.0}


def test_a_large_prefill_and_unequal_counts_go_one_by_one():
    assert can_batch([3, 3], [0, 5], 4)
    assert not can_batch([3, 2], [0, 5], 4)
    assert not can_batch([], [], 4)
    # a decode step is as large as its sequences are long
    assert can_batch([1] * 4, [MAX_SCORES] * 4, 4)
    side = math.isqrt(MAX_SCORES // 4)
    assert can_batch([side], [0], 4)
    assert not can_batch([side], [1], 4)


def test_all_equal():
    assert all_equal([2, 2])
    assert not all_equal([2, 1])
