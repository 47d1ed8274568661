"""Nodes as threads: any JSON value, recursion, and what is kept."""

from __future__ import annotations

import json

import pytest
from hand_made_shapes import HandMade, accepted, compact, few, named, read
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa_builders import anything
from refllm.decode.grammar.automata.utf8 import to_bytes
from refllm.decode.grammar.automaton import accepting, step
from refllm.decode.grammar.json_machine.json_frames import JsonFrames
from refllm.decode.grammar.json_schema.shapes import (
    ArrayShape,
    KeyClass,
    NumberShape,
    ObjectShape,
    StringShape,
    ValueShapes,
)
from refllm.decode.grammar.patterns.regex import from_pattern

VALUE = named("value")
number = to_bytes(from_pattern(r"^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$", search=True))
ANY_VALUE = HandMade(
    value=ValueShapes(
        frozenset({"null", "true", "false"}),
        (StringShape(anything(CHARACTERS)),),
        (NumberShape(number),),
        (ArrayShape((), VALUE),),
        (ObjectShape({}, (KeyClass(anything(CHARACTERS), VALUE),)),),
    )
)
text = st.text(st.characters(codec="utf-8"), max_size=5)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
FRAMES = JsonFrames(ANY_VALUE)


@pytest.mark.theorem(
    "with all shapes of all types, whatever json.dumps writes is accepted", source="by enumeration"
)
@given(json_values, st.none() | st.integers(0, 4))
def test_any_value_is_accepted_in_every_style(value, indent) -> None:
    assert accepted(FRAMES, VALUE, json.dumps(value, ensure_ascii=False, indent=indent))


@given(json_values, st.data())
def test_what_is_accepted_can_be_read_by_json(value, data) -> None:
    written = json.dumps(value, ensure_ascii=False).encode()
    at = data.draw(st.integers(0, len(written) - 1))
    changed = data.draw(st.sampled_from([*b'{}[]",:0-.e\\ tn', None]))
    broken = written[:at] + (b"" if changed is None else bytes([changed])) + written[at + 1 :]
    state = FRAMES.start(VALUE)
    for byte in broken:
        state = None if state is None else step(state, byte)
    if state is not None and accepting(state):
        json.loads(broken)


@given(json_values)
def test_branching_from_a_state_does_not_change_it(value) -> None:
    state = FRAMES.start(VALUE)
    for byte in json.dumps(value, ensure_ascii=False).encode():
        assert state is not None
        for other in b'"]}1 ':
            step(state, other)
        state = step(state, byte)
    assert state is not None
    assert accepting(state)


def test_shapes_that_overlap_are_read_side_by_side() -> None:
    hand_made = HandMade(
        value=ValueShapes(
            arrays=(ArrayShape((few(1),), few(2)), ArrayShape((few(1, 3),), few(4), 2)),
            objects=(
                ObjectShape({"a": few(1)}, ()),
                ObjectShape({"a": few(2), "b": few(3)}, (), frozenset({"b"})),
            ),
        )
    )
    frames = JsonFrames(hand_made)
    for value, fits in {
        "[1, 2, 2]": True,
        "[1, 4]": True,
        "[3, 4, 4]": True,
        "[3]": False,
        "[1, 2, 4]": False,
        '{"a": 1}': True,
        '{"a": 2}': False,
        '{"a": 2, "b": 3}': True,
        '{"b": 3, "a": 2}': True,
        '{"a": 1, "b": 3}': False,
    }.items():
        assert accepted(frames, VALUE, value) == fits


def test_recursion_through_several_nodes_needs_no_unrolling() -> None:
    hand_made = HandMade(
        tree=ValueShapes(
            frozenset({"null"}),
            objects=(ObjectShape({"l": named("list"), "v": few(1)}, (), frozenset({"v"})),),
        ),
        list=ValueShapes(arrays=(ArrayShape((), named("tree"), 0, 2),)),
    )
    frames = JsonFrames(hand_made)
    value = None
    for _ in range(40):
        value = {"l": [value, None], "v": 1}
        assert accepted(frames, named("tree"), json.dumps(value))
    assert not accepted(frames, named("tree"), '{"l": [{"l": []}], "v": 1}')


def test_the_same_text_gives_the_same_state() -> None:
    one = read(FRAMES, VALUE, '[{"a": [1, {"b": "')
    other = read(FRAMES, VALUE, '[{"a":[1,{"b":"')
    assert one == other
    assert hash(one) == hash(other)


def test_a_node_is_expanded_once() -> None:
    asked = []

    class Counting(HandMade):
        def expand(self, node):
            asked.append(node)
            return super().expand(node)

    frames = JsonFrames(Counting(value=ValueShapes(arrays=(ArrayShape((), VALUE),))))
    assert accepted(frames, VALUE, compact([[], [[], []], [[[]]]]))
    assert asked == [VALUE]


def test_a_node_without_shapes_has_no_start() -> None:
    assert JsonFrames(HandMade(value=ValueShapes())).start(VALUE) is None
