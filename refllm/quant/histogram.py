"""Histograms of magnitudes, and where to cut them: by percentile, or by the relative entropy
of the quantised distribution.

Sources: Migacz 2017, "8-bit inference with TensorRT" (the entropy method), as NVIDIA's
modelopt (formerly pytorch-quantization) computes both:
``modelopt.torch.quantization.calib.histogram``. The tests contain golden values of it.

| symbol | name                                                                 | shape  |
|--------|----------------------------------------------------------------------|--------|
| h      | counts: h[k] magnitudes lie in [k·w, (k+1)·w), the last bin closed   | [bins] |
| w      | width of a bin                                                       |        |
| i      | candidate: the range ends at i·w, start ≤ i ≤ bins                   | [C]    |
| ℓ      | levels, 2^(b−1): the codes of one sign                               |        |
| p      | h[:i], with all counts beyond it added to its last bin               | [i]    |
| q      | h[:i] after ℓ codes: each level's count shared by its non-empty bins | [i]    |

``entropy_cut`` needs Σ p log(p/q) of every candidate. As nested loops that takes bins²
operations; here every sum over bins is a difference of two prefix sums, so a table of C × ℓ
values is enough.

Left out: modelopt's "mse" cut (``mse_range`` searches on the values themselves), strides
other than 1, and modelopt's way of adding bins (its edges drift from k·w as float32 sums do;
here the width is exact).
"""

from __future__ import annotations

import math

from refllm.backend import Array, namespace
from refllm.errors import InputError

_AT_ONCE = 1 << 20  # entries of the table [candidates, levels] in memory at one time


def count_bins(magnitudes: Array, width: float, bins: int) -> Array:
    """Count values in [0, bins·width] in bins of ``width`` → h[bins], int64. Any shape; the
    order does not matter.

    The bin is exactly ⌊x/w⌋ in float64, so that the counts do not depend on the library, nor
    on how the data is cut into batches.

    >>> import numpy as np
    >>> count_bins(np.array([0.0, 0.9, 1.0, 3.0]), width=1.0, bins=3).tolist()
    [2, 1, 1]
    """
    xp = namespace(magnitudes)
    index = xp.astype(xp.reshape(magnitudes, (-1,)), xp.float64) / width
    # the top edge belongs to the last bin
    index = xp.astype(xp.clip(index, 0, bins - 1), xp.int64)
    return xp.astype(xp.bincount(index, minlength=bins), xp.int64)


def percentile_cut(counts: Array, percentile: float) -> int:
    """The bin k in which the cumulative count first reaches ``percentile`` %; k·w, its
    *left* edge, is the cut.

    Less than that share of the data lies below k·w; with 100, all except the last non-empty
    bin.

    Raises
    ------
    ValueError
        for a percentile outside [0, 100], or counts that are all zero.

    >>> import numpy as np
    >>> percentile_cut(np.array([90, 5, 4, 1]), 99)
    2
    """
    xp = namespace(counts)
    if not 0 <= percentile <= 100:
        raise InputError(f"a percentile lies within 0..100, got {percentile}")
    reached = xp.astype(xp.cumulative_sum(counts), xp.float64)  # integers below 2^53: exact
    if not float(reached[-1]) > 0:
        raise InputError("percentile of a histogram without a count")
    return int(xp.sum(xp.astype(reached < percentile / 100 * reached[-1], xp.int64)))


def entropy_cut(counts: Array, *, levels: int = 128, start: int = 128) -> int:
    """The i ≥ ``start`` with the smallest KL(p ‖ q), the largest of equal ones; i·w is the
    cut. Divergences that differ by less than what rounding can add are equal.

    With ``start`` bins or fewer there is nothing to choose: the result is their number. The
    count of bin 0 is replaced by that of bin 1, as in modelopt: a spike of zeros (ReLU) costs
    nothing in any range, but would dominate the divergence.

    Raises
    ------
    ValueError
        if there are fewer than two bins, or no count outside bin 0.
    """
    xp = namespace(counts)
    bins = int(counts.shape[0])
    if bins < 2:
        raise InputError("entropy of a histogram of fewer than two bins")
    if bins <= start:
        return bins
    h = xp.astype(xp.concat([counts[1:2], counts[1:]]), xp.float64)
    total = float(xp.sum(h))
    if not total > 0:
        raise InputError("entropy of a histogram without a count outside bin 0")
    count = max(1, _AT_ONCE // levels)
    parts = [
        _divergences(h, levels, low, min(low + count, bins + 1))
        for low in range(start, bins + 1, count)
    ]
    divergence = xp.concat(parts)  # [C]
    # two prefix sums of up to ``bins`` terms, each term at most log(total) after the division
    rounding = 4 * bins * (1 + math.log(total)) * float(xp.finfo(xp.float64).eps)
    equal = xp.flip(divergence) <= xp.min(divergence) + rounding
    return bins - int(xp.argmax(xp.astype(equal, xp.int64)))  # the last of equal ones


def _divergences(h: Array, levels: int, low: int, high: int) -> Array:
    """KL(p ‖ q) of the candidates low ≤ i < high, from h[bins] as float64 → [C]."""
    xp = namespace(h)
    before = _prefix(h)
    filled = _prefix(xp.astype(h > 0, xp.float64))
    log_h = xp.log(xp.where(h > 0, h, 1.0))
    i = xp.arange(low, high, dtype=xp.int64)
    # level L of candidate i holds the bins k with ⌊ℓ·k/i⌋ = L, that is ⌈L·i/ℓ⌉ ≤ k < ⌈(L+1)·i/ℓ⌉
    edges = (
        i[:, None] * xp.arange(levels + 1, dtype=xp.int64) + (levels - 1)
    ) // levels  # [C, ℓ+1]
    mass = before[edges[:, 1:]] - before[edges[:, :-1]]  # [C, ℓ]
    width = filled[edges[:, 1:]] - filled[edges[:, :-1]]  # non-empty bins of each level, [C, ℓ]
    # log of the share of each non-empty bin of the level
    log_q = xp.log(xp.where(mass > 0, mass, 1.0) / xp.maximum(width, 1.0))
    total = before[-1]
    beyond = total - before[i]
    last = h[i - 1]
    # Σ p log p: the last bin also holds the counts beyond the range
    clipped = last + beyond
    p_log_p = _prefix(h * log_h)[i - 1] + clipped * xp.log(xp.where(clipped > 0, clipped, 1.0))
    of_last = xp.take_along_axis(log_q, (levels * (i - 1) // i)[:, None], axis=1)[:, 0]
    p_log_q = xp.sum(mass * log_q, axis=1) + beyond * of_last
    divergence = (
        (p_log_p - p_log_q) / total
        - xp.log(total)
        + xp.log(xp.where(before[i] > 0, before[i], 1.0))
    )
    # an empty last bin that gets the counts beyond the range: p > 0 where q = 0
    impossible = ((last == 0) & (beyond > 0)) | (before[i] == 0)
    return xp.where(impossible, xp.inf, divergence)


def _prefix(x: Array) -> Array:
    """Sums of the first 0, 1, …, n entries; [n] → [n+1]."""
    xp = namespace(x)
    return xp.concat([xp.zeros_like(x[:1]), xp.cumulative_sum(x)])
