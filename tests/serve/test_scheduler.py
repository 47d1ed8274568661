"""The scheduler against a model of memory and of every request's tokens: every plan can be
computed, and every request finishes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from machines import ShadowMemory, run
from refllm.kv.block_pool import BlockPool
from refllm.kv.radix_node import POLICIES
from refllm.serve import factory
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.plan import Outcome, Plan, SampledTokens, SequenceUpdate
from refllm.serve.prefix_caching import HashKVManager, RadixKVManager
from refllm.serve.request import Request, Sequence, SequenceStatus
from refllm.serve.scheduler import Scheduler
from strategies import seeds

ALL = {"rejected request", "rolled back", "aborted in a step"}
BLOCKS = ALL | {"preempted", "copied", "forked", "dropped", "accepted", "rejected", "chunked"}
SEEN = {
    None: BLOCKS,
    "hash": BLOCKS | {"cached", "resumed from the cache", "forgotten"},
    "radix": BLOCKS | {"cached", "resumed from the cache", "evicted", "splits"},
    "reserved": ALL,
}


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, fork, are aborted and preempted over a pool that is too small for
    them.

    Hypothesis chooses what happens, and a seed for the details: it draws seeds evenly, but
    not small integers.
    """

    kind: ClassVar[str | None] = None  # of memory
    seen: ClassVar[Counter[str]] = Counter()

    @initialize(seed=seeds)
    def begin(self, seed: int) -> None:
        rng = random.Random(seed)
        reserved = self.kind == "reserved"
        policy = rng.choice([p for p in factory.POLICIES if (p in factory.CONTINUOUS) != reserved])
        self.pool = BlockPool(rng.randint(1, 12), rng.randint(1, 4))
        self.scheduler = factory.make(
            policy,
            self.pool,
            prefix_cache=None if reserved else self.kind,
            max_batch_tokens=rng.choice([None, 1, 3, 8, 32]),
            max_sequences=rng.choice([None, 1, 3, 6]),
            chunked=rng.random() < 0.7,
            long_prefill=rng.choice([0, 0, 2]),
            watermark=rng.choice([0, 0, 0.2]),
            eviction=rng.choice(sorted(POLICIES)),
            longest=12,
            buddy=rng.random() < 0.5,
        )
        self.memory = ShadowMemory()
        # what each sequence should generate
        self.expected: dict[tuple[Hashable, int], list[int]] = {}
        self.names = 0

    @rule(seed=seeds)
    def submit(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(rng.randint(1, 3)):
            longest = rng.randint(0, 7)
            n = rng.choice([1, 1, 2, 3, 3])
            prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 8))]
            request = Request(
                prompt,
                longest,
                request_id=self.names,
                n=n,
                beam=rng.random() < 0.5,
                priority=rng.randint(0, 2),
                salt=rng.choice([None, None, "tenant"]),
            )
            before = list(self.scheduler.waiting)
            try:
                self.scheduler.submit(request)
            except ValueError:
                self.seen["rejected request"] += 1
                assert self.scheduler.waiting == before
                continue
            self.expected |= {(self.names, index): [] for index in range(1 if longest else n)}
            self.names += 1

    @rule(seed=seeds)
    def abort(self, seed: int) -> None:
        name = random.Random(seed).randint(-1, self.names)
        live = any(
            sequence.request.request_id == name
            for sequence in (*self.scheduler.running, *self.scheduler.waiting)
        )
        assert bool(self.scheduler.abort(name)) == live
        assert self.scheduler.abort(name) == []

    @precondition(lambda self: self.scheduler.running)
    @rule(seed=seeds)
    def propose(self, seed: int) -> None:
        rng = random.Random(seed)
        for sequence in self.scheduler.running:
            drafts = [rng.randint(0, 1) for _ in range(rng.randint(0, 4))]
            useful = self.scheduler.propose(sequence.key, drafts)
            assert useful <= min(len(drafts), sequence.remaining - 1)
            assert sequence.drafts == drafts[:useful] or not useful

    @rule(seed=seeds, fate=st.sampled_from(["goes well"] * 6 + ["fails", "aborted in it"]))
    def step(self, seed: int, fate: str) -> None:
        self.take(random.Random(seed), fate)

    @rule(seed=seeds, count=st.integers(2, 5))
    def steps(self, seed: int, count: int) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            self.take(rng, "goes well")
            self.scheduler.check()

    def take(self, rng: random.Random, fate: str) -> None:
        scheduler = self.scheduler
        busy = bool(scheduler.running or scheduler.waiting)
        kept = {
            sequence.key: list(sequence.tokens)
            for sequence in (*scheduler.running, *scheduler.waiting)
        }
        plan = scheduler.plan()
        plan.check()
        assert bool(plan.items) == busy, (
            "a step computes a token as long as any request is unfinished"
        )
        self.look(plan, kept)
        self.memory.execute(scheduler, plan)
        if fate == "fails":
            self.seen["rolled back"] += 1
            scheduler.roll_back(plan)
            return
        outcomes = self.outcomes(plan, rng)
        if fate == "aborted in it" and scheduler.running:
            self.seen["aborted in a step"] += 1
            scheduler.abort(rng.choice(scheduler.running).request.request_id)
        before = {key: list(text) for key, text in self.expected.items()}
        self.follow(scheduler.update(plan, outcomes), before)

    def look(self, plan: Plan, kept: dict[Any, list[int]]) -> None:
        """What a plan guarantees beyond ``Plan.check``."""
        sequences = {
            sequence.key: sequence
            for sequence in (*self.scheduler.running, *self.scheduler.waiting)
        }
        for item in plan.items:
            sequence = sequences[item.key]
            assert sequence.computed == item.start
            ahead = item.start + item.count - len(sequence.tokens)
            assert item.samples == (0 if ahead < 0 else 1 + len(sequence.drafts)), (
                "an unfinished prompt is not sampled"
            )
            self.seen["chunked"] += ahead < 0
            if sequence.request.beam and item.samples:  # all beams of a search in one step, or none
                group = [b for b in sequences.values() if b.request is sequence.request]
                assert {b.key for b in group} <= {other.key for other in plan.sampling}
        for name in plan.preempted:
            sequence = sequences[name]
            assert (sequence.tokens, sequence.computed, sequence.drafts) == (kept[name], 0, []), (
                "its tokens, not their memory"
            )
            assert sequence.status is SequenceStatus.WAITING
        self.seen["preempted"] += len(plan.preempted)

    def outcomes(self, plan: Plan, rng: random.Random) -> list[Outcome]:
        """Some drafts accepted, sequences forked and dropped, some that end."""
        sequences = {sequence.key: sequence for sequence in self.scheduler.running}
        live = Counter(sequence.request.request_id for sequence in sequences.values())
        outcomes: list[Outcome] = []
        for item in plan.sampling:
            sequence = sequences[item.key]
            accepted = rng.randint(0, len(sequence.drafts))
            self.seen["accepted"] += accepted
            self.seen["rejected"] += len(sequence.drafts) - accepted
            ways = sequence.slots
            if sequence.request.beam:
                free = sequence.request.n - live[item.key[0]]
                ways = rng.randint(live[item.key[0]] == 1, 1 + free)
                live[item.key[0]] += ways - 1
            tokens = [[*sequence.drafts[:accepted], rng.randint(0, 1)]] + [
                [rng.randint(0, 1)] for _ in range(1, ways)
            ]
            outcomes.append(
                [
                    SampledTokens(new, "stop" if rng.random() < 0.03 else None)
                    for new in tokens[:ways]
                ]
            )
        return outcomes

    def follow(self, updates: list[SequenceUpdate], before: dict[Any, list[int]]) -> None:
        """The sequences have the tokens of their outcomes, no more than they may, and end when
        they must.
        """
        for update in updates:
            sequence, tokens, reason = update.sequence, update.tokens, update.finish_reason
            if sequence.key not in self.expected:
                parents = [text for key, text in before.items() if key[0] == sequence.key[0]]
                assert sequence.output[:-1] in parents
                self.expected[sequence.key] = sequence.output[:-1]
                self.seen["forked"] += 1
            self.expected[sequence.key] += tokens
            assert sequence.output == self.expected[sequence.key]
            assert (sequence.remaining == 0) <= (reason is not None), (
                "it has all its tokens and continues"
            )
            assert reason != "length" or sequence.remaining == 0
            self.seen["dropped"] += reason == "dropped"

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            assert sequence.output == self.expected[sequence.key]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        rng = random.Random(0)
        steps = 0
        while scheduler.unfinished:
            self.take(rng, "goes well")
            scheduler.check()
            steps += 1
            assert steps < 3000, "a request never finishes"
        assert not scheduler.running
        assert not scheduler.waiting
        assert scheduler.memory.allocated == 0
        self.seen["copied"] += self.memory.seen["copied"]
        self.seen["cached"] += scheduler.cached
        self.seen["resumed from the cache"] += scheduler.resumed_cached
        self.seen["forgotten"] += self.pool.forgotten
        if isinstance(scheduler.memory, RadixKVManager):
            cache = scheduler.memory.cache
            self.seen["evicted"] += cache.evicted
            self.seen["splits"] += cache.splits
            cache.evict(cache.evictable)
        assert self.pool.num_free == self.pool.num_blocks, "a block has leaked"


@pytest.mark.theorem(
    "Whatever is submitted, forked, aborted or preempted: every step computes a token, every "
    "request finishes, each sequence reads the keys of its own tokens alone, and no block leaks",
    source="Kwon et al. 2023, sections 4.3 to 4.5; Yu et al. 2022",
)
@pytest.mark.parametrize("kind", SEEN)
def test_state_machine_the_scheduler_over_every_memory(kind):
    run(
        type(f"Scheduler over {kind}", (SchedulerMachine,), {"kind": kind}),
        examples=25,
        see=SEEN[kind],
    )


# --- by hand ------------------------------------------------------------------------------


def served(scheduler: Scheduler, plans: list[Plan] | None = None) -> list[SequenceUpdate]:
    """Run until all requests have finished, every token 7; returns the updates in order."""
    updates: list[SequenceUpdate] = []
    while scheduler.unfinished:
        plan = scheduler.plan()
        plan.check()
        if plans is not None:
            plans.append(plan)
        updates += scheduler.update(plan, [[SampledTokens([7])] for _ in plan.sampling])
        scheduler.check()
    return updates


def paged(blocks: int, size: int = 4, **options: Any) -> Scheduler:
    return Scheduler(PagedKVManager(BlockPool(blocks, size)), **options)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    blocks=st.integers(12, 40),
    budget=st.integers(1, 16),
    chunked=st.booleans(),
    slots=st.integers(1, 5),
)
def test_invariance_first_come_first_served_gives_first_tokens_in_the_order_of_arrival(
    lengths, blocks, budget, chunked, slots
):
    scheduler = paged(
        blocks, 1, max_batch_tokens=max(budget, 12), chunked=chunked, max_sequences=slots
    )
    for length in lengths:
        scheduler.submit(Request(range(length), 1))
    updates = served(scheduler)
    assert (
        scheduler.preemptions == 0
    )  # a prompt of at most 12 tokens and no output: no sequence grows
    assert [update.sequence.order for update in updates] == sorted(
        update.sequence.order for update in updates
    )


def test_decodes_go_first_and_prompts_share_what_is_left():
    scheduler = paged(40, max_batch_tokens=8)
    plans = []
    scheduler.submit(Request(range(4), 6, request_id="streams"))
    updates = scheduler.update(scheduler.plan(), [[SampledTokens([7])]])
    scheduler.submit(Request(range(20), 1, request_id="long"))
    updates += served(scheduler, plans)
    assert [[(item.key[0], item.count, item.samples) for item in plan.items] for plan in plans] == [
        [("streams", 1, 1), ("long", 7, 0)],
        [("streams", 1, 1), ("long", 7, 0)],
        [("streams", 1, 1), ("long", 6, 1)],
        [("streams", 1, 1)],
        [("streams", 1, 1)],
    ]


def test_a_long_prompt_is_cut_to_long_prefill_and_leaves_the_rest_of_the_budget():
    scheduler = paged(40, max_batch_tokens=16, long_prefill=5)
    plans = []
    scheduler.submit(Request(range(12), 1, request_id="long"))
    scheduler.submit(Request(range(4), 1, request_id="short"))
    served(scheduler, plans)
    assert [[(item.key[0], item.count, item.samples) for item in plan.items] for plan in plans] == [
        [("long", 5, 0), ("short", 4, 1)],
        [("long", 5, 0)],
        [("long", 2, 1)],
    ]


def test_without_chunks_a_prompt_is_computed_in_one_step_or_waits():
    scheduler = paged(40, max_batch_tokens=8, chunked=False)
    plans = []
    for name, length in (("first", 5), ("second", 5), ("third", 3)):
        scheduler.submit(Request(range(length), 1, request_id=name))
    served(scheduler, plans)
    # the second would not fit whole, and no request overtakes it
    assert [[item.key[0] for item in plan.items] for plan in plans] == [
        ["first"],
        ["second", "third"],
    ]
    assert all(item.samples for plan in plans for item in plan.items)


def test_the_watermark_applies_to_admissions_beside_others_only():
    scheduler = Scheduler(PagedKVManager(BlockPool(4, 4), watermark=0.5))
    for name, length in (("all", 16), ("one", 4), ("two", 4), ("three", 4)):
        scheduler.submit(Request(range(length), 1, request_id=name))
    plans: list[Plan] = []
    served(scheduler, plans)
    assert [[name for name, _ in plan.admitted] for plan in plans] == [
        ["all"],
        ["one", "two"],
        ["three"],
    ]


def test_the_youngest_is_preempted_comes_back_first_and_keeps_its_tokens():
    scheduler = paged(4, 2)
    plans = []
    for name in ("old", "young", "last"):
        scheduler.submit(Request(range(3), 5, request_id=name))
    updates = served(scheduler, plans)
    assert [(plan.step, name[0]) for plan in plans for name in plan.preempted] == [(2, "young")]
    assert all(not (plan.preempted and plan.admitted) for plan in plans)
    again = next(plan for plan in plans[3:] if plan.admitted)
    assert again.admitted[0] == ("young", 0)
    assert again.items[0][1:3] == (0, 5)  # its prompt and the two tokens that it had
    generated = Counter(
        update.sequence.request.request_id for update in updates for _ in update.tokens
    )
    assert set(generated.values()) == {5}


def test_priority_preempts_the_least_urgent():
    scheduler = paged(4, 2, order="priority")
    scheduler.submit(Request(range(3), 5, request_id="urgent", priority=-1))
    scheduler.submit(Request(range(3), 5, request_id="idle", priority=9))
    plans: list[Plan] = []
    served(scheduler, plans)
    assert {name[0] for plan in plans for name in plan.preempted} == {"idle"}


def test_no_sequence_is_preempted_for_drafts():
    scheduler = paged(4, 2)
    for name in ("old", "young"):
        scheduler.submit(Request(range(3), 2, request_id=name))
    scheduler.update(scheduler.plan(), [[SampledTokens([7])]] * 2)
    # both have 4 tokens to keep in 2 blocks each: there is room for the token, and none for
    # drafts
    scheduler.running[0].request = Request(range(3), 9, request_id="old")
    assert scheduler.propose(("old", 0), [1, 2, 3]) == 3
    plan = scheduler.plan()
    assert not plan.preempted
    assert [item.samples for item in plan.items] == [1, 1]


def test_rejected_drafts_are_discarded():
    scheduler = paged(8, 2)
    scheduler.submit(Request(range(3), 9, request_id=0))
    scheduler.update(scheduler.plan(), [[SampledTokens([7])]])
    scheduler.propose((0, 0), [1, 2, 3, 4])
    plan = scheduler.plan()
    assert plan.items[0][1:3] == (3, 5)
    used = scheduler.memory.allocated
    scheduler.update(plan, [[SampledTokens([1, 9])]])
    (sequence,) = scheduler.running
    assert (sequence.tokens[3:], sequence.computed, sequence.drafts) == ([7, 1, 9], 5, [])
    assert scheduler.memory.allocated == used - 2
    scheduler.check()


def test_beams_are_preempted_together_and_ranked_together():
    scheduler = paged(12, 1)
    plans = []
    scheduler.submit(Request(range(2), 4, request_id="first"))
    scheduler.submit(Request(range(2), 4, request_id="beams", n=2, beam=True))
    scheduler.update(
        scheduler.plan(), [[SampledTokens([7])], [SampledTokens([7]), SampledTokens([8])]]
    )
    for _ in range(2):  # a third one joins, and then there is no room for the beams
        scheduler.submit(Request(range(4), 3))
    served(scheduler, plans)
    beaten = [plan.preempted for plan in plans if ("beams", 0) in plan.preempted]
    assert all(("beams", 1) in names for names in beaten)
    for plan in plans:
        sampled = {item.key for item in plan.sampling if item.key[0] == "beams"}
        assert len(sampled) in (0, 2)


def test_beams_that_come_back_whole_from_a_cache_advance_in_the_step_that_admits_them():
    scheduler = Scheduler(HashKVManager(BlockPool(12, 1)))
    scheduler.submit(Request(range(3), 4, request_id="beams", n=2, beam=True))
    scheduler.update(scheduler.plan(), [[SampledTokens([7]), SampledTokens([8])]])
    scheduler.roll_back(scheduler.plan())
    assert not scheduler.running
    plan = scheduler.plan()
    assert plan.admitted == [("beams", 0), ("beams", 1)]
    assert [(item.start, item.count, item.samples) for item in plan.items] == [(3, 1, 1)] * 2
    scheduler.update(plan, [[SampledTokens([9])]] * 2)
    scheduler.check()


@pytest.mark.parametrize(
    ("cap", "counts"), [(0, [7]), (1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (8, [7])]
)
def test_the_chunks_of_one_prompt_are_capped(cap, counts):
    scheduler = paged(4, long_prefill=cap)
    scheduler.submit(Request(range(7), 1))
    found = []
    while scheduler.unfinished:
        plan = scheduler.plan()
        found.append(plan.tokens)
        scheduler.update(plan, [[SampledTokens([7])] for _ in plan.sampling])
    assert found == counts


def test_a_watermark_does_not_part_the_beams_of_a_search():
    scheduler = Scheduler(PagedKVManager(BlockPool(10, 1), watermark=0.7))
    scheduler.submit(Request(range(4), 2, request_id="beams", n=2, beam=True))
    scheduler.update(scheduler.plan(), [[SampledTokens([7]), SampledTokens([8])]])
    scheduler.roll_back(scheduler.plan())
    # the first takes four of ten blocks: fewer than seven are left, but the second comes too
    plan = scheduler.plan()
    assert plan.admitted == [("beams", 0), ("beams", 1)]
    assert [(item.key[1], item.count) for item in plan.items] == [(0, 4)]
    scheduler.update(plan, [])
    scheduler.check()
    sampled = []
    while scheduler.unfinished:
        plan = scheduler.plan()
        sampled.append(len(plan.sampling))
        scheduler.update(plan, [[SampledTokens([9])] for _ in plan.sampling])
        scheduler.check()
    assert sampled == [0, 2]  # the rest of the second, then the last tokens of both
    assert scheduler.memory.allocated == 0


def test_every_preemption_is_counted_once():
    scheduler = paged(5)  # 20 slots for three requests of up to 12
    plans: list[Plan] = []
    ended: list[Sequence] = []
    for name in range(3):
        scheduler.submit(Request(range(4), 9, request_id=name))
    while scheduler.unfinished:
        plan = scheduler.plan()
        plans.append(plan)
        updates = scheduler.update(plan, [[SampledTokens([7])] for _ in plan.sampling])
        ended += [update.sequence for update in updates if update.finish_reason]
    preempted = Counter(name for plan in plans for name in plan.preempted)
    assert scheduler.preemptions == preempted.total() > 0
    assert {s.key: s.preemptions for s in ended if s.preemptions} == dict(preempted)
    assert scheduler.steps == len(plans)
    assert [plan.step for plan in plans] == list(range(len(plans)))
    assert scheduler.sampled == 27
    assert scheduler.computed == sum(plan.tokens for plan in plans)


def test_a_plan_is_updated_or_rolled_back_before_the_next():
    scheduler = paged(4)
    scheduler.submit(Request(range(3), 2))
    plan = scheduler.plan()
    with pytest.raises(RuntimeError, match="not completed"):
        scheduler.plan()
    with pytest.raises(RuntimeError, match="not the current plan"):
        scheduler.update(Plan(0, []), [])
    scheduler.roll_back(plan)
    assert scheduler.waiting[0].computed == 0
    assert len(served(scheduler)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_tokens": 0},
        {"max_sequences": 0},
        {"long_prefill": -1},
        {"order": "alphabetical"},
    ],
)
def test_limits_below_1_are_rejected(options):
    with pytest.raises(ValueError, match=next(iter(options)).replace("order", "unknown order")):
        paged(4, **options)


@pytest.mark.parametrize(
    ("request_", "options", "why"),
    [
        (Request(range(20), 1), {}, "pool has 16"),
        (Request(range(9), 9), {}, "17 tokens to keep"),
        (
            Request(range(9), 3),
            {"chunked": False, "max_batch_tokens": 8},
            "11 tokens to compute in one step",
        ),
        (Request(range(2), 2, n=3), {"max_sequences": 2}, "3 sequences"),
        (Request(range(2), 2, n=3, beam=True), {"max_batch_tokens": 2}, "3 beams"),
        (Request(range(4), 2, n=3, beam=True), {}, "needs 24 slots"),
    ],
)
def test_requests_that_can_never_be_served_are_rejected_without_any_change(request_, options, why):
    scheduler = paged(4, **options)
    scheduler.submit(Request(range(2), 2, request_id="other"))
    with pytest.raises(ValueError, match=why):
        scheduler.submit(request_)
    assert [update.tokens for update in served(scheduler)] == [[7], [7]]


@given(fits=st.integers(1, 8))
def test_degenerate_a_pool_of_one_block_serves_what_fits(fits):
    scheduler = paged(1, 8)
    for longest in (0, 1, 9 - fits, 10 - fits):
        request = Request(range(fits), longest, request_id=longest)
        if request.max_cached_tokens > 8:
            with pytest.raises(ValueError, match="pool has 8"):
                scheduler.submit(request)
        elif longest not in {b.request.request_id for b in scheduler.waiting}:
            scheduler.submit(request)
    served(scheduler)
    assert scheduler.memory.allocated == 0
