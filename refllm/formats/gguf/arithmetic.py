"""The float32 arithmetic that the bytes of the block formats depend on: sums in order,
rounding, extremes.

| name           | what                                                                          |
|----------------|-------------------------------------------------------------------------------|
| sequential_sum | ((0 + t₀) + t₁) + …: another order changes last bits, and those change codes  |
| nearest        | to the nearest integer as ggml does it, NaN and infinity included             |
| extreme, least | of several equal values the first, as +0 and −0 are equal with different bits |
| single         | Python's float rounded to float32: the same constants on every device         |

Source: ggml's quantisers (ggml-quants.c).

Left out: fused multiply-add. A build that fuses gives other bytes, and NumPy never fuses.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from refllm.backend import Array, bitcast, namespace

__all__ = ["divided", "extreme", "least", "nearest", "sequential_sum", "single", "without_warnings"]

_MAGIC = 12582912.0  # 1.5 · 2²³: adding it leaves the integer in the last 22 bits of a float32
_MANY = 8  # columns from which NumPy's reduction adds whole rows, one after another


def single(x: float) -> float:
    """The nearest float32; of a sum or a product of two float32 values it is what float32
    arithmetic gives.

    >>> single(0.1)
    0.10000000149011612
    """
    rounded: float = struct.unpack("f", struct.pack("f", x))[0]
    return rounded


def without_warnings(like: Array) -> AbstractContextManager[object]:
    """A context without NumPy's warnings of overflow and 0/0 (CuPy never gives any).

    The searches divide and overflow as their source does, and check the result afterwards.
    """
    if isinstance(like, np.ndarray):
        return np.errstate(all="ignore")
    return nullcontext()


def sequential_sum(terms: Array) -> Array:
    """Σ over rows, terms[S, C] → [C]: ((0 + t₀) + t₁) + …, each sum rounded to float32."""
    xp = namespace(terms)
    many = terms.shape[1] >= _MANY
    if isinstance(terms, np.ndarray) and many and terms.flags.c_contiguous:
        # Where the summed axis is the slow one, NumPy adds whole rows to its result, one
        # after another: the same sums in the same order in a third of the time (tested).
        total: Array = xp.add.reduce(terms, axis=0)
        return total
    total = terms[0] + 0.0  # −0 becomes +0, as in a sum that starts at 0
    for row in terms[1:]:
        total += row
    return total


def nearest(x: Array) -> Array:
    """float32 → int32: the nearest integer, ties to even, for |x| < 2²²; beyond that, the
    result of ggml's bit trick.

    NaN gives 0 there, ±∞ gives −2²².

    >>> import numpy as np
    >>> nearest(np.array([0.5, 1.5, -2.7], dtype="float32")).tolist()
    [0, 2, -3]
    """
    xp = namespace(x)
    bits = bitcast(xp.ascontiguousarray(x + _MAGIC), xp.int32)
    return (bits & 0x7FFFFF) - 0x400000


def extreme(x: Array) -> Array:
    """The signed value of largest size in each column of x[S, C], the first of several; +0
    for zeros: [C].
    """
    xp = namespace(x)
    high = xp.max(x, axis=0)
    low = xp.min(x, axis=0)
    if not bool(xp.any((high == -low) & (high != 0))):  # no ties: no need for the index
        return xp.where(high > -low, high, low) + 0.0
    first = xp.argmax(xp.abs(x), axis=0)
    return xp.take_along_axis(x, first[None, :], axis=0)[0] + 0.0


def least(x: Array) -> Array:
    """The smallest value in each column of x[S, C], the first of several (−0 equals 0): [C]."""
    xp = namespace(x)
    low = xp.min(x, axis=0)
    if bool(xp.all(low != 0)):  # only zeros can be equal with different bits
        return low
    return xp.take_along_axis(x, xp.argmin(x, axis=0)[None, :], axis=0)[0]


def divided(a: Array | float, b: Array, where: Array, otherwise: float = 0.0) -> Array:
    """a / b where ``where`` holds, ``otherwise`` elsewhere."""
    xp = namespace(b)
    return xp.where(where, a / xp.where(where, b, 1.0), otherwise)
