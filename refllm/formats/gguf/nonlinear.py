"""IQ4_NL: 32 elements, one scale, sixteen values that are not evenly spaced.

A code stands for one of sixteen integers, dense around 0 and sparse at the ends, as the
elements of a trained weight are:

    −127 −104 −83 −65 −49 −35 −22 −10 1 13 25 38 53 69 89 113

An element is d times the value of its code. The first scale that is tried makes the element
of largest size −127 with a negative d; fifteen more make it a value between −134 and −120
with a positive one. For the codes that each gives, the best scale in closed form is
Σwxv / Σwv², and (Σwxv)²/Σwv² is compared, as in ``scale_search``. w = x², or importance ·
sqrt(2σ² + x²) with the mean square σ² of the block. Codes are made once more with the best
scale, before it is rounded to float16.

Every midpoint of two values is a multiple of ½, and a value half way takes the upper code.
So the code of t is read from a table at ⌊2t⌋.

Bytes: d, then nibbles: byte j holds elements j and j + 16.

Source: ggml's quantiser (ggml-quants.c), behaviour checked against the library byte for
byte.

Left out: IQ4_XS, and the other lattice types.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

from refllm.backend import Array, Namespace, namespace
from refllm.formats.gguf.arithmetic import divided, extreme, sequential_sum
from refllm.formats.gguf.bits import float16_bytes, float16_values, pack_bits, unpack_bits
from refllm.formats.gguf.scale_search import TINY
from refllm.formats.gguf.unpacked import Unpacked

__all__ = ["QUANTIZERS", "UNPACKERS", "VALUES"]

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TRIES = 7
_MIDPOINTS = [(below + above) / 2 for below, above in pairwise(VALUES)]
_FIRST = 2 * VALUES[0]  # the table's first index stands for t = −127
_CODES = [bisect_right(_MIDPOINTS, i / 2) for i in range(_FIRST, 2 * VALUES[-1] + 1)]


def quantize_iq4_nl(x: Array, importance: Array | None) -> Array:
    """x[B, 32], importance[B, 32] or None → bytes[B, 18]."""
    xp = namespace(x, importance)
    columns = xp.ascontiguousarray(x.T)  # [32, B]
    squares = columns * columns
    w = squares
    if importance is not None:
        variance = sequential_sum(squares) * (2.0 / 32.0)
        w = xp.ascontiguousarray(importance.T) * xp.sqrt(variance + squares)
    scale = _best_scale(columns, w)
    inverse = divided(1.0, scale, scale != 0)  # of a denormal scale infinite, and 0·∞ is NaN
    codes = _codes(xp, columns * inverse)
    return xp.concat([float16_bytes(scale), pack_bits(codes.T, 4, 16)], axis=1)


def _best_scale(x: Array, w: Array) -> Array:
    """s[C] for x[32, C] with weights w[32, C]; 0 for columns of (nearly) zeros."""
    xp = namespace(x, w)
    table = xp.asarray(VALUES, dtype=xp.float32)
    largest = extreme(x)  # [C], signed
    some = xp.abs(largest) >= TINY

    def sums(inverse: Array) -> tuple[Array, Array]:
        """Σwvx, Σwv² of the codes that the scale 1/``inverse`` gives."""
        value = xp.take(table, xp.astype(_codes(xp, x * inverse), xp.int32))  # [32, C]
        weighted = w * value
        return sequential_sum(weighted * x), sequential_sum(weighted * value)

    first = largest / -float(VALUES[0])  # −largest/−127, which is the same
    sx, sq = sums(divided(1.0, first, some))
    scale = divided(sx, sq, sq > 0)
    best = scale * sx
    for i in range(-TRIES, TRIES + 1):
        sx, sq = sums(divided(float(i + VALUES[0]), largest, some))
        better = (sq > 0) & (sx * sx > best * sq)
        scale = xp.where(better, sx / sq, scale)
        best = xp.where(better, scale * sx, best)
    return xp.where(some, scale, 0.0)


def _codes(xp: Namespace, t: Array) -> Array:
    """The codes of the values nearest to t, uint8; NaN takes the last one, as in ggml."""
    t = xp.where(xp.isnan(t), float(VALUES[-1]), xp.clip(t, float(VALUES[0]), float(VALUES[-1])))
    place = xp.astype(xp.floor(2.0 * t), xp.int32) - _FIRST
    return xp.take(xp.asarray(_CODES, dtype=xp.uint8), place)


def unpack_iq4_nl(data: Array) -> Unpacked:
    """bytes[..., 18, C]; the codes are the values that they stand for."""
    xp = namespace(data)
    codes = xp.astype(unpack_bits(data[..., 2:, :], 4, 16), xp.int32)
    values = xp.take(xp.asarray(VALUES, dtype=xp.int8), codes)
    return Unpacked(values, float16_values(data[..., :2, :]), None)


QUANTIZERS = {"IQ4_NL": quantize_iq4_nl}
UNPACKERS = {"IQ4_NL": unpack_iq4_nl}
