"""JSON Schema to automaton: texts of exactly the values that fit, errors when it is compiled."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schema_strategies import OLD, documents, old_documents, values

from refllm.decode.grammar.automaton import accepting, step
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.validation import fits
from refllm.decode.grammar.schema import compile_schema

SPELLINGS = ({}, {"separators": (",", ":")}, {"indent": 1}, {"indent": "\t"})


def reads(automaton, text):
    state = automaton.start()
    for byte in text.encode():
        state = step(state, byte)
        if state is None:
            return False
    return accepting(state)


def compiled(schema, **options):
    """(automaton, None), or (None, error)."""
    try:
        return compile_schema(schema, **options)[0], None
    except GrammarError as error:
        return None, error


def accepts(automaton, value):
    """Whether the automaton reads a value, which must not depend on the spelling."""
    read = {reads(automaton, json.dumps(value, ensure_ascii=False, **how)) for how in SPELLINGS}
    assert len(read) == 1
    return read.pop()


@pytest.mark.theorem(
    "An automaton reads json.dumps(value) exactly if the value fits the schema",
    source="JSON Schema 2020-12; the definition, validation.py",
)
@given(documents(), st.lists(values(), min_size=5, max_size=20))
def test_the_automaton_reads_exactly_the_values_that_fit(schema, instances):
    wanted = [fits(schema, value) for value in instances]
    automaton, error = compiled(schema)
    if automaton is not None:
        assert [accepts(automaton, value) for value in instances] == wanted
    elif error.keyword is None:
        assert "unsatisfiable" in str(error)
        assert not any(wanted)


@given(st.one_of([old_documents(dialect) for dialect in OLD]), st.lists(values(), min_size=9))
def test_automata_of_old_dialects_read_exactly_the_values_that_fit(schema, instances):
    automaton, error = compiled(schema)
    if automaton is None:
        assert error.keyword or not any(fits(schema, value) for value in instances)
        return
    for value in instances:
        assert accepts(automaton, value) == fits(schema, value)


@given(documents(), st.randoms(use_true_random=False))
def test_every_text_that_the_automaton_allows_can_be_completed_and_fits(schema, random):
    automaton, error = compiled(schema, whitespace="compact")
    if error is not None:
        return
    state = automaton.start()
    text = bytearray()
    for _ in range(60):
        following = {b: after for b in range(256) if (after := step(state, b)) is not None}
        if accepting(state) and (not following or random.random() < 0.3):
            break
        assert following, bytes(text)  # no dead end
        printable = [b for b in following if 32 <= b < 127]
        byte = random.choice(printable or sorted(following))
        text.append(byte)
        state = following[byte]
    if accepting(state):
        assert fits(schema, json.loads(text)), bytes(text)


ORDERED = {
    "properties": {"b": {"type": "integer"}, "a": {"type": "null"}, "c": {}},
    "required": ["a"],
    "additionalProperties": {"type": "boolean"},
}


def test_keys_come_in_any_order_or_in_the_order_of_definition():
    anyhow, _ = compile_schema(ORDERED)
    ordered, _ = compile_schema(ORDERED, order="schema")
    for text, in_order in [
        ('{"b": 1, "a": null}', True),
        ('{"a": null}', True),
        ('{"b": 1, "a": null, "c": 0, "x": true}', True),
        ('{"a": null, "b": 1}', False),
        ('{"x": true, "a": null}', False),
    ]:
        assert reads(anyhow, text)
        assert reads(ordered, text) == in_order


def test_a_key_never_comes_twice():
    automaton, _ = compile_schema({})
    assert reads(automaton, '{"a": 1, "b": 2}')
    assert not reads(automaton, '{"a": 1, "a": 2}')


def test_whitespace_is_what_json_dumps_writes():
    value = {"a": [1, {"b": None}], "c": {}}
    default, _ = compile_schema({})
    compact, _ = compile_schema({}, whitespace="compact")
    assert accepts(default, value)
    assert [reads(compact, json.dumps(value, **how)) for how in SPELLINGS] == [0, 1, 0, 0]
    assert not reads(default, '{"a" : 1}')
    assert not reads(default, ' {"a": 1}')


def test_notes_say_what_is_not_enforced():
    schema = {
        "format": "colour-of-the-year",
        "properties": {"a": {"requird": ["x"], "title": "T"}, "b": {"requird": []}},
        "dependencies": {"a": ["b"]},
    }
    _, notes = compile_schema(schema)
    assert len(notes) == 3
    assert all("not enforced" in note for note in notes)
    assert any("'colour-of-the-year'" in note for note in notes)
    assert any("'requird' at #/properties/" in note for note in notes)
    assert any("'dependencies' at # is not a keyword of 2020-12" in note for note in notes)
    draft7 = {**schema, "$schema": "http://json-schema.org/draft-07/schema#"}
    assert len(compile_schema(draft7)[1]) == 2
    assert len(compile_schema(schema, assert_formats=False)[1]) == 2


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"not": {}},
        {"enum": []},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2},
        {"allOf": [{"type": "object"}, {"type": "array"}]},
        {"type": "object", "required": ["a"], "properties": {"a": False}},
        {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}},  # no end
        {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "uniqueItems": True},
        {"const": "a", "pattern": "b"},
    ],
)
def test_a_schema_without_values_is_called_unsatisfiable(schema):
    with pytest.raises(GrammarError, match="unsatisfiable"):
        compile_schema(schema)


@pytest.mark.parametrize(
    ("schema", "keyword", "pointer"),
    [
        ({"properties": {"a": {"pattern": "(?<=x)y"}}}, "pattern", "#/properties/a"),
        ({"patternProperties": {"(a)\\1": {}}}, "patternProperties", "#"),
        ({"items": {"not": {"uniqueItems": True}}}, "uniqueItems", "#/items/not"),
        ({"properties": {"a": {"$ref": "http://x/y"}}}, "$ref", "#/properties/a"),
        ({"anyOf": [{"type": "strng"}]}, "type", "#/anyOf/0"),
        ({"$ref": "#"}, "$ref", "#"),
        ({"items": {"anyOf": [{"$ref": "#/items"}]}}, "$ref", "#/items"),
    ],
)
def test_what_cannot_be_enforced_is_an_error_with_pointer_and_keyword(schema, keyword, pointer):
    with pytest.raises(GrammarError) as caught:
        compile_schema(schema)
    assert (caught.value.keyword, caught.value.pointer) == (keyword, pointer)
    assert keyword in str(caught.value)
    assert pointer in str(caught.value)


def test_a_recursive_schema_needs_no_bound():
    tree = {"type": "array", "items": {"$ref": "#"}}
    automaton, _ = compile_schema(tree)
    assert reads(automaton, "[" * 300 + "]" * 300)
    assert not reads(automaton, "[" * 300 + "1" + "]" * 300)


def _required_chain(length):
    """Objects inside each other, one definition each."""
    chain = {
        str(i): {"properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}, "required": ["a"]}
        for i in range(length)
    }
    return {"$ref": "#/$defs/0", "$defs": {**chain, str(length): {"type": "null"}}}


HOSTILE = {
    "repetition": {"pattern": "a{1000000}"},
    "nested repetition": {"pattern": "(a{1000}){1000}"},
    "nondeterminism": {"pattern": "(a|b)*a(a|b){25}"},
    "long strings": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "long arrays": {"type": "array", "minItems": 10**6},
    "contains": {"type": "array", "contains": {"type": "null"}, "minContains": 10**6},
    "references": _required_chain(1000),
    "cases": {
        "allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(24)]
    },
    "dependencies": {"dependentRequired": {f"a{i}": [f"b{i}"] for i in range(24)}},
    "alternatives": {
        "oneOf": [{"properties": {"k": {"const": i}}, "required": ["k"]} for i in range(300)]
    },
    "constants": {"enum": list(range(200_000))},
    "words": {"enum": [f"word{i}" for i in range(100_000)]},
    "evaluated": {
        "anyOf": [{"properties": {f"a{i}": {}}} for i in range(18)],
        "unevaluatedProperties": False,
    },
    "patterns": {
        "patternProperties": {letter: {"minimum": i} for i, letter in enumerate("abcdefghijklmnop")}
    },
    "small steps": {"multipleOf": 1e-12},
    "large numbers": {"minimum": 10**400},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_compiles_or_ends_in_one_sentence_in_time(name):
    start = time.process_time()
    _, error = compiled(HOSTILE[name])
    assert time.process_time() - start < 10
    assert error is None or "\n" not in str(error)
