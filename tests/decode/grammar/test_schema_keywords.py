"""Normal form of keywords: old spellings are rewritten, wrong values rejected by name."""

import pytest

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.schema_documents import SchemaDocument
from refllm.decode.grammar.json_schema.schema_keywords import schemas_in

OLD = "http://json-schema.org/draft-0{}/schema#".format
D2019 = "https://json-schema.org/draft/2019-09/schema"


def keywords(schema, dialect=None, **options):
    """The keywords of a schema, with pointers for locations."""
    if dialect:
        schema = {"$schema": dialect, **schema}
    document = SchemaDocument(schema, **options)

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return getattr(value, "pointer", value)

    return plain(document.resolve(document.root))


@pytest.mark.parametrize("dialect", [OLD(4), OLD(6), OLD(7), D2019])
def test_items_lists_become_prefix_items(dialect):
    schema = {"items": [{}, {"a": 1}], "additionalItems": {"b": 1}}
    assert keywords(schema, dialect) == {
        "prefixItems": ["#/items/0", "#/items/1"],
        "items": "#/additionalItems",
    }
    # without a list, additionalItems means nothing
    single = {"items": {}, "additionalItems": {"b": 1}}
    assert keywords(single, dialect) == {"items": "#/items"}
    assert keywords({"additionalItems": {"b": 1}}, dialect) == {}


def test_prefix_items_are_of_the_newest_dialect_alone():
    schema = {"prefixItems": [{}], "items": {}, "additionalItems": {}}
    assert keywords(schema) == {"prefixItems": ["#/prefixItems/0"], "items": "#/items"}
    assert keywords(schema, D2019) == {"items": "#/items"}
    with pytest.raises(GrammarError, match="not a schema"):
        keywords({"items": [{}]})


def test_boolean_bounds_of_draft_4_become_numbers():
    schema = {"minimum": 1, "exclusiveMinimum": True, "maximum": 5, "exclusiveMaximum": False}
    assert keywords(schema, OLD(4)) == {"exclusiveMinimum": 1, "maximum": 5}
    assert keywords({"exclusiveMaximum": True}, OLD(4)) == {}
    assert keywords({"minimum": 1, "exclusiveMinimum": 0}) == {"minimum": 1, "exclusiveMinimum": 0}


@pytest.mark.parametrize("dialect", [OLD(4), OLD(6), OLD(7)])
def test_dependencies_are_split_by_kind(dialect):
    schema = {"dependencies": {"a": ["b", "c"], "d": {"type": "object"}, "e": []}}
    assert keywords(schema, dialect) == {
        "dependentRequired": {"a": ["b", "c"], "e": []},
        "dependentSchemas": {"d": "#/dependencies/d"},
    }
    assert keywords(schema, D2019) == {}


def test_keywords_of_later_dialects_mean_nothing_in_earlier_ones():
    schema = {
        "const": 1,
        "contains": {},
        "minContains": 2,
        "propertyNames": {},
        "if": {},
        "then": {},
        "dependentRequired": {},
        "unevaluatedItems": {},
    }
    have = [set(keywords(schema, each)) for each in (OLD(4), OLD(6), OLD(7), D2019)]
    assert have[0] == set()
    assert have[1] == {"const", "contains", "propertyNames"}
    assert have[2] == have[1] | {"if", "then"}
    assert have[3] == set(schema)


def test_one_is_an_integer_in_every_spelling_from_draft_6_on():
    assert keywords({"type": "integer"}, OLD(4)) == {"type": ["integer"], "integer_is_exact": True}
    assert keywords({"type": ["integer", "null"]}, OLD(6)) == {"type": ["integer", "null"]}


def test_then_and_else_mean_nothing_without_if():
    assert keywords({"then": {}, "else": {}}) == {}


def test_two_references_hold_together():
    schema = {"$ref": "#/$defs/a", "$dynamicRef": "#b", "allOf": [{}], "$defs": {"a": {}, "b": {}}}
    schema["$defs"]["b"]["$dynamicAnchor"] = "b"
    assert keywords(schema) == {"$ref": "#/$defs/a", "allOf": ["#/allOf/0", "#/$defs/b"]}


def test_formats_are_annotations_on_request():
    assert keywords({"format": "date"}) == {"format": "date"}
    assert keywords({"format": "date"}, assert_formats=False) == {}


def test_every_schema_inside_is_listed():
    schema = {
        "allOf": [{}],
        "properties": {"a": {}},
        "not": {},
        "$ref": "#/$defs/x",
        "$defs": {"x": {}},
    }
    document = SchemaDocument(schema)
    found = schemas_in(document.resolve(document.root))
    assert sorted((keyword, place.pointer) for keyword, place in found) == [
        ("$ref", "#/$defs/x"),
        ("allOf", "#/allOf/0"),
        ("not", "#/not"),
        ("properties", "#/properties/a"),
    ]


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("type", "strng"),
        ("type", [5]),
        ("type", ["any"]),
        ("required", True),
        ("required", [1]),
        ("enum", {"a": 1}),
        ("enum", [float("nan")]),
        ("const", {"a": [float("inf")]}),
        ("minLength", -1),
        ("maxItems", 1.5),
        ("minItems", True),
        ("minProperties", "1"),
        ("minimum", "3"),
        ("minimum", float("inf")),
        ("exclusiveMinimum", True),
        ("multipleOf", 0),
        ("pattern", 5),
        ("format", {}),
        ("uniqueItems", "yes"),
        ("allOf", []),
        ("anyOf", {}),
        ("oneOf", [5]),
        ("properties", [{}]),
        ("properties", {"a": 5}),
        ("patternProperties", True),
        ("not", []),
        ("items", 5),
        ("dependentRequired", {"a": "b"}),
        ("dependentSchemas", []),
        ("$ref", 5),
    ],
)
def test_a_wrong_value_is_rejected_with_pointer_and_keyword(keyword, value):
    document = SchemaDocument({"properties": {"x/y": {keyword: value}}})
    at = document.resolve(document.root)["properties"]["x/y"]
    with pytest.raises(GrammarError) as caught:
        document.resolve(at)
    assert caught.value.keyword == keyword
    assert caught.value.pointer.startswith("#/properties/x~1y")
    assert keyword in str(caught.value) or caught.value.pointer in str(caught.value)


@pytest.mark.parametrize("value", [3, 3.0])
def test_counts_are_integers_in_any_spelling(value):
    found = keywords({"minLength": value})["minLength"]
    assert found == 3
    assert type(found) is int
