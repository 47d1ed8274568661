"""What the steps of a simulation add up to.

| name      | meaning                                                                       |
|-----------|-------------------------------------------------------------------------------|
| used      | slots that hold the keys and values of a token; the rest of what is allocated |
|           | is reserved or wasted                                                         |
| saturated | steps with requests in the queue: the state of a server under full load       |

Left out: the times of requests (``simulate.metrics``).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from refllm.errors import InputError
from refllm.serve.plan import Plan
from refllm.serve.swapping import SwapTraffic
from refllm.simulate.metrics import Limits, Recorder, Summary


class ExecutedStep(NamedTuple):
    """A plan that was executed; a jump is one plan for several ``steps``."""

    plan: Plan
    steps: int
    start: float
    end: float
    # Tokens with keys and values after the last of the steps. A token that several sequences
    # share counts once for each.
    used: int
    allocated: int  # slots that sequences hold then


@dataclass
class StepTotals:
    """Sums over steps. ``batch``, ``utilisation`` and ``filled`` are means over steps;
    ValueError if there were none.
    """

    slots: int
    steps: int = 0
    rows: int = 0
    padding_rows: int = 0
    tokens: int = 0
    used: int = 0
    allocated: int = 0

    def add(self, executed: ExecutedStep) -> None:
        """Count a step, or the k steps of a jump."""
        plan = executed.plan
        k = executed.steps
        rows = len(plan.items)
        self.steps += k
        self.rows += k * rows
        self.padding_rows += k * len(plan.padding_rows)
        self.tokens += plan.tokens
        # within a jump ``used`` grows by one token per row and step
        self.used += k * executed.used - rows * (k * (k - 1) // 2)
        self.allocated += k * executed.allocated

    @property
    def batch(self) -> float:
        """Mean number of running requests."""
        return self.rows / self._num_steps()

    @property
    def utilisation(self) -> float:
        """Share of the memory that holds tokens."""
        return self.used / (self._num_steps() * self.slots)

    @property
    def filled(self) -> float:
        """Share of the allocated memory that holds tokens (of a jump: allocated at its end)."""
        self._num_steps()
        return self.used / self.allocated

    def _num_steps(self) -> int:
        if self.steps == 0:
            raise InputError(
                "no step was counted, so there is no mean: no request came, or none had to wait"
            )
        return self.steps


class SimulationResult(NamedTuple):
    """The outcome of a simulation."""

    recorder: Recorder
    duration: float
    all: StepTotals
    saturated: StepTotals
    preemptions: int
    moved: SwapTraffic
    cached: int  # prompt tokens found in a cache, of those queried
    queried: int
    tokens: dict[Hashable, list[int]]  # the output of each request's first sequence

    def summary(self, limits: Limits | None = None) -> Summary:
        """The metrics of ``simulate.metrics``."""
        return self.recorder.summarise(self.duration, limits)

    @property
    def hit_rate(self) -> float:
        """cached / queried; 0 without any request."""
        return self.cached / max(1, self.queried)
