"""Histograms of magnitudes, and where to cut them: by percentile, and by the entropy that
coarse codes lose.

Sources: Migacz 2017, "8-bit inference with TensorRT" (the entropy method), as NVIDIA's
modelopt (pytorch-quantization before it) computes both:
``modelopt.torch.quantization.calib.histogram``. Golden values of it are in the tests.

| symbol   | name                                                               | shape        |
|----------|--------------------------------------------------------------------|--------------|
| h        | counts: h[k] magnitudes lie in [k·w, (k+1)·w), the last bin closed | [bins]       |
| w        | width of a bin                                                     |              |
| i        | candidate: the range would end at i·w                              | [C], start … bins |
| ℓ        | levels, 2^(b−1): the codes of one sign                             |              |
| p        | h[:i] with all that lies beyond added to its last bin              | [i]          |
| q        | h[:i] after ℓ codes: each level's count shared by its non-empty bins | [i]        |

``entropy_cut`` asks for Σ p log(p/q) of every candidate. Written as loops that is bins²
steps; here every sum over bins is a difference of two prefix sums, so C × ℓ numbers are
enough.

Left out: modelopt's "mse" cut (``observers.mse_range`` searches on the numbers themselves),
strides other than 1, its way of growing (its edges drift from k·w as float32 sums do; here
the width is kept exactly).
"""

from __future__ import annotations

from refllm.backend import Array, namespace

_AT_ONCE = 1 << 20  # numbers of the table [candidates, levels] held at one time


def count_bins(magnitudes: Array, width: float, bins: int) -> Array:
    """Count numbers in [0, bins·width] by bins of ``width`` → h[bins], int64. Any shape;
    the order does not matter.

    Exactly ⌊x/w⌋ in float64, so that two libraries, and two ways to cut the data into
    batches, count the same.
    """
    xp = namespace(magnitudes)
    index = xp.astype(xp.reshape(magnitudes, (-1,)), xp.float64) / width
    # the top edge belongs to the last bin; clipped before the cast, as always
    index = xp.astype(xp.clip(index, 0, bins - 1), xp.int64)
    return xp.astype(xp.bincount(index, minlength=bins), xp.int64)


def percentile_cut(counts: Array, percentile: float) -> int:
    """The bin k in which the cumulative count first reaches ``percentile`` %; k·w, its
    *left* edge, is the cut.

    Below k·w lies less than that share of the data; with 100 all of it but the last
    non-empty bin.

    Raises
    ------
    ValueError
        for a percentile outside [0, 100], or counts that are all zero.
    """
    xp = namespace(counts)
    if not 0 <= percentile <= 100:
        raise ValueError(f"a percentile lies within 0..100, got {percentile}")
    reached = xp.astype(xp.cumulative_sum(counts), xp.float64)  # whole numbers below 2^53: exact
    if not float(reached[-1]) > 0:
        raise ValueError("percentile of a histogram without a count")
    return int(xp.sum(xp.astype(reached < percentile / 100 * reached[-1], xp.int64)))


def entropy_cut(counts: Array, *, levels: int = 128, start: int = 128) -> int:
    """The i ≥ ``start`` with the smallest KL(p ‖ q), of equal ones the largest; i·w is the
    cut.

    ``start`` bins or fewer leave nothing to choose from: then it is their number. The count
    of bin 0 is replaced by that of bin 1, as upstream does: a spike of zeros (ReLU) costs
    nothing in any range, and would decide it.

    Raises
    ------
    ValueError
        if there are fewer than two bins, or no count outside bin 0.
    """
    xp = namespace(counts)
    bins = int(counts.shape[0])
    if bins < 2:
        raise ValueError("entropy of a histogram of fewer than two bins")
    if bins <= start:
        return bins
    h = xp.astype(xp.concat([counts[1:2], counts[1:]]), xp.float64)
    if not float(xp.sum(h)) > 0:
        raise ValueError("entropy of a histogram without a count outside bin 0")
    step = max(1, _AT_ONCE // levels)
    parts = [
        _divergences(h, levels, low, min(low + step, bins + 1))
        for low in range(start, bins + 1, step)
    ]
    divergence = xp.concat(parts)  # [C]
    return bins - int(xp.argmin(xp.flip(divergence)))  # the first from behind is the last


def _divergences(h: Array, levels: int, low: int, high: int) -> Array:
    """KL(p ‖ q) of the candidates low ≤ i < high, from h[bins] as float64 → [C]."""
    xp = namespace(h)
    before = _prefix(h)
    filled = _prefix(xp.astype(h > 0, xp.float64))
    log_h = xp.log(xp.where(h > 0, h, 1.0))
    i = xp.arange(low, high, dtype=xp.int64)
    # level L of candidate i holds the bins k with ⌊ℓ·k/i⌋ = L, that is ⌈L·i/ℓ⌉ ≤ k <
    # ⌈(L+1)·i/ℓ⌉ [C, ℓ+1]
    edges = (i[:, None] * xp.arange(levels + 1, dtype=xp.int64) + (levels - 1)) // levels
    mass = before[edges[:, 1:]] - before[edges[:, :-1]]
    width = filled[edges[:, 1:]] - filled[edges[:, :-1]]
    # of each non-empty bin of the level
    log_q = xp.log(xp.where(mass > 0, mass, 1.0) / xp.maximum(width, 1.0))
    total = before[-1]
    beyond = total - before[i]
    last = h[i - 1]
    # Σ p log p: all bins but the last as they are, the last with what lies beyond
    clipped = last + beyond
    p_log_p = _prefix(h * log_h)[i - 1] + clipped * xp.log(xp.where(clipped > 0, clipped, 1.0))
    of_last = xp.take_along_axis(log_q, (levels * (i - 1) // i)[:, None], axis=1)[:, 0]
    p_log_q = xp.sum(mass * log_q, axis=1) + beyond * of_last
    divergence = (
        (p_log_p - p_log_q) / total
        - xp.log(total)
        + xp.log(xp.where(before[i] > 0, before[i], 1.0))
    )
    # an empty last bin that is given what lies beyond: p > 0 where q = 0
    impossible = ((last == 0) & (beyond > 0)) | (before[i] == 0)
    return xp.where(impossible, xp.inf, divergence)


def _prefix(x: Array) -> Array:
    """Sums of the first 0, 1, …, n numbers; [n] → [n+1]."""
    xp = namespace(x)
    return xp.concat([xp.zeros_like(x[:1]), xp.cumulative_sum(x)])
