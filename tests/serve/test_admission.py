"""Orders of admission: what each one guarantees, and the order that is optimal for a prefix
cache.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kv.block_pool import BlockPool
from refllm.serve.admission import FirstCome, LongestPrefix, Priority, order_named
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.plan import SampledTokens
from refllm.serve.prefix_caching import RadixKVManager
from refllm.serve.request import Request, Sequence
from refllm.serve.scheduler import Scheduler
from strategies import seeds

Text = tuple[int, ...]


def family(seed: int) -> list[Text]:
    """Texts of a random tree of prefixes, none a prefix of another, in a random order."""
    rng = random.Random(seed)
    fresh = iter(range(10_000))

    def grow(prefix: Text, depth: int) -> list[Text]:
        run = prefix + tuple(next(fresh) for _ in range(rng.randint(1, 5)))
        children = (
            [text for _ in range(rng.randint(2, 3)) for text in grow(run, depth - 1)]
            if depth
            else []
        )
        return children or [run]

    texts = [text for _ in range(rng.randint(1, 3)) for text in grow((), rng.randint(1, 3))]
    rng.shuffle(texts)
    return texts


def distinct_prefixes(texts: list[Text]) -> int:
    """The length of all edges of the tree: each must be computed once at least."""
    return len({text[: i + 1] for text in texts for i in range(len(text))})


def computed(texts: list[Text], order: str, capacity: int) -> int:
    """Tokens computed when the texts are served one at a time from a radix tree of
    ``capacity`` tokens.
    """
    scheduler = Scheduler(
        RadixKVManager(BlockPool(capacity, 1)), order=order, max_sequences=1, max_batch_tokens=None
    )
    for text in texts:
        scheduler.submit(Request(text, 1))
    while scheduler.unfinished:
        plan = scheduler.plan()
        scheduler.update(plan, [[SampledTokens([0])] for _ in plan.sampling])
    assert scheduler.computed == sum(map(len, texts)) - scheduler.cached
    return scheduler.computed


def depth_first(texts: list[Text]) -> list[Text]:
    """The texts by a depth-first walk; children in the order of their first text."""
    if len(texts) == 1:
        return texts
    at = next(i for i in range(min(map(len, texts))) if len({text[i] for text in texts}) > 1)
    heads = dict.fromkeys(text[at] for text in texts)
    return [text for head in heads for text in depth_first([t for t in texts if t[at] == head])]


@pytest.mark.theorem(
    "Offline, one at a time, page 1, no prompt a prefix of another, a cache of the longest "
    "request: depth-first order and longest prefix first compute every edge of the tree of "
    "prompts once, and nothing can compute less",
    source="Zheng et al. 2024, theorem 3.1",
)
@given(seed=seeds, more=st.integers(0, 3))
def test_bound_depth_first_and_longest_prefix_first_are_optimal(seed, more):
    texts = family(seed)
    capacity = max(map(len, texts)) + more
    optimum = distinct_prefixes(texts)
    assert computed(texts, "lpm", capacity) == optimum
    assert computed(depth_first(texts), "fcfs", capacity) == optimum
    assert computed(texts, "fcfs", capacity) >= optimum


def test_first_come_first_served_is_not_optimal():
    # the second evicts what the third would have found
    texts = [(1, 2, 3, 4), (5, 6, 7, 8), (1, 2, 3, 9)]
    assert distinct_prefixes(texts) == 9
    assert computed(texts, "lpm", 4) == 9
    assert computed(texts, "fcfs", 4) == 12


def sequence(order: int, prompt: Text = (1,), index: int = 0, **fields: object) -> Sequence:
    return Sequence(Request(prompt, **fields), index, order)  # type: ignore[arg-type]


def queue(order: object, sequences: list[Sequence]) -> list[int]:
    waiting: list[Sequence] = []
    memory = RadixKVManager(BlockPool(8, 1))
    for one in sequences:
        order.push(waiting, one)
    admitted = []
    for one in order.candidates(waiting, memory):
        waiting.remove(one)
        admitted.append(one.order)
    return admitted


def test_first_come_is_by_age_and_the_last_that_was_admitted_is_the_victim():
    sequences = [sequence(i) for i in (3, 1, 2)]
    assert queue(FirstCome(), sequences) == [1, 2, 3]
    assert FirstCome().victim(sequences) is sequences[-1]


def test_priority_is_lowest_first_then_arrival_then_age_and_the_victim_is_last_of_all():
    sequences = [
        sequence(0, priority=2),
        sequence(1, priority=1, arrival=5.0),
        sequence(2, priority=1, arrival=1.0),
        sequence(3, priority=1, arrival=1.0),
    ]
    assert queue(Priority(), sequences) == [2, 3, 1, 0]
    assert Priority().victim(sequences) is sequences[0]


def test_the_longest_cached_prefix_goes_first_and_ties_by_age():
    waiting = [
        sequence(0, (1, 2)),
        sequence(1, (5, 6, 7, 8)),
        sequence(2, (5, 6, 9)),
        sequence(3, (3,)),
    ]
    memory = RadixKVManager(BlockPool(8, 1))
    memory.cache.insert([5, 6, 7], [0, 1, 2])
    assert [b.order for b in LongestPrefix().candidates(list(waiting), memory)] == [1, 2, 0, 3]
    # too long to be sorted
    assert next(LongestPrefix(longest_queue=3).candidates(list(waiting), memory)).order == 0


def test_of_sequences_that_share_an_uncached_prefix_only_the_first_is_ready():
    waiting = [
        sequence(0, (1, 2, 3)),
        sequence(1, (1, 2, 4)),
        sequence(2, (9,)),
        sequence(3, (1, 2, 5), salt="other"),
    ]
    memory = RadixKVManager(BlockPool(8, 1))
    order = LongestPrefix(shared=2)
    assert [b.order for b in order.candidates(list(waiting), memory)] == [0, 2, 3]
    # with exactly the two cached, sharing saves nothing yet: still one at a time
    memory.cache.insert([1, 2], [0, 1])
    assert [b.order for b in order.candidates(list(waiting), memory)] == [0, 2, 3]
    # now more than the two are cached for the first alone
    memory.cache.insert([1, 2, 3], [0, 1, 2])
    assert next(order.candidates(list(waiting), memory)).order == 0


def test_the_in_batch_rule_lets_equal_prompts_through_that_are_shorter_than_a_shared_prefix():
    waiting = [sequence(0, (1, 2)), sequence(1, (1, 2)), sequence(2, (1, 2))]
    memory = RadixKVManager(BlockPool(8, 1))
    order = LongestPrefix(shared=3)
    assert [b.order for b in order.candidates(list(waiting), memory)] == [0, 1, 2]


def test_a_queue_of_exactly_longest_queue_is_still_sorted_by_prefix():
    waiting = [sequence(0, (1, 2)), sequence(1, (5, 6, 7, 8))]
    memory = RadixKVManager(BlockPool(8, 1))
    memory.cache.insert([5, 6, 7], [0, 1, 2])
    assert next(LongestPrefix(longest_queue=2).candidates(list(waiting), memory)).order == 1
    assert next(LongestPrefix(longest_queue=1).candidates(list(waiting), memory)).order == 0
    assert next(LongestPrefix(longest_queue=0).candidates(list(waiting), memory)).order == 0


def test_the_victim_of_longest_prefix_is_the_last_that_was_admitted():
    running = [sequence(2), sequence(0), sequence(1)]
    assert LongestPrefix().victim(running) is running[-1]


@pytest.mark.theorem(
    "The in-batch rule computes a shared prefix once where first come first served computes it "
    "for every sequence",
    source="SGLang's schedule policy",
)
def test_the_in_batch_rule_computes_a_shared_prefix_once():
    def run(order: object) -> int:
        scheduler = Scheduler(RadixKVManager(BlockPool(400, 4)), order=order, max_batch_tokens=512)
        for i in range(6):
            scheduler.submit(Request([*range(40), 100 + i], 2))
        while scheduler.unfinished:
            plan = scheduler.plan()
            scheduler.update(plan, [[SampledTokens([0])] for _ in plan.sampling])
        return scheduler.cached

    assert run("fcfs") == 0  # all are admitted before anything is cached
    assert run("lpm") == 5 * 40


def test_an_order_is_found_by_its_name():
    order = LongestPrefix()
    assert order_named(order) is order
    assert isinstance(order_named("lpm"), LongestPrefix)
    with pytest.raises(ValueError, match="unknown order 'best'; choose one of fcfs, priority, lpm"):
        order_named("best")
    for bad in ({"shared": 0}, {"longest_queue": -1}):
        with pytest.raises(ValueError, match="1 or more"):
            LongestPrefix(**bad)


# --- nobody starves -------------------------------------------------------------------------


@pytest.mark.theorem(
    "Under longest prefix match at most `patience` of the requests that were submitted after a "
    "request are admitted before it, whatever the cache holds",
    source="serve/admission.py",
)
@given(seed=seeds, patience=st.integers(0, 5), shared=st.integers(1, 4))
def test_no_request_is_overtaken_by_more_than_patience_later_ones(seed, patience, shared):
    rng = random.Random(seed)
    order = LongestPrefix(shared=shared, patience=patience)
    scheduler = Scheduler(
        RadixKVManager(BlockPool(40, 1)), order=order, max_sequences=rng.choice([1, 2])
    )
    heads = [tuple(range(i, i + 4)) for i in (0, 10, 20)]
    admitted: list[int] = []
    submitted = 0
    while submitted < 14 or scheduler.unfinished:
        for _ in range(rng.choice([0, 1, 1, 3])):
            if submitted < 14:
                head = heads[0] if rng.random() < 0.8 else rng.choice(heads)
                text = (*head[: rng.randint(1, 4)], 100 + submitted)
                scheduler.submit(Request(text, rng.randint(1, 3), request_id=submitted))
                submitted += 1
        if scheduler.unfinished:
            plan = scheduler.plan()
            admitted += [name for name, _ in plan.admitted if name not in admitted]
            scheduler.update(plan, [[SampledTokens([0])] for _ in plan.sampling])
            scheduler.check()
    for name in range(14):
        overtaking = [other for other in admitted[: admitted.index(name)] if other > name]
        assert len(overtaking) <= patience


def test_without_patience_left_the_prefix_decides():
    """The control: with more patience a request that shares nothing waits for all that share."""
    for patience, place in ((0, 1), (4, 1), (5, 6), (99, 6)):
        order = LongestPrefix(patience=patience)
        scheduler = Scheduler(RadixKVManager(BlockPool(60, 1)), order=order, max_sequences=1)
        scheduler.submit(Request(range(9), 1, request_id="first"))
        plan = scheduler.plan()
        scheduler.update(plan, [[SampledTokens([0])]])
        admitted = ["first"]
        scheduler.submit(Request([50, 51], 1, request_id="alone"))
        for i in range(5):
            scheduler.submit(Request([*range(8), 20 + i], 1, request_id=i))
        while scheduler.unfinished:
            plan = scheduler.plan()
            admitted += [name for name, _ in plan.admitted]
            scheduler.update(plan, [[SampledTokens([0])] for _ in plan.sampling])
        # five later ones are in the queue
        assert admitted.index("alone") == place, patience


# --- a more urgent request takes the place of a less urgent one -----------------------------


def urgent_scheduler(**limits: object) -> Scheduler:
    return Scheduler(PagedKVManager(BlockPool(6, 2)), order="priority", **limits)


def step(scheduler: Scheduler) -> Any:
    plan = scheduler.plan()
    plan.check()
    scheduler.update(plan, [[SampledTokens([0])] for _ in plan.sampling])
    scheduler.check()
    return plan


@pytest.mark.parametrize(
    "limits", [{}, {"max_sequences": 1}, {"max_batch_tokens": 4}], ids=["blocks", "slots", "budget"]
)
def test_a_more_urgent_request_preempts_a_less_urgent_one_at_once(limits):
    """Whether blocks, sequence slots or the token budget is what the idle one holds."""
    scheduler = urgent_scheduler(**limits)
    scheduler.submit(Request(range(8), 4, request_id="idle", priority=5))
    step(scheduler)
    scheduler.submit(Request(range(20, 28), 3, request_id="urgent", priority=1))
    plan = step(scheduler)
    assert plan.preempted == [("idle", 0)]
    assert plan.admitted == [("urgent", 0)]
    assert [item.key for item in plan.items] == [("urgent", 0)]
    finished = []
    while scheduler.unfinished:
        plan = scheduler.plan()
        plan.check()
        updates = scheduler.update(plan, [[SampledTokens([0])] for _ in plan.sampling])
        finished += [u.request_id for u in updates if u.finish_reason]
        scheduler.check()
    assert finished == ["urgent", "idle"]
    assert scheduler.preemptions == 1


def test_an_equally_urgent_request_waits_however_early_it_arrived():
    scheduler = urgent_scheduler()
    scheduler.submit(Request(range(8), 4, request_id="running", priority=1, arrival=9.0))
    step(scheduler)
    scheduler.submit(Request(range(20, 28), 3, request_id="same", priority=1, arrival=0.0))
    assert step(scheduler).preempted == []


def test_no_more_are_preempted_than_room_needs():
    scheduler = urgent_scheduler()
    for i, priority in enumerate((3, 9, 6)):
        scheduler.submit(Request([10 * i, 1, 2], 2, request_id=priority, priority=priority))
    step(scheduler)
    assert len(scheduler.running) == 3
    scheduler.submit(Request([90, 91, 92], 2, request_id=1, priority=1))
    plan = step(scheduler)
    assert [name for name, _ in plan.preempted] == [9]
    assert [name for name, _ in plan.admitted] == [1]


@given(seed=seeds)
def test_the_most_urgent_requests_are_served_first_and_all_are(seed):
    rng = random.Random(seed)
    scheduler = Scheduler(
        PagedKVManager(BlockPool(10, 2)),
        order="priority",
        max_sequences=rng.choice([2, 3, None]),
        max_batch_tokens=rng.choice([4, 9, None]),
    )
    urgency = {}
    for i in range(8):
        beam = rng.random() < 0.2
        urgency[i] = rng.randint(0, 3)
        scheduler.submit(
            Request([i, *range(rng.randint(1, 5))], rng.randint(1, 4), request_id=i,
                    priority=urgency[i], n=2 if beam else 1, beam=beam)
        )  # fmt: skip
        for _ in range(rng.choice([0, 1, 2])):
            plan = scheduler.plan()
            plan.check()
            for name, _ in plan.admitted:
                assert all(urgency[other] >= urgency[name] for other, _ in plan.preempted)
            scheduler.update(plan, [[SampledTokens([0])] for _ in plan.sampling])
            scheduler.check()
    for _ in range(300):
        if not scheduler.unfinished:
            break
        step(scheduler)
    assert not scheduler.unfinished
