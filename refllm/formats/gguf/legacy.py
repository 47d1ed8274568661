"""The legacy block formats: 32 elements, one scale, for Q4_1 and Q5_1 also an offset.

| type | codes    | value      | scale, without importance                                |
|------|----------|------------|----------------------------------------------------------|
| Q8_0 | −127…127 | d·q        | largest/127; halves are rounded away from 0              |
| Q4_0 | 0…15     | d·(q − 8)  | −extreme/8: the value of largest size is code 0, exactly |
| Q5_0 | 0…31     | d·(q − 16) | −extreme/16                                              |
| Q4_1 | 0…15     | d·q + m    | (max − min)/15, m = min                                  |
| Q5_1 | 0…31     | d·q + m    | (max − min)/31, m = min                                  |

The signed scale of Q4_0 and Q5_0 is the idea behind them: sixteen codes around 0 have one
more on one side, and the extreme gets it, whichever sign it has. Codes are made with the
scale before it is rounded to float16, so that the rounding adds to a reader's error. Blocks
of zeros get d = −0, since 0/−8 is −0.

With an importance, scales are searched (``scale_search``), weighted by
importance · sqrt(σ² + x²), where σ² is the mean square of the whole row; the codes that were
found are stored. Q8_0 ignores the importance.

Bytes: d, (m,) (32-bit word of fifth bits, bit i of element i,) then nibbles: byte j holds
elements j and j + 16.

Source: ggml's quantisers (ggml-quants.c).

Left out: Q8_1 (activations only).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from refllm.backend import Array, bitcast, namespace
from refllm.formats.gguf.arithmetic import divided, extreme, least, sequential_sum
from refllm.formats.gguf.bits import float16_bytes, float16_values, unpack_bits
from refllm.formats.gguf.scale_search import IMPORTANT, fit_asymmetric, fit_symmetric
from refllm.formats.gguf.unpacked import Unpacked

__all__ = ["QUANTIZERS", "UNPACKERS"]

BLOCK = 32


def quantize_q8_0(x: Array, weights: Array | None) -> Array:
    """x[B, 32] → bytes[B, 34]; weights are ignored."""
    xp = namespace(x)
    d = xp.max(xp.abs(x), axis=1) / 127.0
    t = x * divided(1.0, d, d != 0)[:, None]
    # 1/d of a denormal d is infinite, and infinity as an integer is 0
    t = xp.where(xp.isfinite(t), t, 0.0)
    whole = xp.trunc(t)
    # t − whole is exact, so is its double: a half is rounded away from 0
    whole = whole + xp.trunc((t - whole) * 2.0)
    codes = bitcast(xp.astype(xp.clip(whole, -128.0, 127.0), xp.int8), xp.uint8)
    return xp.concat([float16_bytes(d), codes], axis=1)


def quantize_symmetric(x: Array, weights: Array | None, bits: int) -> Array:
    """Q4_0 and Q5_0: x[B, 32] → bytes[B, 2 + 4·bits]."""
    xp = namespace(x, weights)
    middle = 1 << (bits - 1)
    columns = xp.ascontiguousarray(x.T)  # [32, B]
    if weights is not None:
        codes, d = fit_symmetric(columns, middle, xp.ascontiguousarray(weights.T))
        return _packed(xp.astype(codes, xp.uint8), bits, float16_bytes(d))
    d = extreme(columns) / -float(middle)
    return _packed(_round_up(columns, d, middle + 0.5, 2 * middle - 1), bits, float16_bytes(d))


def quantize_asymmetric(x: Array, weights: Array | None, bits: int) -> Array:
    """Q4_1 and Q5_1: x[B, 32] → bytes[B, 4 + 4·bits]."""
    xp = namespace(x, weights)
    top = (1 << bits) - 1
    columns = xp.ascontiguousarray(x.T)  # [32, B]
    if weights is not None:
        found, d, below = fit_asymmetric(columns, xp.ascontiguousarray(weights.T), top, IMPORTANT)
        codes = xp.astype(found, xp.uint8)
        m = -below
    else:
        m = least(columns)
        d = (xp.max(columns, axis=0) - m + 0.0) / float(top)  # +0 of zeros of both signs
        codes = _round_up(columns - m, d, 0.5, top)
    return _packed(codes, bits, xp.concat([float16_bytes(d), float16_bytes(m)], axis=1))


def importance_weights(x: Array, importance: Array) -> Array:
    """importance · sqrt(σ² + x²), σ² the mean square of each row, summed in order: x[R, K],
    [K] → [R, K].
    """
    xp = namespace(x, importance)
    squares = x * x
    variance = sequential_sum(xp.ascontiguousarray(squares.T)) / float(x.shape[1])
    return importance * xp.sqrt(variance[:, None] + squares)


def _round_up(x: Array, d: Array, shift: float, top: int) -> Array:
    """⌊x/d + shift⌋ ≥ 0, clipped to ``top``, as uint8 [32, B] (halves are rounded up), for
    x[32, B], d[B].

    0 where 1/d is infinite, as for a denormal d, and where d is: infinity as an integer is 0
    on an x86.
    """
    xp = namespace(x, d)
    inverse = divided(1.0, d, d != 0)
    sound = xp.isfinite(inverse) & xp.isfinite(d)
    t = x * xp.where(sound, inverse, 0.0)
    t += shift
    if not bool(xp.all(sound)):
        t = xp.where(sound, t, 0.0)
    xp.clip(t, 0.0, float(top), out=t)
    return xp.astype(t, xp.uint8)  # truncates


def _packed(codes: Array, bits: int, head: Array) -> Array:
    """Codes[32, B] of 4 or 5 bits after the bytes of scale and offset → bytes[B, …]."""
    xp = namespace(codes, head)
    nibbles = (codes[:16] & 15) | ((codes[16:] & 15) << 4)  # [16, B]
    parts = [head, nibbles.T]
    if bits == 5:  # the four bytes of a little-endian word with bit i of element i
        fifth = xp.reshape(codes >> 4, (4, 8, -1))  # [4 bytes, 8 bits, B]
        word = fifth[:, 0]  # [4, B]
        for i in range(1, 8):
            word = word | (fifth[:, i] << i)
        parts.insert(1, word.T)
    return xp.concat(parts, axis=1)


def _nibbles(data: Array, bits: int) -> Array:
    """The inverse of ``_packed`` without its head: uint8 codes [..., 32, C]."""
    codes = unpack_bits(data[..., -16:, :], 4, 16)
    if bits == 5:
        codes |= unpack_bits(data[..., :4, :], 1, 1) << 4
    return codes


def unpack_q8_0(data: Array) -> Unpacked:
    """bytes[..., 34, C]."""
    xp = namespace(data)
    return Unpacked(bitcast(data[..., 2:, :], xp.int8), float16_values(data[..., :2, :]), None)


def unpack_symmetric(data: Array, bits: int) -> Unpacked:
    """bytes[..., 2 + 4·bits, C] of Q4_0 and Q5_0."""
    xp = namespace(data)
    middle = 1 << (bits - 1)
    codes = bitcast(_nibbles(data[..., 2:, :], bits) - middle, xp.int8)
    return Unpacked(codes, float16_values(data[..., :2, :]), None)


def unpack_asymmetric(data: Array, bits: int) -> Unpacked:
    """bytes[..., 4 + 4·bits, C] of Q4_1 and Q5_1."""
    head = float16_values(data[..., :4, :])  # [..., 2, C]
    return Unpacked(_nibbles(data[..., 4:, :], bits), head[..., :1, :], head[..., 1:, :])


QUANTIZERS: dict[str, Callable[[Array, Array | None], Array]] = {
    "Q8_0": quantize_q8_0,
    "Q4_0": partial(quantize_symmetric, bits=4),
    "Q5_0": partial(quantize_symmetric, bits=5),
    "Q4_1": partial(quantize_asymmetric, bits=4),
    "Q5_1": partial(quantize_asymmetric, bits=5),
}
UNPACKERS: dict[str, Callable[[Array], Unpacked]] = {
    "Q8_0": unpack_q8_0,
    "Q4_0": partial(unpack_symmetric, bits=4),
    "Q5_0": partial(unpack_symmetric, bits=5),
    "Q4_1": partial(unpack_asymmetric, bits=4),
    "Q5_1": partial(unpack_asymmetric, bits=5),
}
