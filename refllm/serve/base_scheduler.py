"""The books of a scheduler: which requests live, and what a step's results do to them.

``serve.scheduler`` and ``serve.baselines.static_batching`` decide what a step computes;
here is what comes before and after: requests are submitted and aborted, sequences fork and
end, outcomes become tokens, rejected drafts are taken back.

| state    | memory                   | becomes                                                                     |
|----------|--------------------------|-----------------------------------------------------------------------------|
| waiting  | none                     | running, when it is admitted                                                |
| running  | tokens [0, computed)     | waiting again, when it is preempted (with its tokens, without their memory) |
| ended    | none                     | nothing; a request has ended when all its sequences have                     |

An outcome is a list of continuations of one sequence: one as a rule; up to n for the first
token of a request with n sequences, which fork there; and in a beam search, whose beams are
sampled all in one step, any number as long as they remain n in all: none drops the beam.
After γ drafts a continuation has 1 to γ + 1 tokens: the drafts that were accepted, then one
that was sampled; what was computed for the others is taken back.

Left out: text. When one ends before ``max_tokens`` the engine says so, with a
continuation's ``reason``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import abc
from collections.abc import Hashable
from dataclasses import replace
from itertools import count

from refllm.serve.admission import Order
from refllm.serve.kv_manager import KVManager
from refllm.serve.plan import (
    Name,
    Outcome,
    Plan,
    PlanBuilder,
    SampledTokens,
    SequenceUpdate,
    check_outcomes,
)
from refllm.serve.request import Request, Sequence, Status


class BaseScheduler(ABC):
    """Requests come and go; ``plan`` and ``update`` alternate, and one plan at a time is
    under way (``step``).
    """

    def __init__(
        self, memory: KVManager, order: Order, max_batch_tokens: int | None, max_sequences: int | None
    ):
        """``None`` lifts a limit."""
        for name, limit in (
            ("max_batch_tokens", max_batch_tokens),
            ("max_sequences", max_sequences),
        ):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, got {limit}")
        self.memory = memory
        self.order = order
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.waiting: list[Sequence] = []
        # in the order of admission, a request's sequences side by side
        self.running: list[Sequence] = []
        self.step: PlanBuilder | None = None
        self._live: dict[Hashable, list[Sequence]] = {}  # request → its sequences that have not ended
        self._forked: dict[Hashable, int] = {}  # request → sequences that it has ever had
        self._ended: list[SequenceUpdate] = []  # ended without a step; told with the next update
        self._submitted = 0
        # counted: steps, tokens computed and sampled, preemptions; tokens found and asked
        # for at first admission; tokens found and asked for when preempted sequences came
        # back
        self.steps = 0
        self.computed = 0
        self.sampled = 0
        self.preemptions = 0
        self.cached = 0
        self.queried = 0
        self.resumed_cached = 0
        self.resumed_queried = 0

    # --- requests come and go -------------------------------------------------------------

    @property
    def unfinished(self) -> bool:
        """Whether another step has anything to do or to tell."""
        return bool(self._live or self._ended)

    def serves(self, name: Hashable) -> bool:
        """Whether a sequence of the request has not ended."""
        return name in self._live

    def submit(self, request: Request) -> Hashable:
        """Queue a request; returns its id. ValueError, and nothing happens, if it could
        never be served.
        """
        name = request.id
        if name is None:
            name = next(i for i in count(self._submitted) if i not in self._live)
            request = replace(request, id=name)
        if name in self._live:
            raise ValueError(f"request {name!r} is being served: another one needs another id")
        reason = self.refuses(request)
        if reason:
            raise ValueError(f"request {name!r} {reason}")
        sequence = Sequence(request, 0, self._submitted)
        self._submitted += 1
        if request.max_tokens == 0:
            for index in range(request.n):
                self._ended.append(
                    SequenceUpdate(_ended(Sequence(request, index, sequence.order), "length"), [], "length")
                )
            return name
        self._live[name] = [sequence]
        self._forked[name] = 1
        self.order.push(self.waiting, sequence)
        return name

    def refuses(self, request: Request) -> str | None:
        """Why a request can never be served; None if it can."""
        if request.n > 1 and not self.memory.shares:
            return f"asks for {request.n} sequences, which this memory cannot share: submit {request.n} requests"
        if self.max_sequences is not None and request.n > self.max_sequences:
            return f"asks for {request.n} sequences, and at most {self.max_sequences} sequences run at a time"
        if request.beam and self.max_batch_tokens is not None and request.n > self.max_batch_tokens:
            return f"has {request.n} beams, which advance in one step, and its budget is {self.max_batch_tokens} tokens"
        return self.memory.refuses(request)

    def abort(self, name: Hashable) -> list[Sequence]:
        """End a request at once, also between ``plan`` and ``update``. Returns the sequences
        that this ended.

        An empty list for one that is unknown or has ended: it may have ended just now.
        """
        sequences = list(self._live.get(name, ()))
        for sequence in sequences:
            self._end(sequence, "aborted")
        return sequences

    def propose(self, name: Name, drafts: abc.Sequence[int]) -> int:
        """Guess a running sequence's next tokens, for the next plan. Returns how many of them
        can be of use.
        """
        sequence = next((b for b in self._live.get(name[0], ()) if b.index == name[1]), None)
        if sequence is None or not self.drafts(sequence):
            return 0
        sequence.drafts = [int(t) for t in drafts[: sequence.left - 1]]
        return len(sequence.drafts)

    def drafts(self, sequence: Sequence) -> bool:
        """Whether a guess of what a sequence says next is of use to the next plan."""
        return (
            sequence.status is Status.RUNNING
            and sequence.computed
            == len(sequence.tokens) - 1  # nothing is drafted in the middle of a prompt
            and sequence.seats == 1  # who is to fork goes on in several ways
            and sequence.left > 1
            and not sequence.request.beam
        )

    # --- steps ----------------------------------------------------------------------------

    @abstractmethod
    def plan(self) -> Plan:
        """Decide the next step; it computes a token for somebody, if anybody is there.

        RuntimeError if the last plan was neither carried out (``update``) nor given up
        (``roll_back``).
        """

    def _begin(self) -> PlanBuilder:
        if self.step is not None:
            raise RuntimeError("the last plan is still under way: update or roll_back it first")
        return PlanBuilder(
            Plan(
                self.steps,
                [],
                budget=self.max_batch_tokens,
                seats=self.max_sequences,
                block_size=self.memory.block_size,
            )
        )

    def _finish(self, step: PlanBuilder) -> Plan:
        step.plan.items = list(step.items.values())
        step.plan.copies = [pair for copies in step.copies.values() for pair in copies]
        step.plan.waiting = len(self.waiting)
        self.step = step
        return step.plan

    def update(self, plan: Plan, outcomes: abc.Sequence[Outcome]) -> list[SequenceUpdate]:
        """Carry a plan's results over: outcomes[i] for plan.sampling[i].

        Returns one event for each sequence that got tokens or ended. ValueError, before
        anything has changed, for an outcome that does not fit its item. Branches that were
        aborted since the plan are passed over.
        """
        step = self._under_way(plan)
        sampling = [sequence for sequence, item in step.items.items() if item.samples]
        check_outcomes(sampling, outcomes, self._live)
        self.step = None
        self.steps += 1
        events = self._ended
        self._ended = []
        self.computed += plan.tokens
        for sequence, item in step.items.items():
            if sequence.status is Status.RUNNING and not item.samples:
                sequence.computed = item.start + item.count
                self.memory.commit(sequence)
        for sequence, outcome in zip(sampling, outcomes, strict=True):
            if sequence.status is Status.RUNNING:
                self._go_on(sequence, outcome, events)
        return events

    def roll_back(self, plan: Plan) -> None:
        """Give a plan up that could not be carried out (the model failed): its sequences
        start over.
        """
        step = self._under_way(plan)
        self.step = None
        for sequence in reversed(step.items):  # so that they stand in the queue as they ran
            if sequence.status is Status.RUNNING:
                for beam in self._beams(sequence):
                    self._start_over(beam)

    def _under_way(self, plan: Plan) -> PlanBuilder:
        if self.step is None or self.step.plan is not plan:
            raise RuntimeError("this is not the plan under way")
        return self.step

    def _go_on(self, sequence: Sequence, outcome: Outcome, events: list[SequenceUpdate]) -> None:
        """A sequence takes the first continuation, forks of it the others; without any it is
        dropped.
        """
        length = len(sequence.tokens)
        left = sequence.left
        first = outcome[0] if outcome else SampledTokens((), "dropped")
        tokens = list(first.tokens[:left])
        # verified are its own tokens and the drafts among the new ones; the last one is not
        # computed yet
        sequence.computed = length + max(0, len(tokens) - 1)
        sequence.drafts = []
        sequence.tokens += tokens
        if tokens:
            self.memory.commit(sequence)
        told = [SequenceUpdate(sequence, tokens, first.reason)]
        for other in outcome[1:]:
            told.append(SequenceUpdate(self._fork(sequence, length, other), list(other.tokens), other.reason))
        if sequence.request.beam:  # a search keeps n seats, however many beams it has at the moment
            beams = self._live[sequence.request.id]
            beams[0].seats = sequence.request.n + 1 - len(beams)
        else:
            sequence.seats = 1
        for event in told:
            one, new, reason = event
            self.sampled += len(new)
            if reason is None and one.left == 0:
                event = SequenceUpdate(one, new, "length")
            if event.reason is not None:
                self._end(one, event.reason)
            events.append(event)

    def _fork(self, parent: Sequence, length: int, how: SampledTokens) -> Sequence:
        """Another sequence with the parent's first ``length`` tokens that goes on
        differently.
        """
        name = parent.request.id
        child = Sequence(parent.request, self._forked[name], parent.order)
        self._forked[name] += 1
        child.tokens = [*parent.tokens[:length], *how.tokens]
        child.computed = parent.computed
        child.seats = 1
        child.status = Status.RUNNING
        self.memory.fork(parent, child)
        self._live[name].append(child)
        last = max(i for i, sequence in enumerate(self.running) if sequence.request is parent.request)
        self.running.insert(last + 1, child)
        return child

    def _beams(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that advance in step with this one: the beams of its search, itself
        alone otherwise.
        """
        if sequence.request.beam:
            return list(self._live[sequence.request.id])
        return [sequence]

    def _start_over(self, sequence: Sequence) -> None:
        """Back to the queue, with its tokens and without their memory."""
        self.running.remove(sequence)
        self.memory.release(sequence, preempted=True)
        sequence.computed = 0
        sequence.drafts = []
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.order.push(self.waiting, sequence)

    def _end(self, sequence: Sequence, reason: str) -> None:
        """A sequence ends; its memory is given back, whatever state it is in."""
        (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        self.memory.release(sequence)
        _ended(sequence, reason)
        sequences = self._live[sequence.request.id]
        sequences.remove(sequence)
        if sequences and sequence.request.beam:
            sequences[0].seats += sequence.seats
        if not sequences:
            del self._live[sequence.request.id], self._forked[sequence.request.id]

    def check(self) -> None:
        """AssertionError if the books do not balance; between steps, when no plan is under
        way.
        """
        self.memory.check()
        live = {sequence for sequences in self._live.values() for sequence in sequences}
        assert live == {*self.waiting, *self.running}, "a sequence is lost"
        assert len(live) == len(self.waiting) + len(self.running), "a sequence stands in two places"
        assert all(b.status is Status.RUNNING for b in self.running)
        assert all(b.status is Status.WAITING and b.computed == 0 for b in self.waiting)
        assert (
            self.max_sequences is None or sum(b.seats for b in self.running) <= self.max_sequences
        )
        for sequence in live:
            assert len(sequence.tokens) < len(sequence.request.prompt) + sequence.request.max_tokens, (
                "should have ended"
            )
            assert 0 <= sequence.computed < len(sequence.tokens), "computed, and not sampled"
            assert not sequence.drafts or sequence.computed == len(sequence.tokens) - 1
        for sequences in self._live.values():
            assert sequences, "a request without sequences"
            if sequences[0].request.beam:
                assert len({b.status for b in sequences}) == 1, "beams of one search are apart"
                assert sum(b.seats for b in sequences) == sequences[0].request.n
        assert len({b.key for b in live}) == len(live)


def _ended(sequence: Sequence, reason: str) -> Sequence:
    sequence.status = Status.ENDED
    sequence.reason = reason
    return sequence
