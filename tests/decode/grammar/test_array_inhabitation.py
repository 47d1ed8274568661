"""Arrays that can be filled, against all arrays of a few items."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.array_inhabitation import MOST_STEPS, inhabited
from refllm.decode.grammar.json_schema.shapes import ArrayShape, ItemCount

MANY = 9  # the value that stands for infinitely many others
LONGEST = 4


def node(*values: int):
    """A node is the set of its values here."""
    return frozenset((value, True) for value in values)


UNIVERSE = node(1, 2, MANY)


class Values:
    """What inhabitation asks about nodes."""

    def join(self, *nodes):
        return frozenset.intersection(*nodes)

    def values(self, node, limit, ask):
        """All values of a node, None if there are ``limit`` or more."""
        infinite = (MANY, True) in node
        return None if infinite or len(node) >= limit else [value for value, _ in node]


nodes = st.frozensets(st.sampled_from([1, 2, MANY]), max_size=3).map(lambda v: node(*v))
counts = st.builds(
    lambda value, low, high, start: ItemCount(value, UNIVERSE - value, low, high, start),
    nodes,
    st.integers(0, 2),
    st.none() | st.integers(0, 2),
    st.integers(0, 1),
)
shapes = st.builds(
    ArrayShape,
    prefix=st.lists(nodes, max_size=2).map(tuple),
    rest=nodes,
    minimum=st.integers(0, 3),
    maximum=st.none() | st.integers(0, LONGEST),
    counts=st.lists(counts, max_size=2).map(tuple),
    unique=st.booleans(),
)


def filled(shape: ArrayShape) -> bool:
    """Whether one of all arrays up to a length fits: items equal to ``MANY`` may differ."""
    longest = LONGEST + 3 if shape.maximum is None else shape.maximum
    for length in range(shape.minimum, longest + 1):
        choices = [*shape.prefix, *[shape.rest] * length][:length]
        for items in product(*([value for value, _ in each] for each in choices)):
            few = [each for each in items if each != MANY]
            if shape.unique and len(set(few)) < len(few):
                continue
            found = [sum((x, True) in c.value for x in items[c.start :]) for c in shape.counts]
            ends = [(c.low, len(items) if c.high is None else c.high) for c in shape.counts]
            if all(low <= n <= high for n, (low, high) in zip(found, ends, strict=True)):
                return True
    return False


@given(shapes)
@pytest.mark.theorem(
    "An array shape is inhabited exactly where enumeration finds an array that fits it.",
    source="definition; contains, uniqueItems and prefixItems of JSON Schema 2020-12",
)
def test_an_array_can_be_filled_exactly_where_one_is_found(shape) -> None:
    assert inhabited(shape, Values(), bool) == filled(shape)


@pytest.mark.parametrize("high", [None, 1, 2])
def test_unavoidable_matches_are_counted(high) -> None:
    count = ItemCount(node(1), node(2), 1, high)
    shape = ArrayShape(rest=node(1), minimum=2, counts=(count,))
    assert inhabited(shape, Values(), bool) == (high != 1)


def test_long_arrays_without_counts_cost_nothing() -> None:
    assert inhabited(ArrayShape(rest=node(1), minimum=10**9), Values(), bool)
    assert not inhabited(ArrayShape((node(1),), node(), minimum=10**9), Values(), bool)
    distinct = ArrayShape(rest=node(1, 2), minimum=10**9, unique=True)
    assert not inhabited(distinct, Values(), bool)
    assert inhabited(ArrayShape(rest=node(MANY), minimum=10**9, unique=True), Values(), bool)


def test_counts_that_are_too_large_are_rejected_by_name() -> None:
    for low in (400, MOST_STEPS):
        shape = ArrayShape(rest=node(1, 2), counts=(ItemCount(node(1), node(2), low, None),))
        if low == MOST_STEPS:
            with pytest.raises(GrammarError, match="too large") as raised:
                inhabited(shape, Values(), bool)
            assert raised.value.keyword == "contains"
        else:
            assert inhabited(shape, Values(), bool)


def test_a_node_without_values_asks_for_none() -> None:
    """An empty array fits, whatever its items would have to be."""
    shape = ArrayShape((node(),), node(), counts=(ItemCount(node(1), node(2), 0, 0),))
    assert inhabited(shape, Values(), bool)
    assert not inhabited(ArrayShape((), node(1), 2, 1), Values(), bool)
