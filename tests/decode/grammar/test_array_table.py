"""Which items may follow in an array, against all ways to fill it."""

from __future__ import annotations

from itertools import product

import pytest
from hand_made_shapes import HandMade, few, not_few
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.json_machine.array_table import ArrayState, ArrayTable
from refllm.decode.grammar.json_schema.shapes import ArrayShape, ItemCount

VALUES = [None, True, False]
ALL = few(*VALUES)
some_values = st.lists(st.sampled_from(VALUES), unique=True, max_size=3)


@st.composite
def tables(draw) -> ArrayTable:
    counts = []
    for _ in range(draw(st.integers(0, 2))):
        counted = draw(some_values)
        high = draw(st.none() | st.integers(0, 2))
        low = draw(st.integers(0, 2 if high is None else high))
        negation = ALL | not_few(*counted)
        counts.append(ItemCount(few(*counted), negation, low, high, draw(st.integers(0, 2))))
    prefix = tuple(few(*draw(some_values)) for _ in range(draw(st.integers(0, 2))))
    minimum = draw(st.integers(0, 4))
    maximum = draw(st.none() | st.integers(0, 5))
    shape = ArrayShape(prefix, few(*draw(some_values)), minimum, maximum, tuple(counts))
    return ArrayTable(shape, HandMade())


def fillings(table: ArrayTable, length: int) -> list[tuple]:
    """All arrays of a length that fit, by the definition."""
    hand_made = HandMade()
    shape = table.shape
    found = []
    for items in product(VALUES, repeat=length):
        fits = all(hand_made.accepts(table.node(i), item) for i, item in enumerate(items))
        for wanted in shape.counts:
            matching = sum(hand_made.accepts(wanted.value, item) for item in items[wanted.start :])
            fits &= wanted.low <= matching
            fits &= wanted.high is None or matching <= wanted.high
        if fits and length >= shape.minimum and length <= (shape.maximum or length):
            found.append(items)
    return [] if shape.maximum == 0 and length else found


@pytest.mark.theorem(
    "an array shape is feasible exactly if some array fits it", source="by enumeration"
)
@given(tables())
def test_feasible_is_that_some_array_fits(table) -> None:
    # lows of 2 and 2, the prefix, and the counts' starts: 7 items show what any number shows
    assert table.feasible(table.start) == any(fillings(table, length) for length in range(8))


@given(tables())
def test_every_choice_leads_on(table) -> None:
    seen = set()
    pending = [table.start] if table.feasible(table.start) else []
    while pending:
        state = pending.pop()
        if state in seen:
            continue
        seen.add(state)
        items = table.items(state)
        assert table.closes(state) or items
        pending.extend(item.after for item in items)
    assert len(seen) < 200, "states are finitely many, however long the array"


def test_a_bound_is_met_by_the_number_of_items_alone() -> None:
    # exactly two items count, and every item counts: two is the only length
    wanted = ItemCount(few(True), ALL | not_few(True), 2, 2)
    for minimum, maximum, fits in ((0, 1, False), (0, 2, True), (3, None, False), (2, 9, True)):
        shape = ArrayShape((), few(True), minimum, maximum, (wanted,))
        table = ArrayTable(shape, HandMade())
        assert table.feasible(table.start) == fits


def test_far_bounds_are_reached_in_one_look() -> None:
    wanted = ItemCount(few(True), ALL | not_few(True), 1, 3)
    table = ArrayTable(ArrayShape((), ALL, 10**6, 10**6, (wanted,)), HandMade())
    assert table.feasible(table.start)
    last = ArrayState(10**6 - 1, (0,))
    assert [item.node for item in table.items(last)] == [ALL | few(True)]
    assert table.closes(ArrayState(10**6, (3,)))
    assert not table.closes(ArrayState(10**6 - 1, (3,)))
