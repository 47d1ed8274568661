"""The serving engine: requests in, tokens out, one plan per step over the real network.

Sources: Yu et al. 2022 (Orca), Kwon et al. 2023 (vLLM), Zheng et al. 2024 (SGLang). Which
sequence runs when is decided by ``serve.scheduler``, where keys and values lie by
``kv.paged``; ``serve.model_runner`` computes a plan.

A step: drafters propose, the scheduler makes a plan, the model runner turns it into rows of
logits, then into tokens (or a beam search does), the scheduler applies them, and callbacks
receive what is new. If a step fails, it is rolled back: its requests are preempted, keep the
tokens that they have, and the error reaches the caller. What one request's own settings,
drafter or callback raise ends that request alone (``serve.isolation``).

The tokens of a request depend on its prompt, its settings and its seed alone: not on the
batch, the budget, chunks, cached prefixes or preemption. (Up to rounding: products of other
shapes round differently, and where two logits are that close, either may win.)

Left out: several devices, planning while the device computes.
"""

from __future__ import annotations

import time
from collections import abc, deque
from dataclasses import replace
from itertools import count
from threading import RLock
from typing import Unpack

from refllm.backend import Array
from refllm.decode.sampling_params import as_generator
from refllm.decode.speculative.interface import Drafter, ModelLike, check_vocabulary
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.errors import InputError
from refllm.kv.block_pool import BlockPool
from refllm.kv.paged import PagedKVCache
from refllm.serve import factory
from refllm.serve.adaptive_drafts import AdaptiveDrafting, propose_drafts
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.deadlines import Deadlines
from refllm.serve.isolation import Failures, sentence
from refllm.serve.model_runner import ModelRunner, PromptRows, sample_outcomes
from refllm.serve.outputs import EngineStats, RequestOutput
from refllm.serve.plan import Outcome, Plan, SequenceKey, SequenceUpdate
from refllm.serve.prompts import encode_prompt
from refllm.serve.request import Request, Sequence
from refllm.serve.request_state import Callback, RequestState, rules_of, validate_request


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
        clock: abc.Callable[[], float] = time.monotonic,
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
        clock
            seconds, for ``timeout`` and the times of outputs.
        """
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
        self.clock = clock
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
                window=model.config.sliding_window,
                **options,
            )
        else:
            self.scheduler = scheduler(self.pool)
        self.results: dict[abc.Hashable, RequestOutput] = {}  # finished; ``run`` takes them
        self._requests: dict[abc.Hashable, RequestState] = {}
        self._seeds = as_generator(seed, "Engine: seed")
        self._ids = count()
        self._deadlines = Deadlines()
        self._stepping = False
        self._reset_wanted = False  # the prefix cache is reset before the next plan
        # Held while a request is queued, planned, ended or recorded, and free while the network
        # computes and users' functions run: so another thread can submit and abort at any time.
        self._lock = RLock()
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
        with self._lock:
            if request.request_id is None:
                free = (i for i in self._ids if i not in self._requests and i not in self.results)
                request = replace(request, request_id=next(free))
            if request.request_id in self._requests:  # also one that ends within this step
                raise InputError(
                    f"request {request.request_id!r} is being served: another one needs another id"
                )
            if request.request_id in self.results:
                raise InputError(
                    f"request {request.request_id!r} has ended and its result was not taken: "
                    "use another id"
                )
            prompt = request.prompt
            request = encode_prompt(request, self.model)
            validate_request(request, self.model.config)
            if callback is not None and request.num_sequences > request.n:
                raise InputError(
                    f"request {request.request_id!r}: which of best_of outputs are the best is "
                    "known when all have ended: submit it without a callback"
                )
            rules = rules_of(request, self.model)
            state = RequestState(request, callback, self.model, self.drafter, rules, self.clock)
            state.output.prompt = prompt
            request_id = self.scheduler.submit(request)
            if request.seed is None:
                state.seed = int(self._seeds.integers(2**63))
            self._requests[request_id] = state
            if request.timeout is not None:
                self._deadlines.add(state.output.submitted_at + request.timeout, request_id)
        return request_id

    def abort(self, request_id: abc.Hashable) -> bool:
        """End a request now; its output has the tokens so far. False if it is unknown or has
        finished already. Its callback is not called.

        At any moment, and from any thread: of a step that is being computed, what belongs to
        the request is discarded.
        """
        with self._lock:
            cut_off = self.scheduler.abort(request_id)
            if not cut_off:
                return False  # if it has finished in this very step, its output follows
            self._finish(request_id, cut_off)
        return True

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running sequences are preempted and compute theirs again.

        The engine does so itself where a weight of the model was replaced. Call it after
        arrays of weights were changed in place. Within a step it takes effect with the next.
        """
        with self._lock:
            self._reset_wanted = self.scheduler.step is not None
            if not self._reset_wanted:
                self._forget_computed()

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
        """Plan a step, execute it, sample, and apply the outcomes; roll back on an error that
        is not a single request's.
        """
        failures = Failures()
        draft_q = self._draft(failures)  # what drafts were sampled from
        with self._lock:
            self._forget_old_weights()
            self._expire()
            self._fail(failures)
            plan = self.scheduler.plan()
            assert self.scheduler.step is not None
            sequences = list(self.scheduler.step.items)
            requests = {
                s.request.request_id: self._requests[s.request.request_id] for s in sequences
            }
        try:
            if self.on_plan is not None:
                self.on_plan(plan)
            z, prompt_rows = self._runner.execute(plan, sequences)
            self._score_prompts(prompt_rows, requests, failures)
            outcomes: list[Outcome] = []
            if z is not None:
                outcomes = sample_outcomes(plan, sequences, requests, draft_q, z, failures)
            with self._lock:
                self._fail(failures)
                return self.scheduler.update(plan, outcomes)
        except BaseException:
            with self._lock:
                self._roll_back(plan, sequences, requests, failures)
            raise

    def _score_prompts(
        self,
        prompt_rows: list[PromptRows],
        requests: abc.Mapping[abc.Hashable, RequestState],
        failures: Failures,
    ) -> None:
        """Keep the log-probabilities of prompt tokens that the step has computed."""
        for rows in prompt_rows:
            request_id = rows.sequence.request.request_id
            try:
                entries = self._runner.score_prompt(rows)
                requests[request_id].add_prompt_logprobs(rows.start, entries)
            except Exception as error:
                failures.add(request_id, "logits", error)

    def _draft(self, failures: Failures) -> dict[SequenceKey, Array | None]:
        """Ask the drafters, if there are any; returns the q that drafts were sampled from."""
        q: dict[SequenceKey, Array | None] = {}
        if self.drafter is None:
            return q
        with self._lock:
            sequences = [s for s in self.scheduler.running if self.scheduler.can_draft(s)]
            asked = [(s, self._requests[s.request.request_id]) for s in sequences]
        proposals = propose_drafts(self.drafter, asked, self.model.config.vocab_size, failures)
        with self._lock:
            for sequence, proposal in proposals:
                # drafts that are left from a step that failed are replaced
                if proposal.tokens or sequence.drafts:
                    self.scheduler.propose(sequence.key, proposal.tokens)
                    q[sequence.key] = proposal.q
        return q

    def _forget_old_weights(self) -> None:
        """Where weights were replaced since the last step: nothing that the old ones computed
        is read again.
        """
        if self._runner.capture(self.model) or self._reset_wanted:
            self._reset_wanted = False
            self._forget_computed()

    def _forget_computed(self) -> None:
        """Forget cached prefixes, and the log-probabilities of prompts that are half computed."""
        self.scheduler.reset_prefix_cache()
        for state in self._requests.values():
            known = state.output.prompt_logprobs
            if known is not None and len(known) < len(state.request.prompt):
                del known[max(1, state.request.output.prompt_logprobs_start) :]

    def _expire(self) -> None:
        """End the requests whose time is over; the updates say so at the end of the step."""
        if not self._deadlines:
            return
        for request_id, deadline in self._deadlines.passed(self.clock()):
            state = self._requests.get(request_id)
            if state is None or state.request.timeout is None:
                continue  # it has finished; another one may have its id now
            if state.output.submitted_at + state.request.timeout <= deadline:
                self.scheduler.expire(request_id)

    def _fail(self, failures: Failures) -> None:
        """End the requests that have failed; the updates say so at the end of the step."""
        for request_id, error in failures.items():
            self.scheduler.fail(request_id, error)
        failures.clear()

    def _roll_back(
        self,
        plan: Plan,
        sequences: list[Sequence],
        requests: abc.Mapping[abc.Hashable, RequestState],
        failures: Failures,
    ) -> None:
        """The step has failed: its requests are preempted and keep the tokens they have."""
        if self.scheduler.step is not None:
            self.scheduler.roll_back(plan)
        for sequence in sequences:
            request_id = sequence.request.request_id
            try:
                requests[request_id].roll_back(sequence)
            except Exception as error:
                failures.add(request_id, "text", error)
        self._fail(failures)

    # --- publishing -----------------------------------------------------------------------

    def _publish(self, updates: list[SequenceUpdate]) -> list[SequenceUpdate]:
        """Fill in text, call back, and finish requests; returns what users may see."""
        published: list[SequenceUpdate] = []
        over: dict[abc.Hashable, RequestState] = {}  # a callback may change its update
        searches: dict[abc.Hashable, list[SequenceUpdate]] = {}
        pending = deque(updates)  # a failure adds the ends of the other sequences
        while pending:
            update = pending.popleft()
            with self._lock:
                state = self._requests.get(update.request_id)
                if state is None or state.request is not update.sequence.request:
                    continue  # it has been aborted meanwhile
                if state.search is not None and update.finish_reason in (None, "dropped"):
                    searches.setdefault(update.request_id, []).append(update)
                    continue
                if searches:
                    searches.pop(update.request_id, None)  # of a search that has failed
                if ended := self._record(state, update):
                    pending += ended
                if update.finish_reason is not None:
                    over[update.request_id] = state
            published.append(update)
            if state.callback is not None:
                pending += self._call_back(state, [update])
        for request_id, group in searches.items():
            with self._lock:
                state = self._requests.get(request_id)
                if state is None or state.search is None:
                    continue
                hypotheses = self._advance_search(state, group)
                if hypotheses:
                    over[request_id] = state
            published += hypotheses
            self._call_back(state, hypotheses)
        with self._lock:
            for request_id, state in over.items():
                mine = self._requests.get(request_id) is state  # not aborted meanwhile
                if mine and not self.scheduler.has_request(request_id):
                    self._finish(request_id, [])
        return published

    def _record(self, state: RequestState, update: SequenceUpdate) -> list[SequenceUpdate]:
        """Record an update. If its text cannot be decoded, its request ends: returns the
        updates of the sequences that this ends.
        """
        try:
            state.record(update)
            return []
        except Exception as error:
            words = sentence("text", error)
        ended = self._end(update.request_id, words)
        if update.finish_reason is not None:  # this sequence had ended already
            update.fail(words)
            state.record(update)
        return ended

    def _end(self, request_id: abc.Hashable, error: str) -> list[SequenceUpdate]:
        """End a request that has failed; returns an update for each sequence that this ends."""
        ended = self.scheduler.abort(request_id, "error")
        return [SequenceUpdate(sequence, [], "error", error=error) for sequence in ended]

    def _advance_search(
        self, state: RequestState, group: list[SequenceUpdate]
    ) -> list[SequenceUpdate]:
        """The beams of a search go on, or it is over: returns its hypotheses then."""
        assert state.search is not None
        dropped = [update.sequence for update in group if update.finish_reason == "dropped"]
        survivors = [update.sequence for update in group if update.finish_reason is None]
        for sequence in dropped:
            state.count(sequence)
        try:
            if survivors:
                state.search.follow(survivors)
                return []
            return state.finish_search(dropped)
        except Exception as error:
            words = sentence("beam search", error)
        state.output.outputs = []
        updates = self._end(state.request.request_id, words)
        if not updates:  # the search was over
            updates = [
                SequenceUpdate(one.finish("error"), [], "error", error=words) for one in dropped
            ]
        for update in updates:
            state.record(update)
        return updates

    def _call_back(
        self, state: RequestState, updates: list[SequenceUpdate]
    ) -> list[SequenceUpdate]:
        """Call a request's callback. An exception in it ends this request, and no other:
        returns the updates of the sequences that this ends.
        """
        if state.callback is None:
            return []
        for delivered, update in enumerate(updates):
            try:
                state.callback(update)
            except (KeyboardInterrupt, SystemExit) as interrupt:
                self._interrupt = interrupt
            except BaseException as error:
                state.callback = None
                words = sentence("callback", error)
                with self._lock:
                    if self._requests.get(update.request_id) is not state:
                        return []  # it has aborted its request before it failed
                    for undelivered in updates[delivered:]:
                        if undelivered.finish_reason is not None:
                            undelivered.fail(words)
                            state.mark_failed(undelivered)
                    state.output.error = state.output.error or words
                    return self._end(update.request_id, words)
        return []

    def _finish(self, request_id: abc.Hashable, cut_off: list[Sequence]) -> None:
        """Move a request to the results, with the tokens of sequences that end only now."""
        state = self._requests.pop(request_id)
        for sequence in cut_off:
            state.record(SequenceUpdate(sequence, [], sequence.finish_reason))
        state.output.outputs = state.best_outputs()
        state.output.finished_at = self.clock()
        self.results[request_id] = state.output
