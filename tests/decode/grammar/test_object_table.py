"""Which keys may follow in an object: labels, pairs needed, states."""

from __future__ import annotations

import pytest
from hand_made_shapes import HandMade, few, words

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa_builders import anything
from refllm.decode.grammar.json_machine.object_table import ObjectTable
from refllm.decode.grammar.json_schema.shapes import KeyClass, ObjectShape, Witness

ANY_KEY = anything(CHARACTERS)


def table_of(order="any", **parts) -> ObjectTable:
    named = parts.pop("named", {})
    classes = parts.pop("classes", ())
    shape = ObjectShape(named, classes, order=tuple(named), **parts)
    return ObjectTable(shape, HandMade(), order)


def test_a_key_of_a_class_is_counted_without_its_text() -> None:
    table = table_of(classes=(KeyClass(ANY_KEY, few(None)),), maximum=2)
    label = table.class_labels
    one = table.after(table.start, label, "x", 0)
    other = table.after(table.start, label, "y", 0)
    assert one != other
    assert table.moves(one) is table.moves(other)
    full = table.after(one, label, "y", 0)
    assert full == table.after(other, label, "x", 0)
    assert table.moves(full).allowed == 1


@pytest.mark.parametrize(
    ("maximum", "fits"), [(0, False), (1, False), (2, True), (3, True), (None, True)]
)
def test_two_witnesses_that_no_pair_serves_together_need_two_pairs(maximum, fits) -> None:
    table = table_of(
        classes=(KeyClass(ANY_KEY, few(None, True)),),
        witnesses=(Witness(None, few(None)), Witness(None, few(True))),
        maximum=maximum,
    )
    assert table.feasible(table.start) == fits


def test_one_pair_can_serve_two_witnesses() -> None:
    table = table_of(
        classes=(KeyClass(ANY_KEY, few(None, True)),),
        witnesses=(Witness(None, few(None)), Witness(words("a"), few(None, True))),
        maximum=1,
    )
    assert table.feasible(table.start)
    [allowed] = table.moves(table.start).values
    assert allowed == table.label_of("a")


def test_a_required_key_serves_for_nothing_more() -> None:
    witness = Witness(None, few(None))
    for node, fits in ((few(None, True), True), (few(True), False)):
        table = table_of(
            named={"a": node},
            classes=(KeyClass(ANY_KEY, few(None)),),
            required=frozenset({"a"}),
            witnesses=(witness,),
            maximum=1,
        )
        assert table.feasible(table.start) == fits


def test_in_order_a_required_key_is_not_passed_and_passed_keys_do_not_return() -> None:
    table = table_of(
        "schema",
        named={"a": few(None), "b": few(None), "c": few(None)},
        classes=(KeyClass(ANY_KEY, few(None)),),
        required=frozenset({"b"}),
    )
    a, b, c, other = (table.label_of(text) for text in ("a", "b", "c", "zz"))
    assert table.moves(table.start).allowed == a | b
    after = table.after(table.start, b, None, 0)
    assert table.moves(after).allowed == c | other | 1
    assert table.moves(table.after(after, other, "zz", 0)).allowed == other | 1


def test_in_order_keys_that_the_minimum_needs_are_not_passed() -> None:
    table = table_of("schema", named={"a": few(None), "b": few(None), "c": few(None)}, minimum=2)
    a, b, c = (table.label_of(text) for text in "abc")
    assert table.moves(table.start).allowed == a | b
    assert table.moves(table.after(table.start, b, None, 0)).allowed == c
