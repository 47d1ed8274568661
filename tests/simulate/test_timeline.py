"""A trace agrees with the scheduler and its memory."""

from __future__ import annotations

import numpy as np
import pytest

from refllm.kv.block_pool import BlockPool
from refllm.kv.radix_tree import RadixCache
from refllm.serve import factory
from refllm.simulate import programs
from refllm.simulate.clock import UnitClock
from refllm.simulate.programs import RandomIds
from refllm.simulate.simulator import Simulator
from refllm.simulate.timeline import CACHED, FREE, SHARED, Trace, tree
from refllm.simulate.workload import ALPACA, requests


def traced(cache, asked, follow=None, blocks=60):
    scheduler = factory.make("fcfs", BlockPool(blocks, 4), prefix_cache=cache, max_sequences=6)
    trace = Trace(scheduler, blocks=10_000)
    held = []

    def both(taken):
        trace(taken)
        held.append(taken)

    run = Simulator(scheduler, UnitClock(), jumps=False, on_step=both).run(asked, follow)
    return scheduler, trace, held, run


def test_every_allocated_block_has_an_owner():
    asked = [r for r in requests(ALPACA, 30, np.random.default_rng(0)) if r.max_cached_tokens < 200]
    _, trace, taken, run = traced(None, asked)
    assert len(trace.owners) == run.all.steps
    for row, step in zip(trace.owners, taken, strict=True):
        assert SHARED not in row
        assert 4 * sum(owner != FREE for owner in row) == step.allocated
    assert {owner for row in trace.owners for owner in row} - {FREE} == set(range(len(asked)))
    seen = trace.occupancy()
    assert sum(seen["written"]) == sum(r.max_tokens for r in asked)
    assert sum(seen["read"]) + sum(seen["written"]) == run.all.tokens
    assert seen["slots"] == 240


def test_shared_and_cached_blocks_are_distinguished():
    program = programs.self_consistency(
        RandomIds(np.random.default_rng(0), 999), 4, samples=3, question=40, answer=6
    )
    _, trace, _, _ = traced("radix", program.requests, blocks=120)
    everything = {owner for row in trace.owners for owner in row}
    assert {FREE, SHARED, CACHED} < everything
    assert sum(owner == CACHED for owner in trace.owners[-1]) > 0
    assert trace.blocks()["requests"][0] == "(0, 0)"


def test_a_tree_is_traced_with_all_its_tokens():
    cache = RadixCache(2)
    cache.insert([1, 2, 3, 4], [0, 1, 2, 3])
    cache.insert([1, 2, 5, 6], [0, 1, 4, 5])
    cache.lock(cache.match([1, 2, 5, 6]).node)
    (top,) = tree(cache)
    assert (top["tokens"], top["locks"]) == (2, 1)
    assert [(child["tokens"], child["locks"]) for child in top["children"]] == [(2, 0), (2, 1)]


def test_a_node_is_traced_with_its_hits_and_its_last_use():
    cache = RadixCache(1)
    cache.insert([1, 2, 3], [0, 1, 2])
    for _ in range(2):
        cache.match([1, 2, 3])
    (node,) = (node for node in cache.nodes() if len(node))
    (top,) = tree(cache)
    assert top == {
        "tokens": 3,
        "locks": 0,
        "hits": node.hits,
        "used": node.used,
        "children": [],
    }
    assert top["hits"] == 2


def test_the_columns_of_a_trace_are_those_of_its_steps():
    asked = [programs.Request(range(100 * i, 100 * i + 8), 20, request_id=i) for i in range(4)]
    scheduler, trace, taken, run = traced(None, asked, blocks=10)
    columns = trace.occupancy()
    assert columns["time"] == [step.end for step in taken] == trace.blocks()["times"]
    assert columns["running"] == [len(step.plan.items) for step in taken]
    assert columns["waiting"] == [step.plan.waiting for step in taken]
    assert columns["used"] == [step.used for step in taken]
    assert columns["allocated"] == [step.allocated for step in taken]
    assert sum(columns["preempted"]) == run.preemptions > 0
    assert trace.blocks()["requests"] == ["0", "1", "2", "3"]
    assert scheduler.memory.allocated == 0


@pytest.mark.parametrize("blocks", [0, 3])
def test_block_tables_are_traced_for_as_many_steps_as_were_asked_for(blocks):
    scheduler = factory.make("fcfs", BlockPool(8, 4))
    trace = Trace(scheduler, blocks=blocks) if blocks else Trace(scheduler)
    request = programs.Request(range(6), 5, request_id="a")
    Simulator(scheduler, UnitClock(), jumps=False, on_step=trace).run([request])
    assert len(trace.owners) == len(trace.times) == blocks
    assert len(trace.steps["time"]) == 5


def test_memory_without_blocks_cannot_trace_them():
    scheduler = factory.make("orca-max", BlockPool(64, 1), longest=16)
    with pytest.raises(ValueError, match="only paged memory"):
        Simulator(scheduler, UnitClock(), on_step=Trace(scheduler, blocks=1)).run(
            [programs.Request([1, 2], 2)]
        )
