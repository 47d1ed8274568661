"""Confidence intervals for means over tokens, by resampling blocks of neighbouring tokens.

Sources: Efron 1979 (the bootstrap); Künsch 1989 (blocks, since neighbours depend on each
other); the percentile interval, Efron & Tibshirani 1993, ch. 13. Paired: every statistic is
computed from the same resamples, and each statistic is itself a difference of two models on
one token, so what makes a token hard for both cancels.

| symbol | name                                           | shape       |
|--------|------------------------------------------------|-------------|
| x      | one value per token, for K statistics          | [K, T]      |
| U      | units that are drawn with replacement          |             |
| S, c   | sum of x over a unit, and its number of tokens | [K, U], [U] |

The statistic of a resample is Σ S / Σ c over the units drawn: a mean over tokens, however
unequal the units.

Left out: bias-corrected (BCa) and studentised intervals, overlapping blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refllm.errors import InputError

_AT_ONCE = 2_000_000  # entries of the table [resamples, U] that are held at one time


@dataclass(frozen=True)
class Interval:
    """A mean over tokens with the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.5f} [{self.low:.5f}, {self.high:.5f}]"


def blocks(documents: np.ndarray, size: int) -> np.ndarray:
    """Unit of every token: runs of ``size`` consecutive tokens that never cross from one
    document to the next.

    documents[T], the document of each token, in order → unit[T], numbered from 0 without
    gaps.

    >>> blocks(np.array([0, 0, 0, 1, 1]), size=2).tolist()
    [0, 0, 1, 2, 2]
    """
    if not 1 <= size == size // 1:
        raise InputError(
            f"blocks: a block has an integer number of tokens, at least one, got {size}"
        )
    if len(documents) == 0:  # mutate: equivalent (empty arrays broadcast below)
        return np.zeros(0, np.int64)
    begins = np.concatenate(([True], documents[1:] != documents[:-1]))
    # [T], index of the document's first token
    first = np.flatnonzero(begins)[np.cumsum(begins) - 1]
    starts = (np.arange(len(documents)) - first) % size == 0
    unit: np.ndarray = np.cumsum(starts) - 1
    return unit


def bootstrap_intervals(
    values: Sequence[np.ndarray],
    units: np.ndarray,
    rng: np.random.Generator,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> list[Interval]:
    """Mean and percentile interval of each of ``values`` (K arrays [T]), over resamples of
    the units[T].

    The simple version, for one statistic (with units numbered from 0)::

        for _ in range(resamples):
            drawn = rng.integers(0, U, U)
            estimates.append(sum(x[units == u].sum() for u in drawn)
                             / sum((units == u).sum() for u in drawn))
        low, high = np.quantile(estimates, [tail, 1 - tail])

    One unit says nothing about the spread between units: the interval is then (−∞, ∞).

    Raises
    ------
    ValueError
        if there is no token, a value is not finite, or ``resamples`` or ``confidence`` is
        out of range.
    """
    x = np.stack([np.asarray(v, np.float64) for v in values])  # [K, T]
    if x.shape[1] == 0 or x.shape[1] != len(units):
        raise InputError(f"bootstrap: {x.shape[1]} values for {len(units)} tokens")
    if not np.isfinite(x).all():
        raise InputError(
            f"bootstrap: value {int(np.argmin(np.isfinite(x).all(axis=0)))} is not finite"
        )
    if resamples < 1 or not 0 < confidence < 1:
        raise InputError(
            f"bootstrap: {resamples} resamples at confidence {confidence} make no interval"
        )
    names, unit = np.unique(units, return_inverse=True)
    count = len(names)
    sizes = np.bincount(unit, minlength=count).astype(np.float64)  # c[U]
    sums = np.stack([np.bincount(unit, weights=row, minlength=count) for row in x])  # S[K, U]
    mean = sums.sum(axis=1) / sizes.sum()
    if count == 1:
        return [Interval(float(m), -math.inf, math.inf) for m in mean]
    estimates = _resample(sums, sizes, rng, resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail], axis=0)
    return [Interval(*map(float, ends)) for ends in zip(mean, low, high, strict=True)]


def _resample(
    sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, resamples: int
) -> np.ndarray:
    """S[K, U], c[U] → the K statistics of every resample, [resamples, K]."""
    count = len(sizes)
    even = np.full(count, 1.0 / count)
    parts = []
    step = max(1, _AT_ONCE // count)  # mutate: equivalent (memory alone)
    for start in range(0, resamples, step):
        # how often each unit was drawn: U draws with replacement are one multinomial draw
        drawn = rng.multinomial(count, even, size=min(step, resamples - start)).astype(np.float64)
        parts.append((drawn @ sums.T) / (drawn @ sizes)[:, None])
    return np.concatenate(parts)
