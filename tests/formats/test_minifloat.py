"""Small float formats: value tables, the nearest value by brute force, and where the
other libraries differ.
"""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.formats import minifloat
from refllm.formats.minifloat import (
    FORMATS,
    OVERFLOW,
    dequantize,
    float_format,
    nearest,
    quantize,
    table,
)
from strategies import arrays, seeds

ML_DTYPES = {
    **{
        "fp16": np.float16,
        "bf16": ml_dtypes.bfloat16,
        "e4m3": ml_dtypes.float8_e4m3fn,
        "e5m2": ml_dtypes.float8_e5m2,
    },
    **{"e2m1": ml_dtypes.float4_e2m1fn, "e8m0": ml_dtypes.float8_e8m0fnu},
}
SMALL = ("e4m3", "e5m2", "e2m1", "e8m0")
SIGNED = tuple(name for name in FORMATS if name != "e8m0")
TORCH = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "bf16": "bfloat16", "fp16": "float16"}
formats = st.sampled_from(list(FORMATS))


def all_codes(fmt):
    return np.arange(
        1 << FORMATS[fmt].bits, dtype=np.uint16 if FORMATS[fmt].bits == 16 else np.uint8
    )


def same(a, b):
    """Equal as values, the sign of zero included, NaN to NaN."""
    np.testing.assert_array_equal(a, b)
    finite = ~np.isnan(a)
    np.testing.assert_array_equal(np.signbit(a[finite]), np.signbit(b[finite]))


def every_rounding(fmt):
    """float32 values among which is each case that rounding to at most 5 bits of mantissa
    can tell apart.

    Rounding looks at the upper 16 bits of a float32, and at whether any of the lower 16 is
    set.
    """
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    x = np.concatenate([upper, upper | 1, upper | 0xFFFF]).view(np.float32)
    return x[~np.isnan(x)] if fmt == "e2m1" else x


def numbers(fmt, rng, count=400):
    """float32 values of all sizes that a format has, its values, the midpoints between
    them, and their neighbours.
    """
    found = FORMATS[fmt]
    low = math.log2(found.smallest) - 2
    high = min(math.log2(found.max) + 1, 127.9)
    spread = 2.0 ** rng.uniform(low, high, count)
    values = np.array(table(fmt)[: found.largest + 1])
    picked = rng.choice(len(values) - 1, min(count, len(values) - 1), replace=False)
    middles = (0.5 * (values[picked] + values[picked + 1])).astype(np.float32)
    near = [np.nextafter(middles, np.float32(side)) for side in (0, np.inf)]
    x = np.concatenate(
        [spread.astype(np.float32), values[picked].astype(np.float32), middles, *near]
    )
    return x * rng.choice([-1, 1], x.size).astype(np.float32) if found.signed else x


# --- tables -------------------------------------------------------------------------------


@pytest.mark.theorem(
    "every code dequantises to the value that ml_dtypes (float16: NumPy) gives it",
    source="OCP 8-bit and MX formats; ml_dtypes",
)
@pytest.mark.parametrize("fmt", FORMATS)
def test_decode_tables(xp, fmt):
    codes = all_codes(fmt)
    expected = codes.view(ML_DTYPES[fmt]).astype(np.float32)
    same(to_host(dequantize(xp.asarray(codes), fmt)), expected)
    same(np.array(table(fmt), dtype=np.float32), expected)


def test_the_table_of_the_docstring():
    shown = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:8]]
        for line in minifloat.__doc__.splitlines()
        if line.count("|") > 9
    }
    for name, fmt in FORMATS.items():
        bits, mantissa, bias, largest, normal, smallest = shown[name]
        assert (int(bits), int(mantissa), int(bias)) == (fmt.bits, fmt.mantissa, fmt.bias)
        if "10^" not in largest:
            assert eval(largest.replace(",", "").replace("^", "**")) == fmt.max
        assert fmt.smallest_normal == eval(normal.replace("^", "**").replace("−", "-"))
        assert fmt.smallest == eval(smallest.replace("^", "**").replace("−", "-"))
        assert f"1/{1 / fmt.relative_error:,.0f}" in minifloat.__doc__
    assert f"{FORMATS['bf16'].max:.2e}" == "3.39e+38"
    finite = {n: sum(math.isfinite(v) for v in table(n)) for n in SMALL}
    assert finite == {"e4m3": 254, "e5m2": 248, "e2m1": 16, "e8m0": 255}


@pytest.mark.theorem(
    "E4M3 has the precision and E5M2 the range: half the relative error, against 2^14 times "
    "the range from the "
    "smallest to the largest value",
    source="Micikevicius et al. 2022, table 1 (some surveys have the two the wrong way round)",
)
def test_which_of_the_two_has_the_range():
    e4m3 = FORMATS["e4m3"]
    e5m2 = FORMATS["e5m2"]
    assert e4m3.relative_error == 1 / 17
    assert e5m2.relative_error == 1 / 9
    assert math.floor(math.log2(e4m3.max / e4m3.smallest)) == 17
    assert math.floor(math.log2(e5m2.max / e5m2.smallest)) == 31
    assert (e4m3.max, e5m2.max) == (448, 57344)


# --- rounding -----------------------------------------------------------------------------


@pytest.mark.theorem(
    "quantize(dequantize(c)) = c for every code that is not NaN, infinities with overflow='nan'",
    source="OCP 8-bit and MX formats; ml_dtypes",
)
@pytest.mark.parametrize("fmt", FORMATS)
def test_round_trip_of_codes(xp, fmt):
    codes = all_codes(fmt)
    values = np.array(table(fmt))
    finite = np.isfinite(values)
    for overflow in OVERFLOW:
        got = to_host(quantize(dequantize(xp.asarray(codes[finite]), fmt), fmt, overflow))
        np.testing.assert_array_equal(got, codes[finite])
    infinite = codes[np.isinf(values)]
    if infinite.size:
        np.testing.assert_array_equal(
            to_host(quantize(dequantize(xp.asarray(infinite), fmt), fmt, "nan")), infinite
        )
    nan = codes[np.isnan(values)]
    if nan.size:
        assert np.isnan(
            to_host(dequantize(quantize(dequantize(xp.asarray(nan), fmt), fmt), fmt))
        ).all()


@pytest.mark.theorem(
    "encode gives the nearest of all codes, of two equally near the even one (E8M0: the "
    "larger), and no other",
    source="IEEE 754, roundTiesToEven; brute force over all codes",
)
@given(st.sampled_from(SMALL), seeds)
def test_nearest_by_brute_force(xp, fmt, seed):
    x = numbers(fmt, np.random.default_rng(seed), 100)
    got = to_host(quantize(xp.asarray(x), fmt))
    naive = nearest(x, fmt)
    np.testing.assert_array_equal(got, naive)
    np.testing.assert_array_equal(to_host(nearest(xp.asarray(x[:20]), fmt)), naive[:20])


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_nearest_of_16_bits(xp, fmt):
    x = numbers(fmt, np.random.default_rng(0), 8)
    np.testing.assert_array_equal(to_host(quantize(xp.asarray(x), fmt)), nearest(x, fmt))


@pytest.mark.theorem(
    "the naive search itself: no representable value is nearer, and ties are even",
    source="exact fractions",
)
@pytest.mark.parametrize("fmt", SMALL)
def test_nearest_in_exact_fractions(fmt):
    x = numbers(fmt, np.random.default_rng(0), 40)
    values = [Fraction(v) if math.isfinite(v) else None for v in table(fmt)]
    for number, code in zip(x.tolist(), nearest(x, fmt).tolist(), strict=True):
        distances = [abs(Fraction(number) - v) if v is not None else None for v in values]
        least = min(d for d in distances if d is not None)
        assert distances[code] == least
        equal = {values[c] for c, d in enumerate(distances) if d == least}
        if len(equal) > 1:
            assert code % 2 == 0 if fmt != "e8m0" else values[code] == max(equal)


@pytest.mark.theorem(
    "an E4M3, E5M2 or E2M1 code is decided by the upper 16 bits of a float32 and whether a "
    "lower one is set, and for "
    "each of these 131,072 cases it is that of ml_dtypes, signed zeros, subnormals, "
    "infinities and NaN included",
    source="enumeration; ml_dtypes",
)
@pytest.mark.parametrize("fmt", SMALL)
def test_every_rounding(xp, fmt):
    x = every_rounding(fmt)
    with np.errstate(all="ignore"):
        expected = x.astype(ML_DTYPES[fmt]).view(np.uint8)
    # ml_dtypes saturates E2M1, which has nothing else
    overflow = "saturate" if fmt == "e2m1" else "nan"
    got = to_host(quantize(xp.asarray(x), fmt, overflow))
    number = ~np.isnan(x)
    if fmt == "e8m0":  # between 2^−127 and 1.5 times that ml_dtypes goes up, away from the nearest
        quirk = (x > 2.0**-127) & (x < 1.5 * 2.0**-127)
        assert (expected[quirk] == 1).all()
        assert (got[quirk] == 0).all()
        number &= ~quirk
    np.testing.assert_array_equal(got[number], expected[number])
    number = ~np.isnan(x)
    assert np.isnan(to_host(dequantize(xp.asarray(got[~number]), fmt))).all()
    if fmt != "e8m0":
        np.testing.assert_array_equal(got[~number] >> 7, np.signbit(x[~number]))


@pytest.mark.parametrize("fmt", SMALL)
def test_that_is_every_case(fmt):
    """Which of the lower 16 bits are set makes no difference."""
    rng = np.random.default_rng(0)
    upper = rng.integers(0, 1 << 16, 20_000)
    lower = rng.integers(1, 1 << 16, 20_000)
    x, one = ((upper << 16 | low).astype(np.uint32).view(np.float32) for low in (lower, 1))
    keep = ~np.isnan(one)
    np.testing.assert_array_equal(quantize(x[keep], fmt), quantize(one[keep], fmt))


@pytest.mark.theorem(
    "16-bit codes equal NumPy's float16 and ml_dtypes' bfloat16", source="NumPy, ml_dtypes"
)
@given(st.sampled_from(["fp16", "bf16"]), seeds)
def test_16_bits_against_ml_dtypes(xp, fmt, seed):
    rng = np.random.default_rng(seed)
    x = np.concatenate(
        [rng.integers(0, 1 << 32, 3000, dtype=np.uint32).view(np.float32), numbers(fmt, rng)]
    )
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(ML_DTYPES[fmt])
    same(to_host(dequantize(quantize(xp.asarray(x), fmt, "nan"), fmt)), expected.astype(np.float32))


@pytest.mark.theorem("x ≤ y implies x̂ ≤ ŷ", source="rounding is monotone")
@given(formats, arrays(200), st.sampled_from([1.0, 1e-3, 300.0, 1e4]))
def test_monotone(xp, fmt, x, size):
    x = np.sort(np.clip(x, -1e30, 1e30) * np.float32(size))
    if fmt == "e8m0":
        x = np.abs(x)
        x.sort()
    back = to_host(dequantize(quantize(xp.asarray(x), fmt), fmt))
    assert (np.diff(back) >= 0).all()


@pytest.mark.theorem(
    "|x̂ − x| ≤ max(|x| / (2^(m+1) + 1), smallest/2) within the range, and both bounds are attained",
    source="Higham 2002, §2.1",
)
@given(formats, seeds)
def test_error_bound(xp, fmt, seed):
    found = FORMATS[fmt]
    x = numbers(fmt, np.random.default_rng(seed))
    x = x[np.abs(x) <= found.max]
    if fmt == "e8m0":
        x = x[x >= found.smallest]  # there is no zero to round to
    error = np.abs(to_host(dequantize(quantize(xp.asarray(x), fmt), fmt)).astype(np.float64) - x)
    bound = np.maximum(found.relative_error * np.abs(x.astype(np.float64)), 0.5 * found.smallest)
    assert (error <= bound).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_error_bound_is_attained(fmt):
    found = FORMATS[fmt]
    tie = np.float32(1 + 1 / (2 << found.mantissa))
    back = float(dequantize(quantize(tie[None], fmt), fmt)[0])
    assert abs(back - tie) / tie == pytest.approx(
        found.relative_error if fmt != "e8m0" else 1 / 3, rel=1e-12
    )
    if found.signed:
        half = np.float32(found.smallest / 2)
        assert dequantize(quantize(half[None], fmt), fmt)[0] == 0


@pytest.mark.theorem(
    "rounding commutes with powers of two as long as x and 2^k x are in the normal range",
    source="a power of two moves the exponent only",
)
@given(formats, seeds, st.integers(-12, 12))
def test_power_of_two_equivariance(xp, fmt, seed, k):
    found = FORMATS[fmt]
    x = numbers(fmt, np.random.default_rng(seed))
    with np.errstate(over="ignore"):
        y = x * np.float32(2.0**k)
    # normal before and after rounding: what rounds beyond the largest value saturates
    least = max(found.smallest_normal, 2.0**-126)
    limit = found.max / (1 if found.signed else 2)
    keep = (np.abs(x) >= least) & (np.abs(x) <= limit) & (np.abs(y) >= least) & (np.abs(y) <= limit)
    a, b = (to_host(dequantize(quantize(xp.asarray(v[keep]), fmt), fmt)) for v in (x, y))
    np.testing.assert_array_equal(a * np.float32(2.0**k), b)


def test_subnormals_are_where_equivariance_ends():
    x = np.array([2.0**-6 * 1.125], dtype=np.float32)  # normal in E4M3, the half of it is not
    whole, half = (dequantize(quantize(v, "e4m3"), "e4m3") for v in (x, x / 2))
    assert whole[0] == x[0]
    assert half[0] != x[0] / 2


@pytest.mark.theorem(
    "rounding is idempotent and odd: x̂ rounds to itself, and −x to −x̂",
    source="refllm.formats.minifloat",
)
@given(st.sampled_from(SIGNED), arrays(64))
def test_idempotent_and_odd(xp, fmt, x):
    once = dequantize(quantize(xp.asarray(x), fmt), fmt)
    same(to_host(dequantize(quantize(once, fmt), fmt)), to_host(once))
    same(to_host(dequantize(quantize(xp.asarray(-x), fmt), fmt)), -to_host(once))


@pytest.mark.theorem(
    "float64 is rounded once: its codes are the nearest, where rounding to float32 first "
    "gives others",
    source="Boldo & Melquiond 2008 (rounding to odd)",
)
@given(st.sampled_from(["e4m3", "e5m2", "e2m1"]), seeds)
def test_float64_is_rounded_once(xp, fmt, seed):
    rng = np.random.default_rng(seed)
    middles = numbers(fmt, rng, 12).astype(np.float64)
    x = np.concatenate([middles, *(np.nextafter(middles, side) for side in (-np.inf, np.inf))])
    np.testing.assert_array_equal(to_host(quantize(xp.asarray(x), fmt)), nearest(x, fmt))
    tie = np.array([17.0, np.nextafter(17.0, 18.0)])  # between 16 and 18 in E4M3
    assert to_host(dequantize(quantize(xp.asarray(tie), "e4m3"), "e4m3")).tolist() == [16, 18]
    assert dequantize(quantize(tie.astype(np.float32), "e4m3"), "e4m3").tolist() == [16, 16]
    half = rng.standard_normal(500) * 2.0 ** rng.integers(-26, 14, 500)
    np.testing.assert_array_equal(
        to_host(quantize(xp.asarray(half), "fp16")), half.astype(np.float16).view(np.uint16)
    )


def test_float64_is_rounded_once_to_bfloat16(xp):
    """Just above a tie, which float32 would make a tie; normal values, the smallest ones,
    and a cast that carries into infinity.
    """
    cases = [
        (1 + 2.0**-8, 0x3F80),  # the tie: even
        (1 + 2.0**-8 + 2.0**-40, 0x3F81),
        (1 + 3 * 2.0**-8 - 2.0**-40, 0x3F81),
        (2.5 * 2.0**-133, 0x0002),
        (2.5 * 2.0**-133 * (1 + 2.0**-40), 0x0003),
        (0.5 * 2.0**-133, 0x0000),
        (0.5 * 2.0**-133 * (1 + 2.0**-40), 0x0001),
        (5e-324, 0x0000),
        (2.0**128 * (1 - 2.0**-9) * (1 - 2.0**-50), 0x7F7F),
        (2.0**128 * (1 - 2.0**-9), 0x7F80),
        (1e300, 0x7F80),
        (np.inf, 0x7F80),
    ]
    x = np.array([value for value, _ in cases])
    codes = np.array([code for _, code in cases], dtype=np.uint16)
    for sign, bit in ((1.0, 0), (-1.0, 0x8000)):
        got = to_host(quantize(xp.asarray(sign * x), "bf16", "nan"))
        np.testing.assert_array_equal(got, codes | bit)


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "e4m3", "e5m2"])
def test_nan_beside_infinity_in_every_dtype(xp, fmt):
    for dtype in (np.float16, np.float32, np.float64):
        x = np.array([np.inf, np.nan, -np.inf, -np.nan, 1.0], dtype=dtype)
        for overflow, beyond in (("saturate", FORMATS[fmt].max), ("nan", np.inf)):
            if fmt == "e4m3" and overflow == "nan":
                beyond = np.nan
            back = to_host(dequantize(quantize(xp.asarray(x), fmt, overflow), fmt))
            np.testing.assert_array_equal(back, [beyond, np.nan, -beyond, np.nan, 1.0])


def test_by_way_of_float16_is_another_rounding():
    """Double rounding: a value just above a tie is rounded onto it first, and then to the
    even side.
    """
    x = np.array([17.0 + 2.0**-12], dtype=np.float32)
    assert dequantize(quantize(x, "e4m3"), "e4m3")[0] == 18
    assert dequantize(quantize(dequantize(quantize(x, "fp16"), "fp16"), "e4m3"), "e4m3")[0] == 16
    rng = np.random.default_rng(0)
    many = rng.standard_normal(500_000).astype(np.float32)
    apart = quantize(many, "e4m3") != quantize(many.astype(np.float16), "e4m3")
    assert 0 < apart.mean() < 0.01


def test_float16_input_is_widened(xp):
    x = np.array([1.0, -0.3, 60000.0, 6e-8, -0.0], dtype=np.float16)
    for fmt in SIGNED:
        expected = quantize(x.astype(np.float32), fmt)
        np.testing.assert_array_equal(to_host(quantize(xp.asarray(x), fmt)), expected)


# --- beyond the range ---------------------------------------------------------------------


def test_overflow(xp):
    x = np.array(
        [
            448,
            464,
            np.nextafter(np.float32(464), np.float32(500)),
            -480,
            np.inf,
            -np.inf,
            np.nan,
            -0.0,
        ]
    )
    x = x.astype(np.float32)
    got = {
        mode: to_host(quantize(xp.asarray(x), "e4m3", mode)).tolist()
        for mode in ("saturate", "nan")
    }
    assert got["saturate"] == [0x7E, 0x7E, 0x7E, 0xFE, 0x7E, 0xFE, 0x7F, 0x80]
    assert got["nan"] == [0x7E, 0x7E, 0x7F, 0xFF, 0x7F, 0xFF, 0x7F, 0x80]
    big = np.array(
        [57344, np.nextafter(np.float32(61440), np.float32(0)), 61440, -np.inf], dtype=np.float32
    )
    assert to_host(quantize(xp.asarray(big), "e5m2", "nan")).tolist() == [0x7B, 0x7B, 0x7C, 0xFC]
    assert to_host(quantize(xp.asarray(big), "e5m2")).tolist() == [0x7B, 0x7B, 0x7B, 0xFB]


@pytest.mark.oracle
@pytest.mark.parametrize("fmt", TORCH)
def test_torch_within_and_beyond_the_range(fmt):
    """torch rounds as ml_dtypes does; beyond 448 torch saturates E4M3, and ml_dtypes makes
    NaN of it.
    """
    torch = oracle("torch")
    x = np.concatenate(
        [
            every_rounding("e4m3"),
            np.random.default_rng(0).standard_normal(10_000).astype(np.float32),
        ]
    )
    x = x[~np.isnan(x)]
    theirs = torch.from_numpy(x).to(getattr(torch, TORCH[fmt])).to(torch.float32).numpy()
    same(dequantize(quantize(x, fmt, "saturate" if fmt == "e4m3" else "nan"), fmt), theirs)
    beyond = np.array([480.0, 1e6, np.inf], dtype=np.float32)
    assert (
        torch.from_numpy(beyond).to(torch.float8_e4m3fn).to(torch.float32).tolist() == [448.0] * 3
    )
    assert np.isnan(beyond.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)).all()
    # which is why everybody clips before the cast: then all agree
    clipped = np.clip(beyond, -448, 448)
    assert dequantize(quantize(clipped, "e4m3", "nan"), "e4m3").tolist() == [448.0] * 3


def test_e8m0_has_no_zero(xp):
    x = np.array(
        [0.0, -0.0, -1.0, 1e-45, 2.0**-127, 1.5 * 2.0**-127, 3.0, 1.5 * 2.0**127, np.inf, np.nan]
    )
    x = x.astype(np.float32)
    assert to_host(quantize(xp.asarray(x), "e8m0")).tolist() == [
        0,
        0,
        255,
        0,
        0,
        1,
        129,
        254,
        254,
        255,
    ]
    assert to_host(quantize(xp.asarray(x), "e8m0", "nan")).tolist() == [
        255,
        255,
        255,
        0,
        0,
        1,
        129,
        255,
        255,
        255,
    ]


@pytest.mark.parametrize(
    ("fmt", "number"),
    [
        ("e4m3", 464.1),
        ("e5m2", 61440.0),
        ("e2m1", 7.0),
        ("e2m1", math.nan),
        ("fp16", 65520.0),
        ("bf16", 3.4e38),
        ("e8m0", 0.0),
        ("e8m0", -1.0),
        ("e8m0", 2.9e38),
        ("e8m0", 1.5 * 2.0**127),
        ("e4m3", -math.inf),
    ],
)
def test_raise_names_the_value(xp, fmt, number):
    x = xp.asarray(np.array([1.0, number, 1.0], dtype=np.float32))
    with pytest.raises(ValueError, match=f"w: element 1 is .*, which {fmt} has no code for"):
        quantize(x, fmt, "raise", name="w")


@pytest.mark.parametrize(
    ("fmt", "number"),
    [
        ("e4m3", 464.0),
        ("e4m3", -464.0),
        ("e5m2", 61439.0),
        ("e2m1", 6.9),
        ("fp16", 65519.0),
        ("bf16", 3.396e38),
        ("e8m0", 2.55e38),
        ("e8m0", 1e-45),
        ("e8m0", math.nan),
        ("e4m3", math.nan),
    ],
)
def test_raise_lets_the_rest_through(xp, fmt, number):
    x = xp.asarray(np.array([number], dtype=np.float32))
    same(
        to_host(dequantize(quantize(x, fmt, "raise"), fmt)),
        to_host(dequantize(quantize(x, fmt), fmt)),
    )


def test_raise_names_the_first_of_several(xp):
    x = np.ones(9, dtype=np.float32)
    x[[5, 3, 8]] = [1e9, -1e9, np.inf]
    with pytest.raises(ValueError, match="element 3 is -1e\\+09, .* from -448 to 448"):
        quantize(xp.asarray(x), "e4m3", "raise")
    with pytest.raises(ValueError, match="element 3 is -1e\\+09, .* from 5.87747e-39 to"):
        quantize(xp.asarray(x), "e8m0", "raise")


def test_what_has_no_code_is_rejected(xp):
    one = xp.asarray(np.array([1.0, np.nan], dtype=np.float32))
    with pytest.raises(
        ValueError, match="element 1 is nan, which e2m1 has no code for: it reaches from -6 to 6"
    ):
        quantize(one, "e2m1")
    with pytest.raises(ValueError, match="element 0 is inf"):
        quantize(xp.asarray(np.array([np.inf], dtype=np.float32)), "e2m1", "nan")
    with pytest.raises(ValueError, match="choose one of fp16, bf16, e4m3"):
        float_format("e3m4")
    with pytest.raises(ValueError, match="choose one of saturate, nan, raise"):
        quantize(one, "e4m3", "wrap")
    with pytest.raises(TypeError, match="takes float16, float32 or float64, got int32"):
        quantize(xp.asarray(np.array([1], dtype=np.int32)), "e4m3")
    with pytest.raises(TypeError, match="codes of e4m3 are uint8, got uint16"):
        dequantize(xp.asarray(np.array([1], dtype=np.uint16)), "e4m3")
    with pytest.raises(ValueError, match="codes of e2m1 are 0 to 15, got 16"):
        dequantize(xp.asarray(np.array([16], dtype=np.uint8)), "e2m1")


@given(formats, st.sampled_from([(), (0,), (3, 0), (2, 3), (2, 1, 5)]))
def test_shapes(xp, fmt, shape):
    x = xp.asarray(np.ones(shape, dtype=np.float32))
    codes = quantize(x, fmt)
    assert tuple(codes.shape) == tuple(dequantize(codes, fmt).shape) == shape
    assert (to_host(dequantize(codes, fmt)) == 1).all()


def test_pieces_join(xp, monkeypatch):
    monkeypatch.setattr(minifloat, "tile_elements", lambda like: 64)
    x = np.random.default_rng(0).standard_normal((7, 30)).astype(np.float32)
    for fmt in SIGNED:
        whole = (
            np.array([nearest(x.reshape(-1), fmt)])
            if fmt in SMALL
            else x.astype(ML_DTYPES[fmt]).view(np.uint16)
        )
        np.testing.assert_array_equal(
            to_host(quantize(xp.asarray(x).T, fmt)), whole.reshape(7, 30).T
        )
