"""Observers: they see a tensor batch by batch, and return the range [lo, hi] that a quantiser
should cover.

| observer      | range                                             | batch order matters        |
|---------------|---------------------------------------------------|----------------------------|
| MinMax        | smallest to largest value                         | no                         |
| MovingAverage | running mean of each batch's extremes, c = 0.01   | yes: the first weighs most |
| MSE           | the extremes shrunk so that Σ|x̂ − x|^2.4 is least | yes: the same mean         |
| Percentile    | cuts off the largest 0.01 % of magnitudes         | if the first sets the bins |
| Entropy       | the cut with the least KL divergence              | if the first sets the bins |

A narrower range clips more values and rounds the others more finely: clipping error is traded
for rounding error. ``range()`` goes to ``formats.uniform.range_to_qparams``, which applies a
scheme's rule (``qparams(scheme)`` does both).

Sources: torch.ao.quantization (MinMaxObserver, MovingAverageMinMaxObserver);
llm-compressor's observers ``minmax`` and ``mse`` (see ``mse_range``); NVIDIA's modelopt
(Percentile, Entropy: see ``histogram``).

| symbol | name    | shape                                      |
|--------|---------|--------------------------------------------|
| x      | a batch | any; x[T, N] for activations               |
| lo, hi | range   | (); with ``axis`` [N]; as a scheme's scale |

Left out: torch's HistogramObserver (a greedy search on a histogram that is resampled when
it grows), two-sided percentiles, skipping zeros by value (``Percentile(skip_zeros=True)``
leaves them out of the count), merging observers of several processes.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.formats.uniform import Scheme, range_to_qparams, require_finite
from refllm.quant.histogram import count_bins, entropy_cut, percentile_cut
from refllm.quant.mse_range import mse_range

__all__ = [
    "MSE",
    "Entropy",
    "Histogram",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "mse_range",
]

MOST_BINS = 1 << 22  # of a histogram that grows: 32 MB of counts


class Observer:
    """Base of all observers. ``axis`` keeps one axis (−1: the input channels of x[T, N]); None
    is one range. ``name`` is the tensor's, for messages.
    """

    def __init__(self, *, axis: int | None = None, name: str = "x"):
        self.axis = axis
        self.name = name
        self.batches = 0
        # with an axis of length 1 where ``range`` has none: NumPy makes scalars of 0-d arrays
        self.lo: Array | None = None
        self.hi: Array | None = None

    def observe(self, x: Array) -> None:
        """Add one batch; an empty one changes nothing.

        Raises
        ------
        ValueError
            naming the tensor, if a value is not finite: the batch is then ignored.
        """
        if x.size:
            self._add(x, *_extremes(x, self.axis, self.name))
            self.batches += 1

    def _add(self, x: Array, lo: Array, hi: Array) -> None:
        """Add a batch with the extremes lo, hi, both of the shape of ``self.lo``."""
        raise NotImplementedError

    def range(self) -> tuple[Array, Array]:
        """(lo, hi), lo ≤ hi, in the dtype of what was observed.

        Raises
        ------
        ValueError
            if nothing was observed.
        """
        lo, hi = self._observed()
        return self._shaped(lo), self._shaped(hi)

    def _shaped(self, end: Array) -> Array:
        """One end of the range, () or [N]."""
        return namespace(end).reshape(end, () if self.axis is None else (end.size,))

    @property
    def absmax(self) -> Array:
        """max(|lo|, |hi|) of the range."""
        lo, hi = self.range()
        xp = namespace(lo, hi)
        return xp.asarray(xp.maximum(xp.abs(lo), xp.abs(hi)))

    def qparams(self, scheme: Scheme) -> tuple[Array, Array]:
        """(scale, zero point) of the range under a scheme's rule."""
        return range_to_qparams(*self.range(), scheme)

    def _observed(self) -> tuple[Array, Array]:
        """lo and hi so far; ValueError if there are none."""
        if self.lo is None or self.hi is None:
            raise InputError(f"{type(self).__name__}: no value of {self.name!r} was observed")
        return self.lo, self.hi


class MinMax(Observer):
    """From the smallest to the largest value. A single outlier sets the range.

    >>> import numpy as np
    >>> observer = MinMax()
    >>> for batch in ([1.0, -2.0], [5.0, 0.0]):
    ...     observer.observe(np.array(batch))
    >>> [float(end) for end in observer.range()]
    [-2.0, 5.0]
    """

    def _add(self, x: Array, lo: Array, hi: Array) -> None:
        xp = namespace(lo, hi)
        if self.lo is not None and self.hi is not None:
            lo = xp.minimum(self.lo, lo)
            hi = xp.maximum(self.hi, hi)
        self.lo = lo
        self.hi = hi


class MovingAverage(Observer):
    """m ← m + c (batch − m) for either end; the first batch sets m.

    After n batches the first has the weight (1 − c)^(n−1). With c = 0.01 that is more than
    all others together up to n = 69: the average was made for training, with many thousand
    batches.
    """

    def __init__(self, *, averaging: float = 0.01, axis: int | None = None, name: str = "x"):
        super().__init__(axis=axis, name=name)
        if not 0 < averaging <= 1:
            raise InputError(
                f"{type(self).__name__}: averaging lies within (0, 1], got {averaging}"
            )
        self.averaging = averaging

    def _add(self, x: Array, lo: Array, hi: Array) -> None:
        if self.lo is not None and self.hi is not None:
            lo = self._mean(self.lo, lo)
            hi = self._mean(self.hi, hi)
        self.lo = lo
        self.hi = hi

    def _mean(self, old: Array, new: Array) -> Array:
        """In halves, because the difference of two values can overflow; otherwise bit for bit
        that of torch.
        """
        return 2.0 * (0.5 * old + self.averaging * (0.5 * new - 0.5 * old))


class MSE(MovingAverage):
    """The ranges of ``mse_range``, averaged over batches as ``MovingAverage`` does
    (``averaging=1``: the last one).
    """

    def __init__(self, scheme: Scheme, *, averaging: float = 0.01, name: str = "x", **search: Any):
        super().__init__(averaging=averaging, name=name)
        self.scheme = scheme
        self.search = search

    def _add(self, x: Array, lo: Array, hi: Array) -> None:
        low, high = mse_range(x, self.scheme, name=self.name, **self.search)
        self.shape = tuple(low.shape)
        xp = namespace(low, high)
        super()._add(x, xp.reshape(low, (low.size,)), xp.reshape(high, (high.size,)))

    def _shaped(self, end: Array) -> Array:
        """One end of the ranges, shaped like the scheme's scale."""
        return namespace(end).reshape(end, self.shape)


class Histogram(MinMax):
    """Counts of |x|: ``counts[bins]`` and the ``width`` of a bin. Its range is that of ``MinMax``.

    With ``top`` given, bins are top/bins wide from the start, and the counts do not depend
    on the order of the batches, nor on how the data is cut into them. Otherwise they do: the
    first batch with a non-zero value sets the width, and its largest value is counted in its
    last bin, as in modelopt. Larger values add bins.
    """

    def __init__(self, *, bins: int = 2048, top: float | None = None, name: str = "x"):
        super().__init__(name=name)
        if bins < 2 or (top is not None and not 0 < top < math.inf):
            raise InputError(
                f"{type(self).__name__}: needs two bins and a finite top above 0, got {bins} and "
                f"{top}"
            )
        self.bins = bins
        self.width = None if top is None else top / bins
        self.preset = top is not None
        self.zeros = 0  # values seen before the width was set, all of them zero
        self.counts: Array | None = None

    def _add(self, x: Array, lo: Array, hi: Array) -> None:
        top = self._top(lo, hi)
        if self.width is None and top == 0:
            self.zeros += x.size
        else:
            self._count(x, top)
        super()._add(x, lo, hi)

    def _count(self, x: Array, top: float) -> None:
        """Add |x| to the counts; ``top`` is the largest."""
        xp = namespace(x)
        if self.width is None:
            self.width = max(top / self.bins, sys.float_info.min)
        bins = max(self.bins, self._bins_up_to(top / self.width))
        if bins > MOST_BINS:
            raise InputError(
                f"{type(self).__name__}: {self.name!r} reaches {top:.3g}: too many bins of the "
                f"first batch's width; pass top={top:.3g}"
            )
        counts = count_bins(xp.abs(x), self.width, bins)
        if self.counts is None:
            counts[0] += self.zeros
        else:
            counts[: self.bins] += self.counts
        self.counts = counts
        self.bins = bins

    @staticmethod
    def _top(lo: Array, hi: Array) -> float:
        """The largest magnitude of a range."""
        return max(-float(lo[0]), float(hi[0]))

    def _bins_up_to(self, bin: float) -> int:
        """The number of bins that a value of ``bin`` widths needs. With a preset width bins
        are half-open, because only then the counts are independent of the order.
        """
        if self.preset:
            return math.floor(bin) + 1
        return math.ceil(bin)

    @property
    def amax(self) -> float:
        """Where |x| is cut; 0 if all values were zero."""
        lo, hi = self._observed()
        if self.width is None or not self._top(lo, hi) > 0:
            return 0.0
        return self._cut() * self.width

    def _cut(self) -> int:
        """The number of bins that are kept, counted from zero."""
        return self.bins

    def range(self) -> tuple[Array, Array]:
        """From the smallest to the largest value, cut at ±``amax``."""
        lo, hi = self._observed()
        xp = namespace(lo, hi)
        amax = self.amax
        lo = xp.clip(lo, -amax, amax)
        hi = xp.clip(hi, -amax, amax)
        return self._shaped(lo), self._shaped(hi)


class Percentile(Histogram):
    """Cuts at the left edge of the bin in which ``percentile`` % of the magnitudes are
    reached. ``skip_zeros`` does not count zeros.
    """

    def __init__(
        self,
        percentile: float = 99.99,
        *,
        bins: int = 2048,
        top: float | None = None,
        skip_zeros: bool = False,
        name: str = "x",
    ):
        super().__init__(bins=bins, top=top, name=name)
        self.percentile = percentile
        self.skip_zeros = skip_zeros
        self.exact_zeros = 0

    def _add(self, x: Array, lo: Array, hi: Array) -> None:
        xp = namespace(x)
        super()._add(x, lo, hi)
        self.exact_zeros += int(xp.sum(xp.astype(x == 0, xp.int64)))

    def _cut(self) -> int:
        counts = self.counts
        assert counts is not None
        if self.skip_zeros:
            counts = counts.copy()
            counts[0] -= self.exact_zeros
        # if the percentile is reached in the first bin, modelopt's range is [0, 0] and the whole
        # tensor is lost: keep one bin
        return max(1, percentile_cut(counts, self.percentile))


class Entropy(Histogram):
    """Cuts where the quantised distribution has the least relative entropy (see
    ``histogram.entropy_cut``).
    """

    def __init__(
        self,
        bits: int = 8,
        *,
        unsigned: bool = False,
        start: int = 128,
        bins: int = 2048,
        top: float | None = None,
        name: str = "x",
    ):
        super().__init__(bins=bins, top=top, name=name)
        self.levels = 1 << (bits - 1 + unsigned)
        self.start = start

    def _cut(self) -> int:
        counts = self.counts
        assert counts is not None
        if not int(namespace(counts).sum(counts[1:])):
            return self.bins  # all values are in the first bin: nothing is cut
        return entropy_cut(counts, levels=self.levels, start=self.start)


def _extremes(x: Array, axis: int | None, name: str) -> tuple[Array, Array]:
    """Smallest and largest value of all, [1], or of each index of ``axis``, with the other axes
    kept at length 1.
    """
    xp = namespace(x)
    flat = xp.reshape(x, (x.size,)) if axis is None else x
    others = tuple(i for i in range(flat.ndim) if axis is None or i != axis % x.ndim)
    lo = xp.min(flat, axis=others, keepdims=True)
    hi = xp.max(flat, axis=others, keepdims=True)
    if not bool(xp.all(xp.isfinite(lo) & xp.isfinite(hi))):  # min and max propagate NaN
        require_finite(x, name)
    return lo, hi
