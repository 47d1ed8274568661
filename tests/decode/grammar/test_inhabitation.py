"""Whether any value fits, against counting in a universe of few values; recursion."""

from __future__ import annotations

import pytest
from hypothesis import given, reject
from naive_schemas import VALUES, fits, schemas
from universes import UNIVERSE
from universes import VALUES as ALL_VALUES

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.schema_algebra import SchemaAlgebra
from refllm.decode.grammar.json_schema.schema_documents import SchemaDocument


def inhabited(schema: object) -> bool:
    document = SchemaDocument(schema)
    algebra = SchemaAlgebra(document)
    return algebra.inhabited(algebra.start(document.root))


def naively(schema: object, values) -> bool:
    document = SchemaDocument(schema)
    return any(fits(document, document.root, value) for value in values)


@given(schemas())
@pytest.mark.theorem(
    "A schema over finitely many values is called unsatisfiable exactly where none is valid.",
    source="least fixed point over the nodes of the schema",
)
def test_inhabited_means_that_some_value_fits(schema) -> None:
    try:
        found = inhabited({"allOf": [schema, UNIVERSE]})
    except GrammarError as error:
        if error.keyword != "uniqueItems":
            raise
        reject()
    assert found == naively(schema, ALL_VALUES)


@given(schemas())
def test_a_schema_that_some_value_fits_is_inhabited(schema) -> None:
    try:
        found = inhabited(schema)
    except GrammarError as error:
        if error.keyword != "uniqueItems":
            raise
        reject()
    assert found or not naively(schema, VALUES)


SELF = {"$ref": "#"}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "object", "required": ["a"], "properties": {"a": SELF}}, False),
        ({"type": ["object", "null"], "required": ["a"], "properties": {"a": SELF}}, True),
        ({"type": "object", "properties": {"a": SELF}}, True),
        ({"type": "array", "minItems": 1, "items": SELF}, False),
        ({"type": "array", "items": SELF}, True),
        ({"type": "array", "contains": SELF}, False),
        ({"type": "array", "contains": SELF, "minContains": 0}, True),
        ({"type": "object", "minProperties": 1, "additionalProperties": SELF}, False),
        ({"type": "object", "not": {"additionalProperties": {"not": SELF}}}, False),
        ({"anyOf": [{"type": "array", "prefixItems": [SELF], "minItems": 1}, {"const": 1}]}, True),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {
                    "a": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/b"}},
                    "b": {
                        "type": "object",
                        "required": ["k"],
                        "additionalProperties": {"$ref": "#/$defs/a"},
                    },
                },
            },
            False,
        ),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {
                    "a": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/b"}},
                    "b": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/c"}]},
                    "c": {"required": ["k"], "properties": {"k": {"const": 1}}, "type": "object"},
                },
            },
            True,
        ),
    ],
)
def test_recursion_that_never_ends_has_no_value(schema, expected) -> None:
    assert inhabited(schema) == expected


def test_nodes_that_depend_on_each_other_are_decided_together() -> None:
    definitions = {
        f"n{i}": {"type": "array", "minItems": 1, "items": {"$ref": f"#/$defs/n{(i + 1) % 9}"}}
        for i in range(9)
    }
    assert not inhabited({"$ref": "#/$defs/n0", "$defs": definitions})
    definitions["n5"] = {"type": "string"}
    assert inhabited({"$ref": "#/$defs/n6", "$defs": definitions})


def test_what_no_value_fits_is_left_out_of_the_shapes() -> None:
    document = SchemaDocument(
        {
            "anyOf": [
                {
                    "type": "object",
                    "required": ["a"],
                    "properties": {"a": SELF},
                    "minProperties": 2,
                },
                {"type": "array", "minItems": 1, "items": {"type": "array", "contains": SELF}},
                {"type": "string", "pattern": "^a$", "minLength": 2},
            ]
        }
    )
    algebra = SchemaAlgebra(document)
    shapes = algebra.expand(algebra.start(document.root))
    assert [*shapes.literals, *shapes.strings, *shapes.numbers] == []
    assert [*shapes.objects, *shapes.arrays] == [], "each needs a value that is one of them"
