"""The books of a scheduler: which requests live, and what a step's results do to them.

``serve.scheduler`` and ``serve.baselines.static_batching`` decide what a step computes;
here is what comes before and after: requests are submitted and aborted, branches fork and
end, outcomes become tokens, rejected drafts are taken back.

| state    | memory                   | becomes                                                                     |
|----------|--------------------------|-----------------------------------------------------------------------------|
| waiting  | none                     | running, when it is admitted                                                |
| running  | tokens [0, computed)     | waiting again, when it is preempted (with its tokens, without their memory) |
| ended    | none                     | nothing; a request has ended when all its branches have                     |

An outcome is a list of continuations of one branch: one as a rule; up to n for the first
token of a request with n branches, which fork there; and in a beam search, whose beams are
sampled all in one step, any number as long as they remain n in all: none drops the beam.
After γ drafts a continuation has 1 to γ + 1 tokens: the drafts that were accepted, then one
that was sampled; what was computed for the others is taken back.

Left out: text. When one ends before ``max_tokens`` the engine says so, with a
continuation's ``reason``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import count

from refllm.serve.admission import Order
from refllm.serve.kv_manager import Memory
from refllm.serve.plan import Continuation, Event, Name, Outcome, Plan, Step, check_outcomes
from refllm.serve.request import Branch, Request, Status


class Ledger(ABC):
    """Requests come and go; ``plan`` and ``update`` alternate, and one plan at a time is
    under way (``step``).
    """

    def __init__(
        self, memory: Memory, order: Order, max_batch_tokens: int | None, max_sequences: int | None
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
        self.waiting: list[Branch] = []
        # in the order of admission, a request's branches side by side
        self.running: list[Branch] = []
        self.step: Step | None = None
        self._live: dict[Hashable, list[Branch]] = {}  # request → its branches that have not ended
        self._forked: dict[Hashable, int] = {}  # request → branches that it has ever had
        self._ended: list[Event] = []  # ended without a step; told with the next update
        self._submitted = 0
        # counted: steps, tokens computed and sampled, preemptions; tokens found and asked
        # for at first admission; tokens found and asked for when preempted branches came
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
        """Whether a branch of the request has not ended."""
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
        branch = Branch(request, 0, self._submitted)
        self._submitted += 1
        if request.max_tokens == 0:
            for index in range(request.n):
                self._ended.append(
                    Event(_ended(Branch(request, index, branch.order), "length"), [], "length")
                )
            return name
        self._live[name] = [branch]
        self._forked[name] = 1
        self.order.push(self.waiting, branch)
        return name

    def refuses(self, request: Request) -> str | None:
        """Why a request can never be served; None if it can."""
        if request.n > 1 and not self.memory.shares:
            return f"asks for {request.n} branches, which this memory cannot share: submit {request.n} requests"
        if self.max_sequences is not None and request.n > self.max_sequences:
            return f"asks for {request.n} branches, and at most {self.max_sequences} sequences run at a time"
        if request.beam and self.max_batch_tokens is not None and request.n > self.max_batch_tokens:
            return f"has {request.n} beams, which advance in one step, and its budget is {self.max_batch_tokens} tokens"
        return self.memory.refuses(request)

    def abort(self, name: Hashable) -> list[Branch]:
        """End a request at once, also between ``plan`` and ``update``. Returns the branches
        that this ended.

        An empty list for one that is unknown or has ended: it may have ended just now.
        """
        branches = list(self._live.get(name, ()))
        for branch in branches:
            self._end(branch, "aborted")
        return branches

    def propose(self, name: Name, drafts: Sequence[int]) -> int:
        """Guess a running branch's next tokens, for the next plan. Returns how many of them
        can be of use.
        """
        branch = next((b for b in self._live.get(name[0], ()) if b.index == name[1]), None)
        if branch is None or not self.drafts(branch):
            return 0
        branch.drafts = [int(t) for t in drafts[: branch.left - 1]]
        return len(branch.drafts)

    def drafts(self, branch: Branch) -> bool:
        """Whether a guess of what a branch says next is of use to the next plan."""
        return (
            branch.status is Status.RUNNING
            and branch.computed
            == len(branch.tokens) - 1  # nothing is drafted in the middle of a prompt
            and branch.seats == 1  # who is to fork goes on in several ways
            and branch.left > 1
            and not branch.request.beam
        )

    # --- steps ----------------------------------------------------------------------------

    @abstractmethod
    def plan(self) -> Plan:
        """Decide the next step; it computes a token for somebody, if anybody is there.

        RuntimeError if the last plan was neither carried out (``update``) nor given up
        (``withdraw``).
        """

    def _begin(self) -> Step:
        if self.step is not None:
            raise RuntimeError("the last plan is still under way: update or withdraw it first")
        return Step(
            Plan(
                self.steps,
                [],
                budget=self.max_batch_tokens,
                seats=self.max_sequences,
                block_size=self.memory.block_size,
            )
        )

    def _finish(self, step: Step) -> Plan:
        step.plan.items = list(step.items.values())
        step.plan.copies = [pair for copies in step.copies.values() for pair in copies]
        step.plan.waiting = len(self.waiting)
        self.step = step
        return step.plan

    def update(self, plan: Plan, outcomes: Sequence[Outcome]) -> list[Event]:
        """Carry a plan's results over: outcomes[i] for plan.sampling[i].

        Returns one event for each branch that got tokens or ended. ValueError, before
        anything has changed, for an outcome that does not fit its item. Branches that were
        aborted since the plan are passed over.
        """
        step = self._under_way(plan)
        sampling = [branch for branch, item in step.items.items() if item.samples]
        check_outcomes(sampling, outcomes, self._live)
        self.step = None
        self.steps += 1
        events = self._ended
        self._ended = []
        self.computed += plan.tokens
        for branch, item in step.items.items():
            if branch.status is Status.RUNNING and not item.samples:
                branch.computed = item.start + item.count
                self.memory.commit(branch)
        for branch, outcome in zip(sampling, outcomes, strict=True):
            if branch.status is Status.RUNNING:
                self._go_on(branch, outcome, events)
        return events

    def withdraw(self, plan: Plan) -> None:
        """Give a plan up that could not be carried out (the model failed): its branches
        start over.
        """
        step = self._under_way(plan)
        self.step = None
        for branch in reversed(step.items):  # so that they stand in the queue as they ran
            if branch.status is Status.RUNNING:
                for beam in self._beams(branch):
                    self._start_over(beam)

    def _under_way(self, plan: Plan) -> Step:
        if self.step is None or self.step.plan is not plan:
            raise RuntimeError("this is not the plan under way")
        return self.step

    def _go_on(self, branch: Branch, outcome: Outcome, events: list[Event]) -> None:
        """A branch takes the first continuation, forks of it the others; without any it is
        dropped.
        """
        length = len(branch.tokens)
        left = branch.left
        first = outcome[0] if outcome else Continuation((), "dropped")
        tokens = list(first.tokens[:left])
        # verified are its own tokens and the drafts among the new ones; the last one is not
        # computed yet
        branch.computed = length + max(0, len(tokens) - 1)
        branch.drafts = []
        branch.tokens += tokens
        if tokens:
            self.memory.commit(branch)
        told = [Event(branch, tokens, first.reason)]
        for other in outcome[1:]:
            told.append(Event(self._fork(branch, length, other), list(other.tokens), other.reason))
        if branch.request.beam:  # a search keeps n seats, however many beams it has at the moment
            beams = self._live[branch.request.id]
            beams[0].seats = branch.request.n + 1 - len(beams)
        else:
            branch.seats = 1
        for event in told:
            one, new, reason = event
            self.sampled += len(new)
            if reason is None and one.left == 0:
                event = Event(one, new, "length")
            if event.reason is not None:
                self._end(one, event.reason)
            events.append(event)

    def _fork(self, parent: Branch, length: int, how: Continuation) -> Branch:
        """Another branch with the parent's first ``length`` tokens that goes on
        differently.
        """
        name = parent.request.id
        child = Branch(parent.request, self._forked[name], parent.order)
        self._forked[name] += 1
        child.tokens = [*parent.tokens[:length], *how.tokens]
        child.computed = parent.computed
        child.seats = 1
        child.status = Status.RUNNING
        self.memory.fork(parent, child)
        self._live[name].append(child)
        last = max(i for i, branch in enumerate(self.running) if branch.request is parent.request)
        self.running.insert(last + 1, child)
        return child

    def _beams(self, branch: Branch) -> list[Branch]:
        """The branches that advance in step with this one: the beams of its search, itself
        alone otherwise.
        """
        if branch.request.beam:
            return list(self._live[branch.request.id])
        return [branch]

    def _start_over(self, branch: Branch) -> None:
        """Back to the queue, with its tokens and without their memory."""
        self.running.remove(branch)
        self.memory.release(branch, preempted=True)
        branch.computed = 0
        branch.drafts = []
        branch.status = Status.WAITING
        branch.preemptions += 1
        self.preemptions += 1
        self.order.push(self.waiting, branch)

    def _end(self, branch: Branch, reason: str) -> None:
        """A branch ends; its memory is given back, whatever state it is in."""
        (self.running if branch.status is Status.RUNNING else self.waiting).remove(branch)
        self.memory.release(branch)
        _ended(branch, reason)
        branches = self._live[branch.request.id]
        branches.remove(branch)
        if branches and branch.request.beam:
            branches[0].seats += branch.seats
        if not branches:
            del self._live[branch.request.id], self._forked[branch.request.id]

    def check(self) -> None:
        """AssertionError if the books do not balance; between steps, when no plan is under
        way.
        """
        self.memory.check()
        live = {branch for branches in self._live.values() for branch in branches}
        assert live == {*self.waiting, *self.running}, "a branch is lost"
        assert len(live) == len(self.waiting) + len(self.running), "a branch stands in two places"
        assert all(b.status is Status.RUNNING for b in self.running)
        assert all(b.status is Status.WAITING and b.computed == 0 for b in self.waiting)
        assert (
            self.max_sequences is None or sum(b.seats for b in self.running) <= self.max_sequences
        )
        for branch in live:
            assert len(branch.tokens) < len(branch.request.prompt) + branch.request.max_tokens, (
                "should have ended"
            )
            assert 0 <= branch.computed < len(branch.tokens), "computed, and not sampled"
            assert not branch.drafts or branch.computed == len(branch.tokens) - 1
        for branches in self._live.values():
            assert branches, "a request without branches"
            if branches[0].request.beam:
                assert len({b.status for b in branches}) == 1, "beams of one search are apart"
                assert sum(b.seats for b in branches) == branches[0].request.n
        assert len({b.key for b in live}) == len(live)


def _ended(branch: Branch, reason: str) -> Branch:
    branch.status = Status.ENDED
    branch.reason = reason
    return branch
