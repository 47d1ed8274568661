"""Memory that is reserved at admission: the sizes by rule, the ranges, the rectangle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.serve.baselines.reservations import PaddedKVManager, ReservedKVManager
from refllm.serve.request import Request, Sequence


def sequence(prompt: int, output: int, order: int = 0) -> Sequence:
    return Sequence(Request(range(prompt), output, request_id=order), 0, order)


@given(prompt=st.integers(1, 60), output=st.integers(0, 40))
def test_bound_each_rule_reserves_enough_for_the_output(prompt, output):
    request = Request(range(prompt), output)
    sizes = {
        rule: ReservedKVManager(200, rule, longest=100).size(request)
        for rule in ("max", "pow2", "oracle")
    }
    assert sizes["max"] == 100
    assert sizes["oracle"] == prompt + output
    power = sizes["pow2"] - prompt
    assert power & (power - 1) == 0
    assert output <= power < 2 * max(output, 1)


def test_a_range_is_reserved_and_freed_as_a_whole():
    memory = ReservedKVManager(16, "oracle")
    one = sequence(3, 2)
    two = sequence(4, 4, 1)
    assert memory.admit(one, 3, alone=True)
    assert memory.admit(two, 4, alone=False)
    assert memory.allocated == 16  # 5 and 8, rounded up
    assert not memory.admit(sequence(1, 1, 2), 1, alone=False)
    assert memory.reserve(one, 1) == []
    one.computed = 3
    memory.commit(one)
    memory.check()
    one.computed = 9
    memory.commit(one)
    with pytest.raises(AssertionError, match="outgrown"):
        memory.check()
    memory.release(one)
    memory.release(one)
    assert memory.allocated == 8
    with pytest.raises(ValueError, match="cannot be shared"):
        memory.fork(two, one)


def test_rows_move_apart_while_a_batch_is_formed_and_are_freed_together():
    memory = PaddedKVManager(30)
    one = sequence(2, 3)
    two = sequence(4, 5, 1)
    memory.admit(one, 2, alone=True)
    assert (memory.blocks(one), memory.pad(one)) == ((0,), 0)
    memory.admit(two, 4, alone=False)
    assert (memory.blocks(one), memory.blocks(two), memory.pad(one)) == ((2,), (9,), 2)
    assert memory.allocated == 18
    assert not memory.admit(sequence(4, 9, 2), 4, alone=False)  # three rows of 13
    memory.release(one)
    assert (memory.allocated, memory.ended()) == (18, [0])
    memory.release(two)
    assert memory.allocated == 0
    memory.check()


@pytest.mark.parametrize(
    ("memory", "why"),
    [
        (
            ReservedKVManager(64, "max", longest=32),
            "30 \\+ 9 tokens, and the longest sequence is 32",
        ),
        (ReservedKVManager(48, "oracle"), "range of 39 slots, and the largest has 32"),
        (PaddedKVManager(38), "row of 39 slots, and a row may have 38"),
        (PaddedKVManager(99, longest=20), "row of 39 slots, and a row may have 20"),
    ],
)
def test_requests_that_never_fit_are_rejected(memory, why):
    request = Request(range(30), 9)
    reason = memory.rejection_reason(request)
    assert reason is not None
    with pytest.raises(ValueError, match=why):
        raise ValueError(reason)


@pytest.mark.parametrize(
    "memory",
    [
        ReservedKVManager(64, "max", longest=39),
        ReservedKVManager(39, "oracle", buddy=False),
        PaddedKVManager(39),
        PaddedKVManager(99, longest=39),
    ],
)
def test_a_request_that_just_fits_is_served(memory):
    one = sequence(30, 9)
    assert memory.rejection_reason(one.request) is None
    assert memory.admit(one, 30, alone=True)
    memory.check()


def test_a_row_may_have_a_single_slot():
    assert PaddedKVManager(1).admit(sequence(1, 0), 1, alone=True)
    assert PaddedKVManager(5, longest=1).admit(sequence(1, 0), 1, alone=True)


def test_bad_sizes_are_rejected():
    with pytest.raises(ValueError, match="unknown rule 'guess'"):
        ReservedKVManager(8, "guess")
    with pytest.raises(ValueError, match="at least one slot"):
        PaddedKVManager(0)
    with pytest.raises(ValueError, match="at least one slot"):
        PaddedKVManager(8, longest=0)
