"""The scheduler: one plan a step over sequences that differ only in computed and total
tokens.

Sources: Orca, Yu et al. 2022 (iteration-level scheduling); Sarathi-Serve, Agrawal et al.
2024 (chunked prefill, decode first, a budget of tokens); vLLM's second scheduler (two
counters and no phases); Kwon et al. 2023, section 4.5 (preemption).

A step, in order:

1. Branches one token behind (and their drafts): decode goes first, so that no prompt stalls
   those who stream.
2. Running sequences further behind, as they were admitted: prompts whose first chunks are
   computed. For both: if memory has no room, running sequences are preempted, youngest or
   least urgent first, until it has.
3. If nobody was preempted: waiting sequences, as the order says, as long as budget, seats
   and memory last. The first that does not fit ends it, so nobody is overtaken for being
   large.

A preempted sequence keeps its tokens, loses their keys and values, and computes them anew
when it is admitted again: to the scheduler it is a longer prompt. The beams of one search
are admitted and preempted together, and their last tokens are computed in one step, so that
they are ranked against each other.

The oldest (or most urgent) running sequence is never preempted for another, and every request
that is accepted fits alone: so each step computes at least a token for somebody, and
everybody ends.

How it is driven (``plan`` and ``update`` alternate; what an outcome is,
``serve.base_scheduler`` says)::

    plan = scheduler.plan()
    # copy plan.copies, compute plan.items, sample item.samples rows of each of plan.sampling
    events = scheduler.update(plan, outcomes)   # outcomes[i] for plan.sampling[i]

Left out: what only a model can know: when a text ends before ``max_tokens`` (the engine
says so in a continuation).
"""

from __future__ import annotations

from refllm.serve.admission import Order, named
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.kv_manager import KVManager
from refllm.serve.plan import Plan, PlanBuilder
from refllm.serve.request import Request, Sequence, Status


class Scheduler(BaseScheduler):
    """Continuous batching over a ``KVManager``; see the module for what a step does and how it
    is driven.
    """

    def __init__(
        self,
        memory: KVManager,
        *,
        max_batch_tokens: int | None = 2048,
        max_sequences: int | None = 128,
        order: str | Order = "fcfs",
        chunked: bool = True,
        long_prefill: int = 0,
    ):
        """``None`` lifts a limit. ``long_prefill`` caps the chunk of one prompt (0: the
        budget alone does).

        Not ``chunked``: a prompt is computed in one step or not yet, as Orca did.
        """
        super().__init__(memory, named(order), max_batch_tokens, max_sequences)
        if long_prefill < 0:
            raise ValueError(f"long_prefill must be 0 (off) or more, got {long_prefill}")
        self.chunked = chunked
        self.long_prefill = long_prefill

    def refuses(self, request: Request) -> str | None:
        # a preempted sequence comes back with its output: that too must fit into one step if
        # it is not cut
        if (
            not self.chunked
            and self.max_batch_tokens is not None
            and request.longest > self.max_batch_tokens
        ):
            return f"can have {request.longest} tokens to compute in one step, the budget is {self.max_batch_tokens}"
        return super().refuses(request)

    def plan(self) -> Plan:
        step = self._begin()
        self._run(step)
        if not step.plan.preempted:
            self._admit(step)
            if not step.items:  # beams came back whole from a cache: their last tokens go together
                self._run(step)
        return self._finish(step)

    def _run(self, step: PlanBuilder) -> None:
        """Those that run already: decodes, then the rest of prompts."""
        behind: list[tuple[Sequence, int]] = []
        for sequence in self.running[:]:
            if sequence.status is not Status.RUNNING:
                continue  # preempted for an earlier one
            missing = len(sequence.tokens) - sequence.computed
            if sequence.request.beam:
                self._run_beam(step, sequence, behind)
            elif missing == 1:
                self._advance(step, sequence, 1 + len(sequence.drafts))
            else:
                behind.append((sequence, missing))
        for sequence, missing in behind:
            if sequence.status is Status.RUNNING:
                self._advance(step, sequence, missing)

    def _run_beam(self, step: PlanBuilder, sequence: Sequence, behind: list[tuple[Sequence, int]]) -> None:
        """The last tokens of all beams in one step; what comes before them whenever there
        is room.
        """
        beams = self._beams(sequence)
        missing = len(sequence.tokens) - sequence.computed
        if any(b.computed + 1 < len(b.tokens) for b in beams):
            wanted = missing - (len(beams) > 1)
            if wanted:
                behind.append((sequence, wanted))
        elif sequence is beams[0] and (step.room is None or len(beams) <= step.room):
            for beam in beams:
                if beam.status is Status.RUNNING:
                    self._advance(step, beam, 1)

    def _advance(self, step: PlanBuilder, sequence: Sequence, wanted: int) -> None:
        """Give a running sequence its share of the step, at the cost of others if it must be."""
        count = self._share(step, wanted, sequence)
        if count < 1:
            return
        copies = self.memory.reserve(sequence, count)
        if copies is None and sequence.drafts:  # nobody is preempted for a guess
            count = 1
            copies = self.memory.reserve(sequence, count)
        while copies is None:
            victims = self._beams(self.order.victim(self.running))
            self._preempt(step, victims)
            if sequence in victims:
                return
            copies = self.memory.reserve(sequence, count)
        step.put(sequence, count, self.memory.blocks(sequence), copies)

    def _share(self, step: PlanBuilder, wanted: int, sequence: Sequence) -> int:
        """How many of the tokens it wants a sequence may compute now."""
        if 0 < self.long_prefill < wanted:
            wanted = self.long_prefill
        if step.room is None or wanted <= step.room:
            return wanted
        return step.room if self.chunked or sequence.drafts else 0

    def _preempt(self, step: PlanBuilder, sequences: list[Sequence]) -> None:
        """Take their memory, and their shares of this step if they had any already."""
        for sequence in reversed(sequences):
            step.take_back(sequence)
            step.plan.preempted.append(sequence.key)
            self._start_over(sequence)

    def _admit(self, step: PlanBuilder) -> None:
        if self.max_sequences is None:
            free = None
        else:
            free = self.max_sequences - sum(b.seats for b in self.running)
        if not self.waiting or step.room == 0 or free == 0:
            return
        for sequence in self.order.candidates(self.waiting, self.memory):
            if sequence.status is not Status.WAITING:
                continue  # it came with another beam of its search
            seats = sum(b.seats for b in self._beams(sequence))
            if (
                step.room == 0
                or (free is not None and seats > free)
                or not self._enter(step, sequence)
            ):
                return
            if free is not None:
                free -= seats

    def _enter(self, step: PlanBuilder, sequence: Sequence) -> bool:
        """Admit a sequence, with all beams of its search; nobody if there is no room for the
        first one's share.
        """
        beams = self._beams(sequence)
        for beam in beams:
            hit = self.memory.match(beam)
            # the last tokens of all beams go together
            wanted = len(beam.tokens) - hit - (len(beams) > 1)
            count = self._share(step, wanted, beam)
            first = beam is beams[0]
            if first and count == 0 < wanted:
                return False
            if not self.memory.admit(beam, count, alone=not self.running):
                if first:
                    return False
                count = 0  # this one computes from the next step on, as those do that run
                self.memory.admit(beam, 0, alone=True)
            self.waiting.remove(beam)
            self.running.append(beam)
            beam.status = Status.RUNNING
            beam.computed = hit
            self._count(beam, hit)
            step.plan.admitted.append(beam.key)
            if count:
                step.put(beam, count, self.memory.blocks(beam), [])
        return True

    def _count(self, sequence: Sequence, hit: int) -> None:
        if sequence.preemptions:
            self.resumed_cached += hit
            self.resumed_queried += len(sequence.tokens)
        else:
            self.cached += hit
            self.queried += len(sequence.tokens)
