"""The narrow accumulator against a loop over products, slices that end within it, and what is
rejected. (Products and training in FP8: ``tests/quant/test_fp8.py``.)
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.formats.block_float import FloatScheme, quantize
from refllm.formats.fp8_linear import Accumulator, Fp8Linear, scaled_matmul, truncate
from strategies import build, seeds


def cut(value: float, bits: int) -> float:
    """``bits`` significant bits of a Python float, towards zero."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(math.trunc(fraction * 2**bits), exponent - bits)


def naive(x, w, bits, every, promote):
    """One product after another; small integers, so that every sum is exact until it is cut."""
    total = partial = 0.0
    exact = 0.0
    since = 0
    for i, (a, b) in enumerate(zip(x.tolist(), w.tolist(), strict=True), 1):
        exact += a * b
        since += 1
        promoted = promote is not None and i % promote == 0
        if since == every or promoted or i == len(x):
            partial = cut(partial + exact, bits)
            exact = 0.0
            since = 0
        if promoted or i == len(x):
            total += partial
            partial = 0.0
    return total


@given(
    st.sampled_from([1, 3, 8, 14, 24]),
    st.sampled_from([1, 5, 16, 48]),
    st.sampled_from([1, 7, 48, 50, 128, None]),
    st.sampled_from([1, 16, 47, 48, 49, 128, 129, 300]),
    seeds,
)
def test_the_accumulator_is_the_loop(xp, bits, every, promote, k, seed):
    rng = np.random.default_rng(seed)
    x, w = (rng.integers(-15, 16, (2, k)).astype(np.float32) for _ in range(2))
    got = to_host(Accumulator(bits, every, promote).product(xp.asarray(x), xp.asarray(w)))
    expected = [[naive(row, column, bits, every, promote) for column in w] for row in x]
    np.testing.assert_array_equal(got, expected)


def test_no_products_are_zero():
    none = np.zeros((2, 0), dtype=np.float32)
    for promote in (None, 1):
        assert Accumulator(promote=promote).product(none, none).tolist() == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("bits", [1, 2, 23, 24])
def test_truncation_ends_at_the_last_place(xp, bits):
    """All ones, the smallest change of it, powers of two, both signs, zero."""
    ones = 2.0 - 2.0**-23
    x = np.array([ones, 1.0, 1.5, 2.0**-126, 2.0**127, 0.0], dtype=np.float32)
    expected = [cut(float(value), bits) for value in x]
    for sign in (np.float32(1), np.float32(-1)):
        got = to_host(truncate(xp.asarray(sign * x), bits))
        np.testing.assert_array_equal(got, sign * np.array(expected, dtype=np.float32))


def test_the_least_and_the_most_of_an_accumulator():
    for good in ({"bits": 1}, {"bits": 24}, {"every": 1}, {"promote": 1}, {"promote": None}):
        Accumulator(**good)
    for bad in ({"bits": 0}, {"bits": 25}, {"every": 0}, {"promote": 0}, {"promote": -1}):
        with pytest.raises(ValueError, match="1 to 24 bits, every and promote of at least 1"):
            Accumulator(**bad)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_scales_of_row_blocks_in_every_tile(xp, monkeypatch, rows):
    """Codes are 1, so the product is a sum of scales: of each tile, block and slice its own."""
    n = 40
    w = 2.0 ** (np.arange(rows)[:, None] // 16 + 3 * (np.arange(n)[None, :] // 16))
    x = 2.0 ** -(np.arange(3)[:, None] + np.arange(n)[None, :] // 16)
    qw = quantize(xp.asarray(w.astype(np.float32)), FloatScheme("e4m3", "block", 16, "ue8m0"))
    qx = quantize(xp.asarray(x.astype(np.float32)), FloatScheme("e4m3", "block", (1, 16), "ue8m0"))
    monkeypatch.setattr("refllm.formats.fp8_linear.MATMUL_TILE", (16 * n, 16 * n))
    np.testing.assert_array_equal(to_host(scaled_matmul(qx, qw)), x @ w.T)
    narrow = Accumulator(bits=24, every=5)
    np.testing.assert_array_equal(to_host(scaled_matmul(qx, qw, narrow)), x @ w.T)


def test_slices_nest_or_span_the_row():
    x = np.ones((2, 24), dtype=np.float32)

    def product(one, other):
        made = (quantize(x, FloatScheme("e4m3", "block", (1, size))) for size in (one, other))
        return scaled_matmul(*made)

    for sizes in ((8, 16), (16, 8), (5, 24), (32, 5), (5, 5)):
        np.testing.assert_allclose(product(*sizes), np.full((2, 2), 24.0), rtol=1e-6)
    for sizes in ((5, 16), (16, 5), (23, 2)):
        with pytest.raises(ValueError, match=f"scales of {sizes[0]} and of {sizes[1]} columns"):
            product(*sizes)


@pytest.mark.parametrize("activation", ["tile", "token", "tensor", None])
def test_float16_activations(xp, activation):
    """Quantised in float32, and returned in float16; unquantised ones in float32."""
    weight = quantize(xp.asarray(build("normal", (8, 128), 0)), FloatScheme("e4m3", "channel"))
    linear = Fp8Linear(weight, activation)
    x = build("normal", (3, 128), 1).astype(np.float16)
    y = to_host(linear.matmul(xp.asarray(x)))
    wide = to_host(linear.matmul(xp.asarray(x.astype(np.float32))))
    if activation is None:
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y, wide)
    else:
        assert y.dtype == np.float16
        np.testing.assert_array_equal(y, wide.astype(np.float16))
        assert to_host(linear.matmul(xp.asarray(x[:0]))).dtype == np.float16
