"""Managers of blocks: what each takes, keeps and frees, and the leaks that ``check`` finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from refllm.kv.block_pool import BlockPool
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.prefix_caching import HashKVManager, RadixKVManager
from refllm.serve.request import Request, Sequence

Make = Callable[[BlockPool], PagedKVManager]
KINDS = pytest.mark.parametrize("make", [PagedKVManager, HashKVManager, RadixKVManager])


def sequence(tokens: list[int], order: int = 0, **fields: object) -> Sequence:
    return Sequence(Request(tokens, 9, request_id=order, **fields), 0, order)  # type: ignore[arg-type]


def compute(memory: PagedKVManager, one: Sequence, count: int) -> None:
    one.computed += count
    memory.commit(one)


@KINDS
def test_blocks_are_taken_when_needed_and_freed(make: Make):
    memory = make(BlockPool(4, 2))
    one = sequence([1, 2, 3, 4, 5])
    assert memory.admit(one, 3, alone=True)
    assert (memory.allocated, memory.slots) == (4, 8)
    compute(memory, one, 3)
    assert memory.reserve(one, 1) == []  # within its second block
    assert memory.allocated == 4
    compute(memory, one, 1)
    assert memory.reserve(one, 9) is None  # rejected, and nothing has changed
    memory.check()
    memory.release(one)
    memory.release(one)  # it holds nothing any more
    assert memory.allocated == 0
    memory.check()


@KINDS
def test_blocks_reserved_for_rejected_drafts_are_freed(make: Make):
    memory = make(BlockPool(6, 2))
    one = sequence([1, 2, 3])
    memory.admit(one, 3, alone=True)
    compute(memory, one, 3)
    one.tokens.append(7)
    assert memory.reserve(one, 6) == []
    assert memory.allocated == 10
    compute(memory, one, 1)
    assert memory.allocated == 4


@KINDS
def test_a_single_block_that_only_a_rejected_draft_needed_is_freed(make: Make):
    memory = make(BlockPool(6, 2))
    one = sequence([1, 2, 3, 4])
    memory.admit(one, 4, alone=True)
    compute(memory, one, 4)
    one.tokens.append(7)
    memory.reserve(one, 2)
    compute(memory, one, 1)
    assert memory.allocated == 6  # the second token lies in the block of the first
    one.tokens.append(8)
    memory.reserve(one, 2)
    compute(memory, one, 1)
    assert memory.allocated == 6  # the block of the seventh is free again


@KINDS
def test_forks_share_blocks_and_the_first_writer_copies(make: Make):
    memory = make(BlockPool(8, 2))
    one = sequence([1, 2, 3])
    two = sequence([1, 2, 3])
    memory.admit(one, 3, alone=True)
    compute(memory, one, 3)
    memory.fork(one, two)
    two.computed = 3
    assert memory.allocated == 4
    (pair,) = memory.reserve(one, 1)
    assert pair[0] == memory.blocks(two)[1]
    assert pair[1] == memory.blocks(one)[1]
    assert memory.reserve(two, 1) == []  # it is the only owner now
    memory.check()
    for some in (one, two):
        memory.release(some)
    memory.check()
    assert memory.allocated == 0


@KINDS
def test_a_watermark_keeps_blocks_for_running_sequences(make: Make):
    pool = BlockPool(10, 1)
    memory = make(pool) if make is not PagedKVManager else PagedKVManager(pool)
    memory.watermark_blocks = 3
    one = sequence([1] * 8)
    two = sequence([2] * 8, 1)
    assert not memory.admit(one, 8, alone=False)
    assert memory.admit(one, 7, alone=False)
    assert not memory.admit(two, 1, alone=False)
    assert memory.reserve(one, 1) == []
    with pytest.raises(ValueError, match="watermark"):
        make(pool, watermark=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("make", [HashKVManager, RadixKVManager])
def test_a_prefix_is_found_from_the_next_step_on_and_by_its_own_tenant(make: Make):
    memory = make(BlockPool(20, 2))
    one = sequence([1, 2, 3, 4, 5])
    memory.admit(one, 5, alone=True)
    assert memory.match(sequence([1, 2, 3, 4, 9], 1)) == 0
    compute(memory, one, 5)
    assert memory.match(sequence([1, 2, 3, 4, 9], 2)) == 4
    assert memory.match(sequence([1, 2, 3, 4], 3)) == 2  # one token is always left to compute
    assert memory.match(sequence([1, 2, 9, 9], 4)) == 2
    assert memory.match(sequence([1, 2, 3, 4, 9], 5, salt="tenant")) == 0
    two = sequence([1, 2, 3, 4, 9], 6)
    used = memory.allocated
    assert memory.admit(two, 1, alone=True)
    assert memory.allocated == used + 2  # the two blocks that it found are not taken again
    assert memory.blocks(two)[:2] == memory.blocks(one)[:2]
    two.computed = 4
    memory.release(one)
    memory.check()
    assert memory.match(sequence([1, 2, 3, 4, 5, 6], 7)) == 4


def test_a_matched_prefix_is_not_evicted_to_make_room():
    memory = RadixKVManager(BlockPool(4, 1))
    one = sequence([1, 2, 3])
    memory.admit(one, 3, alone=True)
    compute(memory, one, 3)
    memory.release(one)
    assert memory.allocated == 0
    two = sequence([1, 2, 3, 4, 5], 1)
    assert memory.match(two) == 3
    # the three that were found and one free one: there is no fifth
    assert not memory.admit(two, 2, alone=True)
    memory.check()
    assert memory.match(two) == 3
    assert memory.admit(two, 1, alone=True)
    two.computed = 3
    memory.check()


def test_duplicates_of_a_block_are_replaced_by_the_trees():
    memory = RadixKVManager(BlockPool(8, 2))
    one = sequence([1, 2, 3, 4, 5])
    two = sequence([1, 2, 3, 4, 6], 1)
    for some in (one, two):  # side by side: neither finds what the other computes
        memory.admit(some, 5, alone=False)
    assert memory.allocated == 12
    for some in (one, two):
        compute(memory, some, 5)
    assert memory.blocks(one)[:2] == memory.blocks(two)[:2]
    assert memory.allocated == 8
    memory.check()


@KINDS
def test_a_leak_is_found(make: Make):
    memory = make(BlockPool(4, 2))
    memory.check()
    memory.pool.allocate()
    with pytest.raises(AssertionError, match="leaked"):
        memory.check()


@KINDS
def test_a_table_that_holds_too_few_blocks_is_found(make: Make):
    memory = make(BlockPool(4, 2))
    one = sequence([1, 2, 3, 4, 5])
    memory.admit(one, 4, alone=True)
    one.computed = memory._tables[one].length = 5
    with pytest.raises(AssertionError):
        memory.check()


def test_a_tree_that_is_broken_is_found():
    memory = RadixKVManager(BlockPool(8, 2))
    one = sequence([1, 2, 3, 4, 5])
    memory.admit(one, 5, alone=True)
    compute(memory, one, 5)
    memory.release(one)
    memory.check()
    memory.cache.evictable += 2
    with pytest.raises(AssertionError):
        memory.check()


@KINDS
def test_requests_that_never_fit_are_rejected_counting_all_beams(make: Make):
    memory = make(BlockPool(4, 2))
    assert memory.rejection_reason(Request([1] * 8, 1)) is None
    assert (
        memory.rejection_reason(Request([1] * 8, 2))
        == "needs 10 slots with 9 tokens to keep, and the pool has 8"
    )
    assert memory.rejection_reason(Request([1] * 3, 1, n=2)) is None
    assert memory.rejection_reason(Request([1] * 3, 1, n=2, beam=True)) is None
    assert memory.rejection_reason(Request([1] * 3, 1, n=3, beam=True)) is not None


@pytest.mark.parametrize("make", [HashKVManager, RadixKVManager])
def test_a_prompt_that_is_computed_token_by_token_is_found_block_by_block(make: Make):
    memory = make(BlockPool(20, 2))
    one = sequence([1, 2, 3, 4, 5, 6, 7])
    memory.admit(one, 1, alone=True)
    for computed in range(1, 7):
        compute(memory, one, 1)
        assert memory.match(sequence([1, 2, 3, 4, 5, 6, 9], computed)) == computed // 2 * 2
        assert memory.reserve(one, 1) == []


def test_an_output_enters_the_tree_when_its_sequence_ends():
    memory = RadixKVManager(BlockPool(8, 1))
    one = sequence([1, 2])
    memory.admit(one, 2, alone=True)
    compute(memory, one, 2)
    for token in (7, 8):
        one.tokens.append(token)
        memory.reserve(one, 1)
        compute(memory, one, 1)
    assert memory.match(sequence([1, 2, 7, 8, 9], 1)) == 2
    memory.release(one)
    assert memory.match(sequence([1, 2, 7, 8, 9], 2)) == 4


def test_by_priority_the_prefix_of_the_least_urgent_request_is_evicted_first():
    memory = RadixKVManager(BlockPool(6, 1), policy="priority")
    urgent = sequence([1, 2, 3], priority=-1)
    idle = sequence([4, 5, 6], 1, priority=5)
    for one in (idle, urgent):
        memory.admit(one, 3, alone=True)
        compute(memory, one, 3)
        memory.release(one)
    assert memory.admit(sequence([7, 8], 2), 2, alone=True)
    assert memory.match(sequence([1, 2, 3, 9], 3)) == 3
    assert memory.match(sequence([4, 5, 6, 9], 4)) < 3
