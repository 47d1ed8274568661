"""Drafts in the engine: a drafter for every sequence, and how many drafts are worth while,
measured.

Sources: Leviathan et al. 2023 (what is gained), Liu et al. 2024 (SmartSpec: how many
drafts, by load and acceptance).

The engine takes a drafter for each sequence (``Engine(…, drafter=AdaptiveDrafting(…))``), asks it in
each step, and tells it how many drafts were accepted. Nobody tells of preemption, failed
steps or the end: a place may be asked for again.

How many drafts γ a sequence of acceptance α gets in a batch of B is the γ of the largest

    B · E[τ](α, γ) / (t(B (1 + γ)) + c₁(B) + (γ − 1) c(B))

t(n) is the measured time of a step of n tokens, c(B) that of a draft for each of B
sequences, which one step of the draft model makes; c₁(B) that of a step's first, which also
computes what the draft model has not seen yet, from caches that the target's step has
filled with its own weights. For one sequence t is nearly flat and drafts pay; for many the
step is bound by its products, t grows with n, and the best γ is 0: speculation is then off.
A sequence that has gone without drafts for a while tries one all the same, lest a bad
beginning be the last word; each time in vain doubles that while, for all. What a sequence is
believed to accept begins with what all have accepted so far: a ``AdaptiveDrafting`` that serves for
long knows its draft model, and no sequence pays for finding out.

Caches of a draft model are kept for the sequences that asked last. Where more ask than it
has, some go without drafts.

A draft model samples by the request's own settings: at a temperature more are accepted so,
and the law is kept. With ``ModelDrafter(…, sampling=GREEDY)`` drafts are one-hot: fewer are
accepted, but each request gets the very tokens that it gets without drafts
(``serve.sampler``).

Left out: trees in the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.decode.fast.captured_step import stepper
from refllm.decode.sampling import best
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.decode.speculative.acceptance import Acceptance, expected_length
from refllm.decode.speculative.drafters import ModelDrafter, NGramDrafter
from refllm.decode.speculative.interface import (
    NOTHING,
    Ask,
    Drafter,
    Proposal,
    TreeProposal,
    check_vocabulary,
)
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.kv.contiguous import ContiguousCache

PROBE = 32  # steps that a sequence goes without drafts before it tries one again, at first
# what drafting must promise: its costs leave out verifying, the books, and rows of unequal
# length
MARGIN = 1.2
MEMORY = 0.9  # what an earlier draft of a sequence counts for beside a later one
PRIOR = (0.5, 4.0)  # α before anything was seen, and how many drafts that belief is worth
# tokens of a step whose time depends on what the one before left in the processor's caches
SHORT = 16
BELIEF = 16.0  # how many drafts of a sequence what is believed of all is worth


@dataclass(frozen=True)
class Costs:
    """Measured, in seconds: t(n) at some n, rising, and (B, c₁(B), c(B)) at some B; without
    any drafts cost nothing.
    """

    steps: Sequence[tuple[int, float]]
    drafts: Sequence[tuple[int, float, float]] = ()

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(
                "costs need a measured step at least: (tokens, seconds), as measure(model) returns them"
            )

    def step(self, tokens: float) -> float:
        """t(n) by lines between the measured points; beyond the last one in proportion to
        n.
        """
        sizes, times = zip(*self.steps, strict=True)
        if tokens > sizes[-1]:
            return float(times[-1] * tokens / sizes[-1])
        return float(np.interp(tokens, sizes, times))

    def best_gamma(self, alpha: float, batch: int, most: int) -> int:
        """The γ ≤ ``most`` of the most tokens a second for ``batch`` sequences of
        acceptance ``alpha``.
        """
        return max(range(most + 1), key=lambda g: self.rate(alpha, batch, g))

    def rate(self, alpha: float, batch: int, gamma: int) -> float:
        """Tokens a second of each of ``batch`` sequences that draft ``gamma`` tokens a
        step.
        """
        return expected_length(alpha, gamma) / (
            self.step(batch * (1 + gamma)) + self.drafting(batch, gamma)
        )

    def drafting(self, batch: int, gamma: int) -> float:
        """The time of ``gamma`` drafts for each of ``batch`` sequences, by lines between the
        measured points.
        """
        if not self.drafts or gamma == 0:
            return 0.0
        sizes, first, further = zip(*self.drafts, strict=True)
        more = max(1.0, batch / sizes[-1])  # beyond what was measured, in proportion
        return float(
            more * (np.interp(batch, sizes, first) + (gamma - 1) * np.interp(batch, sizes, further))
        )


class AdaptiveDrafting:
    """Makes the drafters of an engine's sequences. ``stats``: what came of all; ``gammas``:
    how often each γ was.
    """

    def __init__(
        self,
        source: ModelDrafter | Callable[[], Drafter] = NGramDrafter,
        *,
        costs: Costs | None = None,
    ):
        """``source`` is a ``ModelDrafter`` with some ``sequences``, or makes a drafter for
        each sequence.

        Without ``costs`` every sequence gets the drafter's own γ.
        """
        if isinstance(source, TreeDrafter):
            raise ValueError(
                "the engine verifies chains: give it a ModelDrafter where this one grows trees"
            )
        if not (isinstance(source, ModelDrafter) or callable(source)):
            raise TypeError(
                f"AdaptiveDrafting takes a ModelDrafter, or what makes a drafter for each sequence, as "
                f"lambda: NGramDrafter(8) does, got {source!r}"
            )
        self.source = source
        self.costs = costs
        self.stats = Acceptance()
        self.gammas: dict[int, int] = {}
        self.batch = 1  # sequences that ask in a step
        self.wait = PROBE  # steps without drafts until a sequence probes, and whether one does now
        self.probing = False
        self._worth: dict[tuple[int, int, int], int] = {}
        if isinstance(source, ModelDrafter):
            places = len(source.cache.lengths)
        else:
            places = 0
        # who asked last stands last
        self._owners: dict[int, SequenceDrafter | None] = dict.fromkeys(range(places))

    def __call__(self) -> SequenceDrafter:
        """The drafter of one more sequence."""
        return SequenceDrafter(
            self, self.source if isinstance(self.source, ModelDrafter) else self.source()
        )

    @property
    def alpha(self) -> float:
        """What is believed of a sequence of which nothing is known: α of all drafts so far."""
        return (PRIOR[0] * PRIOR[1] + self.stats.accepted) / (PRIOR[1] + self.stats.judged)

    def worth(self, alpha: float, most: int) -> int:
        """The best γ by the measured costs for ``alpha``, in hundredths, in the batch of
        now; 0 if it gains too little.

        Each is worked out once: 32 sequences that ask anew in every step would take longer
        than the draft model.
        """
        assert self.costs is not None
        case = (round(100 * alpha), self.batch, most)
        if case not in self._worth:
            alpha = case[0] / 100
            gamma = self.costs.best_gamma(alpha, self.batch, most)
            worth = self.costs.rate(alpha, self.batch, gamma) > MARGIN * self.costs.rate(
                alpha, self.batch, 0
            )
            self._worth[case] = gamma if worth else 0
        return self._worth[case]

    def propose_together(
        self, asks: Sequence[tuple[SequenceDrafter, Ask]]
    ) -> list[Proposal | TreeProposal]:
        """The drafts of all sequences that ask in a step; a model drafts for all of them at
        once.
        """
        if not asks:
            return []
        self.batch = len(asks)
        self.probing = False
        proposals: list[Proposal | TreeProposal] = [NOTHING] * len(asks)
        wanting: dict[SequenceDrafter, tuple[int, Ask]] = {}
        for i, (sequence, ask) in enumerate(asks):
            count = min(ask.most, sequence.wants())
            if count < 1:
                continue
            if isinstance(self.source, ModelDrafter):
                wanting[sequence] = i, ask._replace(most=count)
            else:
                proposals[i] = sequence.drafter.propose(ask.tokens, count, ask.sampling, ask.rng)
        if isinstance(self.source, ModelDrafter) and wanting:
            placed = {
                b: wanting[b][1]._replace(sequence=place)
                for b, place in self._places(list(wanting)).items()
            }
            for sequence, proposal in zip(
                placed, self.source.propose_together(list(placed.values())), strict=True
            ):
                proposals[wanting[sequence][0]] = proposal
        return proposals

    def _places(self, sequences: Sequence[SequenceDrafter]) -> dict[SequenceDrafter, int]:
        """Which sequence of the model is whose: they keep theirs, and the others get those
        of who does not ask.

        Those that asked longest ago are taken first. Where there are more sequences than
        sequences, some go without.
        """
        asking = set(sequences)
        mine = {
            owner: place
            for place, owner in self._owners.items()
            if owner in asking and owner is not None
        }
        free = [place for place, owner in self._owners.items() if owner not in asking]
        for sequence, place in zip([b for b in sequences if b not in mine], free, strict=False):
            mine[sequence] = place
        for sequence, place in mine.items():
            del self._owners[place]
            self._owners[place] = sequence
        return mine


class SequenceDrafter:
    """A sequence's drafter: the source's, asked for as many drafts as pay."""

    def __init__(self, drafting: AdaptiveDrafting, drafter: Drafter):
        self.drafting = drafting
        self.drafter = drafter
        self.gamma = drafter.gamma
        self.accepted = 0.0  # of its own drafts, the later ones counting more
        self.judged = 0.0
        self.idle = 0  # steps without a draft, and whether this step's is a probe
        self.probes = False

    @property
    def alpha(self) -> float:
        """What it is believed to accept: its own drafts, beside what is believed of all."""
        return (BELIEF * self.drafting.alpha + self.accepted) / (BELIEF + self.judged)

    def propose(
        self, tokens: Sequence[int], count: int, sampling: SamplingParams, rng: np.random.Generator
    ) -> Proposal | TreeProposal:
        """As a ``Drafter`` by itself: for this sequence alone."""
        return self.drafting.propose_together([(self, Ask(tokens, count, sampling, rng, 0))])[0]

    def observe(self, best: Sequence[int], accepted: int) -> None:
        self.drafter.observe(best, accepted)
        proposed = len(best) - 1  # those that the scheduler had room for
        self.drafting.stats.add(proposed, accepted)
        if self.probes:
            self.drafting.wait = PROBE if accepted else 2 * self.drafting.wait
        self.accepted = MEMORY * self.accepted + accepted
        self.judged = MEMORY * self.judged + min(accepted + 1, proposed)

    def wants(self) -> int:
        """How many drafts it asks for in this step."""
        gamma = self.gamma if self.drafting.costs is None else self._worth()
        self.drafting.gammas[gamma] = self.drafting.gammas.get(gamma, 0) + 1
        return gamma

    def _worth(self) -> int:
        drafting = self.drafting
        gamma = drafting.worth(min(1.0, self.alpha), self.gamma)
        self.idle = 0 if gamma else self.idle + 1
        # one at a time, and none where even α = 1 loses
        self.probes = (
            self.idle >= drafting.wait and not drafting.probing and drafting.worth(1.0, 1) > 0
        )
        if self.probes:
            self.idle = 0
            drafting.probing = True
        return 1 if self.probes else gamma


def measure(
    model: Any,
    draft: ModelDrafter | None = None,
    *,
    most: int = 128,
    context: int = 128,
    rounds: int = 7,
) -> Costs:
    """t(n) of ``model`` for n = 1, 2, 3, 4, 6, 8, 12, … up to ``most`` tokens, one a
    sequence, and the time of a draft.

    Medians of ``rounds`` in turn, on this machine, now: as much as an engine needs to know
    at its start. ValueError for ``most`` or ``rounds`` below 1, or a ``context`` below 3.
    """
    if min(most, rounds) < 1 or context < 3:
        raise ValueError(
            f"most and rounds must be at least 1 and context 3, got {most}, {rounds} and {context}"
        )
    config = model.config
    sizes = sorted(
        {n for k in range(most.bit_length()) for n in (2**k, 3 * 2**k // 2) if n <= most}
    )
    context = min(context, config.max_position_embeddings - 1)
    cache = ContiguousCache(config, sizes[-1], context + 1, like=model.weights["norm"])
    compute = stepper(model.weights, config)

    def step(n: int) -> None:
        """n sequences after ``context`` tokens each."""
        cache.lengths = [context] * n + [0] * (len(cache.lengths) - n)
        tokens = [i % config.vocab_size for i in range(n)]
        best(compute(tokens, [context] * n, cache.view([1] * n)))  # waits for a GPU

    times: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(rounds):
        for n in sizes:
            # as in an engine, where the steps before are of the same size
            for _ in range(2 if n <= SHORT else 0):
                step(n)
            began = time.perf_counter()
            step(n)
            times[n].append(time.perf_counter() - began)
    drafts: list[tuple[int, float, float]] = []
    if draft is not None:
        check_vocabulary(model, draft.model)
        places = len(draft.cache.lengths)
        for batch in sorted({min(2**k, places) for k in range(places.bit_length() + 1)}):
            drafts.append((batch, *_draft_times(draft, lambda: step(1), batch, context, rounds)))
    return Costs([(n, float(np.median(times[n]))) for n in sizes], drafts)


def _draft_times(
    draft: ModelDrafter, between: Callable[[], None], batch: int, context: int, rounds: int
) -> tuple[float, float]:
    """(c₁, c) for ``batch`` sequences; a step of the target lies ``between``, one or two
    tokens are to be computed.
    """
    rng = np.random.default_rng(0)
    gamma = max(2, draft.gamma)
    context = max(3, min(context, draft.cache.capacity - gamma))
    text = rng.integers(0, draft.config.vocab_size, context).tolist()
    confidence = draft.confidence  # random text: it would be sure of nothing
    draft.confidence = 0.0

    def propose(behind: int, count: int) -> None:
        asks = [Ask(text[: context - behind], count, GREEDY, rng, s) for s in range(batch)]
        if batch == 1:
            draft.propose(*asks[0])
        else:
            draft.propose_together(asks)

    spent: dict[tuple[int, int], list[float]] = {
        (behind, count): [] for behind in (1, 2) for count in (1, gamma)
    }
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
    first, whole = (
        sum(float(np.median(spent[behind, n])) for behind in (1, 2)) / 2 for n in (1, gamma)
    )
    return first, max(0.0, whole - first) / (gamma - 1)
