"""What drafting costs on this machine, and how many drafts pay.

Sources: Leviathan et al. 2023 (the gain), Liu et al. 2024 (SmartSpec: the number of drafts by
load and acceptance).

The best number of drafts γ for sequences with acceptance α in a batch of B is the γ of the
largest rate

    B · E[τ](α, γ) / (t(B (1 + γ)) + c₁(B) + (γ − 1) c(B))

| symbol | name                                                                          |
|--------|-------------------------------------------------------------------------------|
| t(n)   | measured time of a step of n tokens of the target                             |
| c(B)   | time of one draft for each of B sequences: one step of the draft model        |
| c₁(B)  | the same for the first draft of a step: it also computes what the draft model |
|        | has not seen yet, with processor caches that the target's step has filled     |

For one sequence t is nearly flat, and drafts pay. In a large batch the step is compute-bound,
t grows with n, and the best γ is 0: speculation is then off.

Left out: the time of verification and of scheduling (see ``adaptive_drafts.MARGIN``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from refllm.backend import finite_argmax
from refllm.decode.fast.captured_step import make_decode_step
from refllm.decode.sampling_params import GREEDY
from refllm.decode.speculative.acceptance import expected_length
from refllm.decode.speculative.interface import DraftRequest, ModelLike, check_vocabulary
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.errors import InputError
from refllm.kv.contiguous import ContiguousCache

# The time of a step of so few tokens depends on what the step before left in the caches.
SHORT = 16


@dataclass(frozen=True)
class Costs:
    """Measured times in seconds: t(n) at some n, rising, and (B, c₁(B), c(B)) at some B; no
    ``drafts``: they cost nothing.

    >>> costs = Costs(steps=[(1, 1.0), (4, 2.0)])
    >>> costs.step(2.5), costs.step(8)
    (1.5, 4.0)
    >>> costs.best_gamma(alpha=0.9, batch=1, most=3)
    3
    """

    steps: Sequence[tuple[int, float]]
    drafts: Sequence[tuple[int, float, float]] = ()

    def __post_init__(self) -> None:
        if not self.steps:
            raise InputError(
                "costs need a measured step at least: (tokens, seconds), as measure_costs(model) "
                "returns them"
            )

    def step(self, tokens: float) -> float:
        """t(n), interpolated between the measured points; beyond the last one in proportion
        to n.
        """
        sizes, times = zip(*self.steps, strict=True)
        if tokens > sizes[-1]:
            return float(times[-1] * tokens / sizes[-1])
        return float(np.interp(tokens, sizes, times))

    def drafting(self, batch: int, gamma: int) -> float:
        """The time of ``gamma`` drafts for each of ``batch`` sequences, interpolated."""
        if not self.drafts or gamma == 0:
            return 0.0
        sizes, first, further = zip(*self.drafts, strict=True)
        factor = max(1.0, batch / sizes[-1])  # beyond the last point in proportion
        times = np.interp(batch, sizes, first) + (gamma - 1) * np.interp(batch, sizes, further)
        return float(factor * times)

    def rate(self, alpha: float, batch: int, gamma: int) -> float:
        """Tokens per second of each of ``batch`` sequences with ``gamma`` drafts per step."""
        seconds = self.step(batch * (1 + gamma)) + self.drafting(batch, gamma)
        return expected_length(alpha, gamma) / seconds

    def best_gamma(self, alpha: float, batch: int, most: int) -> int:
        """The γ ≤ ``most`` with the most tokens per second."""
        return max(range(most + 1), key=lambda gamma: self.rate(alpha, batch, gamma))


def measure_costs(
    model: ModelLike,
    draft: ModelDrafter | None = None,
    *,
    most: int = 128,
    context: int = 128,
    rounds: int = 7,
) -> Costs:
    """t(n) of ``model`` for n = 1, 2, 3, 4, 6, 8, 12, … up to ``most`` tokens, one per
    sequence, and the time of a draft.

    Medians of ``rounds`` interleaved runs on this machine; an engine measures when it starts.
    ValueError for ``most`` or ``rounds`` below 1, or a ``context`` below 3.
    """
    if min(most, rounds) < 1 or context < 3:
        raise InputError(
            f"most and rounds must be at least 1 and context 3, got {most}, {rounds} and {context}"
        )
    config = model.config
    powers = range(most.bit_length())
    sizes = sorted({n for k in powers for n in (2**k, 3 * 2**k // 2) if n <= most})
    context = min(context, config.max_position_embeddings - 1)
    cache = ContiguousCache(config, sizes[-1], context + 1, like=model.weights["norm"])
    decode_step = make_decode_step(model.weights, config)

    def step(n: int) -> None:
        """One decode step of n sequences with ``context`` cached tokens each."""
        cache.lengths = [context] * n + [0] * (len(cache.lengths) - n)
        tokens = [i % config.vocab_size for i in range(n)]
        finite_argmax(decode_step(tokens, [context] * n, cache.view([1] * n)))  # waits for a GPU

    times: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(rounds):
        for n in sizes:
            if n <= SHORT:  # warm, as in an engine, whose last steps were of the same size
                step(n)
                step(n)
            began = time.perf_counter()
            step(n)
            times[n].append(time.perf_counter() - began)
    drafts: list[tuple[int, float, float]] = []
    if draft is not None:
        check_vocabulary(model, draft.model)
        caches = len(draft.cache.lengths)
        for batch in sorted({min(2**k, caches) for k in range(caches.bit_length() + 1)}):
            first, further = _draft_times(draft, lambda: step(1), batch, context, rounds)
            drafts.append((batch, first, further))
    return Costs([(n, float(np.median(times[n]))) for n in sizes], drafts)


def _draft_times(
    draft: ModelDrafter, between: Callable[[], None], batch: int, context: int, rounds: int
) -> tuple[float, float]:
    """(c₁, c) for ``batch`` sequences; ``between`` is a step of the target, after which the
    draft model has one or two tokens to catch up.
    """
    rng = np.random.default_rng(0)
    gamma = max(2, draft.gamma)
    context = max(3, min(context, draft.cache.capacity - gamma))
    tokens = rng.integers(0, draft.config.vocab_size, context).tolist()
    confidence = draft.confidence  # random tokens: the model would not be confident of any
    draft.confidence = 0.0

    def propose(behind: int, count: int) -> None:
        """Draft ``count`` tokens after all but the last ``behind`` tokens."""
        known = tokens[: context - behind]
        requests = [DraftRequest(known, count, GREEDY, rng, s) for s in range(batch)]
        if batch == 1:
            draft.propose(*requests[0])
        else:
            draft.propose_batch(requests)

    cases = [(behind, count) for behind in (1, 2) for count in (1, gamma)]
    spent: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    try:
        propose(2, 1)
        for _ in range(rounds):
            for (behind, count), times in spent.items():
                propose(behind, 1)  # the caches end there
                between()
                began = time.perf_counter()
                propose(0, count)
                times.append(time.perf_counter() - began)
    finally:
        draft.confidence = confidence
    medians = {case: float(np.median(times)) for case, times in spent.items()}
    first = (medians[1, 1] + medians[2, 1]) / 2
    whole = (medians[1, gamma] + medians[2, gamma]) / 2
    return first, max(0.0, whole - first) / (gamma - 1)
