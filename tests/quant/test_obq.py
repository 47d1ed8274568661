"""OBQ is what its equations say, and GPTQ is OBQ with one order for all rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_hessian import inputs, positive

from conftest import to_host
from refllm.formats.uniform import RULES, Scheme, dequantize_codes, qparams, quantize_codes
from refllm.quant.gptq import gptq
from refllm.quant.hessian import damped
from refllm.quant.obq import obq
from strategies import seeds
from ties import exact_ties, settled

EPS64 = float(np.finfo("float64").eps)
SHAPES = [("tensor", None), ("channel", None), ("group", 4), ("group", 6), ("block", (2, 5))]


def loss_of(w, q, h):
    e = w - q
    return 0.5 * np.einsum("mi,ij,mj->", e, h, e)


@pytest.mark.theorem(
    "GPTQ's codes and loss are those of OBQ in the same order, with the explicit inverse "
    "downdated column by column",
    source="Frantar et al. 2022, section 3.3; Frantar & Alistarh 2022, lemma 1",
)
@given(
    seed=seeds,
    rule=st.sampled_from(RULES),
    shape=st.sampled_from(SHAPES),
    bits=st.integers(2, 5),
    act_order=st.booleans(),
    static=st.booleans(),
    block=st.sampled_from([1, 3, 5, 12, 128]),
)
@example(
    seed=0,
    rule="half_integer",
    shape=("block", (2, 5)),
    bits=4,
    act_order=False,
    static=False,
    block=1,
)  # a tie
def test_equality_gptq_is_obq(xp, seed, rule, shape, bits, act_order, static, block):
    scheme = Scheme(bits, rule, *shape)
    w = np.random.default_rng(seed).standard_normal((3, 12))
    x = inputs(seed, 30, 12)
    x[:, seed % 12] *= seed % 3 > 0  # a dead column in a third of the cases
    h = xp.asarray(2 * x.T @ x / 30)
    options = {"act_order": act_order, "static_groups": static}
    fast = gptq(xp.asarray(w), h, scheme, block_size=block, **options)
    slow = obq(xp.asarray(w), h, scheme, **options)
    same = settled(fast, w, to_host(h), act_order=act_order)
    assert np.array_equal(same, settled(slow, w, to_host(h), act_order=act_order))
    assert np.array_equal(to_host(fast.codes)[same], to_host(slow.codes)[same])
    assert (fast.g_idx is None) == (slow.g_idx is None)
    if fast.g_idx is not None:
        assert np.array_equal(to_host(fast.g_idx), to_host(slow.g_idx))
    assert np.array_equal(to_host(fast.dead), to_host(slow.dead))
    exact = damped(to_host(h), 0.01)
    for made in (fast, slow):  # from a tie on each has a loss of its own: that of its codes
        expected = loss_of(w * ~to_host(made.dead), to_host(made.dequantize()), exact)
        assert abs(made.loss - expected) <= 64 * 12 * EPS64 * np.linalg.cond(exact) * expected
    if not same.all():
        return
    assert abs(fast.loss - slow.loss) <= 1e3 * 12 * EPS64 * slow.loss
    # a scale is a rounded combination of N terms, amplified by the condition of H
    np.testing.assert_allclose(to_host(fast.scale), to_host(slow.scale), rtol=1e4 * EPS64)


def test_a_tie_shows_in_the_result_and_only_later_columns_are_exempt(xp):
    """Column 10 begins a group and holds its extreme, −7.5 scales: −7 in one order of
    operations, −8 in another.
    """
    scheme = Scheme(4, "half_integer", "block", (2, 5))
    w = np.random.default_rng(0).standard_normal((3, 12))
    x = inputs(0, 30, 12)
    x[:, 0] = 0
    h = 2 * x.T @ x / 30
    q = gptq(xp.asarray(w), xp.asarray(h), scheme, block_size=1)
    assert settled(q, w, h).tolist() == [[True] * 10 + [False] * 2] * 3
    assert sorted({*to_host(q.codes)[0, 10:11].tolist(), -7, -8}) == [-8, -7]
    for rule in ("power", "restricted", "asymmetric"):
        for options in ({}, {"act_order": True}, {"act_order": True, "static_groups": True}):
            again = gptq(xp.asarray(w), xp.asarray(h), Scheme(4, rule, "group", 4), **options)
            assert settled(again, w, h, act_order="act_order" in options).all()


@pytest.mark.parametrize("rule", ["half_integer", "half_integer_unsigned"])
@pytest.mark.parametrize("shape", [("group", 2), ("group", 6), ("block", (2, 5))])
def test_ties_are_those_of_exact_arithmetic(rule, shape):
    """The computation of ``settled`` in float64 beside one in fractions."""
    met = 0
    for seed in range(6):
        scheme = Scheme(3 + seed % 2, rule, *shape)
        w = np.random.default_rng(seed).standard_normal((3, 12))
        x = inputs(seed, 30, 12)
        x[:, seed % 12] *= seed % 3 > 0
        h = 2 * x.T @ x / 30
        ties = exact_ties(w, h, scheme)
        if scheme.granularity == "block":
            ties = np.broadcast_to(ties.any(axis=0), ties.shape)
        same = settled(gptq(w, h, scheme, block_size=1 + seed), w, h)
        assert np.array_equal(same, np.cumsum(ties, axis=1) == 0)
        met += not same.all()
    assert met >= 2


@pytest.mark.theorem(
    "Rounding a column in OBQ moves the remaining columns to their least-squares optimum, and "
    "costs ½ (w_i − q_i)² / [H⁻¹]_ii",
    source="Frantar & Alistarh 2022, equation 7",
)
@given(seed=seeds, n=st.integers(2, 8))
def test_exact_value_one_column_is_the_constrained_minimum(xp, seed, n):
    """Groups of one weight at "power" store a negative weight exactly and +a as 3/4 a: only
    column 0 has an error.
    """
    h = positive(seed, n)
    rng = np.random.default_rng(seed)
    w = np.concatenate([rng.uniform(0.1, 1.0, 1), -rng.uniform(1e3, 2e3, n - 1)])[None]
    got = obq(xp.asarray(w), xp.asarray(h), Scheme(3, "power", "group", 1), damp=0.0)
    moved = to_host(got.dequantize())[0] - w[0]
    assert abs(moved[0] + w[0, 0] / 4) <= 4 * EPS64
    # minimise ½ δHδᵀ over δ_1 … by its gradient
    rest = np.linalg.solve(h[1:, 1:], -h[1:, 0] * moved[0])
    tolerance = 64 * n * EPS64 * np.linalg.cond(h)
    assert np.abs(moved[1:] - rest).max() <= tolerance * np.abs(rest).max() + 16 * EPS64 * 2e3
    cost = 0.5 * moved[0] ** 2 / np.linalg.inv(h)[0, 0]
    assert abs(got.loss - cost) <= tolerance * cost + h.max() * (16 * EPS64 * 2e3) ** 2 * n


@pytest.mark.theorem(
    "OBQ's losses add up to ½ tr(E H Eᵀ), greedy or not",
    source="Frantar & Alistarh 2022, section 3",
)
@given(seed=seeds, greedy=st.booleans(), rule=st.sampled_from(RULES), shape=st.sampled_from(SHAPES))
def test_conservation_losses_of_the_steps_are_the_loss_of_the_whole(xp, seed, greedy, rule, shape):
    w = np.random.default_rng(seed).standard_normal((4, 12))
    h = positive(seed, 12)
    q = obq(xp.asarray(w), xp.asarray(h), Scheme(3, rule, *shape), damp=0.0, greedy=greedy)
    expected = loss_of(w, to_host(q.dequantize()), h)
    assert abs(q.loss - expected) <= 64 * 12 * EPS64 * np.linalg.cond(h) * expected


@given(seed=seeds)
def test_exact_value_greedy_is_the_textbook_loop(xp, seed):
    """Row by row: quantise what costs least, solve for the rest, until nothing is left."""
    w = np.random.default_rng(seed).standard_normal((3, 6))
    h = positive(seed, 6)
    scheme = Scheme(3, "half_integer", "channel")
    scale, zero_point = qparams(w, scheme)
    expected = np.zeros_like(w)
    for m in range(3):
        row = w[m].copy()
        left = list(range(6))
        while left:
            inverse = np.linalg.inv(h[np.ix_(left, left)])
            codes = quantize_codes(row[None], scale[m : m + 1], zero_point[m : m + 1], scheme)
            error = (
                row - dequantize_codes(codes, scale[m : m + 1], zero_point[m : m + 1], scheme)[0]
            )[left]
            k = int(np.argmin(error**2 / np.diag(inverse)))
            expected[m, left[k]] = codes[0, left[k]]
            row[left] -= error[k] / inverse[k, k] * inverse[k]
            left.pop(k)
    got = obq(xp.asarray(w), xp.asarray(h), scheme, damp=0.0, greedy=True)
    assert np.array_equal(to_host(got.codes), expected)
    assert got.g_idx is None


def test_dead_columns_become_zero_and_are_named(xp):
    x = inputs(1, 20, 6)
    x[:, 2] = 0
    w = np.random.default_rng(1).standard_normal((3, 6))
    for greedy in (False, True):
        q = obq(
            xp.asarray(w),
            xp.asarray(2 * x.T @ x / 20),
            Scheme(4, "asymmetric", "channel"),
            greedy=greedy,
        )
        assert to_host(q.dead).tolist() == [j == 2 for j in range(6)]
        assert not to_host(q.dequantize())[:, 2].any()


@pytest.mark.parametrize(
    ("w", "h", "message"),
    [
        (np.ones((2, 3)), np.eye(4), r"gate: shape \(2, 3\) does not fit a Hessian of 4 columns"),
        (np.ones(3), np.eye(3), "does not fit"),
        (np.array([[1.0, np.inf]]), np.eye(2), "gate: holds NaN or infinity"),
        (
            np.ones((2, 2)),
            np.array([[1.0, 2.0], [2.0, 1.0]]),
            "gate: the Hessian is not positive definite at",
        ),
        (np.ones((2, 2)), np.diag([1.0, -1.0]), "negative"),
    ],
)
def test_what_does_not_fit_is_rejected(xp, w, h, message):
    with pytest.raises(ValueError, match=message):
        obq(xp.asarray(w), xp.asarray(h), Scheme(4, "power", "tensor"), name="gate")


def test_weight_and_hessian_stay_as_they_are(xp):
    w = np.random.default_rng(2).standard_normal((3, 5))
    h = positive(2, 5)
    moved = xp.asarray(w.copy()), xp.asarray(h.copy())
    for greedy in (False, True):
        obq(*moved, Scheme(4, "power", "channel"), greedy=greedy)
    assert np.array_equal(to_host(moved[0]), w)
    assert np.array_equal(to_host(moved[1]), h)
