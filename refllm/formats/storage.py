"""Codes, scales and zero points as they are stored: in fewer bits than they are computed with, and counted so.

Codes are packed as they are if unsigned, and plus 2^(b−1) if signed. Zero points are codes, and packed like them, in
one stream for the whole matrix; symmetric rules store none. Scales:

| stored as  | bytes | array held                                  |
|------------|-------|---------------------------------------------|
| None       | 4, 8  | the scale itself                            |
| "float32"  | 4     | float32                                     |
| "float16"  | 2     | float16                                     |
| "bfloat16" | 2     | uint16: the upper half of a float32's bits  |

Rounding is to nearest, ties to even. A scale that would round to 0 becomes the smallest number above 0, because
something is divided by it.

Left out: 8-bit scales (they come with the block formats).
"""

from __future__ import annotations

from typing import Any

from refllm.backend import Array, bitcast, namespace
from refllm.formats.packing import pack, unpack
from refllm.formats.scheme import Scheme

__all__ = ["SCALE_DTYPES", "load_scale", "load_zero", "pack_codes", "store_scale", "store_zero", "unpack_codes"]

SCALE_DTYPES = ("float16", "bfloat16", "float32", "float64")
ZERO_DTYPES = ("float16", "float32", "int32")  # all codes are exact in them


def store_scale(scale: Array, dtype: str | None, *, name: str = "scale") -> Array:
    """Positive finite scales, rounded to ``dtype`` → the array to hold ("bfloat16" as uint16).

    Raises
    ------
    ValueError
        for an unknown dtype, and naming ``name`` where a scale is larger than the dtype can hold.
    """
    xp = namespace(scale)
    if dtype is None:
        return scale
    if dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype {dtype!r} is unknown; choose one of {', '.join(SCALE_DTYPES)}")
    shape, scale = scale.shape, xp.reshape(scale, (scale.size,))  # NumPy makes numbers of arrays without axes
    largest = float(xp.finfo(xp.float32 if dtype == "bfloat16" else getattr(xp, dtype)).max)
    if scale.size and float(xp.max(scale)) > largest:
        raise ValueError(f"{name}: a scale of {float(xp.max(scale)):.3g} does not fit {dtype}")
    if dtype == "bfloat16":
        bits = bitcast(xp.astype(scale, xp.float32), xp.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # round half to even on the upper 16 bits
        if scale.size and int(xp.max(bits)) >= 0x7F80:  # infinity's bits
            raise ValueError(f"{name}: a scale of {float(xp.max(scale)):.3g} does not fit bfloat16")
        return xp.reshape(xp.astype(xp.clip(bits, 1, 0x7F7F), xp.uint16), shape)
    tiny = float(xp.finfo(getattr(xp, dtype)).smallest_subnormal)
    # a number below half of the smallest would round to 0 without this
    held = xp.clip(scale, tiny, min(largest, float(xp.finfo(scale.dtype).max)))
    return xp.reshape(xp.astype(held, getattr(xp, dtype)), shape)


def load_scale(stored: Array, dtype: Any) -> Array:
    """What ``store_scale`` made → floats of ``dtype``."""
    xp = namespace(stored)
    if stored.dtype == xp.uint16:
        flat = xp.astype(xp.reshape(stored, (stored.size,)), xp.uint32)
        stored = xp.reshape(bitcast(flat << 16, xp.float32), stored.shape)
    return xp.astype(stored, dtype, copy=False)


def pack_codes(codes: Array, scheme: Scheme) -> Array:
    """int8 or uint8 codes → words of code + offset."""
    xp = namespace(codes)
    if scheme.signed:  # int8 plus 2^(b−1), modulo 256: never negative
        codes = bitcast(xp.ascontiguousarray(codes), xp.uint8) + scheme.offset
    return pack(codes, scheme.bits, check=False)


def unpack_codes(words: Array, scheme: Scheme, count: int) -> Array:
    """The inverse of ``pack_codes``."""
    xp = namespace(words)
    codes = unpack(words, scheme.bits, count)
    return bitcast(codes - scheme.offset, xp.int8) if scheme.signed else codes


def store_zero(zero_point: Array, scheme: Scheme, dtype: str | None) -> Array | None:
    """Zero points of asymmetric rules as one stream of b bits each, or as numbers of ``dtype``."""
    xp = namespace(zero_point)
    if scheme.symmetric:
        if not bool(xp.all(zero_point == scheme.zero)):
            raise ValueError(f"zero points of rule {scheme.rule!r} are all {scheme.zero}; use an asymmetric rule")
        return None
    if dtype is not None:
        if dtype not in ZERO_DTYPES:
            raise ValueError(f"zero_dtype {dtype!r} is unknown; choose one of {', '.join(ZERO_DTYPES)}, or None")
        return xp.astype(zero_point, getattr(xp, dtype))
    return pack(xp.reshape(zero_point, (zero_point.size,)) + scheme.offset, scheme.bits)


def load_zero(stored: Array | None, scale: Array, scheme: Scheme) -> Array:
    """The inverse of ``store_zero``, shaped like the scale."""
    xp = namespace(scale)
    if stored is None:
        return xp.full(scale.shape, scheme.zero, dtype=xp.int32)
    if stored.dtype == xp.uint32:
        stored = xp.astype(unpack(stored, scheme.bits, scale.size), xp.int32) - scheme.offset
    return xp.reshape(xp.astype(stored, xp.int32), scale.shape)
