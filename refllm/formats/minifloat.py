"""Small floating-point formats: FP16, BF16, FP8 (E4M3, E5M2), FP4 (E2M1) and the scale
E8M0, from float32's own bits.

A code is sign S, exponent field E and mantissa field M of m bits; with the bias B its value
is

    (−1)^S · 2^(E − B) · (1 + M/2^m)   if E > 0
    (−1)^S · 2^(1 − B) · M/2^m         if E = 0 (subnormal)

| format | bits | m  | B   | largest    | min normal | min    | ∞    | NaN        | error   |
|--------|------|----|-----|------------|------------|--------|------|------------|---------|
| fp16   | 16   | 10 | 15  | 65,504     | 2^−14      | 2^−24  | yes  | many codes | 1/2,049 |
| bf16   | 16   | 7  | 127 | 3.39·10^38 | 2^−126     | 2^−133 | yes  | many codes | 1/257   |
| e4m3   | 8    | 3  | 7   | 448        | 2^−6       | 2^−9   | none | 0x7F, 0xFF | 1/17    |
| e5m2   | 8    | 2  | 15  | 57,344     | 2^−14      | 2^−16  | yes  | 6 codes    | 1/9     |
| e2m1   | 4    | 1  | 1   | 6          | 1          | 1/2    | none | none       | 1/5     |
| e8m0   | 8    | 0  | 127 | 2^127      | 2^−127     | 2^−127 | none | 0xFF       | 1/3     |

The last column bounds |x̂ − x| / |x| of normal values.

E4M3 has the precision (an error of at most 1/17) and E5M2 the range (2^32 from largest to
smallest, where E4M3 has 2^18); descriptions sometimes confuse the two. E4M3 gives up
infinity, and all NaNs but one, for the values from 256 to 448. E8M0 has no sign, no mantissa
and no zero: it is a power of two, for scales.

Rounding is to the nearest value, of two that are equally near to the even code (E8M0: to
the larger one), once and directly from the input: by way of FP16 it would be rounded twice.
``overflow`` decides about infinity and values that exceed the largest one after rounding:
"saturate" gives the largest value (torch's casts to E4M3), "nan" infinity, or NaN where
there is none (ml_dtypes' casts), "raise" an error. E8M0 has no code for zero: zero is
treated as out of range below, and becomes the smallest value, an error or NaN; negative
values are NaN.

Sources: Micikevicius et al. 2022 (FP8 formats for deep learning), table 1; OCP Microscaling
Formats 1.0; IEEE 754.

Left out: E4M3 with infinities (IEEE style), the FNUZ forms, E2M3 and E3M2, stochastic
rounding, payloads of NaNs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache

from refllm.backend import Array, bitcast, namespace
from refllm.errors import InputError, alternatives
from refllm.formats.granularity import tile_elements

__all__ = [
    "FORMATS",
    "OVERFLOW",
    "Format",
    "dequantize",
    "float_format",
    "nearest",
    "quantize",
    "rounded",
    "table",
]

OVERFLOW = ("saturate", "nan", "raise")
_SIZE = 0x7FFFFFFF  # all bits but the sign
_INFINITY = 0x7F800000  # larger sizes are NaN


@dataclass(frozen=True)
class Format:
    """A small float format: ``largest`` is the code of its largest value, ``infinity`` and
    ``nan`` are codes or None.

    >>> FORMATS["e4m3"].max, FORMATS["e4m3"].smallest_normal == 2**-6
    (448.0, True)
    """

    name: str
    bits: int
    mantissa: int
    bias: int
    largest: int
    infinity: int | None
    nan: int | None

    @property
    def signed(self) -> bool:
        """Whether the top bit is a sign."""
        return self.mantissa > 0

    @property
    def code_dtype(self) -> str:
        """The integer type of codes."""
        return "uint16" if self.bits == 16 else "uint8"

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self.value(self.largest)

    @property
    def smallest_normal(self) -> float:
        """2^(1 − B); below it the spacing is constant."""
        lowest = 1 if self.signed else 0  # of the exponent fields of normal values
        return 2.0 ** (lowest - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest value above zero."""
        return self.smallest_normal / (1 << self.mantissa)

    @property
    def relative_error(self) -> float:
        """The bound of |x̂ − x| / |x| for normal x: half a spacing, reached half a spacing
        above a power of two.
        """
        return 1.0 / ((2 << self.mantissa) + 1)

    def value(self, code: int) -> float:
        """The value of a code, by the formula of the module; exact in a Python float."""
        sign = 1.0
        if self.signed and code >> (self.bits - 1):
            sign = -1.0
        size = code & ((1 << (self.bits - self.signed)) - 1)
        if size > self.largest:
            if size == self.infinity:
                return sign * float("inf")
            return float("nan")
        if not self.signed:
            return 2.0 ** (size - self.bias)
        exponent = size >> self.mantissa
        fraction = size & ((1 << self.mantissa) - 1)
        significand = (exponent > 0) + fraction / (1 << self.mantissa)
        return sign * 2.0 ** (max(exponent, 1) - self.bias) * significand


FORMATS = {
    f.name: f
    for f in (
        Format("fp16", 16, 10, 15, 0x7BFF, 0x7C00, 0x7E00),
        Format("bf16", 16, 7, 127, 0x7F7F, 0x7F80, 0x7FC0),
        Format("e4m3", 8, 3, 7, 0x7E, None, 0x7F),
        Format("e5m2", 8, 2, 15, 0x7B, 0x7C, 0x7E),
        Format("e2m1", 4, 1, 1, 0x7, None, None),
        Format("e8m0", 8, 0, 127, 0xFE, None, 0xFF),
    )
}


def float_format(name: str) -> Format:
    """The format of that name; ValueError lists the known ones."""
    if name not in FORMATS:
        raise InputError(f"unknown float format {name!r}; {alternatives(name, FORMATS)}")
    return FORMATS[name]


@cache
def table(fmt: str) -> tuple[float, ...]:
    """The value of each code of a format, 2^bits of them."""
    found = float_format(fmt)
    return tuple(found.value(code) for code in range(1 << found.bits))


# --- values to codes ----------------------------------------------------------------------


def quantize(x: Array, fmt: str, overflow: str = "saturate", *, name: str = "x") -> Array:
    """Codes of x (float16, float32 or float64), rounded to nearest even: uint8, or uint16
    for fp16 and bf16; shaped like x. NaN stays NaN, of the same sign.

    All of refllm that rounds to bfloat16 calls this; to float16 an array library can cast.

    Raises
    ------
    ValueError
        naming ``name`` and the value, for values out of range with ``overflow="raise"``, and
        always for values without any code: NaN in E2M1, and with ``overflow="nan"`` values
        out of E2M1's range.

    >>> import numpy as np
    >>> codes = quantize(np.array([1.0, -0.3, 1000.0]), "e4m3")
    >>> [hex(code) for code in codes], dequantize(codes, "e4m3").tolist()
    (['0x38', '0xaa', '0x7e'], [1.0, -0.3125, 448.0])
    """
    xp = namespace(x)
    found = float_format(fmt)
    if overflow not in OVERFLOW:
        raise InputError(
            f"quantize: unknown overflow {overflow!r}; choose one of {', '.join(OVERFLOW)}"
        )
    flat = xp.ascontiguousarray(xp.reshape(_as_float32(x, name), (-1,)))
    if overflow == "raise" or found.nan is None:
        _reject(flat, found, name, out_of_range=overflow != "saturate")
    out = xp.empty(flat.shape, dtype=getattr(xp, found.code_dtype))
    codes_of = _codes if found.signed else _exponents
    step = tile_elements(flat) >> 1  # the intermediate arrays of a tile stay in cache
    for i in range(0, int(flat.size), step):
        bits = bitcast(flat[i : i + step], xp.int32)
        out[i : i + step] = xp.astype(codes_of(bits, found, overflow), out.dtype)
    return xp.reshape(out, x.shape)


def _codes(bits: Array, fmt: Format, overflow: str) -> Array:
    """Bits of float32 values, int32 [n] → codes, int32 [n]."""
    xp = namespace(bits)
    size = bits & _SIZE  # |x|
    drop = 23 - fmt.mantissa  # bits of the mantissa that are dropped
    # Half a unit of the last place that is kept, less one if that place is even: adding it
    # carries where rounding is up, into the exponent too. 127 − B is the difference of the
    # two biases.
    code = (size >> drop) & 1
    code += size
    code += (1 << (drop - 1)) - 1 - ((127 - fmt.bias) << 23)
    code >>= drop
    if fmt.bias != 127:
        # Below the smallest normal value the spacing is constant, and equals that of float32
        # at 2^23 times the smallest value: adding that leaves |x|, rounded to nearest even,
        # in the last bits. ``code`` is never larger there.
        base = fmt.smallest * 2.0**23
        small = bitcast(xp.minimum(size, _bits(fmt.smallest_normal)), xp.float32) + base
        xp.maximum(code, bitcast(small, xp.int32) - _bits(base), out=code)
    if overflow == "saturate" or fmt.nan is None:
        code = xp.minimum(code, fmt.largest)
    else:
        beyond = fmt.nan if fmt.infinity is None else fmt.infinity
        code = xp.where(code > fmt.largest, beyond, code)
    if fmt.nan is not None:
        code = xp.where(size > _INFINITY, fmt.nan, code)
    return code | ((bits >> 31) & (1 << (fmt.bits - 1)))


def _exponents(bits: Array, fmt: Format, overflow: str) -> Array:
    """Bits of float32 values → codes of E8M0: the exponent field, plus one from 1.5 times
    its power of two on.
    """
    xp = namespace(bits)
    size = bits & _SIZE
    # 2^−127 is subnormal in float32, 0x400000 units of 2^−149: code 0 reaches to 1.5 times
    # that
    code = xp.where(size < 0x600000, 0, (size + 0x400000) >> 23)
    if overflow == "saturate":
        code = xp.minimum(code, fmt.largest)
    else:
        code = xp.where((size == 0) | (code > fmt.largest), fmt.nan, code)
    return xp.where((size > _INFINITY) | ((bits < 0) & (size > 0)), fmt.nan, code)


def _bits(value: float) -> int:
    """The bits of a float32, as a Python integer."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def _as_float32(x: Array, name: str) -> Array:
    """x as float32; float64 is rounded to odd, so that the second rounding gives the same
    result as a single one.
    """
    xp = namespace(x)
    if x.dtype in (xp.float32, xp.float16):
        return xp.astype(x, xp.float32, copy=False)
    if x.dtype != xp.float64:
        raise TypeError(f"{name}: quantize takes float16, float32 or float64, got {x.dtype}")
    flat = xp.reshape(x, (-1,))
    largest = float(xp.finfo(xp.float32).max)
    near = xp.astype(xp.where(xp.isinf(flat), flat, xp.clip(flat, -largest, largest)), xp.float32)
    back = xp.astype(near, xp.float64)
    # Truncated towards zero, with the last bit set if anything was lost (Boldo & Melquiond
    # 2008): this cannot create a tie. NaN stays NaN with any last bit.
    bits = bitcast(near, xp.int32) - xp.astype(xp.abs(back) > xp.abs(flat), xp.int32)
    cut = back != flat
    return xp.reshape(bitcast(bits | xp.astype(cut, xp.int32), xp.float32), x.shape)


def _reject(flat: Array, fmt: Format, name: str, *, out_of_range: bool) -> None:
    """ValueError for a value without a code: NaN where the format has none, and with
    ``out_of_range`` values beyond the largest.
    """
    xp = namespace(flat)
    wrong = xp.isnan(flat) & (fmt.nan is None)
    if out_of_range:
        # The tie above the largest value is rounded up from an odd code, and in E8M0 always;
        # from an even code it is not.
        limit = 1.5 * fmt.max - 0.5 * (fmt.value(fmt.largest - 1) if fmt.signed else 0.0)
        size = xp.abs(flat)
        tie_is_up = fmt.largest % 2 == 1 or not fmt.signed
        wrong = wrong | (size > limit) | ((size == limit) & tie_is_up)
        if not fmt.signed:
            wrong = wrong | (flat <= 0)
    if bool(xp.any(wrong)):
        at = int(xp.argmax(wrong))
        low = -fmt.max if fmt.signed else fmt.smallest
        raise InputError(
            f"{name}: element {at} is {float(flat[at]):g}, which {fmt.name} has no code for: it "
            f"reaches from {low:g} to {fmt.max:g}"
        )


def rounded(x: Array, fmt: str) -> Array:
    """``dequantize(quantize(x))`` of finite float32 values, saturating, without making the
    codes: a third of the time.

    The same two roundings as in ``_codes``, on the bits in place; for simulating a format
    in float32.
    """
    xp = namespace(x)
    found = float_format(fmt)
    if not found.signed or x.dtype != xp.float32:
        raise TypeError(f"rounded: float32 values in a format with a sign, got {x.dtype} and {fmt}")
    flat = xp.ascontiguousarray(xp.reshape(x, (-1,)))
    out = xp.empty(flat.shape, dtype=xp.float32)
    step = tile_elements(flat) >> 1
    drop = 23 - found.mantissa
    # the float32 spacing there is the smallest value; 1.5, so that −|x| stays in the binade
    base = 1.5 * found.smallest * 2.0**23
    for i in range(0, int(flat.size), step):
        tile = xp.clip(flat[i : i + step], -found.max, found.max)
        bits = bitcast(tile, xp.int32)
        carried = (bits >> drop) & 1
        carried += bits
        carried += (1 << (drop - 1)) - 1
        carried &= -1 << drop
        normal = bitcast(carried, xp.float32)
        if found.bias != 127:
            small = tile + base
            small -= base
            xp.copysign(small, tile, out=small)  # −0 is kept
            normal = xp.where(xp.abs(tile) < found.smallest_normal, small, normal)
        out[i : i + step] = normal
    return xp.reshape(out, x.shape)


def nearest(x: Array, fmt: str) -> Array:
    """The naive twin of ``quantize``: finite x[n] is compared with every finite code; codes,
    int64 [n].

    Differences are exact in float64 wherever they decide. 2^bits comparisons per element:
    for tests and for reading.
    """
    xp = namespace(x)
    found = float_format(fmt)
    # even codes first, so that argmin takes them of two that are equally near; in E8M0 the
    # larger ones
    order = sorted(range(1 << found.bits), key=lambda c: c % 2 if found.signed else -c)
    finite = [c for c in order if abs(found.value(c)) <= found.max]
    values = xp.asarray([found.value(c) for c in finite], dtype=xp.float64)
    x = xp.astype(x, xp.float64)
    best = xp.take(xp.asarray(finite), xp.argmin(xp.abs(x[:, None] - values[None, :]), axis=1))
    if not found.signed:
        return best
    size = (1 << (found.bits - 1)) - 1  # ±0 are equally near: take x's sign
    return xp.where(xp.signbit(x), (best & size) | (size + 1), best & size)


# --- codes to values ----------------------------------------------------------------------


def dequantize(codes: Array, fmt: str) -> Array:
    """Codes, uint8 or uint16 → float32, exactly; shaped like the codes: ``table(fmt)[code]``
    for each.

    Raises
    ------
    TypeError
        if the codes are of another type.
    ValueError
        if a code of E2M1 is above 15.
    """
    xp = namespace(codes)
    found = float_format(fmt)
    if codes.dtype != getattr(xp, found.code_dtype):
        raise TypeError(f"dequantize: codes of {fmt} are {found.code_dtype}, got {codes.dtype}")
    if fmt == "bf16":  # the upper half of a float32
        return bitcast(xp.astype(codes, xp.uint32) << 16, xp.float32)
    if fmt == "fp16":
        return xp.astype(bitcast(codes, xp.float16), xp.float32)
    if found.bits < 8 and codes.size and int(xp.max(codes)) >> found.bits:
        raise InputError(
            f"dequantize: codes of {fmt} are 0 to {(1 << found.bits) - 1}, got {int(xp.max(codes))}"
        )
    return xp.take(xp.asarray(table(fmt), dtype=xp.float32), codes)
