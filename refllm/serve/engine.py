"""The serving engine: requests in, tokens out, one plan a step over the real network.

Sources: Yu et al. 2022 (Orca), Kwon et al. 2023 (vLLM), Zheng et al. 2024 (SGLang). Who
runs when is ``serve.scheduler``'s, where keys and values lie ``kv.paged``'s, how a plan is
computed ``serve.executor``'s.

A step: drafts are proposed, the scheduler makes a plan, ``execute`` turns it into rows of
logits, ``choose`` (or a beam search) turns those into outcomes, the scheduler books them,
and whoever listens is told. A step that fails is withdrawn: its requests start over, with
the tokens that they have, and the error is the caller's.

The tokens of a request depend on its prompt, its settings and its seed, and on nothing
else: not on who is in the batch, the budget, chunks, cached prefixes or preemption. (But
for rounding: a product rounds otherwise in another shape, and where two logits are as close
as that, either may win.)

Left out: several devices, planning while the device computes, structured output,
log-probabilities.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Hashable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from refllm.backend import Array, asarray_like
from refllm.decode.fast.captured_step import stepper
from refllm.decode.speculative.drafters import ModelDrafter
from refllm.decode.speculative.interface import Ask, Drafter, TreeProposal, check_vocabulary
from refllm.kv.paged import PagedKVCache
from refllm.serve import factory
from refllm.serve.adaptive_drafts import AdaptiveDrafting
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.executor import execute
from refllm.serve.outputs import EngineStats, RequestOutput, StreamChunk
from refllm.serve.plan import Name, Outcome, Plan, SampledTokens, SequenceUpdate
from refllm.serve.request import Request, Sequence
from refllm.serve.request_state import Record, RequestState, StreamCallback, refuse
from refllm.serve.sampler import SamplingInput, choose, penalised

FAILED = [SampledTokens((), "error")]


class Engine(EngineStats):
    """Serves requests with ``model`` from ``num_blocks`` blocks of keys and values; what it
    counts are attributes.
    """

    def __init__(
        self,
        model: Record,
        *,
        num_blocks: int,
        block_size: int = 16,
        max_batch_tokens: int | None = 2048,
        max_sequences: int | None = 128,
        policy: str = "fcfs",
        prefix_cache: str | None = "auto",
        scheduler: Callable[[Any], BaseScheduler] | None = None,
        drafter: Callable[[], Drafter] | None = None,
        poison: bool = False,
        seed: int | None = None,
        on_plan: Callable[[Plan], object] | None = None,
        **options: Any,
    ):
        """``model`` is a ``Model``, or any record of config, weights and tokenizer.

        Parameters
        ----------
        policy, prefix_cache, options
            as ``policies.make`` describes them (``chunked``, ``long_prefill``,
            ``watermark``, ``eviction``, …).
        scheduler
            makes another scheduler from the block pool instead: ``lambda pool:
            Scheduler(PagedKVManager(pool), order=…)``.
        drafter
            makes a drafter (``decode.speculative.drafters``) for each sequence: what it
            guesses is verified in one step.
        seed
            draws seeds for the requests that bring none; None: fresh ones.
        poison
            fill blocks that nobody can read with NaN: a wrong slot then shows.
        on_plan
            sees every plan before it is executed.
        """
        if seed is not None and seed < 0:
            raise ValueError(f"the engine's seed is None or a whole number, 0 or more, got {seed}")
        if isinstance(drafter, AdaptiveDrafting) and isinstance(drafter.source, ModelDrafter):
            check_vocabulary(model, drafter.source.model)
        self.model = model
        self.drafter = drafter
        self.on_plan = on_plan
        self.cache = PagedKVCache(
            model.config, num_blocks, block_size, like=model.weights["norm"], poison=poison
        )
        self._weights = model.weights
        self._stepper = stepper(model.weights, model.config)
        self.pool = self.cache.pool
        if scheduler is None:
            self.scheduler = factory.make(
                policy,
                self.pool,
                prefix_cache=prefix_cache,
                max_batch_tokens=max_batch_tokens,
                max_sequences=max_sequences,
                **options,
            )
        else:
            self.scheduler = scheduler(self.pool)
        self.results: dict[Hashable, RequestOutput] = {}  # ended, until somebody takes them; ``run`` does
        self._live: dict[Hashable, RequestState] = {}
        # the q that a sequence's drafts were sampled from
        self._drafted: dict[Name, Array | None] = {}
        self._seeds = np.random.default_rng(seed)
        self._ids = count()
        self._stepping = False
        # Ctrl-C in a listener: raised once the step is in the books
        self._interrupt: BaseException | None = None

    @property
    def unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._live)

    def submit(self, request: Request, listener: StreamCallback | None = None) -> Hashable:
        """Queue a request; returns its id. ``listener(piece)`` hears what is new after each
        step.

        A listener may submit and abort, but not step; one that raises ends its own request,
        with ``"error"``. A beam search is heard once, at its end.

        Raises
        ------
        ValueError
            for a request that can never be served (what is wrong is named), or an id that
            is in use: one is until its result has been taken. The engine is as it was
            before.
        """
        if request.id is None:
            free = next(i for i in self._ids if i not in self._live and i not in self.results)
            request = replace(request, id=free)
        if request.id in self.results:
            raise ValueError(
                f"request {request.id!r} has ended and its result was not taken: use another id"
            )
        refuse(request, self.model.config)
        name = self.scheduler.submit(request)
        if request.seed is None:
            seed = int(self._seeds.integers(2**63))
        else:
            seed = request.seed
        self._live[name] = RequestState(request, listener, seed, self.model, self.drafter)
        return name

    def abort(self, name: Hashable) -> bool:
        """End a request now; its result has what it said so far. False if it is unknown or
        has ended already.

        Its listener hears nothing of that: whoever aborts knows.
        """
        if name not in self._live:
            return False
        self._close(name, self.scheduler.abort(name), "aborted")
        return True

    def run(self) -> dict[Hashable, RequestOutput]:
        """Step until every request has ended; returns, and lets go of, all results that
        nobody has taken.
        """
        while self.unfinished:
            self.step()
        taken = self.results
        self.results = {}
        return taken

    def step(self) -> list[StreamChunk]:
        """Compute one plan; returns what is new, which listeners have heard by then."""
        if self._stepping:
            raise RuntimeError(
                "a listener called step: it may submit and abort, the step under way goes on by itself"
            )
        self._stepping = True
        self._interrupt = None
        try:
            told = self._tell(self._compute())
        finally:
            self._stepping = False
        if self._interrupt is not None:
            raise self._interrupt
        return told

    def check(self) -> None:
        """AssertionError if the books of scheduler, memory and engine do not agree."""
        self.scheduler.check()
        booked = {
            sequence.request.id for sequence in (*self.scheduler.running, *self.scheduler.waiting)
        }
        assert booked <= set(self._live), "a sequence without a request"
        assert not set(self._live) & set(self.results)

    # --- a step ---------------------------------------------------------------------------

    def _compute(self) -> list[SequenceUpdate]:
        if self.model.weights is not self._weights:
            self._weights, self._stepper = (
                self.model.weights,
                stepper(self.model.weights, self.model.config),
            )
        self._draft()
        plan = self.scheduler.plan()
        assert self.scheduler.step is not None
        sequences = list(self.scheduler.step.items)
        try:
            if self.on_plan is not None:
                self.on_plan(plan)
            tokens = {
                item.name: [*sequence.tokens, *sequence.drafts] if sequence.drafts else sequence.tokens
                for sequence, item in self.scheduler.step.items.items()
            }
            z = execute(
                plan, tokens, self.model.weights, self.model.config, self.cache, self._stepper
            )
            outcomes = [] if z is None else self._outcomes(plan, sequences, z)
        except BaseException:
            self.scheduler.roll_back(plan)
            for sequence in sequences:
                self._live[sequence.request.id].rewind(sequence)
            raise
        return self.scheduler.update(plan, outcomes)

    def _draft(self) -> None:
        self._drafted.clear()
        if self.drafter is None:
            return
        asking = [sequence for sequence in self.scheduler.running if self.scheduler.drafts(sequence)]
        asks: list[tuple[Any, Ask]] = []
        for sequence in asking:
            voice = self._live[sequence.request.id].voice(sequence.index)
            assert voice.drafter is not None
            limit = min(voice.drafter.gamma, sequence.left - 1)
            asks.append((voice.drafter, Ask(sequence.tokens, limit, voice.how, voice.rng, 0)))
        if isinstance(self.drafter, AdaptiveDrafting):
            proposals = self.drafter.propose_together(asks)
        else:
            proposals = [drafter.propose(*ask[:4]) for drafter, ask in asks]
        chains = [proposal for proposal in proposals if not isinstance(proposal, TreeProposal)]
        if len(chains) < len(proposals):
            raise ValueError(
                "the engine verifies chains: give it a ModelDrafter where this one grows trees"
            )
        for sequence, chain in zip(asking, chains, strict=True):
            # those of a step that did not come about are replaced
            if chain.tokens or sequence.drafts:
                self.scheduler.propose(sequence.key, chain.tokens)
                self._drafted[sequence.key] = chain.q

    def _outcomes(self, plan: Plan, sequences: abc.Sequence[Sequence], z: Array) -> list[Outcome]:
        """z[R, V] → what becomes of each sequence that was sampled, in the order of the plan."""
        seats: list[SamplingInput] = []
        sampled: list[Sequence] = []
        at = 0
        for sequence, item in zip(sequences, plan.items, strict=True):
            if not item.samples:
                continue
            request = sequence.request
            drafts = sequence.drafts
            rows = slice(at, at + item.samples)
            q = self._drafted.get(sequence.key) if drafts else None
            seats.append(
                SamplingInput(
                    request,
                    sequence.tokens,
                    self._live[request.id].voices_of(sequence),
                    drafts,
                    q,
                    rows,
                )
            )
            sampled.append(sequence)
            at += item.samples
        z = penalised(z, seats)
        outcomes: list[Outcome] = []
        for sequence, seat, chosen in zip(sampled, seats, choose(z, seats), strict=True):
            if chosen is None:
                self._live[
                    sequence.request.id
                ].result.error = "the logits have no largest one: NaN, +inf or nothing but -inf"
                outcomes.append(FAILED)
            else:
                outcomes.append(
                    [voice.hear(new) for voice, new in zip(seat.voices, chosen, strict=True)]
                )
                if seat.drafts and (drafter := seat.voices[0].drafter) is not None:
                    drafter.observe(seat.best, len(chosen[0]) - 1)
        self._search(sampled, seats, z, outcomes)
        return outcomes

    def _search(
        self, sampled: abc.Sequence[Sequence], seats: abc.Sequence[SamplingInput], z: Array, outcomes: list[Outcome]
    ) -> None:
        """Replace the outcomes of beams by what their search says; they are sampled all in
        one step.
        """
        groups: dict[Hashable, list[int]] = {}
        for i, sequence in enumerate(sampled):
            if sequence.request.beam:
                groups.setdefault(sequence.request.id, []).append(i)
        for name, places in groups.items():
            search = self._live[name].search
            assert search is not None
            if any(outcomes[i] is FAILED for i in places):
                decided: abc.Sequence[Outcome] = [FAILED] * len(places)
            else:
                rows = asarray_like([seats[i].rows.start for i in places], z, "int64")
                decided = search.advance([sampled[i] for i in places], z[rows])
            for i, outcome in zip(places, decided, strict=True):
                outcomes[i] = outcome

    # --- who hears of it ------------------------------------------------------------------

    def _tell(self, events: abc.Sequence[SequenceUpdate]) -> list[StreamChunk]:
        told: list[StreamChunk] = []
        beams: dict[Hashable, list[SequenceUpdate]] = {}
        for event in events:
            name = event.sequence.request.id
            live = self._live.get(event.sequence.request.id)
            if live is None:
                continue  # a listener has aborted it meanwhile
            if live.search is not None and event.reason in (None, "dropped"):
                beams.setdefault(name, []).append(event)
                continue
            piece = live.hear(event)
            told.append(piece)
            if live.listener is not None:
                self._pass_on(name, live, [piece])
        for name, some in beams.items():
            live = self._live.get(name)
            if live is None or live.search is None:
                continue
            survivors = [event.sequence for event in some if event.reason is None]
            if survivors:
                live.search.follow(survivors)
                continue
            pieces = live.found([event.sequence for event in some])
            told += pieces
            self._pass_on(name, live, pieces)
        for name in {event.sequence.request.id for event in events}:
            if name in self._live and not self.scheduler.serves(name):
                self._close(name, [], "")
        return told

    def _pass_on(self, name: Hashable, live: RequestState, pieces: abc.Sequence[StreamChunk]) -> None:
        """To the listener; one that raises ends its own request, and no other."""
        try:
            if live.listener is not None:
                for piece in pieces:
                    live.listener(piece)
        except Exception as error:
            live.listener = None
            live.result.error = f"the listener raised {type(error).__name__}: {error}"
            if self._live.get(name) is live:
                self._close(name, self.scheduler.abort(name), "error")
        except BaseException as interrupt:
            self._interrupt = interrupt

    def _close(self, name: Hashable, sequences: abc.Sequence[Sequence], reason: str) -> None:
        """A request has ended: its result, with what ``sequences``, cut off now, have said."""
        live = self._live.pop(name)
        for sequence in sequences:
            live.hear(SequenceUpdate(sequence, [], reason))
        live.result.outputs.sort(key=lambda output: output.index)
        self.results[name] = live.result
