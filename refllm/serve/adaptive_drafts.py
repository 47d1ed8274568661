"""Speculative decoding in the engine: a drafter for every sequence, and as many drafts as pay.

Sources: Leviathan et al. 2023 (the gain), Liu et al. 2024 (SmartSpec: the number of drafts by
load and acceptance).

The engine makes one drafter per sequence (``Engine(…, drafter=AdaptiveDrafting(…))``), asks
it in each step, and reports how many drafts were accepted. Drafters are not told about
preemption, failed steps or the end of a sequence: they may be asked for the same position
again.

How many drafts pay depends on the batch and on the acceptance α: ``serve.draft_costs``. The
estimate of a sequence's α starts with the acceptance of all sequences so far, so in a server
that runs for long no new sequence pays for finding out. While few drafts are verified, γ is
chosen by the upper end of what α may be (``OPTIMISM``): a cautious guess would keep an engine
from ever learning that drafts pay. A sequence that has gone without
drafts for ``PROBE`` steps probes with one draft, so that one bad start is not final. Every
failed probe doubles the probing interval of all sequences.

A draft model keeps caches for the sequences that it drafted for last. With more sequences
than caches, some get no drafts.

A draft model samples with the request's own parameters. At a temperature this makes more
drafts acceptable, and the output distribution is unchanged. With
``ModelDrafter(…, sampling=GREEDY)`` drafts are one-hot: fewer are accepted, but each request
gets the same tokens as without drafts (``serve.model_runner``).

Left out: trees in the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.acceptance import Acceptance
from refllm.decode.speculative.constrained import propose_legal
from refllm.decode.speculative.interface import (
    NO_DRAFTS,
    DraftConstraint,
    Drafter,
    DraftRequest,
    Proposal,
    TreeProposal,
)
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.errors import InputError
from refllm.serve.draft_costs import Costs
from refllm.serve.isolation import Failures, compute_isolated
from refllm.serve.request import Sequence as TargetSequence
from refllm.serve.request_state import RequestState

PROBE = 32  # steps that a sequence goes without drafts before it probes, at first
# The gain that drafting must promise: costs leave out verification, scheduling, and rows of
# unequal length.
MARGIN = 1.2
DECAY = 0.9  # weight of an earlier draft of a sequence relative to the next one
PRIOR = (0.5, 4.0)  # α before any draft was verified, and its weight in drafts
OPTIMISM = 2.0  # standard deviations that γ is chosen above the estimated α of all sequences
SHARED_WEIGHT = 16.0  # weight, in drafts, of the α of all sequences in the estimate of one
NO_TREES = "the engine verifies chains: give it a ModelDrafter where this one grows trees"


def propose_drafts(
    drafter: Callable[[], Drafter],
    asked: Sequence[tuple[TargetSequence, RequestState]],
    vocabulary: int,
    failures: Failures,
) -> list[tuple[TargetSequence, Proposal]]:
    """The proposals for sequences that can use drafts; ``drafter`` is the engine's.

    A drafter that raises, proposes a tree, or a token outside the vocabulary, has failed; its
    request is in ``failures``, and the others get their drafts.
    """
    ready: list[tuple[TargetSequence, Drafter, DraftRequest]] = []
    for sequence, of_request in asked:
        try:
            state = of_request.sequence_state(sequence.index)
        except Exception as error:
            failures.add(sequence.request.request_id, "state", error)
            continue
        try:
            assert state.drafter is not None
            count = min(state.drafter.gamma, sequence.remaining - 1)
        except Exception as error:  # gamma is the drafter's own
            failures.add(sequence.request.request_id, "draft", error)
            continue
        sampling = sequence.request.sampling
        constraint = of_request.draft_constraint
        request = DraftRequest(sequence.tokens.copy(), count, sampling, state.rng, 0, constraint)
        ready.append((sequence, state.drafter, request))
    errors: dict[int, Exception] = {}  # place in ``ready`` → what its drafter raised
    if isinstance(drafter, AdaptiveDrafting):
        pairs = [(one, request) for _, one, request in ready]
        proposals = drafter.propose_batch(pairs, errors)  # type: ignore[arg-type]  # it made them
    else:
        proposals = []
        for i, (_, one, request) in enumerate(ready):
            try:
                proposals.append(propose_legal(one, request))
            except Exception as error:
                proposals.append(NO_DRAFTS)
                errors[i] = error
    checked: list[tuple[TargetSequence, Proposal]] = []
    for i, ((sequence, _, _), proposal) in enumerate(zip(ready, proposals, strict=True)):
        try:
            if i in errors:
                raise errors[i]
            checked.append((sequence, _checked_proposal(proposal, vocabulary)))
        except Exception as error:
            failures.add(sequence.request.request_id, "draft", error)
    return checked


def _checked_proposal(proposal: Proposal | TreeProposal, vocabulary: int) -> Proposal:
    """A proposal that the engine can verify; ValueError for another one."""
    if isinstance(proposal, TreeProposal):
        raise InputError(NO_TREES)
    tokens = [int(token) for token in proposal.tokens]
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise InputError(f"it proposed {tokens}, and the vocabulary has {vocabulary} tokens")
    return Proposal(tokens, proposal.q)


class _ModelShare(NamedTuple):
    """A sequence that a draft model is asked for: its place among all that are asked."""

    place: int
    request: DraftRequest
    errors: dict[int, Exception] | None

    def fail(self, point: str, error: Exception) -> None:
        """The model fails for this sequence alone, too."""
        if self.errors is None:
            raise error
        self.errors[self.place] = error


class AdaptiveDrafting:
    """Makes the drafters of an engine's sequences. ``stats`` counts the drafts of all of
    them; ``gammas`` how often each γ was chosen.
    """

    def __init__(
        self,
        source: ModelDrafter | Callable[[], Drafter] = NGramDrafter,
        *,
        costs: Costs | None = None,
    ):
        """``source`` is a ``ModelDrafter`` with some ``sequences``, or a function that makes a
        drafter for each sequence.

        Without ``costs`` every sequence gets the drafter's own γ.
        """
        if isinstance(source, TreeDrafter):
            raise InputError(NO_TREES)
        if not (isinstance(source, ModelDrafter) or callable(source)):
            raise TypeError(
                "AdaptiveDrafting takes a ModelDrafter, or a function that makes a drafter for "
                f"each sequence, as lambda: NGramDrafter(8) does, got {source!r}"
            )
        self.source = source
        self.costs = costs
        self.stats = Acceptance()
        self.gammas: dict[int, int] = {}
        self.batch = 1  # sequences that ask in the current step
        self.probe_interval = PROBE  # steps without drafts until a sequence probes
        self.probing = False  # whether a sequence probes in the current step
        self._gamma_table: dict[tuple[int, int, int], int] = {}
        # cache of the draft model → the sequence that uses it, the last one that asked last
        num_caches = len(source.cache.lengths) if isinstance(source, ModelDrafter) else 0
        self._owners: dict[int, SequenceDrafter | None] = dict.fromkeys(range(num_caches))

    def __call__(self) -> SequenceDrafter:
        """The drafter of one more sequence."""
        if isinstance(self.source, ModelDrafter):
            return SequenceDrafter(self, self.source)
        return SequenceDrafter(self, self.source())

    @property
    def alpha(self) -> float:
        """The estimate for a new sequence: α of all drafts so far, and the prior."""
        alpha, weight = PRIOR
        return (alpha * weight + self.stats.accepted) / (weight + self.stats.judged)

    @property
    def optimistic_alpha(self) -> float:
        """The upper end of what α may be: the estimate and ``OPTIMISM`` standard deviations of
        it, √(α (1 − α) / n) for n drafts.

        With few drafts verified it is near 1, so an engine finds out what is accepted wherever
        drafts could pay; it falls to the estimate as drafts are verified.
        """
        alpha = self.alpha
        deviation = math.sqrt(alpha * (1 - alpha) / (PRIOR[1] + self.stats.judged))
        return min(1.0, alpha + OPTIMISM * deviation)

    def worthwhile_gamma(self, alpha: float, most: int) -> int:
        """The best γ by the measured costs for ``alpha``, rounded to hundredths, in the
        current batch; 0 if it gains less than ``MARGIN``.

        Results are kept: to compute them for 32 sequences in every step would take longer
        than the draft model.
        """
        assert self.costs is not None
        case = (round(100 * alpha), self.batch, most)
        if case not in self._gamma_table:
            alpha = case[0] / 100
            gamma = self.costs.best_gamma(alpha, self.batch, most)
            drafting = self.costs.rate(alpha, self.batch, gamma)
            plain = self.costs.rate(alpha, self.batch, 0)
            self._gamma_table[case] = gamma if drafting > MARGIN * plain else 0
        return self._gamma_table[case]

    def propose_batch(
        self,
        asked: Sequence[tuple[SequenceDrafter, DraftRequest]],
        errors: dict[int, Exception] | None = None,
    ) -> list[Proposal | TreeProposal]:
        """The proposals for all sequences of a step; a draft model computes them as a batch.

        ``errors`` gets what the drafter of a single sequence raises, by its place in
        ``asked``, and that sequence no drafts; without ``errors`` it is raised.
        """
        if not asked:
            return []
        self.batch = len(asked)
        self.probing = False
        proposals: list[Proposal | TreeProposal] = [NO_DRAFTS] * len(asked)
        for_model: dict[SequenceDrafter, tuple[int, DraftRequest]] = {}
        for i, (one, request) in enumerate(asked):
            count = min(request.max_drafts, one.wanted())
            if count < 1:
                continue
            if isinstance(self.source, ModelDrafter):
                for_model[one] = i, request._replace(max_drafts=count)
                continue
            try:
                proposals[i] = propose_legal(one.drafter, request._replace(max_drafts=count))
            except Exception as error:
                if errors is None:
                    raise
                errors[i] = error
        if isinstance(self.source, ModelDrafter) and for_model:
            caches = self._assign_caches(list(for_model))
            shares = [
                _ModelShare(for_model[one][0], for_model[one][1]._replace(sequence=cache), errors)
                for one, cache in caches.items()
            ]
            shares, batch = compute_isolated(shares, self._propose_with_model, "draft")
            for share, proposal in zip(shares, batch or [], strict=True):
                proposals[share.place] = proposal
        return proposals

    def _propose_with_model(self, shares: list[_ModelShare]) -> list[Proposal]:
        """The draft model's proposals; where it fails, the sequences' generators are as they
        were, so that those that are asked again draw the same numbers.
        """
        assert isinstance(self.source, ModelDrafter)
        if len(shares) == 1:
            return self.source.propose_batch([shares[0].request])
        before = [share.request.rng.bit_generator.state for share in shares]
        try:
            return self.source.propose_batch([share.request for share in shares])
        except Exception:
            for share, state in zip(shares, before, strict=True):
                share.request.rng.bit_generator.state = state
            raise

    def _assign_caches(self, asking: list[SequenceDrafter]) -> dict[SequenceDrafter, int]:
        """Which cache of the model each sequence uses: a sequence keeps its own; the others
        get those of sequences that do not ask, the longest idle first.

        Where there are more sequences than caches, some go without.
        """
        others = set(asking)
        assigned: dict[SequenceDrafter, int] = {}
        free: list[int] = []
        for cache, owner in self._owners.items():
            if owner is not None and owner in others:
                assigned[owner] = cache
            else:
                free.append(cache)
        new = [one for one in asking if one not in assigned]
        assigned |= dict(zip(new, free, strict=False))
        for one, cache in assigned.items():
            del self._owners[cache]
            self._owners[cache] = one
        return assigned


class SequenceDrafter:
    """A sequence's drafter: that of the source, asked for as many drafts as pay."""

    constrains = True

    def __init__(self, drafting: AdaptiveDrafting, drafter: Drafter):
        self.drafting = drafting
        self.drafter = drafter
        self.gamma = drafter.gamma
        self.accepted = 0.0  # of its own drafts, decayed
        self.judged = 0.0
        self.idle = 0  # steps without a draft
        self.probes = False  # whether the current step's draft is a probe

    @property
    def alpha(self) -> float:
        """The estimate of its acceptance: its own drafts beside those of all sequences."""
        return self._mix(self.drafting.alpha)

    @property
    def optimistic_alpha(self) -> float:
        """The same with the optimistic estimate of all sequences; γ is chosen by it."""
        return self._mix(self.drafting.optimistic_alpha)

    def _mix(self, shared: float) -> float:
        """The α of all sequences and the sequence's own drafts, by their weights."""
        return (SHARED_WEIGHT * shared + self.accepted) / (SHARED_WEIGHT + self.judged)

    def propose(
        self,
        tokens: Sequence[int],
        count: int,
        sampling: SamplingParams,
        rng: np.random.Generator,
        constraint: DraftConstraint | None = None,
    ) -> Proposal | TreeProposal:
        """At most ``count`` drafts, of this sequence alone."""
        ask = DraftRequest(tokens, count, sampling, rng, 0, constraint)
        return self.drafting.propose_batch([(self, ask)])[0]

    def observe(self, best: Sequence[int], accepted: int) -> None:
        """Learn how many drafts were accepted; see ``Drafter.observe``."""
        self.drafter.observe(best, accepted)
        proposed = len(best) - 1  # as many as the scheduler had room for
        self.drafting.stats.add(proposed, accepted)
        if self.probes:
            failed_interval = 2 * self.drafting.probe_interval
            self.drafting.probe_interval = PROBE if accepted else failed_interval
        self.accepted = DECAY * self.accepted + accepted
        self.judged = DECAY * self.judged + min(accepted + 1, proposed)

    def wanted(self) -> int:
        """How many drafts to ask for in this step."""
        if self.drafting.costs is None:
            gamma = self.gamma
        else:
            gamma = self._worthwhile_gamma()
        self.drafting.gammas[gamma] = self.drafting.gammas.get(gamma, 0) + 1
        return gamma

    def _worthwhile_gamma(self) -> int:
        """The γ that pays, or 1 if it is time to probe."""
        drafting = self.drafting
        gamma = drafting.worthwhile_gamma(min(1.0, self.optimistic_alpha), self.gamma)
        self.idle = 0 if gamma else self.idle + 1
        # one probe per step, and none where drafts would not pay even at α = 1
        self.probes = (
            self.idle >= drafting.probe_interval
            and not drafting.probing
            and drafting.worthwhile_gamma(1.0, 1) > 0
        )
        if not self.probes:
            return gamma
        self.idle = 0
        drafting.probing = True
        return 1
