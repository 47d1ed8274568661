"""The percentile bootstrap against the full enumeration of its resamples, and in cases that
are known exactly.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.measure.bootstrap import Interval, blocks, bootstrap_intervals
from strategies import seeds

runs = st.lists(st.integers(1, 30), min_size=0, max_size=6)


@given(runs, st.integers(1, 12))
def test_blocks_are_runs_of_one_document(lengths, size):
    documents = np.repeat(np.arange(len(lengths)), lengths)
    unit = blocks(documents, size)
    expected = []
    number = 0
    for length in lengths:
        for start in range(0, length, size):
            expected += [number] * min(size, length - start)
            number += 1
    assert unit.tolist() == expected


def test_a_block_needs_a_token():
    with pytest.raises(ValueError, match="block"):
        blocks(np.zeros(3, np.int64), 1.5)
    with pytest.raises(ValueError, match="block"):
        blocks(np.zeros(3), 0)


@given(seeds, st.integers(2, 4))
@pytest.mark.theorem(
    "The bootstrap's interval lies between quantiles of the exact distribution over all U^U "
    "resamples of U units",
    source="Efron 1979",
)
def test_interval_agrees_with_full_enumeration(seed, units):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, units)
    unit = np.repeat(np.arange(units), sizes)
    x = rng.standard_normal(len(unit))
    sums = np.bincount(unit, x)
    counts = np.bincount(unit)
    exact = sorted(
        sums[list(draw)].sum() / counts[list(draw)].sum()
        for draw in itertools.product(range(units), repeat=units)
    )
    (interval,) = bootstrap_intervals([x], unit, rng, resamples=4000, confidence=0.8)
    # the share of resamples below a point differs from its probability by
    # 5·sqrt(0.1·0.9/4000) = 0.024 once in 1e6
    for end, share in ((interval.low, 0.1), (interval.high, 0.9)):
        low, high = (np.quantile(exact, share + d, method="inverted_cdf") for d in (-0.024, 0.024))
        assert low - 1e-12 <= end <= high + 1e-12
    assert interval.mean == pytest.approx(x.mean(), rel=1e-12, abs=1e-15)


@given(st.floats(-1e3, 1e3), st.integers(2, 50), st.integers(1, 8), seeds)
def test_a_constant_has_an_interval_of_no_width(value, count, size, seed):
    unit = blocks(np.repeat([0, 1], count), size)
    (interval,) = bootstrap_intervals(
        [np.full(2 * count, value)], unit, np.random.default_rng(seed), resamples=50
    )
    for end in (interval.mean, interval.low, interval.high):  # sums of up to 100 equal values
        assert end == pytest.approx(value, rel=200 * np.finfo(float).eps, abs=1e-300)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """300 samples of 40 normal units: the 90 % interval covers within 5 standard errors of
    0.90.
    """
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        (i,) = bootstrap_intervals(
            [rng.standard_normal(40)], np.arange(40), rng, resamples=400, confidence=0.9
        )
        covered += i.low <= 0 <= i.high
    assert abs(covered / 300 - 0.9) < 5 * math.sqrt(0.9 * 0.1 / 300)


def test_dependent_neighbours_need_blocks():
    """Each number repeated 16 times: single tokens give an interval 4 times too narrow,
    blocks do not.
    """
    rng = np.random.default_rng(1)
    x = np.repeat(rng.standard_normal(100), 16)
    (wide,), (narrow,) = (
        bootstrap_intervals([x], np.arange(1600) // size, np.random.default_rng(2))
        for size in (16, 1)
    )
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(4, rel=0.15)


@given(seeds)
def test_statistics_share_their_resamples_and_the_seed_decides(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(30)
    unit = np.arange(30) // 3
    a, b = bootstrap_intervals([x, x + 1], unit, np.random.default_rng(seed), resamples=20)
    assert b.low == pytest.approx(a.low + 1)
    assert b.high == pytest.approx(a.high + 1)
    assert [a, b] == bootstrap_intervals(
        [x, x + 1], unit, np.random.default_rng(seed), resamples=20
    )


def test_chunking_of_the_resamples_changes_nothing(monkeypatch):
    x = np.random.default_rng(0).standard_normal(60)
    unit = np.arange(60) // 2
    whole = bootstrap_intervals([x], unit, np.random.default_rng(3), resamples=100)
    monkeypatch.setattr("refllm.measure.bootstrap._AT_ONCE", 70)
    assert bootstrap_intervals([x], unit, np.random.default_rng(3), resamples=100)[
        0
    ].low == pytest.approx(whole[0].low)


def test_one_unit_gives_no_interval():
    (interval,) = bootstrap_intervals([np.arange(4.0)], np.zeros(4, int), np.random.default_rng(0))
    assert interval == Interval(1.5, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "0 values"),
        ([1.0, math.nan], {}, "value 1 is not finite"),
        ([1.0, 2.0], {"resamples": 0}, "resamples"),
        ([1.0, 2.0], {"confidence": 1.0}, "confidence"),
    ],
)
def test_bad_input_is_rejected(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(
            [np.asarray(values)], np.arange(len(values)), np.random.default_rng(0), **options
        )


def test_one_resample_is_enough_and_none_is_not():
    """With one resample both ends of the interval are its estimate."""
    x = np.arange(6.0)
    units = np.array([0, 0, 1, 1, 2, 2])
    [interval] = bootstrap_intervals([x], units, np.random.default_rng(0), resamples=1)
    # three draws of units with the means 0.5, 2.5 and 4.5: their mean is 0.5 + 2/3 of an integer
    assert interval.low == interval.high
    assert (interval.low - 0.5) * 1.5 == pytest.approx(round((interval.low - 0.5) * 1.5))
    with pytest.raises(ValueError, match="0 resamples"):
        bootstrap_intervals([x], units, np.random.default_rng(0), resamples=0)
