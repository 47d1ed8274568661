"""Scales in fewer bits: rounded to nearest, never to zero, never to infinity; zero points
as codes.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.formats.packing import (
    load_scale,
    load_zero,
    pack_codes,
    store_scale,
    store_zero,
    unpack_codes,
)
from refllm.formats.uniform import Scheme
from schemes import schemes
from strategies import seeds


def scales(seed, dtype="float32", low=-6.0, high=4.5):
    return (10.0 ** np.random.default_rng(seed).uniform(low, high, (3, 5))).astype(dtype)


@given(
    st.sampled_from(["float16", "bfloat16", "float32"]),
    st.sampled_from(["float32", "float64"]),
    seeds,
)
def test_stored_scales_are_rounded_to_nearest_and_take_their_bytes(xp, layout_for, dtype, seed):
    scale = scales(seed, dtype, low=-4.0)
    held = store_scale(xp.asarray(scale), layout_for)
    assert held.nbytes == scale.size * (4 if layout_for == "float32" else 2)
    back = to_host(load_scale(held, getattr(xp, dtype)))
    assert back.dtype == dtype
    assert back.shape == scale.shape
    # half an ulp of normal values: 11, 8 and 24 bits
    half = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[layout_for]
    assert (np.abs(back.astype("float64") - scale) <= half * scale * (1 + 2**-20)).all()


def test_none_keeps_the_scale(xp):
    scale = xp.asarray(scales(0))
    assert store_scale(scale, None) is scale


@given(st.lists(st.integers(1, 0x7F7F), min_size=1, max_size=20))
def test_bfloat16_numbers_and_their_ties(xp, bits):
    """A bfloat16 number is stored as itself; halfway between two, the even one is."""
    low = np.array(bits, dtype=np.uint32)
    exact = (low << 16).view(np.float32)
    np.testing.assert_array_equal(
        to_host(store_scale(xp.asarray(exact), "bfloat16")), low.astype(np.uint16)
    )
    tie = ((low << 16) | 0x8000).view(np.float32)[low < 0x7F7F]
    even = (low + (low & 1))[low < 0x7F7F]
    np.testing.assert_array_equal(
        to_host(store_scale(xp.asarray(tie), "bfloat16")), even.astype(np.uint16)
    )


def test_scales_in_float64_are_rounded_once(xp):
    """Just above a tie of the narrow type, which float32 would make a tie."""
    nudge = 1 + 2.0**-40
    scale = xp.asarray(np.array([1 + 2.0**-8, (1 + 2.0**-8) * nudge]))
    assert to_host(store_scale(scale, "bfloat16")).tolist() == [0x3F80, 0x3F81]
    scale = xp.asarray(np.array([1 + 2.0**-11, (1 + 2.0**-11) * nudge]))
    assert to_host(store_scale(scale, "float16")).tolist() == [1.0, 1 + 2.0**-10]


@pytest.mark.parametrize(
    ("layout_for", "largest", "tie"),
    [("float16", 65504.0, 65520.0), ("bfloat16", 2.0**128 * (1 - 2.0**-8), 2.0**128 * 255.5 / 256)],
)
def test_the_largest_scale_fits_and_its_tie_does_not(xp, layout_for, largest, tie):
    for value in (largest, np.nextafter(np.float32(tie), np.float32(0))):
        scale = np.array([value], dtype=np.float32)
        if layout_for == "float16" and value > largest:
            continue  # rejected, although it would be rounded down
        back = to_host(load_scale(store_scale(xp.asarray(scale), layout_for), xp.float32))
        assert back.tolist() == [largest]
    with pytest.raises(ValueError, match=f"does not fit {layout_for}"):
        store_scale(xp.asarray(np.array([1.0, tie, 1.0], dtype=np.float32)), layout_for)


def test_no_scales_are_stored(xp):
    for layout_for in ("float16", "bfloat16", "float32"):
        none = store_scale(xp.asarray(np.ones((0, 1), dtype=np.float32)), layout_for)
        assert load_scale(none, xp.float32).shape == (0, 1)


def test_scales_without_axes(xp):
    for layout_for in ("float16", "bfloat16", "float32", "float64"):
        held = store_scale(xp.asarray(np.array(0.75, dtype=np.float32)), layout_for)
        back = load_scale(held, xp.float32)
        assert back.shape == ()
        assert float(back) == 0.75


@pytest.mark.parametrize(("layout_for", "least"), [("float16", 2.0**-24), ("bfloat16", 2.0**-133)])
def test_a_scale_never_becomes_zero(xp, layout_for, least):
    tiny = np.array([least / 1000, least, 1.0])  # float64: in float32 the first would be 0 already
    back = to_host(load_scale(store_scale(xp.asarray(tiny), layout_for), xp.float64))
    assert back.tolist() == [least, least, 1.0]


@pytest.mark.parametrize(
    ("layout_for", "large"), [("float16", 65520.0), ("bfloat16", 3.4e38), ("float32", 1e39)]
)
def test_a_scale_that_does_not_fit_is_rejected_by_name(xp, layout_for, large):
    with pytest.raises(
        ValueError, match=rf"v_proj's scale: a scale of .* does not fit {layout_for}"
    ):
        store_scale(xp.asarray(np.array([1.0, large])), layout_for, name="v_proj's scale")


def test_other_types_are_rejected(xp):
    with pytest.raises(
        ValueError, match="scale_dtype 'int8' is unknown; choose one of float16, bfloat16"
    ):
        store_scale(xp.asarray(np.ones(2)), "int8")
    zero = xp.asarray(np.ones((2, 1), dtype=np.int32))
    with pytest.raises(ValueError, match="zero_dtype 'uint32' is unknown; choose one of float16"):
        store_zero(zero, Scheme(4, "asymmetric", "channel"), "uint32")
    with pytest.raises(
        ValueError, match="zero points of rule 'half_integer' are all 0; use an asymmetric rule"
    ):
        store_zero(zero, Scheme(4, "half_integer", "channel"), None)
    with pytest.raises(ValueError, match="4-bit codes lie in"):
        store_zero(zero * 16, Scheme(4, "asymmetric", "channel"), None)


@given(schemes(), st.integers(1, 5), st.integers(1, 40), seeds)
def test_codes_round_trip(xp, scheme, m, n, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(scheme.qmin, scheme.qmax + 1, (m, n)).astype(
        np.int8 if scheme.signed else np.uint8
    )
    words = pack_codes(xp.asarray(codes), scheme)
    back = to_host(unpack_codes(words, scheme, n))
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)
    # what is stored is not negative: code + 2^(b−1) of signed rules
    first = int(to_host(words)[0, 0]) & ((1 << scheme.bits) - 1)
    assert first == int(codes[0, 0]) + (2 ** (scheme.bits - 1) if scheme.signed else 0)


@given(
    schemes(rules=["asymmetric", "asymmetric_signed", "awq"]),
    st.sampled_from([(), (5, 1), (3, 7)]),
    seeds,
)
def test_zero_points_round_trip_in_as_many_bits_as_codes(xp, scheme, shape, seed):
    zero = (
        np.random.default_rng(seed).integers(scheme.qmin, scheme.qmax + 1, shape).astype(np.int32)
    )
    scale = xp.asarray(np.ones(shape, dtype=np.float32))
    for dtype, size in ((None, 4 * -(-zero.size * scheme.bits // 32)), ("float16", 2 * zero.size)):
        held = store_zero(xp.asarray(zero), scheme, dtype)
        assert held.nbytes == size
        back = to_host(load_zero(held, scale, scheme))
        assert back.dtype == np.int32
        np.testing.assert_array_equal(back, zero)


def test_zero_points_of_symmetric_rules_take_no_bytes(xp):
    scheme = Scheme(4, "half_integer_unsigned", "channel")
    scale = xp.asarray(np.ones((3, 1), dtype=np.float32))
    assert store_zero(xp.asarray(np.full((3, 1), 8, dtype=np.int32)), scheme, None) is None
    assert to_host(load_zero(None, scale, scheme)).tolist() == [[8]] * 3


@pytest.mark.oracle
@given(seeds)
def test_rounding_equals_ml_dtypes_and_torch(seed):
    torch = oracle("torch")
    ml_dtypes = oracle("ml_dtypes")
    scale = scales(seed, low=-30, high=4.8)
    theirs = scale.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(store_scale(scale, "bfloat16"), theirs.view(np.uint16))
    half = torch.from_numpy(np.maximum(scale, np.float32(1e-7))).to(torch.float16).numpy()
    np.testing.assert_array_equal(store_scale(np.maximum(scale, np.float32(1e-7)), "float16"), half)
