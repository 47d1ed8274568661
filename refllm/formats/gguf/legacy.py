"""The first block formats: 32 numbers, one step, for Q4_1 and Q5_1 also an offset.

| type | codes    | value       | step, without importance                                                      |
|------|----------|-------------|-------------------------------------------------------------------------------|
| Q8_0 | −127…127 | d·q         | largest/127; halves are rounded away from 0                                   |
| Q4_0 | 0…15     | d·(q − 8)   | −extreme/8: the number of largest size is code 0, exactly                     |
| Q5_0 | 0…31     | d·(q − 16)  | −extreme/16                                                                   |
| Q4_1 | 0…15     | d·q + m     | (max − min)/15, m = min                                                       |
| Q5_1 | 0…31     | d·q + m     | (max − min)/31, m = min                                                       |

The signed step of Q4_0 and Q5_0 is the point of them: sixteen codes around 0 have one more on one side, and the extreme
gets it, whichever sign it has. Codes are taken with the step before it becomes a float16: that step is what the error
of a reader grows by. Blocks of zeros get d = −0, since 0/−8 is that.

With an importance, steps are searched (``search``), weighted by importance · sqrt(σ² + x²), where σ² is the mean square
of the whole row; the searched codes are stored as they are. Q8_0 takes no importance.

Bytes: d, (m,) (32-bit word of fifth bits, bit i of number i,) then nibbles: byte j holds numbers j and j + 16.

Source: ggml's quantisers (ggml-quants.c).

Left out: Q8_1 (activations only).
"""

from __future__ import annotations

from refllm.backend import Array, bitcast, namespace
from refllm.formats.gguf.arithmetic import divided, extreme, least, sequential_sum
from refllm.formats.gguf.kbits import combine, separate
from refllm.formats.gguf.kquants import half_bytes
from refllm.formats.gguf.search import IMPORTANT, asymmetric, symmetric

__all__ = ["DECODERS", "ENCODERS", "halves"]

BLOCK = 32


def q8_0(x: Array, bits: int, weights: Array | None) -> Array:
    """x[B, 32] → bytes[B, 34]; weights are not used."""
    xp = namespace(x)
    d = xp.max(xp.abs(x), axis=1) / 127.0
    t = x * divided(1.0, d, d != 0)[:, None]
    t = xp.where(xp.isfinite(t), t, 0.0)  # 1/d of a denormal d is infinite, and infinity as a whole number is 0
    whole = xp.trunc(t)
    whole = whole + xp.trunc((t - whole) * 2.0)  # t − whole is exact, so is its double: a half goes away from 0
    codes = bitcast(xp.astype(xp.clip(whole, -128.0, 127.0), xp.int8), xp.uint8)
    return xp.concat([half_bytes(d), codes], axis=1)


def around_zero(x: Array, bits: int, weights: Array | None) -> Array:
    """Q4_0 and Q5_0: x[B, 32] → bytes[B, 2 + 4·bits]."""
    xp = namespace(x, weights)
    middle = 1 << (bits - 1)
    columns = xp.ascontiguousarray(x.T)
    if weights is not None:
        codes, d = symmetric(columns, middle, xp.ascontiguousarray(weights.T))
        return _packed(xp.astype(codes.T, xp.uint8), bits, half_bytes(d))
    d = extreme(columns) / -float(middle)
    codes = _shifted(x * divided(1.0, d, d != 0)[:, None], middle + 0.5, 2 * middle - 1)
    return _packed(codes, bits, half_bytes(d))


def from_offset(x: Array, bits: int, weights: Array | None) -> Array:
    """Q4_1 and Q5_1: x[B, 32] → bytes[B, 4 + 4·bits]."""
    xp = namespace(x, weights)
    top = (1 << bits) - 1
    if weights is not None:
        found, d, below = asymmetric(xp.ascontiguousarray(x.T), xp.ascontiguousarray(weights.T), top, IMPORTANT)
        codes, m = xp.astype(found.T, xp.uint8), -below
    else:
        m = least(xp.ascontiguousarray(x.T))
        d = (xp.max(x, axis=1) - m + 0.0) / float(top)  # +0 of zeros of both signs
        codes = _shifted((x - m[:, None]) * divided(1.0, d, d != 0)[:, None], 0.5, top)
    return _packed(codes, bits, xp.concat([half_bytes(d), half_bytes(m)], axis=1))


def weighted(x: Array, importance: Array) -> Array:
    """importance · sqrt(σ² + x²), σ² the mean square of each row, summed one by one: x[R, K], [K] → [R, K]."""
    xp = namespace(x, importance)
    squares = x * x
    variance = sequential_sum(xp.ascontiguousarray(squares.T)) / float(x.shape[1])
    return importance * xp.sqrt(variance[:, None] + squares)


def _shifted(t: Array, by: float, top: int) -> Array:
    """⌊t + by⌋ of what is not negative, at most ``top``, as uint8: halves are rounded up. 0 of what is not finite."""
    xp = namespace(t)
    whole = xp.clip(xp.trunc(t + by), 0.0, float(top))
    return xp.astype(xp.where(xp.isfinite(t), whole, 0.0), xp.uint8)


def _packed(codes: Array, bits: int, head: Array) -> Array:
    """Codes[B, 32] of 4 or 5 bits behind the bytes of step and offset."""
    xp = namespace(codes, head)
    parts = [head, combine(codes & 15, 4, 16)]
    if bits == 5:
        parts.insert(1, combine_bits(codes >> 4))
    return xp.concat(parts, axis=1)


def combine_bits(bits: Array) -> Array:
    """bits[B, 32] → the four bytes of a little-endian word with bit i at place i."""
    return combine(bits, 1, 1)


def halves(data: Array) -> Array:
    """Bytes [B, 2n] → n float16 numbers each, as float32 [B, n]."""
    xp = namespace(data)
    return xp.astype(xp.ascontiguousarray(data).view(xp.float16), xp.float32)


def _nibbles(data: Array, bits: int) -> Array:
    """The inverse of ``_packed`` without its head: float32 codes[B, 32]."""
    xp = namespace(data)
    codes = separate(data[:, data.shape[1] - 16 :], 4, 16)
    if bits == 5:
        codes = codes | (separate(data[:, :4], 1, 1) << 4)
    return xp.astype(codes, xp.float32)


def decode_q8_0(data: Array) -> Array:
    """bytes[B, 34] → float32 [B, 32]."""
    xp = namespace(data)
    codes = bitcast(xp.ascontiguousarray(data[:, 2:]), xp.int8)
    return halves(data[:, :2]) * xp.astype(codes, xp.float32)


def decode_around_zero(data: Array, bits: int) -> Array:
    """bytes[B, 2 + 4·bits] → float32 [B, 32]."""
    return halves(data[:, :2]) * (_nibbles(data[:, 2:], bits) - float(1 << (bits - 1)))


def decode_from_offset(data: Array, bits: int) -> Array:
    """bytes[B, 4 + 4·bits] → float32 [B, 32]."""
    head = halves(data[:, :4])
    return head[:, :1] * _nibbles(data[:, 4:], bits) + head[:, 1:]


ENCODERS = {"Q8_0": (q8_0, 8), "Q4_0": (around_zero, 4), "Q5_0": (around_zero, 5), "Q4_1": (from_offset, 4),
            "Q5_1": (from_offset, 5)}  # fmt: skip
DECODERS = {
    "Q8_0": decode_q8_0,
    "Q4_0": lambda data: decode_around_zero(data, 4),
    "Q5_0": lambda data: decode_around_zero(data, 5),
    "Q4_1": lambda data: decode_from_offset(data, 4),
    "Q5_1": lambda data: decode_from_offset(data, 5),
}
