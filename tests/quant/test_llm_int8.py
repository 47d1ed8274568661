"""LLM.int8(): bitsandbytes' own codes and products, the bound of its error, and what the
decomposition depends on.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from golden.make_int8 import CASES, FILE, case
from refllm.quant.llm_int8 import RULES, Int8Linear, OutlierStatistics, int8_matmul, vectorwise
from strategies import build, partitions, seeds

EPS64 = float(np.finfo("float64").eps)
KINDS = ("normal", "outlier_column", "zero", "constant", "denormal", "one_sided")


def problem(seed, kind="outlier_column", t=4, m=5, n=12):
    """x[T, N] and W[M, N] in float64."""
    return build(kind, (t, n), seed, "float64"), np.random.default_rng(seed).standard_normal((m, n))


# --- the reference implementation ---------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_oracle_codes_and_statistics_are_bitsandbytes_own(xp, name):
    """Recorded by ``golden/make_int8.py``."""
    golden = np.load(FILE)
    x, weight, threshold = case(name)
    x = x.astype("float32")
    weight = weight.astype("float32")
    codes, absmax = vectorwise(xp.asarray(weight))
    assert np.array_equal(to_host(codes), golden[f"{name}/weight codes"])
    assert np.array_equal(to_host(absmax)[:, 0], golden[f"{name}/weight absmax"])
    hidden = np.abs(x) >= (threshold or np.inf)
    codes, absmax = vectorwise(xp.asarray(np.where(hidden, np.float32(0), x)))
    codes = to_host(codes).copy()
    columns = np.flatnonzero(hidden.any(axis=0))
    codes[:, columns] = 0
    assert np.array_equal(columns, np.sort(golden[f"{name}/columns"]))
    assert np.array_equal(codes, golden[f"{name}/codes"])
    assert np.array_equal(to_host(absmax)[:, 0], golden[f"{name}/absmax"])


@pytest.mark.parametrize("name", CASES)
def test_oracle_products_are_bitsandbytes_own(xp, name):
    golden = np.load(FILE)
    x, weight, threshold = case(name)
    got = to_host(
        int8_matmul(
            xp.asarray(x.astype("float32")), xp.asarray(weight.astype("float32")), threshold
        )
    )
    # from the recorded codes, in float64: what they stand for
    w = (
        golden[f"{name}/weight codes"].astype(float)
        * golden[f"{name}/weight absmax"][:, None]
        / 127
    )
    inside = golden[f"{name}/codes"].astype(float) * golden[f"{name}/absmax"][:, None] / 127
    columns = golden[f"{name}/columns"]
    outside = x[:, columns].astype(float) @ w[:, columns].T
    expected = inside @ w.T + outside
    size = (
        np.abs(inside) @ np.abs(w).T + np.abs(x[:, columns].astype(float)) @ np.abs(w[:, columns]).T
    )
    eps32 = float(np.finfo("float32").eps)
    assert np.all(np.abs(got - expected) <= (x.shape[1] + 8) * eps32 * size)
    # bitsandbytes: float16 weights, products and sum, a half unit each, and a constant that
    # is 1.8e-5 too large
    half = float(np.finfo("float16").eps) / 2
    assert np.all(
        np.abs(got - golden[f"{name}/product"].astype(float)) <= (4 * half + 2e-5) * size + 1e-7
    )


# --- the error ----------------------------------------------------------------------------


@pytest.mark.theorem(
    "|Y − X Wᵀ| ≤ Σ_j (|x_j| s_w/2 + |w_j| s_x/2 + s_x s_w/4) over the integer columns; an "
    "outlier column adds "
    "|x_j| s_w/2 where its weight is dequantised, and nothing where the original is kept",
    source="Dettmers et al. 2022, section 3",
)
@given(
    seed=seeds,
    kind=st.sampled_from(KINDS),
    threshold=st.sampled_from([0.5, 6.0, 0.0]),
    rule=st.sampled_from(RULES),
)
def test_bound_of_the_error(xp, seed, kind, threshold, rule):
    x, w = problem(seed, kind)
    s_w = np.abs(w).max(axis=1) / 127  # [M]
    outlier = (np.abs(x) >= (threshold or np.inf)).any(axis=0)
    hidden = outlier[None, :] if rule == "paper" else np.abs(x) >= (threshold or np.inf)
    s_x = np.where(hidden, 0.0, np.abs(x)).max(axis=1) / 127  # [T]
    inside = np.abs(x[:, ~outlier]).sum(axis=1)
    outside = np.abs(x[:, outlier]).sum(axis=1)
    bound = 0.5 * inside[:, None] * s_w + 0.5 * s_x[:, None] * np.abs(w[:, ~outlier]).sum(axis=1)
    bound += 0.25 * np.count_nonzero(~outlier) * s_x[:, None] * s_w
    bound += 0.5 * outside[:, None] * s_w * (rule == "bitsandbytes")
    y = to_host(int8_matmul(xp.asarray(x), xp.asarray(w), threshold, rule=rule))
    slack = 64 * EPS64 * (np.abs(x) @ np.abs(w).T) + 1e-300
    assert np.all(np.abs(y - x @ w.T) <= bound + slack)


def test_where_there_are_outliers_the_decomposition_repairs_what_they_break(xp):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 128))
    w = rng.standard_normal((32, 128)) / 12
    x[:, [5, 80]] *= 60
    x_ = xp.asarray(x)
    w_ = xp.asarray(w)
    errors = {
        (rule, theta): float(
            np.mean((to_host(int8_matmul(x_, w_, theta, rule=rule)) - x @ w.T) ** 2)
        )
        for rule in RULES
        for theta in (6.0, 0.0)
    }
    assert errors["paper", 6.0] < errors["bitsandbytes", 6.0] < 0.2 * errors["bitsandbytes", 0.0]
    assert errors["paper", 0.0] == errors["bitsandbytes", 0.0]


# --- what it depends on -------------------------------------------------------------------


@pytest.mark.theorem(
    "Threshold ∞ (or 0) is the product of integers alone; a threshold below every value is "
    "the product in floats",
    source="Dettmers et al. 2022, section 3; bitsandbytes, recorded",
)
@given(seed=seeds, kind=st.sampled_from(KINDS), rule=st.sampled_from(RULES))
def test_degenerate_thresholds(xp, seed, kind, rule):
    x, w = problem(seed, kind)
    x_ = xp.asarray(x)
    w_ = xp.asarray(w)
    (qx, cx), (qw, cw) = (tuple(map(to_host, vectorwise(a))) for a in (x_, w_))
    integers = (qx.astype(np.longdouble) @ qw.T) * (cx.astype(np.longdouble) / 127) * (cw.T / 127)
    for theta in (math.inf, 0.0):
        y = to_host(int8_matmul(x_, w_, theta, rule=rule))
        assert np.all(np.abs(y - integers) <= 8 * EPS64 * np.abs(integers) + 1e-300)
    layer = Int8Linear(w_, 5e-324, rule)
    floats = x @ (w if rule == "paper" else to_host(layer.dequantize())).T
    assert np.all(
        np.abs(to_host(layer.matmul(x_)) - floats)
        <= 32 * EPS64 * (np.abs(x) @ np.abs(w).T) + 1e-300
    )
    assert layer.in_float == (x != 0).any(axis=0).sum() * len(x)
    assert layer.multiplied == x.size


@given(seed=seeds, rule=st.sampled_from(RULES))
def test_equivariance_the_order_of_the_tokens_does_not_matter(xp, seed, rule):
    x, w = problem(seed, t=6)
    order = np.random.default_rng(seed).permutation(6)
    y, permuted = (
        to_host(int8_matmul(xp.asarray(a), xp.asarray(w), rule=rule)) for a in (x, x[order])
    )
    assert np.all(np.abs(permuted - y[order]) <= 32 * EPS64 * (np.abs(x) @ np.abs(w).T)[order])


def test_what_else_is_in_the_batch_matters(xp):
    """Another token's outlier takes a column out of this token's integers."""
    x = np.array([[1.0, 0.37, 0.11], [1.0, 1.0, 9.0]])
    w = np.random.default_rng(0).standard_normal((4, 3))
    for rule in RULES:
        layer = Int8Linear(xp.asarray(w), 6.0, rule)
        both = to_host(layer.matmul(xp.asarray(x)))[0]
        alone = to_host(layer.matmul(xp.asarray(x[:1])))[0]
        assert np.all(both != alone)
        assert np.abs(both - alone).max() < 0.02  # both are near the product


def test_the_paper_and_bitsandbytes_differ_as_the_table_says(xp):
    """A value just below 6 in a column that is 60 elsewhere: bitsandbytes lets it widen the
    scale of its row.
    """
    x = np.array([[0.02, 0.02, 5.9], [0.02, 0.02, 60.0]])
    w = np.array([[1.0, 1.0, 0.0]])
    got = {
        rule: to_host(int8_matmul(xp.asarray(x), xp.asarray(w), rule=rule))[:, 0] for rule in RULES
    }
    exact = x @ w[0]
    assert np.allclose(got["paper"], exact, rtol=1e-2, atol=0)
    # 0.02 is less than half of the scale 5.9/127
    assert abs(got["bitsandbytes"][0] - exact[0]) > 0.5 * exact[0]
    # the row of the outlier itself is precise
    assert np.isclose(got["bitsandbytes"][1], exact[1], rtol=1e-2)
    weight = np.array([[1.0, 0.5 / 127]])  # its second value rounds to 0 or to twice itself
    x = np.array([[0.0, 100.0]])
    got = {
        rule: float(to_host(int8_matmul(xp.asarray(x), xp.asarray(weight), rule=rule))[0, 0])
        for rule in RULES
    }
    assert got["paper"] == pytest.approx(50 / 127, rel=1e-12)
    assert abs(got["bitsandbytes"] - 50 / 127) > 0.9 * 50 / 127


def test_bytes_and_what_keeping_the_original_costs(xp):
    w = xp.asarray(np.random.default_rng(0).standard_normal((5, 12)).astype("float32"))
    layer = Int8Linear(w)
    kept = Int8Linear(w, rule="paper")
    assert layer.shape == (5, 12)
    assert layer.nbytes == 5 * 12 + 5 * 4
    assert kept.nbytes == layer.nbytes + 5 * 12 * 4
    assert layer.bits_per_weight == 8 * 80 / 60


# --- codes of rows ------------------------------------------------------------------------


@given(
    seed=seeds,
    kind=st.sampled_from([*KINDS, "extreme"]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_bound_codes_are_within_127_and_half_a_step(xp, seed, kind, dtype):
    x = build(kind, (4, 9), seed, dtype)
    codes, absmax = map(to_host, vectorwise(xp.asarray(x)))
    assert codes.dtype == np.int8
    assert np.array_equal(absmax, np.abs(x).max(axis=1, keepdims=True))
    assert np.array_equal(np.abs(codes).max(axis=1), 127 * (absmax[:, 0] > 0))
    scale = absmax.astype(np.longdouble) / 127
    tiny = float(np.finfo(dtype).smallest_subnormal)
    assert np.all(np.abs(codes * scale - x) <= scale / 2 * (1 + 512 * np.finfo(dtype).eps) + tiny)


def test_degenerate_zero_rows_and_no_rows(xp):
    w = xp.asarray(np.random.default_rng(0).standard_normal((5, 3)))
    for rule in RULES:
        assert np.array_equal(
            to_host(int8_matmul(xp.zeros((2, 3)), w, rule=rule)), np.zeros((2, 5))
        )
        assert to_host(int8_matmul(xp.zeros((0, 3)), w, rule=rule)).shape == (0, 5)
        assert not to_host(int8_matmul(xp.ones((2, 3)), xp.zeros((5, 3)), rule=rule)).any()


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        ([[np.nan, 1.0]], [[1.0, 1.0]], {}, "x: holds NaN or infinity"),
        ([[np.inf, 1.0]], [[1.0, 1.0]], {"threshold": 0.0}, "x: holds NaN or infinity"),
        ([[np.inf, 1.0]], [[1.0, 1.0]], {"threshold": 6.0}, "x: holds NaN or infinity"),
        ([[1.0, 1.0]], [[1.0, np.inf]], {}, "weight: holds NaN or infinity"),
        ([[1.0, 1.0]], [1.0, 1.0], {}, r"weight is a matrix \[M, N\]"),
        ([[1.0, 1.0]], [[1.0, 1.0]], {"threshold": -1.0}, "threshold is 0 or more"),
        ([[1.0, 1.0]], [[1.0, 1.0]], {"threshold": np.nan}, "threshold is 0 or more"),
        ([[1, 1]], [[0.3, 0.3]], {}, r"x is of floats \[T, N\], got int64 \(1, 2\)"),
        ([1.0, 1.0], [[1.0, 1.0]], {}, r"x is of floats \[T, N\], got float64 \(2,\)"),
        ([[1.0, 1.0]], [[1, 1]], {}, "weight is of floats, got int64"),
        (
            [[1.0, 1.0]],
            [[1.0, 1.0]],
            {"rule": "mine"},
            "unknown rule 'mine'; choose one of bitsandbytes, paper",
        ),
    ],
)
def test_rejected(xp, x, w, options, message):
    with pytest.raises(ValueError, match=message):
        int8_matmul(xp.asarray(np.array(x)), xp.asarray(np.array(w)), **options)


# --- statistics ---------------------------------------------------------------------------


@pytest.mark.theorem(
    "Outlier statistics of parts are those of the whole, in any order", source="max and sums"
)
@given(
    seed=seeds,
    lengths=partitions(st.integers(1, 30), empty=True),
    threshold=st.sampled_from([0.5, 1.0, 6.0]),
)
def test_invariance_statistics_do_not_see_the_batches(xp, seed, lengths, threshold):
    x = build("outlier_column", (sum(lengths), 7), seed, "float64")
    seen = OutlierStatistics(threshold)
    at = len(x)
    for t in lengths:  # the last tokens first
        seen.observe(xp.asarray(x[at - t : at]))
        at -= t
    share = (np.abs(x) >= threshold).mean(axis=0)
    assert seen.tokens == len(x)
    assert np.array_equal(to_host(seen.absmax), np.abs(x).max(axis=0))
    np.testing.assert_allclose(to_host(seen.share), share, rtol=2 * EPS64)
    assert seen.columns() == np.flatnonzero(share).tolist()
    hits = to_host(seen.hits)
    assert seen.columns(0.06) == [j for j in range(7) if hits[j] and hits[j] >= 0.06 * len(x)]


def test_exact_value_spread_and_the_threshold_itself(xp):
    seen = OutlierStatistics(6.0)
    seen.observe(xp.asarray(np.array([[6.0, -1.0, 2.0], [0.0, 0.5, -1.0]])))
    assert to_host(seen.hits).tolist() == [1, 0, 0]  # 6 itself counts
    assert seen.spread == 3.0
    for x, spread in (
        (np.zeros((1, 3)), 1.0),
        (np.array([[0.0, 0.0, 5.0]]), math.inf),
        (np.ones((2, 4)), 1.0),
    ):
        other = OutlierStatistics()
        other.observe(xp.asarray(x))
        assert other.spread == spread


def test_rejected_what_has_no_channels_or_is_not_finite(xp):
    seen = OutlierStatistics(name="layer 3's input")
    with pytest.raises(
        ValueError, match=r"layer 3's input: outliers are counted in x\[T, N\], got shape \(4,\)"
    ):
        seen.observe(xp.ones((4,)))
    with pytest.raises(ValueError, match="layer 3's input: holds NaN"):
        seen.observe(xp.full((2, 2), math.nan))
    assert seen.tokens == 0


def test_a_rejected_batch_leaves_no_trace_in_what_is_counted(xp):
    seen = OutlierStatistics()
    layer = Int8Linear(xp.asarray(np.eye(3)))
    good = np.array([[7.0, 0.0, 1.0], [1.0, 2.0, 3.0]])
    seen.observe(xp.asarray(good))
    layer.matmul(xp.asarray(good))
    for bad in (good * math.nan, np.array([[9.0, 9.0, math.inf]]), np.full(3, 9.0)):
        with pytest.raises(ValueError, match="NaN or infinity|x\\[T, N\\]|\\[T, N\\], got"):
            seen.observe(xp.asarray(bad))
        with pytest.raises(ValueError, match="NaN or infinity|x is of floats"):
            layer.matmul(xp.asarray(bad))
    with pytest.raises(ValueError, match="x has 1 channels, earlier 3"):
        seen.observe(xp.asarray(np.full((4, 1), 9.0)))
    seen.observe(xp.zeros((0, 3)))
    assert (seen.tokens, layer.multiplied, layer.in_float) == (2, 6, 2)
    assert to_host(seen.absmax).tolist() == [7.0, 2.0, 3.0]
    assert to_host(seen.hits).tolist() == [1, 0, 0]
    assert to_host(seen.share).tolist() == [0.5, 0.0, 0.0]
