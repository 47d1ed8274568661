"""The books of the scheduler: which requests live, and what a step's results do to them.

``serve.scheduler`` decides what a step computes; here is what comes before and after: requests are submitted and
aborted, branches fork and end, outcomes become tokens, rejected drafts are taken back.

| state    | memory                   | becomes                                                                     |
|----------|--------------------------|-----------------------------------------------------------------------------|
| waiting  | none                     | running, when it is admitted                                                |
| running  | tokens [0, computed)     | waiting again, when it is preempted (with its tokens, without their memory) |
| ended    | none                     | nothing; a request has ended when all its branches have                     |

An outcome is a list of continuations of one branch: one as a rule; up to n for the first token of a request with n
branches, which fork there; none drops the branch (a beam that lost). None instead of a list holds it: its logits are
known, and a later ``update`` says under ``resolved`` how it goes on. After γ drafts a continuation has 1 to γ + 1
tokens: the drafts that were accepted, then one that was sampled.

Left out: text. When one ends before ``max_tokens`` the engine says so, with a continuation's ``reason``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from refllm.serve.memory import Copies, Memory
from refllm.serve.order import Order
from refllm.serve.plan import Item, Name, Plan
from refllm.serve.request import Branch, Request, Status


class Continuation(NamedTuple):
    """How a branch goes on: its next tokens, and why it ends with them if it does."""

    tokens: Sequence[int]
    reason: str | None = None  # "length" is the scheduler's own


class Event(NamedTuple):
    """What came of a step for one branch."""

    branch: Branch
    tokens: list[int]
    reason: str | None


Outcome = Sequence[Continuation] | None


class Step:
    """A plan in the making: what each branch does in it, and how much of the budget is left."""

    def __init__(self, plan: Plan, room: int | None):
        self.plan, self.room = plan, room
        self.items: dict[Branch, Item] = {}
        self.copies: dict[Branch, Copies] = {}


class Ledger:
    """Requests come and go; one plan at a time is under way (``step``)."""

    def __init__(self, memory: Memory, order: Order, max_sequences: int | None):
        self.memory, self.order, self.max_sequences = memory, order, max_sequences
        self.waiting: list[Branch] = []
        self.running: list[Branch] = []  # in the order of admission, a request's branches side by side
        self.step: Step | None = None
        self._live: dict[Hashable, list[Branch]] = {}  # request → its branches that have not ended
        self._forked: dict[Hashable, int] = {}  # request → branches that it has ever had
        self._ended: list[Event] = []  # ended without a step; told with the next update
        self._submitted = 0
        # counted: steps, tokens computed and sampled, preemptions; tokens found and asked for at first admission;
        # tokens found and asked for when preempted branches came back
        self.steps = self.computed = self.sampled = self.preemptions = 0
        self.cached = self.queried = self.resumed_cached = self.resumed_queried = 0

    # --- requests come and go ------------------------------------------------------------------------------------

    @property
    def unfinished(self) -> bool:
        """Whether another step has anything to do or to tell."""
        return bool(self._live or self._ended)

    def submit(self, request: Request) -> Hashable:
        """Queue a request; returns its id. ValueError, and nothing happens, if it could never be served."""
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
                self._ended.append(Event(_ended(Branch(request, index, branch.order), "length"), [], "length"))
            return name
        self._live[name], self._forked[name] = [branch], 1
        self.order.push(self.waiting, branch)
        return name

    def refuses(self, request: Request) -> str | None:
        """Why a request can never be served; None if it can."""
        if request.n > 1 and not self.memory.shares:
            return f"asks for {request.n} branches, which this memory cannot share: submit {request.n} requests"
        if self.max_sequences is not None and request.n > self.max_sequences:
            return f"asks for {request.n} branches, and at most {self.max_sequences} sequences run at a time"
        return self.memory.refuses(request)

    def abort(self, name: Hashable) -> list[Branch]:
        """End a request at once, also between ``plan`` and ``update``. Returns the branches that this ended.

        An empty list for one that is unknown or has ended: it may have ended just now.
        """
        branches = list(self._live.get(name, ()))
        for branch in branches:
            self._end(branch, "aborted")
        return branches

    def propose(self, name: Name, drafts: Sequence[int]) -> int:
        """Guess a running branch's next tokens, for the next plan. Returns how many of them can be of use."""
        branch = next((b for b in self._live.get(name[0], ()) if b.index == name[1]), None)
        if branch is None or branch.status is not Status.RUNNING or branch.computed != len(branch.tokens) - 1:
            return 0  # nothing is drafted for who is in the middle of a prompt, or gone
        branch.drafts = [int(t) for t in drafts[: branch.left - 1]]
        return len(branch.drafts)

    # --- what came of it -----------------------------------------------------------------------------------------

    def update(
        self, plan: Plan, outcomes: Sequence[Outcome], resolved: Mapping[Name, Sequence[Continuation]] | None = None
    ) -> list[Event]:
        """Carry a plan's results over: outcomes[i] for plan.sampling[i]; ``resolved`` for branches held before.

        Returns one event for each branch that got tokens or ended. ValueError, before anything has changed, for an
        outcome that does not fit its item. Branches that were aborted since the plan are passed over.
        """
        step = self._carried_out(plan)
        held = {name: self._held(name) for name in resolved or ()}
        pairs = self._pair(step, outcomes)
        self._check_outcomes([*pairs, *((held[name], out) for name, out in (resolved or {}).items())])
        self.step = None
        self.steps += 1
        events, self._ended = self._ended, []
        results = dict(pairs)
        for branch, item in step.items.items():
            self.computed += item.count
            if branch.status is not Status.RUNNING:
                continue
            branch.computed = item.start + item.count
            if not item.samples:
                self.memory.commit(branch)
            else:
                self._go_on(branch, results[branch], events)
        for name, outcome in (resolved or {}).items():
            self._go_on(held[name], outcome, events)
        return events

    def withdraw(self, plan: Plan) -> None:
        """Give a plan up that could not be carried out (the model failed): its branches start over."""
        step = self._carried_out(plan)
        self.step = None
        for branch in reversed(step.items):  # so that they stand in the queue as they ran
            if branch.status is Status.RUNNING:
                self._start_over(branch)

    def _carried_out(self, plan: Plan) -> Step:
        if self.step is None or self.step.plan is not plan:
            raise RuntimeError("this is not the plan under way")
        return self.step

    def _held(self, name: Name) -> Branch:
        branch = next((b for b in self._live.get(name[0], ()) if b.index == name[1] and b.held), None)
        if branch is None:
            raise ValueError(f"branch {name} is not held: it has ended, or was preempted and will be sampled again")
        return branch

    def _pair(self, step: Step, outcomes: Sequence[Outcome]) -> list[tuple[Branch, Outcome]]:
        sampling = [branch for branch, item in step.items.items() if item.samples]
        if len(sampling) != len(outcomes):
            raise ValueError(f"{len(sampling)} branches were sampled, got {len(outcomes)} outcomes")
        return list(zip(sampling, outcomes, strict=True))

    def _check_outcomes(self, pairs: Sequence[tuple[Branch, Outcome]]) -> None:
        grown: dict[Hashable, int] = {}
        for branch, outcome in pairs:
            if outcome is None:
                continue
            if len(outcome) != 1:
                grown[branch.request.id] = grown.get(branch.request.id, 0) + len(outcome) - 1
                if branch.drafts:
                    raise ValueError(f"{branch} has drafts: it goes on in one way, got {len(outcome)}")
            for tokens, _ in outcome:
                if not 1 <= len(tokens) <= 1 + len(branch.drafts):
                    raise ValueError(f"{branch} yields 1 to {1 + len(branch.drafts)} tokens, got {len(tokens)}")
                if len(tokens) > 1 and list(tokens[:-1]) != branch.drafts[: len(tokens) - 1]:
                    raise ValueError(f"{branch}: accepted {list(tokens[:-1])}, but its drafts were {branch.drafts}")
        for name, more in grown.items():
            branches = self._live.get(name, [])
            if branches and len(branches) + more > branches[0].request.n:
                raise ValueError(f"request {name!r} has n = {branches[0].request.n} branches, not more")

    def _go_on(self, branch: Branch, outcome: Outcome, events: list[Event]) -> None:
        if outcome is None:
            branch.held = True
            self.memory.commit(branch)
            return
        branch.held = False
        branch.seats = 1
        if not outcome:
            self.memory.commit(branch)
            self._end(branch, "dropped")
            events.append(Event(branch, [], "dropped"))
            return
        prompt = len(branch.tokens)
        tokens = list(outcome[0].tokens[: branch.left])
        if branch.drafts or len(tokens) > 1:
            branch.computed = prompt + len(tokens) - 1  # behind it lie drafts that were rejected
            branch.drafts = []
        branch.tokens += tokens
        self.memory.commit(branch)
        told = [(branch, tokens, outcome[0].reason)]
        for other in outcome[1:]:
            told.append((self._fork(branch, prompt, other), list(other.tokens), other.reason))
        for one, new, reason in told:
            self.sampled += len(new)
            if reason is None and one.left == 0:
                reason = "length"
            if reason is not None:
                self._end(one, reason)
            events.append(Event(one, new, reason))

    def _fork(self, parent: Branch, length: int, how: Continuation) -> Branch:
        """Another branch with the parent's first ``length`` tokens that goes on differently."""
        name = parent.request.id
        child = Branch(parent.request, self._forked[name], parent.order)
        self._forked[name] += 1
        child.tokens = [*parent.tokens[:length], *how.tokens]
        child.computed, child.seats, child.status = parent.computed, 1, Status.RUNNING
        self.memory.fork(parent, child)
        self._live[name].append(child)
        last = max(i for i, branch in enumerate(self.running) if branch.request is parent.request)
        self.running.insert(last + 1, child)
        return child

    def _end(self, branch: Branch, reason: str) -> None:
        """A branch ends; its memory is given back, whatever state it is in."""
        (self.running if branch.status is Status.RUNNING else self.waiting).remove(branch)
        self.memory.release(branch)
        _ended(branch, reason)
        branches = self._live[branch.request.id]
        branches.remove(branch)
        if not branches:
            del self._live[branch.request.id], self._forked[branch.request.id]

    def check(self) -> None:
        """AssertionError if the books do not balance; between steps, when no plan is under way."""
        self.memory.check()
        live = {branch for branches in self._live.values() for branch in branches}
        assert live == {*self.waiting, *self.running}, "a branch is lost"
        assert len(live) == len(self.waiting) + len(self.running), "a branch stands in two places"
        assert all(b.status is Status.RUNNING for b in self.running)
        assert all(b.status is Status.WAITING and b.computed == 0 for b in self.waiting)
        assert self.max_sequences is None or sum(b.seats for b in self.running) <= self.max_sequences
        for branch in live:
            assert len(branch.tokens) < len(branch.request.prompt) + branch.request.max_tokens, "should have ended"
            assert branch.computed < len(branch.tokens) or branch.held, "computed, and not sampled"
            assert not branch.drafts or branch.computed == len(branch.tokens) - 1
        assert len({b.key for b in live}) == len(live)
        assert all(self._live.values()), "a request without branches"

    def _start_over(self, branch: Branch) -> None:
        """Back to the queue, with its tokens and without their memory."""
        self.running.remove(branch)
        self.memory.release(branch, preempted=True)
        branch.computed, branch.drafts, branch.held, branch.status = 0, [], False, Status.WAITING
        branch.preemptions += 1
        self.preemptions += 1
        self.order.push(self.waiting, branch)


def _ended(branch: Branch, reason: str) -> Branch:
    branch.status, branch.reason = Status.ENDED, reason
    return branch
