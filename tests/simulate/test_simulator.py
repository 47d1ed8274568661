"""The simulator serves as the scheduler does; its jumps change only the number of
plans.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kv.block_pool import BlockPool
from refllm.serve import factory
from refllm.serve.baselines.reservations import PaddedKVManager
from refllm.serve.baselines.static_batching import StaticBatching
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.request import Request
from refllm.serve.scheduler import Scheduler
from refllm.serve.swapping import SwappingKVManager
from refllm.simulate import programs
from refllm.simulate.clock import UnitClock
from refllm.simulate.simulator import Simulator
from refllm.simulate.workload import ALPACA, DistinctTokens, requests


class Whole:
    """Whole seconds, so that sums are exact in any order: what is read, and something for
    each row.
    """

    def step(self, batch, rows):
        return float(7 + sum(past + new for past, new in batch) + 3 * rows)

    def decode(self, pasts, count):
        rows = len(pasts)
        return [float(7 + sum(pasts) + rows * (i + 1) + 3 * rows) for i in range(count)]

    def move(self, tokens, blocks):
        return float(2 * tokens + 5 * blocks)


KINDS = ("paged", "swapping", "hash", "radix", "priority", "lpm", "orca-oracle", "static")


def scheduler(kind, blocks, size, budget, slots, chunked, host=None):
    pool = BlockPool(blocks, size)
    if kind == "swapping":
        return Scheduler(
            SwappingKVManager(pool, host_blocks=host), max_batch_tokens=budget, max_sequences=slots
        )
    policy = {"paged": "fcfs", "hash": "fcfs", "radix": "fcfs"}.get(kind, kind)
    cache = {"hash": "hash", "radix": "radix", "lpm": "radix"}.get(kind)
    return factory.make(
        policy,
        pool,
        prefix_cache=cache,
        max_batch_tokens=budget,
        max_sequences=slots,
        chunked=chunked,
        longest=blocks * size,
    )


@st.composite
def runs(draw, kinds=KINDS):
    """(make a scheduler, requests): small pools, so that blocks run out, and arrivals that
    fall into steps.
    """
    kind = draw(st.sampled_from(kinds))
    size = draw(st.integers(1, 5))
    blocks = draw(st.integers(12, 30))
    budget = draw(st.sampled_from([4, 9, 30, None]))
    slots = draw(st.sampled_from([1, 3, None]))
    chunked = draw(st.booleans()) or budget is not None
    host = draw(st.sampled_from([None, 0, 7]))
    asked = []
    for i in range(draw(st.integers(1, 8))):
        head = draw(st.sampled_from([(), (1, 2, 3, 4, 5)]))
        prompt = [*head, *range(100 * (i + 1), 100 * (i + 1) + draw(st.integers(1, 5)))]
        output = draw(st.integers(0, min(14, blocks * size - len(prompt))))
        sequences = (
            draw(st.integers(1, 2)) if kind not in ("orca-oracle", "static") and slots != 1 else 1
        )
        arrival = float(draw(st.integers(0, 200)))
        priority = draw(st.integers(0, 2))
        asked.append(
            Request(
                prompt,
                output,
                request_id=i,
                n=sequences,
                arrival=arrival,
                priority=priority,
                ignore_eos=True,
            )
        )
    bound = blocks * size if kind != "orca-oracle" else 1 << ((blocks * size).bit_length() - 1)
    asked = [r for r in asked if len(r.prompt) + r.max_tokens <= bound]
    return lambda: scheduler(kind, blocks, size, budget, slots, chunked, host), asked


def facts(run):
    tally = [(t.steps, t.rows, t.padding_rows, t.tokens, t.used) for t in (run.all, run.saturated)]
    return (
        run.recorder.timelines,
        run.duration,
        tally,
        run.preemptions,
        run.moved,
        run.cached,
        run.tokens,
    )


@pytest.mark.theorem(
    "A jump of k steps with all drafts accepted = k steps", source="drafts count as tokens"
)
@given(runs())
def test_jumps_change_nothing(case):
    make, asked = case
    plans = [0, 0]
    seen = []
    for jumps in (False, True):
        s = make()

        def count(taken, jumps=jumps):
            plans[jumps] += 1

        simulator = Simulator(s, Whole(), jumps=jumps, on_step=count)
        seen.append(facts(simulator.run(asked)))
        s.check()
    assert seen[0] == seen[1]
    assert plans[1] <= plans[0] == seen[0][2][0][0]


@pytest.mark.parametrize("kind", ["hash", "radix", "lpm"])
def test_no_jump_where_a_prefix_that_was_just_computed_admits_a_request(kind):
    # the second one needs four of the three blocks that are left, until it finds some
    head = list(range(1, 13))
    asked = [Request([*head, 50 + i], 9, request_id=i) for i in range(2)]
    plain, jumped = (
        Simulator(scheduler(kind, 7, 4, 40, None, True), Whole(), jumps=j).run(asked)
        for j in (0, 1)
    )
    assert facts(plain) == facts(jumped)
    lines = plain.recorder.timelines
    assert lines[1, 0].ttft < lines[0, 0].e2el  # it did come in while the first one was running


def test_no_jump_right_after_a_preemption():
    # it comes back in chunks, at once
    asked = [Request(range(50 * i, 50 * i + 4), 8, request_id=i) for i in range(2)]
    plain, jumped = (
        Simulator(scheduler("paged", 8, 2, 4, None, True), Whole(), jumps=j).run(asked)
        for j in (0, 1)
    )
    assert plain.preemptions > 0
    assert facts(plain) == facts(jumped)


@pytest.mark.parametrize(("budget", "chunked"), [(1, True), (3, True), (12, False)])
def test_no_jump_where_only_the_budget_keeps_requests_out(budget, chunked):
    # The budget, and nothing else, keeps the later ones out: all of it is used, or a whole
    # prompt does not fit
    asked = [Request(range(50 * i, 50 * i + 4), 9, request_id=i) for i in range(14)]
    plain, jumped = (
        Simulator(scheduler("paged", 140, 2, budget, None, chunked), Whole(), jumps=j).run(asked)
        for j in (False, True)
    )
    assert facts(plain) == facts(jumped)


def test_jumps_save_plans():
    asked = requests(ALPACA, 40, np.random.default_rng(0))
    plans = []
    for jumps in (False, True):
        taken = []
        Simulator(
            scheduler("paged", 200, 16, None, 8, True),
            UnitClock(),
            jumps=jumps,
            on_step=taken.append,
        ).run(asked)
        plans.append(len(taken))
        assert any(t.steps > 1 for t in taken) == jumps
    assert plans[1] < plans[0] / 2


def test_a_jump_ends_only_where_memory_or_a_request_does():
    def jumped(blocks, *asked, kind="paged", slots=None):
        taken = []
        Simulator(
            scheduler(kind, blocks, 2, None, slots, True), UnitClock(), on_step=taken.append
        ).run(asked)
        return [(t.steps, len(t.plan.items)) for t in taken]

    # a prompt, and all but the first token of its output
    assert jumped(40, Request([1, 2], 30)) == [(1, 1), (29, 1)]
    assert jumped(40, Request([1, 2], 2)) == [(1, 1), (1, 1)]
    # both begin with a block of two tokens, and get a token each per step from then on; five
    # blocks last for four tokens each, then one is preempted
    both = [Request([1, 2], 8, request_id="a"), Request([3, 4], 8, request_id="b")]
    assert jumped(5, *both)[:3] == [(1, 2), (2, 2), (1, 1)]
    assert jumped(9, *both)[:2] == [(1, 2), (6, 2)]
    # where prefixes are kept, a waiting request may find one, unless a step only decoded
    for kind in ("hash", "radix", "lpm"):
        steps = jumped(40, *both, kind=kind, slots=1)
        assert steps == [(1, 1), (1, 1), (6, 1), (1, 1), (7, 1)]


@given(runs())
def test_all_requests_are_served_in_full_and_memory_is_empty(case):
    make, asked = case
    s = make()
    run = Simulator(s, Whole()).run(asked)
    lines = run.recorder.timelines
    assert {name for name, _ in lines} == {r.request_id for r in asked}
    for request in asked:
        for index in range(request.n if request.max_tokens else 1):
            line = lines[request.request_id, index]
            assert line.completed
            assert line.tokens == len(line.times) == request.max_tokens
            assert all(a <= b for a, b in pairwise([line.sent, *line.times]))
    s.memory.check()
    assert not s.unfinished
    assert s.memory.allocated == 0
    least = sum(len(r.prompt) + r.n * (r.max_tokens - 1) for r in asked if r.max_tokens)
    if run.preemptions == run.cached == 0:
        assert run.all.tokens == least  # every token is computed once, but for the last
    assert run.all.rows <= run.all.tokens


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 12))
def test_a_request_alone_takes_the_steps_of_its_chunks_and_its_tokens(prompt, output, budget):
    s = Scheduler(PagedKVManager(BlockPool(60, 1)), max_batch_tokens=budget)
    run = Simulator(s, UnitClock()).run([Request(range(prompt), output, arrival=5.0)])
    assert run.all.steps == -(-prompt // budget) + output - 1
    (line,) = run.recorder.timelines.values()
    assert line.ttft == -(-prompt // budget)
    assert run.duration == 5 + run.all.steps
    assert run.saturated.steps == 0


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_a_static_batch_runs_as_long_as_its_longest_member(lengths, batch):
    s = StaticBatching(PaddedKVManager(1000), max_sequences=batch)
    run = Simulator(s, UnitClock()).run(
        [Request(range(p), o, request_id=i) for i, (p, o) in enumerate(lengths)]
    )
    outputs = [[o for _, o in lengths[i : i + batch]] for i in range(0, len(lengths), batch)]
    assert run.all.steps == sum(map(max, outputs))
    assert run.all.rows == sum(map(sum, outputs))
    assert run.all.rows + run.all.padding_rows == sum(len(group) * max(group) for group in outputs)


@pytest.mark.theorem(
    "Swapping computes every token once; what goes out comes back", source="Kwon et al. 2023, §4.5"
)
@given(runs(kinds=("swapping",)))
def test_swapping_computes_nothing_twice(case):
    make, asked = case
    s = make()
    run = Simulator(s, Whole()).run(asked)
    s.memory.check()
    assert s.memory.host_used == 0
    assert run.moved.tokens % 2 == 0  # out and in again
    least = sum(len(r.prompt) + r.n * (r.max_tokens - 1) for r in asked if r.max_tokens)
    if s.memory.dropped == 0:
        assert run.all.tokens == least
        assert bool(run.preemptions) >= bool(run.moved.tokens)
    assert s.memory.swapped + s.memory.dropped <= run.preemptions


def test_swapping_moves_where_recomputing_computes():
    asked = [Request(range(100 * i, 100 * i + 8), 20, request_id=i) for i in range(4)]
    runs = {
        kind: Simulator(scheduler(kind, 10, 4, None, None, True), Whole()).run(asked)
        for kind in ("paged", "swapping")
    }
    assert runs["paged"].preemptions > 0 < runs["swapping"].preemptions
    least = 4 * 27
    assert runs["swapping"].all.tokens == least < runs["paged"].all.tokens
    assert runs["swapping"].moved.blocks > 0 == runs["paged"].moved.blocks
    none = Simulator(scheduler("swapping", 10, 4, None, None, True, host=0), Whole()).run(asked)
    assert facts(none) == facts(runs["paged"])  # without room on the host it is recomputing
    with pytest.raises(ValueError, match="host_blocks"):
        SwappingKVManager(BlockPool(1, 1), host_blocks=-1)


def test_programs_continue_and_hit_the_cache():
    for cache, kind in ((None, "paged"), ("radix", "radix"), ("hash", "hash")):
        program = programs.chat(DistinctTokens(), 3, turns=3, system=40, message=8, answer=6)
        done = []
        s = scheduler(kind, 400, 4, None, None, True)
        run = Simulator(s, UnitClock()).run(
            program.requests,
            program.follow,
            lambda *both: done.append(both),  # noqa: B023
        )
        assert len(run.tokens) == 9
        assert done[-1] == (9, 9)
        assert all(len(output) == 6 for output in run.tokens.values())
        if cache is None:
            assert run.cached == 0
        else:  # whole blocks of all earlier turns; the first three came together and found nothing
            prompts = [48 + 14 * turn for turn in (1, 2)]
            # the last token of an answer was never computed
            found = [(p - 8 - 1) // 4 * 4 for p in prompts]
            assert run.cached == 3 * sum(found)
            assert run.hit_rate == run.cached / (3 * (48 + sum(prompts)))


def test_totals_are_the_sums_over_steps():
    taken = []
    asked = requests(ALPACA, 20, np.random.default_rng(0))
    run = Simulator(
        scheduler("paged", 60, 8, None, None, True), Whole(), jumps=False, on_step=taken.append
    ).run(asked)
    assert run.all.steps == len(taken)
    assert run.all.batch == np.mean([len(t.plan.items) for t in taken])
    assert run.all.utilisation == pytest.approx(np.mean([t.used for t in taken]) / 480, rel=1e-12)
    assert run.all.filled == sum(t.used for t in taken) / sum(t.allocated for t in taken)
    assert all(t.used <= t.allocated <= 480 for t in taken)
    full = [t for t in taken if t.plan.waiting]
    assert run.saturated.batch == np.mean([len(t.plan.items) for t in full])
    assert all(a.end == b.start or a.end < b.start for a, b in pairwise(taken))


def test_a_jump_counts_what_is_allocated_for_each_of_its_steps():
    taken = []
    asked = [Request(range(5), 9, request_id=i) for i in range(2)]
    run = Simulator(
        scheduler("paged", 60, 8, None, None, True), UnitClock(), on_step=taken.append
    ).run(asked)
    assert max(t.steps for t in taken) > 1
    assert run.all.allocated == sum(t.steps * t.allocated for t in taken)


@pytest.mark.parametrize("jumps", [False, True])
def test_a_request_that_arrives_as_a_step_ends_is_in_the_next(jumps):
    def first_tokens(*asked):
        run = Simulator(scheduler("paged", 60, 8, None, None, True), UnitClock(), jumps=jumps).run(
            asked
        )
        return [run.recorder.timelines[request.request_id, 0].times[0] for request in asked]

    long = Request(range(3), 10, request_id="long")
    assert first_tokens(long, Request([1], 2, request_id="late", arrival=4.0)) == [1.0, 5.0]
    assert first_tokens(long, Request([1], 2, request_id="late", arrival=4.5)) == [1.0, 6.0]
    assert first_tokens(
        Request([1], 1, request_id="short"), Request([1], 1, request_id="late", arrival=0.5)
    ) == [
        1.0,
        2.0,
    ]
    assert first_tokens(
        Request([1], 1, request_id="short"), Request([1], 1, request_id="idle", arrival=7.5)
    ) == [
        1.0,
        8.5,
    ]


def test_every_sequence_generates_a_token_of_its_own_that_is_in_no_prompt():
    asked = [Request([order * 4096, 5, 6], 3, request_id=order, n=2) for order in range(3)]
    s = scheduler("radix", 60, 1, None, None, True)
    run = Simulator(s, UnitClock()).run(asked)
    outputs = [tuple(output) for output in run.tokens.values()]
    assert all(len(set(output)) == 1 and output[0] >= 1 << 40 for output in outputs)
    assert len(set(outputs)) == 3
    for order, request in enumerate(asked):
        for index in range(2):
            text = [*request.prompt, *[(1 << 40) + 4096 * order + index] * 2]
            assert len(s.memory.cache.match(text, record=False)) == 5


def test_a_follow_up_is_sent_when_its_answer_has_arrived():
    asked = Request([1], 4, request_id="question", arrival=2.0)
    more = {"question": [Request([2], 1, request_id="follow-up")], "follow-up": []}
    simulator = Simulator(scheduler("paged", 60, 8, None, None, True), UnitClock())
    lines = simulator.run(
        [asked], lambda request, answer: more[request.request_id]
    ).recorder.timelines
    assert (lines["question", 0].sent, lines["question", 0].times) == (2.0, [3.0, 4.0, 5.0, 6.0])
    assert (lines["follow-up", 0].sent, lines["follow-up", 0].ttft) == (6.0, 1.0)


def test_every_block_that_is_moved_is_charged_once():
    class Moving(UnitClock):
        def move(self, tokens, blocks):
            return float(tokens + 1000 * blocks)

    asked = [Request(range(100 * i, 100 * i + 8), 20, request_id=i) for i in range(4)]
    run = Simulator(scheduler("swapping", 10, 4, None, None, True), Moving()).run(asked)
    assert run.moved.blocks > 0
    assert run.duration == run.all.steps + run.moved.tokens + 1000 * run.moved.blocks


def test_requests_that_cannot_be_served_are_rejected_by_name():
    simulator = Simulator(scheduler("paged", 2, 4, None, None, True), UnitClock())
    with pytest.raises(ValueError, match="request 'long' needs"):
        simulator.run([Request(range(20), 4, request_id="long")])
    with pytest.raises(ValueError, match="beams depend on a model"):
        simulator.run([Request(range(2), 2, request_id="beam", n=2, beam=True)])
