"""A weight in GGUF's bytes multiplies like the matrix that it stands for, on every library,
and looks up its rows.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from gguf_data import BLOCKS
from refllm.formats.gguf import linear
from refllm.formats.gguf.codec import dequantize, quantize
from refllm.formats.gguf.linear import GGUFLinear
from strategies import build, seeds


def made(xp, type, rows, seed, dtype="float32"):
    raw = quantize(build("normal", (rows, 512), seed), type)
    return GGUFLinear(xp.asarray(raw), type, dtype), dequantize(raw, type)


@pytest.mark.theorem("GGUFLinear.matmul(x) = x · dequantize(W)ᵀ", source="the Linear seam")
@given(
    st.sampled_from(BLOCKS),
    st.integers(1, 40),
    st.integers(0, 5),
    seeds,
    st.sampled_from(["float32", "float64"]),
)
def test_products(xp, type, rows, count, seed, dtype):
    w, dense = made(xp, type, rows, seed, dtype)
    x = build("normal", (count, 512), seed + 1, dtype)
    out = to_host(w.matmul(xp.asarray(x)))
    assert out.dtype == dtype
    exact = x.astype(np.float64) @ dense.T.astype(np.float64)
    bound = 512 * np.finfo(dtype).eps * (np.abs(x) @ np.abs(dense.T))
    assert (np.abs(out - exact) <= bound).all()


@pytest.mark.parametrize("type", BLOCKS)
def test_rows_and_sizes(xp, type):
    w, dense = made(xp, type, 9, 0)
    assert w.shape == (9, 512)
    assert w.nbytes == w.raw.nbytes == round(w.bits_per_weight * 9 * 512 / 8)
    np.testing.assert_array_equal(to_host(w.dequantize()), dense)
    np.testing.assert_array_equal(
        to_host(w.rows(xp.asarray(np.array([8, 0, 0])))), dense[[8, 0, 0]]
    )
    assert f"9×512, {type}" in repr(w)


def test_tiles_change_nothing(monkeypatch):
    w, _ = made(np, "Q4_K", 33, 1)
    x = build("normal", (4, 512), 2, "float64")
    whole = w.matmul(x)
    monkeypatch.setattr(linear, "MATMUL_TILE", (1000, 1000))
    np.testing.assert_allclose(w.matmul(x), whole, rtol=1e-12, atol=1e-12)


def test_raw_bytes_of_another_width_are_rejected():
    with pytest.raises(
        ValueError, match=r"raw Q4_K is uint8 \[R, a multiple of 144\], got \(3, 145\)"
    ):
        GGUFLinear(np.zeros((3, 145), np.uint8), "Q4_K")
    with pytest.raises(ValueError, match=r"a multiple of 144\], got \(144,\)"):
        GGUFLinear(np.zeros(144, np.uint8), "Q4_K")
