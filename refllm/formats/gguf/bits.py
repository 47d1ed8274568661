"""Bits shared by the block formats: small codes packed into bytes, and float16 fields.

Codes that share a byte are far apart in the block (16, 32 or 64 elements), so that a
processor unpacks a vector of neighbours with one shift and one mask.

Packing has one block per row: codes uint8 [B, n], bytes uint8 [B, k]. Unpacking has the
positions in a block on the last axis but one, codes [..., n, C] of bytes [..., k, C]: so a
field is one contiguous piece both of a file's blocks (C = 1) and of the blocks of C rows
that lie interleaved (``interleaved``).

Source: ggml's block structures (ggml-common.h).
"""

from __future__ import annotations

import numpy as np

from refllm.backend import Array, bitcast, namespace

__all__ = ["float16_bytes", "float16_values", "pack_bits", "round_to_float16", "unpack_bits"]


def pack_bits(codes: Array, bits: int, run: int) -> Array:
    """codes[B, n] of ``bits`` (1, 2 or 4) → bytes[B, n · bits / 8].

    Each run of ``run`` · 8/bits codes fills ``run`` bytes: code i of it lies in byte i mod
    run, the first ``run`` of them in the lowest bits.

    >>> import numpy as np
    >>> codes = np.array([[1, 2, 3, 4]], dtype="uint8")
    >>> [hex(byte) for byte in pack_bits(codes, 4, 2)[0]]  # 1 beside 3, 2 beside 4
    ['0x31', '0x42']
    """
    xp = namespace(codes)
    parts = 8 // bits
    mask = (1 << bits) - 1
    split = xp.reshape(codes, (codes.shape[0], -1, parts, run))  # [B, runs, 8/bits, run]
    out = split[:, :, 0, :] & mask
    for i in range(1, parts):
        out = out | ((split[:, :, i, :] & mask) << (bits * i))
    return xp.reshape(out, (codes.shape[0], -1))


def unpack_bits(data: Array, bits: int, run: int) -> Array:
    """The inverse of ``pack_bits``: bytes[..., k, C] → codes[..., 8k / bits, C]."""
    xp = namespace(data)
    *lead, k, c = data.shape
    parts = 8 // bits
    mask = (1 << bits) - 1
    split = xp.reshape(data, (*lead, k // run, run, c))
    codes = xp.empty((*lead, k // run, parts, run, c), dtype=xp.uint8)
    for i in range(parts):
        code = codes[..., i, :, :]
        if i == 0:
            xp.bitwise_and(split, mask, out=code)
        else:
            xp.right_shift(split, bits * i, out=code)
        if 0 < i < parts - 1:  # the highest bits have nothing above them
            xp.bitwise_and(code, mask, out=code)
    return xp.reshape(codes, (*lead, k * parts, c))


def float16_bytes(x: Array) -> Array:
    """float32 [B] → float16, as bytes [B, 2]."""
    xp = namespace(x)
    narrow = xp.ascontiguousarray(xp.astype(x, xp.float16))
    return xp.reshape(narrow.view(xp.uint8), (x.shape[0], 2))


def float16_values(data: Array) -> Array:
    """Bytes [..., 2n, C] of n float16 values → float32 [..., n, C]."""
    xp = namespace(data)
    words = xp.astype(data[..., 1::2, :], xp.uint16) << 8
    words |= data[..., ::2, :]
    if not isinstance(words, np.ndarray) or bool(xp.any((words & 0x7C00) == 0x7C00)):
        return xp.astype(bitcast(words, xp.float16), xp.float32)
    # NumPy converts float16 one by one; this is ten times faster, and exact where no value is
    # infinite or NaN: sign, exponent and mantissa are moved to their places in a float32,
    # whose exponent is then too small by 127 − 15 (also where the value is denormal)
    wide = xp.astype(bitcast(words, xp.int16), xp.int32)  # the sign fills the upper half
    wide <<= 13
    wide &= -0x70002000  # 0x8FFFE000: the sign, four bits of nothing, exponent and mantissa
    return bitcast(wide, xp.float32) * 2.0**112


def round_to_float16(x: Array) -> Array:
    """float32 → the nearest float16, as float32: the scale that a reader will see."""
    xp = namespace(x)
    return xp.astype(xp.astype(x, xp.float16), xp.float32)
