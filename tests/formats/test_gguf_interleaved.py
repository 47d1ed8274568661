"""Interleaved rows: the bytes and values of the file's order, products within their bound."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from gguf_data import BLOCKS
from refllm.formats.gguf import bits, interleaved, unpacked
from refllm.formats.gguf.codec import UNPACKERS, dequantize, quantize
from refllm.formats.gguf.interleaved import InterleavedLinear
from refllm.formats.gguf.types import gguf_type, row_bytes
from strategies import build, seeds

N = 512
sizes = st.tuples(st.integers(7, 30), st.integers(1, 6000), st.integers(1500, 9000))


def made(xp, type, rows, seed, dtype="float32", size=(256, 1 << 19, 1 << 19)):
    """A weight, and the file's bytes; ``size`` is (GROUP_ROWS, GROUP, TILE)."""
    raw = quantize(build("normal", (rows, N), seed), type)
    with patch.multiple(interleaved, GROUP_ROWS=size[0], GROUP=size[1]):
        return InterleavedLinear(xp.asarray(raw), type, dtype), raw


@pytest.mark.theorem(
    "Interleaving moves bytes and changes none: raw, rows and dequantize are the file's, bit "
    "for bit",
    source="the definition",
)
@given(st.sampled_from(BLOCKS), st.integers(1, 40), sizes, seeds)
def test_bytes_and_values_come_back(xp, type, rows, size, seed):
    w, raw = made(xp, type, rows, seed, size=size)
    dense = dequantize(raw, type)
    np.testing.assert_array_equal(to_host(w.raw), raw)
    assert w.shape == (rows, N)
    assert w.nbytes == raw.nbytes
    with patch.object(interleaved, "TILE", (size[2], size[2])):
        np.testing.assert_array_equal(to_host(w.dequantize()), dense)
    index = np.random.default_rng(seed).integers(0, rows, 7)
    index[0] = rows - 1  # of the last group, which is smaller
    np.testing.assert_array_equal(to_host(w.rows(xp.asarray(index))), dense[index])
    assert f"InterleavedLinear({rows}×{N}, {type}" in repr(w)


@pytest.mark.theorem(
    "InterleavedLinear.matmul(x) is within (S + N/S + 4) u Σ |x| (|s q| + |m|) of "
    "x · dequantize(W)ᵀ",
    source="Higham 2002, §3.1; the order of the operations",
)
@given(
    st.sampled_from(BLOCKS),
    st.integers(1, 40),
    st.integers(0, 40),
    sizes,
    seeds,
    st.sampled_from(["float32", "float64"]),
)
def test_products(xp, type, rows, count, size, seed, dtype):
    w, raw = made(xp, type, rows, seed, dtype, size)
    x = build("normal", (count, N), seed + 1, dtype)
    with patch.object(interleaved, "TILE", (size[2], size[2])):
        out = to_host(w.matmul(xp.asarray(x)))
    assert out.dtype == dtype
    assert out.shape == (count, rows)
    exact = x.astype(np.float64) @ dequantize(raw, type).T.astype(np.float64)
    codes, scale, offset = UNPACKERS[type](raw.reshape(-1, gguf_type(type).size, 1))
    parts = scale.shape[1]
    magnitude = np.abs(codes.reshape(len(codes), parts, -1)[..., None] * scale[..., None, :])
    if offset is not None:
        magnitude = magnitude + np.abs(offset[..., None, :])
    s = N // (parts * N // gguf_type(type).block)
    bound = np.abs(x) @ magnitude.reshape(rows, N).astype(np.float64).T
    bound *= (s + N / s + 4) * np.finfo(dtype).eps / 2
    if dtype == "float64":  # the weights are those of dequantize, and N products are summed
        bound *= N
    assert (np.abs(out - exact) <= bound).all()


@pytest.mark.parametrize("rows", [1, unpacked.FEW_ROWS, unpacked.FEW_ROWS + 1])
def test_few_and_many_rows_of_x_give_the_same_product(xp, rows):
    w, raw = made(xp, "Q4_K", 300, 3)
    x = build("normal", (rows, N), 4)
    exact = x.astype(np.float64) @ dequantize(raw, "Q4_K").T.astype(np.float64)
    np.testing.assert_allclose(to_host(w.matmul(xp.asarray(x))), exact, atol=1e-4)


def test_groups_fill_a_tile_where_rows_are_short():
    assert made(np, "Q8_0", 3, 0)[0]._group_rows == (1 << 19) // N
    with patch.object(interleaved, "GROUP", 1):
        assert made(np, "Q8_0", 3, 0, size=(256, 1, 1))[0]._group_rows == 256


@pytest.mark.parametrize("type", [type for type in BLOCKS if type != "MXFP4"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_damaged_group_is_found(xp, type, value):
    raw = np.zeros((10, row_bytes(type, N)), dtype=np.uint8)
    assert made_of(xp, raw, type).damaged_row() is None
    half = np.float16(value).tobytes()
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(type, 0)  # of the block's d
    raw[6, at : at + 2] = np.frombuffer(half, np.uint8)
    assert made_of(xp, raw, type).damaged_row() == 4  # of the group of rows 4 to 7
    if gguf_type(type).size in (20, 24, 144, 176):  # the offset, beside d
        raw[6, at : at + 2] = 0
        raw[6, at + 2 : at + 4] = np.frombuffer(half, np.uint8)
        assert made_of(xp, raw, type).damaged_row() == 4


def test_a_scale_whose_product_overflows_is_damage(xp):
    raw = np.zeros((10, row_bytes("MXFP4", N)), dtype=np.uint8)
    raw[6, 0] = 255  # 2^127, times half of a doubled code
    raw[6, 1] = 1
    assert made_of(xp, raw, "MXFP4").damaged_row() is None  # 2^127 · 1
    raw[6, 1] = 7  # 2^127 · 12
    assert made_of(xp, raw, "MXFP4").damaged_row() == 4


def made_of(xp, raw, type):
    with patch.multiple(interleaved, GROUP_ROWS=4, GROUP=1):
        return InterleavedLinear(xp.asarray(raw), type)


@pytest.mark.theorem(
    "float16_values is exact for each of the 65,536 codes", source="IEEE 754, by enumeration"
)
@pytest.mark.parametrize("step", [1, 1024])
def test_float16_values_are_exact(xp, step):
    """All codes at once hold NaN; in pieces of one exponent most of them do not."""
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(-1, (1 << 16) // step)
    for part in codes:
        data = xp.asarray(part.view(np.uint8).reshape(-1, 2).T)  # [2, C]
        out = to_host(bits.float16_values(data))
        assert out.dtype == np.float32
        expected = part.view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(out[0].view(np.uint32), expected.view(np.uint32))
