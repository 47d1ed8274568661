"""The times of one streamed answer, as ``vllm bench serve`` defines them.

| symbol | name                                              | unit |
|--------|---------------------------------------------------|------|
| TTFT   | time to the first token: prefill and one sampling | s    |
| ITL    | gaps between consecutive tokens                   | s    |
| E2EL   | from the request to the last token                | s    |
| TPOT   | (E2EL − TTFT) / (O − 1), O output tokens          | s    |

By definition TTFT ≤ E2EL = TTFT + Σ ITL, and O = 1 + len(ITL) while each tick is one token.

Left out: queueing (one request at a time), percentiles over many requests, goodput (see
``simulate.metrics``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise


class Stopwatch:
    """Records the time of each token. It starts when it is made; call ``tick()`` for every token.

    >>> watch = Stopwatch(clock=iter([10.0, 10.5, 10.7, 10.9]).__next__)
    >>> for token in range(3):
    ...     watch.tick(token)
    >>> watch.ttft, watch.tokens, round(watch.tpot, 3), round(watch.e2el, 3)
    (0.5, 3, 0.2, 0.9)
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._start = clock()
        self._ticks: list[float] = []

    def tick(self, *_: object) -> None:
        """Record a token. Arguments are ignored, so that this can be a callback of tokens."""
        self._ticks.append(self._clock())

    @property
    def tokens(self) -> int:
        """O, the number of ticks."""
        return len(self._ticks)

    @property
    def ttft(self) -> float:
        """Seconds to the first token; NaN before it."""
        if self._ticks:
            return self._ticks[0] - self._start
        return math.nan

    @property
    def e2el(self) -> float:
        """Seconds to the last token so far; NaN before the first."""
        if self._ticks:
            return self._ticks[-1] - self._start
        return math.nan

    @property
    def gaps(self) -> list[float]:
        """ITL: seconds between consecutive tokens, one fewer than tokens."""
        return [b - a for a, b in pairwise(self._ticks)]

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first; NaN for fewer than two tokens."""
        if self.tokens > 1:
            return (self.e2el - self.ttft) / (self.tokens - 1)
        return math.nan

    @property
    def tokens_per_second(self) -> float:
        """1 / TPOT: the speed of decoding alone, without prefill; NaN for fewer than two tokens."""
        if self.tpot > 0:
            return 1.0 / self.tpot
        return math.nan
