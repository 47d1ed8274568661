"""The automaton of an object shape accepts the texts of exactly the objects that fit it."""

from __future__ import annotations

import pytest
from hand_made_shapes import (
    HandMade,
    accepted,
    compact,
    few,
    named,
    objects,
    read,
    texts_of,
    words,
)
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa_builders import anything, from_words
from refllm.decode.grammar.automata.dfa_operations import complement
from refllm.decode.grammar.json_machine.json_frames import JsonFrames
from refllm.decode.grammar.json_schema.shapes import (
    KeyClass,
    ObjectShape,
    ValueShapes,
    Witness,
)

OBJECT = named("object")
NODES = [few(None), few(True), few(None, True), few()]
ANY_KEY = anything(CHARACTERS)
KEYS = ["a", "b", "cc", "c"]


def algebra(shape: ObjectShape, **others: ValueShapes) -> HandMade:
    return HandMade(object=ValueShapes(objects=(shape,)), **others)


@st.composite
def object_shapes(draw, keys_of_witnesses=(None, ("a",), ("b", "c"))) -> ObjectShape:
    """Shapes over the keys ``KEYS``: named ones and one or two classes."""
    names = draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=3))
    others = [key for key in KEYS if key not in names]
    # a named key in the language of a class does not belong to it
    shared = st.lists(st.sampled_from(names)) if names else st.just([])
    border = draw(st.integers(0, len(others)))
    classes = [
        KeyClass(words(*part, *draw(shared)), draw(st.sampled_from(NODES)))
        for part in (others[:border], others[border:])
        if part
    ]
    wanted = [
        Witness(None if keys is None else words(*keys), draw(st.sampled_from(NODES[:3])))
        for keys in draw(st.lists(st.sampled_from(keys_of_witnesses), max_size=2))
    ]
    return ObjectShape(
        {name: draw(st.sampled_from(NODES)) for name in names},
        tuple(classes),
        frozenset(draw(shared)),
        draw(st.integers(0, 3)),
        draw(st.none() | st.integers(0, 3)),
        tuple(wanted),
        tuple(names),
    )


def expected(algebra: HandMade, order: tuple[str, ...] | None = None) -> set[str]:
    """All texts over ``KEYS`` that fit; with ``order`` only those in the order of definition."""
    found = set()
    for value in objects([None, True], KEYS, 4):
        ranks = [order.index(key) if key in order else len(order) for key in value] if order else []
        if ranks == sorted(ranks) and algebra.accepts(OBJECT, value):
            found.add(compact(value))
    return found


@pytest.mark.theorem(
    "the automaton of an object shape accepts exactly the texts, keys in any order and none "
    "twice, of the objects that fit, and every state on the way can be completed",
    source="by enumeration",
)
@given(object_shapes())
def test_the_texts_are_those_of_the_objects_that_fit(shape) -> None:
    hand_made = algebra(shape)
    frames = JsonFrames(hand_made, whitespace="compact")
    assert texts_of(frames, OBJECT) == expected(hand_made)


@given(object_shapes())
def test_in_the_order_of_definition_exactly_the_ordered_texts_remain(shape) -> None:
    hand_made = algebra(shape)
    frames = JsonFrames(hand_made, whitespace="compact", order="schema")
    assert texts_of(frames, OBJECT) == expected(hand_made, shape.order)


def open_shape(**changes) -> ObjectShape:
    """One named key, and any other key with true."""
    return ObjectShape({"a": few(None)}, (KeyClass(anything(CHARACTERS), few(True)),), **changes)


def test_of_endlessly_many_keys_none_comes_twice() -> None:
    frames = JsonFrames(algebra(open_shape()), whitespace="compact")
    assert accepted(frames, OBJECT, '{"x":true,"a":null,"xx":true}')
    assert read(frames, OBJECT, '{"x":true,"x') is not None
    assert read(frames, OBJECT, '{"x":true,"x"') is None
    assert read(frames, OBJECT, '{"a":null,"a"') is None
    assert read(frames, OBJECT, '{"a":true') is None, "a named key is of no class"


def test_a_named_key_that_cannot_occur_is_of_no_class() -> None:
    shape = ObjectShape({"a": few()}, (KeyClass(anything(CHARACTERS), few(True)),))
    frames = JsonFrames(algebra(shape), whitespace="compact")
    assert read(frames, OBJECT, '{"a') is not None
    assert read(frames, OBJECT, '{"a"') is None


def test_shapes_of_the_same_keys_share_their_automaton() -> None:
    two = ValueShapes(
        objects=(
            ObjectShape({"a": few(None), "b": few()}, (KeyClass(ANY_KEY, few(True)),)),
            ObjectShape({"a": few(True), "b": few(True)}, (KeyClass(ANY_KEY, few(None)),)),
        )
    )
    frames = JsonFrames(HandMade(object=two), whitespace="compact")
    state = read(frames, OBJECT, '{"')
    assert state is not None
    assert len(state.threads) == 2
    assert len({thread.terminal.dfa for thread in state.threads}) == 1
    assert accepted(frames, OBJECT, '{"b":true,"c":null,"a":true}')
    assert not accepted(frames, OBJECT, '{"b":true,"c":true}')
    assert accepted(frames, OBJECT, '{"c":true,"a":null}')


def test_a_key_is_compared_as_a_value_and_not_as_text() -> None:
    frames = JsonFrames(algebra(open_shape()), whitespace="default")
    assert read(frames, OBJECT, '{"x": true,"x"') is None
    assert accepted(frames, OBJECT, '{"x": true,\n "y":true}')


def test_keys_that_share_a_label_but_are_limited_in_number_end_before_the_dead_end() -> None:
    many = words(*(f"k{i}" for i in range(70)), "x")  # too many to be named one by one
    shape = ObjectShape({}, (KeyClass(many, few(True)),), minimum=2)
    frames = JsonFrames(algebra(shape), whitespace="compact")
    assert read(frames, OBJECT, '{"x":true,"k') is not None
    assert read(frames, OBJECT, '{"x":true,"x') is None, "no key but x begins so"


def test_a_class_without_a_key_left_is_not_offered() -> None:
    shape = ObjectShape({}, (KeyClass(words(*map(str, range(70))), few(True)),))
    frames = JsonFrames(algebra(shape), whitespace="compact")
    text = "{" + ",".join(f'"{i}":true' for i in range(70))
    assert accepted(frames, OBJECT, text + "}")
    assert read(frames, OBJECT, text + ",") is None


@pytest.mark.parametrize("bounds", [(70, None), (0, 3), (3, 3)])
def test_counts_of_pairs_are_exact_at_the_bounds(bounds) -> None:
    minimum, maximum = bounds
    frames = JsonFrames(algebra(open_shape(minimum=minimum, maximum=maximum)), whitespace="compact")
    for count in {minimum - 1, minimum, 0, maximum or 0, (maximum or 0) + 1} - {-1}:
        text = compact({f"k{i}": True for i in range(count)})
        fits = minimum <= count <= (count if maximum is None else maximum)
        assert accepted(frames, OBJECT, text) == fits


def test_a_witness_is_met_by_a_pair_of_an_open_class() -> None:
    starred = complement(from_words({"x": 1}, size=CHARACTERS))
    shape = ObjectShape(
        {},
        (KeyClass(anything(CHARACTERS), few(True, None)),),
        witnesses=(Witness(starred, few(None)),),
        maximum=2,
    )
    frames = JsonFrames(algebra(shape), whitespace="compact")
    assert accepted(frames, OBJECT, '{"y":null}')
    assert accepted(frames, OBJECT, '{"x":null,"y":null}')
    assert not accepted(frames, OBJECT, '{"x":null}')
    assert read(frames, OBJECT, '{"x":null,"y":t') is None, "the last pair must be the witness"


def test_keys_in_another_order_lead_to_the_same_state() -> None:
    frames = JsonFrames(algebra(open_shape()), whitespace="compact")
    one = read(frames, OBJECT, '{"a":null,"x":true,"y":true,')
    other = read(frames, OBJECT, '{"y":true,"a":null,"x":true,')
    assert one == other
    assert hash(one) == hash(other)


def test_a_required_key_is_forced_when_there_is_room_for_no_other() -> None:
    shape = open_shape(required=frozenset({"a"}), maximum=2)
    frames = JsonFrames(algebra(shape), whitespace="compact")
    assert read(frames, OBJECT, '{"x":true,"a":') is not None
    assert read(frames, OBJECT, '{"x":true,"y') is None


def test_objects_nest_without_end() -> None:
    shape = ObjectShape({"in": OBJECT}, ())
    frames = JsonFrames(algebra(shape), whitespace="compact")
    for depth in (0, 1, 50):
        assert accepted(frames, OBJECT, '{"in":' * depth + "{}" + "}" * depth)
        assert not accepted(frames, OBJECT, '{"in":' * depth + "{}" + "}" * (depth + 1))


def test_keys_with_quotes_and_other_alphabets_are_written_as_json_writes_them() -> None:
    shape = ObjectShape({'a"\\': few(None), "é": few(True)}, ())
    frames = JsonFrames(algebra(shape), whitespace="compact")
    assert texts_of(frames, OBJECT) == {
        compact(value)
        for value in objects([None, True], ['a"\\', "é"], 2)
        if algebra(shape).accepts(OBJECT, value)
    }


def test_a_key_that_has_no_utf8_form_cannot_occur() -> None:
    frames = JsonFrames(algebra(ObjectShape({"\ud800": few(None)}, ())))
    assert texts_of(frames, OBJECT) == {"{}"}


def test_an_object_that_requires_what_cannot_occur_has_no_text() -> None:
    for shape in (
        ObjectShape({"a": few()}, (), required=frozenset({"a"})),
        ObjectShape({"a": few(None)}, (), minimum=2),
        open_shape(minimum=3, maximum=2),
        open_shape(required=frozenset({"a"}), maximum=0),
    ):
        assert JsonFrames(algebra(shape)).start(OBJECT) is None
