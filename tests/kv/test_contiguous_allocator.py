"""Contiguous slot ranges against a set of slots: first fit and the buddy system never allocate a
slot twice, and lose none.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from machines import run
from refllm.kv.contiguous_allocator import BuddyAllocator, FirstFitAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """The model: which slots are allocated. An allocation fails exactly where no hole is large
    enough.
    """

    kind: ClassVar[Any] = FirstFitAllocator
    seen: ClassVar[Counter[str]] = Counter()

    @initialize(slots=st.integers(1, 70))
    def begin(self, slots: int) -> None:
        self.allocator = self.kind(slots)
        self.allocated: dict[int, range] = {}

    def holes(self) -> list[range]:
        """Maximal free ranges; for buddies, the aligned powers of two within the slots that
        are entirely free.
        """
        used = {slot for some in self.allocated.values() for slot in some}
        free = [slot not in used for slot in range(self.allocator.slots)]
        if self.kind is BuddyAllocator:
            sizes = [1 << k for k in range(self.allocator.slots.bit_length())]
            return [
                range(s, s + n)
                for n in sizes
                for s in range(0, self.allocator.slots - n + 1, n)
                if all(free[s : s + n])
            ]
        edges = [
            i
            for i in range(len(free) + 1)
            if (i < len(free) and free[i]) != (i > 0 and free[i - 1])
        ]
        return [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]

    @staticmethod
    def parent(hole: range) -> range:
        """The range that a buddy range and its buddy make together."""
        size = 2 * len(hole)
        start = hole.start // size * size
        return range(start, start + size)

    @rule(size=st.integers(1, 24))
    def allocate(self, size: int) -> None:
        wanted = 1 << (size - 1).bit_length() if self.kind is BuddyAllocator else size
        fitting = [hole for hole in self.holes() if len(hole) >= wanted]
        start = self.allocator.allocate(size)
        if not fitting:
            assert start is None
            self.seen["full"] += 1
            self.seen["fragmented"] += (
                sum(map(len, self.holes())) >= wanted and self.kind is FirstFitAllocator
            )
            return
        assert start is not None
        if self.kind is FirstFitAllocator:
            assert start == fitting[0].start
        else:
            self.seen["rounded"] += wanted > size
            # of the smallest ranges that are large enough, which no free buddy enlarges, the
            # lowest
            ranges = [hole for hole in fitting if self.parent(hole) not in fitting]
            chosen = min(ranges, key=lambda hole: (len(hole), hole.start))
            assert start == chosen.start
            self.seen["another"] += any(len(hole) == len(chosen) for hole in ranges[1:])
        assert self.allocator.size(start) == wanted
        self.allocated[start] = range(start, start + wanted)

    @precondition(lambda self: self.allocated)
    @rule(seed=st.integers(0, 10**6))
    def free(self, seed: int) -> None:
        start = random.Random(seed).choice(sorted(self.allocated))
        self.allocator.free(start)
        del self.allocated[start]
        with pytest.raises(ValueError, match="no range begins"):
            self.allocator.free(start)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "allocator"):
            return
        self.allocator.check()
        slots = [slot for some in self.allocated.values() for slot in some]
        assert len(slots) == len(set(slots)) == self.allocator.used
        assert all(0 <= slot < self.allocator.slots for slot in slots)

    def teardown(self) -> None:
        if hasattr(self, "allocator"):
            for start in list(self.allocated):
                self.allocator.free(start)
            assert self.allocator.allocate(self.allocator.largest) is not None, (
                "freed ranges are merged again"
            )


@pytest.mark.parametrize("kind", [FirstFitAllocator, BuddyAllocator])
def test_state_machine_ranges_are_a_set_of_slots(kind):
    see = {"full", "fragmented"} if kind is FirstFitAllocator else {"full", "rounded", "another"}
    run(type(kind.__name__, (AllocatorMachine,), {"kind": kind}), examples=40, steps=40, see=see)


def test_a_buddy_allocates_the_lowest_of_the_smallest_ranges_in_whatever_order_they_were_freed():
    buddies = BuddyAllocator(16)
    assert [buddies.allocate(2) for _ in range(8)] == [0, 2, 4, 6, 8, 10, 12, 14]
    for start in (12, 4, 8):  # their buddies are allocated, so none is merged
        buddies.free(start)
    assert [buddies.allocate(size) for size in (1, 2, 1, 2, 2)] == [4, 8, 5, 12, None]


@given(size=st.integers(1, 1000))
def test_bound_a_buddy_wastes_less_than_half_of_a_range(size):
    buddies = BuddyAllocator(1024)
    start = buddies.allocate(size)
    assert size <= buddies.size(start) < 2 * size


def test_a_size_that_is_no_power_of_two_has_several_top_ranges():
    buddies = BuddyAllocator(15_700)
    assert buddies.largest == 8192
    assert buddies.allocate(8193) is None
    sizes = []
    while (
        start := next((buddies.allocate(s) for s in (8192, 4096, 2048, 1024, 256, 64, 16, 4)), None)
    ) is not None:
        sizes.append(buddies.size(start))
    assert sizes[0] == 8192


@pytest.mark.parametrize("kind", [FirstFitAllocator, BuddyAllocator])
def test_bad_calls_are_rejected(kind):
    with pytest.raises(ValueError, match="at least one slot"):
        kind(0)
    assert [(one := kind(1)).allocate(1), one.allocate(1), one.largest] == [0, None, 1]
    allocator = kind(8)
    with pytest.raises(ValueError, match="at least one slot"):
        allocator.allocate(0)
    with pytest.raises(ValueError, match="no range begins at slot 3"):
        allocator.size(3)
