"""Histogram cuts against their definitions in loops, and against what modelopt made of the
same histograms.
"""

from __future__ import annotations

import itertools
import json
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import to_host
from golden import make_entropy
from refllm.quant.histogram import _divergences, count_bins, entropy_cut, percentile_cut
from strategies import partitions, seeds

EQUAL = Decimal("1e-40")  # two divergences that 50 digits do not tell apart
GOLDEN = json.loads(make_entropy.FILE.read_text(encoding="utf-8"))


@st.composite
def histograms(draw, most=90):
    """Host counts [bins], often with gaps, always with a count outside bin 0."""
    bins = draw(st.integers(2, most))
    seed = draw(seeds)
    rng = np.random.default_rng(seed)
    falling = np.exp(-np.arange(bins) / draw(st.sampled_from([2.0, 10.0, 1e9])))
    h = rng.poisson(draw(st.sampled_from([0.5, 3.0, 200.0])) * falling)
    h[rng.integers(1, bins)] += 1
    return h.astype(np.int64)


def naive_divergence(h: np.ndarray, i: int, levels: int) -> Decimal:
    """KL(p ‖ q) of candidate i, bin by bin, in exact fractions; logarithms to 50 digits."""
    h = [int(n) for n in h]
    h[0] = h[1]
    q = [Fraction(0)] * i
    for level in range(levels):
        inside = [k for k in range(i) if levels * k // i == level and h[k] > 0]
        for k in inside:
            q[k] = Fraction(sum(h[j] for j in inside), len(inside))
    p = [*h[: i - 1], h[i - 1] + sum(h[i:])]
    total = sum(p)
    kept = sum(q)
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return Decimal("inf")
    with localcontext() as context:
        context.prec = 50
        terms = [(a, a * kept / (b * total)) for a, b in zip(p, q, strict=True) if a > 0]
        logs = [a * (Decimal(r.numerator) / Decimal(r.denominator)).ln() for a, r in terms]
        return sum(logs, Decimal(0)) / total


@pytest.mark.theorem(
    "The entropy cut is the last of the candidates of least KL(p ‖ q), the divergences "
    "those of the bin-by-bin sum",
    source="Migacz 2017; NVIDIA modelopt, calib/histogram.py",
)
@given(histograms(), st.sampled_from([1, 2, 8, 16]), st.integers(2, 40))
@example(np.array([1, 0, 2, 1, 0, 1]), 1, 2)  # KL = 0 for 3 and 4 bins; 4 rounds to 2e-16
@example(np.array([0, 4, 1, 3, 9, 2]), 2, 3)  # the last bin is alone in its level
@example(np.array([0, 1, 0, 2, 0, 0, 0]), 1, 2)  # 4 to 7 are equal, and not 0
def test_entropy_cut_is_the_definition(xp, h, levels, start):
    cut = entropy_cut(xp.asarray(h), levels=levels, start=start)
    if len(h) <= start:
        assert cut == len(h)
        return
    if h[1:].sum() == 0:
        return
    naive = {i: naive_divergence(h, i, levels) for i in range(start, len(h) + 1)}
    replaced = np.concatenate([h[1:2], h[1:]]).astype(np.float64)
    ours = to_host(_divergences(xp.asarray(replaced), levels, start, len(h) + 1))
    # sums of at most len(h) terms of size log(total), each off by a few eps; prefix sums
    # are integers, exact
    tolerance = 8 * len(h) * (1 + math.log(h.sum() + h[1])) * np.finfo(np.float64).eps
    for divergence, (i, exact) in zip(ours, naive.items(), strict=True):
        assert divergence == exact or abs(divergence - float(exact)) <= tolerance, i
    least = min(naive.values())
    assert float(naive[cut] - least) <= 2 * tolerance
    assert not any(naive[i] - least <= EQUAL for i in naive if i > cut)


@pytest.mark.theorem(
    "Entropy and percentile cuts equal modelopt's on normal, t(3), Laplace, uniform, ReLU, "
    "outlier data, to the bin",
    source="modelopt 0.47.0, recorded by tests/golden/make_entropy.py",
)
@pytest.mark.parametrize("index", range(len(make_entropy.CUTS)))
def test_cuts_equal_the_recorded_ones(xp, index):
    case = make_entropy.CUTS[index]
    recorded = GOLDEN["cuts"][index]
    h = xp.asarray(make_entropy.histogram(case)[0])
    levels = 1 << (case["bits"] - 1 + case["unsigned"])
    assert entropy_cut(h, levels=levels, start=case["start"]) == recorded["entropy"]
    assert [percentile_cut(h, p) for p in make_entropy.PERCENTILES] == recorded["percentiles"]


def test_the_last_of_equal_candidates_is_cut():
    """One count a bin, then an even spread: KL = 0 for the whole histogram and for no
    shorter one.
    """
    assert entropy_cut(np.full(64, 5), levels=8, start=8) == 64
    h = np.zeros(64, np.int64)
    # everything in one bin: each candidate that keeps it, and has nothing beyond, loses
    # nothing
    h[3] = 7
    assert entropy_cut(h, levels=8, start=8) == 64


@given(histograms(), st.floats(0, 100), st.floats(0, 100))
def test_percentile_cut_is_the_definition_and_monotone(xp, h, a, b):
    low, high = sorted([a, b])
    cuts = [percentile_cut(xp.asarray(h), p) for p in (low, high)]
    assert cuts[0] <= cuts[1]
    for p, cut in zip((low, high), cuts, strict=True):
        target = p / 100 * float(h.sum())
        assert h[:cut].sum() < target or cut == 0
        assert h[: cut + 1].sum() >= target
    assert percentile_cut(xp.asarray(h), 100.0) == np.flatnonzero(h)[-1]


@pytest.mark.theorem(
    "Histograms of parts add up to the histogram of the whole, in any order", source="counting"
)
@given(partitions(st.integers(1, 200)), seeds, st.sampled_from(["float32", "float64"]))
def test_counts_add_up(xp, parts, seed, dtype):
    rng = np.random.default_rng(seed)
    x = np.abs(rng.standard_normal(sum(parts))).astype(dtype)
    width = 0.25
    bins = 32
    whole = to_host(count_bins(xp.asarray(x), width, bins))
    assert whole.tolist() == [
        int(((x >= k * width) & (x < (k + 1) * width)).sum()) for k in range(bins)
    ]
    cuts = np.cumsum([0, *parts])
    pieces = [x[a:b] for a, b in itertools.pairwise(cuts)]
    total = sum(
        to_host(count_bins(xp.asarray(pieces[i]), width, bins))
        for i in rng.permutation(len(pieces))
    )
    np.testing.assert_array_equal(total, whole)
    assert (
        to_host(count_bins(xp.asarray(rng.permutation(x)), width, bins)).tolist() == whole.tolist()
    )


def test_the_top_edge_belongs_to_the_last_bin(xp):
    counts = count_bins(xp.asarray(np.array([0.0, 0.5, 1.0, 4.0], np.float32)), 1.0, 4)
    assert to_host(counts).tolist() == [2, 1, 0, 1]


def test_what_cannot_be_cut_is_rejected(xp):
    empty = xp.asarray(np.zeros(300, np.int64))
    spike = xp.asarray(np.eye(1, 300, dtype=np.int64)[0])
    with pytest.raises(ValueError, match="without a count"):
        percentile_cut(empty, 99.0)
    with pytest.raises(ValueError, match="outside bin 0"):
        entropy_cut(spike)
    with pytest.raises(ValueError, match="two bins"):
        entropy_cut(spike[:1])
    for percentile in (-0.1, 100.1, math.nan):
        with pytest.raises(ValueError, match=r"within 0\.\.100"):
            percentile_cut(spike, percentile)
    assert percentile_cut(spike, 50.0) == 0
