"""Which keys may occur in an object, one by one and by class."""

from __future__ import annotations

from hand_made_shapes import HandMade, few, words

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa_builders import anything
from refllm.decode.grammar.json_machine.object_keys import FEW_KEYS, keys_of
from refllm.decode.grammar.json_machine.object_table import ObjectTable
from refllm.decode.grammar.json_schema.shapes import KeyClass, ObjectShape, Witness

ANY_KEY = anything(CHARACTERS)


def table_of(**parts) -> ObjectTable:
    named = parts.pop("named", {})
    classes = parts.pop("classes", ())
    return ObjectTable(ObjectShape(named, classes, order=tuple(named)), HandMade(), "any")


def test_every_key_has_one_label() -> None:
    table = table_of(
        named={"a": few(None), "b": few(True), "never": few()},
        classes=(KeyClass(words("x", "y", "a"), few(None)), KeyClass(ANY_KEY, few(True))),
    )
    possible = [key.text for key in table.keys if key.possible]
    assert possible == ["a", "b", "x", "y"], "few keys are named"
    labels = [table.label_of(text) for text in ("a", "b", "x", "y", "z")]
    assert len({*labels}) == 5
    assert [table.key_of(label) for label in labels] == [0, 1, 3, 4, -1]
    assert table.label_of("never") == 0
    assert table.class_labels == labels[-1]
    assert table.moves(table.start).allowed & ~1 == sum(labels)


def test_a_class_of_many_keys_keeps_one_label_and_its_number() -> None:
    for count, classes in ((FEW_KEYS, 0), (FEW_KEYS + 1, 1)):
        keys = words(*(f"k{i}" for i in range(count)))
        table = table_of(named={"k0": few(True)}, classes=(KeyClass(keys, few(None)),))
        assert len(table.classes) == 0, "k0 is named, so one key fewer belongs to the class"
        table = table_of(classes=(KeyClass(keys, few(None)),))
        assert len(table.classes) == classes
        assert [found.words for found in table.classes] == [count] * classes
    label = table.label_of("k3")
    assert table.texts(label, FEW_KEYS) is None
    assert len(table.texts(label, FEW_KEYS + 1) or []) == FEW_KEYS + 1


def test_a_class_is_split_by_the_languages_of_the_witnesses() -> None:
    many = words(*(f"k{i}" for i in range(200)))
    half = words(*(f"k{i}" for i in range(100)))
    shape = ObjectShape(
        {"k0": few(None)},
        (KeyClass(many, few(True)),),
        witnesses=(Witness(half, few(True)), Witness(None, few(True)), Witness(words("k1"), few())),
    )
    keys, classes = keys_of(shape, HandMade(), "any")
    assert {key.text: key.serves for key in keys} == {"k0": 0b011, "k1": 0b111}
    assert {found.serves: found.words for found in classes} == {0b011: 98, 0b010: 100}
    assert all(found.keys.matches("k50") == (found.serves == 0b011) for found in classes)


def test_keys_stand_in_the_order_of_definition() -> None:
    shape = ObjectShape(
        {"b": few(None), "a": few(None), "c": few(None)},
        (KeyClass(words("x"), few(None)),),
        order=("c", "a", "b"),
    )
    keys, _ = keys_of(shape, HandMade(), "schema")
    assert [(key.text, key.rank) for key in keys] == [("c", 0), ("a", 1), ("b", 2), ("x", None)]
    assert all(key.rank is None for key in keys_of(shape, HandMade(), "any")[0])
