"""Exact distributions of programs that draw uniforms: each program runs once for each way
its comparisons can fall; nothing is sampled.

``exact_distribution(run)`` calls ``run(rng)`` with a generator whose uniforms are
*intervals*. Comparing one with a number splits it: the program continues with one part, and
is run again from the start with the other. Each run has the probability of its parts, and
all of them together have 1. A uniform that is used twice stays in the same part, so a
program that reuses a uniform shows it.

Inverse-CDF draws use ``draw``, which a test puts in the place of the library's own
(``drafting.use_exact_draws``); ``test_sampling`` proves that the library draws each token
with its share of the uniforms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from refllm.backend import to_numpy


class Tape:
    """A generator for one run: it follows ``script``, then always takes the first way and
    notes the other.
    """

    def __init__(self, script: Sequence[bool], others: list[list[bool]]):
        self.script = list(script)
        self.others = others
        self.taken = []
        self.probability = 1.0

    def random(self, size: int | None = None) -> Any:
        return Uniform(self) if size is None else [Uniform(self) for _ in range(size)]

    def split(self, share: float) -> bool:
        """Which way to go where the first has ``share`` of the probability."""
        at = len(self.taken)
        if at < len(self.script):
            way = self.script[at]
        else:
            way = True
            self.others.append([*self.taken, False])
        self.taken.append(way)
        self.probability *= share if way else 1.0 - share
        return way


class Uniform:
    """A value in [low, high) that is not determined any further yet."""

    def __init__(self, tape: Tape):
        self.tape = tape
        self.low = 0.0
        self.high = 1.0

    def __lt__(self, limit: float) -> bool:
        limit = float(limit)
        if limit <= self.low:
            return False
        if limit >= self.high:
            return True
        below = self.tape.split((limit - self.low) / (self.high - self.low))
        if below:
            self.high = limit
        else:
            self.low = limit
        return below

    __le__ = __lt__  # a single number has probability 0


def draw(weights: Any, uniform: Any, otherwise: Any = None) -> int:
    """Inverse CDF with an interval for the uniform; with a number, the same."""
    w = to_numpy(weights).astype(np.float64)
    if otherwise is not None and not w.sum() > 1e-300:
        w = to_numpy(otherwise).astype(np.float64)
    live = np.flatnonzero(w > 0)
    edges = np.cumsum(w[live]) / w.sum()
    return int(
        next((t for t, edge in zip(live[:-1], edges, strict=False) if uniform < edge), live[-1])
    )


def exact_distribution(run: Callable[[Any], Hashable]) -> dict[Any, float]:
    """outcome → probability, of a program of ``rng`` that compares its uniforms with
    numbers.
    """
    waiting: list[list[bool]] = [[]]
    found: dict[Any, float] = {}
    while waiting:
        tape = Tape(waiting.pop(), waiting)
        outcome = run(tape)
        found[outcome] = found.get(outcome, 0.0) + tape.probability
    return found


class Table:
    """A language model of ``vocab`` tokens that gives every prefix its own distribution,
    drawn from the seed.
    """

    def __init__(self, vocab: int, seed: int, kind: str = "dense"):
        self.vocab = vocab
        self.seed = seed
        self.kind = kind

    def __call__(self, prefix: Sequence[int]) -> np.ndarray:
        """p(· | prefix), [V]: ``dense``, ``sparse`` (zeros in it), or ``peaked``."""
        rng = np.random.default_rng([self.seed, len(prefix), *prefix])
        w = rng.random(self.vocab) ** (6 if self.kind == "peaked" else 1)
        if self.kind == "sparse":
            w *= rng.random(self.vocab) < 0.6
            w[rng.integers(self.vocab)] += 0.1
        return w / w.sum()

    def rows(self, prefix: Sequence[int], drafts: Sequence[int]) -> np.ndarray:
        """p at every position of the drafts and the one after them, [γ+1, V]."""
        return np.stack([self([*prefix, *drafts[:i]]) for i in range(len(drafts) + 1)])


def sequence_distribution(
    model: Callable[[Sequence[int]], np.ndarray], vocab: int, length: int
) -> dict[tuple[int, ...], float]:
    """The distribution of the next ``length`` tokens after an empty prefix."""
    return {
        s: float(np.prod([model(s[:i])[t] for i, t in enumerate(s)]))
        for s in itertools.product(range(vocab), repeat=length)
    }


def extend(
    outcomes: dict[tuple[int, ...], float],
    model: Callable[[Sequence[int]], np.ndarray],
    vocab: int,
    length: int,
) -> dict[tuple[int, ...], float]:
    """The distribution of ``length`` tokens where the missing tokens of an outcome are
    drawn from the model.
    """
    whole = dict.fromkeys(itertools.product(range(vocab), repeat=length), 0.0)
    for s in whole:
        for n in range(1, length + 1):
            if (share := outcomes.get(s[:n], 0.0)) > 0:
                whole[s] += share * float(np.prod([model(s[:i])[s[i]] for i in range(n, length)]))
    return whole


def largest_difference(a: dict[Any, float], b: dict[Any, float]) -> float:
    """The largest difference between two distributions, over all outcomes."""
    return max(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in {*a, *b})
