"""The serving engine: requests in, tokens out, one plan per step over the real network.

Sources: Yu et al. 2022 (Orca), Kwon et al. 2023 (vLLM), Zheng et al. 2024 (SGLang). Which
sequence runs when is decided by ``serve.scheduler``, where keys and values lie by
``kv.paged``; ``serve.model_runner`` computes a plan.

A step: drafters propose, the scheduler makes a plan, the model runner turns it into rows of
logits, then into tokens (or a beam search does), the scheduler applies them, and callbacks
receive what is new. If a step fails, it is rolled back: its requests are preempted, keep the
tokens that they have, and the error reaches the caller.

The tokens of a request depend on its prompt, its settings and its seed alone: not on the
batch, the budget, chunks, cached prefixes or preemption. (Up to rounding: products of other
shapes round differently, and where two logits are that close, either may win.)

Left out: several devices, planning while the device computes, structured output,
log-probabilities.
"""

from __future__ import annotations

from collections import abc
from dataclasses import replace
from itertools import count
from typing import Unpack

import numpy as np

from refllm.backend import Array
from refllm.decode.speculative.interface import Drafter, ModelLike, check_vocabulary
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.errors import InputError
from refllm.kv.block_pool import BlockPool
from refllm.kv.paged import PagedKVCache
from refllm.serve import factory
from refllm.serve.adaptive_drafts import AdaptiveDrafting, propose_drafts
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.model_runner import ModelRunner, sample_outcomes
from refllm.serve.outputs import EngineStats, RequestOutput
from refllm.serve.plan import Outcome, Plan, SequenceKey, SequenceUpdate
from refllm.serve.request import Request, Sequence
from refllm.serve.request_state import Callback, RequestState, logits_processors, validate_request


class Engine(EngineStats):
    """Serves requests with ``model`` from ``num_blocks`` blocks of keys and values; its
    statistics are attributes.

    >>> import refllm
    >>> engine = Engine(refllm.load("stdlib-draft"), num_blocks=8)
    >>> request_id = engine.submit(Request([5, 9, 2], max_tokens=4, ignore_eos=True))
    >>> output = engine.run()[request_id]
    >>> len(output.tokens), output.finish_reason, engine.steps
    (4, 'length', 4)
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        num_blocks: int,
        block_size: int = 16,
        max_batch_tokens: int | None = 2048,
        max_sequences: int | None = 128,
        policy: str = "fcfs",
        prefix_cache: str | None = "auto",
        scheduler: abc.Callable[[BlockPool], BaseScheduler] | None = None,
        drafter: abc.Callable[[], Drafter] | None = None,
        poison: bool = False,
        seed: int | None = None,
        on_plan: abc.Callable[[Plan], object] | None = None,
        **options: Unpack[factory.PolicyOptions],
    ):
        """``model`` is a ``Model``, or any record of config, weights and tokenizer.

        Parameters
        ----------
        policy, prefix_cache, options
            see ``factory.make`` (``chunked``, ``long_prefill``, ``watermark``,
            ``eviction``, …).
        scheduler
            makes another scheduler from the block pool:
            ``lambda pool: Scheduler(PagedKVManager(pool), order=…)``.
        drafter
            makes a drafter (``decode.speculative``) for each sequence, as
            ``lambda: NGramDrafter(4)`` or ``AdaptiveDrafting(…)`` does; its drafts are
            verified in one step.
        seed
            draws the seeds of requests that have none; None: unpredictable ones.
        poison
            fill vacant blocks with NaN, so that reading a wrong slot shows.
        on_plan
            receives every plan before it is executed.
        """
        if seed is not None and seed < 0:
            raise InputError(f"the engine's seed is None or an integer, 0 or more, got {seed}")
        if drafter is not None and not callable(drafter):
            raise InputError(
                "Engine: drafter makes one drafter per sequence: pass AdaptiveDrafting(…) or, for "
                f"example, lambda: NGramDrafter(4), not {type(drafter).__name__}"
            )
        if isinstance(drafter, AdaptiveDrafting) and isinstance(drafter.source, ModelDrafter):
            check_vocabulary(model, drafter.source.model)
        self.model = model
        self.drafter = drafter
        self.on_plan = on_plan
        self.cache = PagedKVCache(
            model.config, num_blocks, block_size, like=model.weights["norm"], poison=poison
        )
        self.pool = self.cache.pool
        self._runner = ModelRunner(model, self.cache)
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
        self.results: dict[abc.Hashable, RequestOutput] = {}  # finished; ``run`` takes them
        self._requests: dict[abc.Hashable, RequestState] = {}
        self._seeds = np.random.default_rng(seed)
        self._ids = count()
        self._stepping = False
        # Ctrl-C in a callback: raised after the step has been applied
        self._interrupt: BaseException | None = None

    @property
    def unfinished(self) -> bool:
        """Whether any request has not finished."""
        return bool(self._requests)

    def submit(self, request: Request, callback: Callback | None = None) -> abc.Hashable:
        """Queue a request; returns its id. After each step ``callback(update)`` receives
        what is new of each of its sequences.

        A callback may submit and abort, but not step; if it raises, its own request ends
        with ``"error"``. A beam search is reported once, at its end.

        Raises
        ------
        ValueError
            for a request that can never be served (the message says why), or an id that is
            in use: until its output has been taken. The engine is unchanged then.
        """
        if request.request_id is None:
            free = (i for i in self._ids if i not in self._requests and i not in self.results)
            request = replace(request, request_id=next(free))
        if request.request_id in self.results:
            raise InputError(
                f"request {request.request_id!r} has ended and its result was not taken: "
                "use another id"
            )
        validate_request(request, self.model.config)
        processors = logits_processors(request, self.model)
        request_id = self.scheduler.submit(request)
        seed = request.seed
        if seed is None:
            seed = int(self._seeds.integers(2**63))
        self._requests[request_id] = RequestState(
            request, callback, seed, self.model, self.drafter, processors
        )
        return request_id

    def abort(self, request_id: abc.Hashable) -> bool:
        """End a request now; its output has the tokens so far. False if it is unknown or has
        finished already. Its callback is not called.
        """
        if request_id not in self._requests:
            return False
        self._finish(request_id, self.scheduler.abort(request_id))
        return True

    def run(self) -> dict[abc.Hashable, RequestOutput]:
        """Step until every request has finished; returns, and forgets, all outputs that have
        not been taken.
        """
        while self.unfinished:
            self.step()
        results = self.results
        self.results = {}
        return results

    def step(self) -> list[SequenceUpdate]:
        """Compute one plan; returns what is new, after the callbacks have received it."""
        if self._stepping:
            raise RuntimeError(
                "a callback called step: it may submit and abort, but the current step "
                "continues without it"
            )
        self._stepping = True
        self._interrupt = None
        try:
            published = self._publish(self._compute())
        finally:
            self._stepping = False
        if self._interrupt is not None:
            raise self._interrupt
        return published

    def check(self) -> None:
        """AssertionError if an invariant of scheduler, memory or engine is broken."""
        self.scheduler.check()
        scheduled = {
            s.request.request_id for s in (*self.scheduler.running, *self.scheduler.waiting)
        }
        assert scheduled <= set(self._requests), "a sequence without a request"
        assert not set(self._requests) & set(self.results)

    # --- a step ---------------------------------------------------------------------------

    def _compute(self) -> list[SequenceUpdate]:
        """Plan a step, execute it, sample, and apply the outcomes; roll back on any error."""
        draft_q: dict[SequenceKey, Array | None] = {}  # what its drafts were sampled from
        if self.drafter is not None:
            draft_q = propose_drafts(self.drafter, self.scheduler, self._requests)
        plan = self.scheduler.plan()
        assert self.scheduler.step is not None
        sequences = list(self.scheduler.step.items)
        try:
            if self.on_plan is not None:
                self.on_plan(plan)
            z = self._runner.execute(plan, sequences, self.model)
            outcomes: list[Outcome] = []
            if z is not None:
                outcomes = sample_outcomes(plan, sequences, self._requests, draft_q, z)
        except BaseException:
            self.scheduler.roll_back(plan)
            for sequence in sequences:
                self._requests[sequence.request.request_id].roll_back(sequence)
            raise
        return self.scheduler.update(plan, outcomes)

    # --- publishing -----------------------------------------------------------------------

    def _publish(self, updates: list[SequenceUpdate]) -> list[SequenceUpdate]:
        """Fill in text, call back, and finish requests; returns what users may see."""
        published: list[SequenceUpdate] = []
        searches: dict[abc.Hashable, list[SequenceUpdate]] = {}
        for update in updates:
            state = self._requests.get(update.request_id)
            if state is None:
                continue  # a callback has aborted it meanwhile
            if state.search is not None and update.finish_reason in (None, "dropped"):
                searches.setdefault(update.request_id, []).append(update)
            else:
                state.record(update)
                published.append(update)
                self._call_back(update.request_id, state, [update])
        for request_id, group in searches.items():
            state = self._requests.get(request_id)
            if state is None or state.search is None:
                continue
            dropped = [update.sequence for update in group if update.finish_reason == "dropped"]
            state.output.preemptions += sum(sequence.preemptions for sequence in dropped)
            survivors = [update.sequence for update in group if update.finish_reason is None]
            if survivors:
                state.search.follow(survivors)
                continue
            hypotheses = state.finish_search(dropped)
            published += hypotheses
            self._call_back(request_id, state, hypotheses)
        for request_id in {update.request_id for update in updates}:
            if request_id in self._requests and not self.scheduler.has_request(request_id):
                self._finish(request_id, [])
        return published

    def _call_back(
        self, request_id: abc.Hashable, state: RequestState, updates: list[SequenceUpdate]
    ) -> None:
        """Call a request's callback; an exception in it ends this request, and no other."""
        try:
            if state.callback is not None:
                for update in updates:
                    state.callback(update)
        except Exception as error:
            state.callback = None
            state.output.error = f"the callback raised {type(error).__name__}: {error}"
            if self._requests.get(request_id) is state:
                self._finish(request_id, self.scheduler.abort(request_id, "error"))
        except BaseException as interrupt:
            self._interrupt = interrupt

    def _finish(self, request_id: abc.Hashable, cut_off: list[Sequence]) -> None:
        """Move a request to the results, with the tokens of sequences that end only now."""
        state = self._requests.pop(request_id)
        for sequence in cut_off:
            state.record(SequenceUpdate(sequence, [], sequence.finish_reason))
        state.output.outputs.sort(key=lambda output: output.index)
        self.results[request_id] = state.output
