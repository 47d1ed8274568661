"""The first block formats: 32 numbers, one step, for Q4_1 and Q5_1 also an offset.

| type | codes    | value       | step, without importance                                                      |
|------|----------|-------------|-------------------------------------------------------------------------------|
| Q8_0 | −127…127 | d·q         | largest/127; halves are rounded away from 0                                   |
| Q4_0 | 0…15     | d·(q − 8)   | −extreme/8: the number of largest size is code 0, exactly                     |
| Q5_0 | 0…31     | d·(q − 16)  | −extreme/16                                                                   |
| Q4_1 | 0…15     | d·q + m     | (max − min)/15, m = min                                                       |
| Q5_1 | 0…31     | d·q + m     | (max − min)/31, m = min                                                       |

The signed step of Q4_0 and Q5_0 is the point of them: sixteen codes around 0 have one more
on one side, and the extreme gets it, whichever sign it has. Codes are taken with the step
before it becomes a float16: that step is what the error of a reader grows by. Blocks of
zeros get d = −0, since 0/−8 is that.

With an importance, steps are searched (``search``), weighted by importance · sqrt(σ² + x²),
where σ² is the mean square of the whole row; the searched codes are stored as they are.
Q8_0 takes no importance.

Bytes: d, (m,) (32-bit word of fifth bits, bit i of number i,) then nibbles: byte j holds
numbers j and j + 16.

Source: ggml's quantisers (ggml-quants.c).

Left out: Q8_1 (activations only).
"""

from __future__ import annotations

from refllm.backend import Array, bitcast, namespace
from refllm.formats.gguf.arithmetic import divided, extreme, least, sequential_sum
from refllm.formats.gguf.kbits import separate
from refllm.formats.gguf.kquants import half_bytes
from refllm.formats.gguf.scale_search import IMPORTANT, asymmetric, symmetric

__all__ = ["DECODERS", "ENCODERS", "halves"]

BLOCK = 32


def q8_0(x: Array, bits: int, weights: Array | None) -> Array:
    """x[B, 32] → bytes[B, 34]; weights are not used."""
    xp = namespace(x)
    d = xp.max(xp.abs(x), axis=1) / 127.0
    t = x * divided(1.0, d, d != 0)[:, None]
    # 1/d of a denormal d is infinite, and infinity as a whole number is 0
    t = xp.where(xp.isfinite(t), t, 0.0)
    whole = xp.trunc(t)
    # t − whole is exact, so is its double: a half goes away from 0
    whole = whole + xp.trunc((t - whole) * 2.0)
    codes = bitcast(xp.astype(xp.clip(whole, -128.0, 127.0), xp.int8), xp.uint8)
    return xp.concat([half_bytes(d), codes], axis=1)


def around_zero(x: Array, bits: int, weights: Array | None) -> Array:
    """Q4_0 and Q5_0: x[B, 32] → bytes[B, 2 + 4·bits]."""
    xp = namespace(x, weights)
    middle = 1 << (bits - 1)
    columns = xp.ascontiguousarray(x.T)
    if weights is not None:
        codes, d = symmetric(columns, middle, xp.ascontiguousarray(weights.T))
        return _packed(xp.astype(codes, xp.uint8), bits, half_bytes(d))
    d = extreme(columns) / -float(middle)
    return _packed(_shifted(columns, d, middle + 0.5, 2 * middle - 1), bits, half_bytes(d))


def from_offset(x: Array, bits: int, weights: Array | None) -> Array:
    """Q4_1 and Q5_1: x[B, 32] → bytes[B, 4 + 4·bits]."""
    xp = namespace(x, weights)
    top = (1 << bits) - 1
    columns = xp.ascontiguousarray(x.T)
    if weights is not None:
        found, d, below = asymmetric(columns, xp.ascontiguousarray(weights.T), top, IMPORTANT)
        codes = xp.astype(found, xp.uint8)
        m = -below
    else:
        m = least(columns)
        d = (xp.max(columns, axis=0) - m + 0.0) / float(top)  # +0 of zeros of both signs
        codes = _shifted(columns - m, d, 0.5, top)
    return _packed(codes, bits, xp.concat([half_bytes(d), half_bytes(m)], axis=1))


def weighted(x: Array, importance: Array) -> Array:
    """importance · sqrt(σ² + x²), σ² the mean square of each row, summed one by one: x[R,
    K], [K] → [R, K].
    """
    xp = namespace(x, importance)
    squares = x * x
    variance = sequential_sum(xp.ascontiguousarray(squares.T)) / float(x.shape[1])
    return importance * xp.sqrt(variance[:, None] + squares)


def _shifted(x: Array, d: Array, by: float, top: int) -> Array:
    """⌊x/d + by⌋, which is not negative, at most ``top``, as uint8: halves are rounded up.
    x[32, B], d[B].

    0 where 1/d is infinite, as it is of a denormal d, and where d is: infinity as a whole
    number is 0 on an x86.
    """
    xp = namespace(x, d)
    inverse = divided(1.0, d, d != 0)
    sound = xp.isfinite(inverse) & xp.isfinite(d)
    t = x * xp.where(sound, inverse, 0.0)
    t += by
    xp.clip(xp.where(sound, t, 0.0) if not bool(xp.all(sound)) else t, 0.0, float(top), out=t)
    return xp.astype(t, xp.uint8)  # cuts off


def _packed(codes: Array, bits: int, head: Array) -> Array:
    """Codes[32, B] of 4 or 5 bits behind the bytes of step and offset → bytes[B, …]."""
    xp = namespace(codes, head)
    nibbles = (codes[:16] & 15) | ((codes[16:] & 15) << 4)
    parts = [head, nibbles.T]
    if bits == 5:  # the four bytes of a little-endian word with bit i of number i
        fifth = xp.reshape(codes >> 4, (4, 8, -1))
        word = fifth[:, 0]
        for i in range(1, 8):
            word = word | (fifth[:, i] << i)
        parts.insert(1, word.T)
    return xp.concat(parts, axis=1)


def halves(data: Array) -> Array:
    """Bytes [B, 2n] → n float16 numbers each, as float32 [B, n]."""
    xp = namespace(data)
    return xp.astype(xp.ascontiguousarray(data).view(xp.float16), xp.float32)


def _nibbles(data: Array, bits: int) -> Array:
    """The inverse of ``_packed`` without its head: float32 codes[B, 32]."""
    xp = namespace(data)
    low = data[:, data.shape[1] - 16 :]
    codes = xp.empty((data.shape[0], 32), dtype=xp.uint8)
    xp.bitwise_and(low, 15, out=codes[:, :16])
    xp.right_shift(low, 4, out=codes[:, 16:])
    if bits == 5:
        codes |= separate(data[:, :4], 1, 1) << 4
    return xp.astype(codes, xp.float32)


def decode_q8_0(data: Array) -> Array:
    """bytes[B, 34] → float32 [B, 32]."""
    xp = namespace(data)
    codes = bitcast(xp.ascontiguousarray(data[:, 2:]), xp.int8)
    return halves(data[:, :2]) * xp.astype(codes, xp.float32)


def decode_around_zero(data: Array, bits: int) -> Array:
    """bytes[B, 2 + 4·bits] → float32 [B, 32]."""
    out = _nibbles(data[:, 2:], bits)
    out -= float(1 << (bits - 1))
    out *= halves(data[:, :2])
    return out


def decode_from_offset(data: Array, bits: int) -> Array:
    """bytes[B, 4 + 4·bits] → float32 [B, 32]."""
    head = halves(data[:, :4])
    out = _nibbles(data[:, 4:], bits)
    out *= head[:, :1]
    out += head[:, 1:]
    return out


ENCODERS = {"Q8_0": (q8_0, 8), "Q4_0": (around_zero, 4), "Q5_0": (around_zero, 5), "Q4_1": (from_offset, 4),
            "Q5_1": (from_offset, 5)}  # fmt: skip
DECODERS = {
    "Q8_0": decode_q8_0,
    "Q4_0": lambda data: decode_around_zero(data, 4),
    "Q5_0": lambda data: decode_around_zero(data, 5),
    "Q4_1": lambda data: decode_from_offset(data, 4),
    "Q5_1": lambda data: decode_from_offset(data, 5),
}
