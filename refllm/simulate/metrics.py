"""How well requests were served: the times of each, and what is usually reported of many.

Source: the definitions of ``vllm bench serve``, one by one; normalised latency as Kwon et
al. 2023 (after Orca); capacity as DistServe, Zhong et al. 2024, means its goodput.

| symbol             | definition                                                                           | unit |
|--------------------|--------------------------------------------------------------------------------------|------|
| TTFT               | first chunk − sent                                                                   | s    |
| E2EL               | last chunk − sent                                                                    | s    |
| ITL                | gaps between consecutive chunks, pooled over *all* requests                          | s    |
| TPOT               | (E2EL − TTFT) / (O − 1) of a request with O > 1 output tokens                        | s    |
| throughput         | completed, Σ O, or Σ (P + O), each over the duration                                 | 1/s  |
| goodput            | completed requests that meet every limit given, over the duration                    | 1/s  |
| normalised latency | mean over requests of E2EL / O                                                       | s    |
| capacity           | the highest rate at which at least 90 % of the requests meet the limits              | 1/s  |

What follows from the definitions, and is easily misread: ITL percentiles are those of long
answers, which have most of the gaps; a chunk of several tokens (speculation) is one gap of
ITL and several tokens of TPOT; the duration is the whole run with its filling and its
draining, so that few requests understate the throughput; P + O counts tokens that were not
generated. A request of one token has no TPOT, and meets every limit on it.

Left out: the share of the peak that was used (``measure.roofline``), confidence intervals
(take several seeds).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import numpy as np


@dataclass
class Timeline:
    """One answer: when it was asked for, and when each chunk of it came. Seconds on any
    clock.
    """

    sent: float
    prompt: int = 0  # tokens asked
    times: list[float] = field(default_factory=list)  # one a chunk
    tokens: int = 0  # O, in all chunks
    completed: bool = False

    def chunk(self, time: float, tokens: int = 1) -> None:
        """``tokens`` came at ``time``, together."""
        self.times.append(time)
        self.tokens += tokens

    @property
    def ttft(self) -> float:
        """ValueError before the first chunk."""
        return self._came()[0] - self.sent

    @property
    def e2el(self) -> float:
        """ValueError before the first chunk."""
        return self._came()[-1] - self.sent

    @property
    def gaps(self) -> list[float]:
        """ITL: one fewer than chunks."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """None for a single token, which nothing follows."""
        if self.tokens > 1:
            return (self.e2el - self.ttft) / (self.tokens - 1)
        return None

    def meets(self, limits: Limits) -> bool:
        """Whether it was completed within every limit."""
        if not self.completed:
            return False
        if not self.times:  # nothing was asked for, and nothing was late
            return True
        return (
            self.ttft <= limits.ttft
            and (self.tpot or 0.0) <= limits.tpot
            and self.e2el <= limits.e2el
        )

    def _came(self) -> list[float]:
        if not self.times:
            raise ValueError("no chunk has come yet: there is no time to the first one")
        return self.times


class Limits(NamedTuple):
    """A service-level objective: seconds that an answer may take; infinity is no limit."""

    ttft: float = inf
    tpot: float = inf
    e2el: float = inf


class Spread(NamedTuple):
    """Mean and percentiles of a sample; percentiles lie between neighbours as
    ``numpy.percentile`` has it.
    """

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def spread(sample: Sequence[float]) -> Spread | None:
    """None for an empty sample."""
    if not len(sample):
        return None
    values = np.asarray(sample, dtype=np.float64)
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Spread(float(values.mean()), p50, p90, p99, float(values.max()))


@dataclass(frozen=True)
class Summary:
    """What ``summarise`` reports; rates per second, times in seconds."""

    requests: int
    completed: int
    duration: float
    request_throughput: float
    output_throughput: float  # Σ O
    # Σ (P + O): the larger number, of which prompts are most where answers are short
    total_throughput: float
    goodput: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2el: Spread | None
    normalised_latency: float | None


def summarise(
    timelines: Iterable[Timeline], duration: float, limits: Limits | None = None
) -> Summary:
    """Timelines of all requests of a run that took ``duration`` seconds → the report. Only
    completed ones count.
    """
    if not 0 < duration < inf:
        raise ValueError(f"a run takes a finite time above 0, got {duration} seconds")
    every = list(timelines)
    done = [t for t in every if t.completed]
    answered = [t for t in done if t.times]
    output = sum(t.tokens for t in done)
    prompt = sum(t.prompt for t in done)
    normalised = [t.e2el / t.tokens for t in answered]
    return Summary(
        requests=len(every),
        completed=len(done),
        duration=duration,
        request_throughput=len(done) / duration,
        output_throughput=output / duration,
        total_throughput=(prompt + output) / duration,
        goodput=sum(t.meets(limits or Limits()) for t in done) / duration,
        ttft=spread([t.ttft for t in answered]),
        tpot=spread([t.tpot for t in answered if t.tpot is not None]),
        itl=spread([gap for t in answered for gap in t.gaps]),
        e2el=spread([t.e2el for t in answered]),
        normalised_latency=sum(normalised) / len(normalised) if normalised else None,
    )


def attainment(timelines: Iterable[Timeline], limits: Limits) -> float:
    """Share of the requests that meet the limits; those that were not completed do not.
    ValueError for none.
    """
    met = [t.meets(limits) for t in timelines]
    if not met:
        raise ValueError("no request: no share of them meets anything")
    return sum(met) / len(met)


def capacity(attained: Mapping[float, float], share: float = 0.9) -> float:
    """{rate: share that met the limits} → the highest rate before the first at which less
    than ``share`` did.

    Between two rates the share is taken to be linear; 0 if the lowest rate is too high
    already.
    """
    if not attained or not 0 < share <= 1:
        raise ValueError(
            f"needs rates with their shares, and a share within (0, 1], got {dict(attained)}, {share}"
        )
    before: tuple[float, float] | None = None
    for rate, met in sorted(attained.items()):
        if met < share:
            if before is None:
                return 0.0
            low, above = before
            return low + (rate - low) * (above - share) / (above - met)
        before = rate, met
    return max(attained)


class Recorder:
    """Notes who was sent and what came when: of a simulation, or of an engine that streams."""

    def __init__(self) -> None:
        self.timelines: dict[Hashable, Timeline] = {}

    def sent(self, name: Hashable, prompt: int, time: float) -> None:
        """A request (or a sequence of one) begins to wait."""
        self.timelines[name] = Timeline(time, prompt)

    def came(self, name: Hashable, tokens: int, time: float, *, ended: bool = False) -> None:
        """A chunk; without tokens nothing but the end."""
        line = self.timelines[name]
        if tokens:
            line.chunk(time, tokens)
        line.completed = line.completed or ended

    def summarise(self, duration: float, limits: Limits | None = None) -> Summary:
        return summarise(self.timelines.values(), duration, limits)
