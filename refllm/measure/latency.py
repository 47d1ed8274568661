"""The times of one streamed answer, as ``vllm bench serve`` defines them.

| symbol | name                                              | unit |
|--------|---------------------------------------------------|------|
| TTFT   | time to the first token: prefill and one sampling | s    |
| ITL    | gaps between consecutive tokens                   | s    |
| E2EL   | from the request to the last token                | s    |
| TPOT   | (E2EL − TTFT) / (O − 1), O output tokens          | s    |

By definition TTFT ≤ E2EL = TTFT + Σ ITL, and O = 1 + len(ITL) while each event carries one
token.

Left out: queueing (one request at a time), percentiles over many requests, goodput.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Stopwatch:
    """Notes when each token came. It starts when it is made; ``tick()`` is called for every
    token.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._start = clock()
        self._ticks: list[float] = []

    def tick(self, *_: object) -> None:
        """A token is there (arguments are passed over, so that this can be a callback of
        tokens).
        """
        self._ticks.append(self._clock())

    @property
    def tokens(self) -> int:
        """O, the number of ticks."""
        return len(self._ticks)

    @property
    def ttft(self) -> float:
        """NaN before the first token."""
        if self._ticks:
            return self._ticks[0] - self._start
        return math.nan

    @property
    def e2el(self) -> float:
        """NaN before the first token."""
        if self._ticks:
            return self._ticks[-1] - self._start
        return math.nan

    @property
    def gaps(self) -> list[float]:
        """ITL, one fewer than tokens."""
        return [b - a for a, b in zip(self._ticks, self._ticks[1:], strict=False)]

    @property
    def tpot(self) -> float:
        """Mean seconds a token after the first; NaN for fewer than two tokens."""
        if self.tokens > 1:
            return (self.e2el - self.ttft) / (self.tokens - 1)
        return math.nan

    @property
    def tokens_per_second(self) -> float:
        """1 / TPOT: the speed of decoding alone, without prefill; NaN for fewer than two
        tokens.
        """
        return 1.0 / self.tpot if self.tpot > 0 else math.nan
