"""Acceptance rate, α and acceptance length: three different quantities; the formulas and
their optima.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.speculative.acceptance import (
    Acceptance,
    acceptance_stats,
    best_gamma,
    expected_length,
    speedup,
)
from refllm.decode.speculative.acceptance import acceptance_stats as same
from strategies import seeds

EPS = float(np.finfo(np.float64).eps)
pairs = st.lists(
    st.integers(0, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=20
)


def test_the_three_quantities_by_hand():
    stats = acceptance_stats([(3, 3), (3, 0), (3, 1), (0, 0)])
    assert same is acceptance_stats
    assert (stats.steps, stats.proposed, stats.judged, stats.accepted, stats.emitted) == (
        4,
        9,
        6,
        4,
        8,
    )
    assert (stats.rate, stats.alpha, stats.length) == (4 / 9, 4 / 6, 2.0)
    assert stats.by_place == [[3, 2], [2, 1], [1, 1]]
    empty = acceptance_stats([])
    assert (empty.rate, empty.alpha, empty.length) == (0.0, 0.0, 1.0)


@pytest.mark.theorem("rate ≤ α, and 1 ≤ τ ≤ γ + 1; emitted = steps + accepted", source="definition")
@given(steps=pairs)
def test_the_quantities_keep_their_order(steps):
    stats = acceptance_stats(steps)
    assert stats.rate <= stats.alpha <= 1
    assert 1 <= stats.length <= 1 + max((n for n, _ in steps), default=0)
    assert stats.emitted == sum(1 + a for _, a in steps)
    assert [sum(column) for column in zip(*stats.by_place, strict=True)] in (
        [stats.judged, stats.accepted],
        [],
    )


@pytest.mark.parametrize("pair", [(2, 3), (2, -1), (-1, -1)])
def test_more_accepted_than_proposed_is_rejected(pair):
    with pytest.raises(ValueError, match="cannot be accepted"):
        acceptance_stats([pair])


@pytest.mark.theorem(
    "E[τ] = (1 − α^{γ+1}) / (1 − α), γ + 1 at α = 1, and is the mean of min(consecutive "
    "acceptances, γ) + 1",
    source="Leviathan et al. 2023, equation 1",
)
@given(alpha=st.floats(0, 1), gamma=st.integers(0, 10))
def test_expected_length(alpha, gamma):
    run = sum((n + 1) * alpha**n * (1 - alpha) for n in range(gamma)) + (gamma + 1) * alpha**gamma
    assert expected_length(alpha, gamma) == pytest.approx(run, rel=100 * EPS)
    assert expected_length(1, gamma) == gamma + 1
    if alpha < 0.99:
        assert expected_length(alpha, gamma) == pytest.approx(
            (1 - alpha ** (gamma + 1)) / (1 - alpha), rel=1e4 * EPS
        )
    with pytest.raises(ValueError, match="probability"):
        expected_length(alpha + 1.5, gamma)


@pytest.mark.theorem(
    "Where verification is free (t flat) drafting gains if and only if α > c",
    source="Leviathan et al. 2023, corr. 3.9",
)
@given(alpha=st.floats(0, 1), cost=st.floats(0, 1), more=st.integers(1, 8))
def test_drafting_gains_iff_alpha_exceeds_the_cost_of_a_draft(alpha, cost, more):
    gamma, gain = best_gamma(alpha, [1.0] * (1 + more), cost)
    if abs(alpha - cost) > 1e-9:
        assert (gain > 1) == (alpha > cost)
        assert (gamma > 0) == (alpha > cost)
    assert gain >= 1


@given(alpha=st.floats(0, 1), seed=seeds, draft=st.floats(0, 2), count=st.integers(1, 9))
def test_best_gamma_is_the_best_of_all(alpha, seed, draft, count):
    cost = (1 + np.cumsum(np.random.default_rng(seed).random(count))).tolist()
    gains = [speedup(alpha, g, cost, draft) for g in range(count)]
    gamma, gain = best_gamma(alpha, cost, draft)
    assert gain == max(gains) == gains[gamma]
    assert gains[0] == 1.0
    with pytest.raises(ValueError, match=f"cost of 1 to {count + 1} tokens"):
        speedup(alpha, count, cost, draft)


@pytest.mark.parametrize("counts", [(1, 0, 3), (3, 3, 1), (2, 1, 0)])
def test_no_more_are_judged_than_proposed_and_no_fewer_than_accepted(counts):
    stats = Acceptance()
    with pytest.raises(ValueError, match="cannot be judged"):
        stats.add(*counts)
    assert stats == Acceptance()
