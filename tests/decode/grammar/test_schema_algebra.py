"""The algebra of schemas against validation as the specification describes it."""

from __future__ import annotations

import pytest
from hypothesis import given, reject
from naive_schemas import VALUES, fits, node_accepts, schemas

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.schema_algebra import SchemaAlgebra
from refllm.decode.grammar.json_schema.schema_documents import SchemaDocument


def accepted(schema: object, values=VALUES) -> list:
    """The values that fit the shapes of a schema."""
    document = SchemaDocument(schema)
    algebra = SchemaAlgebra(document)
    start = algebra.start(document.root)
    return [value for value in values if node_accepts(algebra, start, value)]


def valid(schema: object, values=VALUES) -> list:
    """The values that are valid by definition."""
    document = SchemaDocument(schema)
    return [value for value in values if fits(document, document.root, value)]


@given(schemas())
@pytest.mark.theorem(
    "A value fits the shapes of a schema exactly where it is valid.",
    source="JSON Schema 2020-12, core and validation",
)
def test_shapes_accept_exactly_the_valid_values(schema) -> None:
    try:
        found = accepted(schema)
    except GrammarError as error:
        if error.keyword != "uniqueItems":
            raise
        reject()
    assert found == valid(schema)


def objects_of(schema: object) -> tuple:
    document = SchemaDocument(schema)
    algebra = SchemaAlgebra(document)
    return algebra.expand(algebra.start(document.root)).objects


def test_alternatives_that_exclude_each_other_do_not_multiply() -> None:
    """A discriminator, a required key against a forbidden one, or the type alone."""

    def one_of(count: int, **more) -> dict:
        return {
            "oneOf": [
                {"properties": {"kind": {"const": i}, "x": {"type": "string"}}, **more}
                for i in range(count)
            ]
        }

    assert len(objects_of({"type": "object", "required": ["kind"], **one_of(20)})) == 20
    assert len(objects_of(one_of(20, type="object", required=["kind"]))) == 20
    nested = {"properties": {"in": {"type": "object", "required": ["kind"], **one_of(9)}}}
    assert len(objects_of({"type": "object", **nested})) == 1
    apart = {"oneOf": [{"required": ["a"], "not": {"required": ["b"]}}, {"required": ["b"]}]}
    assert len(objects_of({"type": "object", **apart})) == 2
    if_chain = [
        {
            "if": {"properties": {"k": {"const": i}}, "required": ["k"]},
            "then": {"required": [f"r{i}"]},
        }
        for i in range(12)
    ]
    assert len(objects_of({"type": "object", "allOf": if_chain})) == 14


def test_a_witness_that_only_one_key_can_be_is_required() -> None:
    closed = {"properties": {"a": {}, "b": {}}, "additionalProperties": False, "type": "object"}
    (shape,) = objects_of({**closed, "not": {"properties": {"a": {"type": "string"}}}})
    assert (shape.required, shape.witnesses) == ({"a"}, ())
    (shape,) = objects_of({**closed, "not": {"additionalProperties": {"type": "string"}}})
    assert len(shape.witnesses) == 1
    closed["properties"]["b"] = False
    (shape,) = objects_of({**closed, "not": {"additionalProperties": {"type": "string"}}})
    assert (shape.required, shape.witnesses) == ({"a"}, ())


def test_keys_are_in_the_order_of_definition() -> None:
    (shape,) = objects_of(
        {
            "type": "object",
            "required": ["z"],
            "properties": {"c": {"type": "string"}, "a": {}},
            "allOf": [{"properties": {"b": {"type": "string"}, "a": {}}}],
        }
    )
    assert shape.order == ("c", "a", "b", "z")
    assert tuple(shape.named) == shape.order


def test_equal_nodes_have_the_same_shapes() -> None:
    document = SchemaDocument(
        {
            "$defs": {"a": {"type": "string", "minLength": 1}},
            "properties": {
                "x": {"$ref": "#/$defs/a"},
                "y": {"allOf": [{"$ref": "#/$defs/a"}]},
                "z": {"not": {"not": {"$ref": "#/$defs/a"}}},
            },
            "type": "object",
        }
    )
    algebra = SchemaAlgebra(document)
    (shape,) = algebra.expand(algebra.start(document.root)).objects
    assert len(set(shape.named.values())) == 1
    assert algebra.expand(shape.named["x"]) is algebra.expand(shape.named["z"])


def test_without_patterns_there_is_one_class_of_keys() -> None:
    (shape,) = objects_of({"type": "object", "properties": {"a": True}})
    assert [len(value) for _, value in shape.classes] == [0]
    (shape,) = objects_of({"type": "object", "patternProperties": {"^a": {"const": 1}}})
    matching = {value: keys.matches("ab") for keys, value in shape.classes}
    assert sorted(matching.values()) == [False, True]
    names = {"propertyNames": {"enum": ["a", "b"]}, "type": "object"}
    (shape,) = objects_of(names)
    assert set(shape.named) == {"a", "b"}, "a list of names needs no automaton"


@pytest.mark.parametrize(
    ("schema", "keyword", "pointer"),
    [
        (
            {
                "properties": {"a": {"type": "array", "not": {"uniqueItems": True}}},
                "required": ["a"],
            },
            "uniqueItems",
            "#/properties/a",
        ),
        (
            {
                "items": {
                    "allOf": [
                        {"anyOf": [{"required": [f"{i}{j}"]} for j in "abc"]} for i in range(12)
                    ]
                }
            },
            "allOf",
            "#/items",
        ),
        ({"properties": {"a": {"pattern": "(a"}}}, "pattern", "#/properties/a"),
        (
            {"properties": {"a": {"patternProperties": {"(a": {}}}}},
            "patternProperties",
            "#/properties/a",
        ),
        ({"contains": {"multipleOf": 0.123456789}}, "multipleOf", "#/contains"),
        ({"dependentRequired": {f"a{i}": [f"b{i}"] for i in range(20)}}, "dependentRequired", "#"),
    ],
)
def test_what_cannot_be_enforced_is_named(schema, keyword, pointer) -> None:
    document = SchemaDocument(schema)
    algebra = SchemaAlgebra(document)
    with pytest.raises(GrammarError) as raised:
        _expand_all(algebra, algebra.start(document.root))
    assert (raised.value.keyword, raised.value.pointer) == (keyword, pointer)
    assert keyword in str(raised.value)
    assert pointer in str(raised.value)


def _expand_all(algebra: SchemaAlgebra, start) -> None:
    """Expand every node that is reached from one."""
    found = {start}
    pending = [start]
    while pending:
        shapes = algebra.expand(pending.pop())
        inside = [node for shape in shapes.objects for node in shape.named.values()]
        inside += [each.value for shape in shapes.objects for each in shape.classes]
        for shape in shapes.arrays:
            inside += [*shape.prefix, shape.rest, *(count.value for count in shape.counts)]
        pending += [node for node in inside if node not in found]
        found.update(inside)
