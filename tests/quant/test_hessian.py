"""The Hessian does not see the batches, its factor is the one that the paper means, and
damping always ends.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.quant.hessian import LEAST_DAMP, Hessian, damped, factor, hessian
from strategies import partitions, seeds

EPS64 = float(np.finfo("float64").eps)


def inputs(seed, tokens, columns, dtype="float64"):
    """x[T, N] of columns of different sizes that follow a common signal."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, columns)) + rng.standard_normal((tokens, 1))
    return (x * np.exp(rng.standard_normal(columns))).astype(dtype)


def positive(seed, n, tokens=None):
    """A positive definite Hessian, float64."""
    return damped(hessian(inputs(seed, tokens or 2 * n, n)), 0.01)


# --- accumulation -------------------------------------------------------------------------


@pytest.mark.theorem(
    "H is the same however the calibration tokens are cut into batches",
    source="Σ_t x_t x_tᵀ is a sum",
)
@given(seed=seeds, lengths=partitions(st.integers(1, 40), empty=True), n=st.integers(1, 6))
def test_invariance_batches_are_joined_by_their_tokens(xp, seed, lengths, n):
    x = inputs(seed, sum(lengths), n)
    accumulator = Hessian()
    at = 0
    for t in lengths:
        accumulator.add(xp.asarray(x[at : at + t]))
        at += t
    assert accumulator.count == len(x)
    expected = 2.0 * np.einsum("ti,tj->ij", x, x) / len(x)
    bound = 4 * len(x) * EPS64 * 2.0 * np.einsum("ti,tj->ij", np.abs(x), np.abs(x)) / len(x)
    assert np.all(np.abs(to_host(accumulator.matrix) - expected) <= bound)
    assert np.all(np.abs(to_host(hessian(xp.asarray(x))) - expected) <= bound)


def test_a_batch_of_sequences_counts_as_all_its_tokens(xp):
    x = inputs(0, 12, 5)
    accumulator = Hessian()
    accumulator.add(xp.asarray(x.reshape(3, 4, 5)))
    assert accumulator.count == 12
    assert np.array_equal(to_host(accumulator.matrix), to_host(hessian(xp.asarray(x))))


def test_sums_of_float16_do_not_overflow_and_float64_stays(xp):
    x = np.full((300, 2), 20.0, dtype="float16")  # Σ x² is 120,000
    h = to_host(hessian(xp.asarray(x)))
    assert h.dtype == np.float32
    assert np.array_equal(h, np.full((2, 2), 800.0, dtype="float32"))
    assert to_host(hessian(xp.asarray(x.astype("float64")))).dtype == np.float64


def test_the_matrix_is_a_new_array_each_time(xp):
    accumulator = Hessian()
    accumulator.add(xp.asarray(inputs(1, 4, 3)))
    first = accumulator.matrix
    first += 1.0
    assert not np.any(to_host(accumulator.matrix) == to_host(first))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_are_rejected_by_name(xp, bad):
    accumulator = Hessian("model.layers.3.mlp.up_proj")
    accumulator.add(xp.asarray(np.ones((7, 4))))
    x = np.ones((2, 4))
    x[1, 2] = bad
    with pytest.raises(
        ValueError, match=r"model\.layers\.3\.mlp\.up_proj holds NaN or infinity after 7 tokens"
    ):
        accumulator.add(xp.asarray(x))
    assert accumulator.count == 7


def test_no_token_and_another_width_are_rejected(xp):
    with pytest.raises(ValueError, match="x has seen no token"):
        hessian(xp.zeros((0, 4)))
    with pytest.raises(ValueError, match=r"x needs columns, x\[\.\.\., N\], got shape \(4, 0\)"):
        hessian(xp.zeros((4, 0)))
    accumulator = Hessian()
    accumulator.add(xp.ones((1, 4)))
    kept = to_host(accumulator.matrix)
    with pytest.raises(ValueError, match="x has 3 columns, earlier 4"):
        accumulator.add(xp.ones((1, 3)))
    accumulator.add(xp.zeros((0, 4)))
    # what was rejected is not counted
    assert accumulator.count == 1
    assert np.array_equal(to_host(accumulator.matrix), kept)
    accumulator.add(xp.asarray(np.full((3, 4), 2.0)))
    assert accumulator.count == 4
    assert np.array_equal(to_host(accumulator.matrix), np.full((4, 4), 2 * (1 + 3 * 4) / 4))


# --- damping and the factor ---------------------------------------------------------------


def test_exact_value_damping_is_a_share_of_the_mean_diagonal_with_dead_columns_at_one(xp):
    h = np.diag([4.0, 0.0, 7.0])
    got = to_host(damped(xp.asarray(h), 0.5))
    # the mean of 4, 1 and 7 is 4
    assert np.array_equal(got, np.diag([4.0 + 2.0, 1.0 + 2.0, 7.0 + 2.0]))
    assert np.array_equal(h, np.diag([4.0, 0.0, 7.0]))


@pytest.mark.theorem(
    "The inverse of the reversed Cholesky factor of H is the upper Cholesky factor of H⁻¹: "
    "no inverse of H is needed",
    source="uniqueness of the Cholesky factor",
)
@pytest.mark.parametrize("n", [1, 2, 7, 128, 129, 300])  # 129 and 300 are inverted by halves
def test_the_factor_is_the_paper_s(xp, n):
    h = hessian(inputs(n, 2 * n + 1, n))
    u = to_host(factor(xp.asarray(h), 0.01).upper)
    exact = damped(h, 0.01)
    tolerance = 8 * n * EPS64 * np.linalg.cond(exact)
    reference = np.linalg.cholesky(np.linalg.inv(exact)).T
    assert np.array_equal(np.tril(u, -1), np.zeros((n, n)))
    assert np.abs(u - reference).max() <= tolerance * np.abs(reference).max()
    assert np.abs(u @ exact @ u.T - np.eye(n)).max() <= tolerance


@pytest.mark.theorem(
    "After i columns, the inverse of what is left of H has the first row U_ii · U_i, with "
    "Uᵀ U = H⁻¹",
    source="Frantar et al. 2022, section 3.3",
)
@given(seed=seeds, n=st.integers(1, 12))
def test_rows_of_the_factor_are_rows_of_the_shrinking_inverses(seed, n):
    h = positive(seed, n)
    u = factor(h, 0.0).upper
    tolerance = 16 * n * EPS64 * np.linalg.cond(h)
    for i in range(n):
        left = np.linalg.inv(h[i:, i:])  # the problem without the columns before i
        assert np.abs(left[0] - u[i, i] * u[i, i:]).max() <= tolerance * np.abs(left).max()


def test_dead_columns_are_named_and_touch_no_other(xp):
    x = inputs(3, 20, 6)
    x[:, [1, 4]] = 0
    f = factor(xp.asarray(hessian(x)))
    assert to_host(f.dead).tolist() == [False, True, False, False, True, False]
    u = to_host(f.upper)
    for j in (1, 4):
        others = np.arange(6) != j
        assert not u[j, others].any()
        assert not u[others, j].any()


def test_act_order_is_stable_and_puts_dead_columns_last(xp):
    h = np.diag([2.0, 0.0, 5.0, 2.0, 5.0, 1e-9])
    f = factor(xp.asarray(h), 0.25, act_order=True)
    order = [2, 4, 0, 3, 5, 1]
    assert to_host(f.order).tolist() == order
    assert to_host(f.dead).tolist() == [False, True, False, False, False, False]
    expected = 1 / np.sqrt(np.diag(damped(h, 0.25))[order])
    assert np.abs(np.diag(to_host(f.upper)) - expected).max() <= 4 * EPS64 * expected.max()
    assert factor(xp.asarray(h), 0.25).order is None


# --- what is not positive definite --------------------------------------------------------


def test_fewer_tokens_than_columns_are_enough_with_damping_and_raise_it_without(xp):
    h = hessian(inputs(5, 3, 40))
    assert factor(xp.asarray(h), 0.01).damp == 0.01
    f = factor(xp.asarray(h), 0.0)
    # 0 if rounding happened to leave it definite
    assert f.damp in [0.0, *(LEAST_DAMP * 2**k for k in range(3))]
    u = to_host(f.upper)
    exact = damped(h, f.damp)
    assert np.abs(u @ exact @ u.T - np.eye(40)).max() <= 8 * 40 * EPS64 * np.linalg.cond(exact)


@given(seed=seeds, n=st.integers(2, 9), damp=st.sampled_from([0.0, 0.01, 0.3]))
def test_damping_is_doubled_until_the_matrix_is_positive_definite(xp, seed, n, damp):
    h = positive(seed, n)
    h -= np.eye(n) * 3.0 * np.linalg.eigvalsh(h)[0]  # its smallest eigenvalue goes below zero
    h[np.arange(n), np.arange(n)] = np.abs(np.diag(h)) + EPS64
    f = factor(xp.asarray(h), damp)
    tried = [damp]
    while tried[-1] < f.damp:
        tried.append(max(LEAST_DAMP, 2 * tried[-1]))
    assert f.damp == tried[-1]
    assert np.linalg.eigvalsh(damped(h, f.damp))[0] > -8 * n * EPS64 * np.abs(h).max()
    if len(tried) > 1:  # the previous value was not enough
        assert np.linalg.eigvalsh(damped(h, tried[-2]))[0] < 8 * n * EPS64 * np.abs(h).max()


def test_exact_value_a_damping_below_the_least_is_followed_by_the_least(xp):
    """From 1e-9 to 1e-4, not to 2e-9; from there on, and above it, by doubling."""
    ones = xp.asarray(np.ones((2, 2), dtype="float32"))  # 1 + 1e-9 is 1 in float32
    assert factor(ones, 1e-9).damp == LEAST_DAMP
    for below, damp, found in (
        (1e-6, 1e-9, 1e-4),
        (1e-6, 0.0, 1e-4),
        (1e-6, 0.9e-4, 0.9e-4),
        (3e-4, 1e-9, 4e-4),
        (3e-4, 2e-4, 4e-4),
        (1e-3, 3e-4, 1.2e-3),
    ):
        h = np.array([[1.0, 1.0 + below], [1.0 + below, 1.0]])  # its least eigenvalue is −below
        assert factor(xp.asarray(h), damp).damp == found


def test_a_factorisation_that_fails_silently_is_found_out(monkeypatch):
    """CuPy returns the columns before the failure and leaves the others as they were."""

    def silent(a):
        out = np.tril(a).astype(float)
        for k in range(len(a)):
            pivot = a[k, k] - out[k, :k] @ out[k, :k]
            if not pivot > 0:
                break
            out[k, k] = np.sqrt(pivot)
            out[k + 1 :, k] = (a[k + 1 :, k] - out[k + 1 :, :k] @ out[k, :k]) / out[k, k]
        return out

    sound = positive(0, 8)
    h = positive(0, 8)
    h[2, 5] = h[5, 2] = 2.0 * np.sqrt(h[2, 2] * h[5, 5])
    expected = factor(sound, 0.01).upper
    needed = factor(h, 0.01).damp
    assert needed > 0.01
    monkeypatch.setattr(np.linalg, "cholesky", silent)
    assert np.allclose(factor(sound, 0.01).upper, expected, rtol=1e-12, atol=0)
    assert factor(h, 0.01).damp == needed


@pytest.mark.parametrize(
    ("h", "damp", "message"),
    [
        (np.ones((2, 3)), 0.01, r"square matrix \[N, N\], got shape \(2, 3\)"),
        (np.ones(4), 0.01, "square matrix"),
        (np.zeros((0, 0)), 0.01, "square matrix"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), 0.01, "NaN or infinity"),
        (np.diag([1.0, -1.0]), 0.01, "negative"),
        (np.eye(2), -0.1, "0 or more, got -0.1"),
        (np.eye(2), np.inf, "0 or more, got inf"),
        (np.eye(2), np.nan, "0 or more, got nan"),
        (np.array([[0.0, 1e30], [1e30, 0.0]]), 0.01, "no damping makes it positive definite"),
    ],
)
def test_what_is_no_hessian_is_rejected(xp, h, damp, message):
    with pytest.raises(ValueError, match=message):
        factor(xp.asarray(h), damp)


def test_the_hessian_that_is_passed_in_stays_as_it_is(xp):
    h = hessian(inputs(6, 10, 5))
    kept = h.copy()
    moved = xp.asarray(h)
    for act_order in (False, True):
        factor(moved, 0.1, act_order)
    assert np.array_equal(to_host(moved), kept)
