"""The range whose quantised numbers lie nearest: min-max, scaled down step by step.

Sources: llm-compressor's observers ``mse`` and ``memoryless_mse``; the ``mse=True`` of
GPTQ's authors. Both raise the errors to the power 2.4, between the square and a vote for
the largest.

| symbol   | name                                    | shape                       |
|----------|-----------------------------------------|-----------------------------|
| p        | shrinking factor, 1 − i/grid            |                             |
| lo, hi   | range of the numbers that share a step  | the scale's: (), [M, 1], …  |
| x̂        | x through its codes and back            | as x                        |

Left out: other factors for the two ends, ranges wider than min-max (NVFP4), weights of
importance.
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.formats.uniform import (
    Scheme,
    dequantize_codes,
    quantize_codes,
    range_to_qparams,
    ranges,
    reachable,
)

__all__ = ["mse_range"]


def mse_range(
    x: Array,
    scheme: Scheme,
    *,
    grid: int = 100,
    max_shrink: float = 0.2,
    norm: float = 2.4,
    patience: int | None = 5,
    name: str = "x",
) -> tuple[Array, Array]:
    """The range p·[min, max], p = 1, 1 − 1/grid, …, whose quantised numbers lie nearest:
    Σ|x̂ − x|^norm is least.

    One search for each range of the scheme → lo, hi, shaped like its scale. Of equal errors
    the widest range wins, so p = 1 (min-max) is never worse. The defaults are
    llm-compressor's: 20 candidates, and an end after ``patience`` of them at which no range
    at all improved. GPTQ's authors try 80: ``max_shrink=0.8, patience=None``.

    Raises
    ------
    ValueError
        if there is no candidate, or as ``ranges``.
    """
    xp = namespace(x)
    count = int(max_shrink * grid)
    if not 1 <= count <= grid:
        raise ValueError(
            f"mse_range: grid {grid} and max_shrink {max_shrink} leave no candidate, or one below p = 0"
        )
    low, high = ranges(x, scheme, name=name)
    shape = tuple(low.shape)
    best_low = xp.reshape(low, (low.size,))
    low = best_low
    best_high = xp.reshape(high, (high.size,))
    high = best_high
    # errors in steps of p = 1: no power of them overflows
    unit, _ = range_to_qparams(low, high, scheme)
    best = xp.full(unit.shape, xp.inf, dtype=x.dtype)
    still = 0
    for i in range(count):
        p = 1 - i / grid
        lo = p * low
        hi = p * high
        error = _error(x, lo, hi, unit, scheme, norm)
        better = error < best
        if not bool(xp.any(better)):
            still += 1
            if patience is not None and still >= patience:
                break
            continue
        still = 0
        best = xp.where(better, error, best)
        best_low = xp.where(better, lo, best_low)
        best_high = xp.where(better, hi, best_high)
    return xp.reshape(best_low, shape), xp.reshape(best_high, shape)


def _error(x: Array, lo: Array, hi: Array, unit: Array, scheme: Scheme, norm: float) -> Array:
    """Σ |(x̂ − x)/(2 unit)|^norm over each of the ranges lo, hi, unit, one axis each.

    In halves, because x̂ may lie a step beyond the largest number: −8 steps of 2a/15 are
    more than a. An error of more than 1024 steps (AWQ's rule, whose range need not hold
    zero) counts as 1024: no candidate is of use then.
    """
    xp = namespace(x)
    shape = scheme.scale_shape(tuple(x.shape))
    step, zero_point = range_to_qparams(lo, hi, scheme)
    scale, half, zero_point = (xp.reshape(v, shape) for v in (step, 0.5 * step, zero_point))
    codes = quantize_codes(x, scale, zero_point, scheme, check=scheme.rule == "awq")
    e = dequantize_codes(codes, half, zero_point, scheme) - 0.5 * x
    if scheme.granularity == "block":  # a ragged edge is filled up with nothing
        rows, columns = scheme.block
        e = xp.concat([e, xp.zeros((-e.shape[0] % rows, e.shape[1]), dtype=e.dtype)], axis=0)
        e = xp.concat([e, xp.zeros((e.shape[0], -e.shape[1] % columns), dtype=e.dtype)], axis=1)
    blocks = scheme.geometry.as_blocks(e)
    steps = xp.reshape(unit, (blocks.shape[0], 1, blocks.shape[2], 1))
    return xp.reshape(
        xp.sum(xp.abs(reachable(blocks, steps) / steps) ** norm, axis=(1, 3)), unit.shape
    )
