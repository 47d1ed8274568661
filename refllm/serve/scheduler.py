"""The scheduler: one plan a step over branches that differ only in computed and total tokens.

Sources: Orca, Yu et al. 2022 (iteration-level scheduling); Sarathi-Serve, Agrawal et al. 2024 (chunked prefill,
decode first, a budget of tokens); vLLM's second scheduler (two counters and no phases); Kwon et al. 2023, section
4.5 (preemption).

A step, in order:

1. Branches one token behind (and their drafts): decode goes first, so that no prompt stalls those who stream.
2. Running branches further behind, as they were admitted: prompts whose first chunks are computed.
   For both: if memory has no room, running branches are preempted, youngest or least urgent first, until it has.
3. If nobody was preempted: waiting branches, as the order says, as long as budget, seats and memory last. The first
   that does not fit ends it, so nobody is overtaken for being large.

A preempted branch keeps its tokens, loses their keys and values, and computes them anew when it is admitted again:
to the scheduler it is a longer prompt. The oldest running branch is never preempted for another, and every request
that is accepted fits alone: so each step computes at least a token for somebody, and everybody ends.

How it is driven (``plan`` and ``update`` alternate)::

    plan = scheduler.plan()
    # copy plan.copies, compute plan.items, sample item.samples rows of each of plan.sampling
    events = scheduler.update(plan, outcomes)   # outcomes[i] for plan.sampling[i]

What an outcome is, ``serve.ledger`` says.

Left out: what only a model can know: when a text ends before ``max_tokens`` (the engine says so in a continuation).
"""

from __future__ import annotations

from refllm.serve.ledger import Ledger, Step
from refllm.serve.memory import Copies, Memory
from refllm.serve.order import Order, named
from refllm.serve.plan import Item, Plan
from refllm.serve.request import Branch, Request, Status


class Scheduler(Ledger):
    """Continuous batching over a ``Memory``; see the module for what a step does and how it is driven."""

    def __init__(
        self, memory: Memory, *, max_batch_tokens: int | None = 2048, max_sequences: int | None = 128,
        order: str | Order = "fcfs", chunked: bool = True, long_prefill: int = 0,
    ):  # fmt: skip
        """``None`` lifts a limit. ``long_prefill`` caps the chunk of one prompt (0: the budget alone does).

        Not ``chunked``: a prompt is computed in one step or not yet, as Orca did.
        """
        for name, limit in (("max_batch_tokens", max_batch_tokens), ("max_sequences", max_sequences)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, got {limit}")
        if long_prefill < 0:
            raise ValueError(f"long_prefill must be 0 (off) or more, got {long_prefill}")
        super().__init__(memory, named(order), max_sequences)
        self.max_batch_tokens, self.chunked, self.long_prefill = max_batch_tokens, chunked, long_prefill

    def refuses(self, request: Request) -> str | None:
        # a preempted branch comes back with its output: that too must fit into one step if it is not cut
        if not self.chunked and self.max_batch_tokens is not None and request.longest > self.max_batch_tokens:
            return f"can have {request.longest} tokens to compute in one step, the budget is {self.max_batch_tokens}"
        return super().refuses(request)

    def plan(self) -> Plan:
        """Decide the next step. It may be empty: nobody is there, or all that run are held.

        RuntimeError if the last plan was neither carried out (``update``) nor given up (``withdraw``).
        """
        step = self._begin()
        behind = []
        for branch in self.running[:]:
            if branch.status is not Status.RUNNING:
                continue  # preempted for an earlier one
            if branch.computed + 1 == len(branch.tokens):
                self._advance(step, branch)
            elif branch.computed < len(branch.tokens):
                behind.append(branch)
        for branch in behind:
            if branch.status is Status.RUNNING:
                self._advance(step, branch)
        if not step.plan.preempted:
            self._admit(step)
        if not step.items and self.waiting and self.running:
            self._preempt(step, self.order.victim(self.running))  # all are held, and wait for one who waits
        return self._finish(step)

    def _begin(self) -> Step:
        if self.step is not None:
            raise RuntimeError("the last plan is still under way: update or withdraw it first")
        plan = Plan(self.steps, [], budget=self.max_batch_tokens, seats=self.max_sequences,
                    block_size=self.memory.block_size)  # fmt: skip
        return Step(plan, self.max_batch_tokens)

    def _finish(self, step: Step) -> Plan:
        step.plan.items = list(step.items.values())
        step.plan.copies = [pair for copies in step.copies.values() for pair in copies]
        step.plan.waiting = len(self.waiting)
        self.step = step
        return step.plan

    def _advance(self, step: Step, branch: Branch) -> None:
        """Give a running branch its share of the step, at the cost of others if it must be."""
        count = self._share(step, branch.total - branch.computed)
        if count < 1:
            return
        copies = self.memory.reserve(branch, count)
        if copies is None and branch.drafts:  # nobody is preempted for a guess
            count = min(count, len(branch.tokens) - branch.computed)
            copies = self.memory.reserve(branch, count)
        while copies is None:
            victim = self.order.victim(self.running)
            self._preempt(step, victim)
            if victim is branch:
                return
            copies = self.memory.reserve(branch, count)
        self._put(step, branch, count, copies)

    def _share(self, step: Step, wanted: int) -> int:
        if 0 < self.long_prefill < wanted:
            wanted = self.long_prefill
        return wanted if step.room is None else min(wanted, step.room)

    def _put(self, step: Step, branch: Branch, count: int, copies: Copies, pad: int = 0) -> None:
        ahead = branch.computed + count - len(branch.tokens)  # drafts among the tokens; below 0: not finished yet
        if branch.drafts:
            del branch.drafts[max(0, ahead) :]
        blocks = self.memory.blocks(branch)
        step.items[branch] = Item(branch.key, branch.computed, count, blocks, max(0, ahead + 1), pad)
        if copies:
            step.copies[branch] = copies
        if step.room is not None:
            step.room -= count

    def _preempt(self, step: Step, branch: Branch) -> None:
        """Take a branch's memory, and its share of this step if it had one already."""
        item = step.items.pop(branch, None)
        step.copies.pop(branch, None)
        if item is not None and step.room is not None:
            step.room += item.count
        step.plan.preempted.append(branch.key)
        self._start_over(branch)

    def _admit(self, step: Step) -> None:
        free = None if self.max_sequences is None else self.max_sequences - sum(b.seats for b in self.running)
        if not self.waiting or step.room == 0 or free == 0:
            return
        for branch in self.order.candidates(self.waiting, self.memory):
            if step.room == 0 or (free is not None and branch.seats > free):
                return
            hit = self.memory.match(branch)
            missing = len(branch.tokens) - hit
            if not self.chunked and step.room is not None and missing > step.room:
                return
            count = self._share(step, missing) if self.chunked else missing
            if not self.memory.admit(branch, count, alone=not self.running):
                return
            self._enter(step, branch, hit)
            self._put(step, branch, count, [])
            if free is not None:
                free -= branch.seats

    def _enter(self, step: Step, branch: Branch, hit: int) -> None:
        self.waiting.remove(branch)
        self.running.append(branch)
        branch.status, branch.computed = Status.RUNNING, hit
        step.plan.admitted.append(branch.key)
        if branch.preemptions:
            self.resumed_cached += hit
            self.resumed_queried += len(branch.tokens)
        else:
            self.cached += hit
            self.queried += len(branch.tokens)
