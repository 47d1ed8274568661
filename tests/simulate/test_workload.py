"""Lengths and arrivals have the distributions of their closed forms."""

from __future__ import annotations

from itertools import pairwise
from math import exp, inf, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.simulate import workload
from refllm.simulate.workload import (
    AZURE_CHAT,
    SHAREGPT,
    TRAFFIC,
    LogNormal,
    Mixture,
    Traffic,
    arrivals,
    expected_longest,
    requests,
    useful_share,
)

# A mean of N samples with variance v is within 5 √(v/N) of its expectation but once in 1.7
# million times.
SIGMAS = 5


def moments(pmf):
    x = np.arange(len(pmf))
    mean = float(pmf @ x)
    return mean, float(pmf @ (x - mean) ** 2)


def lognormals(largest=200):
    return st.builds(
        lambda at, sigma, low, more: LogNormal(
            log(low) + at * log(1 + more / low), sigma, low, low + more
        ),
        st.floats(0, 1),
        st.floats(0.3, 2),
        st.integers(1, 5),
        st.integers(20, largest),
    )


@given(lognormals(), st.integers(0, 2**32 - 1))
def test_samples_have_the_moments_of_the_probabilities(length, seed):
    p = length.pmf()
    x = length.sample(np.random.default_rng(seed), 4000)
    assert p.sum() == pytest.approx(1, abs=len(p) * 2.3e-16)
    assert p.min() >= 0
    assert length.low <= x.min() <= x.max() <= length.high
    mean, variance = moments(p)
    assert abs(x.mean() - mean) <= SIGMAS * sqrt(variance / 4000)
    below = np.cumsum(p)[int(mean)]
    assert abs((x <= int(mean)).mean() - below) <= SIGMAS * sqrt(below * (1 - below) / 4000)


def test_a_wide_log_normal_has_the_mean_of_its_closed_form():
    mu = 5.0
    sigma = 0.5
    mean, variance = moments(LogNormal(mu, sigma, 1, 10_000).pmf())  # nothing is cut: > 8 σ
    # rounding moves a smooth density's mean by less than its largest slope, and its
    # variance by 1/12
    assert mean == pytest.approx(exp(mu + sigma**2 / 2), abs=1e-3)
    assert variance == pytest.approx(
        (exp(sigma**2) - 1) * exp(2 * mu + sigma**2) + 1 / 12, rel=1e-4
    )


def test_a_mixture_has_the_mean_of_its_parts():
    parts = (LogNormal(2, 0.5, 1, 50), LogNormal(4, 0.2, 1, 100))
    mixture = Mixture(parts, (0.25, 0.75))
    mean, variance = moments(mixture.pmf())
    assert mean == pytest.approx(
        0.25 * moments(parts[0].pmf())[0] + 0.75 * moments(parts[1].pmf())[0]
    )
    x = mixture.sample(np.random.default_rng(0), 20_000)
    assert abs(x.mean() - mean) <= SIGMAS * sqrt(variance / 20_000)


def test_a_pair_that_is_just_as_long_as_allowed_is_kept():
    class Coin:
        def sample(self, rng, count):
            return rng.integers(1, 3, count)

    prompts, outputs = Traffic(Coin(), Coin(), 3).sample(np.random.default_rng(0), 50)
    assert set((prompts + outputs).tolist()) == {2, 3}


@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic_has_its_exact_means(name):
    traffic = TRAFFIC[name]
    count = 20_000
    sampled = traffic.sample(np.random.default_rng(1), count)
    assert (sampled[0] + sampled[1]).max() <= traffic.longest
    for x, pmf in zip(sampled, traffic.pmfs(), strict=True):
        mean, variance = moments(pmf)
        assert abs(x.mean() - mean) <= SIGMAS * sqrt(variance / count)
    assert traffic.means() == tuple(moments(p)[0] for p in traffic.pmfs())


def test_the_published_means_are_met_within_half_a_percent():
    for name, wanted in {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}.items():
        assert TRAFFIC[name].means() == pytest.approx(wanted, rel=0.005)


def test_the_means_of_azures_traces_are_the_fits():
    assert TRAFFIC["azure-chat"].means() == pytest.approx((1207.51, 235.25), rel=1e-4)
    assert TRAFFIC["azure-code"].means() == pytest.approx((1559.06, 23.38), rel=1e-3)


# vLLM's filter of ShareGPT; the shortest and the longest of Azure's traces
RANGES = {
    "sharegpt": ((4, 1024), (4, 1900)),
    "alpaca": ((4, 200), (4, 600)),
    "azure-chat": ((1, 14_050), (1, 1000)),
    "azure-code": ((1, 7437), (1, 1899)),
}


@pytest.mark.parametrize("name", TRAFFIC)
def test_no_length_is_outside_the_range_of_its_source(name):
    for pmf, (low, high) in zip(TRAFFIC[name].pmfs(), RANGES[name], strict=True):
        assert len(pmf) == high + 1
        assert np.flatnonzero(pmf)[[0, -1]].tolist() == [low, high]


def test_azures_answers_have_two_peaks():
    p = AZURE_CHAT.output.pmf()
    assert p[80] > 3 * p[250] < p[400]  # a valley between two hills


@given(st.integers(2, 12), st.integers(2, 12), st.integers(2, 24))
def test_pairs_that_are_too_long_are_excluded_exactly(a, b, longest):
    one = LogNormal(1.0, 1.0, 1, a)
    other = LogNormal(0.5, 1.0, 1, b)
    p = one.pmf()
    o = other.pmf()
    joint = np.outer(p, o) * (np.add.outer(np.arange(len(p)), np.arange(len(o))) <= longest)
    mine = Traffic(one, other, longest).pmfs()
    np.testing.assert_allclose(mine[0], joint.sum(axis=1) / joint.sum(), atol=1e-14)
    np.testing.assert_allclose(mine[1], joint.sum(axis=0) / joint.sum(), atol=1e-14)


@pytest.mark.theorem(
    "Gaps Gamma(k, 1/(k·rate)): mean 1/rate, variance 1/(k·rate²)", source="the Gamma distribution"
)
@pytest.mark.parametrize("shape", [0.3, 1.0, 4.0])
def test_arrivals_have_their_rate_and_burstiness(shape):
    count = 20_000
    rate = 3.0
    times = arrivals(np.random.default_rng(2), count, rate, shape)
    gaps = np.diff(times, prepend=0)
    assert np.all(gaps >= 0)
    variance = 1 / (shape * rate**2)
    assert abs(gaps.mean() - 1 / rate) <= SIGMAS * sqrt(variance / count)
    # the variance of a sample variance: (kurtosis − 1) v² / N, kurtosis 3 + 6/k
    assert abs(gaps.var() - variance) <= SIGMAS * variance * sqrt((2 + 6 / shape) / count)


@pytest.mark.theorem(
    "Counts of a Poisson process in intervals have variance = mean; bursts have more",
    source="Poisson",
)
def test_fano_factor_tells_poisson_from_bursts():
    def fano(shape):
        times = arrivals(np.random.default_rng(3), 20_000, 10.0, shape)
        counts = np.bincount((times / 5).astype(int))[:-1]
        return counts.var() / counts.mean(), len(counts)

    poisson, windows = fano(1.0)
    assert abs(poisson - 1) <= SIGMAS * sqrt(2 / windows)
    assert fano(0.3)[0] > 2  # 1/k = 3.3 in long windows
    assert fano(10.0)[0] < 0.5


def test_special_arrivals():
    rng = np.random.default_rng(0)
    assert arrivals(rng, 3, inf).tolist() == [0, 0, 0]
    assert arrivals(rng, 3, 2.0, inf).tolist() == [0.5, 1.0, 1.5]
    for rate, shape in ((0, 1), (1, 0), (float("nan"), 1), (1, float("nan"))):
        with pytest.raises(ValueError, match="above 0"):
            arrivals(rng, 3, rate, shape)


def test_requests_depend_on_their_generator_alone():
    def make(seed):
        return requests(SHAREGPT, 20, np.random.default_rng(seed), rate=2.0, shape=0.5, scale=0.25)

    assert make(1) == make(1) != make(2)
    mine = make(1)
    assert [r.request_id for r in mine] == list(range(20))
    assert all(a.arrival < b.arrival for a, b in pairwise(mine))
    assert all(len(r.prompt) + r.max_tokens <= 512 and r.ignore_eos for r in mine)


def test_requests_have_the_lengths_of_their_traffic_and_the_prompts_of_their_source():
    made = requests(SHAREGPT, 20, np.random.default_rng(3))
    prompts, outputs = SHAREGPT.sample(np.random.default_rng(3), 20)
    assert [len(r.prompt) for r in made] == prompts.tolist()
    assert [r.max_tokens for r in made] == outputs.tolist()
    assert {r.arrival for r in made} == {0.0}
    # no token occurs twice
    assert made[0].prompt[0] == 0
    assert all(b.prompt.start == a.prompt.stop for a, b in pairwise(made))
    same = requests(SHAREGPT, 5, np.random.default_rng(3), tokens=lambda count: [7] * count)
    assert {token for r in same for token in r.prompt} == {7}


def test_a_scaled_length_is_rounded_and_at_least_1():
    scaled = workload._ScaledLength(LogNormal(1.0, 0.5, 1, 4), 0.4)
    # 0.4 and 0.8 → 1, 1.2 → 1, 1.6 → 2
    p = LogNormal(1.0, 0.5, 1, 4).pmf()
    np.testing.assert_allclose(scaled.pmf(), [0, p[1] + p[2] + p[3], p[4]], rtol=1e-12)
    drawn = np.bincount(scaled.sample(np.random.default_rng(0), 500), minlength=3)
    assert drawn[0] == 0 < min(drawn[1:])
    assert len(drawn) == 3


def test_scaled_lengths_have_scaled_probabilities():
    of = LogNormal(3.0, 0.8, 4, 100)
    scaled = workload._ScaledLength(of, 0.25)
    p = scaled.pmf()
    x = scaled.sample(np.random.default_rng(0), 20_000)
    mean, variance = moments(p)
    assert p.sum() == pytest.approx(1)
    assert abs(x.mean() - mean) <= SIGMAS * sqrt(variance / 20_000)


@pytest.mark.theorem(
    "E[max of b] = Σ 1 − F^b; a static batch uses E[O] / E[max O] of its slots",
    source="order statistics",
)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=5).filter(any), st.integers(1, 4))
def test_expected_longest_by_enumeration(weights, batch):
    p = np.array(weights) / sum(weights)
    grid = np.meshgrid(*[np.arange(len(p))] * batch, indexing="ij")
    chances = np.prod([p[g] for g in grid], axis=0)
    assert expected_longest(p, batch) == pytest.approx(
        float((chances * np.max(grid, axis=0)).sum()), abs=1e-12
    )
    if expected_longest(p, 1) > 0:
        assert useful_share(p, 1) == 1
        assert useful_share(p, batch + 1) <= useful_share(p, batch) + 1e-12


def test_useful_share_of_static_batches_is_the_recorded_one():
    share = [useful_share(SHAREGPT.pmfs()[1], batch) for batch in (4, 8, 16, 32)]
    assert share == pytest.approx([0.49, 0.37, 0.30, 0.25], abs=0.03)


@pytest.mark.parametrize("wrong", [(1, 0, 1, 2), (1, 1, 0, 2), (1, 1, 3, 2)])
def test_invalid_lengths_are_rejected(wrong):
    with pytest.raises(ValueError, match="sigma > 0"):
        LogNormal(*wrong)
