"""The range with the least quantisation error: min-max, shrunk on a grid of factors.

Sources: llm-compressor's observers ``mse`` and ``memoryless_mse``; the ``mse=True`` of
GPTQ's authors. Both raise the errors to the power 2.4, which weighs large errors more than
the square does.

| symbol | name                                   | shape                      |
|--------|----------------------------------------|----------------------------|
| p      | shrinking factor, 1 − i/grid           |                            |
| lo, hi | range of the values that share a scale | the scale's: (), [M, 1], … |
| x̂     | x, quantised and dequantised           | as x                       |

Left out: different factors for the two ends, ranges wider than min-max (NVFP4), errors
weighted by importance.
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.errors import InputError
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
    """The range p·[min, max], p = 1, 1 − 1/grid, …, with the least Σ|x̂ − x|^norm.

    One search for each range of the scheme → lo, hi, shaped like its scale. Of equal errors
    the widest range wins, so the result is never worse than min-max (p = 1). The defaults are
    llm-compressor's: 20 candidates, and the search stops after ``patience`` candidates in a
    row that improved no range. GPTQ's authors try 80: ``max_shrink=0.8, patience=None``.

    Raises
    ------
    ValueError
        if there is no candidate, or as ``ranges``.

    >>> import numpy as np
    >>> x = np.array([1.0] * 14 + [1.2])  # codes −1, 0, 1: either 1.0 or 1.2 can be exact
    >>> _, high = mse_range(x, Scheme(2, "restricted", "tensor"))
    >>> round(float(high), 1)
    1.0
    """
    xp = namespace(x)
    count = int(max_shrink * grid)
    if not 1 <= count <= grid:
        raise InputError(
            f"mse_range: grid {grid} and max_shrink {max_shrink} leave no candidate, or one below "
            "p = 0"
        )
    low, high = ranges(x, scheme, name=name)
    shape = tuple(low.shape)
    low = xp.reshape(low, (low.size,))  # [R], one entry per range
    high = xp.reshape(high, (high.size,))
    best_low = low
    best_high = high
    # errors in units of the scale at p = 1: no power of them overflows
    unit, _ = range_to_qparams(low, high, scheme)
    best = xp.full(unit.shape, xp.inf, dtype=x.dtype)
    unimproved = 0  # candidates in a row
    for i in range(count):
        p = 1 - i / grid
        lo = p * low
        hi = p * high
        error = _error(x, lo, hi, unit, scheme, norm)
        better = error < best
        if not bool(xp.any(better)):
            unimproved += 1
            if patience is not None and unimproved >= patience:
                break
            continue
        unimproved = 0
        best = xp.where(better, error, best)
        best_low = xp.where(better, lo, best_low)
        best_high = xp.where(better, hi, best_high)
    return xp.reshape(best_low, shape), xp.reshape(best_high, shape)


def _error(x: Array, lo: Array, hi: Array, unit: Array, scheme: Scheme, norm: float) -> Array:
    """Σ |(x̂ − x)/(2 unit)|^norm over each of the ranges lo, hi, unit, all [R].

    In halves, because x̂ may lie a scale beyond the largest value: −8 scales of 2a/15 are more
    than a. An error of more than 1024 units (AWQ's rule, whose range need not contain zero)
    counts as 1024: such a candidate is useless anyway.
    """
    xp = namespace(x)
    shape = scheme.scale_shape(tuple(x.shape))
    scale, zero_point = range_to_qparams(lo, hi, scheme)
    half = xp.reshape(0.5 * scale, shape)
    scale = xp.reshape(scale, shape)
    zero_point = xp.reshape(zero_point, shape)
    codes = quantize_codes(x, scale, zero_point, scheme, check=scheme.rule == "awq")
    e = dequantize_codes(codes, half, zero_point, scheme) - 0.5 * x
    if scheme.granularity == "block":  # ragged blocks are padded with zero error
        rows, columns = scheme.block
        e = xp.concat([e, xp.zeros((-e.shape[0] % rows, e.shape[1]), dtype=e.dtype)], axis=0)
        e = xp.concat([e, xp.zeros((e.shape[0], -e.shape[1] % columns), dtype=e.dtype)], axis=1)
    blocks = scheme.geometry.as_blocks(e)  # [row blocks, rows, column blocks, columns]
    units = xp.reshape(unit, (blocks.shape[0], 1, blocks.shape[2], 1))
    errors = xp.abs(reachable(blocks, units) / units) ** norm
    return xp.reshape(xp.sum(errors, axis=(1, 3)), unit.shape)
