"""Contiguous runs against a set of slots: first fit and the buddy system never give a slot
twice, and lose none.
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
from refllm.kv.contiguous_allocator import Buddies, FirstFit


class RunsMachine(RuleBasedStateMachine):
    """The model: which slots are taken. An allocation fails exactly where no hole is large
    enough.
    """

    kind: ClassVar[Any] = FirstFit
    seen: ClassVar[Counter[str]] = Counter()

    @initialize(slots=st.integers(1, 70))
    def begin(self, slots: int) -> None:
        self.runs = self.kind(slots)
        self.given: dict[int, range] = {}

    def holes(self) -> list[range]:
        """Maximal free runs; of buddies, the aligned powers of two within the slots that
        are wholly free.
        """
        taken = {slot for some in self.given.values() for slot in some}
        free = [slot not in taken for slot in range(self.runs.slots)]
        if self.kind is Buddies:
            sizes = [1 << k for k in range(self.runs.slots.bit_length())]
            return [
                range(s, s + n)
                for n in sizes
                for s in range(0, self.runs.slots - n + 1, n)
                if all(free[s : s + n])
            ]
        edges = [
            i
            for i in range(len(free) + 1)
            if (i < len(free) and free[i]) != (i > 0 and free[i - 1])
        ]
        return [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]

    @rule(size=st.integers(1, 24))
    def allocate(self, size: int) -> None:
        wanted = 1 << (size - 1).bit_length() if self.kind is Buddies else size
        fitting = [hole for hole in self.holes() if len(hole) >= wanted]
        start = self.runs.allocate(size)
        if not fitting:
            assert start is None
            self.seen["full"] += 1
            self.seen["fragmented"] += (
                sum(map(len, self.holes())) >= wanted and self.kind is FirstFit
            )
            return
        assert start is not None
        if self.kind is FirstFit:
            assert start == fitting[0].start
        else:
            self.seen["rounded"] += wanted > size
        assert self.runs.size(start) == wanted
        self.given[start] = range(start, start + wanted)

    @precondition(lambda self: self.given)
    @rule(seed=st.integers(0, 10**6))
    def free(self, seed: int) -> None:
        start = random.Random(seed).choice(sorted(self.given))
        self.runs.free(start)
        del self.given[start]
        with pytest.raises(ValueError, match="no run begins"):
            self.runs.free(start)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "runs"):
            return
        self.runs.check()
        slots = [slot for some in self.given.values() for slot in some]
        assert len(slots) == len(set(slots)) == self.runs.used
        assert all(0 <= slot < self.runs.slots for slot in slots)

    def teardown(self) -> None:
        if hasattr(self, "runs"):
            for start in list(self.given):
                self.runs.free(start)
            assert self.runs.allocate(self.runs.largest) is not None, (
                "runs that were given back grow together again"
            )


@pytest.mark.parametrize("kind", [FirstFit, Buddies])
def test_state_machine_runs_are_a_set_of_slots(kind):
    see = {"full", "fragmented" if kind is FirstFit else "rounded"}
    run(type(kind.__name__, (RunsMachine,), {"kind": kind}), examples=40, steps=40, see=see)


@given(size=st.integers(1, 1000))
def test_bound_a_buddy_wastes_less_than_half_of_a_run(size):
    buddies = Buddies(1024)
    start = buddies.allocate(size)
    assert size <= buddies.size(start) < 2 * size


def test_a_number_that_is_no_power_of_two_is_a_row_of_buddies():
    buddies = Buddies(15_700)
    assert buddies.largest == 8192
    assert buddies.allocate(8193) is None
    sizes = []
    while (
        start := next((buddies.allocate(s) for s in (8192, 4096, 2048, 1024, 256, 64, 16, 4)), None)
    ) is not None:
        sizes.append(buddies.size(start))
    assert sizes[0] == 8192


@pytest.mark.parametrize("kind", [FirstFit, Buddies])
def test_bad_calls_are_refused(kind):
    with pytest.raises(ValueError, match="at least one slot"):
        kind(0)
    runs = kind(8)
    with pytest.raises(ValueError, match="at least one slot"):
        runs.allocate(0)
    with pytest.raises(ValueError, match="no run begins at slot 3"):
        runs.size(3)
