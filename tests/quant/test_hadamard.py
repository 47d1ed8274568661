"""Hadamard matrices by their definition, and the fast transform against the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.errors import InputError
from refllm.quant.hadamard import (
    hadamard,
    hadamard_transform,
    inverse_transform,
    naive_transform,
    split_order,
)

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 60, 64, 72, 76, 96, 128, 144, 576]
kinds = st.sampled_from(["normal", "outlier", "zero", "huge"])


def drawn(seed: int, n: int, kind: str, rows: int = 3) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, n))
    if kind == "outlier":
        x[:, seed % n] *= 1e4
    if kind == "huge":
        x *= 1e150
    return x * (kind != "zero")


@pytest.mark.theorem(
    "H Hᵀ = n I for matrices with entries ±1, of Sylvester's and of both of Paley's kinds",
    source="Sylvester 1867; Paley 1933",
)
@pytest.mark.parametrize("n", [*ORDERS, 1536])
def test_rows_are_orthogonal_and_entries_are_plus_or_minus_one(n):
    h = hadamard(n).astype(np.int64)
    assert set(np.unique(h)) <= {-1, 1}
    assert np.array_equal(h @ h.T, n * np.eye(n, dtype=np.int64))


@pytest.mark.parametrize(
    ("n", "split"),
    [(576, (4, 36)), (1536, (7, 12)), (64, (6, 1)), (28, (0, 28)), (24, (1, 12)), (2, (1, 1))],
)
def test_the_order_is_split_into_a_power_of_two_and_a_small_matrix(n, split):
    assert split_order(n) == split


@given(seed=st.integers(0, 999), n=st.sampled_from(ORDERS), kind=kinds)
def test_the_fast_transform_is_the_product_by_the_whole_matrix(xp, seed, n, kind):
    x = drawn(seed, n, kind)
    y = hadamard_transform(xp.asarray(x))
    expected = naive_transform(xp.asarray(x))
    bound = 4 * n * np.finfo(float).eps * max(np.abs(x).max(), 1e-300)
    assert float(xp.max(xp.abs(y - expected))) <= bound
    assert y.dtype == xp.float64
    assert y.shape == x.shape


@given(seed=st.integers(0, 999), n=st.sampled_from(ORDERS), kind=kinds)
def test_the_inverse_undoes_the_transform_and_lengths_are_kept(xp, seed, n, kind):
    x = xp.asarray(drawn(seed, n, kind))
    largest = float(xp.max(xp.abs(x)))
    bound = 8 * n * np.finfo(float).eps * max(largest, 1e-300)
    assert float(xp.max(xp.abs(inverse_transform(hadamard_transform(x)) - x))) <= bound
    if kind != "huge":
        before = float(xp.sum(x * x))
        after = float(xp.sum(xp.square(hadamard_transform(x))))
        assert abs(after - before) <= 16 * n * np.finfo(float).eps * before


def test_one_outlier_becomes_equal_small_values():
    for n in (64, 576, 1536):
        x = np.zeros(n)
        x[n // 3] = 100.0
        assert np.allclose(np.abs(hadamard_transform(x)), 100.0 / n**0.5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_and_all_leading_axes_stay(xp, dtype):
    x = xp.asarray(np.ones((2, 3, 4, 12), dtype))
    y = hadamard_transform(x)
    assert (str(y.dtype), y.shape) == (dtype, (2, 3, 4, 12))


@pytest.mark.parametrize("n", [0, -4, 3, 6, 7, 92, 116, 2 * 9])
def test_orders_without_a_construction_are_named(n):
    with pytest.raises(InputError, match=str(n)):
        hadamard(n)
