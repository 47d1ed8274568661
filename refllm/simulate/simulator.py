"""Serving without a model: the real scheduler and its memory, with a clock that says what
each step would take.

Source: the discrete-event form of Kwon et al. 2023, section 6; the scheduler is the one
that the engine runs.

| name   | meaning                                                                                        |
|--------|------------------------------------------------------------------------------------------------|
| clock  | seconds of a step over (past, new) of each row; of a run of decode steps; of moved blocks      |
| steady | nobody is admitted, ends, arrives or runs out of memory: each sequence gets a token a step       |
| jump   | k steady steps in one plan                                                                     |
| used   | slots that hold a token's keys and values; the rest of what is allocated is reserved or waste  |

A jump proposes k − 1 drafts for everybody and accepts them all: the scheduler advances each
sequence by k tokens, its memory takes the same blocks as in k steps, and the clock is charged
for k steps of one token each. Times, counts and tokens are the same as without jumps
(``jumps=False``), which a test holds; there are only fewer plans.

What a sequence says is a number of its own, over and over: so answers of different sequences
share no prefix.

Left out: the model, end tokens (everybody runs to ``max_tokens``), beams; time that the
scheduler itself takes.
"""

from __future__ import annotations

from collections import abc, deque
from collections.abc import Callable, Hashable, Iterable
from itertools import accumulate
from typing import NamedTuple, Protocol

from refllm.serve.admission import LongestPrefix
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.plan import Plan, SampledTokens
from refllm.serve.prefix_caching import HashKVManager, RadixKVManager
from refllm.serve.request import Request, Sequence
from refllm.serve.scheduler import Scheduler
from refllm.serve.swapping import SwappingKVManager, SwapTraffic
from refllm.simulate.metrics import Limits, Recorder, Summary
from refllm.simulate.programs import Follow

SAYS = 1 << 40  # answers are numbers from here on: beyond every prompt


class Clock(Protocol):
    """What steps take, in seconds."""

    def step(self, batch: abc.Sequence[tuple[int, int]], rows: int) -> float:
        """A step over (past, new) of every row of the batch, with ``rows`` rows of logits."""

    def decode(self, pasts: abc.Sequence[int], count: int) -> abc.Sequence[float]:
        """``count`` steps, each of one token for everybody; ``pasts`` are cached before the
        first.
        """

    def move(self, tokens: int, blocks: int) -> float:
        """Keys and values between device and host, blocks one by one."""


class UnitClock:
    """A clock for counting: every step takes one second, moving nothing."""

    def step(self, batch: abc.Sequence[tuple[int, int]], rows: int) -> float:
        return 1.0

    def decode(self, pasts: abc.Sequence[int], count: int) -> abc.Sequence[float]:
        return [1.0] * count

    def move(self, tokens: int, blocks: int) -> float:
        return 0.0


class ExecutedStep(NamedTuple):
    """A plan that was carried out, or a jump: ``steps`` of them in one."""

    plan: Plan
    steps: int
    start: float
    end: float
    # tokens with keys and values after the last of the steps; shared ones count for each
    # who shares
    used: int
    allocated: int  # slots that sequences hold, then


class StepTotals:
    """Sums over steps. ``batch`` and ``utilisation`` are means over steps; ValueError where
    there were none.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.steps = 0
        self.rows = 0
        self.padding_rows = 0
        self.tokens = 0
        self.used = 0
        self.allocated = 0

    def add(self, taken: ExecutedStep) -> None:
        plan = taken.plan
        k = taken.steps
        rows = len(plan.items)
        padding_rows = len(plan.padding_rows)
        self.steps += k
        self.rows += k * rows
        self.padding_rows += k * padding_rows
        self.tokens += plan.tokens
        # in a jump it grows by a token a row and step
        self.used += k * taken.used - rows * (k * (k - 1) // 2)
        self.allocated += k * taken.allocated

    @property
    def batch(self) -> float:
        """Mean number of requests that run."""
        return self.rows / self._some()

    @property
    def utilisation(self) -> float:
        """Share of the memory that holds tokens."""
        return self.used / (self._some() * self.slots)

    @property
    def filled(self) -> float:
        """Share of what is allocated that holds tokens (within a jump: of what is allocated
        after it).
        """
        return self.used / self.allocated if self._some() else 0.0

    def _some(self) -> int:
        if self.steps == 0:
            raise ValueError(
                "no step was counted, so there is no mean: nobody ever had to wait, or nobody came"
            )
        return self.steps


class SimulationResult(NamedTuple):
    """What came of a simulation."""

    recorder: Recorder
    duration: float
    all: StepTotals
    saturated: StepTotals  # the steps with somebody waiting: what a server under full load does
    preemptions: int
    moved: SwapTraffic  # by swapping
    cached: int  # prompt tokens found in a cache, of those queried
    queried: int
    tokens: dict[Hashable, list[int]]  # what each request's first sequence said

    def summary(self, limits: Limits | None = None) -> Summary:
        """Times as ``simulate.metrics`` defines them."""
        return self.recorder.summarise(self.duration, limits)

    @property
    def hit_rate(self) -> float:
        return self.cached / max(1, self.queried)


class Simulator:
    """Drives a scheduler by a clock. ``now`` is the time of the simulation, in seconds."""

    def __init__(
        self,
        scheduler: BaseScheduler,
        clock: Clock,
        *,
        jumps: bool = True,
        on_step: Callable[[ExecutedStep], object] | None = None,
    ):
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
        self._ended: list[Sequence] = []
        self._closed = False  # nobody can be admitted until somebody ends or arrives
        self._said: dict[Hashable, list[int]] = {}

    def run(
        self,
        requests: Iterable[Request],
        follow: Follow | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> SimulationResult:
        """Serve ``requests``, each from its ``arrival`` on, and what follows from their
        answers.

        ``progress(done, known)`` hears of every request that has ended. ValueError for a
        request that this memory can never serve, or for a beam search.
        """
        self._pending = deque(sorted(requests, key=lambda request: request.arrival))
        done = 0
        known = len(self._pending)
        while self._pending or self.scheduler.unfinished:
            if not self.scheduler.unfinished:
                self.now = max(self.now, self._pending[0].arrival)
            while self._pending and self._pending[0].arrival <= self.now:
                self._submit(self._pending.popleft())
            count = self._steady() if self.jumps else 1
            if count > 1:
                self._jump(count)
            else:
                self._step()
            for sequence in self._ended:
                if sequence.index == 0:
                    self._said[sequence.request.id] = sequence.output
                    if follow is not None:
                        more = follow(sequence.request, sequence.output)
                    else:
                        more = []
                    done = done + 1
                    known = known + len(more)
                    for request in more:
                        self._submit(request, self.now)
                    if progress is not None:
                        progress(done, known)
            self._ended.clear()
        return self._report()

    # --- inside ---------------------------------------------------------------------------

    def _submit(self, request: Request, sent: float | None = None) -> None:
        if request.beam:
            raise ValueError(
                f"request {request.id!r}: beams depend on a model's numbers: simulate n samples instead"
            )
        name = self.scheduler.submit(request)
        self.recorder.sent(
            (name, 0), len(request.prompt), request.arrival if sent is None else sent
        )
        self._closed = False

    def _step(self) -> None:
        """One plan as it is."""
        before = self._moved()
        plan = self.scheduler.plan()
        assert self.scheduler.step is not None
        sequences = [sequence for sequence, item in self.scheduler.step.items.items() if item.samples]
        moved = self._moved()
        rows = len(sequences) + len(plan.padding_rows)
        if plan.items:  # requests with max_tokens 0 end without a step
            self.now += self.clock.step(plan.batch(), rows)
            self.now += self.clock.move(moved.tokens - before.tokens, moved.blocks - before.blocks)
        self._closed = self._closes(plan)
        outcomes = [
            [SampledTokens((_says(sequence, i),)) for i in range(sequence.seats)] for sequence in sequences
        ]
        start = self.now
        self._book(plan, 1, start, [self.now], outcomes)

    def _jump(self, count: int) -> None:
        """``count`` steps at once; fewer if somebody arrives before."""
        running = self.scheduler.running
        stamps = list(
            accumulate(self.clock.decode([b.computed for b in running], count), initial=self.now)
        )[1:]
        if self._pending:  # the step in which he arrives is under way already
            count = min(
                count,
                next((i for i, t in enumerate(stamps) if t >= self._pending[0].arrival), count) + 1,
            )
            stamps = stamps[:count]
        for sequence in running:
            self.scheduler.propose(sequence.key, [_says(sequence, 0)] * (count - 1))
        # The budget is one of a single step; this much leaves no room for anybody who
        # waits, as none of the steps does
        budget = self.scheduler.max_batch_tokens
        self.scheduler.max_batch_tokens = count * len(running)
        plan = self.scheduler.plan()
        self.scheduler.max_batch_tokens = budget
        assert not plan.admitted and not plan.preempted, "a jump that is not steady"  # noqa: PT018
        assert all(item.count == count for item in plan.items)
        start = self.now
        self.now = stamps[-1]
        outcomes = [[SampledTokens([_says(sequence, 0)] * count)] for sequence in running]
        self._book(plan, count, start, stamps, outcomes)

    def _book(
        self,
        plan: Plan,
        steps: int,
        start: float,
        stamps: list[float],
        outcomes: list[list[SampledTokens]],
    ) -> None:
        """Carry a plan over, and note who got what when."""
        used = sum([sequence.computed for sequence in self.scheduler.running]) + plan.tokens
        taken = ExecutedStep(plan, steps, start, self.now, used, self.memory.allocated)
        events = self.scheduler.update(plan, outcomes)
        if plan.items:
            self.all.add(taken)
            if plan.waiting:
                self.saturated.add(taken)
            if self.on_step is not None:
                self.on_step(taken)
        lines = self.recorder.timelines
        for sequence, tokens, reason in events:
            if sequence.key not in lines:  # forked in this step
                first = lines[sequence.request.id, 0]
                self.recorder.sent(sequence.key, first.prompt, first.sent)
            line = lines[sequence.key]
            if tokens:
                line.times += stamps
                line.tokens += len(tokens)
            if reason is not None:
                line.completed = True
                self._closed = False
                self._ended.append(sequence)

    def _closes(self, plan: Plan) -> bool:
        """Whether nobody can be admitted after this plan until somebody ends or arrives."""
        if not plan.waiting:
            return True
        if plan.preempted:
            return False
        quiet = not plan.admitted and len(plan.sampling) == len(plan.items) == plan.tokens
        if isinstance(self.memory, (HashKVManager, RadixKVManager)) or isinstance(
            self.scheduler.order, LongestPrefix
        ):
            return quiet  # what was computed may be found by somebody who waits
        # the first in the queue found no memory or no seat; had it been the budget, there
        # could be more of that
        return quiet or plan.budget is None or (plan.tokens < plan.budget and self._chunked())

    def _chunked(self) -> bool:
        return isinstance(self.scheduler, Scheduler) and self.scheduler.chunked

    def _steady(self) -> int:
        """How many steps nothing but decoding can happen in; 1 if the next one is not such
        a step.
        """
        running = self.scheduler.running
        if not self._closed or not running or not isinstance(self.scheduler, Scheduler):
            return 1
        if (
            self.scheduler.max_batch_tokens is not None
            and len(running) > self.scheduler.max_batch_tokens
        ):
            return 1
        if any(b.computed != len(b.tokens) - 1 or b.request.n > 1 for b in running):
            return 1
        most = min([b.left for b in running])
        b = self.memory.block_size
        if b == 0 or most == 1:
            return most
        free = (self.memory.slots - self.memory.allocated) // b
        room = [-sequence.computed % b for sequence in running]  # left in the last block

        def fits(count: int) -> bool:
            return sum([-((r - count) // b) for r in room if count > r]) <= free

        if fits(most):
            return most
        low = 0  # fits(low), not fits(high)
        high = most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return max(1, low)

    def _moved(self) -> SwapTraffic:
        if isinstance(self.memory, SwappingKVManager):
            return self.memory.moved
        return SwapTraffic(0, 0)

    def _report(self) -> SimulationResult:
        s = self.scheduler
        return SimulationResult(
            self.recorder,
            self.now,
            self.all,
            self.saturated,
            s.preemptions,
            self._moved(),
            s.cached,
            s.queried,
            self._said,
        )


def _says(sequence: Sequence, fork: int) -> int:
    """What a sequence says all the time (its fork number ``fork``, if it forks with this
    token).
    """
    return SAYS + sequence.order * 4096 + sequence.index + fork
