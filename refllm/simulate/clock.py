"""How long the steps of a simulation take.

``UnitClock`` counts steps; ``measure.roofline_clock.RooflineClock`` projects their times for
a named device.
"""

from __future__ import annotations

from collections import abc
from typing import Protocol


class Clock(Protocol):
    """How long steps take, in seconds."""

    def step(self, batch: abc.Sequence[tuple[int, int]], rows: int) -> float:
        """A step over (past, new) of every row of the batch, with ``rows`` rows of logits."""

    def decode(self, pasts: abc.Sequence[int], count: int) -> abc.Sequence[float]:
        """``count`` steps of one token per sequence; ``pasts`` are cached before the first."""

    def move(self, tokens: int, blocks: int) -> float:
        """Moving keys and values between device and host, block by block."""


class UnitClock:
    """A clock for counting: each step takes one second, moving nothing."""

    def step(self, batch: abc.Sequence[tuple[int, int]], rows: int) -> float:
        """One second."""
        return 1.0

    def decode(self, pasts: abc.Sequence[int], count: int) -> abc.Sequence[float]:
        """One second each."""
        return [1.0] * count

    def move(self, tokens: int, blocks: int) -> float:
        """No time."""
        return 0.0
