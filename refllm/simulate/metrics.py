"""How well requests were served: the times of each, and the usual metrics over many.

Source: the definitions of ``vllm bench serve``, one by one; normalised latency as Kwon et
al. 2023 (after Orca); capacity as in DistServe, Zhong et al. 2024, where it is called
goodput.

| metric             | definition                                                    | unit |
|--------------------|---------------------------------------------------------------|------|
| TTFT               | first chunk − sent                                            | s    |
| E2EL               | last chunk − sent                                             | s    |
| ITL                | gaps between consecutive chunks, pooled over *all* requests   | s    |
| TPOT               | (E2EL − TTFT) / (O − 1) of a request with O > 1 output tokens | s    |
| throughput         | completed, Σ O, or Σ (P + O), each over the duration          | 1/s  |
| goodput            | completed requests that meet every limit, over the duration   | 1/s  |
| normalised latency | mean over requests of E2EL / O                                | s    |
| capacity           | the highest rate at which 90 % of the requests meet limits    | 1/s  |

Consequences that are easily missed: ITL percentiles are dominated by long answers, which
have most of the gaps; a chunk of several tokens (speculation) is one gap of ITL and several
tokens of TPOT; the duration includes the time in which the batch fills and drains, so few
requests understate the throughput; P + O counts tokens that were not generated. A request of
one token has no TPOT, and meets every limit on it.

Left out: the share of peak performance (``measure.roofline``), confidence intervals (take
several seeds).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import NamedTuple

import numpy as np

from refllm.errors import InputError


@dataclass
class Timeline:
    """One answer: when the request was sent, and when each chunk arrived, in seconds on any clock.

    >>> answer = Timeline(sent=1.0, prompt=5)
    >>> for time in (3.0, 3.5, 4.5):
    ...     answer.chunk(time)
    >>> answer.ttft, answer.gaps, answer.tpot, answer.e2el
    (2.0, [0.5, 1.0], 0.75, 3.5)
    """

    sent: float
    prompt: int = 0  # tokens
    times: list[float] = field(default_factory=list)  # one per chunk
    tokens: int = 0  # O, in all chunks
    completed: bool = False

    def chunk(self, time: float, tokens: int = 1) -> None:
        """``tokens`` arrived at ``time``, together."""
        self.times.append(time)
        self.tokens += tokens

    @property
    def ttft(self) -> float:
        """Time to the first token; ValueError before the first chunk."""
        return self._arrived()[0] - self.sent

    @property
    def e2el(self) -> float:
        """End-to-end latency; ValueError before the first chunk."""
        return self._arrived()[-1] - self.sent

    @property
    def gaps(self) -> list[float]:
        """The inter-token latencies: one fewer than chunks."""
        return [later - earlier for earlier, later in pairwise(self.times)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        if self.tokens > 1:
            return (self.e2el - self.ttft) / (self.tokens - 1)
        return None

    def meets(self, limits: Limits) -> bool:
        """Whether it was completed within every limit."""
        if not self.completed:
            return False
        if not self.times:  # no token was asked for, and none was late
            return True
        return (
            self.ttft <= limits.ttft
            and (self.tpot or 0.0) <= limits.tpot
            and self.e2el <= limits.e2el
        )

    def _arrived(self) -> list[float]:
        """The times, of which there must be one."""
        if not self.times:
            raise InputError("no chunk has arrived yet: there is no time to the first one")
        return self.times


class Limits(NamedTuple):
    """A service-level objective: seconds that an answer may take; infinity is no limit."""

    ttft: float = inf
    tpot: float = inf
    e2el: float = inf


class Spread(NamedTuple):
    """Mean and percentiles of a sample, interpolated as in ``numpy.percentile``."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def spread(sample: Sequence[float]) -> Spread | None:
    """The spread of a sample; None for an empty one."""
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
    total_throughput: float  # Σ (P + O); mostly prompts where answers are short
    goodput: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2el: Spread | None
    normalised_latency: float | None


def summarise(
    timelines: Iterable[Timeline], duration: float, limits: Limits | None = None
) -> Summary:
    """Timelines of all requests of a run that took ``duration`` seconds → their metrics. Only
    completed requests count.
    """
    if not 0 < duration < inf:
        raise InputError(f"a run takes a finite time above 0, got {duration} seconds")
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
    """Share of the requests that meet the limits; requests that were not completed do not.
    ValueError without any request.
    """
    met = [t.meets(limits) for t in timelines]
    if not met:
        raise InputError("no request: there is no share that meets the limits")
    return sum(met) / len(met)


def capacity(attained: Mapping[float, float], share: float = 0.9) -> float:
    """{rate: share that met the limits} → the rate at which this first falls below ``share``.

    Linear between two rates; 0 if even the lowest rate is too high, the highest if none is.

    >>> capacity({1: 1.0, 2: 1.0, 4: 0.8})
    3.0
    """
    if not attained or not 0 < share <= 1:
        raise InputError(
            "needs rates with their shares, and a share within (0, 1], "
            f"got {dict(attained)}, {share}"
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
    """Records when requests were sent and chunks arrived, of a simulation or an engine."""

    def __init__(self) -> None:
        self.timelines: dict[Hashable, Timeline] = {}

    def sent(self, name: Hashable, prompt: int, time: float) -> None:
        """A request, or a sequence of it, starts to wait."""
        self.timelines[name] = Timeline(time, prompt)

    def arrived(self, name: Hashable, tokens: int, time: float, *, ended: bool = False) -> None:
        """A chunk has arrived; without tokens only the end is noted."""
        line = self.timelines[name]
        if tokens:
            line.chunk(time, tokens)
        line.completed = line.completed or ended

    def summarise(self, duration: float, limits: Limits | None = None) -> Summary:
        """The metrics of all timelines."""
        return summarise(self.timelines.values(), duration, limits)
