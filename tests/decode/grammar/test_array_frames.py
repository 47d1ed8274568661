"""The automaton of an array shape accepts the texts of exactly the arrays that fit it."""

from __future__ import annotations

import json
from itertools import product

import pytest
from hand_made_shapes import (
    HandMade,
    accepted,
    arrays,
    compact,
    few,
    named,
    not_few,
    read,
    texts_of,
    words,
)
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa_builders import anything
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_machine.json_frames import JsonFrames
from refllm.decode.grammar.json_scalars import json_numbers
from refllm.decode.grammar.json_schema.shapes import (
    ArrayShape,
    ItemCount,
    KeyClass,
    NumberShape,
    ObjectShape,
    StringShape,
    ValueShapes,
)

ARRAY = named("array")
VALUES = [None, True, "a", 1]
TEXTS = ["null", "true", '"a"', "1", "1.0"]
LONGEST = 4
values = st.lists(st.sampled_from(VALUES), unique_by=json.dumps, max_size=3)
node_lists = st.lists(values, max_size=3)


def algebra(shape: ArrayShape, **others: ValueShapes) -> HandMade:
    return HandMade(array=ValueShapes(arrays=(shape,)), **others)


@st.composite
def array_shapes(draw, unique: bool | None = None, most_counts: int = 2) -> ArrayShape:
    """Shapes whose items are of ``VALUES``, and which have at most ``LONGEST`` items."""
    wanted = []
    for _ in range(draw(st.integers(0, most_counts))):
        counted = draw(values)
        high = draw(st.none() | st.integers(0, 2))
        low = draw(st.integers(0, 2 if high is None else high))
        negation = few(*VALUES) | not_few(*counted)
        start = draw(st.integers(0, 1))
        wanted.append(ItemCount(few(*counted), negation, low, high, start))
    return ArrayShape(
        tuple(few(*some) for some in draw(node_lists)),
        few(*draw(values)),
        draw(st.integers(0, 3)),
        draw(st.integers(0, LONGEST)),
        tuple(wanted),
        draw(st.booleans()) if unique is None else unique,
    )


def expected(hand_made: HandMade) -> set[str]:
    """All texts of up to ``LONGEST`` of the ``TEXTS`` that fit."""
    found = set()
    for count in range(LONGEST + 1):
        for chosen in product(TEXTS, repeat=count):
            text = f"[{','.join(chosen)}]"
            if hand_made.accepts(ARRAY, json.loads(text)):
                found.add(text)
    return found


@pytest.mark.theorem(
    "the automaton of an array shape accepts exactly the texts of the arrays that fit, with "
    "prefix, length, contains and uniqueItems, and every state on the way can be completed",
    source="by enumeration",
)
@given(array_shapes())
def test_the_texts_are_those_of_the_arrays_that_fit(shape) -> None:
    hand_made = algebra(shape)
    frames = JsonFrames(hand_made, whitespace="compact")
    assert texts_of(frames, ARRAY) == expected(hand_made)


@given(array_shapes(unique=True, most_counts=1))
def test_distinct_items_never_lead_into_a_dead_end(shape) -> None:
    hand_made = algebra(shape)
    frames = JsonFrames(hand_made, whitespace="compact")
    assert texts_of(frames, ARRAY) == expected(hand_made)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 6))
def test_without_an_upper_limit_long_arrays_are_counted_rightly(minimum, low, length) -> None:
    wanted = ItemCount(few(True), few(None), low, None)
    shape = ArrayShape((), few(None, True), minimum, None, (wanted,))
    frames = JsonFrames(algebra(shape), whitespace="compact")
    for trues in range(length + 1):
        text = compact([True] * trues + [None] * (length - trues))
        assert accepted(frames, ARRAY, text) == (trues >= low and length >= minimum)


def test_arrays_of_any_length_have_finitely_many_states() -> None:
    wanted = ItemCount(few(True), few(None), 1, None)
    shape = ArrayShape((few(True),), few(None, True), 3, None, (wanted,))
    frames = JsonFrames(algebra(shape), whitespace="compact")
    some = read(frames, ARRAY, "[true,null,true,null,")
    more = read(frames, ARRAY, "[true,true,true,true,true,null,")
    assert some == more
    assert hash(some) == hash(more)


def test_one_and_one_point_zero_are_the_same_item() -> None:
    shape = ArrayShape((), few(1, 2, True), unique=True)
    frames = JsonFrames(algebra(shape), whitespace="compact")
    assert accepted(frames, ARRAY, "[1,true,2.0]")
    assert not accepted(frames, ARRAY, "[1,1.0]")
    assert read(frames, ARRAY, "[1,1") is None, "1.0 is the only way on, and no other item"


def test_two_numbers_are_two_items_however_they_are_spelled() -> None:
    numbers = ValueShapes(numbers=(NumberShape(json_numbers.values((1, 2))),))
    frames = JsonFrames(
        algebra(ArrayShape((), named("numbers"), unique=True), numbers=numbers),
        whitespace="compact",
    )
    assert accepted(frames, ARRAY, "[1.000,2]")
    assert read(frames, ARRAY, "[1.0,1") is None
    assert read(frames, ARRAY, "[1,2.00,") is None, "no third number is left"
    three = ArrayShape((), named("numbers"), 3, unique=True)
    assert JsonFrames(algebra(three, numbers=numbers)).start(ARRAY) is None


def test_of_endlessly_many_strings_none_comes_twice() -> None:
    strings = ValueShapes(strings=(StringShape(anything(CHARACTERS)),))
    frames = JsonFrames(
        algebra(ArrayShape((), named("strings"), unique=True), strings=strings),
        whitespace="compact",
    )
    assert accepted(frames, ARRAY, '["a","aa",""]')
    assert read(frames, ARRAY, '["a","a') is not None
    assert read(frames, ARRAY, '["a","a"') is None


def test_a_string_of_the_greatest_length_is_not_begun_twice() -> None:
    strings = ValueShapes(strings=(StringShape(words("aa", "ab", "a"), 0, 1),))
    free = ValueShapes(strings=(StringShape(anything(CHARACTERS), 0, 2),))
    for name, once, again in (("strings", '["a"', '["a","a'), ("free", '["ab"', '["ab","ab')):
        frames = JsonFrames(
            algebra(ArrayShape((), named(name), unique=True), strings=strings, free=free),
            whitespace="compact",
        )
        assert read(frames, ARRAY, once) is not None
        assert read(frames, ARRAY, again) is None


PAIR = ObjectShape({"k": few("a", "b"), "m": few(None)}, (), frozenset({"k"}))
NESTED = {
    "pair": ValueShapes(objects=(PAIR,)),
    "tuple": ValueShapes(arrays=(ArrayShape((few("a"), few("a", "b")), few(), 1),)),
    "mixed": ValueShapes(
        literals=frozenset({"null"}),
        arrays=(ArrayShape((), few(None, True), 0, 1),),
        objects=(PAIR,),
    ),
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("bounds", [(0, 2), (3, 3), (0, 5)])
def test_nested_items_are_distinct_as_values(name, bounds) -> None:
    shape = ArrayShape((), named(name), *bounds, unique=True)
    hand_made = algebra(shape, **NESTED)
    frames = JsonFrames(hand_made, whitespace="compact")
    inner = [json.loads(text) for text in texts_of(frames, named(name))]
    wanted = {
        text
        for value in arrays(inner, min(bounds[1], 3))
        if hand_made.accepts(ARRAY, value)
        for text in [compact(value)]
    }
    found = texts_of(frames, ARRAY)
    assert {text for text in found if len(json.loads(text)) <= 3} == wanted


def test_an_object_that_can_only_repeat_an_item_does_not_begin() -> None:
    text = ValueShapes(strings=(StringShape(anything(CHARACTERS)),))
    shape = ObjectShape({"k": few("a"), "s": named("text")}, (), frozenset({"k"}))
    frames = JsonFrames(
        algebra(
            ArrayShape((), named("item"), unique=True),
            item=ValueShapes(objects=(shape,)),
            text=text,
        ),
        whitespace="compact",
    )
    assert read(frames, ARRAY, '[{"k":"a"},{"k":"a"') is not None
    assert read(frames, ARRAY, '[{"k":"a"},{"k":"a"}') is None, "the same object"
    assert accepted(frames, ARRAY, '[{"k":"a"},{"k":"a","s":""}]')
    begun = '[{"k":"a","s":"x"},{"s":"x'
    assert read(frames, ARRAY, begun) is not None
    assert read(frames, ARRAY, begun + '"') is None, "k would be a, as before"
    assert read(frames, ARRAY, '[{"k":"a","s":"x"},{"k":"a","s":"x"') is None


def test_an_open_object_may_repeat_an_item_and_go_on() -> None:
    shape = ObjectShape({"k": few("a")}, (KeyClass(anything(CHARACTERS), few(None)),))
    frames = JsonFrames(
        algebra(ArrayShape((), named("item"), unique=True), item=ValueShapes(objects=(shape,))),
        whitespace="compact",
    )
    assert read(frames, ARRAY, '[{"k":"a"},{"k":"a"') is not None
    assert accepted(frames, ARRAY, '[{"k":"a"},{"k":"a","m":null}]')
    assert not accepted(frames, ARRAY, '[{"k":"a","m":null},{"m":null,"k":"a"}]')


def test_items_that_must_differ_leave_each_other_their_values() -> None:
    strings = ValueShapes(strings=(StringShape(anything(CHARACTERS)),))
    shape = ArrayShape((named("strings"), few("a", "b"), few("a")), few(), 3, 3, unique=True)
    frames = JsonFrames(algebra(shape, strings=strings), whitespace="compact")
    assert read(frames, ARRAY, '["a') is not None
    assert read(frames, ARRAY, '["a"') is None, "the last item can only be a"
    assert read(frames, ARRAY, '["b"') is None, "a and b are left for the last two"
    assert accepted(frames, ARRAY, '["c","b","a"]')
    assert not accepted(frames, ARRAY, '["c","a","b"]')


def test_more_distinct_items_than_there_are_values_have_no_text() -> None:
    shape = ArrayShape((), few("a", "b"), 3, None, unique=True)
    assert JsonFrames(algebra(shape)).start(ARRAY) is None


def test_arrays_nest_without_end() -> None:
    frames = JsonFrames(algebra(ArrayShape((), ARRAY)), whitespace="compact")
    for depth in (1, 2, 100):
        assert accepted(frames, ARRAY, "[" * depth + "]" * depth)
        assert not accepted(frames, ARRAY, "[" * depth + "]" * (depth + 1))
    assert accepted(frames, ARRAY, "[[],[[],[]]]")


def test_counting_in_too_many_ways_is_an_error() -> None:
    wanted = ItemCount(few(True), few(None), 0, 100_000)
    with pytest.raises(GrammarError, match="counts its items"):
        JsonFrames(algebra(ArrayShape((), few(None, True), counts=(wanted,)))).start(ARRAY)
