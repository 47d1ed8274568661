"""Integer products against NumPy's integer loop, and the length up to which float32 adds
them exactly.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.formats import int_matmul
from refllm.formats.int_matmul import exact_length, integer_matmul, scaled_matmul
from refllm.formats.quantized_linear import quantize
from refllm.formats.uniform import Scheme
from schemes import FORCED
from strategies import build, seeds

# (largest of one side, of the other, longest exact sum): what 8-bit codes are
LENGTHS = [
    (127, 127, 1040),
    (128, 128, 1024),
    (255, 127, 518),
    (255, 255, 258),
    (128, 127, 1032),
    (7, 127, 18872),
]
lengths = st.sampled_from([0, 1, 2, 7, 257, 259, 1023, 1041, 2100])


def exact(qx, qw):
    return qx.astype(np.int64) @ qw.astype(np.int64).T


@pytest.mark.parametrize(("p", "q", "length"), LENGTHS)
def test_lengths_of_the_usual_codes(p, q, length):
    assert exact_length(p, q) == exact_length(q, p) == length


@pytest.mark.theorem(
    "float32 adds ⌊2²⁴/(p·q)⌋ products of integers of at most p and q exactly, and not "
    "always one more",
    source="refllm.formats.int_matmul; IEEE 754 binary32",
)
@pytest.mark.parametrize(("p", "q", "length"), LENGTHS)
def test_the_length_is_tight(p, q, length):
    # as large as it can be, in every order: no partial sum exceeds 2²⁴
    largest = np.full((1, length), p, dtype=np.float32) @ np.full((length, 1), q, dtype=np.float32)
    assert int(largest[0, 0]) == length * p * q <= 2**24
    # one more, within the bounds, can make the sum an odd number beyond 2²⁴, which no
    # float32 is
    x = np.full(length + 1, p)
    w = np.full(length + 1, q)
    one_more = ((a, b) for a in range(1, p + 1) for b in range(1, q + 1))
    x[-1], w[-1] = next(
        (a, b)
        for a, b in one_more
        if (length * p * q + a * b) % 2 and length * p * q + a * b > 2**24
    )
    total = int(x @ w)
    assert int(np.dot(x.astype(np.float32), w.astype(np.float32))) != total
    # and that is why the sum is split there
    np.testing.assert_array_equal(integer_matmul(x[None, :], w[None, :]), [[total]])


@pytest.mark.theorem(
    "integer_matmul equals the product of int64 matrices, for 8-bit codes of any sign and "
    "any length",
    source="refllm.formats.int_matmul",
)
@given(st.integers(0, 3), st.integers(0, 5), lengths, st.data())
def test_equals_int64(xp, rows, outputs, n, data):
    kinds = st.sampled_from(["int8", "uint8"])
    types = (data.draw(kinds), data.draw(kinds))
    rng = np.random.default_rng(data.draw(seeds))
    sides = []
    for dtype, height in zip(types, (rows, outputs), strict=True):
        info = np.iinfo(dtype)
        extreme = data.draw(st.booleans())
        codes = rng.integers(info.min, info.max + 1, (height, n))
        if extreme:  # all at one end: partial sums are as large as they get
            codes = np.full((height, n), info.max if rng.random() < 0.5 else info.min)
        sides.append(codes.astype(dtype))
    got = to_host(integer_matmul(*map(xp.asarray, sides)))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, exact(*sides))


def test_tiles_of_the_weight_join(xp, monkeypatch):
    monkeypatch.setattr(int_matmul, "_TILE", 4000)
    rng = np.random.default_rng(0)
    qx, qw = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((3, 2100), (11, 2100)))
    np.testing.assert_array_equal(
        to_host(integer_matmul(xp.asarray(qx), xp.asarray(qw))), exact(qx, qw)
    )


def test_sums_beyond_int32_are_int64():
    """2³¹ is reached first by 131,072 products of −128·−128, which is why the accumulator
    is told in advance.
    """
    least = np.full((1, 131072), -128, dtype=np.int8)
    got = integer_matmul(least, least)
    assert got.dtype == np.int64
    assert got[0, 0] == 2**31
    assert integer_matmul(least[:, 1:], least[:, 1:]).dtype == np.int32


def test_known_sizes_spare_the_search(xp):
    rng = np.random.default_rng(1)
    qx, qw = (rng.integers(-7, 8, (4, 3000)).astype(np.int8) for _ in range(2))
    got = integer_matmul(xp.asarray(qx), xp.asarray(qw), sizes=(7, 7))
    np.testing.assert_array_equal(to_host(got), exact(qx, qw))


def test_what_cannot_be_exact_is_rejected(xp):
    codes = xp.asarray(np.ones((2, 3), dtype=np.int8))
    with pytest.raises(TypeError, match="qw is a matrix of integers, got float32"):
        integer_matmul(codes, xp.asarray(np.ones((2, 3), dtype=np.float32)))
    with pytest.raises(TypeError, match="qx is a matrix of integers"):
        integer_matmul(codes[0, :], codes)
    with pytest.raises(ValueError, match="rows of 3 and of 2 codes"):
        integer_matmul(codes, codes[:, :2])
    with pytest.raises(ValueError, match="float32 cannot hold it"):
        integer_matmul(xp.asarray(np.full((1, 1), 5000)), xp.asarray(np.full((1, 1), 5000)))
    with pytest.raises(ValueError, match="not negative"):
        exact_length(-1, 2)


# --- scaled products ----------------------------------------------------------------------


@pytest.mark.theorem(
    "Y = s_x s_w (Q_x Q_wᵀ − z_x Σq_w − z_w Σq_x + N z_x z_w) is the product of the "
    "dequantised matrices, for scales "
    "of tokens and channels, and group by group for scales of groups",
    source="Jacob et al. 2018, eq. 7",
)
@given(
    st.sampled_from(FORCED),
    st.sampled_from(FORCED),
    st.sampled_from(["token", "tensor"]),
    st.sampled_from([("channel", None), ("tensor", None), ("group", 4), ("group", 1)]),
    st.sampled_from(["normal", "outlier_column", "one_sided", "zero"]),
    st.sampled_from(["float32", "float64"]),
    seeds,
)
def test_factorised_product_is_the_dequantised_one(
    xp, x_rule, w_rule, x_steps, w_steps, kind, dtype, seed
):
    x = build(kind, (3, 8), seed, dtype)
    w = build("normal", (5, 8), seed, dtype)
    qx = quantize(xp.asarray(x), Scheme(8, x_rule, x_steps))
    qw = quantize(xp.asarray(w), Scheme(4, w_rule, *w_steps))
    y = to_host(scaled_matmul(qx.codes, qx.scale, qx.zero_point, qw.codes, qw.scale, qw.zero_point))
    assert y.dtype == dtype
    left, right = (to_host(q.dequantize()).astype(np.longdouble) for q in (qx, qw))
    # each group: one rounding of the integer, two of the scales, one of the sum; each
    # factor: one of s(q − z)
    bound = 16 * float(np.finfo(dtype).eps) * (np.abs(left) @ np.abs(right).T)
    assert (np.abs(y - left @ right.T) <= bound).all()


def test_missing_zero_points_are_zeros(xp):
    rng = np.random.default_rng(0)
    qx, qw = (
        quantize(xp.asarray(rng.standard_normal((3, 8))), Scheme(8, "restricted", "channel"))
        for _ in range(2)
    )
    with_zeros = scaled_matmul(qx.codes, qx.scale, qx.zero_point, qw.codes, qw.scale, qw.zero_point)
    for zx, zw in ((None, None), (qx.zero_point, None), (None, qw.zero_point)):
        got = scaled_matmul(qx.codes, qx.scale, zx, qw.codes, qw.scale, zw)
        np.testing.assert_array_equal(to_host(got), to_host(with_zeros))


def test_scales_that_do_not_factor_out_are_rejected(xp):
    codes = xp.asarray(np.ones((3, 8), dtype=np.int8))
    one = xp.asarray(np.ones(()))
    rows = xp.asarray(np.ones((3, 1)))
    with pytest.raises(ValueError, match=r"of activations is \[T, 1\] or \(\), got \(1, 8\)"):
        scaled_matmul(codes, xp.asarray(np.ones((1, 8))), None, codes, rows, None)
    for shape in ((3, 3), (2, 1), (8,)):
        with pytest.raises(ValueError, match="of a weight is"):
            scaled_matmul(codes, one, None, codes, xp.asarray(np.ones(shape)), None)
