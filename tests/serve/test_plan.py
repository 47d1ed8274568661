"""A plan is plain data: it says where every token lies, and ``check`` finds every broken
invariant.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.serve.plan import PaddingRow, Plan, ScheduledSequence, slots_of


@given(blocks=st.permutations(range(9)), size=st.integers(1, 5), data=st.data())
def test_oracle_a_slot_is_block_times_size_plus_offset(blocks, size, data):
    start = data.draw(st.integers(0, 9 * size - 1))
    stop = data.draw(st.integers(start, 9 * size))
    assert slots_of(blocks, size, start, stop) == [
        blocks[p // size] * size + p % size for p in range(start, stop)
    ]
    assert slots_of(blocks, 0, start, stop) == list(range(blocks[0] + start, blocks[0] + stop))


def plan(*items: ScheduledSequence, **fields: Any) -> Plan:
    return Plan(0, list(items), **{"block_size": 2, **fields})


A = ("a", 0)
B = ("b", 0)


def test_what_a_plan_derives():
    made = plan(
        ScheduledSequence(A, 3, 1, (5, 1), 1),
        ScheduledSequence(B, 0, 3, (2, 0), 0),
        padding_rows=[PaddingRow(4, 1, 90)],
    )
    made.check()
    assert (made.tokens, made.sampling) == (4, [made.items[0]])
    assert [made.slots(item) for item in made.items] == [[3], [4, 5, 0]]
    assert made.batch() == [(3, 1), (0, 3), (4, 1)]
    padded = plan(
        ScheduledSequence(A, 0, 3, (2,), 1, pad=2),
        ScheduledSequence(B, 3, 1, (9,), 1, pad=2),
        block_size=0,
    )
    # padding is computed with the prompt, and seen by what follows
    assert padded.batch() == [(0, 5), (5, 1)]


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (
            plan(ScheduledSequence(A, 0, 1, (0,), 1), ScheduledSequence(A, 0, 1, (1,), 1)),
            "stands twice",
        ),
        (plan(ScheduledSequence(A, 0, 3, (0, 1), 1), budget=2), "budget"),
        (
            plan(
                ScheduledSequence(A, 0, 1, (0,), 1),
                ScheduledSequence(B, 0, 1, (1,), 1),
                max_sequences=1,
            ),
            "max_sequences",
        ),
        (
            plan(ScheduledSequence(A, 0, 1, (0,), 1), admitted=[B], preempted=[B]),
            "preempted and admitted in one step",
        ),
        (plan(ScheduledSequence(A, 0, 1, (0,), 1), preempted=[A]), "a preempted sequence computes"),
        (plan(ScheduledSequence(A, 0, 1, (0,), 2)), "samples more"),
        (plan(ScheduledSequence(A, 0, 0, (0,), 0)), "computes no token"),
        (plan(ScheduledSequence(A, -1, 1, (0,), 0)), "below 0"),
        (plan(ScheduledSequence(A, 2, 1, (0, 0), 1)), "a block twice"),
        (plan(ScheduledSequence(A, 2, 1, (0,), 1)), "beyond its blocks"),
        (
            plan(ScheduledSequence(A, 1, 1, (0,), 1), ScheduledSequence(B, 1, 1, (0,), 1)),
            "one slot",
        ),
        (
            plan(ScheduledSequence(A, 1, 1, (0,), 1), ScheduledSequence(B, 2, 1, (0, 1), 1)),
            "is shared",
        ),
        (plan(ScheduledSequence(A, 0, 1, (1,), 1), copies=[(0, 1), (2, 1)]), "two copies"),
    ],
)
def test_every_broken_invariant_is_found(broken, why):
    with pytest.raises(AssertionError, match=why):
        broken.check()
