"""A weight in codes: its product, its bytes, what comes back, and how little of it is ever
in floats.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.formats import quantized_linear
from refllm.formats.quantized_linear import (
    ActOrderLinear,
    QuantizedLinear,
    column_order,
    effective_bits,
    quantize,
)
from refllm.formats.uniform import Scheme, dequantize_codes, quantize_codes
from schemes import columns, rows, schemes
from strategies import build, seeds

KINDS = ("normal", "outlier_column", "zero", "constant", "denormal", "one_sided")
dtypes = st.sampled_from(["float32", "float64"])


@pytest.mark.theorem(
    "QuantizedLinear.matmul(x) = x Ŵᵀ for the Ŵ that dequantize() gives, for every tile "
    "size, in float64 where x or W is",
    source="ARCHITECTURE.md: the weight seam",
)
@given(
    schemes(),
    rows,
    columns,
    st.integers(0, 4),
    st.sampled_from(KINDS),
    dtypes,
    dtypes,
    st.integers(1, 50),
    seeds,
)
def test_matmul_is_the_product_of_what_comes_back(
    xp, scheme, m, n, t, kind, dtype, other, tile, seed
):
    weight = quantize(xp.asarray(build(kind, (m, n), seed, dtype)), scheme)
    x = np.random.default_rng(seed).standard_normal((t, n)).astype(other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_linear, "MATMUL_TILE", (tile, tile))
        got = to_host(weight.matmul(xp.asarray(x)))
    back = to_host(weight.dequantize())
    assert got.shape == (t, m)
    assert got.dtype == np.result_type(dtype, other)
    wide = x.astype(np.longdouble) @ back.T.astype(np.longdouble)
    info = np.finfo(got.dtype)
    bound = (
        n
        * float(info.eps)
        * (np.abs(x).astype(np.longdouble) @ np.abs(back).T.astype(np.longdouble))
    )
    assert (np.abs(got - wide) <= bound + n * float(info.smallest_subnormal)).all()


@given(schemes(), rows, columns, dtypes, seeds)
def test_what_is_held_comes_back(xp, scheme, m, n, dtype, seed):
    x = xp.asarray(build("normal", (m, n), seed, dtype))
    weight = quantize(x, scheme)
    assert weight.shape == (m, n)
    assert weight.dtype == weight.scale.dtype == x.dtype
    assert weight.scale.shape == weight.zero_point.shape == scheme.scale_shape((m, n))
    assert weight.packed().shape == (m, -(-n * scheme.bits // 32))
    back = dequantize_codes(weight.codes, weight.scale, weight.zero_point, scheme)
    np.testing.assert_array_equal(to_host(weight.dequantize()), to_host(back))


@given(schemes(), rows, columns, st.sampled_from([None, "float16", "bfloat16"]), seeds)
def test_from_codes_is_the_same_weight(xp, scheme, m, n, scale_dtype, seed):
    first = quantize(xp.asarray(build("normal", (m, n), seed)), scheme, scale_dtype=scale_dtype)
    again = QuantizedLinear.from_codes(
        first.codes, first.scale, first.zero_point, scheme, scale_dtype
    )
    np.testing.assert_array_equal(to_host(again.packed()), to_host(first.packed()))
    np.testing.assert_array_equal(to_host(again.dequantize()), to_host(first.dequantize()))
    assert again.nbytes == first.nbytes
    if scheme.symmetric:
        bare = QuantizedLinear.from_codes(first.codes, first.scale, None, scheme, scale_dtype)
        np.testing.assert_array_equal(to_host(bare.zero_point), to_host(first.zero_point))


@given(schemes(), st.sampled_from(["float16", "bfloat16"]), dtypes, seeds)
def test_codes_are_made_with_the_scale_that_is_stored(xp, scheme, scale_dtype, dtype, seed):
    x = xp.asarray(build("normal", (5, 12), seed, dtype))
    weight = quantize(x, scheme, scale_dtype=scale_dtype)
    codes = quantize_codes(x, weight.scale, weight.zero_point, scheme)
    np.testing.assert_array_equal(to_host(weight.codes), to_host(codes))


@given(schemes(), seeds)
def test_given_scales_are_used(xp, scheme, seed):
    x = xp.asarray(build("normal", (5, 12), seed))
    own = quantize(x, scheme)
    wide = quantize(x, scheme, scale=own.scale * 2.0, zero_point=own.zero_point)
    np.testing.assert_array_equal(to_host(wide.scale), 2.0 * to_host(own.scale))
    codes = quantize_codes(x, own.scale * 2.0, own.zero_point, scheme)
    np.testing.assert_array_equal(to_host(wide.codes), to_host(codes))
    if scheme.symmetric:
        bare = quantize(x, scheme, scale=own.scale)
        np.testing.assert_array_equal(to_host(bare.packed()), to_host(own.packed()))


# --- act-order ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["half_integer", "asymmetric"])
@pytest.mark.parametrize("tile", [1, 24, 10_000])
def test_act_order_by_definition(xp, monkeypatch, rule, tile):
    """Ŵ[:, j] = s[:, g_idx[j]] (q[:, j] − z[:, g_idx[j]]), in tiles of any size."""
    w = build("normal", (7, 24), 0)
    order = np.random.default_rng(1).permutation(24)
    held = quantize(xp.asarray(w[:, order]), Scheme(4, rule, "group", 8))
    parts = (held.packed(), held.scale, held._zero, held.scheme, held.shape, held.dtype)
    made = ActOrderLinear(*parts)
    for same in (made.codes, made.dequantize()):
        expected = held.codes if same.dtype != np.float32 else held.dequantize()
        np.testing.assert_array_equal(to_host(same), to_host(expected))
    assert made.g_idx is None
    assert made.nbytes == held.nbytes
    made.order = xp.asarray(order)
    monkeypatch.setattr(quantized_linear, "MATMUL_TILE", (tile, tile))
    monkeypatch.setattr(quantized_linear, "TILE", (tile, tile))
    g_idx = to_host(made.g_idx)
    assert g_idx.dtype == np.int32
    assert [int(g_idx[j]) for j in order] == [i // 8 for i in range(24)]
    codes = to_host(made.codes)
    np.testing.assert_array_equal(codes[:, order], to_host(held.codes))
    s, z = (to_host(part)[:, g_idx] for part in (made.scale, made.zero_point))
    dense = s * (codes.astype(np.float32) - z.astype(np.float32))
    np.testing.assert_array_equal(to_host(made.dequantize()), dense)
    x = np.random.default_rng(2).standard_normal((3, 24))
    product = to_host(made.matmul(xp.asarray(x)))
    np.testing.assert_allclose(product, x @ dense.T.astype(np.float64), rtol=1e-12, atol=1e-12)
    assert made.nbytes == held.nbytes + 4 * 24


def test_columns_of_a_group_keep_their_order(xp):
    g_idx = np.random.default_rng(0).permutation(np.arange(4096) % 2).astype(np.int32)
    order = to_host(column_order(xp.asarray(g_idx), 2))
    np.testing.assert_array_equal(order, np.argsort(g_idx, kind="stable"))
    for wrong in (np.zeros(8), [0, 0, 0, 1], [1, 1, 2, 2], [0, 0, 2, 2], [-1, 0, 0, 1]):
        bad = xp.asarray(np.array(wrong, dtype=np.int32))
        message = f"q_proj: g_idx does not put {len(wrong) // 2} columns into each of 2 groups"
        with pytest.raises(ValueError, match=message):
            column_order(bad, 2, name="q_proj")


# --- bytes --------------------------------------------------------------------------------


@pytest.mark.theorem(
    "nbytes = 4 M ⌈N·b/32⌉ + bytes of the scales + 4 ⌈ranges·b/32⌉ of asymmetric zero "
    "points; nothing else is held",
    source="ARCHITECTURE.md: the weight seam",
)
@given(
    schemes(),
    rows,
    columns,
    st.sampled_from([(None, 4), ("float16", 2), ("bfloat16", 2), ("float64", 8)]),
    seeds,
)
def test_bytes(xp, scheme, m, n, scale_dtype, seed):
    weight = quantize(xp.asarray(build("normal", (m, n), seed)), scheme, scale_dtype=scale_dtype[0])
    steps = int(np.prod(scheme.scale_shape((m, n))))
    zeros = 0 if scheme.symmetric else 4 * -(-steps * scheme.bits // 32)
    assert weight.nbytes == 4 * m * -(-n * scheme.bits // 32) + scale_dtype[1] * steps + zeros
    assert weight.bits_per_weight == 8 * weight.nbytes / (m * n)
    held = [v for v in vars(weight).values() if hasattr(v, "nbytes")]
    assert sum(v.nbytes for v in held) == weight.nbytes


@pytest.mark.theorem(
    "The article's 4 + 32/128 = 4.25 bits a weight, and the other accountings, are what the "
    "bytes held come to",
    source="definition, from the real bytes",
)
@pytest.mark.parametrize(
    ("bits", "rule", "group", "zero_dtype", "zero_bits", "total"),
    [
        (4, "asymmetric", 128, "float16", 16, 4.25),
        (4, "asymmetric", 128, None, 4, 4.15625),
        (4, "half_integer", 128, None, 0, 4.125),
        (4, "half_integer", 32, None, 0, 4.5),
        (4, "asymmetric", 32, "float16", 16, 5.0),
        (3, "asymmetric", 128, None, 3, 3 + 19 / 128),
        (8, "restricted", 512, None, 0, 8 + 16 / 512),
    ],
)
def test_effective_bits_are_real_bytes(bits, rule, group, zero_dtype, zero_bits, total):
    x = build("normal", (64, 512), 0)
    weight = quantize(
        x, Scheme(bits, rule, "group", group), scale_dtype="float16", zero_dtype=zero_dtype
    )
    assert weight.bits_per_weight == effective_bits(bits, group, zero_bits=zero_bits) == total
    np.testing.assert_array_equal(weight.zero_point, quantize(x, weight.scheme).zero_point)


def test_no_float_copy_of_the_weight_is_ever_made():
    """A product with 4 M weights (16 MiB of float32) needs less than 4 MiB beside what it
    returns.
    """
    weight = quantize(
        build("normal", (2048, 2048), 0),
        Scheme(4, "asymmetric", "group", 128),
        scale_dtype="float16",
    )
    assert weight.nbytes < 2.2 * 2**20
    x = np.ones((1, 2048), dtype=np.float32)
    tracemalloc.start()
    weight.matmul(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20


# --- rejections -----------------------------------------------------------------------------


def test_codes_that_do_not_fit_are_rejected(xp):
    scheme = Scheme(4, "half_integer", "channel")
    codes = xp.asarray(np.full((2, 8), 7, dtype=np.int32))
    scale = xp.asarray(np.ones((2, 1), dtype=np.float32))
    for wrong in (codes + 1, codes - 16):
        with pytest.raises(ValueError, match=r"codes lie in -8\.\.7"):
            QuantizedLinear.from_codes(wrong, scale, None, scheme)
    with pytest.raises(ValueError, match=r"codes \(2, 8\) and scale \(1, 2\) do not fit"):
        QuantizedLinear.from_codes(codes, scale.T, None, scheme)
    with pytest.raises(ValueError, match=r"codes \(8,\) and scale"):
        QuantizedLinear.from_codes(codes[0, :], scale, None, scheme)
    with pytest.raises(ValueError, match="zero points of rule 'half_integer' are all 0"):
        QuantizedLinear.from_codes(
            codes, scale, xp.asarray(np.ones((2, 1), dtype=np.int32)), scheme
        )
    with pytest.raises(TypeError, match="the scale is float32 or float64 .* got float16"):
        QuantizedLinear.from_codes(
            codes, xp.asarray(np.ones((2, 1), dtype=np.float16)), None, scheme
        )


def test_it_says_what_it_is():
    weight = quantize(build("normal", (2, 8), 0), Scheme(4, "half_integer", "channel"))
    assert repr(weight).startswith("QuantizedLinear(2×8, Scheme(bits=4, rule='half_integer'")
    assert repr(weight).endswith("8.000 bits per weight)")
