"""Observers: what they see is what was shown, in any order or not, and what they choose
lies within it.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle, to_host
from golden import make_entropy
from refllm.formats.uniform import Scheme
from refllm.quant.mse_range import mse_range
from refllm.quant.observers import MSE, Entropy, Histogram, MinMax, MovingAverage, Percentile
from strategies import KINDS, arrays, build, partitions, seeds

GOLDEN = json.loads(make_entropy.FILE.read_text(encoding="utf-8"))
TENSOR = Scheme(8, "restricted", "tensor")
OBSERVERS = {
    "minmax": MinMax,
    "average": MovingAverage,
    "mse": lambda: MSE(Scheme(4, "asymmetric", "tensor")),
    "histogram": Histogram,
    "percentile": Percentile,
    "no zeros": lambda: Percentile(99.0, skip_zeros=True),
    "entropy": Entropy,
}
dtypes = st.sampled_from(["float32", "float64"])


@st.composite
def batches(draw, dtype=None):
    """Host batches [T_i, N] of one tensor; some are empty."""
    parts = draw(partitions(st.integers(1, 40), empty=True))
    x = draw(arrays(sum(parts), st.integers(1, 6), dtype=dtype or draw(dtypes)))
    return [x[a:b] for a, b in itertools.pairwise(np.cumsum([0, *parts]))]


def shown(observer, parts, xp=np):
    for x in parts:
        observer.observe(xp.asarray(x))
    return observer


@pytest.mark.theorem(
    "Min-max over batches is min-max over all values, for any batches in any order, per "
    "tensor and per channel",
    source="definition",
)
@given(batches(), seeds, st.sampled_from([None, 0, -1]))
def test_minmax_is_that_of_the_whole(xp, parts, seed, axis):
    whole = np.concatenate(parts)
    if axis == 0:  # one range a row: every batch needs the same rows
        parts = [p for p in parts if len(p)][:1]
        whole = parts[0]
    order = np.random.default_rng(seed).permutation(len(parts))
    observer = shown(MinMax(axis=axis), [parts[i] for i in order], xp)
    others = None if axis is None else 1 if axis == 0 else 0
    for ours, exact in zip(observer.range(), (whole.min(others), whole.max(others)), strict=True):
        assert ours.dtype == whole.dtype
        np.testing.assert_array_equal(to_host(ours), exact)
    np.testing.assert_array_equal(to_host(observer.absmax), np.abs(whole).max(others))


@pytest.mark.theorem(
    "The moving average of extremes stays between the smallest and the largest of them",
    source="a convex combination",
)
@given(batches(dtype="float64"), st.floats(0.01, 1.0))
def test_moving_average_stays_between_the_extremes(xp, parts, c):
    parts = [p for p in parts if len(p)]
    lo, hi = (float(v) for v in shown(MovingAverage(averaging=c), parts, xp).range())
    lows = [p.min() for p in parts]
    highs = [p.max() for p in parts]
    slack = 4 * len(parts) * np.finfo(np.float64).eps
    # halves cannot overflow
    for value, seen in ((lo / 2, np.array(lows) / 2), (hi / 2, np.array(highs) / 2)):
        assert min(seen) - slack * abs(min(seen)) <= value <= max(seen) + slack * abs(max(seen))
    mean = lows[0]
    for low in lows[1:]:
        mean = 2 * (mean / 2 + c * (low / 2 - mean / 2))
    assert lo == mean


def test_the_order_matters_to_the_moving_average_and_to_bins_set_by_the_first_batch(xp):
    """… and to nothing else: the same three batches, forwards and backwards."""
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal((200, 8)) * size for size in (1.0, 2.0, 3.0)]
    ends = {
        name: [float(shown(make(), order, xp).range()[1]) for order in (parts, parts[::-1])]
        for name, make in {
            **OBSERVERS,
            "fixed percentile": lambda: Percentile(99.0, top=8.0),
            "fixed entropy": lambda: Entropy(top=8.0),
            "percentile": lambda: Percentile(99.0),
        }.items()
    }
    depends = {name for name, (forwards, backwards) in ends.items() if forwards != backwards}
    assert depends == {"average", "mse", "percentile", "no zeros", "entropy"}
    sizes = [float(np.abs(p).max()) for p in parts]
    assert ends["average"][0] < 1.1 * sizes[0]  # after three batches the first still weighs 98 %
    assert ends["average"][1] > 0.9 * max(sizes)


def test_torchs_example(xp):
    """Batches that reach 1, 2 and 3 average to 1 + 0.01 · (1 − 0) + …: 1.0299."""
    observer = shown(MovingAverage(), [np.array([[-a, a]]) for a in (1.0, 2.0, 3.0)], xp)
    assert float(observer.absmax) == pytest.approx(1.0299, abs=1e-12)


@pytest.mark.theorem(
    "A histogram of fixed width has the same counts for any batches in any order, and so "
    "have the ranges made from it",
    source="counting",
)
@given(batches(), seeds, st.sampled_from([0.01, 1.0, 3.0]))
def test_fixed_histograms_do_not_depend_on_the_order(xp, parts, seed, top):
    parts = [np.clip(p, -100, 100) for p in parts]
    whole = np.concatenate(parts)
    order = np.random.default_rng(seed).permutation(len(parts))
    for make in (Histogram, Percentile, lambda **k: Percentile(80.0, skip_zeros=True, **k)):
        one = shown(make(bins=16, top=top), [whole], xp)
        many = shown(make(bins=16, top=top), [parts[i] for i in order], xp)
        np.testing.assert_array_equal(to_host(one.counts), to_host(many.counts))
        assert int(to_host(one.counts).sum()) == whole.size
        assert one.amax == many.amax
        np.testing.assert_array_equal(
            [to_host(v) for v in one.range()], [to_host(v) for v in many.range()]
        )


@pytest.mark.theorem(
    "With zero included, every observer's range lies within that of min-max",
    source="each only cuts off",
)
@given(batches(), st.sampled_from(sorted(OBSERVERS)))
def test_ranges_lie_within_minmax(xp, parts, name):
    observer = shown(OBSERVERS[name](), parts, xp)
    lo, hi = observer.range()
    low, high = shown(MinMax(), parts, xp).range()
    assert lo.dtype == low.dtype
    info = np.finfo(low.dtype)  # below: relative, or of subnormal values
    most = max(abs(float(low)), abs(float(high)))
    slack = 4 * len(parts) * (float(info.eps) * most + float(info.smallest_subnormal))
    assert float(lo) <= float(hi)
    # zero belongs to every range that is quantised: of a one-sided tensor the near end may
    # be cut too
    assert max(float(hi), 0.0) <= max(float(high), 0.0) + slack
    assert min(float(lo), 0.0) >= min(float(low), 0.0) - slack
    scale, zero = observer.qparams(TENSOR)
    assert float(scale) > 0
    assert int(zero) == 0


@given(batches(), st.lists(st.floats(0, 100), min_size=2, max_size=5))
def test_percentiles_are_monotone(xp, parts, percentiles):
    cuts = [shown(Percentile(p, bins=64), parts, xp).amax for p in sorted(percentiles)]
    assert cuts == sorted(cuts)
    whole = shown(Histogram(bins=64), parts, xp)
    assert shown(Percentile(100.0, bins=64), parts, xp).amax <= whole.amax


def test_percentile_of_a_spike_at_zero(xp):
    x = np.zeros((1000, 1), np.float32)
    x[:10, 0] = np.linspace(1, 10, 10)
    # the first bin is kept: no range is [0, 0]
    assert shown(Percentile(90.0, bins=10), [x], xp).amax == 1.0
    assert shown(Percentile(90.0, bins=10, skip_zeros=True), [x[500:], x[:500]], xp).amax == 9.0


@pytest.mark.theorem(
    "Batch by batch, Entropy and Percentile arrive where modelopt's HistogramCalibrator "
    "does, to float32's rounding",
    source="modelopt 0.47.0, recorded by tests/golden/make_entropy.py",
)
@pytest.mark.parametrize("index", range(len(make_entropy.CALIBRATORS)))
def test_calibrators_equal_the_recorded_ones(xp, index):
    case = make_entropy.CALIBRATORS[index]
    recorded = GOLDEN["calibrators"][index]
    parts = make_entropy.batches(case)
    eps = float(np.finfo(np.float32).eps)
    counts = to_host(shown(Histogram(), parts, xp).counts)
    # torch.histc places a value by float32 products: one at an edge may fall to the other
    # side
    x = (
        np.abs(np.concatenate(parts)).astype(np.float64)
        / float(np.abs(np.concatenate(parts)).max())
        * 2048
    )
    at_an_edge = int(((x > 0) & (np.abs(x - np.round(x)) <= 4 * eps * x)).sum())
    assert np.abs(np.cumsum(counts) - np.cumsum(recorded["counts"])).max() <= at_an_edge <= 20
    assert shown(Entropy(), parts, xp).amax == pytest.approx(recorded["entropy"], rel=4 * eps)
    for p, amax in zip(make_entropy.PERCENTILES, recorded["percentiles"], strict=True):
        assert shown(Percentile(p), parts, xp).amax == pytest.approx(amax, rel=4 * eps)


def test_a_histogram_grows_without_changing_its_width(xp):
    observer = shown(Histogram(bins=4), [[[1.0, 4.0]], [[9.5, -6.0]]], xp)
    assert (observer.width, observer.bins, observer.amax) == (1.0, 10, 10.0)
    assert to_host(observer.counts).tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 0, 1]
    assert [float(v) for v in observer.range()] == [-6.0, 9.5]
    with pytest.raises(ValueError, match=r"'h' reaches 1e\+09.*pass top=1e\+09"):
        shown(Histogram(bins=4, name="h"), [[[1.0]], [[1e9]]], xp)


def test_a_preset_edge_has_one_bin_whichever_batch_comes_first(xp):
    """6.0 is the left edge of bin 6: it needs seven bins as 6.5 does."""
    for parts in ([[[6.0]], [[6.5]]], [[[6.5]], [[6.0]]], [[[6.0]]] * 2):
        observer = shown(Histogram(bins=4, top=4.0), parts, xp)
        assert to_host(observer.counts).tolist() == [0, 0, 0, 0, 0, 0, 2]
        assert observer.bins == 7
    # the largest value of all: its own bin only where the width was preset
    assert to_host(shown(Histogram(bins=4, top=4.0), [[[4.0]]], xp).counts).tolist() == [0] * 4 + [
        1
    ]
    assert to_host(shown(Histogram(bins=4), [[[4.0]]], xp).counts).tolist() == [0, 0, 0, 1]


def test_asking_for_the_range_changes_nothing(xp):
    x = np.concatenate([np.zeros((50, 1)), np.arange(1.0, 11.0)[:, None]])
    for name, make in OBSERVERS.items():
        observer = shown(make(), [x, x], xp)
        ends = [[float(end) for end in observer.range()] for _ in range(3)]
        assert ends[0] == ends[1] == ends[2], name
    observer = shown(Percentile(90.0, bins=10, skip_zeros=True), [x], xp)
    assert [observer.amax for _ in range(3)] == [9.0, 9.0, 9.0]  # 9 of the 10 are not above
    assert to_host(observer.counts).tolist() == [50, 1, 1, 1, 1, 1, 1, 1, 1, 2]


def test_zeros_before_the_first_number_are_counted(xp):
    for make in (Histogram, lambda **k: Percentile(50.0, **k)):
        observer = shown(
            make(bins=4), [np.zeros((2, 3)), np.full((1, 2), 4.0), np.zeros((1, 1))], xp
        )
        assert to_host(observer.counts).tolist() == [7, 0, 0, 2]


@given(st.sampled_from(sorted(OBSERVERS)), st.sampled_from(KINDS), seeds, dtypes)
def test_every_kind_of_tensor_gets_a_range(xp, name, kind, seed, dtype):
    x = build(kind, (7, 5), seed, dtype)
    lo, hi = shown(OBSERVERS[name](), [x, x], xp).range()
    assert np.isfinite([float(lo), float(hi)]).all()
    if kind == "zero":
        assert float(lo) == float(hi) == 0.0
    if kind == "constant" and name not in ("percentile", "no zeros", "mse"):
        assert {float(lo), float(hi)} == {float(x[0, 0])}


def test_mse_averages_the_ranges_of_batches(xp):
    rng = np.random.default_rng(0)
    parts = [rng.standard_t(2, (50, 4)) for _ in range(3)]
    scheme = Scheme(4, "half_integer", "tensor")
    options = {"max_shrink": 0.8, "patience": None}
    last = shown(MSE(scheme, averaging=1.0, **options), parts, xp).range()
    np.testing.assert_allclose(
        [float(v) for v in last], [float(v) for v in mse_range(parts[-1], scheme, **options)]
    )
    ends = [[float(v) for v in mse_range(p, scheme, **options)] for p in parts]
    mean = np.array(ends[0])
    for end in ends[1:]:
        mean += 0.01 * (np.array(end) - mean)
    np.testing.assert_allclose(
        [float(v) for v in shown(MSE(scheme, **options), parts, xp).range()], mean, rtol=1e-14
    )


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_nothing_observed_is_rejected(xp, name):
    observer = OBSERVERS[name]()
    with pytest.raises(ValueError, match=r"no value of 'x' was observed"):
        observer.range()
    observer.observe(xp.zeros((0, 3)))
    with pytest.raises(ValueError, match=r"no value of 'x' was observed"):
        _ = observer.absmax


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_what_is_not_finite_is_rejected_and_leaves_no_trace(xp, name, bad):
    observer = shown(OBSERVERS[name](), [np.ones((2, 3))], xp)
    before = [float(v) for v in observer.range()]
    observer.name = "layer 3"
    with pytest.raises(
        ValueError, match=r"layer 3: holds NaN or infinity, first at index \(1, 2\)"
    ):
        observer.observe(xp.asarray(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, bad]])))
    assert [float(v) for v in observer.range()] == before
    assert observer.batches == 1


def test_settings_that_make_no_sense_are_rejected():
    for make in (lambda: MovingAverage(averaging=0.0), lambda: MSE(TENSOR, averaging=1.5)):
        with pytest.raises(ValueError, match="averaging"):
            make()
    for top, bins in ((0.0, 8), (float("inf"), 8), (1.0, 1)):
        with pytest.raises(ValueError, match="two bins and a finite top"):
            Histogram(top=top, bins=bins)


# --- torch --------------------------------------------------------------------------------


@pytest.mark.oracle
@given(batches(dtype="float32"))
def test_torchs_observers_agree(parts):
    torch = oracle("torch")
    ao = oracle("torch.ao.quantization")
    # torch's difference of batches overflows above
    parts = [np.clip(p, -1e30, 1e30) for p in parts if len(p)]
    pairs = {
        MinMax(): ao.MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
        MovingAverage(): ao.MovingAverageMinMaxObserver(
            dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
        ),
        MinMax(axis=1): ao.PerChannelMinMaxObserver(
            ch_axis=1, dtype=torch.qint8, qscheme=torch.per_channel_symmetric
        ),
    }
    for ours, theirs in pairs.items():
        shown(ours, parts)
        for x in parts:
            theirs(torch.from_numpy(np.ascontiguousarray(x)))
        for value, their_value in zip(ours.range(), (theirs.min_val, theirs.max_val), strict=True):
            # bit for bit, but that half of a denormal value may be rounded
            np.testing.assert_allclose(
                value, their_value.numpy(), rtol=0, atol=len(parts) * 2.0**-148 * ours.batches
            )


@pytest.mark.oracle
@given(batches(dtype="float32"), st.sampled_from(["half_integer", "asymmetric"]))
def test_scales_of_the_observed_range_are_torchs(parts, rule):
    torch = oracle("torch")
    ao = oracle("torch.ao.quantization")
    kind = {
        "half_integer": (torch.qint8, torch.per_tensor_symmetric),
        "asymmetric": (torch.quint8, torch.per_tensor_affine),
    }
    theirs = ao.MinMaxObserver(dtype=kind[rule][0], qscheme=kind[rule][1])
    parts = [np.clip(p, -1e30, 1e30) for p in parts if len(p)]
    for x in parts:
        theirs(torch.from_numpy(np.ascontiguousarray(x)))
    scale, zero = shown(MinMax(), parts).qparams(Scheme(8, rule, "tensor"))
    their_scale, their_zero = theirs.calculate_qparams()
    if np.abs(np.concatenate(parts)).max() > 1e-4:  # torch holds a scale at eps and above
        assert float(scale) == pytest.approx(
            float(their_scale), rel=4 * float(np.finfo(np.float32).eps)
        )
        # a tie may fall either way
        assert abs(int(zero) - int(their_zero)) <= (rule == "asymmetric")
