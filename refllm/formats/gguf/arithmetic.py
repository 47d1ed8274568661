"""The arithmetic that the bytes of the block formats depend on: sums in order, rounding,
extremes, in float32.

| name           | what                                                                                       |
|----------------|--------------------------------------------------------------------------------------------|
| sequential_sum | ((0 + t₀) + t₁) + …: another order of additions gives other last bits, and those other codes |
| nearest        | to the nearest whole number as ggml does it, NaN and infinity included                      |
| extreme, least | of several equal numbers the first, since +0 and −0 are equal and not the same               |
| single         | Python's float rounded to float32: constants of the format, the same on every device         |

Source: ggml's quantisers (ggml-quants.c).

Left out: fused multiply-add. A build that fuses gives other bytes, and NumPy never fuses.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from refllm.backend import Array, bitcast, namespace

__all__ = ["divided", "extreme", "least", "nearest", "quietly", "sequential_sum", "single"]

_MAGIC = 12582912.0  # 1.5 · 2²³: adding it leaves the whole part in the last 22 bits of a float32
_MANY = 8  # columns from which NumPy's reduction runs along rows, one after another


def single(x: float) -> float:
    """The nearest float32; of a sum or a product of float32 numbers it is what float32
    arithmetic gives.
    """
    rounded: float = struct.unpack("f", struct.pack("f", x))[0]
    return rounded


def quietly(like: Array) -> AbstractContextManager[object]:
    """No warnings of overflow and 0/0 from NumPy; a GPU never gives any.

    The searches divide and overflow as their source does, and look at the outcome
    afterwards.
    """
    if namespace(like) is np:
        return np.errstate(all="ignore")
    return nullcontext()


def sequential_sum(terms: Array) -> Array:
    """Σ over rows, terms[S, C] → [C]: ((0 + t₀) + t₁) + …, each sum rounded to float32."""
    xp = namespace(terms)
    if xp is np and terms.shape[1] >= _MANY and terms.flags.c_contiguous:
        # Where the summed axis is the slow one, NumPy adds whole rows to its result, one
        # after another: the same sums in the same order in a third of the time (a test
        # holds it to that).
        total: Array = xp.add.reduce(terms, axis=0)
        return total
    total = terms[0] + 0.0  # −0 becomes +0, as in a sum that starts at 0
    for row in terms[1:]:
        total += row
    return total


def nearest(x: Array) -> Array:
    """float32 → int32: the nearest whole number, ties to even, for |x| < 2²²; what ggml's
    bit trick gives beyond.

    NaN gives 0 there, ±∞ gives −2²².
    """
    xp = namespace(x)
    bits = bitcast(xp.ascontiguousarray(x + _MAGIC), xp.int32)
    return (bits & 0x7FFFFF) - 0x400000


def extreme(x: Array) -> Array:
    """The signed number of largest size in each column of x[S, C], the first of several; +0
    of zeros: [C].
    """
    xp = namespace(x)
    high = xp.max(x, axis=0)
    low = xp.min(x, axis=0)
    if not bool(xp.any((high == -low) & (high != 0))):  # of different sizes: no place need be known
        return xp.where(high > -low, high, low) + 0.0
    first = xp.argmax(xp.abs(x), axis=0)
    return xp.take_along_axis(x, first[None, :], axis=0)[0] + 0.0


def least(x: Array) -> Array:
    """The smallest number of each column of x[S, C], the first of several (−0 equals 0):
    [C].
    """
    xp = namespace(x)
    low = xp.min(x, axis=0)
    if bool(xp.all(low != 0)):  # only zeros can be equal and not the same
        return low
    return xp.take_along_axis(x, xp.argmin(x, axis=0)[None, :], axis=0)[0]


def divided(a: Array | float, b: Array, where: Array, otherwise: float = 0.0) -> Array:
    """a / b where ``where`` holds, ``otherwise`` elsewhere."""
    xp = namespace(b)
    return xp.where(where, a / xp.where(where, b, 1.0), otherwise)
