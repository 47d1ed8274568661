"""Continuous batching: one plan per step, over sequences that differ only in how many of
their tokens are computed.

Sources: Orca, Yu et al. 2022 (iteration-level scheduling); Sarathi-Serve, Agrawal et al.
2024 (chunked prefill, decode first, a token budget per step); vLLM's V1 scheduler (two
counters, no phases); Kwon et al. 2023, section 4.5 (preemption).

A step, in order:

1. Running sequences that are one token behind, with their drafts: decode goes first, so that
   a long prompt delays no sequence that streams.
2. Running sequences further behind, in the order of admission: prompts of which the first
   chunks are computed. In 1 and 2, if memory has no room, running sequences are preempted,
   the youngest or least urgent first, until it has.
3. If none was preempted: waiting sequences, in the order of admission, as long as budget,
   sequence slots and memory last. The first one that does not fit ends the step, so no
   request is overtaken for being large. Under the order ``priority``, less urgent running
   sequences are preempted until a more urgent one fits.

A preempted sequence keeps its tokens, loses their keys and values, and recomputes them when
it is admitted again: to the scheduler it has a longer prompt. The beams of one search are
admitted and preempted together, and their last tokens are computed in one step, so that
they are ranked against each other.

The oldest (or most urgent) running sequence is never preempted for another, and every
request that is accepted fits into memory alone. So each step computes at least one token,
and every request finishes.

Usage (``plan`` and ``update`` alternate; ``serve.base_scheduler`` defines an outcome)::

    plan = scheduler.plan()
    # copy plan.copies, compute plan.items, sample item.samples rows of each of plan.sampling
    updates = scheduler.update(plan, outcomes)   # outcomes[i] for plan.sampling[i]

Left out: what only a model can know: when a text ends before ``max_tokens`` (the engine
says so in an outcome).
"""

from __future__ import annotations

from refllm.errors import InputError
from refllm.serve.admission import Order, order_named
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.isolation import RequestFailure
from refllm.serve.kv_manager import KVManager
from refllm.serve.plan import Plan, PlanBuilder
from refllm.serve.request import Request, Sequence, SequenceStatus


class Scheduler(BaseScheduler):
    """Continuous batching over a ``KVManager``; the module says what a step does.

    >>> from refllm.kv.block_pool import BlockPool
    >>> from refllm.serve.kv_manager import PagedKVManager
    >>> scheduler = Scheduler(PagedKVManager(BlockPool(8, 4)), max_batch_tokens=6)
    >>> for name, length in (("a", 4), ("b", 5)):
    ...     _ = scheduler.submit(Request(range(length), max_tokens=2, request_id=name))
    >>> [(item.key[0], item.count, item.samples) for item in scheduler.plan().items]
    [('a', 4, 1), ('b', 2, 0)]
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
        """Build a scheduler; ``None`` lifts a limit.

        ``long_prefill`` caps the chunk of one prompt (0: only the budget does). With
        ``chunked=False`` a prompt is computed in a single step, as in Orca.
        """
        super().__init__(memory, order_named(order), max_batch_tokens, max_sequences)
        if long_prefill < 0:
            raise InputError(f"long_prefill must be 0 (off) or more, got {long_prefill}")
        self.chunked = chunked
        self.long_prefill = long_prefill

    def rejection_reason(self, request: Request) -> str | None:
        """Without chunks, a request must also fit into one step."""
        # With its output: that too is recomputed in one step after a preemption.
        tokens = request.max_cached_tokens
        budget = self.max_batch_tokens
        if not self.chunked and budget is not None and tokens > budget:
            return f"can have {tokens} tokens to compute in one step, the budget is {budget}"
        return super().rejection_reason(request)

    def plan(self) -> Plan:
        """Decide the next step."""
        step = self._begin_plan()
        try:
            self._schedule_running(step)
            if not step.plan.preempted:
                self._admit(step)
                if not step.items:  # only beams were admitted, all cached but their last tokens
                    self._schedule_running(step)
        except BaseException:
            self._abandon(step)
            raise
        return self._finish_plan(step)

    def _schedule_running(self, step: PlanBuilder) -> None:
        """Schedule running sequences: decodes first, then prompts that are partly computed."""
        prefills: list[tuple[Sequence, int]] = []
        for sequence in self.running[:]:
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted for an earlier one
            missing = len(sequence.tokens) - sequence.computed
            if sequence.request.beam:
                self._schedule_beam(step, sequence, prefills)
            elif missing == 1:
                self._schedule(step, sequence, 1 + len(sequence.drafts))
            else:
                prefills.append((sequence, missing))
        for sequence, missing in prefills:
            if sequence.status is SequenceStatus.RUNNING:
                self._schedule(step, sequence, missing)

    def _schedule_beam(
        self, step: PlanBuilder, sequence: Sequence, prefills: list[tuple[Sequence, int]]
    ) -> None:
        """The last tokens of all beams in one step; earlier tokens whenever there is room."""
        beams = self._group(sequence)
        missing = len(sequence.tokens) - sequence.computed
        if any(beam.computed + 1 < len(beam.tokens) for beam in beams):
            wanted = missing - (len(beams) > 1)
            if wanted:
                prefills.append((sequence, wanted))
        elif sequence is beams[0] and (step.budget_left is None or len(beams) <= step.budget_left):
            for beam in beams:
                if beam.status is SequenceStatus.RUNNING:
                    self._schedule(step, beam, 1)

    def _schedule(self, step: PlanBuilder, sequence: Sequence, wanted: int) -> None:
        """Give a running sequence its share of the step; preempt others if it has no room."""
        count = self._share(step, wanted, sequence)
        if count < 1:
            return
        copies = self.memory.reserve(sequence, count)
        if copies is None and sequence.drafts:  # no sequence is preempted for drafts
            count = 1
            copies = self.memory.reserve(sequence, count)
        while copies is None:
            victims = self._group(self.order.victim(self.running))
            self._preempt_group(step, victims)
            if sequence in victims:
                return
            copies = self.memory.reserve(sequence, count)
        step.add(sequence, count, self.memory.blocks(sequence), copies)
        if copies:
            self.memory.hold(copies)

    def _share(self, step: PlanBuilder, wanted: int, sequence: Sequence) -> int:
        """How many of the ``wanted`` tokens a sequence may compute in this step."""
        if 0 < self.long_prefill < wanted:
            wanted = self.long_prefill
        if step.budget_left is None or wanted <= step.budget_left:
            return wanted
        if self.chunked or sequence.drafts:
            return step.budget_left
        return 0

    def _preempt_group(self, step: PlanBuilder, sequences: list[Sequence]) -> None:
        """Preempt sequences; what they had of this step goes back into the budget."""
        for sequence in reversed(sequences):
            self.memory.unhold(step.remove(sequence))
            step.plan.preempted.append(sequence.key)
            self._preempt(sequence)

    def _admit(self, step: PlanBuilder) -> None:
        """Admit waiting sequences until one does not fit; a request that fails meanwhile ends,
        and the others are admitted without it.
        """
        while True:
            try:
                self._admit_waiting(step)
                return
            except RequestFailure as failure:
                for sequence in self.fail(failure.request_id, str(failure)):
                    self.memory.unhold(step.remove(sequence))
                    step.plan.admitted = [key for key in step.plan.admitted if key != sequence.key]

    def _admit_waiting(self, step: PlanBuilder) -> None:
        """Admit the candidates of the order while tokens, sequence slots and memory last."""
        free = None  # sequence slots; None: no limit
        if self.max_sequences is not None:
            free = self.max_sequences - sum(sequence.slots for sequence in self.running)
        full = step.budget_left == 0 or free == 0
        if not self.waiting or (full and not self.order.preempts):
            return
        for sequence in self.order.candidates(self.waiting, self.memory):
            if sequence.status is not SequenceStatus.WAITING:
                continue  # admitted with another beam of its search
            if sequence.key in step.plan.preempted:
                return  # it has just made room for a more urgent one
            slots = sum(beam.slots for beam in self._group(sequence))
            while not (
                step.budget_left != 0
                and (free is None or slots <= free)
                and self._admit_group(step, sequence)
            ):
                victim = self.order.yields_to(sequence, self.running)
                if victim is None:
                    return
                victims = self._group(victim)
                if free is not None:
                    free += sum(beam.slots for beam in victims)
                self._preempt_group(step, victims)
            if free is not None:
                free -= slots

    def _admit_group(self, step: PlanBuilder, sequence: Sequence) -> bool:
        """Admit a sequence with all beams of its search; False if there is no room for the
        share of the first.
        """
        beams = self._group(sequence)
        for beam in beams:
            hit = self.memory.match(beam)
            # the last tokens of several beams are computed together, later
            wanted = len(beam.tokens) - hit - (len(beams) > 1)
            count = self._share(step, wanted, beam)
            first = beam is beams[0]
            if first and count == 0 < wanted:
                return False
            if not self.memory.admit(beam, count, alone=not self.running):
                if first:
                    return False
                count = 0  # this beam computes from the next step on, as a running one
                self.memory.admit(beam, 0, alone=True)
            self.waiting.remove(beam)
            self.running.append(beam)
            beam.status = SequenceStatus.RUNNING
            beam.computed = hit
            beam.computed_from = hit
            self._count_hit(beam, hit)
            step.plan.admitted.append(beam.key)
            if count:
                step.add(beam, count, self.memory.blocks(beam), [])
        return True

    def _count_hit(self, sequence: Sequence, hit: int) -> None:
        """Count the tokens that the prefix cache was asked for, and those that it had."""
        if sequence.preemptions:
            self.resumed_cached += hit
            self.resumed_queried += len(sequence.tokens)
        else:
            sequence.cached = hit
            self.cached += hit
            self.queried += len(sequence.tokens)
