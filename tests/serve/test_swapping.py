"""Swapping: what moves over the link is counted once per direction, and only what moves."""

from __future__ import annotations

import pytest

from refllm.kv.block_pool import BlockPool
from refllm.serve.request import Request, Sequence
from refllm.serve.swapping import SwappingKVManager


def preempted(memory: SwappingKVManager, order: int = 0) -> Sequence:
    """A sequence of five computed tokens that has just been preempted."""
    sequence = Sequence(Request(range(6), 9, request_id=order), 0, order)
    assert memory.admit(sequence, 5, alone=True)
    sequence.computed = 5
    memory.commit(sequence)
    memory.release(sequence, preempted=True)
    sequence.computed = 0
    return sequence


def test_a_sequence_moves_out_and_in_again_with_all_its_blocks():
    memory = SwappingKVManager(BlockPool(8, 2))
    sequence = preempted(memory)
    assert (memory.moved, memory.host_used, memory.allocated) == ((5, 3), 3, 0)
    assert memory.match(sequence) == 5
    assert memory.admit(sequence, 1, alone=True)
    sequence.computed = 5
    assert (memory.moved, memory.host_used, memory.allocated) == ((10, 6), 0, 6)
    assert (memory.swapped, memory.dropped) == (1, 0)
    memory.check()


def test_a_sequence_that_is_aborted_on_the_host_does_not_move_back():
    memory = SwappingKVManager(BlockPool(8, 2))
    sequence = preempted(memory)
    memory.release(sequence)
    assert (memory.moved, memory.host_used, memory.match(sequence)) == ((5, 3), 0, 0)
    memory.check()


@pytest.mark.parametrize(("host_blocks", "swapped"), [(0, 0), (2, 0), (3, 1), (5, 1), (6, 2)])
def test_a_sequence_for_which_the_host_has_no_room_is_dropped(host_blocks, swapped):
    memory = SwappingKVManager(BlockPool(8, 2), host_blocks=host_blocks)
    for order in range(2):
        preempted(memory, order)
    assert (memory.swapped, memory.dropped) == (swapped, 2 - swapped)
    assert memory.moved == (5 * swapped, 3 * swapped)
    memory.check()


def test_a_sequence_of_which_nothing_was_computed_has_nothing_to_move():
    memory = SwappingKVManager(BlockPool(8, 2))
    sequence = Sequence(Request(range(6), 9, request_id="new"), 0, 0)
    memory.admit(sequence, 5, alone=True)
    memory.release(sequence, preempted=True)
    assert (memory.moved, memory.host_used, memory.match(sequence)) == ((0, 0), 0, 0)
    assert (memory.swapped, memory.dropped) == (0, 0)
    memory.check()


def test_a_sequence_comes_back_only_where_all_of_it_has_room():
    memory = SwappingKVManager(BlockPool(4, 2), watermark=0.25)
    sequence = preempted(memory)
    assert not memory.admit(sequence, 4, alone=True)  # needs five blocks
    assert not memory.admit(sequence, 3, alone=False)  # one of the four stays free
    assert memory.moved == (5, 3)
    assert memory.admit(sequence, 3, alone=True)
