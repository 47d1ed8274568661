"""Separators, whitespace and keys: what ``json.dumps`` writes between the values."""

from __future__ import annotations

import json

import pytest
from hand_made_shapes import HandMade, accepted, named, read
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa_builders import anything
from refllm.decode.grammar.automata.utf8 import json_string
from refllm.decode.grammar.json_machine.json_frames import JsonFrames
from refllm.decode.grammar.json_machine.json_text import (
    CLOSE,
    ITEM,
    MOST_SPACES,
    MOST_TABS,
    colon_dfa,
    item_dfa,
    key_bytes,
    key_dfa,
)
from refllm.decode.grammar.json_schema.shapes import ArrayShape, KeyClass, ObjectShape, ValueShapes

VALUE = named("value")
KEYS = ["a", "b", 'q"é']


def hand_made() -> HandMade:
    """Any nesting of arrays and objects with the keys ``KEYS`` (one of a class) and null."""
    return HandMade(
        value=ValueShapes(
            literals=frozenset({"null"}),
            arrays=(ArrayShape((), VALUE),),
            objects=(
                ObjectShape({"a": VALUE, 'q"é': VALUE}, (KeyClass(anything(CHARACTERS), VALUE),)),
            ),
        )
    )


DEFAULT = JsonFrames(hand_made())
COMPACT = JsonFrames(hand_made(), whitespace="compact")
nested = st.recursive(
    st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=8,
)


@pytest.mark.theorem(
    "whatever json.dumps writes, with default separators, compactly, or with an indent of spaces "
    "or tabs, is accepted",
    source="Python json.dumps",
)
@given(nested, st.none() | st.integers(0, 8) | st.just("\t"))
def test_every_style_of_json_dumps_is_accepted(value, indent) -> None:
    assert accepted(DEFAULT, VALUE, json.dumps(value, ensure_ascii=False, indent=indent))
    assert accepted(DEFAULT, VALUE, json.dumps(value, ensure_ascii=False, separators=(",", ":")))


@given(nested)
def test_compact_accepts_the_compact_text_alone(value) -> None:
    compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert accepted(COMPACT, VALUE, compact)
    spaced = json.dumps(value, ensure_ascii=False)
    assert accepted(COMPACT, VALUE, spaced) == (spaced == compact)
    indented = json.dumps(value, ensure_ascii=False, indent=1)
    assert accepted(COMPACT, VALUE, indented) == (indented == compact)


@pytest.mark.parametrize(
    "text",
    [
        " null",
        "null ",
        "[ null]",
        "[null ]",
        "[null , null]",
        "[null,  null]",
        "[]\n",
        "[\n]",
        "{\n}",
        "{ }",
        '{"a" : null}',
        '{"a":  null}',
        '{"a":\nnull}',
        '{"b" : null}',
        '{"b":  null}',
        '{"a": null,  "b": null}',
        '{"a": null }',
        "[null,]",
        "[,null]",
        '{"a":null,}',
        '{,"a":null}',
        "[null,\r\nnull]",
        "[null,\n \tnull]",
        "[null,\n\n null]",
    ],
)
def test_other_whitespace_is_not_accepted(text) -> None:
    assert not accepted(DEFAULT, VALUE, text)


@pytest.mark.parametrize(("blank", "most"), [(" ", MOST_SPACES), ("\t", MOST_TABS)])
@pytest.mark.parametrize("text", ["[\n{}null]", "[null,\n{}null]", "[null\n{}]"])
@pytest.mark.parametrize("text_of_object", [False, True])
def test_an_indent_ends_at_its_bound(blank, most, text, text_of_object) -> None:
    if text_of_object:
        text = text.replace("[", "{{").replace("]", "}}").replace("null", '"a":null')
        text = text.replace('"a":null,\n{}"a"', '"a":null,\n{}"b"')
    assert accepted(DEFAULT, VALUE, text.format(""))
    assert accepted(DEFAULT, VALUE, text.format(blank * most))
    assert read(DEFAULT, VALUE, text.format(blank * (most + 1))) is None


def test_labels_say_which_key_was_read() -> None:
    others = json_string(anything(CHARACTERS))
    dfa = key_dfa(False, {b'"a"': 4, b'"b"': 8, b'"c"': 0}, others, "default")
    assert dfa.label(b', "a": ') == dfa.label(b',"a":') == 4
    assert dfa.label(b', "b": ') == 8
    assert dfa.label(b', "x"') == 1, "a key of a class ends at its quote, with the class's label"
    assert dfa.label(b', "a"') == 0
    assert dfa.label(b', "c"') == dfa.label(b', "c": ') == 0, "excluded"
    assert dfa.label(b"}") == CLOSE
    assert dfa.label(b"") == 0


def test_without_any_key_an_object_can_only_close() -> None:
    assert key_dfa(True, {}, None, "default").words(9) == [tuple(b"{}")]
    closing = key_dfa(False, {}, None, "default")
    assert closing.matches(b"}")
    assert not closing.step(closing.start, b","[0])


def test_separators_of_arrays_have_their_labels() -> None:
    for whitespace in ("default", "compact"):
        opening, following = item_dfa(True, whitespace), item_dfa(False, whitespace)
        assert (opening.label(b"["), opening.label(b"[]")) == (ITEM, CLOSE)
        assert (following.label(b","), following.label(b"]")) == (ITEM, CLOSE)
        assert (following.label(b", ") == ITEM) == (whitespace == "default")
        assert colon_dfa(whitespace).matches(b": ") == (whitespace == "default")
        assert colon_dfa(whitespace).matches(b":")


@given(st.text(st.characters(codec="utf-8")))
def test_a_key_is_written_as_json_dumps_writes_it(key) -> None:
    quoted = key_bytes(key)
    assert quoted is not None
    assert json.loads(quoted) == key
    assert quoted == json.dumps(key, ensure_ascii=False).encode()


def test_a_lone_surrogate_has_no_bytes() -> None:
    assert key_bytes("\ud800") is None
