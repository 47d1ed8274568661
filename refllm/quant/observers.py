"""Observers: shown a tensor batch by batch, they say which range [lo, hi] a quantiser
should cover.

| observer      | range                                                      | depends on the order of the batches   |
|---------------|------------------------------------------------------------|---------------------------------------|
| MinMax        | everything seen                                            | no                                    |
| MovingAverage | running mean of each batch's extremes, c = 0.01            | yes: the first batch weighs most      |
| MSE           | the range scaled down so that Σ|x̂ − x|^2.4 is least        | yes: the same mean over batches       |
| Percentile    | cuts off the largest 0.01 % of magnitudes                  | only if the first batch sets the bins |
| Entropy       | cuts where codes tell least falsely how numbers are spread | only if the first batch sets the bins |

The more is cut off, the finer the steps for what is left: clipping error is traded for
rounding error. ``range()`` goes to ``formats.uniform.range_to_qparams``, which applies a
scheme's rule (``qparams(scheme)`` does both).

Sources: torch.ao.quantization (MinMaxObserver, MovingAverageMinMaxObserver);
llm-compressor's observers ``minmax`` and ``mse`` (see ``mse``); NVIDIA's modelopt
(Percentile, Entropy: see ``histogram``).

| symbol | name                                  | shape                                              |
|--------|---------------------------------------|----------------------------------------------------|
| x      | a batch                               | any; x[T, N] for activations                       |
| lo, hi | range                                 | () or, with ``axis``, [N]; of a scheme: its scale's |

Left out: torch's HistogramObserver (a greedy search on a histogram that is resampled when
it grows), two-sided percentiles, skipping zeros by value (``Percentile(skip_zeros=True)``
leaves them out of the count), joins between processes.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from refllm.backend import Array, namespace
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
    """What all have in common. ``axis`` keeps one axis (−1: the input channels of x[T, N]);
    None is one range.

    ``name`` is the tensor's, for messages.
    """

    def __init__(self, *, axis: int | None = None, name: str = "x"):
        self.axis = axis
        self.name = name
        self.batches = 0
        # with axes of length 1 where ``range`` has none: NumPy makes numbers of 0-d arrays
        self.lo: Array = None
        self.hi: Array = None

    def observe(self, x: Array) -> None:
        """Take in one batch; an empty one says nothing.

        Raises
        ------
        ValueError
            naming the tensor, if a number is not finite: nothing of the batch is taken in.
        """
        if x.size:
            self._take(x, *_extremes(x, self.axis, self.name))
            self.batches += 1

    def _take(self, x: Array, lo: Array, hi: Array) -> None:
        raise NotImplementedError

    def range(self) -> tuple[Array, Array]:
        """(lo, hi), lo ≤ hi, in the dtype of what was observed.

        Raises
        ------
        ValueError
            if nothing was observed.
        """
        self._check()
        return self._shaped(self.lo), self._shaped(self.hi)

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

    def _check(self) -> None:
        if not self.batches:
            raise ValueError(f"{type(self).__name__}: no number of {self.name!r} was observed")


class MinMax(Observer):
    """Everything seen lies in the range. One outlier decides."""

    def _take(self, x: Array, lo: Array, hi: Array) -> None:
        xp = namespace(lo, hi)
        self.lo = lo if self.lo is None else xp.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else xp.maximum(self.hi, hi)


class MovingAverage(Observer):
    """m ← m + c (batch − m) for either end; the first batch sets m.

    After n batches the first still weighs (1 − c)^(n−1), with c = 0.01 more than all others
    together up to n = 69: the average was made for training, where many thousand batches
    come.
    """

    def __init__(self, *, averaging: float = 0.01, axis: int | None = None, name: str = "x"):
        super().__init__(axis=axis, name=name)
        if not 0 < averaging <= 1:
            raise ValueError(
                f"{type(self).__name__}: averaging lies within (0, 1], got {averaging}"
            )
        self.averaging = averaging

    def _take(self, x: Array, lo: Array, hi: Array) -> None:
        if self.lo is None:
            self.lo = lo
            self.hi = hi
        else:
            self.lo, self.hi = self._mean(self.lo, lo), self._mean(self.hi, hi)

    def _mean(self, old: Array, new: Array) -> Array:
        """In halves, because the difference of two numbers can overflow; otherwise bit for
        bit torch's.
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

    def _take(self, x: Array, lo: Array, hi: Array) -> None:
        low, high = mse_range(x, self.scheme, name=self.name, **self.search)
        self.shape = tuple(low.shape)
        xp = namespace(low, high)
        super()._take(x, xp.reshape(low, (low.size,)), xp.reshape(high, (high.size,)))

    def _shaped(self, end: Array) -> Array:
        """One end of the ranges, shaped like the scheme's scale."""
        return namespace(end).reshape(end, self.shape)


class Histogram(MinMax):
    """Counts of |x|: ``counts[bins]`` and the ``width`` of a bin. Its range is that of
    ``MinMax``.

    With ``top`` given, bins are top/bins wide from the start, and the counts do not depend
    on the order of the batches, nor on how the data is cut into them. Otherwise the first
    batch with a non-zero number sets the width, and they do; its largest number is counted
    in its last bin, as upstream does. Larger numbers add bins.
    """

    def __init__(self, *, bins: int = 2048, top: float | None = None, name: str = "x"):
        super().__init__(name=name)
        if bins < 2 or (top is not None and not 0 < top < math.inf):
            raise ValueError(
                f"{type(self).__name__}: needs two bins and a finite top above 0, got {bins} and {top}"
            )
        self.bins = bins
        self.width = None if top is None else top / bins
        self.preset = top is not None
        self.zeros = 0  # seen while no number had set the width
        self.counts: Array = None

    def _take(self, x: Array, lo: Array, hi: Array) -> None:
        xp = namespace(x, lo, hi)
        top = self._top(lo, hi)
        if self.width is None and top == 0:
            self.zeros += x.size
        else:
            if self.width is None:
                self.width = max(top / self.bins, sys.float_info.min)
            bins = max(self.bins, self._bins_up_to(top / self.width))
            if bins > MOST_BINS:
                raise ValueError(
                    f"{type(self).__name__}: {self.name!r} reaches {top:.3g}: too many bins of the first "
                    f"batch's width; pass top={top:.3g}"
                )
            fresh = count_bins(xp.abs(x), self.width, bins)
            if self.counts is None:
                fresh[0] += self.zeros
            else:
                fresh[: self.bins] += self.counts
            self.counts = fresh
            self.bins = bins
        super()._take(x, lo, hi)

    @staticmethod
    def _top(lo: Array, hi: Array) -> float:
        return max(-float(lo[0]), float(hi[0]))

    def _bins_up_to(self, bin: float) -> int:
        """Bins that hold a number of ``bin`` widths. Half-open bins alone are independent
        of the order.
        """
        if self.preset:
            return math.floor(bin) + 1
        return math.ceil(bin)

    @property
    def amax(self) -> float:
        """Where |x| is cut; 0 if all was zero."""
        self._check()
        if self.width is None or not self._top(self.lo, self.hi) > 0:
            return 0.0
        return self._cut() * self.width

    def _cut(self) -> int:
        """Number of bins that are kept, counted from zero."""
        return self.bins

    def range(self) -> tuple[Array, Array]:
        """What was seen, cut at ±``amax``."""
        self._check()
        xp = namespace(self.lo, self.hi)
        amax = self.amax
        return self._shaped(xp.clip(self.lo, -amax, amax)), self._shaped(
            xp.clip(self.hi, -amax, amax)
        )


class Percentile(Histogram):
    """Cuts in the bin where ``percentile`` % of the magnitudes are reached, at its left
    edge.
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

    def _take(self, x: Array, lo: Array, hi: Array) -> None:
        xp = namespace(x)
        super()._take(x, lo, hi)
        self.exact_zeros += int(xp.sum(xp.astype(x == 0, xp.int64)))

    def _cut(self) -> int:
        counts = self.counts
        if self.skip_zeros:
            counts = counts.copy()
            counts[0] -= self.exact_zeros
        # where the crossing bin is the first, upstream's range is [0, 0] and all of the
        # tensor is lost: keep one bin
        return max(1, percentile_cut(counts, self.percentile))


class Entropy(Histogram):
    """Cuts where the codes' distribution has the least relative entropy (see
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
        if not int(namespace(self.counts).sum(self.counts[1:])):
            return self.bins  # bins too wide to tell anything apart: nothing is cut
        return entropy_cut(self.counts, levels=self.levels, start=self.start)


def _extremes(x: Array, axis: int | None, name: str) -> tuple[Array, Array]:
    """Smallest and largest number, of everything, [1], or of each index of ``axis``, other
    axes kept at length 1.
    """
    xp = namespace(x)
    flat = xp.reshape(x, (x.size,)) if axis is None else x
    others = tuple(i for i in range(flat.ndim) if axis is None or i != axis % x.ndim)
    lo = xp.min(flat, axis=others, keepdims=True)
    hi = xp.max(flat, axis=others, keepdims=True)
    if not bool(xp.all(xp.isfinite(lo) & xp.isfinite(hi))):  # min and max pass NaN on
        require_finite(x, name)
    return lo, hi
