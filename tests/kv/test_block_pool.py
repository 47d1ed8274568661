"""The block pool and its tables against a brute-force model: owners, remembered keys,
contents of slots.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from machines import run
from refllm.kv.block_pool import NO_BLOCK, BlockPool, BlockTable, OutOfBlocks

# --- the pool -----------------------------------------------------------------------------


class PoolMachine(RuleBasedStateMachine):
    """The model: a multiset of owners, the order in which blocks became free, and a
    dictionary of keys.
    """

    seen: ClassVar[Counter[str]] = Counter()

    @initialize(count=st.integers(1, 6))
    def begin(self, count: int) -> None:
        self.vacant: list[int] = []
        self.pool = BlockPool(count, 4, on_vacant=self.vacant.append)
        self.owners: Counter[int] = Counter()
        self.line = list(range(count))  # free blocks, the next to be taken first
        self.keys: dict[int, int] = {}
        self.told: list[int] = []  # the blocks that ``on_vacant`` should have reported
        self.counted: Counter[str] = Counter()  # the counts that the pool should have
        self.peak = 0

    def note(self, what: str) -> None:
        self.counted[what] += 1
        self.seen[what] += 1

    def owned(self) -> list[int]:
        return sorted(self.owners)

    @rule()
    def allocate(self) -> None:
        if not self.line:
            with pytest.raises(OutOfBlocks, match="in use"):
                self.pool.allocate()
            self.seen["exhausted"] += 1
            return
        expected = self.line.pop(0)
        if self.keys.pop(expected, None) is not None:
            self.told.append(expected)
            self.note("forgotten")
        assert self.pool.allocate() == expected
        self.note("allocated")
        self.owners[expected] = 1

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, self.pool.num_blocks - 1))
        if not self.owners[block] and block not in self.keys:
            with pytest.raises(ValueError, match="free and holds nothing"):
                self.pool.fork(block)
        else:
            assert self.pool.fork(block) == block
            if not self.owners[block]:
                self.line.remove(block)
                self.note("revived")
            self.owners[block] += 1
        self.owners += Counter()  # drops zeros

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, self.pool.num_blocks - 1))
        if not self.owners[block]:
            with pytest.raises(ValueError, match="free already"):
                self.pool.free(block)
        else:
            self.pool.free(block)
            self.owners[block] -= 1
            if not self.owners[block] and block in self.keys:
                self.line.append(block)
            elif not self.owners[block]:
                self.line.insert(0, block)
                self.told.append(block)
        self.owners += Counter()

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), key=st.integers(0, 2))
    def remember(self, data: st.DataObject, key: int) -> None:
        block = data.draw(st.sampled_from(self.owned()))
        if block in self.keys:
            with pytest.raises(ValueError, match="remembered already"):
                self.pool.remember(block, key)
        else:
            self.seen["twins"] += key in self.keys.values()
            self.pool.remember(block, key)
            self.keys[block] = key

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert self.pool.num_free == len(self.line)
        assert [self.pool.ref_count(b) for b in range(self.pool.num_blocks)] == [
            self.owners[b] for b in range(self.pool.num_blocks)
        ]
        for key in range(3):
            found = self.pool.find(key)
            # in the order in which they were remembered
            holders = [b for b, k in self.keys.items() if k == key]
            assert found == (holders[0] if holders else None)
        assert self.vacant == self.told
        assert all(
            getattr(self.pool, what) == self.counted[what]
            for what in ("allocated", "forgotten", "revived")
        )
        self.peak = max(self.peak, len(self.owners))
        assert (self.pool.peak, self.pool.num_used) == (self.peak, len(self.owners))

    def teardown(self) -> None:
        for block in list(getattr(self, "owners", Counter()).elements()):
            self.pool.free(block)
        if hasattr(self, "pool"):
            assert self.pool.num_free == self.pool.num_blocks


@pytest.mark.theorem(
    "A pool allocates its free blocks without a key first, then those with a key in the order "
    "in which they became free; a key finds its first block until that is allocated again; no "
    "block is lost",
    source="Kwon et al. 2023, section 4.2; vLLM, automatic prefix caching",
)
def test_state_machine_the_pool_is_a_queue_with_a_dictionary():
    run(PoolMachine, examples=50, see={"exhausted", "forgotten", "revived", "twins"})


def test_a_free_block_that_is_remembered_is_forgotten_only_when_it_is_allocated():
    pool = BlockPool(2, 4)
    first = pool.allocate()
    second = pool.allocate()
    pool.remember(first, "a")
    pool.remember(second, "b")
    pool.free(second)
    pool.free(first)
    assert (pool.find("a"), pool.find("b")) == (first, second)
    assert pool.allocate() == second  # the block that has been free the longest
    assert (pool.find("a"), pool.find("b"), pool.forgotten) == (first, None, 1)
    assert pool.fork(first) == first
    assert pool.revived == 1


def test_a_block_that_is_taken_back_counts_for_the_peak():
    pool = BlockPool(2, 4)
    first = pool.allocate()
    pool.remember(first, "a")
    pool.free(first)
    second = pool.allocate()  # the other one: a remembered block is last in line
    assert (second != first, pool.num_used, pool.peak) == (True, 1, 1)
    pool.fork(first)
    assert (pool.num_used, pool.peak) == (2, 2)
    pool.fork(first)  # a second owner of a block in use
    pool.free(second)
    assert (pool.num_used, pool.peak) == (1, 2)


@pytest.mark.parametrize("block", [-1, 3])
def test_a_block_outside_the_pool_is_rejected(block):
    pool = BlockPool(3, 4)
    for operation in (pool.free, pool.fork, pool.ref_count, pool.key_of):
        with pytest.raises(ValueError, match=r"blocks 0\.\.2"):
            operation(block)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 1), (2.5, 4), (2, 1.5), (None, 4)])
def test_an_empty_pool_is_rejected(size):
    with pytest.raises(ValueError, match="at least one token"):
        BlockPool(*size)


# --- tables: what is written is what is read ----------------------------------------------


class TablesMachine(RuleBasedStateMachine):
    """Sequences that append, fork, roll back and end, over a memory of one integer per
    slot.

    The model is a plain list per sequence. A missed copy on write, a block that is freed
    too early or a slot that is allocated twice shows as an integer of another sequence.
    """

    seen: ClassVar[Counter[str]] = Counter()

    @initialize(count=st.integers(1, 8), size=st.integers(1, 4))
    def begin(self, count: int, size: int) -> None:
        self.pool = BlockPool(count, size)
        self.memory: list[int | None] = [None] * (count * size)
        self.tables: list[BlockTable] = []
        self.texts: list[list[int]] = []
        self.clock = 0

    @rule()
    def start(self) -> None:
        self.tables.append(BlockTable(self.pool))
        self.texts.append([])

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(0, 6))
    def append(self, data: st.DataObject, count: int) -> None:
        i = data.draw(st.integers(0, len(self.tables) - 1))
        table = self.tables[i]
        size = self.pool.block_size
        before = (list(table.blocks), self.pool.num_free)
        if table.needs(count) > self.pool.num_free:
            with pytest.raises(OutOfBlocks):
                table.reserve(count)
            assert (table.blocks, self.pool.num_free) == before
            self.seen["exhausted"] += 1
            return
        expected = self.pool.num_free - table.needs(count)
        copies = table.reserve(count)
        assert self.pool.num_free == expected
        for source, target in copies:
            self.memory[target * size : (target + 1) * size] = self.memory[
                source * size : (source + 1) * size
            ]
            self.seen["copied"] += 1
        for slot in table.slots(table.length, table.length + count):
            assert self.pool.ref_count(slot // size) == 1  # no other sequence reads what is written
            self.memory[slot] = self.clock
            self.texts[i].append(self.clock)
            self.clock += 1
        table.commit(count)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.tables) - 1))
        free = self.pool.num_free
        self.tables.append(self.tables[i].fork())
        self.texts.append(list(self.texts[i]))
        assert self.pool.num_free == free  # nothing is copied or allocated

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.tables) - 1))
        keep = data.draw(st.integers(0, self.tables[i].length))
        self.tables[i].truncate(keep)
        del self.texts[i][keep:]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.tables) - 1))
        self.tables.pop(i).free()
        self.texts.pop(i)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        owners = Counter(b for table in self.tables for b in table.blocks)
        assert all(self.pool.ref_count(b) == owners[b] for b in range(self.pool.num_blocks))
        for table, text in zip(self.tables, self.texts, strict=True):
            table.check()
            assert [self.memory[s] for s in table.slots(0, table.length)] == text
            assert len(table.blocks) == -(-table.length // self.pool.block_size)

    def teardown(self) -> None:
        for table in getattr(self, "tables", []):
            table.free()
        if hasattr(self, "pool"):
            assert self.pool.num_free == self.pool.num_blocks


@pytest.mark.theorem(
    "Sequences that share blocks read what they wrote themselves; a block has as many "
    "references as tables",
    source="Kwon et al. 2023, section 4.4",
)
def test_state_machine_tables_over_one_pool():
    run(TablesMachine, examples=60, steps=40, see={"copied", "exhausted"})


@given(size=st.integers(1, 5), lengths=st.lists(st.integers(0, 20), max_size=5))
def test_bound_a_sequence_wastes_less_than_a_block(size, lengths):
    pool = BlockPool(100, size)
    for length in lengths:
        table = BlockTable(pool)
        assert table.reserve(length) == []
        table.commit(length)
        assert 0 <= table.capacity - table.length < size


def test_blocks_of_a_prefix_are_freed_from_its_end():
    pool = BlockPool(3, 1)
    table = BlockTable(pool)
    table.reserve(3)
    table.commit(3)
    for i, block in enumerate(table.blocks):
        pool.remember(block, i)
    order = list(reversed(table.blocks))
    table.free()
    assert [pool.allocate() for _ in range(3)] == order


def test_a_table_begins_with_blocks_that_another_filled():
    pool = BlockPool(4, 2)
    first = BlockTable(pool)
    first.reserve(4)
    first.commit(4)
    second = BlockTable(pool)
    second.adopt(first.blocks)
    assert (second.length, [pool.ref_count(b) for b in first.blocks]) == (4, [2, 2])
    assert second.reserve(1) == []  # full blocks are never written: no copy
    with pytest.raises(ValueError, match="empty table"):
        second.adopt(first.blocks)


def test_reserved_blocks_stay_with_the_parent_and_the_partly_filled_block_is_copied():
    pool = BlockPool(6, 2)
    parent = BlockTable(pool)
    parent.reserve(4)
    parent.commit(1)
    child = parent.fork()
    assert (child.blocks, child.length) == (parent.blocks[:1], 1)
    assert [pool.ref_count(block) for block in parent.blocks] == [2, 1]
    shared, ahead = parent.blocks
    assert parent.needs(3) == 1  # only the copy
    # its last block is its own, and not the one that it writes first
    ((source, target),) = parent.reserve(3)
    assert (source, parent.blocks, child.blocks) == (shared, [target, ahead], [shared])


def test_blocks_behind_a_window_are_freed_and_the_others_keep_their_places():
    pool = BlockPool(8, block_size=2)
    table = BlockTable(pool)
    table.reserve(7)
    table.commit(7)
    blocks = table.blocks[:]
    table.drop_before(-3)
    table.drop_before(1)  # within block 0
    assert table.blocks == blocks
    table.drop_before(5)  # within block 2
    assert table.blocks == [NO_BLOCK, NO_BLOCK, *blocks[2:]]
    assert (table.dropped, pool.num_free) == (2, 6)
    table.drop_before(3)  # nothing comes back
    assert table.dropped == 2
    assert table.slots(4, 7) == [blocks[2] * 2, blocks[2] * 2 + 1, blocks[3] * 2]
    with pytest.raises(ValueError, match="position 3 is behind the window"):
        table.slot(3)
    child = table.fork()
    assert (child.blocks, child.length, child.dropped) == (table.blocks, 7, 2)
    assert pool.ref_count(blocks[2]) == 2
    child.reserve(2)  # the last block is shared, and copied
    child.commit(2)
    child.drop_before(99)  # at most what is written
    assert child.dropped == 4
    for one in (table, child):
        one.check()
        one.free()
        assert (one.blocks, one.dropped) == ([], 0)
    pool.check()
    assert pool.num_free == 8


def test_bad_calls_are_rejected():
    table = BlockTable(BlockPool(2, 2))
    table.reserve(1)
    calls = [
        lambda: table.reserve(-1),
        lambda: table.commit(3),
        lambda: table.commit(-1),
        lambda: table.truncate(1),
        lambda: table.slot(2),
        lambda: table.slot(-1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"reserve|reserved|keep"):
            call()


@pytest.mark.theorem(
    "A held block keeps its contents until its last hold ends, whatever becomes of its owners",
    source="kv/block_pool.py",
)
@given(
    holds=st.integers(1, 3),
    owners=st.integers(1, 3),
    keyed=st.booleans(),
    frees_first=st.booleans(),
)
def test_conservation_a_held_block_is_given_away_after_its_last_hold(
    holds, owners, keyed, frees_first
):
    vacant: list[int] = []
    pool = BlockPool(2, 4, on_vacant=vacant.append)
    block = pool.allocate()
    if keyed:
        pool.remember(block, "key")
    for _ in range(owners - 1):
        pool.fork(block)
    for _ in range(holds):
        pool.hold(block)
    ends = [pool.free] * owners, [pool.unhold] * holds
    for end in [*ends[0], *ends[1]] if frees_first else [*ends[1], *ends[0]]:
        assert pool.num_free == 1
        assert not vacant
        end(block)
        pool.check()
    assert pool.num_free == 2
    assert vacant == ([] if keyed else [block])


def test_what_is_not_held_is_not_released():
    pool = BlockPool(2, 4)
    with pytest.raises(ValueError, match="block 0 is not held"):
        pool.unhold(0)
    with pytest.raises(ValueError, match="block 0 is free: there is nothing to hold"):
        pool.hold(0)


def test_after_all_keys_are_dropped_nothing_is_found_and_owners_keep_their_blocks():
    vacant: list[int] = []
    pool = BlockPool(3, 4, on_vacant=vacant.append)
    owned, free = pool.allocate(), pool.allocate()
    pool.remember(owned, "owned")
    pool.remember(free, "free")
    pool.free(free)
    pool.forget_all()
    pool.check()
    assert pool.find("owned") is pool.find("free") is None
    assert (pool.ref_count(owned), pool.num_free) == (1, 2)
    assert vacant == [free]  # the owner still reads the other one
