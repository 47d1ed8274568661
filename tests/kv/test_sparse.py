"""Eviction policies: the selection against sorting by hand, pooling against loops, budgets
against their sum.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import to_host
from refllm.kv.sparse import (
    SparsePolicy,
    at_random,
    h2o,
    pool_votes,
    pyramidkv,
    recent_only,
    select_tokens,
    snapkv,
    streaming,
    tova,
)
from strategies import seeds


@pytest.mark.theorem(
    "The first and the newest tokens are kept, and of the others those with the highest scores;"
    " never more than the budget",
    source="Zhang et al. 2023, algorithm 1; Li et al. 2024, section 4",
)
@given(
    seed=seeds,
    size=st.integers(1, 20),
    first=st.integers(0, 3),
    newest=st.integers(0, 4),
    more=st.integers(0, 9),
)
def test_exact_value_the_selection_is_the_best_of_the_rest(xp, seed, size, first, newest, more):
    budget = max(1, first + newest + more)
    score = np.random.default_rng(seed).integers(0, 5, (3, size)).astype(float)  # with ties
    got = to_host(select_tokens(xp.asarray(score), budget, first, newest))
    for row, kept in zip(score, got.tolist(), strict=True):
        must = [j for j in range(size) if j < first or j >= size - newest]
        rest = sorted((j for j in range(size) if j not in must), key=lambda j: (-row[j], j))
        assert kept == sorted((must + rest)[: min(budget, size)])


@given(
    seed=seeds,
    size=st.integers(1, 12),
    kernel=st.sampled_from([1, 3, 5, 7]),
    pool=st.sampled_from(["mean", "max"]),
)
def test_exact_value_pooling_counts_the_zeros_beyond_the_ends(xp, seed, size, kernel, pool):
    votes = np.random.default_rng(seed).random((2, size))
    expected = np.zeros_like(votes)
    for g in range(2):
        for j in range(size):
            near = [
                votes[g, i] if 0 <= i < size else 0.0
                for i in range(j - kernel // 2, j + kernel // 2 + 1)
            ]
            expected[g, j] = max(near) if pool == "max" else sum(near) / kernel
    np.testing.assert_allclose(
        to_host(pool_votes(xp.asarray(votes), kernel, pool)), expected, rtol=1e-14
    )


@pytest.mark.theorem(
    "A pyramid keeps layers · B tokens, falling in equal steps", source="Cai et al. 2024, section 3"
)
@given(
    budget=st.integers(200, 4000), layers=st.integers(2, 80), beta=st.sampled_from([1.0, 2.0, 20.0])
)
def test_conservation_a_pyramid_keeps_as_much_as_equal_budgets(budget, layers, beta):
    budgets = pyramidkv(budget, beta=beta).budgets(layers)
    assert sum(budgets) == budget * layers
    # the check of a budget that is too small relies on this
    assert min(budgets) >= int(budget / beta)
    assert all(a >= b - 1 for a, b in pairwise(budgets))  # up to rounding
    assert abs(budgets[-1] - budget / beta) <= 1
    assert abs(budgets[0] - (2 * budget - budget / beta)) <= 1
    assert snapkv(budget).budgets(layers) == [budget] * layers


@pytest.mark.theorem(
    "After any number of tokens the layers of a pyramid hold layers · B of them, or all there "
    "are: no layer keeps fewer than it would with B/β, and of B tokens or fewer none is dropped",
    source="Cai et al. 2024, their code",
)
@given(
    budget=st.integers(200, 4000),
    layers=st.integers(2, 80),
    beta=st.sampled_from([1.0, 2.0, 20.0]),
    length=st.integers(1, 9000),
)
@example(budget=1000, layers=6, beta=20.0, length=108)
@example(budget=1000, layers=6, beta=20.0, length=1001)
@example(budget=1000, layers=6, beta=20.0, length=1949)
@example(budget=1000, layers=6, beta=20.0, length=1951)
def test_conservation_a_pyramid_gives_no_layer_more_than_there_is(budget, layers, beta, length):
    policy = pyramidkv(budget, beta=beta)
    budgets = policy.budgets(layers, length)
    held = [min(b, length) for b in budgets]
    assert sum(held) == layers * min(budget, length) == policy.tokens_held(length, 0, layers)
    assert min(held) >= min(length, int(budget / beta))
    assert all(a >= b - 1 for a, b in pairwise(budgets))  # up to rounding
    if length >= 2 * budget - budget / beta:
        assert budgets == policy.budgets(layers)


def test_policies_are_those_of_the_papers():
    assert (streaming(64).first, streaming(64).newest) == (4, 60)
    assert (h2o(64).newest, h2o(64).every_step, h2o(64).shared) == (32, True, False)
    assert (tova(64).newest, tova(64).shared) == (0, True)
    assert (snapkv(64).newest, snapkv(64).window, snapkv(64).kernel, snapkv(64).every_step) == (
        32,
        32,
        5,
        False,
    )
    assert (recent_only(9).newest, at_random(9).newest) == (9, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: h2o(0), "budget is an integer, 1 or more, got 0"),
        (lambda: streaming(3), "a budget of 3 has no room for the first 4 and a newest one"),
        (
            lambda: h2o(8, 9),
            "8 tokens do not hold the first 0 and the newest 9; raise the budget to 9",
        ),
        (lambda: snapkv(16), "16 tokens do not hold the first 0 and the newest 32"),
        (
            lambda: pyramidkv(100),
            "5 tokens do not hold the first 0 and the newest 8; raise the budget to 160",
        ),
        (
            lambda: pyramidkv(15, beta=2.0),
            "7 tokens do not hold the first 0 and the newest 8; raise the budget to 16",
        ),
        (
            lambda: SparsePolicy(4, beta=100.0),
            "0 tokens do not hold the first 0 and the newest 0; raise the budget to 100",
        ),
        (lambda: snapkv(64, kernel=4), "pools by mean or max of an odd number, got 'mean' of 4"),
        (lambda: snapkv(64, pool="sum"), "got 'sum' of 5"),
        (lambda: pyramidkv(400, beta=0.5), "beta 0.5"),
        (lambda: SparsePolicy(8, "luck"), "unknown score 'luck'; choose one of none, mass"),
        (lambda: SparsePolicy(64, "votes", newest=32), "votes are counted once, after the prompt"),
        (lambda: SparsePolicy(64, "votes", newest=8, every_step=False), "the voting tokens"),
        (lambda: SparsePolicy(8.0), "budget is an integer"),
    ],
)
def test_bad_policies_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
