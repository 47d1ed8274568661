"""Small floats in blocks that share a scale: FP8 per tensor, row, tile or block, MXFP8,
MXFP4 and NVFP4.

A block with a = max |x| is stored as codes of x/s and comes back as x̂ = s · value(code).
What s is:

| scale     | s                                     | stored as       | used by          |
|-----------|---------------------------------------|-----------------|------------------|
| "float32" | a / largest                           | float32         | DeepSeek-V3      |
| "ue8m0"   | 2^⌈log2(a / largest)⌉                 | E8M0            | DeepSeek-V3.1    |
| "mx"      | 2^(⌊log2 a⌋ − e), e = ⌊log2 largest⌋  | E8M0            | OCP MXFP8, MXFP4 |
| "nvfp4"   | e4m3(G · a / 6) / G, G = 2688 / max a | E4M3; G float32 | NVFP4            |

"ue8m0" never saturates, "mx" may.

With a power of two as the scale, s · q needs no rounding; it costs up to one bit of the
range. A block of zeros gets the scale 1 (the smallest there is, for E8M0 of "mx"), where
the published kernel of DeepSeek-V3 divides 0 by 0. A block so small that its scale would
not be a normal float32 gets 2^−126.

Which elements share a scale is a ``Granularity``: a tensor, a row ("channel", "token"), g
neighbours of a row ("group"), or bo × bi neighbours ("block", ragged at the edges).

| symbol | name                  | shape                                  |
|--------|-----------------------|----------------------------------------|
| x      | activations or weight | [T, N], [M, N]                         |
| codes  | of x/s, uint8         | as x                                   |
| s      | scale, float32        | (), [M, 1], [M, N/g], [⌈M/bo⌉, ⌈N/bi⌉] |

Sources: DeepSeek-V3 (2024), §3.3; OCP Microscaling Formats 1.0, §6.3; NVIDIA's NVFP4.

Left out: MXFP6, MXINT8, compressed-tensors' rounding of MX scales, codebooks; products of
quantised activations (``fp8_linear``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from refllm.backend import Array, DType, bitcast, namespace
from refllm.errors import InputError
from refllm.formats import minifloat
from refllm.formats.granularity import (
    MATMUL_TILE,
    TILE,
    Granularity,
    from_blocks,
    tiled_matmul,
)
from refllm.formats.packing import pack, unpack
from refllm.formats.uniform import require_finite

__all__ = [
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "SCALES",
    "BlockFloatLinear",
    "FloatScheme",
    "fake_quantize",
    "quantize",
    "scale_of",
]

SCALES = ("float32", "ue8m0", "mx", "nvfp4")
_NORMAL = 2.0**-126  # the smallest normal float32


@dataclass(frozen=True)
class FloatScheme:
    """The format of the codes, which elements share a scale, and what the scale is.

    >>> FloatScheme("e4m3", "block", 128).geometry.scale_shape((300, 256))
    (3, 2)
    """

    format: str
    granularity: str
    group_size: int | tuple[int, int] | None = None
    scale: str = "float32"

    def __post_init__(self) -> None:
        found = minifloat.float_format(self.format)
        if found.bits > 8 or not found.signed:
            raise InputError(
                f"FloatScheme: codes of e4m3, e5m2 or e2m1 share a scale, not {self.format}"
            )
        if self.scale not in SCALES:
            raise InputError(
                f"FloatScheme: unknown scale {self.scale!r}; choose one of {', '.join(SCALES)}"
            )
        if self.scale == "nvfp4" and self.format != "e2m1":
            raise InputError(f"FloatScheme: NVFP4's scales are made for e2m1, not {self.format}")
        try:
            self.geometry  # noqa: B018 (its checks are what is wanted)
        except ValueError as error:
            raise InputError(f"FloatScheme: {error}") from None

    @cached_property
    def geometry(self) -> Granularity:
        """Which elements share a scale."""
        return Granularity(self.granularity, self.group_size)

    @property
    def largest(self) -> float:
        """The largest value of the format."""
        return minifloat.float_format(self.format).max


MXFP8 = FloatScheme("e4m3", "group", 32, "mx")  # 8.25 bits
MXFP4 = FloatScheme("e2m1", "group", 32, "mx")  # 4.25 bits
NVFP4 = FloatScheme("e2m1", "group", 16, "nvfp4")  # 4.5 bits, and 32 per tensor


# --- scales -------------------------------------------------------------------------------


def scale_of(absmax: Array, scheme: FloatScheme) -> Array:
    """s of blocks with absmax = max |x| ≥ 0, finite; float32, shaped like ``absmax``."""
    xp = namespace(absmax)
    a = xp.astype(absmax, xp.float32, copy=False)
    if scheme.scale == "float32":
        return xp.where(a > 0, xp.maximum(a / scheme.largest, _NORMAL), 1.0)
    if scheme.scale == "nvfp4":
        code, g = _nvfp4(a)
        return minifloat.dequantize(code, "e4m3") / g
    top = math.frexp(scheme.largest)[1] - 1  # ⌊log2 largest⌋
    if scheme.scale == "ue8m0":
        # the exponent field of a/largest (at least 2^−126), plus one if any bit of the
        # mantissa is set
        bits = bitcast(xp.maximum(a / scheme.largest, _NORMAL), xp.int32)
        exponent = (bits >> 23) + xp.astype((bits & 0x7FFFFF) != 0, xp.int32)
        # largest · s stays within float32
        exponent = xp.where(a > 0, xp.clip(exponent, 1, 254 - top), 127)
    else:
        exponent = xp.clip((bitcast(a, xp.int32) >> 23) - top, 0, 254)
    return minifloat.dequantize(xp.astype(exponent, xp.uint8), "e8m0")


def _nvfp4(a: Array) -> tuple[Array, Array]:
    """E4M3 codes of NVFP4's scales, and G [] float32; a scale that would be zero is 1/8."""
    xp = namespace(a)
    top = xp.zeros((), dtype=xp.float32)
    if a.size:
        top = xp.max(a)
    g = 2688.0 / xp.where(top > 0, xp.maximum(top, 2688.0 * _NORMAL), 2688.0)
    code = minifloat.quantize(g * a / 6.0, "e4m3")
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
        shape = scheme.geometry.scale_shape(tuple(x.shape))
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    if not x.size:
        raise InputError(f"{name}: an array of shape {tuple(x.shape)} has no range")
    found = xp.max(xp.abs(scheme.geometry.as_blocks(x)), axis=(1, 3))  # [M/bo, N/bi]
    if not bool(xp.all(xp.isfinite(found))):  # the maximum propagates NaN
        require_finite(x, name)
    return xp.reshape(found, shape)


# --- arrays -------------------------------------------------------------------------------


def quantize(
    x: Array, scheme: FloatScheme, *, scale: Array | None = None, name: str = "x"
) -> BlockFloatLinear:
    """A matrix x[M, N] in codes; ``scale`` (float32) replaces the scale of the blocks' own range.

    With a given scale, values beyond its range saturate.

    Raises
    ------
    ValueError
        naming ``name`` if x is not a matrix, is empty, not finite, or does not fit the
        scheme, or if a scale is not positive.

    >>> import numpy as np
    >>> weight = quantize(np.array([[448.0, 1.0, -3.0, 0.1]]), FloatScheme("e4m3", "channel"))
    >>> weight.scale.tolist(), weight.dequantize().tolist()
    ([[1.0]], [[448.0, 1.0, -3.0, 0.1015625]])
    """
    xp = namespace(x, scale)
    if x.ndim != 2:
        raise InputError(f"{name}: a matrix [M, N] is quantised, got shape {tuple(x.shape)}")
    g = None
    if scale is None:
        stored, g = _stored(absmax(x, scheme, name=name), scheme)
    else:
        stored = scale
        if scheme.scale != "float32" or not bool(xp.all((scale > 0) & xp.isfinite(scale))):
            raise InputError(f"{name}: a given scale is float32, finite and above 0")
    shape = (int(x.shape[0]), int(x.shape[1]))
    made = BlockFloatLinear(xp.empty((0, 0), dtype=xp.uint8), stored, scheme, shape, g)
    geometry = scheme.geometry
    blocks = xp.astype(geometry.as_blocks(x), xp.float32, copy=False)  # [M/bo, bo, N/bi, bi]
    scaled = blocks / geometry.expand_scale(made.scale, shape)
    return made.with_codes(from_blocks(minifloat.quantize(scaled, scheme.format), shape))


def fake_quantize(x: Array, scheme: FloatScheme, *, name: str = "x") -> Array:
    """``quantize(x).dequantize()`` of float32 values, without making the codes."""
    xp = namespace(x)
    geometry = scheme.geometry
    shape = tuple(x.shape)
    s = geometry.expand_scale(scale_of(absmax(x, scheme, name=name), scheme), shape)
    back = minifloat.rounded(geometry.as_blocks(x) / s, scheme.format)
    back *= s
    return xp.ascontiguousarray(from_blocks(back, shape))


def _stored(a: Array, scheme: FloatScheme) -> tuple[Array, Array | None]:
    """A scale as it is stored, and NVFP4's G."""
    if scheme.scale == "float32":
        return scale_of(a, scheme), None
    if scheme.scale == "nvfp4":
        return _nvfp4(a)
    return minifloat.quantize(scale_of(a, scheme), "e8m0"), None


class BlockFloatLinear:
    """A weight [M, N] as codes and scales; satisfies ``Linear``, with activations in
    floating point.

    ``stored`` is the scale as it is stored: float32, or uint8 codes of E8M0 or E4M3 (then
    with ``g``, NVFP4's G). Codes of E2M1 are packed, two per byte.
    """

    def __init__(
        self,
        codes: Array,
        stored: Array,
        scheme: FloatScheme,
        shape: tuple[int, int],
        g: Array | None = None,
    ):
        self._codes = codes
        self.stored = stored
        self.scheme = scheme
        self.shape = shape
        self.g = g
        self.dtype: DType = "float32"

    def with_codes(self, codes: Array) -> BlockFloatLinear:
        """The same scales with codes uint8 [M, N]."""
        if self.scheme.format == "e2m1":
            held = pack(codes, 4)
        else:
            held = namespace(codes).ascontiguousarray(codes)
        return BlockFloatLinear(held, self.stored, self.scheme, self.shape, self.g)

    @property
    def codes(self) -> Array:
        """Codes, uint8 [M, N]."""
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
            return minifloat.dequantize(self.stored, "e8m0")
        return minifloat.dequantize(self.stored, "e4m3") / self.g

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales as they are held."""
        nbytes = int(self._codes.nbytes + self.stored.nbytes)
        if self.g is not None:
            nbytes += int(self.g.nbytes)
        return nbytes

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self) -> Array:
        """Ŵ[M, N], a new array in ``dtype``."""
        xp = namespace(self._codes)
        out = xp.empty(self.shape, dtype=self.dtype)
        for start, stop, tile in self._tiles(TILE):
            out[start:stop, :] = tile
        return out

    def rows(self, start: int, stop: int) -> Array:
        """Ŵ of these rows, float32; ``start`` is the first row of a block."""
        xp = namespace(self._codes)
        geometry = self.scheme.geometry
        codes = self._codes[start:stop, :]
        if self.scheme.format == "e2m1":
            codes = xp.astype(unpack(codes, 4, self.shape[1]), xp.uint8, copy=False)
        shape = (stop - start, self.shape[1])
        values = geometry.as_blocks(minifloat.dequantize(codes, self.scheme.format))
        scale = geometry.rows_of(self.scale, start, stop)  # [rows/bo, N/bi]
        return from_blocks(values * geometry.expand_scale(scale, shape), shape)

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Ŵᵀ [T, M], in the wider of x's dtype and float32, with at most one
        tile of Ŵ in floats.
        """
        namespace(x, self._codes)  # both on one device
        return tiled_matmul(x, self._tiles(MATMUL_TILE), self.shape[0], self.dtype)

    def _tiles(self, size: tuple[int, int]) -> Iterator[tuple[int, int, Array]]:
        """(first row, last row + 1, those rows of Ŵ) in turn."""
        for start, stop in self.scheme.geometry.row_tiles(self._codes, self.shape, size):
            yield start, stop, self.rows(start, stop)

    def __repr__(self) -> str:
        shape = f"{self.shape[0]}×{self.shape[1]}"
        bits = f"{self.bits_per_weight:.3f} bits per weight"
        return f"BlockFloatLinear({shape}, {self.scheme.format}, {bits})"
