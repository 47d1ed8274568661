"""Where the bits of the k-quants lie: codes and scales of 256 numbers to the bytes of a
block, and back.

A block holds 256 codes, and for each sub-block of 16 or 32 of them a scale code (and an
offset code). All arrays here are uint8 and have a block a row: codes[B, 256], sub-block
codes[B, 8 or 16].

| type | bytes of a block                                                        | sub-block |
|------|--------------------------------------------------------------------------|-----------|
| Q2_K | scales[16] (low half: scale, high: offset), codes[64], d, dmin            | 16        |
| Q3_K | high bits[32], low two bits[64], scales[12], d                            | 16        |
| Q4_K | d, dmin, scales[12], codes[128]                                           | 32        |
| Q5_K | d, dmin, scales[12], high bits[32], low four bits[128]                    | 32        |
| Q6_K | low four bits[128], high two bits[64], scales[16], d                      | 16        |

Codes that are added to one another in a byte are far apart in the block (32, 64 or 128
numbers), so that a processor unpacks a vector of neighbours with one shift and one mask.

Source: ggml's block structures (ggml-common.h).

Left out: where codes come from (``kquants``), what they mean (``kvalues``).
"""

from __future__ import annotations

from refllm.backend import Array, namespace

__all__ = ["combine", "join_scales4", "join_scales6", "separate", "split_scales4", "split_scales6"]


def combine(codes: Array, bits: int, run: int) -> Array:
    """codes[B, n] of ``bits`` (1, 2 or 4) → bytes[B, n · bits / 8].

    Each run of ``run`` · 8/bits codes fills ``run`` bytes: code i of it lies in byte i mod
    run, the first ``run`` of them in the lowest bits.
    """
    xp = namespace(codes)
    parts = 8 // bits
    split = xp.reshape(codes, (codes.shape[0], -1, parts, run))
    out = split[:, :, 0, :] & ((1 << bits) - 1)
    for i in range(1, parts):
        out = out | ((split[:, :, i, :] & ((1 << bits) - 1)) << (bits * i))
    return xp.reshape(out, (codes.shape[0], -1))


def separate(data: Array, bits: int, run: int) -> Array:
    """The inverse of ``combine``: bytes[B, k] → codes[B, 8k / bits]."""
    xp = namespace(data)
    split = xp.reshape(data, (data.shape[0], -1, 1, run))
    parts = [(split >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)]
    return xp.reshape(xp.concat(parts, axis=2), (data.shape[0], -1))


def join_scales4(scales: Array, offsets: Array) -> Array:
    """Q4_K's and Q5_K's: eight scales and eight offsets of six bits, [B, 8] each → bytes[B,
    12].

    The first four of each lie in the low bits of bytes 0–3 and 4–7; of the last four the
    low halves share bytes 8–11, and their two high bits fill up bytes 0–3 and 4–7.
    """
    xp = namespace(scales, offsets)
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = offsets[:, :4] | ((offsets[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((offsets[:, 4:] & 15) << 4)
    return xp.concat([first, second, third], axis=1)


def split_scales4(data: Array) -> tuple[Array, Array]:
    """The inverse of ``join_scales4``."""
    xp = namespace(data)
    first = data[:, :4]
    second = data[:, 4:8]
    third = data[:, 8:]
    scales = xp.concat([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    return scales, xp.concat([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)


def join_scales6(scales: Array) -> Array:
    """Q3_K's: sixteen scales of six bits, [B, 16] → bytes[B, 12].

    Low halves: scale j in byte j mod 8, the first eight in the low half. The two high bits
    of scale j lie in byte 8 + j mod 4, at bit 2·(j div 4).
    """
    xp = namespace(scales)
    low = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << 4)
    return xp.concat([low, combine(scales >> 4, 2, 4)], axis=1)


def split_scales6(data: Array) -> Array:
    """The inverse of ``join_scales6``."""
    xp = namespace(data)
    low = data[:, :8]
    high = separate(data[:, 8:], 2, 4)
    return xp.concat([low & 15, low >> 4], axis=1) | (high << 4)
