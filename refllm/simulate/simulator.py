"""Serving without a model: the real scheduler and its memory, with a clock that says how
long each step would take.

Source: the discrete-event simulation of Kwon et al. 2023, section 6; the scheduler is the
one that the engine runs.

| name   | meaning                                                                        |
|--------|--------------------------------------------------------------------------------|
| clock  | seconds of a step over (past, new) of each row; of a run of decode steps; of   |
|        | moved blocks                                                                   |
| steady | no request is admitted, finishes, arrives or runs out of memory: each sequence |
|        | gets one token per step                                                        |
| jump   | k steady steps in one plan                                                     |

A jump proposes k − 1 drafts for every sequence and accepts them all: the scheduler advances
each sequence by k tokens, its memory takes the same blocks as in k steps, and the clock is
charged for k steps of one token each. Times, counts and tokens are the same as without jumps
(``jumps=False``; a test asserts it); only the number of plans is smaller.

Each sequence generates one token of its own, over and over, so outputs of different
sequences share no prefix.

Left out: the model, end tokens (all requests run to ``max_tokens``), beams, the time of the
scheduler itself.
"""

from __future__ import annotations

from collections import abc, deque
from itertools import accumulate

from refllm.errors import InputError
from refllm.serve.admission import LongestPrefix
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.plan import Outcome, Plan, SampledTokens
from refllm.serve.prefix_caching import HashKVManager, RadixKVManager
from refllm.serve.request import Request, Sequence
from refllm.serve.scheduler import Scheduler
from refllm.serve.swapping import SwappingKVManager, SwapTraffic
from refllm.simulate.clock import Clock
from refllm.simulate.metrics import Recorder
from refllm.simulate.programs import Follow
from refllm.simulate.totals import ExecutedStep, SimulationResult, StepTotals

FIRST_OUTPUT_TOKEN = 1 << 40  # beyond the tokens of every prompt


class Simulator:
    """Runs a scheduler by a clock. ``now`` is the simulated time in seconds.

    >>> from refllm.kv.block_pool import BlockPool
    >>> from refllm.serve import factory
    >>> from refllm.simulate.clock import UnitClock
    >>> scheduler = factory.make("fcfs", BlockPool(8, 4), max_batch_tokens=4)
    >>> result = Simulator(scheduler, UnitClock()).run([Request(range(6), 3, request_id="a")])
    >>> result.recorder.timelines["a", 0].times  # the prompt takes two steps
    [2.0, 3.0, 4.0]
    """

    def __init__(
        self,
        scheduler: BaseScheduler,
        clock: Clock,
        *,
        jumps: bool = True,
        on_step: abc.Callable[[ExecutedStep], object] | None = None,
    ):
        """``on_step`` receives every executed plan."""
        self.scheduler = scheduler
        self.clock = clock
        self.jumps = jumps
        self.on_step = on_step
        self.memory = scheduler.memory
        self.now = 0.0
        self.recorder = Recorder()
        self.all = StepTotals(self.memory.slots)
        self.saturated = StepTotals(self.memory.slots)
        self._pending: deque[Request] = deque()
        self._finished: list[Sequence] = []
        # whether no request can be admitted before one finishes or arrives
        self._closed = False
        self._outputs: dict[abc.Hashable, list[int]] = {}

    def run(
        self,
        requests: abc.Iterable[Request],
        follow: Follow | None = None,
        progress: abc.Callable[[int, int], object] | None = None,
    ) -> SimulationResult:
        """Serve ``requests``, each from its ``arrival`` on, and those that ``follow`` their
        outputs.

        ``progress(done, known)`` is called for every request that has finished. ValueError
        for a request that this memory can never serve, or for a beam search.
        """
        self._pending = deque(sorted(requests, key=lambda request: request.arrival))
        done = 0
        known = len(self._pending)
        while self._pending or self.scheduler.unfinished:
            if not self.scheduler.unfinished:
                self.now = max(self.now, self._pending[0].arrival)
            while self._pending and self._pending[0].arrival <= self.now:
                self._submit(self._pending.popleft())
            count = self._steady_steps() if self.jumps else 1
            if count > 1:
                self._jump(count)
            else:
                self._step()
            for sequence in self._finished:
                if sequence.index > 0:
                    continue
                self._outputs[sequence.request.request_id] = sequence.output
                more = follow(sequence.request, sequence.output) if follow else []
                done += 1
                known += len(more)
                for request in more:
                    self._submit(request, self.now)
                if progress is not None:
                    progress(done, known)
            self._finished.clear()
        return self._result()

    # --- steps ----------------------------------------------------------------------------

    def _submit(self, request: Request, sent: float | None = None) -> None:
        """Queue a request that was sent at its arrival, or at ``sent``."""
        if request.beam:
            raise InputError(
                f"request {request.request_id!r}: beams depend on a model's logits: "
                "simulate n samples instead"
            )
        name = self.scheduler.submit(request)
        time = request.arrival if sent is None else sent
        self.recorder.sent((name, 0), len(request.prompt), time)
        self._closed = False

    def _step(self) -> None:
        """Execute one plan as it is."""
        before = self._moved()
        plan = self.scheduler.plan()
        assert self.scheduler.step is not None
        sampled = [s for s, item in self.scheduler.step.items.items() if item.samples]
        moved = self._moved()
        rows = len(sampled) + len(plan.padding_rows)
        if plan.items:  # requests with max_tokens 0 finish without a step
            self.now += self.clock.step(plan.batch(), rows)
            self.now += self.clock.move(moved.tokens - before.tokens, moved.blocks - before.blocks)
        self._closed = self._closes(plan)
        outcomes = []
        for sequence in sampled:
            tokens = [_output_token(sequence, fork) for fork in range(sequence.slots)]
            outcomes.append([SampledTokens((token,)) for token in tokens])
        self._apply(plan, 1, self.now, [self.now], outcomes)

    def _jump(self, count: int) -> None:
        """Execute ``count`` steady steps in one plan; fewer if a request arrives before."""
        running = self.scheduler.running
        seconds = self.clock.decode([sequence.computed for sequence in running], count)
        stamps = list(accumulate(seconds, initial=self.now))[1:]
        if self._pending:  # the step in which a request arrives is the last
            arrival = self._pending[0].arrival
            before = sum(time < arrival for time in stamps)
            count = min(count, before + 1)
            stamps = stamps[:count]
        for sequence in running:
            self.scheduler.propose(sequence.key, [_output_token(sequence)] * (count - 1))
        # The budget is that of a single step. This one leaves no room for a waiting request,
        # as none of the steps does.
        budget = self.scheduler.max_batch_tokens
        self.scheduler.max_batch_tokens = count * len(running)
        plan = self.scheduler.plan()
        self.scheduler.max_batch_tokens = budget
        assert not plan.admitted, "a jump that is not steady"
        assert not plan.preempted, "a jump that is not steady"
        assert all(item.count == count for item in plan.items)
        start = self.now
        self.now = stamps[-1]
        outcomes = [[SampledTokens([_output_token(s)] * count)] for s in running]
        self._apply(plan, count, start, stamps, outcomes)

    def _apply(
        self,
        plan: Plan,
        steps: int,
        start: float,
        stamps: list[float],
        outcomes: abc.Sequence[Outcome],
    ) -> None:
        """Apply the outcomes of a plan, and record which sequence got tokens when."""
        used = sum(sequence.computed for sequence in self.scheduler.running) + plan.tokens
        executed = ExecutedStep(plan, steps, start, self.now, used, self.memory.allocated)
        updates = self.scheduler.update(plan, outcomes)
        if plan.items:
            self.all.add(executed)
            if plan.waiting:
                self.saturated.add(executed)
            if self.on_step is not None:
                self.on_step(executed)
        timelines = self.recorder.timelines
        for update in updates:
            key = update.sequence.key
            if key not in timelines:  # forked in this step
                parent = timelines[update.request_id, 0]
                self.recorder.sent(key, parent.prompt, parent.sent)
            timeline = timelines[key]
            if update.tokens:
                timeline.times += stamps
                timeline.tokens += len(update.tokens)
            if update.finish_reason is not None:
                timeline.completed = True
                self._closed = False
                self._finished.append(update.sequence)

    # --- when to jump ---------------------------------------------------------------------

    def _closes(self, plan: Plan) -> bool:
        """Whether no request can be admitted after this plan until one finishes or arrives."""
        if not plan.waiting:
            return True
        if plan.preempted:
            return False
        decodes_only = not plan.admitted and len(plan.sampling) == len(plan.items) == plan.tokens
        keeps_prefixes = isinstance(self.memory, (HashKVManager, RadixKVManager))
        if keeps_prefixes or isinstance(self.scheduler.order, LongestPrefix):
            return decodes_only  # a waiting request may find what was just computed
        if decodes_only or plan.budget is None:
            return True
        # The first request in the queue found no memory or no sequence slot. Had it been the
        # budget, the next step could admit it.
        chunked = isinstance(self.scheduler, Scheduler) and self.scheduler.chunked
        return plan.tokens < plan.budget and chunked

    def _steady_steps(self) -> int:
        """How many steps will only decode; 1 if the next one may do more."""
        running = self.scheduler.running
        budget = self.scheduler.max_batch_tokens
        if not self._closed or not running or not isinstance(self.scheduler, Scheduler):
            return 1
        if budget is not None and len(running) > budget:
            return 1
        if any(s.computed != len(s.tokens) - 1 or s.request.num_sequences > 1 for s in running):
            return 1
        most = min(sequence.remaining for sequence in running)
        block_size = self.memory.block_size
        if block_size == 0 or most == 1:
            return most
        free = (self.memory.slots - self.memory.allocated) // block_size
        in_last_block = [-sequence.computed % block_size for sequence in running]  # free slots

        def fits(count: int) -> bool:
            """Whether the free blocks last for ``count`` more tokens per sequence."""
            needed = [-((room - count) // block_size) for room in in_last_block if count > room]
            return sum(needed) <= free

        if fits(most):
            return most
        low = 0  # fits(low), but not fits(high)
        high = most
        while high - low > 1:
            middle = (low + high) // 2
            if fits(middle):
                low = middle
            else:
                high = middle
        return max(1, low)

    def _moved(self) -> SwapTraffic:
        if isinstance(self.memory, SwappingKVManager):
            return self.memory.moved
        return SwapTraffic(0, 0)

    def _result(self) -> SimulationResult:
        scheduler = self.scheduler
        return SimulationResult(
            self.recorder,
            self.now,
            self.all,
            self.saturated,
            scheduler.preemptions,
            self._moved(),
            scheduler.cached,
            scheduler.queried,
            self._outputs,
        )


def _output_token(sequence: Sequence, fork: int = 0) -> int:
    """The token that a sequence generates at all positions; that of its child number ``fork``
    if it forks with this token.
    """
    return FIRST_OUTPUT_TOKEN + sequence.order * 4096 + sequence.index + fork
