"""Sums by position conserve what they are made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.measure.perplexity import Score, bits_by_position, evaluate
from tiny_models import tiny_model

token_lists = st.lists(st.integers(1, 256), min_size=1, max_size=40)
windowings = st.tuples(st.integers(1, 16), st.integers(1, 16)).map(
    lambda t: {"window": max(t), "stride": min(t)}
)


@given(token_lists, windowings)
def test_positions_conserve_tokens_bytes_and_loss(tokens, shape):
    score = evaluate(tiny_model(), tokens, **shape)
    for edges in (None, [1, 4, 6]):
        bins = bits_by_position(score, edges)
        assert sum(b.tokens for b in bins) == score.tokens
        assert sum(b.tokens * b.nats_per_token for b in bins) == pytest.approx(score.nats.sum())
        assert all(b.low <= b.high for b in bins)
    ends = [b.high for b in bits_by_position(score)][:-1]
    assert all(e & (e - 1) == 0 for e in ends)  # every bin but the last ends at a power of two


def test_equal_windows_show_every_context_equally_often():
    score = evaluate(tiny_model(), [1] * 30, window=10, stride=10)
    assert np.bincount(score.context).tolist() == [0] + [3] * 10


def test_perplexity_and_bits_are_those_of_the_definition():
    """Two tokens of 3 and 1 bytes at 2 and 4 bits: 6 bits over 4 bytes, perplexity 2^3."""
    nats = np.log(2) * np.asarray([2.0, 4.0])
    at = np.asarray([1, 2])
    score = Score(nats, np.asarray([3, 1]), at, at * 0, (), 2, 2, 0.0, "3")
    assert (score.tokens, score.bytes) == (2, 4)
    assert score.bits_per_byte == pytest.approx(1.5)
    assert score.perplexity == pytest.approx(8)
    assert [b.bits_per_byte for b in bits_by_position(score)] == pytest.approx([2 / 3, 4])


def test_a_perplexity_beyond_floating_point_is_infinite():
    one = np.asarray([1])
    assert Score(np.asarray([1e4]), one, one, one * 0, (), 1, 1, 0.0, "3").perplexity == math.inf
