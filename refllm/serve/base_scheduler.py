"""What all schedulers share: the unfinished requests, and what a step's outcomes do to them.

``serve.scheduler`` and ``serve.baselines.static_batching`` decide what a step computes. Here
is what comes before and after: requests are submitted and aborted, sequences fork and
finish, outcomes become tokens, rejected drafts are discarded.

| state    | memory               | becomes                                              |
|----------|----------------------|------------------------------------------------------|
| waiting  | none                 | running, when it is admitted                         |
| running  | tokens [0, computed) | waiting, when it is preempted (it keeps its tokens)  |
| finished | none                 | (a request has finished when all its sequences have) |

An outcome is a list of continuations of one sequence. As a rule there is one. A request
with n sequences forks at its first token, into up to n. In a beam search, whose beams are
all sampled in one step, a beam has any number as long as the search keeps at most n beams;
none drops the beam. After γ drafts a continuation has 1 to γ + 1 tokens: the accepted
drafts, then one sampled token; the memory of the rejected drafts is freed.

Left out: text. Where it ends before ``max_tokens``, the engine says so by the
``finish_reason`` of a continuation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import abc
from dataclasses import replace
from itertools import count

from refllm.errors import InputError
from refllm.serve.admission import Order
from refllm.serve.isolation import RequestFailure
from refllm.serve.kv_manager import KVManager
from refllm.serve.plan import (
    Outcome,
    Plan,
    PlanBuilder,
    SampledTokens,
    SequenceKey,
    SequenceUpdate,
    check_outcomes,
)
from refllm.serve.request import Request, Sequence, SequenceStatus


class BaseScheduler(ABC):
    """Keeps the queue and the running sequences. ``plan`` and ``update`` alternate; between
    them ``step`` holds the current plan.
    """

    def __init__(
        self,
        memory: KVManager,
        order: Order,
        max_batch_tokens: int | None,
        max_sequences: int | None,
    ):
        """``None`` lifts a limit; ValueError for a limit below 1."""
        limits = {"max_batch_tokens": max_batch_tokens, "max_sequences": max_sequences}
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise InputError(f"{name} must be at least 1, or None for no limit, got {limit}")
        self.memory = memory
        self.order = order
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.waiting: list[Sequence] = []
        # in the order of admission, a request's sequences side by side
        self.running: list[Sequence] = []
        self.step: PlanBuilder | None = None
        self._active: dict[abc.Hashable, list[Sequence]] = {}  # request → unfinished sequences
        self._forked: dict[abc.Hashable, int] = {}  # request → sequences that it has ever had
        # finished without a step; part of the next update
        self._finished: list[SequenceUpdate] = []
        self._submitted = 0
        # counters
        self.steps = 0
        self.computed = 0  # tokens
        self.sampled = 0
        self.jumped = 0  # of the sampled tokens, those that were appended without sampling
        self.preemptions = 0
        self.queried = 0  # tokens of sequences at their first admission
        self.cached = 0  # of these, found in the prefix cache
        self.resumed_queried = 0  # the same for preempted sequences that are admitted again
        self.resumed_cached = 0

    # --- requests -------------------------------------------------------------------------

    @property
    def unfinished(self) -> bool:
        """Whether another step has anything to compute or to report."""
        return bool(self._active or self._finished)

    def has_request(self, request_id: abc.Hashable) -> bool:
        """Whether a sequence of the request has not finished."""
        return request_id in self._active

    def submit(self, request: Request) -> abc.Hashable:
        """Queue a request; returns its id. ValueError, and no change, if it can never be served."""
        request_id = request.request_id
        if request_id is None:
            request_id = next(i for i in count(self._submitted) if i not in self._active)
            request = replace(request, request_id=request_id)
        if request_id in self._active:
            raise InputError(
                f"request {request_id!r} is being served: another one needs another id"
            )
        reason = self.rejection_reason(request)
        if reason:
            raise InputError(f"request {request_id!r} {reason}")
        order = self._submitted
        self._submitted += 1
        if request.max_tokens == 0:
            for index in range(request.num_sequences):
                done = Sequence(request, index, order).finish("length")
                self._finished.append(SequenceUpdate(done, [], "length"))
            return request_id
        sequence = Sequence(request, 0, order)
        self._active[request_id] = [sequence]
        self._forked[request_id] = 1
        self.order.push(self.waiting, sequence)
        return request_id

    def rejection_reason(self, request: Request) -> str | None:
        """Why a request can never be served; None if it can."""
        n = request.num_sequences
        budget = self.max_batch_tokens
        if n > 1 and not self.memory.can_fork:
            return f"asks for {n} sequences, which this memory cannot share: submit {n} requests"
        if self.max_sequences is not None and n > self.max_sequences:
            return f"asks for {n} sequences, and at most {self.max_sequences} run at a time"
        if request.beam and budget is not None and n > budget:
            return f"has {n} beams, which advance in one step, and its budget is {budget} tokens"
        return self.memory.rejection_reason(request)

    def abort(self, request_id: abc.Hashable, finish_reason: str = "abort") -> list[Sequence]:
        """End a request at once, even between ``plan`` and ``update``; returns the sequences
        that this ended.

        The list is empty for a request that is unknown or has finished.
        """
        sequences = list(self._active.get(request_id, ()))
        for sequence in sequences:
            self._finish(sequence, finish_reason)
        return sequences

    def fail(self, request_id: abc.Hashable, error: str) -> list[Sequence]:
        """End a request after an error of its own, as ``abort`` does; the sentence ``error``
        is part of the next update. Returns the sequences that this ended.
        """
        ended = self.abort(request_id, "error")
        self._finished += [SequenceUpdate(one, [], "error", error=error) for one in ended]
        return ended

    def expire(self, request_id: abc.Hashable) -> None:
        """End a request whose time is over; it is part of the next update."""
        ended = self.abort(request_id, "timeout")
        self._finished += [SequenceUpdate(one, [], "timeout") for one in ended]

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix. Running sequences are preempted: they compute their
        tokens again, so nothing that was computed before is read after this call.

        RuntimeError between ``plan`` and ``update``.
        """
        if self.step is not None:
            raise RuntimeError("the current plan reads cached prefixes: update or roll_back first")
        self._preempt_all()
        self.memory.forget_prefixes()

    def propose(self, key: SequenceKey, drafts: abc.Sequence[int]) -> int:
        """Set a running sequence's drafts for the next plan; returns how many are of use."""
        of_request = self._active.get(key[0], [])
        sequence = next((s for s in of_request if s.index == key[1]), None)
        if sequence is None or not self.can_draft(sequence):
            return 0
        sequence.drafts = [int(t) for t in drafts[: sequence.remaining - 1]]
        return len(sequence.drafts)

    def can_draft(self, sequence: Sequence) -> bool:
        """Whether the next plan can use drafts of a sequence."""
        return (
            sequence.status is SequenceStatus.RUNNING
            and sequence.computed == len(sequence.tokens) - 1  # not in the middle of its prompt
            and sequence.slots == 1  # not about to fork
            and sequence.remaining > 1
            and not sequence.request.beam
        )

    # --- steps ----------------------------------------------------------------------------

    @abstractmethod
    def plan(self) -> Plan:
        """Decide the next step: it computes at least one token if any request is unfinished.

        RuntimeError if the last plan was neither completed (``update``) nor given up
        (``roll_back``).
        """

    def _begin_plan(self) -> PlanBuilder:
        """An empty plan with this scheduler's limits."""
        if self.step is not None:
            raise RuntimeError("the last plan is not completed: update or roll_back first")
        return PlanBuilder(
            Plan(
                self.steps,
                [],
                budget=self.max_batch_tokens,
                max_sequences=self.max_sequences,
                block_size=self.memory.block_size,
            )
        )

    def _finish_plan(self, step: PlanBuilder) -> Plan:
        """Make the plan current and return it."""
        step.plan.items = list(step.items.values())
        step.plan.copies = [pair for copies in step.copies.values() for pair in copies]
        step.plan.waiting = len(self.waiting)
        self.step = step
        return step.plan

    def update(self, plan: Plan, outcomes: abc.Sequence[Outcome]) -> list[SequenceUpdate]:
        """Apply a plan's outcomes: outcomes[i] for plan.sampling[i].

        Returns one update for each sequence that got tokens or finished. Sequences that were
        aborted since the plan was made are skipped. ValueError, before anything has changed,
        for an outcome that does not fit its item.
        """
        step = self._current_step(plan)
        sampled = [sequence for sequence, item in step.items.items() if item.samples]
        check_outcomes(sampled, outcomes, self._active)
        self.step = None
        self.steps += 1
        self.computed += plan.tokens
        updates = self._finished
        self._finished = []
        self._unhold(step)
        for sequence, item in step.items.items():
            if sequence.status is SequenceStatus.RUNNING and not item.samples:
                sequence.computed = item.start + item.count
                self._commit(sequence)
        for sequence, outcome in zip(sampled, outcomes, strict=True):
            if sequence.status is SequenceStatus.RUNNING:
                updates += self._apply_outcome(sequence, outcome)
        updates += self._finished  # of requests that have failed in this update
        self._finished = []
        return updates

    def roll_back(self, plan: Plan) -> None:
        """Give up a plan whose execution failed: its sequences are preempted."""
        step = self._current_step(plan)
        self.step = None
        self._unhold(step)
        for sequence in reversed(step.items):  # so that the queue keeps their order
            if sequence.status is SequenceStatus.RUNNING:
                for beam in self._group(sequence):
                    self._preempt(beam)

    def _abandon(self, step: PlanBuilder) -> None:
        """Planning itself has failed: preempt everything, as if there had been no plan."""
        self._unhold(step)
        self._preempt_all()
        for sequence in self.waiting:
            self.memory.release(sequence, preempted=True)  # one that was being admitted

    def _preempt_all(self) -> None:
        """Preempt all running sequences."""
        for sequence in reversed(self.running[:]):  # so that the queue keeps their order
            self._preempt(sequence)

    def _unhold(self, step: PlanBuilder) -> None:
        """The copies of a step have been made, or never will be."""
        for copies in step.copies.values():
            self.memory.unhold(copies)

    def _commit(self, sequence: Sequence) -> bool:
        """Commit what a sequence has computed; False if that failed, and ended its request."""
        try:
            self.memory.commit(sequence)
        except RequestFailure as failure:
            self.fail(failure.request_id, str(failure))
            return False
        return True

    def _current_step(self, plan: Plan) -> PlanBuilder:
        if self.step is None or self.step.plan is not plan:
            raise RuntimeError("this is not the current plan")
        return self.step

    def _apply_outcome(self, sequence: Sequence, outcome: Outcome) -> list[SequenceUpdate]:
        """The sequence takes the first continuation, forks take the others; without any it
        is dropped.
        """
        length = len(sequence.tokens)
        first = outcome[0] if outcome else SampledTokens((), "dropped")
        tokens = list(first.tokens[: sequence.remaining])
        if sequence.drafts:
            accepted = max(0, len(tokens) - 1 - first.jumped)
            sequence.drafted += len(sequence.drafts)
            sequence.accepted += accepted
            sequence.work += len(sequence.drafts) - accepted
        # Verified are the sequence's own tokens and the accepted drafts. The next token was
        # sampled from their logits; it is not computed yet, nor what was jumped over after it.
        sequence.computed = length + max(0, len(tokens) - 1 - first.jumped)
        self.jumped += sum(one.jumped for one in outcome)
        sequence.drafts = []
        sequence.tokens += tokens
        if tokens and not self._commit(sequence):
            self.sampled += len(tokens)
            return [SequenceUpdate(sequence, tokens)]  # its end follows
        sequence.stop_reason = first.stop_reason
        updates = [SequenceUpdate(sequence, tokens, first.finish_reason)]
        for other in outcome[1:]:
            child = self._fork(sequence, length, other.tokens)
            child.stop_reason = other.stop_reason
            updates.append(SequenceUpdate(child, list(other.tokens), other.finish_reason))
        if sequence.request.beam:  # a search keeps n slots, even while it has fewer beams
            beams = self._active[sequence.request.request_id]
            beams[0].slots = sequence.request.n + 1 - len(beams)
        else:
            sequence.slots = 1
        for update in updates:
            self.sampled += len(update.tokens)
            if update.finish_reason is None and update.sequence.remaining == 0:
                update.finish_reason = "length"
            if update.finish_reason is not None:
                self._finish(update.sequence, update.finish_reason)
        return updates

    def _fork(self, parent: Sequence, length: int, tokens: abc.Sequence[int]) -> Sequence:
        """A running sequence with the parent's first ``length`` tokens, then ``tokens``."""
        request = parent.request
        child = Sequence(request, self._forked[request.request_id], parent.order)
        self._forked[request.request_id] += 1
        child.tokens = [*parent.tokens[:length], *tokens]
        child.computed = parent.computed
        child.computed_from = parent.computed
        child.slots = 1
        child.status = SequenceStatus.RUNNING
        self.memory.fork(parent, child)
        self._active[request.request_id].append(child)
        last = max(i for i, other in enumerate(self.running) if other.request is request)
        self.running.insert(last + 1, child)
        return child

    def _group(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that must advance together: the beams of a search, or one alone."""
        if sequence.request.beam:
            return list(self._active[sequence.request.request_id])
        return [sequence]

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue, with its tokens, without their memory."""
        self.memory.release(sequence, preempted=True)
        self.running.remove(sequence)
        sequence.work = sequence.computed_tokens
        sequence.computed_from = 0
        sequence.computed = 0
        sequence.drafts = []
        sequence.status = SequenceStatus.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.order.push(self.waiting, sequence)

    def _finish(self, sequence: Sequence, finish_reason: str) -> None:
        """End a waiting or running sequence and free its memory."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.memory.release(sequence)
        sequence.finish(finish_reason, sequence.stop_reason)
        request_id = sequence.request.request_id
        others = self._active[request_id]
        others.remove(sequence)
        if not others:
            del self._active[request_id], self._forked[request_id]
        elif sequence.request.beam:
            others[0].slots += sequence.slots

    def check(self) -> None:
        """AssertionError if an invariant is broken; to be called between steps."""
        self.memory.check()
        active = {sequence for group in self._active.values() for sequence in group}
        slots = sum(sequence.slots for sequence in self.running)
        assert active == {*self.waiting, *self.running}, "a sequence is lost"
        assert len(active) == len(self.waiting) + len(self.running), "a sequence is in two places"
        assert len({sequence.key for sequence in active}) == len(active)
        assert all(s.status is SequenceStatus.RUNNING for s in self.running)
        assert all(s.status is SequenceStatus.WAITING and s.computed == 0 for s in self.waiting)
        assert self.max_sequences is None or slots <= self.max_sequences
        for sequence in active:
            assert sequence.remaining > 0, "should have finished"
            assert 0 <= sequence.computed < len(sequence.tokens), "computed, but not sampled"
            assert not sequence.drafts or sequence.computed == len(sequence.tokens) - 1
        for group in self._active.values():
            assert group, "a request without sequences"
            if group[0].request.beam:
                assert len({s.status for s in group}) == 1, "beams of one search are apart"
                assert sum(s.slots for s in group) == group[0].request.n
