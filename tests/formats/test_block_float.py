"""Floats that share scales: error bounds, scales by bits, zero blocks, ragged edges, MX and
NV formats.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.formats import block_float, minifloat
from refllm.formats.block_float import (
    MXFP4,
    MXFP8,
    NVFP4,
    SCALES,
    FloatScheme,
    absmax,
    fake_quantize,
    quantize,
    scale_of,
)
from refllm.formats.minifloat import FORMATS, rounded
from schemes import place
from strategies import arrays, build, seeds

GEOMETRIES = (
    ("tensor", None),
    ("channel", None),
    ("token", None),
    ("group", 4),
    ("block", (3, 5)),
    ("block", (1, 8)),
)
FINITE = ("normal", "outlier_column", "zero", "constant", "one_sided")


@st.composite
def float_schemes(draw, scales=("float32", "ue8m0", "mx")):
    fmt = draw(st.sampled_from(["e4m3", "e5m2", "e2m1"]))
    return FloatScheme(fmt, *draw(st.sampled_from(GEOMETRIES)), draw(st.sampled_from(scales)))


def spread(scale, scheme, shape):
    return np.array(
        [[scale[place(scheme.geometry, i, j)] for j in range(shape[1])] for i in range(shape[0])]
    )


@pytest.mark.theorem(
    "rounded(x) is dequantize(quantize(x)), the sign of zero included",
    source="refllm.formats.minifloat",
)
@given(st.sampled_from([n for n in FORMATS if n != "e8m0"]), arrays(100), st.integers(-20, 20))
def test_rounded_is_the_round_trip(xp, fmt, x, k):
    with np.errstate(over="ignore"):
        x = np.nan_to_num(x * np.float32(2.0**k), posinf=3e38, neginf=-3e38)
    got = to_host(rounded(xp.asarray(x), fmt))
    twice = to_host(minifloat.dequantize(minifloat.quantize(xp.asarray(x), fmt), fmt))
    np.testing.assert_array_equal(got, twice)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(twice))


@pytest.mark.parametrize("fmt", [n for n in FORMATS if n != "e8m0"])
def test_rounded_is_the_round_trip_of_every_upper_half(xp, fmt, monkeypatch):
    """Every upper half of a float32, with nothing, one or all below it, in several tiles."""
    monkeypatch.setattr(minifloat, "tile_elements", lambda like: 10_000)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    x = np.concatenate([upper, upper | 1, upper | 0xFFFF]).view(np.float32)
    x = x[np.isfinite(x)]
    got = to_host(rounded(xp.asarray(x), fmt))
    twice = to_host(minifloat.dequantize(minifloat.quantize(xp.asarray(x), fmt), fmt))
    np.testing.assert_array_equal(got.view(np.uint32), twice.view(np.uint32))
    assert to_host(rounded(xp.asarray(x[:6].reshape(2, 3)), fmt)).shape == (2, 3)


def test_what_rounded_does_not_take(xp):
    one = np.ones(3, dtype=np.float32)
    with pytest.raises(TypeError, match="a format with a sign, got float32 and e8m0"):
        rounded(xp.asarray(one), "e8m0")
    with pytest.raises(TypeError, match="float32 values .* got float64 and e4m3"):
        rounded(xp.asarray(one.astype(np.float64)), "e4m3")


@pytest.mark.theorem(
    "with s = absmax / largest, or the power of two above it, |x̂ − x| ≤ max(r·|x|, "
    "s·smallest/2), r the format's "
    "bound, and nothing saturates",
    source="definition: a product of what was stored",
)
@given(
    float_schemes(("float32", "ue8m0")),
    st.integers(1, 6),
    st.sampled_from([4, 8, 12]),
    st.sampled_from(FINITE),
    seeds,
)
def test_error_bound(xp, scheme, m, n, kind, seed):
    x = build(kind, (m, n), seed)
    fmt = FORMATS[scheme.format]
    made = quantize(xp.asarray(x), scheme)
    s = spread(to_host(made.scale), scheme, (m, n)).astype(np.float64)
    error = np.abs(to_host(made.dequantize()).astype(np.float64) - x)
    size = np.abs(x).astype(np.float64)
    # x/s and s·q are rounded in float32, twice half an eps of a number of |x|'s size
    bound = np.maximum(fmt.relative_error * size, 0.5 * fmt.smallest * s) + 2.0**-23 * 1.2 * size
    assert (error <= bound).all()
    assert (size <= s * fmt.max * (1 + 2.0**-22)).all()


@pytest.mark.theorem(
    "the UE8M0 scale is the least power of two that is at least absmax/largest",
    source="DeepSeek-V3.1",
)
@given(st.sampled_from(["e4m3", "e5m2", "e2m1"]), seeds)
def test_ue8m0_is_the_power_of_two_above(xp, fmt, seed):
    a = np.float32(2.0) ** np.random.default_rng(seed).uniform(-100, 100, 50).astype(np.float32)
    a = np.concatenate([a, np.float32(2.0) ** np.arange(-5, 5) * np.float32(FORMATS[fmt].max)])
    got = to_host(scale_of(xp.asarray(a), FloatScheme(fmt, "tensor", scale="ue8m0")))
    quotient = a / np.float32(FORMATS[fmt].max)
    fraction, exponent = np.frexp(quotient)
    np.testing.assert_array_equal(got, np.ldexp(np.float32(1), exponent - (fraction == 0.5)))
    assert (got >= quotient).all()
    assert (got < 2 * quotient).all()


def test_mx_scales_follow_the_binade_of_absmax(xp):
    """The exponent of a, less that of the largest value; E8M0 ends at 2^−127."""
    for fmt, top in (("e4m3", 8), ("e5m2", 15), ("e2m1", 2)):
        a = np.float32(2.0) ** np.arange(-100, 128, 19).astype(np.float32)
        a = np.concatenate([a, np.nextafter(a, np.float32(0)), np.float32([3.4e38, 1.5, 448.0])])
        scheme = FloatScheme(fmt, "tensor", scale="mx")
        got = to_host(scale_of(xp.asarray(a), scheme))
        exponent = np.floor(np.log2(a.astype(np.float64))).astype(np.int32)
        np.testing.assert_array_equal(got, np.ldexp(np.float32(1), exponent - top))
        small = np.float32([0.0, 1e-45, 2.0**-126, 2.0 ** (top - 127), 2.0 ** (top - 126)])
        held = to_host(scale_of(xp.asarray(small), scheme))
        assert np.log2(held).tolist() == [-127, -127, -127, -127, -126]


def test_scales_of_the_smallest_and_the_largest_blocks(xp):
    """2^−126 where a/largest is less; ue8m0 stays so small that largest · s is finite."""
    a = np.float32([0.0, 1e-45, 448 * 2.0**-126, 448 * 2.0**-125, 2.0**127, 3.4e38])
    plain = to_host(scale_of(xp.asarray(a), FloatScheme("e4m3", "tensor")))
    assert plain[:4].tolist() == [1.0, 2.0**-126, 2.0**-126, 2.0**-125]
    powers = to_host(scale_of(xp.asarray(a), FloatScheme("e4m3", "tensor", scale="ue8m0")))
    assert np.log2(powers).tolist() == [0, -126, -126, -125, 119, 119]


@pytest.mark.parametrize(
    ("small", "code", "back"),
    [
        (5e-4, 0x20, 0),  # less than half of E4M3's smallest value: 1/8 in its place
        (6 * 2.0**-10, 0x20, 0),  # half of it exactly: a tie, and zero is even
        (np.nextafter(np.float32(6 * 2.0**-10), np.float32(1)), 0x01, 6 * 2.0**-10),
        (6 * 2.0**-9, 0x01, 6 * 2.0**-9),
        (0.0, 0x20, 0),
    ],
)
def test_a_scale_of_nvfp4_that_rounds_to_zero_is_an_eighth(xp, small, code, back):
    x = np.array([[2688] * 16 + [small] * 16], dtype=np.float32)  # G = 1
    made = quantize(xp.asarray(x), NVFP4)
    assert to_host(made.stored).tolist() == [[0x7E, code]]
    assert float(to_host(made.g)) == 1.0
    np.testing.assert_array_equal(to_host(made.dequantize()), [[2688] * 16 + [back] * 16])


@pytest.mark.theorem(
    "with a power of two as the scale s·q is exact: x̂ is a multiple of a code's value, unrounded",
    source="refllm.formats.block_float",
)
@given(float_schemes(("ue8m0", "mx")), seeds)
def test_powers_of_two_add_no_rounding(xp, scheme, seed):
    x = build("normal", (6, 8), seed)
    made = quantize(xp.asarray(x), scheme)
    exact = minifloat.dequantize(to_host(made.codes), scheme.format).astype(np.float64)
    exact *= spread(to_host(made.scale), scheme, x.shape)
    np.testing.assert_array_equal(to_host(made.dequantize()).astype(np.float64), exact)


@pytest.mark.theorem(
    "multiplying x by 2^k multiplies every scale by 2^k and changes no code, while scales "
    "stay normal",
    source="a power of two moves exponents only",
)
@given(float_schemes(), st.integers(-30, 30), seeds)
def test_power_of_two_equivariance(xp, scheme, k, seed):
    x = build("normal", (6, 8), seed)
    a, b = (quantize(xp.asarray(x * np.float32(f)), scheme) for f in (1.0, 2.0**k))
    np.testing.assert_array_equal(to_host(a.codes), to_host(b.codes))
    np.testing.assert_array_equal(to_host(a.scale) * np.float32(2.0**k), to_host(b.scale))


@pytest.mark.theorem(
    "quantising x̂ again with its own scale gives x̂", source="quantize(dequantize(c)) = c"
)
@given(float_schemes(("float32",)), st.sampled_from(FINITE), seeds)
def test_idempotent_with_a_given_scale(xp, scheme, kind, seed):
    made = quantize(xp.asarray(build(kind, (6, 8), seed)), scheme)
    back = made.dequantize()
    again = quantize(back, scheme, scale=made.scale)
    np.testing.assert_array_equal(to_host(again.dequantize()), to_host(back))


@pytest.mark.parametrize("scale", SCALES)
def test_a_block_of_zeros_is_zeros(xp, scale):
    x = np.ones((4, 32), dtype=np.float32)
    x[1, :16] = 0
    x[3] = 0
    made = quantize(xp.asarray(x), FloatScheme("e2m1", "group", 16, scale))
    back = to_host(made.dequantize())
    assert np.isfinite(to_host(made.scale)).all()
    assert (to_host(made.scale) > 0).all()
    np.testing.assert_array_equal(back[x == 0], 0)
    np.testing.assert_allclose(back[x == 1], 1, rtol=0.07)
    zeros = quantize(
        xp.asarray(np.zeros((2, 16), dtype=np.float32)), FloatScheme("e2m1", "group", 16, scale)
    )
    np.testing.assert_array_equal(to_host(zeros.dequantize()), 0)


@pytest.mark.parametrize("kind", ["denormal", "extreme"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_ends_of_float32(xp, scale, kind):
    scheme = FloatScheme("e2m1", "group", 16, scale)
    x = build(kind, (3, 16), 0)
    back = to_host(fake_quantize(xp.asarray(x), scheme))
    assert np.isfinite(back).all()
    if kind == "extreme":
        assert (np.abs(back) >= 0.6 * np.abs(x)).all()


@pytest.mark.parametrize(
    "scheme",
    [
        FloatScheme("e4m3", "block", (3, 5)),
        FloatScheme("e4m3", "block", (1, 128)),
        MXFP8,
        MXFP4,
        NVFP4,
        FloatScheme("e5m2", "tensor"),
        FloatScheme("e4m3", "block", 4, "ue8m0"),
    ],
)
def test_fake_is_the_round_trip(xp, scheme):
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    np.testing.assert_array_equal(
        to_host(fake_quantize(xp.asarray(x), scheme)),
        to_host(quantize(xp.asarray(x), scheme).dequantize()),
    )


@pytest.mark.theorem(
    "a ragged edge block has the scale of what is in it: padding with zeros changes nothing",
    source="DeepSeek-V3's weight blocks",
)
@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_ragged_blocks(xp, m, n, seed):
    x = build("normal", (m, n), seed)
    padded = np.zeros((12, 12), dtype=np.float32)
    padded[:m, :n] = x
    scheme = FloatScheme("e4m3", "block", 4)
    a = quantize(xp.asarray(x), scheme)
    b = quantize(xp.asarray(padded), scheme)
    np.testing.assert_array_equal(to_host(a.dequantize()), to_host(b.dequantize())[:m, :n])
    assert tuple(a.stored.shape) == (-(-m // 4), -(-n // 4))


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "e2m1"])
@pytest.mark.parametrize("size", [3, (1, 4), (4, 32)])
def test_tiles_of_ragged_blocks_join(xp, monkeypatch, fmt, size):
    """Ten rows of eleven columns: tiles end within the matrix and are whole row blocks."""
    x = build("normal", (10, 11), 3)
    made = quantize(xp.asarray(x), FloatScheme(fmt, "block", size))
    dense = to_host(made.dequantize())
    exact = minifloat.dequantize(to_host(made.codes), fmt) * spread(
        to_host(made.scale), made.scheme, x.shape
    ).astype(np.float32)
    np.testing.assert_array_equal(dense, exact)
    y = np.random.default_rng(1).standard_normal((2, 11))
    monkeypatch.setattr(block_float, "TILE", (1, 1))
    monkeypatch.setattr(block_float, "MATMUL_TILE", (50, 50))
    np.testing.assert_array_equal(to_host(made.dequantize()), dense)
    product = to_host(made.matmul(xp.asarray(y)))
    np.testing.assert_allclose(product, y @ dense.T.astype(np.float64), rtol=1e-12, atol=1e-12)
    assert to_host(made.matmul(xp.asarray(y.astype(np.float16)))).dtype == np.float32


def test_the_weight_comes_back_in_its_dtype():
    made = quantize(build("normal", (4, 8), 0), FloatScheme("e4m3", "channel"))
    single = made.dequantize()
    made.dtype = "float64"
    assert made.dequantize().dtype == np.float64
    np.testing.assert_array_equal(made.dequantize(), single)
    assert made.matmul(np.ones((1, 8), dtype=np.float32)).dtype == np.float64


def test_effective_bits():
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    block = FloatScheme("e4m3", "block", 128)
    tile = FloatScheme("e4m3", "block", (1, 128))
    bits = {
        name: quantize(x, scheme).bits_per_weight
        for name, scheme in {
            "mxfp8": MXFP8,
            "mxfp4": MXFP4,
            "nvfp4": NVFP4,
            "block": block,
            "tile": tile,
        }.items()
    }
    assert bits["mxfp8"] == 8.25
    assert bits["mxfp4"] == 4.25
    assert bits["nvfp4"] == 4.5 + 32 / x.size  # G, one float32 for the whole matrix
    assert bits["block"] == 8 + 32 / 128**2
    assert bits["tile"] == 8.25
    ue8m0 = quantize(x, FloatScheme("e4m3", "block", 128, "ue8m0"))
    assert ue8m0.nbytes == x.size + 4  # a byte for each of four blocks


def test_mx_scales_saturate_and_ue8m0_do_not():
    """MX rounds absmax down to a power of two: what is above 1.75 times that in E4M3 (1.5
    in E2M1) is cut.
    """
    x = np.array([[1.0, -1.999] + [0.5] * 30], dtype=np.float32)
    assert scale_of(absmax(x, MXFP4), MXFP4)[0, 0] == 0.25
    assert quantize(x, MXFP4).dequantize()[0, 1] == -1.5
    above = FloatScheme("e2m1", "group", 32, "ue8m0")
    assert quantize(x, above).dequantize()[0, 1] == -2.0


@pytest.mark.oracle
def test_float_schemes_of_compressed_tensors():
    """FP8 by row and block, NVFP4: codes times scales as compressed-tensors' own quantiser
    has them.
    """
    torch = oracle("torch")
    forward = oracle("compressed_tensors.quantization.lifecycle.forward")
    arguments = oracle("compressed_tensors.quantization").QuantizationArgs
    helpers = oracle("compressed_tensors.quantization.utils.helpers")
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32) * np.float32(0.02)
    t = torch.from_numpy(x)
    channel = arguments(num_bits=8, type="float", strategy="channel", symmetric=True)
    scale = torch.from_numpy(quantize(x, FloatScheme("e4m3", "channel")).scale)
    theirs = forward.fake_quantize(t, scale, torch.zeros_like(scale), channel).numpy()
    np.testing.assert_array_equal(fake_quantize(x, FloatScheme("e4m3", "channel")), theirs)
    found, _ = helpers.calculate_qparams(t.amin(1, keepdim=True), t.amax(1, keepdim=True), channel)
    np.testing.assert_array_equal(found.numpy(), scale.numpy())
    nv = arguments(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )
    g = torch.tensor([2688.0 / float(t.abs().max())])
    blocks = t.reshape(256, 16, 16)
    scale, _ = helpers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), nv, global_scale=g)
    theirs = forward.fake_quantize(t, scale, torch.zeros_like(scale), nv, global_scale=g).numpy()
    np.testing.assert_allclose(fake_quantize(x, NVFP4), theirs, rtol=3e-7)


def test_bad_input_is_rejected(xp):
    x = np.ones((4, 8), dtype=np.float32)
    for bad, where in ((np.nan, (1, 2)), (np.inf, (3, 7)), (-np.inf, (0, 1))):
        y = x.copy()
        y[3, 7] = np.nan  # NaN beside infinity
        y[where] = bad
        message = rf"w: holds NaN or infinity, first at index \({where[0]}, {where[1]}\)"
        for granularity in ("tensor", "channel"):
            with pytest.raises(ValueError, match=message):
                quantize(xp.asarray(y), FloatScheme("e4m3", granularity), name="w")
            with pytest.raises(ValueError, match=message):
                fake_quantize(xp.asarray(y), FloatScheme("e4m3", granularity), name="w")
    with pytest.raises(ValueError, match="w: groups of 3 do not divide"):
        quantize(xp.asarray(x), FloatScheme("e4m3", "group", 3), name="w")
    with pytest.raises(ValueError, match="has no range"):
        quantize(xp.asarray(x[:0]), FloatScheme("e4m3", "tensor"))
    with pytest.raises(ValueError, match="a matrix"):
        quantize(xp.asarray(x[0]), FloatScheme("e4m3", "tensor"))
    for scale in (0.0, -1.0, np.nan, np.inf):
        column = np.array([[1.0], [scale], [1.0], [1.0]], dtype=np.float32)
        with pytest.raises(ValueError, match="w: a given scale is float32, finite and above 0"):
            quantize(
                xp.asarray(x), FloatScheme("e4m3", "channel"), scale=xp.asarray(column), name="w"
            )
    ones = xp.asarray(np.ones((4, 1), dtype=np.float32))
    with pytest.raises(ValueError, match="a given scale is float32"):
        quantize(xp.asarray(x), FloatScheme("e4m3", "channel", scale="ue8m0"), scale=ones)
    for wrong in (
        ("fp16", "tensor"),
        ("e4m3", "rows"),
        ("e4m3", "group"),
        ("e4m3", "tensor", None, "fp8"),
        ("e4m3", "group", 16, "nvfp4"),
        ("e8m0", "tensor"),
    ):
        with pytest.raises(ValueError):
            FloatScheme(*wrong)


def test_float64_products_and_repr():
    x = np.random.default_rng(0).standard_normal((6, 8))
    made = quantize(x, FloatScheme("e2m1", "group", 4, "mx"))
    y = np.random.default_rng(1).standard_normal((3, 8))
    np.testing.assert_allclose(
        made.matmul(y), y @ made.dequantize().T.astype(np.float64), rtol=1e-12
    )
    assert "6×8, e2m1" in repr(made)
    assert math.isclose(made.bits_per_weight, 8 * made.nbytes / 48)
