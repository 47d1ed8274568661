"""Bits shared by the block formats: small codes packed into bytes, and float16 fields.

Codes that share a byte are far apart in the block (16, 32 or 64 elements), so that a
processor unpacks a vector of neighbours with one shift and one mask.

All arrays have one block per row: codes uint8 [B, n], bytes uint8 [B, k].

Source: ggml's block structures (ggml-common.h).
"""

from __future__ import annotations

from refllm.backend import Array, namespace

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
    """The inverse of ``pack_bits``: bytes[B, k] → codes[B, 8k / bits]."""
    xp = namespace(data)
    split = xp.reshape(data, (data.shape[0], -1, 1, run))
    parts = [(split >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)]
    return xp.reshape(xp.concat(parts, axis=2), (data.shape[0], -1))


def float16_bytes(x: Array) -> Array:
    """float32 [B] → float16, as bytes [B, 2]."""
    xp = namespace(x)
    narrow = xp.ascontiguousarray(xp.astype(x, xp.float16))
    return xp.reshape(narrow.view(xp.uint8), (x.shape[0], 2))


def float16_values(data: Array) -> Array:
    """Bytes [B, 2n] of n float16 values each → float32 [B, n]."""
    xp = namespace(data)
    return xp.astype(xp.ascontiguousarray(data).view(xp.float16), xp.float32)


def round_to_float16(x: Array) -> Array:
    """float32 → the nearest float16, as float32: the scale that a reader will see."""
    xp = namespace(x)
    return xp.astype(xp.astype(x, xp.float16), xp.float32)
