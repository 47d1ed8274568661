"""JSON Schema documents: references by pointer, anchor and URI, dynamic scope, limits."""

import json

import pytest

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.schema_documents import (
    FALSE,
    MAX_DEPTH,
    TRUE,
    SchemaDocument,
    read_schema,
)


def target(schema, *path):
    """What the ``$ref`` at a path of normalized keywords leads to."""
    document = SchemaDocument(schema)
    at = document.root
    for step in path:
        value = document.resolve(at)
        for key in step.split():
            value = value[int(key) if isinstance(value, list) else key]
        at = value
    return document, at


@pytest.mark.parametrize(
    "reference",
    [
        "#/$defs/a~1b%25",  # / as ~1, % as %25
        "#name",
        "http://x/y/inner.json",
        "inner.json#",
        "/y/inner.json#name2",
        "other.json#/$defs/deep",
        "#/$defs/other/$defs/deep",
    ],
)
def test_a_reference_leads_to_the_schema_that_it_names(reference):
    wanted = {"minimum": 7}
    schema = {
        "$id": "http://x/y/root.json",
        "$ref": reference,
        "$defs": {
            "a/b%": {**wanted, "$anchor": "name"},
            "inner": {**wanted, "$id": "inner.json", "$anchor": "name2"},
            "other": {"$id": "other.json", "$defs": {"deep": wanted}},
        },
    }
    document, at = target(schema, "$ref")
    assert document.resolve(at) == wanted


def test_a_pointer_is_relative_to_the_resource_around_it():
    schema = {
        "$defs": {"n": {"minimum": 1}},
        "properties": {
            "a": {"$id": "http://x/a", "$defs": {"n": {"minimum": 2}}, "$ref": "#/$defs/n"},
            "b": {"$ref": "#/$defs/n"},
        },
    }
    for key, bound in ("a", 2), ("b", 1):
        document, at = target(schema, f"properties {key}", "$ref")
        assert document.resolve(at) == {"minimum": bound}


@pytest.mark.parametrize("dialect", ["04", "06", "07"])
def test_old_dialects_ignore_what_stands_beside_a_reference(dialect):
    schema = {
        "$schema": f"http://json-schema.org/draft-{dialect}/schema#",
        "definitions": {"a": {"type": "string"}},
        "properties": {"x": {"$ref": "#/definitions/a", "minLength": 2, "$id": "z", "id": "z"}},
    }
    document, at = target(schema, "properties x")
    assert list(document.resolve(at)) == ["$ref"]
    newer = {**schema, "$schema": "https://json-schema.org/draft/2019-09/schema"}
    del newer["properties"]["x"]["$id"]  # it would count: the reference would be relative to it
    document, at = target(newer, "properties x")
    assert document.resolve(at)["minLength"] == 2


@pytest.mark.parametrize(("dialect", "keyword"), [("04", "id"), ("06", "$id"), ("07", "$id")])
def test_an_old_id_that_is_a_fragment_is_an_anchor(dialect, keyword):
    schema = {
        "$schema": f"http://json-schema.org/draft-{dialect}/schema#",
        "definitions": {"a": {keyword: "#here", "maximum": 3}},
        "properties": {"x": {"$ref": "#here"}},
    }
    document, at = target(schema, "properties x", "$ref")
    assert document.resolve(at) == {"maximum": 3}


def test_a_schema_inside_may_have_another_dialect():
    schema = {
        "properties": {
            "old": {
                "$schema": "http://json-schema.org/draft-04/schema#",
                "items": {"minimum": 1, "exclusiveMinimum": True},
            },
            "new": {"minimum": 1, "exclusiveMinimum": 2},
        }
    }
    document, at = target(schema, "properties old", "items")
    assert document.resolve(at) == {"exclusiveMinimum": 1}
    document, at = target(schema, "properties new")
    assert document.resolve(at) == {"minimum": 1, "exclusiveMinimum": 2}


TREE = {
    "$id": "http://x/strict",
    "$dynamicAnchor": "node",
    "$ref": "tree",
    "minProperties": 1,
    "$defs": {
        "tree": {
            "$id": "http://x/tree",
            "$dynamicAnchor": "node",
            "properties": {"child": {"$dynamicRef": "#node"}, "same": {"$ref": "#node"}},
        }
    },
}


def test_a_dynamic_reference_leads_to_the_outermost_anchor_on_the_way():
    document, at = target(TREE, "$ref", "properties child", "$ref")
    assert at == document.root
    document, at = target(TREE, "$ref", "properties same", "$ref")
    assert at.pointer == "#/$defs/tree"
    # reached from the tree alone, the same reference leads to the tree
    outside = {"$id": "http://x/all", "$ref": "tree", "$defs": {"s": TREE}}
    document, at = target(outside, "$ref", "properties child", "$ref")
    assert at.pointer == "#/$defs/s/$defs/tree"


def test_a_dynamic_reference_to_a_plain_anchor_is_an_ordinary_one():
    schema = json.loads(
        json.dumps(TREE).replace(
            '"$dynamicAnchor": "node", "properties"', '"$anchor": "node", "properties"'
        )
    )
    _, at = target(schema, "$ref", "properties child", "$ref")
    assert at.pointer == "#/$defs/tree"


def test_a_recursive_reference_leads_to_the_outermost_recursive_anchor():
    text = json.dumps(TREE).replace('"$dynamicAnchor": "node"', '"$recursiveAnchor": true')
    schema = json.loads(text.replace('"$dynamicRef": "#node"', '"$recursiveRef": "#"'))
    del schema["$defs"]["tree"]["properties"]["same"]
    schema["$schema"] = "https://json-schema.org/draft/2019-09/schema"
    document, at = target(schema, "$ref", "properties child", "$ref")
    assert at == document.root
    del schema["$defs"]["tree"]["$recursiveAnchor"]
    _, at = target(schema, "$ref", "properties child", "$ref")
    assert at.pointer == "#/$defs/tree"


def test_boolean_schemas_have_two_locations():
    schema = {"properties": {"a": True, "b": False, "c": {"$ref": "#/properties/b"}}}
    document = SchemaDocument(schema)
    properties = document.resolve(document.root)["properties"]
    assert properties["a"] == TRUE
    assert properties["b"] == FALSE
    assert document.resolve(properties["c"]) == {"$ref": FALSE}
    assert document.resolve(TRUE) == {}
    assert document.resolve(FALSE) == {"not": TRUE}
    assert SchemaDocument(False).root == FALSE


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("#/$defs/none", "nothing stands there"),
        ("#none", "nothing stands there"),
        ("#/enum/7", "nothing stands there"),
        ("http://elsewhere/x.json", "other documents"),
        ("http://json-schema.org/draft-07/schema#", "meta-schemas"),
        ("#/enum/0", "is not a schema"),
        (5, "not a string"),
    ],
)
def test_a_reference_that_leads_nowhere_is_rejected_by_name(reference, words):
    schema = {"properties": {"a": {"$ref": reference}}, "enum": [3]}
    document = SchemaDocument(schema)
    at = document.resolve(document.root)["properties"]["a"]
    with pytest.raises(GrammarError, match=words):
        document.resolve(at)


@pytest.mark.parametrize("uri", ["http://json-schema.org/draft-03/schema#", "https://me/mine"])
def test_a_dialect_that_is_not_known_is_rejected_by_name(uri):
    with pytest.raises(GrammarError, match="draft-04") as caught:
        SchemaDocument({"$schema": uri})
    assert (caught.value.keyword, caught.value.pointer) == ("$schema", "#")


def test_deep_documents_are_rejected_in_one_sentence():
    def nested(levels):
        schema = {}
        for _ in range(levels - 1):
            schema = {"not": schema}
        return schema

    assert read_schema(nested(MAX_DEPTH))
    with pytest.raises(GrammarError, match="levels deep"):
        read_schema(nested(MAX_DEPTH + 1))
    with pytest.raises(GrammarError, match="levels deep"):
        read_schema('{"not":' * 100_000 + "{}" + "}" * 100_000)
    with pytest.raises(GrammarError, match="levels deep"):
        read_schema(nested(100_000))


def test_a_schema_is_read_from_text_a_boolean_or_a_model():
    class Model:
        @classmethod
        def model_json_schema(cls):
            return {"type": "null"}

    assert read_schema('{"type": "null"}') == read_schema(Model) == {"type": "null"}
    assert read_schema("true") is True
    for wrong in "[]", "{", 5, None:
        with pytest.raises(GrammarError):
            read_schema(wrong)
