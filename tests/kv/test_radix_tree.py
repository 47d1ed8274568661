"""The radix cache against a dictionary of prefixes, its eviction orders, and what splitting
must not change.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from machines import run
from refllm.kv.radix_node import POLICIES, Match
from refllm.kv.radix_tree import RadixCache

texts = st.lists(st.integers(0, 2), max_size=9)
salts = st.sampled_from([None, "tenant"])


class RadixMachine(RuleBasedStateMachine):
    """The model: a dictionary from (salt, prefix to the end of the page, position of the
    token) to its slot.
    """

    seen: ClassVar[Counter[str]] = Counter()

    @initialize(page=st.integers(1, 3), policy=st.sampled_from(sorted(POLICIES)))
    def begin(self, page: int, policy: str) -> None:
        self.cache = RadixCache(page, policy, on_evict=self.forget)
        self.slot_of: dict[tuple[Any, tuple[int, ...], int], int] = {}
        self.handles: list[tuple[Any, tuple[int, ...], Match]] = []
        self.next_slot = 0
        self.gone: list[int] = []

    def forget(self, slots: list[int]) -> None:
        self.gone += slots

    def cached(self, salt: Any, tokens: list[int]) -> list[int]:
        """The slots of the longest cached prefix in whole pages, by brute force."""
        slots: list[int] = []
        for name in self.names(salt, tokens):
            if name not in self.slot_of:
                break
            slots.append(self.slot_of[name])
        return slots

    def names(
        self, salt: Any, tokens: list[int] | tuple[int, ...]
    ) -> list[tuple[Any, tuple[int, ...], int]]:
        """The dictionary's key of every token of the whole pages: its page may differ after
        it.
        """
        page = self.cache.page_size
        return [
            (salt, tuple(tokens[: (i // page + 1) * page]), i)
            for i in range(len(tokens) // page * page)
        ]

    @rule(tokens=texts, salt=salts)
    def insert(self, tokens: list[int], salt: Any) -> None:
        known = self.cached(salt, tokens)
        slots = list(range(self.next_slot, self.next_slot + len(tokens)))
        self.next_slot += len(tokens)
        assert self.cache.insert(tokens, slots, salt=salt) == len(known)
        for name, slot in list(zip(self.names(salt, tokens), slots, strict=False))[len(known) :]:
            self.slot_of[name] = slot

    @rule(tokens=texts, salt=salts, keep=st.booleans())
    def match(self, tokens: list[int], salt: Any, keep: bool) -> None:
        splits = self.cache.splits
        found = self.cache.match(tokens, salt=salt)
        assert found.slots == self.cached(salt, tokens)
        assert len(found) == len(found.slots)
        # a second match ends at the same node
        assert self.cache.match(tokens, salt=salt).node is found.node
        self.seen["split"] += self.cache.splits - splits
        if keep:
            self.cache.lock(found.node)
            self.handles.append((salt, tuple(tokens[: len(found)]), found))

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        _, _, found = self.handles.pop(data.draw(st.integers(0, len(self.handles) - 1)))
        self.cache.unlock(found.node)

    @rule(count=st.integers(0, 12))
    def evict(self, count: int) -> None:
        before = len(self.slot_of)
        free = self.cache.evictable
        total = self.cache.evicted
        self.gone.clear()
        freed = self.cache.evict(count)
        assert freed == len(self.gone)
        assert freed >= min(count, free)  # as much as was asked for, or everything evictable
        assert freed <= free
        assert self.cache.evicted == total + freed
        self.slot_of = {k: s for k, s in self.slot_of.items() if s not in set(self.gone)}
        assert before - len(self.slot_of) == freed
        self.seen["evicted"] += freed
        if freed < count:
            self.seen["locked out"] += 1

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        assert sorted(s for node in self.cache.nodes() for s in node.slots) == sorted(
            self.slot_of.values()
        )
        locked = {name for salt, tokens, _ in self.handles for name in self.names(salt, tokens)}
        assert self.cache.protected == len(locked)
        # a handle stays valid through every split and eviction
        for salt, tokens, found in self.handles:
            assert self.cached(salt, list(tokens)) == found.slots
            assert spelled(found) == tokens

    def teardown(self) -> None:
        for _, _, found in getattr(self, "handles", []):
            self.cache.unlock(found.node)
        if hasattr(self, "cache"):
            assert self.cache.evictable == len(self.slot_of)
            assert self.cache.evict(len(self.slot_of)) == len(self.slot_of)
            assert not list(self.cache.nodes()), "unlocked, and nothing can make it go"


def spelled(found: Match) -> tuple[int, ...]:
    """The tokens on the path from the root to a node."""
    key: tuple[int, ...] = ()
    node = found.node
    while node is not None:
        key = node.key + key
        node = node.parent
    return key


@pytest.mark.theorem(
    "A radix tree matches what a dictionary of all prefixes matches; locked prefixes survive "
    "every eviction",
    source="Zheng et al. 2024, section 3",
)
def test_state_machine_the_cache_is_a_dictionary_of_prefixes():
    run(RadixMachine, examples=80, steps=40, see={"split", "evicted", "locked out"})


@given(first=texts, second=texts, probe=texts)
def test_invariance_a_split_changes_no_match(first, second, probe):
    whole = RadixCache()
    cut = RadixCache()
    for cache in (whole, cut):
        cache.insert(first, list(range(len(first))))
        cache.insert(second, list(range(100, 100 + len(second))))
    for end in range(len(first)):
        cut.match(first[:end])  # splits wherever it ends within a node
    assert cut.match(probe).slots == whole.match(probe).slots


def test_a_partial_match_uses_the_upper_part_alone():
    cache = RadixCache()
    cache.insert([1, 2, 3, 4], [0, 1, 2, 3])
    upper = cache.match([1, 2, 9]).node
    (lower,) = upper.children.values()
    assert (upper.key, lower.key) == ((1, 2), (3, 4))
    assert upper.used > lower.used
    assert (upper.hits, lower.hits) == (1, 0)


# What each policy evicts first: three leaves a, b, c inserted in this order, then b found
# three times, a found once.
@pytest.mark.parametrize(
    ("policy", "first"),
    [
        ("lru", "c"),
        ("lfu", "c"),
        ("fifo", "a"),
        ("mru", "a"),
        ("filo", "c"),
        ("slru", "c"),
        ("priority", "b"),
    ],
)
def test_each_policy_evicts_in_its_order(policy, first):
    gone: list[int] = []
    cache = RadixCache(policy=policy, on_evict=gone.extend)
    for slot, priority in enumerate((5, 1, 3)):
        cache.insert([slot], [slot], priority=priority)
    for slot in (1, 1, 1, 0):
        cache.match([slot])
    cache.evict(1)
    assert gone == ["abc".index(first)]


def test_both_parts_of_a_node_that_is_split_have_its_whole_history():
    cache = RadixCache()
    cache.insert([1, 2, 3, 4], [0, 1, 2, 3], priority=5)
    for _ in range(3):
        cache.match([1, 2, 3, 4])
    (whole,) = cache.nodes()
    history = (whole.created, whole.used, whole.hits, whole.priority)
    upper = cache.match([1, 2], record=False).node
    assert upper is not whole
    for part in (upper, whole):
        assert (part.created, part.used, part.hits, part.priority) == history


def test_inserting_again_counts_as_use_and_never_lowers_the_priority():
    cache = RadixCache()
    gone = []
    cache.on_evict = gone.extend
    cache.insert([0], [0], priority=5)
    cache.insert([1], [1])
    cache.insert([0], [2], priority=1)
    assert {node.key: node.priority for node in cache.nodes()} == {(0,): 5, (1,): 0}
    cache.insert([1], [3], priority=9)
    assert {node.key: node.priority for node in cache.nodes()} == {(0,): 5, (1,): 9}
    cache.insert([0], [4])
    cache.evict(1)
    assert gone == [1]  # the least recently inserted


def test_the_segmented_order_keeps_nodes_found_twice_over_those_used_last():
    gone: list[int] = []
    cache = RadixCache(policy="slru", on_evict=gone.extend)
    cache.insert([0], [0])
    cache.insert([1], [1])
    for slot in (0, 0, 1):
        cache.match([slot])
    cache.evict(1)
    assert gone == [1]


def test_both_parts_of_a_locked_node_that_is_split_stay_locked():
    """A handle is to the lower part; each of its locks holds the upper part too."""
    gone: list[int] = []
    cache = RadixCache(on_evict=gone.extend)
    cache.insert([1, 2, 3, 4], [0, 1, 2, 3])
    handle = cache.match([1, 2, 3, 4]).node
    cache.lock(handle)
    cache.lock(handle)
    cache.insert([1, 2, 9], [4, 5, 6])
    assert (cache.splits, handle.key, handle.locks) == (1, (3, 4), 2)
    upper = handle.parent
    assert (upper.key, upper.locks) == ((1, 2), 2)
    assert (cache.protected, cache.evictable) == (4, 1)
    assert cache.evict(5) == 1
    assert gone == [6]
    cache.unlock(handle)
    assert (cache.evict(5), cache.protected) == (0, 4)
    cache.unlock(handle)
    cache.check()
    assert (cache.evict(5), cache.protected, cache.evictable) == (4, 0, 0)
    assert gone == [6, 2, 3, 0, 1]


def test_a_split_by_a_match_keeps_the_locks_of_the_handle_below():
    cache = RadixCache()
    cache.insert([1, 2, 3], [0, 1, 2])
    lower = cache.match([1, 2, 3]).node
    cache.lock(lower)
    upper = cache.match([1]).node
    cache.lock(upper)
    assert (lower.locks, upper.locks, cache.protected) == (1, 2, 3)
    cache.unlock(lower)
    assert (lower.locks, upper.locks, cache.protected, cache.evictable) == (0, 1, 1, 2)
    assert cache.evict(9) == 2  # the lower part alone
    cache.unlock(upper)
    assert cache.evict(9) == 1


def test_tenants_do_not_see_each_other():
    cache = RadixCache()
    cache.insert([1, 2], [0, 1], salt="a")
    assert cache.match([1, 2], salt="b").slots == cache.match([1, 2]).slots == []
    assert cache.match([1, 2], salt="a").slots == [0, 1]


@pytest.mark.theorem(
    "A tree that holds no token is not kept: memory does not grow with the salts that were used",
    source="kv/radix_tree.py",
)
@given(
    steps=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=20),
    page=st.integers(1, 2),
)
def test_conservation_no_root_without_tokens(steps, page):
    cache = RadixCache(page)
    handles = []
    for number, (salt, keep, evict) in enumerate(steps):
        cache.match([salt], salt=("asked", number))  # in vain: leaves nothing
        cache.insert([1, 2], [2 * number, 2 * number + 1], salt=salt)
        if keep:  # of a tree that has tokens, or of none
            handles.append(cache.match([1, 2], salt=salt if number % 2 else ("none", number)).node)
            cache.lock(handles[-1])
        if handles and number % 3 == 0:
            cache.unlock(handles.pop(0))
        if evict:
            cache.evict(cache.evictable)
        cache.check()
        assert set(cache._roots) <= set(range(5))
    for node in handles:
        cache.unlock(node)
    cache.evict(cache.evictable)
    cache.check()
    assert not cache._roots
    assert not list(cache.nodes())


def test_matching_without_recording_changes_nothing():
    cache = RadixCache()
    cache.insert([1, 2, 3], [0, 1, 2])
    before = [(n.key, n.used, n.hits) for n in cache.nodes()]
    cache.match([1, 2, 3], record=False)
    assert [(n.key, n.used, n.hits) for n in cache.nodes()] == before
    assert (cache.queried, cache.hit) == (0, 0)
    cache.match([1, 2, 9])
    assert (cache.queried, cache.hit) == (3, 2)


def test_bad_calls_are_rejected():
    with pytest.raises(ValueError, match="at least one token"):
        RadixCache(0)
    with pytest.raises(ValueError, match="unknown policy 'oldest'; choose one of lru, "):
        RadixCache(policy="oldest")
    cache = RadixCache()
    with pytest.raises(ValueError, match="2 tokens need as many slots, got 1"):
        cache.insert([1, 2], [0])
    with pytest.raises(ValueError, match="one of the 2 slots occurs twice"):
        cache.insert([1, 2], [0, 0])
    with pytest.raises(ValueError, match="not locked"):
        cache.unlock(cache.match([]).node)
