"""All values of a node, against counting in a universe of few values."""

from __future__ import annotations

import pytest
from hypothesis import given, reject
from naive_schemas import fits, frozen, schemas
from universes import UNIVERSE
from universes import VALUES as ALL_VALUES

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema import finite_values
from refllm.decode.grammar.json_schema.finite_values import FiniteValues
from refllm.decode.grammar.json_schema.schema_algebra import SchemaAlgebra
from refllm.decode.grammar.json_schema.schema_documents import SchemaDocument


def values_of(schema: object, limit: int = 1000):
    document = SchemaDocument(schema)
    algebra = SchemaAlgebra(document)
    finite = FiniteValues(algebra, algebra.inhabited, limit)
    return finite.values(algebra.start(document.root))


@given(schemas())
@pytest.mark.theorem(
    "The values of a finite schema are listed once each, and it is given up exactly where it "
    "has as many as the limit.",
    source="definition",
)
def test_every_value_is_listed_once(schema) -> None:
    document = SchemaDocument(schema)
    count = len({frozen(v) for v in ALL_VALUES if fits(document, document.root, v)})
    both = {"allOf": [schema, UNIVERSE]}
    try:
        found = values_of(both)
        assert found is not None
        assert len(found) == len(set(found)) == count
        if count:
            assert values_of(both, count + 1) is not None
            assert values_of(both, count) is None
    except GrammarError as error:
        if error.keyword != "uniqueItems":
            raise
        reject()


@pytest.mark.parametrize(
    ("schema", "count"),
    [
        ({"enum": [1, 1.0, True, "1", [1], [1.0], {"a": 1}, {"a": True}]}, 6),
        ({"type": "integer", "minimum": 1, "maximum": 5}, 5),
        ({"type": "integer", "exclusiveMinimum": 0.5, "maximum": 2.5}, 2),
        ({"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 1}, 3),
        ({"type": "number", "multipleOf": 0.1, "minimum": 0.1, "exclusiveMaximum": 0.4}, 3),
        ({"type": "number", "minimum": 1.5, "maximum": 1.5}, 1),
        ({"type": "number", "minimum": 1, "maximum": 2}, None),
        ({"type": "integer", "minimum": 1}, None),
        ({"type": "integer", "minimum": 1, "maximum": 300}, 300),
        ({"type": "integer", "minimum": 1, "maximum": 10**9}, None),
        ({"type": "string", "pattern": "^[ab]{2}$"}, 4),
        ({"type": "string", "pattern": "^a*$", "maxLength": 3}, 4),
        ({"type": "string", "pattern": "^a*$"}, None),
        ({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, 7),
        ({"type": "array", "items": {"type": "boolean"}, "maxItems": 2, "minItems": 2}, 4),
        ({"type": "array", "items": {"type": "boolean"}, "maxItems": 3, "uniqueItems": True}, 5),
        ({"type": "array", "prefixItems": [{"type": "boolean"}], "items": False}, 3),
        ({"type": "array", "items": {"type": "boolean"}}, None),
        ({"type": "array", "maxItems": 0}, 1),
        ({"type": "object", "maxProperties": 0}, 1),
        ({"type": "object", "additionalProperties": {"type": "null"}}, None),
        ({"type": "object", "additionalProperties": {"not": {}}}, 1),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "boolean"}, "b": {"const": 1}},
                "required": ["b"],
                "additionalProperties": False,
            },
            3,
        ),
        (
            {
                "type": "object",
                "patternProperties": {"^[ab]$": {"type": "null"}},
                "additionalProperties": False,
                "minProperties": 1,
            },
            3,
        ),
        ({"type": ["null", "array"], "items": {"$ref": "#"}}, None),
        ({"type": ["null", "array"], "items": {"$ref": "#"}, "maxItems": 1}, None),
        ({"not": {}}, 0),
    ],
)
def test_counts_of_values(schema, count) -> None:
    found = values_of(schema)
    assert (None if found is None else len(found)) == count
    assert found is None or len(set(found)) == count


def test_items_run_out_exactly_at_their_number() -> None:
    def satisfiable(least: int) -> bool:
        document = SchemaDocument(
            {
                "type": "array",
                "uniqueItems": True,
                "items": {"enum": [1, 1.0, "a", [2]]},
                "minItems": least,
            }
        )
        algebra = SchemaAlgebra(document)
        return algebra.inhabited(algebra.start(document.root))

    assert [satisfiable(least) for least in (2, 3, 4)] == [True, True, False]


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "maxItems": 2, "items": {"type": "null"}, "contains": {}}, "contains"),
        (
            {
                "type": "object",
                "properties": {key: {"type": "null"} for key in "abcdefghijklmnop"},
                "additionalProperties": False,
            },
            "properties",
        ),
        ({"type": "array", "maxItems": 14, "items": {"type": "boolean"}}, "items"),
    ],
)
def test_what_is_not_counted_is_rejected_by_name(schema, keyword) -> None:
    with pytest.raises(GrammarError, match=keyword) as raised:
        values_of(schema, 10**6)
    assert raised.value.keyword == "uniqueItems"
    assert finite_values.MOST_COMBINATIONS == 10_000
