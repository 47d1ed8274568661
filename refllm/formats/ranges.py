"""From the range of the numbers to the step and the zero point: the formulas of ``scheme``, in arithmetic that ends.

A range without extent has no step. Choices: an all-zero range gets what the rule's upstream gives it (the eps of the
dtype; for GPTQ's rules the step of the range ±1; for AWQ the range 1e-5; 1 for the other two), and a step below the
smallest normal number becomes that number, so that x/s stays within the codes.


| symbol | name                                         | shape             |
|--------|----------------------------------------------|-------------------|
| lo, hi | smallest and largest number of each range    | one of ``scheme`` |
| s      | step ("scale"), > 0, in x's dtype            | as lo             |
| z      | zero point, int32                            | as lo             |

Left out: where a range comes from, if not from the smallest and the largest number (``quant.observers``).
"""

from __future__ import annotations

import numpy as np

from refllm.backend import Array, namespace
from refllm.formats.scheme import Scheme, as_blocks

__all__ = ["qparams", "range_to_qparams", "ranges", "reachable", "refuse_non_finite"]

AWQ_RANGE = 1e-5  # the smallest range that llm-awq divides


def ranges(x: Array, scheme: Scheme, *, name: str = "x") -> tuple[Array, Array]:
    """Smallest and largest number of each range: x → lo, hi, shaped like the scale.

    Raises
    ------
    ValueError
        naming ``name`` if x is empty, holds NaN or infinity, or does not fit the scheme.
    """
    xp = namespace(x)
    _limits(x, name)
    try:
        shape = scheme.scale_shape(tuple(x.shape))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if 0 in x.shape[-1:] or (x.size == 0 and scheme.granularity in ("tensor", "block")):
        raise ValueError(f"{name}: an array of shape {tuple(x.shape)} has no range")
    lo, hi = _extremes(x, scheme)
    if not bool(xp.all(xp.isfinite(lo) & xp.isfinite(hi))):  # min and max pass NaN on
        refuse_non_finite(x, name)
    return xp.reshape(lo, shape), xp.reshape(hi, shape)


def _extremes(x: Array, scheme: Scheme) -> tuple[Array, Array]:
    """min and max of each range, in any shape; a range that holds NaN gives NaN."""
    xp = namespace(x)
    if xp is np and scheme.granularity == "group" and x.size:
        # NumPy's max along a short last axis takes twice as long as the same through reduceat
        flat = x.reshape(-1)
        starts = np.arange(0, flat.size, scheme.block[1])
        return np.minimum.reduceat(flat, starts), np.maximum.reduceat(flat, starts)
    blocks = as_blocks(x, scheme)
    return xp.min(blocks, axis=(1, 3)), xp.max(blocks, axis=(1, 3))


def qparams(x: Array, scheme: Scheme, *, name: str = "x") -> tuple[Array, Array]:
    """The step and zero point of each range of x → scale (x's dtype), zero_point (int32), shaped alike.

    Zero points of symmetric rules are all the same number: 0, or 2^(b−1) for "half_integer_unsigned".
    """
    lo, hi = ranges(x, scheme, name=name)
    return range_to_qparams(lo, hi, scheme, name=name)


def range_to_qparams(lo: Array, hi: Array, scheme: Scheme, *, name: str = "range") -> tuple[Array, Array]:
    """Ranges lo ≤ hi of any shape → scale (their dtype) and zero_point (int32) of that shape.

    Raises
    ------
    ValueError
        naming ``name`` if a bound is not finite or lo > hi.
    """
    xp = namespace(lo, hi)
    largest, smallest = _limits(lo, name)
    shape = lo.shape
    lo, hi = xp.reshape(lo, (lo.size,)), xp.reshape(hi, (hi.size,))  # NumPy makes numbers of arrays without axes
    if not bool(xp.all((lo <= hi) & xp.isfinite(lo) & xp.isfinite(hi))):
        raise ValueError(f"{name}: a range needs finite bounds lo ≤ hi")
    if scheme.rule != "awq":  # zero lies in every range
        lo, hi = xp.clip(lo, -largest, 0.0), xp.clip(hi, 0.0, largest)
    empty = (lo == 0) & (hi == 0)
    if scheme.symmetric:
        # at 1 bit the step may be 2a: held within the dtype
        widest = xp.clip(xp.maximum(-lo, hi), 0.0, largest * min(1.0, scheme.steps))
        scale = xp.clip(widest / scheme.steps, smallest, largest)
        scale = xp.where(empty, _empty_step(scheme, scale), scale)
        return xp.reshape(scale, shape), xp.full(shape, scheme.zero, dtype=xp.int32)
    if scheme.rule == "asymmetric":  # GPTQ gives an all-zero row the range ±1
        lo, hi = xp.where(empty, -1.0, lo), xp.where(empty, 1.0, hi)
    # the difference of halves: as exact as hi − lo, and never infinite; nor is its quotient, where L is 1
    least = 0.5 * AWQ_RANGE if scheme.rule == "awq" else 0.0
    half = xp.clip(0.5 * hi - 0.5 * lo, least, largest * min(1.0, 0.5 * scheme.steps))
    scale = xp.clip(half / (0.5 * scheme.steps), smallest, largest)
    if scheme.rule == "asymmetric_signed":
        scale = xp.where(empty, _empty_step(scheme, scale), scale)
        zero = xp.round(xp.clip(scheme.qmin - lo / scale, float(scheme.qmin), float(scheme.qmax)))
    else:
        zero = xp.clip(-xp.round(reachable(lo, scale) / scale), 0.0, float(scheme.qmax))
    return xp.reshape(scale, shape), xp.reshape(xp.astype(zero, xp.int32), shape)


def reachable(x: Array, scale: Array) -> Array:
    """x held within ±1024 steps, so that x/s is finite; no code is that large, so none changes."""
    xp = namespace(x, scale)
    largest, _ = _limits(scale, "scale")
    bound = 1024.0 * xp.clip(scale, 0.0, largest / 1024.0)
    return xp.clip(x, -bound, bound)


# --- guards --------------------------------------------------------------------------------------------------------


def refuse_non_finite(x: Array, name: str) -> None:
    """ValueError naming ``name`` and the first bad place if x holds NaN or infinity."""
    xp = namespace(x)
    if bool(xp.all(xp.isfinite(x))):
        return
    at = int(xp.argmax(xp.astype(xp.reshape(~xp.isfinite(x), (x.size,)), xp.uint8)))
    index = []
    for size in reversed(x.shape):
        at, k = divmod(at, size)
        index.append(k)
    raise ValueError(f"{name}: holds NaN or infinity, first at index {tuple(reversed(index))}")


def _limits(x: Array, name: str) -> tuple[float, float]:
    """(largest, smallest normal) number of x's dtype, which must be float32 or float64.

    A float16 quotient x/s would be too coarse to be rounded to 8 bits.
    """
    xp = namespace(x)
    if x.dtype not in (xp.float32, xp.float64):
        raise TypeError(f"{name}: quantisation computes in float32 or float64, got {x.dtype}; convert it first")
    info = xp.finfo(x.dtype)
    return float(info.max), float(info.smallest_normal)


def _empty_step(scheme: Scheme, scale: Array) -> Array:
    """The step of an all-zero range, as large as any: every choice gives back zeros. See the module."""
    xp = namespace(scale)
    if scheme.rule in ("half_integer", "asymmetric_signed"):
        step = float(xp.finfo(scale.dtype).eps)
    else:
        step = 1.0 / scheme.steps if scheme.rule == "half_integer_unsigned" else 1.0
    return xp.full(scale.shape, step, dtype=scale.dtype)
