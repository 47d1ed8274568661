"""Scalar shapes as terminals, with and without forbidden values."""

from __future__ import annotations

import json

from hand_made_shapes import HandMade, few, words
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.automata.alphabet import BYTES, CHARACTERS
from refllm.decode.grammar.automata.dfa_builders import anything, from_words
from refllm.decode.grammar.automata.dfa_operations import difference, intersect, union
from refllm.decode.grammar.automaton import accepting, enter, step
from refllm.decode.grammar.json_machine.scalars import Scalars
from refllm.decode.grammar.json_scalars import json_numbers
from refllm.decode.grammar.json_scalars.json_values import freeze
from refllm.decode.grammar.json_schema.shapes import NumberShape, StringShape, ValueShapes

ALL = [None, True, False, "", "a", "ab", "é", 0, 1, 1.5, -2]
some_values = st.lists(st.sampled_from(ALL), unique_by=json.dumps)


def reads(shapes: ValueShapes, text: str, forbidden=None) -> bool | None:
    """Whether some terminal accepts the text; None if it is not even the beginning of one."""
    state = enter((terminal, None) for terminal in Scalars().terminals(shapes, forbidden))
    for byte in text.encode():
        state = None if state is None else step(state, byte)
    return None if state is None else accepting(state)


@given(some_values, some_values)
def test_of_few_values_the_forbidden_ones_are_taken_out(allowed, forbidden) -> None:
    shapes = HandMade().expand(few(*allowed))
    without = frozenset(map(freeze, forbidden))
    for value in ALL:
        fits = freeze(value) in set(map(freeze, allowed)) - without
        assert bool(reads(shapes, json.dumps(value, ensure_ascii=False), without)) == fits
        if isinstance(value, int) and not isinstance(value, bool):
            assert bool(reads(shapes, f"{value}.0", without)) == fits


def test_only_text_without_other_ways_on_is_taken_out() -> None:
    strings = ValueShapes(strings=(StringShape(anything(CHARACTERS)),))
    assert reads(strings, '"ab"', frozenset({"ab"})), "the frame below rejects it when it ends"
    counted = ValueShapes(strings=(StringShape(anything(CHARACTERS), 1, 2),))
    assert reads(counted, '"ab', frozenset({"ab"})) is None, "nothing but the quote may follow"
    assert reads(counted, '"a"', frozenset({"ab"}))
    assert not reads(counted, '"abc"', frozenset())
    assert not reads(counted, '""', frozenset())


def test_all_texts_of_a_number_are_one_value() -> None:
    numbers = from_words({b"1": 1, b"1.0": 1, b"-0": 1, b"0.0": 1, b"12": 1}, size=BYTES)
    shapes = ValueShapes(numbers=(NumberShape(numbers),))
    assert reads(shapes, "1", frozenset({1.0})) is False, "12 begins so"
    assert reads(shapes, "1.", frozenset({1})) is None
    assert reads(shapes, "-", frozenset({0})) is None
    assert reads(shapes, "12", frozenset({0, 1}))


def test_no_spelling_of_a_used_number_is_begun() -> None:
    numbers = intersect(json_numbers.interval(0, 2), json_numbers.integer())
    shapes = ValueShapes(numbers=(NumberShape(numbers),))
    assert reads(shapes, "1", frozenset({1})) is None
    assert reads(shapes, "2.00", frozenset({1}))
    whole = ValueShapes(numbers=(NumberShape(json_numbers.integer()),))
    assert reads(whole, "1.0", frozenset({1})), "1.0e+16 begins so: rejected when it ends"
    few_or_many = union(json_numbers.values((1, 15)), json_numbers.values(tuple(range(100, 200))))
    mixed = ValueShapes(numbers=(NumberShape(few_or_many),))
    assert reads(mixed, "1", frozenset({1, 15})) is False, "100 begins so"
    assert reads(mixed, "1.", frozenset({1, 15})) is None
    assert reads(mixed, "15", frozenset({1, 15})) is False, "150 begins so"
    some = ValueShapes(numbers=(NumberShape(json_numbers.interval(0, 2)),))
    assert reads(some, "2e0", frozenset({2})) is None
    assert reads(some, "1.5", frozenset({2, 0, 1}))


def test_text_is_kept_where_values_are_compared() -> None:
    shapes = HandMade().expand(few(*ALL))
    assert all(terminal.capture for terminal in Scalars().terminals(shapes, frozenset()))
    assert not any(terminal.capture for terminal in Scalars().terminals(shapes, None))


def test_terminals_of_one_shape_are_equal() -> None:
    scalars = Scalars()
    rest = difference(anything(CHARACTERS), words("a"))
    shapes = ValueShapes(frozenset({"null"}), (StringShape(rest), StringShape(rest, 1, 3)))
    assert list(scalars.terminals(shapes, None)) == list(scalars.terminals(shapes, None))
