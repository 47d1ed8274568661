"""``unevaluatedProperties`` and ``unevaluatedItems``: what counts as evaluated, case by case."""

from __future__ import annotations

import pytest
from naive_schemas import fits, node_accepts

from refllm.decode.grammar.json_schema.schema_algebra import SchemaAlgebra
from refllm.decode.grammar.json_schema.schema_documents import SchemaDocument

A, B = {"properties": {"a": True}}, {"properties": {"b": True}}
NO_KEYS, NO_ITEMS = {"unevaluatedProperties": False}, {"unevaluatedItems": False}
OBJECTS = [{}, {"a": 1}, {"b": 1}, {"a": 1, "b": 1}, {"a": "x", "b": 1, "c": 1}, {"c": "x"}]
ARRAYS = [[], [1], [1, 1], ["x", 1], [1, 1, 1], ["x", "x"], [1, "x", 1]]


@pytest.mark.parametrize(
    "schema",
    [
        {**A, **NO_KEYS},
        {"anyOf": [A, B], **NO_KEYS},
        {"required": ["a"], **A, "allOf": [{"anyOf": [A, B]}], **NO_KEYS},
        {"required": ["a"], **A, "allOf": [{"anyOf": [A, {**B, "required": ["b"]}]}], **NO_KEYS},
        {"oneOf": [{**A, "required": ["a"]}, {**B, "required": ["b"]}], **NO_KEYS},
        {"if": {**A, "required": ["a"]}, "then": B, "else": {"properties": {"c": True}}, **NO_KEYS},
        {"not": {"not": A}, **NO_KEYS},
        {"not": {"anyOf": [A, B], **NO_KEYS}},
        {"dependentSchemas": {"a": B}, **A, **NO_KEYS},
        {"allOf": [{**A, "additionalProperties": {"type": "integer"}}], **NO_KEYS},
        {"allOf": [{**A, "unevaluatedProperties": {"type": "integer"}}], **NO_KEYS},
        {"patternProperties": {"^[ab]": True}, "unevaluatedProperties": {"type": "string"}},
        {"anyOf": [A, B], "unevaluatedProperties": {"type": "integer"}},
        {"allOf": [{"prefixItems": [True]}, {"prefixItems": [True, True]}], **NO_ITEMS},
        {
            "anyOf": [{"prefixItems": [{"const": 1}]}, {"prefixItems": [True, {"const": 1}]}],
            **NO_ITEMS,
        },
        {"items": {"type": "integer"}, **NO_ITEMS},
        {"contains": {"const": 1}, **NO_ITEMS},
        {"contains": {"const": 1}, "unevaluatedItems": {"type": "string"}},
        {"prefixItems": [True], "contains": {"const": "x"}, "minContains": 0, **NO_ITEMS},
        {"not": {"prefixItems": [True], **NO_ITEMS}},
        {"allOf": [{"prefixItems": [True], "unevaluatedItems": {"const": 1}}], **NO_ITEMS},
    ],
)
def test_exactly_what_is_not_evaluated_is_asked(schema) -> None:
    document = SchemaDocument(schema)
    algebra = SchemaAlgebra(document)
    start = algebra.start(document.root)
    judged = [fits(document, document.root, each) for each in OBJECTS + ARRAYS]
    assert [node_accepts(algebra, start, each) for each in OBJECTS + ARRAYS] == judged
    assert len(set(judged)) == 2
