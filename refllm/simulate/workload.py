"""Who asks for what, and when: lengths as measured on public traffic, and arrivals, without
any data set.

Sources: means of ShareGPT and Alpaca, Kwon et al. 2023, figure 11 (161/338 and 19/58
tokens), and the filter with which vLLM samples the former; the public traces of Azure's
language services of 2023, fitted in the logarithm; arrivals as ``vllm bench serve`` draws
them.

| symbol  | name                               | value                                                                |
|---------|------------------------------------|----------------------------------------------------------------------|
| P, O    | tokens of prompt and output        | rounded log-normals, cut to [low, high]                              |
| μ, σ    | of the logarithm                   | σ of ShareGPT and Alpaca is a free assumption: only means are known  |
| pmf     | probability of each length         | Φ((ln(x + ½) − μ)/σ) − Φ((ln(x − ½) − μ)/σ), over that of all        |
| k       | shape of the gaps between arrivals | Gamma(k, 1/(k · rate)): 1 is Poisson, below it bursts                |

Every length has its exact probabilities (``pmf``), so what follows for a batch can be
summed instead of sampled.

Left out: correlation of P and O (Azure's rank correlations are −0.02 and 0.07), the time of
day; Azure's code prompts beyond what a log-normal with their logarithm's mean and deviation
has (their mean is 2,048, here 1,559); rescaling of the arrivals to a fixed end, which vLLM
does and which is then no Poisson process any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import erf, inf, log, sqrt
from typing import Any, NamedTuple, Protocol

import numpy as np

from refllm.serve.request import Request

Lengths = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # P and O of each request


class Length(Protocol):
    """A distribution of lengths."""

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
        """count integers."""

    def pmf(self) -> np.ndarray[Any, Any]:
        """Probability of each length 0, 1, 2, …; sums to 1."""


@dataclass(frozen=True)
class LogNormal:
    """exp of a normal, kept if it lies within [low, high], then rounded."""

    mu: float
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and 1 <= self.low <= self.high):
            raise ValueError(f"a length needs sigma > 0 and 1 <= low <= high, got {self}")

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
        kept = np.empty(0)
        while len(kept) < count:
            x = np.exp(self.mu + self.sigma * rng.standard_normal(2 * count + 16))
            kept = np.concatenate([kept, x[(self.low <= x) & (x <= self.high)]])
        return np.rint(kept[:count]).astype(np.int64)

    def pmf(self) -> np.ndarray[Any, Any]:
        # cut first, rounded then
        edges = np.clip(np.arange(self.low, self.high + 2) - 0.5, self.low, self.high)
        below = np.array([_normal_cdf((log(x) - self.mu) / self.sigma) for x in edges])
        p = np.diff(below)
        return np.concatenate([np.zeros(self.low), p / p.sum()])


@dataclass(frozen=True)
class Mixture:
    """One of several distributions, by their weights."""

    parts: tuple[Length, ...]
    weights: tuple[float, ...]

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
        which = rng.choice(len(self.parts), count, p=self.weights)
        every = np.stack([part.sample(rng, count) for part in self.parts])
        return every[which, np.arange(count)]

    def pmf(self) -> np.ndarray[Any, Any]:
        each = [part.pmf() for part in self.parts]
        out = np.zeros(max(map(len, each)))
        for weight, p in zip(self.weights, each, strict=True):
            out[: len(p)] += weight * p
        return out


class Traffic(NamedTuple):
    """Lengths of prompts and outputs; together at most ``longest``, pairs beyond are drawn
    again.
    """

    prompt: Length
    output: Length
    longest: float = inf

    def sample(self, rng: np.random.Generator, count: int) -> Lengths:
        """(P[count], O[count])."""
        pairs = np.empty((2, 0), dtype=np.int64)
        while pairs.shape[1] < count:
            new = np.stack([self.prompt.sample(rng, count), self.output.sample(rng, count)])
            pairs = np.concatenate([pairs, new[:, new.sum(axis=0) <= self.longest]], axis=1)
        return pairs[0, :count], pairs[1, :count]

    def pmfs(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Probabilities of each P and of each O, those pairs that are too long taken out."""
        p = self.prompt.pmf()
        o = self.output.pmf()
        if self.longest == inf:
            return p, o
        at = int(self.longest)
        at_most_o = np.cumsum(o)
        at_most_p = np.cumsum(p)
        keep_p = (
            p
            * at_most_o[np.clip(at - np.arange(len(p)), 0, len(o) - 1)]
            * (np.arange(len(p)) <= at)
        )
        keep_o = (
            o
            * at_most_p[np.clip(at - np.arange(len(o)), 0, len(p) - 1)]
            * (np.arange(len(o)) <= at)
        )
        return keep_p / keep_p.sum(), keep_o / keep_o.sum()

    def means(self) -> tuple[float, float]:
        """E[P], E[O], exact."""
        p, o = self.pmfs()
        return float(p @ np.arange(len(p))), float(o @ np.arange(len(o)))


SHAREGPT = Traffic(LogNormal(4.69, 1.0, 4, 1024), LogNormal(5.462, 1.0, 4, 1900), longest=2048)
ALPACA = Traffic(LogNormal(2.465, 0.9, 4, 200), LogNormal(3.675, 0.9, 4, 600))
# Answers of the conversation service end at either of two lengths: most below 200 tokens,
# others near 400.
AZURE_CHAT = Traffic(
    LogNormal(6.63, 0.99, 1, 14_050),
    Mixture((LogNormal(4.6, 0.55, 1, 1000), LogNormal(6.02, 0.12, 1, 1000)), (0.6, 0.4)),
)
AZURE_CODE = Traffic(LogNormal(7.0, 1.36, 1, 7437), LogNormal(2.79, 0.85, 1, 1899))
TRAFFIC = {
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "azure-chat": AZURE_CHAT,
    "azure-code": AZURE_CODE,
}


def arrivals(
    rng: np.random.Generator, count: int, rate: float, shape: float = 1.0
) -> np.ndarray[Any, Any]:
    """Times of ``count`` arrivals, ``rate`` a second on average; the first one comes after
    a gap too.

    An infinite rate: all at time 0. ``shape`` 1 is Poisson, below it bursts and pauses,
    infinite a metronome.
    """
    if not (rate > 0 and shape > 0):
        raise ValueError(f"arrivals need a rate and a shape above 0, got {rate} and {shape}")
    if rate == inf:
        return np.zeros(count)
    if shape == inf:
        gaps = np.full(count, 1 / rate)
    else:
        gaps = rng.gamma(shape, 1 / (shape * rate), count)
    return np.cumsum(gaps)


class Distinct:
    """Prompts where lengths alone matter: every token a number of its own, so that nothing
    is shared.
    """

    def __init__(self) -> None:
        self.at = 0

    def __call__(self, count: int) -> range:
        self.at += count
        return range(self.at - count, self.at)


def requests(
    traffic: Traffic,
    count: int,
    rng: np.random.Generator,
    *,
    rate: float = inf,
    shape: float = 1.0,
    tokens: Callable[[int], Sequence[int]] | None = None,
    scale: float = 1.0,
) -> list[Request]:
    """``count`` requests in the order of their arrival, each of which runs to its
    ``max_tokens``.

    ``tokens(n)`` makes a prompt of n tokens; by default they are numbers that nobody else
    has (``Distinct``). ``scale`` multiplies all lengths, for a model with a short context.
    """
    if scale != 1:
        traffic = Traffic(
            _Scaled(traffic.prompt, scale), _Scaled(traffic.output, scale), traffic.longest * scale
        )
    tokens = Distinct() if tokens is None else tokens
    P, output = traffic.sample(rng, count)
    when = arrivals(rng, count, rate, shape)
    return [
        Request(tokens(int(p)), int(o), id=i, arrival=float(t), ignore_eos=True)
        for i, (p, o, t) in enumerate(zip(P, output, when, strict=True))
    ]


def longest_of(pmf: np.ndarray[Any, Any], batch: int) -> float:
    """E[max of ``batch`` lengths], exact: Σ 1 − F(x)^batch."""
    return float(np.sum(1 - np.cumsum(pmf) ** batch))


def useful_share(pmf: np.ndarray[Any, Any], batch: int) -> float:
    """Share of the decode slots of a static batch that yield a token: E[O] / E[max of
    ``batch`` O].
    """
    return longest_of(pmf, 1) / longest_of(pmf, batch)


@dataclass(frozen=True)
class _Scaled:
    """Lengths times a factor, rounded, at least 1."""

    of: Length
    scale: float

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
        return np.maximum(1, np.rint(self.of.sample(rng, count) * self.scale)).astype(np.int64)

    def pmf(self) -> np.ndarray[Any, Any]:
        p = self.of.pmf()
        at = np.maximum(1, np.rint(np.arange(len(p)) * self.scale)).astype(np.int64)
        return np.bincount(at, weights=p)


def _normal_cdf(z: float) -> float:
    return 0.5 * (1 + erf(z / sqrt(2)))
