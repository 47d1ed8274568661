"""Requests as real users send them, without any data set: lengths fitted to public traffic,
and random arrivals.

Sources: means of ShareGPT and Alpaca, Kwon et al. 2023, figure 11 (161/338 and 19/58
tokens), and the filter with which vLLM samples the former; the public traces of Azure's
language services of 2023, fitted in the logarithm; arrivals as ``vllm bench serve`` draws
them.

| symbol | name                               | value                                              |
|--------|------------------------------------|----------------------------------------------------|
| P, O   | tokens of prompt and output        | rounded log-normals, cut to [low, high]            |
| μ, σ   | of the logarithm                   | σ of ShareGPT and Alpaca is assumed: only          |
|        |                                    | means are published                                |
| pmf    | probability of each length x       | Φ((ln(x + ½) − μ)/σ) − Φ((ln(x − ½) − μ)/σ), over  |
|        |                                    | its sum                                            |
| k      | shape of the gaps between arrivals | Gamma(k, 1/(k · rate)): 1 is Poisson, below bursty |

Every length has its exact probabilities (``pmf``), so expectations over a batch can be
summed instead of sampled.

Left out: the correlation of P and O (Azure's rank correlations are −0.02 and 0.07) and the
time of day; Azure's code prompts beyond what a log-normal with their logarithm's mean and
deviation has (their mean is 2,048, here 1,559); vLLM's rescaling of the arrivals to a fixed
end, after which they are no Poisson process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import erf, inf, log, sqrt
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refllm.errors import InputError
from refllm.serve.request import Request

Counts = NDArray[np.int64]
Probabilities = NDArray[np.float64]  # of the lengths 0, 1, 2, …


class Length(Protocol):
    """A distribution of lengths."""

    def sample(self, rng: np.random.Generator, count: int) -> Counts:
        """``count`` lengths."""

    def pmf(self) -> Probabilities:
        """The probability of each length; sums to 1."""


@dataclass(frozen=True)
class LogNormal:
    """exp of a normal, kept if it lies within [low, high], then rounded.

    >>> length = LogNormal(mu=1.0, sigma=0.5, low=1, high=4)
    >>> [round(float(p), 2) for p in length.pmf()]
    [0.0, 0.12, 0.42, 0.34, 0.11]
    """

    mu: float
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and 1 <= self.low <= self.high):
            raise InputError(f"a length needs sigma > 0 and 1 <= low <= high, got {self}")

    def sample(self, rng: np.random.Generator, count: int) -> Counts:
        """``count`` lengths, by rejection."""
        kept = np.empty(0)
        while len(kept) < count:
            x = np.exp(self.mu + self.sigma * rng.standard_normal(2 * count + 16))
            kept = np.concatenate([kept, x[(self.low <= x) & (x <= self.high)]])
        return np.rint(kept[:count]).astype(np.int64)

    def pmf(self) -> Probabilities:
        """The probability of each length."""
        # values are cut first and rounded then, so the outer bins are half as wide
        edges = np.clip(np.arange(self.low, self.high + 2) - 0.5, self.low, self.high)
        below = np.array([_normal_cdf((log(x) - self.mu) / self.sigma) for x in edges])
        p = np.diff(below)
        return np.concatenate([np.zeros(self.low), p / p.sum()])


@dataclass(frozen=True)
class Mixture:
    """One of several distributions, drawn by their weights."""

    parts: tuple[Length, ...]
    weights: tuple[float, ...]

    def sample(self, rng: np.random.Generator, count: int) -> Counts:
        """``count`` lengths, each from a part of its own."""
        which = rng.choice(len(self.parts), count, p=self.weights)
        every = np.stack([part.sample(rng, count) for part in self.parts])  # [parts, count]
        return every[which, np.arange(count)]

    def pmf(self) -> Probabilities:
        """The weighted sum of the parts'."""
        each = [part.pmf() for part in self.parts]
        out = np.zeros(max(map(len, each)))
        for weight, p in zip(self.weights, each, strict=True):
            out[: len(p)] += weight * p
        return out


class Traffic(NamedTuple):
    """Lengths of prompts and outputs, of at most ``longest`` tokens together: longer pairs are
    drawn again.
    """

    prompt: Length
    output: Length
    longest: float = inf

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Counts, Counts]:
        """(P[count], O[count])."""
        pairs = np.empty((2, 0), dtype=np.int64)
        while pairs.shape[1] < count:
            new = np.stack([self.prompt.sample(rng, count), self.output.sample(rng, count)])
            pairs = np.concatenate([pairs, new[:, new.sum(axis=0) <= self.longest]], axis=1)
        return pairs[0, :count], pairs[1, :count]

    def pmfs(self) -> tuple[Probabilities, Probabilities]:
        """The probabilities of each P and of each O, without the pairs that are too long."""
        p = self.prompt.pmf()
        o = self.output.pmf()
        if self.longest == inf:
            return p, o
        longest = int(self.longest)
        return _without_long_pairs(p, o, longest), _without_long_pairs(o, p, longest)

    def means(self) -> tuple[float, float]:
        """E[P], E[O], exact."""
        p, o = self.pmfs()
        return float(p @ np.arange(len(p))), float(o @ np.arange(len(o)))


def _without_long_pairs(p: Probabilities, other: Probabilities, longest: int) -> Probabilities:
    """P(x | x + y ≤ longest) for independent x with pmf ``p`` and y with pmf ``other``."""
    x = np.arange(len(p))
    at_most = np.cumsum(other)[np.clip(longest - x, 0, len(other) - 1)]  # P(y ≤ longest − x)
    joint: Probabilities = p * at_most * (x <= longest)
    conditional: Probabilities = joint / joint.sum()
    return conditional


SHAREGPT = Traffic(LogNormal(4.69, 1.0, 4, 1024), LogNormal(5.462, 1.0, 4, 1900), longest=2048)
ALPACA = Traffic(LogNormal(2.465, 0.9, 4, 200), LogNormal(3.675, 0.9, 4, 600))
# Outputs of the conversation service have two peaks: most below 200 tokens, others near 400.
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
) -> NDArray[np.float64]:
    """Times of ``count`` arrivals, ``rate`` per second on average; the first one, too, comes
    after a gap.

    An infinite rate: all at time 0. ``shape`` 1 is Poisson, below 1 comes in bursts, infinity
    is perfectly regular.

    >>> arrivals(np.random.default_rng(0), 3, rate=2.0, shape=float("inf")).tolist()
    [0.5, 1.0, 1.5]
    """
    if not (rate > 0 and shape > 0):
        raise InputError(f"arrivals need a rate and a shape above 0, got {rate} and {shape}")
    if rate == inf:
        return np.zeros(count)
    if shape == inf:
        gaps = np.full(count, 1 / rate)
    else:
        gaps = rng.gamma(shape, 1 / (shape * rate), count)
    return np.cumsum(gaps)


class DistinctTokens:
    """Prompts for simulations where only lengths matter: no token occurs twice, so no prefix
    is shared.

    >>> tokens = DistinctTokens()
    >>> tokens(3), tokens(2)
    (range(0, 3), range(3, 5))
    """

    def __init__(self) -> None:
        self.used = 0

    def __call__(self, count: int) -> range:
        """The next ``count`` integers."""
        self.used += count
        return range(self.used - count, self.used)


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
    """``count`` requests in the order of their arrival, each of which runs to its ``max_tokens``.

    ``tokens(n)`` makes a prompt of n tokens (default ``DistinctTokens``). ``scale`` multiplies
    all lengths, for a model with a short context.
    """
    if scale != 1:
        traffic = Traffic(
            _ScaledLength(traffic.prompt, scale),
            _ScaledLength(traffic.output, scale),
            traffic.longest * scale,
        )
    make_prompt = DistinctTokens() if tokens is None else tokens
    prompts, outputs = (lengths.tolist() for lengths in traffic.sample(rng, count))
    times = arrivals(rng, count, rate, shape).tolist()
    made = []
    for i, (p, o, time) in enumerate(zip(prompts, outputs, times, strict=True)):
        made.append(Request(make_prompt(p), o, request_id=i, arrival=time, ignore_eos=True))
    return made


def expected_longest(pmf: Probabilities, batch: int) -> float:
    """E[max of ``batch`` lengths], exact: Σ 1 − F(x)^batch."""
    return float(np.sum(1 - np.cumsum(pmf) ** batch))


def useful_share(pmf: Probabilities, batch: int) -> float:
    """Share of the decode slots of a static batch that yield a token: E[O] / E[max of ``batch`` O].

    >>> round(useful_share(np.array([0.0, 0.5, 0.5]), batch=2), 3)  # 1 or 2 tokens, P = ½
    0.857
    """
    return expected_longest(pmf, 1) / expected_longest(pmf, batch)


@dataclass(frozen=True)
class _ScaledLength:
    """Lengths times a factor, rounded, at least 1."""

    length: Length
    scale: float

    def sample(self, rng: np.random.Generator, count: int) -> Counts:
        """``count`` scaled lengths."""
        return _at_least_1(self.length.sample(rng, count) * self.scale)

    def pmf(self) -> Probabilities:
        """Lengths that are rounded to the same one add up."""
        p = self.length.pmf()
        scaled = _at_least_1(np.arange(len(p)) * self.scale)
        return np.bincount(scaled, weights=p).astype(np.float64)


def _at_least_1(lengths: ArrayLike) -> Counts:
    """Rounded to integers of 1 or more."""
    rounded: Counts = np.maximum(1, np.rint(lengths)).astype(np.int64)
    return rounded


def _normal_cdf(z: float) -> float:
    return 0.5 * (1 + erf(z / sqrt(2)))
