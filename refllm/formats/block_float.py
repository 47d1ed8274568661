"""Small floats in blocks that share a scale: FP8 by tensor, row, tile or block, MXFP8,
MXFP4 and NVFP4.

A block of numbers with a = max |x| is stored as codes of x/s and comes back as x̂ = s ·
decode(code). What s is:

| scale     | s                                       | stored as                    | who                             |
|-----------|-----------------------------------------|------------------------------|---------------------------------|
| "float32" | a / largest                             | float32                      | FP8 by tensor, row; DeepSeek-V3 |
| "ue8m0"   | 2^⌈log2(a / largest)⌉                   | E8M0, a byte                 | DeepSeek-V3.1: never saturates  |
| "mx"      | 2^(⌊log2 a⌋ − e), e = ⌊log2 largest⌋    | E8M0, a byte                 | OCP MXFP8, MXFP4: may saturate  |
| "nvfp4"   | e4m3(G · a / 6) / G, G = 2688 / max a   | E4M3, a byte; G float32      | NVFP4                           |

With a power of two as the scale, s · q needs no rounding; it costs up to one bit of the
range. A block of zeros has no scale of its own: it gets 1 (the smallest there is, for E8M0
of "mx"), where the published kernel of DeepSeek-V3 divides 0 by 0. So does a block so small
that its scale would not be a normal float32 number: it gets 2^−126.

What shares a scale is said by the granularity of a ``Scheme`` (its rule and zero point play
no part): a tensor, a row ("channel", "token"), g neighbours of a row ("group"), or bo × bi
neighbours ("block", ragged at the edges).

| symbol | name                                       | shape                                    |
|--------|--------------------------------------------|------------------------------------------|
| x      | activations or weight                      | [T, N], [M, N]                           |
| codes  | of x/s, uint8                              | as x                                     |
| s      | scale, float32                             | (), [M, 1], [M, N/g], [⌈M/bo⌉, ⌈N/bi⌉]   |

Sources: DeepSeek-V3 (2024), §3.3; OCP Microscaling Formats 1.0, §6.3; NVIDIA's NVFP4.

Left out: MXFP6, MXINT8, compressed-tensors' rounding of MX scales, codebooks; products
(``fp8``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from refllm.backend import Array, bitcast, namespace
from refllm.formats.minifloat import encode, float_format, rounded
from refllm.formats.packing import pack, unpack
from refllm.formats.uniform import (
    PIECE,
    Scheme,
    as_blocks,
    expand_scale,
    from_blocks,
    require_finite,
    row_pieces,
    rows_of,
)
from refllm.kv.kivi import decode

__all__ = [
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "SCALES",
    "FloatScheme",
    "BlockFloatLinear",
    "fake_quantize",
    "quantize",
    "scale_of",
]

SCALES = ("float32", "ue8m0", "mx", "nvfp4")
_NORMAL = 2.0**-126  # the smallest normal float32 number


@dataclass(frozen=True)
class FloatScheme:
    """The format of the codes, what shares a scale, and what the scale is."""

    format: str
    granularity: str
    group_size: int | tuple[int, int] | None = None
    scale: str = "float32"

    def __post_init__(self) -> None:
        found = float_format(self.format)
        if found.bits > 8 or not found.signed:
            raise ValueError(
                f"FloatScheme: codes of e4m3, e5m2 or e2m1 share a scale, not {self.format}"
            )
        if self.scale not in SCALES:
            raise ValueError(
                f"FloatScheme: unknown scale {self.scale!r}; choose one of {', '.join(SCALES)}"
            )
        if self.scale == "nvfp4" and self.format != "e2m1":
            raise ValueError(f"FloatScheme: NVFP4's scales are made for e2m1, not {self.format}")
        # refuses a granularity that does not exist
        Scheme(8, "restricted", self.granularity, self.group_size)

    @property
    def blocks(self) -> Scheme:
        """What shares a scale, as the geometry of a ``Scheme``."""
        return Scheme(8, "restricted", self.granularity, self.group_size)

    @property
    def largest(self) -> float:
        """The largest number of the format."""
        return float_format(self.format).max


MXFP8 = FloatScheme("e4m3", "group", 32, "mx")  # 8.25 bits
MXFP4 = FloatScheme("e2m1", "group", 32, "mx")  # 4.25 bits
NVFP4 = FloatScheme("e2m1", "group", 16, "nvfp4")  # 4.5 bits, and 32 a tensor


# --- scales -------------------------------------------------------------------------------


def scale_of(absmax: Array, scheme: FloatScheme) -> Array:
    """s of blocks with absmax = max |x| ≥ 0, finite; float32, shaped like ``absmax``."""
    xp = namespace(absmax)
    a = xp.astype(absmax, xp.float32, copy=False)
    if scheme.scale == "float32":
        return xp.where(a > 0, xp.maximum(a / scheme.largest, _NORMAL), 1.0)
    if scheme.scale == "nvfp4":
        code, g = _nvfp4(a)
        return decode(code, "e4m3") / g
    top = math.frexp(scheme.largest)[1] - 1  # ⌊log2 largest⌋
    if scheme.scale == "ue8m0":
        # the exponent field of a/largest, one more if any bit of the mantissa is set;
        # 2^−126 at least
        bits = bitcast(xp.maximum(a / scheme.largest, _NORMAL), xp.int32)
        exponent = (bits >> 23) + xp.astype((bits & 0x7FFFFF) != 0, xp.int32)
        # largest · s stays a float32 number
        exponent = xp.where(a > 0, xp.clip(exponent, 1, 254 - top), 127)
    else:
        exponent = xp.clip((bitcast(a, xp.int32) >> 23) - top, 0, 254)
    return decode(xp.astype(exponent, xp.uint8), "e8m0")


def _nvfp4(a: Array) -> tuple[Array, Array]:
    """E4M3 codes of NVFP4's scales, and G [] float32; a scale that would be zero is 1/8."""
    xp = namespace(a)
    top = xp.max(a) if a.size else xp.zeros((), dtype=xp.float32)
    g = 2688.0 / xp.where(top > 0, xp.maximum(top, 2688.0 * _NORMAL), 2688.0)
    code = encode(g * a / 6.0, "e4m3")
    return xp.where(code == 0, 0x20, code), xp.asarray(g, dtype=xp.float32)


def absmax(x: Array, scheme: FloatScheme, *, name: str = "x") -> Array:
    """max |x| of each block, shaped like the scale.

    Raises
    ------
    ValueError
        naming ``name`` if x is empty, not finite, or does not fit the scheme.
    """
    xp = namespace(x)
    try:
        shape = scheme.blocks.scale_shape(tuple(x.shape))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not x.size:
        raise ValueError(f"{name}: an array of shape {tuple(x.shape)} has no range")
    found = xp.max(xp.abs(_blocks(x, scheme)), axis=(1, 3))
    if not bool(xp.all(xp.isfinite(found))):  # the maximum passes NaN on
        require_finite(x, name)
    return xp.reshape(found, shape)


def _blocks(x: Array, scheme: FloatScheme) -> Array:
    """``as_blocks``, and no copy where the blocks are whole."""
    if scheme.granularity == "block":
        rows, columns = scheme.blocks.block
        m, n = x.shape
        if m % rows == 0 and n % columns == 0:
            return namespace(x).reshape(x, (m // rows, rows, n // columns, columns))
    return as_blocks(x, scheme.blocks)


# --- arrays -------------------------------------------------------------------------------


def quantize(
    x: Array, scheme: FloatScheme, *, scale: Array | None = None, name: str = "x"
) -> BlockFloatLinear:
    """A matrix x[M, N] in codes; ``scale`` (float32) gives a scale instead of that of the
    blocks' own range.

    With a scale from elsewhere, numbers beyond its range become the largest one.

    Raises
    ------
    ValueError
        naming ``name`` if x is no matrix, empty, not finite, or does not fit the scheme, or
        a scale is not positive.
    """
    xp = namespace(x, scale)
    if x.ndim != 2:
        raise ValueError(f"{name}: a matrix [M, N] is quantised, got shape {tuple(x.shape)}")
    stored, g = _stored(absmax(x, scheme, name=name), scheme) if scale is None else (scale, None)
    if scale is not None and (
        scheme.scale != "float32" or not bool(xp.all((scale > 0) & xp.isfinite(scale)))
    ):
        raise ValueError(f"{name}: a given scale is float32, finite and above 0")
    made = BlockFloatLinear(
        xp.empty((0, 0), dtype=xp.uint8), stored, scheme, (int(x.shape[0]), int(x.shape[1])), g
    )
    blocks = xp.astype(_blocks(x, scheme), xp.float32, copy=False)
    codes = encode(blocks / expand_scale(made.scale, scheme.blocks, made.shape), scheme.format)
    return made.with_codes(from_blocks(codes, made.shape))


def fake_quantize(x: Array, scheme: FloatScheme, *, name: str = "x") -> Array:
    """``quantize(x).dequantize()`` of float32 numbers without the codes."""
    xp = namespace(x)
    blocks = _blocks(x, scheme)
    s = expand_scale(
        scale_of(absmax(x, scheme, name=name), scheme), scheme.blocks, tuple(x.shape)
    )
    back = rounded(blocks / s, scheme.format)
    back *= s
    return xp.ascontiguousarray(from_blocks(back, tuple(x.shape)))


def _stored(a: Array, scheme: FloatScheme) -> tuple[Array, Array | None]:
    """A scale as it is stored, and NVFP4's G."""
    if scheme.scale == "float32":
        return scale_of(a, scheme), None
    if scheme.scale == "nvfp4":
        return _nvfp4(a)
    return (encode(scale_of(a, scheme), "e8m0"), None)


class BlockFloatLinear:
    """A matrix [M, N] as codes and scales; satisfies ``Linear``, with inputs as they are.

    ``stored`` is the scale as it is stored: float32, or uint8 codes of E8M0 or E4M3 (then
    with ``g``, NVFP4's G). Codes of E2M1 are held packed, two a byte.
    """

    def __init__(
        self,
        codes: Array,
        stored: Array,
        scheme: FloatScheme,
        shape: tuple[int, int],
        g: Array = None,
    ):
        self._codes = codes
        self.stored = stored
        self.scheme = scheme
        self.shape = shape
        self.g = g
        self.dtype: Any = "float32"

    def with_codes(self, codes: Array) -> BlockFloatLinear:
        """The same scales with codes uint8 [M, N]."""
        if self.scheme.format == "e2m1":
            held = pack(codes, 4)
        else:
            held = namespace(codes).ascontiguousarray(codes)
        return BlockFloatLinear(held, self.stored, self.scheme, self.shape, self.g)

    @property
    def codes(self) -> Array:
        """uint8 [M, N]"""
        xp = namespace(self._codes)
        if self.scheme.format != "e2m1":
            return self._codes
        return xp.astype(unpack(self._codes, 4, self.shape[1]), xp.uint8, copy=False)

    @property
    def scale(self) -> Array:
        """s, float32, shaped as the granularity says."""
        if self.stored.dtype != namespace(self.stored).uint8:
            return self.stored
        if self.g is None:
            return decode(self.stored, "e8m0")
        return decode(self.stored, "e4m3") / self.g

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales as they are held."""
        return int(
            self._codes.nbytes + self.stored.nbytes + (0 if self.g is None else self.g.nbytes)
        )

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self) -> Array:
        """x̂[M, N], a new array in ``dtype``."""
        xp = namespace(self._codes)
        out = xp.empty(self.shape, dtype=self.dtype)
        for start, stop in row_pieces(self._codes, self.shape, self.scheme.blocks, PIECE):
            out[start:stop, :] = self.rows(start, stop)
        return out

    def rows(self, start: int, stop: int) -> Array:
        """x̂ of these rows, float32; ``start`` is the first row of a block."""
        xp = namespace(self._codes)
        blocks = self.scheme.blocks
        codes = self._codes[start:stop, :]
        if self.scheme.format == "e2m1":
            codes = xp.astype(unpack(codes, 4, self.shape[1]), xp.uint8, copy=False)
        shape = (stop - start, self.shape[1])
        values = as_blocks(decode(codes, self.scheme.format), blocks)
        values = values * expand_scale(rows_of(self.scale, blocks, start, stop), blocks, shape)
        return from_blocks(values, shape)

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x x̂ᵀ [T, M], in the wider of x's dtype and float32; a tile of x̂ at a
        time is in floats.
        """
        xp = namespace(x, self._codes)
        dtype = xp.result_type(x.dtype, self.dtype)
        out = xp.empty((x.shape[0], self.shape[0]), dtype=dtype)
        x = xp.astype(x, dtype, copy=False)
        for start, stop in row_pieces(
            self._codes, self.shape, self.scheme.blocks, (1 << 18, 1 << 26)
        ):
            out[:, start:stop] = x @ xp.astype(self.rows(start, stop), dtype, copy=False).T
        return out

    def __repr__(self) -> str:
        shape = f"{self.shape[0]}×{self.shape[1]}"
        return f"BlockFloatLinear({shape}, {self.scheme.format}, {self.bits_per_weight:.3f} bits per weight)"
