"""How many values a node has, against all texts of its automaton."""

from __future__ import annotations

import json

import pytest
from hand_made_shapes import HandMade, few, named, texts_of, words
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa_builders import anything
from refllm.decode.grammar.json_machine import distinct
from refllm.decode.grammar.json_machine.json_frames import JsonFrames
from refllm.decode.grammar.json_scalars.json_values import Truth, freeze
from refllm.decode.grammar.json_schema.shapes import (
    ArrayShape,
    ItemCount,
    KeyClass,
    ObjectShape,
    StringShape,
    ValueShapes,
    Witness,
)

ANY_KEY = anything(CHARACTERS)
bits = few(True, False)
FINITE = {
    "bits": ValueShapes(literals=frozenset({"true", "false"})),
    "object": ValueShapes(
        objects=(
            ObjectShape(
                {"a": bits, "b": few(None)}, (KeyClass(words("x", "y"), few(1, "s")),), maximum=2
            ),
        )
    ),
    "ordered": ValueShapes(
        objects=(
            ObjectShape(
                {"b": bits, "a": bits},
                (KeyClass(words("c"), bits),),
                frozenset({"a"}),
                order=("b", "a"),
            ),
        )
    ),
    "witness": ValueShapes(
        objects=(ObjectShape({"a": bits, "b": bits}, (), witnesses=(Witness(None, few(True)),)),)
    ),
    "array": ValueShapes(arrays=(ArrayShape((few(1, 2),), bits, 1, 3),)),
    "unique": ValueShapes(arrays=(ArrayShape((), few(1, "x", None), 0, None, unique=True),)),
    "counted": ValueShapes(
        arrays=(ArrayShape((), bits, 0, 3, (ItemCount(few(True), few(False), 1, 2),)),)
    ),
    "short": ValueShapes(strings=(StringShape(words("", "a", "ab", "abc"), 1, 2),)),
    "nested": ValueShapes(
        arrays=(ArrayShape((named("bits"), named("array"))),),
        objects=(ObjectShape({"k": named("unique")}, ()),),
        literals=frozenset({"null"}),
    ),
}
FINITE["nested"] = ValueShapes(
    literals=frozenset({"null"}),
    arrays=(ArrayShape((named("bits"), named("array")), few(), 0, 2),),
    objects=(ObjectShape({"k": named("unique")}, ()),),
)


@pytest.mark.parametrize("order", ["any", "schema"])
@pytest.mark.parametrize("name", FINITE)
def test_the_values_of_a_node_are_those_of_its_texts(name, order) -> None:
    frames = JsonFrames(HandMade(**FINITE), whitespace="compact", order=order)
    texts = texts_of(frames, named(name))
    values = {freeze(json.loads(text)) for text in texts}
    assert frames.distinct.values(named(name), 1000) == values


def test_a_node_of_more_values_than_asked_for_has_no_list() -> None:
    many = few(*map(str, range(200)))
    frames = JsonFrames(HandMade())
    assert len(frames.distinct.values(many, 200) or ()) == 200
    assert frames.distinct.values(many, 3) is None, "128, the least limit, is exceeded"
    texts = frozenset(map(str, range(200)))
    assert frames.distinct.has_other(many, texts - {"7"})
    assert not frames.distinct.has_other(many, texts)


ENDLESS = {
    "strings": ValueShapes(strings=(StringShape(ANY_KEY),)),
    "letters": ValueShapes(strings=(StringShape(ANY_KEY, 0, 1),)),
    "long": ValueShapes(strings=(StringShape(ANY_KEY, 10**6, 10**6),)),
    "keys": ValueShapes(objects=(ObjectShape({}, (KeyClass(ANY_KEY, bits),)),)),
    "keyed": ValueShapes(objects=(ObjectShape({}, (KeyClass(ANY_KEY, bits),), minimum=10**6),)),
    "items": ValueShapes(arrays=(ArrayShape((), bits),)),
    "deep": ValueShapes(arrays=(ArrayShape((), few(1), 10**6),)),
    "itself": ValueShapes(frozenset({"null"}), objects=(ObjectShape({"in": named("itself")}, ()),)),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_and_recursive_nodes_are_answered_at_once(name) -> None:
    frames = JsonFrames(HandMade(**ENDLESS))
    assert frames.distinct.values(named(name), 1000) is None
    assert frames.distinct.has_other(named(name), frozenset({Truth.TRUE}))


@given(st.lists(st.lists(st.sampled_from("abcd"), unique=True), max_size=4), st.integers(0, 4))
def test_required_items_can_be_distinct_exactly_if_some_choice_is(prefix, minimum) -> None:
    shape = ArrayShape(tuple(few(*some) for some in prefix), few("a", "b"), minimum, unique=True)
    frames = JsonFrames(HandMade())
    table = frames.array_text(shape).table

    def some_choice(index: int, used: frozenset) -> bool:
        if index >= minimum:
            return True
        options = prefix[index] if index < len(prefix) else ["a", "b"]
        return any(some_choice(index + 1, used | {x}) for x in options if x not in used)

    assert frames.distinct.fillable(table, table.start) == some_choice(0, frozenset())


def test_a_hostile_shortage_of_values_is_given_up_in_time(monkeypatch) -> None:
    nodes = [few(*"abcdefgh")] * 8 + [few(*"abcdefgh")]
    shape = ArrayShape(tuple(nodes), few("z"), 20, unique=True)
    frames = JsonFrames(HandMade())
    table = frames.array_text(shape).table
    asked = []
    values = distinct.DistinctValues.values
    monkeypatch.setattr(
        distinct.DistinctValues, "values", lambda *given: asked.append(1) or values(*given)
    )
    assert frames.distinct.fillable(table, table.start), "unknown counts as possible"
    assert len(asked) <= distinct.MOST_SEARCHED + 1
