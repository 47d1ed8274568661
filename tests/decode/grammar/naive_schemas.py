"""JSON Schema as its specification says it, one value at a time; and shapes as their docstrings
do. Both are slow and simple: what ``test_schema_algebra.py`` compares.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Hashable, Iterator

from hypothesis import strategies as st

from refllm.decode.grammar.json_schema.shapes import ArrayShape, Node, ObjectShape, StringShape

# --- schemas ------------------------------------------------------------------------------


def frozen(value: object) -> Hashable:
    """A hashable form that is equal where JSON values are: 1 is 1.0, but not true."""
    if isinstance(value, dict):
        return "object", frozenset((key, frozen(each)) for key, each in value.items())
    if isinstance(value, list):
        return "array", tuple(map(frozen, value))
    kind = "bool" if isinstance(value, bool) else type(value).__name__.replace("float", "int")
    return kind, value


def types_of(value: object, *, exact: bool) -> set[str]:
    """The types of a value; ``exact``: 1.0 is no integer."""
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    if isinstance(value, float):
        return {"number"} if exact or value != math.floor(value) else {"integer", "number"}
    return {{str: "string", list: "array", dict: "object"}[type(value)]}


def fits(document, location, value) -> bool:
    """Whether a value fits the schema at a location of a ``SchemaDocument``."""
    return evaluate(document, location, value) is not None


def evaluate(document, location, value) -> set | None:
    """The keys or indices of a value that a schema evaluates; None if the value does not fit."""
    keywords = document.resolve(location)
    checks = [
        check(value, keywords[key], keywords) for key, check in CHECKS.items() if key in keywords
    ]
    if not all(checks):
        return None
    evaluated: set = set()
    for rule in (in_place, of_array, of_object):
        more = rule(document, keywords, value)
        if more is None:
            return None
        evaluated |= more
    for keyword, kind in (("unevaluatedProperties", dict), ("unevaluatedItems", list)):
        if keyword in keywords and isinstance(value, kind):
            places = set(value) if kind is dict else set(range(len(value)))
            inside = [value[place] for place in places - evaluated]
            if not all(fits(document, keywords[keyword], each) for each in inside):
                return None
            evaluated |= places
    return evaluated


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sized(kind, low):
    """The check of a limit on the length of a kind of values."""

    def check(value, limit, keywords):
        if not isinstance(value, kind):
            return True
        return len(value) >= limit if low else len(value) <= limit

    return check


def bounded(compare):
    """The check of a bound on numbers."""
    return lambda value, bound, keywords: not is_number(value) or compare(value, bound)


CHECKS = {
    "type": lambda v, types, k: bool(
        types_of(v, exact=k.get("integer_is_exact", False)) & set(types)
    ),
    "enum": lambda v, allowed, k: frozen(v) in map(frozen, allowed),
    "const": lambda v, constant, k: frozen(v) == frozen(constant),
    "minLength": sized(str, True),
    "maxLength": sized(str, False),
    "minItems": sized(list, True),
    "maxItems": sized(list, False),
    "minProperties": sized(dict, True),
    "maxProperties": sized(dict, False),
    "pattern": lambda v, p, k: not isinstance(v, str) or re.search(p, v) is not None,
    "minimum": bounded(lambda v, b: v >= b),
    "maximum": bounded(lambda v, b: v <= b),
    "exclusiveMinimum": bounded(lambda v, b: v > b),
    "exclusiveMaximum": bounded(lambda v, b: v < b),
    "multipleOf": bounded(lambda v, b: v % b == 0),
    "uniqueItems": lambda v, _, k: not isinstance(v, list) or len(set(map(frozen, v))) == len(v),
    "required": lambda v, keys, k: not isinstance(v, dict) or set(keys) <= set(v),
    "dependentRequired": lambda v, d, k: (
        not isinstance(v, dict) or all(set(d[key]) <= set(v) for key in d if key in v)
    ),
}


def in_place(document, keywords, value) -> set | None:
    """The schemas that apply to the same value."""
    evaluated: set = set()
    every = [*keywords.get("allOf", []), *([keywords["$ref"]] if "$ref" in keywords else [])]
    if isinstance(value, dict):
        dependent = keywords.get("dependentSchemas", {})
        every += [schema for key, schema in dependent.items() if key in value]
    if "if" in keywords:
        found = evaluate(document, keywords["if"], value)
        evaluated |= found or set()
        branch = "else" if found is None else "then"
        every += [keywords[branch]] if branch in keywords else []
    if "not" in keywords and fits(document, keywords["not"], value):
        return None
    for keyword in ("anyOf", "oneOf"):
        if keyword in keywords:
            found = [evaluate(document, each, value) for each in keywords[keyword]]
            good = [each for each in found if each is not None]
            if not good or (keyword == "oneOf" and len(good) > 1):
                return None
            evaluated = evaluated.union(*good)
    for each in every:
        found = evaluate(document, each, value)
        if found is None:
            return None
        evaluated |= found
    return evaluated


def of_array(document, keywords, value) -> set | None:
    """The schemas that apply to items."""
    if not isinstance(value, list):
        return set()
    prefix = keywords.get("prefixItems", [])
    evaluated = set(range(min(len(prefix), len(value))))
    applied = list(zip(prefix, value, strict=False))
    if "items" in keywords:
        applied += [(keywords["items"], each) for each in value[len(prefix) :]]
        evaluated = set(range(len(value)))
    if not all(fits(document, schema, each) for schema, each in applied):
        return None
    if "contains" in keywords:
        found = {i for i, each in enumerate(value) if fits(document, keywords["contains"], each)}
        least = keywords.get("minContains", 1)
        if not least <= len(found) <= keywords.get("maxContains", len(value)):
            return None
        evaluated |= found
    return evaluated


def of_object(document, keywords, value) -> set | None:
    """The schemas that apply to keys and their values."""
    if not isinstance(value, dict):
        return set()
    evaluated: set = set()
    for key, each in value.items():
        schemas = []
        if key in keywords.get("properties", {}):
            schemas.append(keywords["properties"][key])
        patterns = keywords.get("patternProperties", {})
        schemas += [schema for pattern, schema in patterns.items() if re.search(pattern, key)]
        if not schemas and "additionalProperties" in keywords:
            schemas.append(keywords["additionalProperties"])
        if not all(fits(document, schema, each) for schema in schemas):
            return None
        evaluated |= {key} if schemas else set()
    names = keywords.get("propertyNames")
    if names is not None and not all(fits(document, names, key) for key in value):
        return None
    return evaluated


# --- shapes -------------------------------------------------------------------------------


def node_accepts(expander, node: Node, value: object) -> bool:
    """Whether a value fits any shape of a node."""
    shapes = expander.expand(node)
    if value is None or isinstance(value, bool):
        return json.dumps(value) in shapes.literals
    if isinstance(value, str):
        return any(string_accepts(shape, value) for shape in shapes.strings)
    if isinstance(value, list):
        return any(array_accepts(expander, shape, value) for shape in shapes.arrays)
    if isinstance(value, dict):
        return any(object_accepts(expander, shape, value) for shape in shapes.objects)
    return any(shape.dfa.matches(json.dumps(value).encode()) for shape in shapes.numbers)


def in_range(count: int, minimum: int, maximum: int | None) -> bool:
    return minimum <= count and (maximum is None or count <= maximum)


def string_accepts(shape: StringShape, value: str) -> bool:
    return shape.dfa.matches(value) and in_range(len(value), shape.minimum, shape.maximum)


def array_accepts(expander, shape: ArrayShape, value: list) -> bool:
    """Whether an array fits a shape."""
    if not in_range(len(value), shape.minimum, shape.maximum):
        return False
    nodes = [*shape.prefix, *[shape.rest] * len(value)]
    if not all(
        node_accepts(expander, node, each) for node, each in zip(nodes, value, strict=False)
    ):
        return False
    if shape.unique and len(set(map(frozen, value))) < len(value):
        return False
    for count in shape.counts:
        inside = value[count.start :]
        found = [node_accepts(expander, count.value, each) for each in inside]
        assert found == [not node_accepts(expander, count.negation, each) for each in inside]
        if not in_range(sum(found), count.low, count.high):
            return False
    return True


def object_accepts(expander, shape: ObjectShape, value: dict) -> bool:
    """Whether an object fits a shape."""
    if not in_range(len(value), shape.minimum, shape.maximum) or shape.required - value.keys():
        return False
    for key, each in value.items():
        classes = [node for keys, node in shape.classes if keys.matches(key)]
        assert len(classes) == 1, "classes are a partition"
        if not node_accepts(expander, shape.named.get(key, classes[0]), each):
            return False
    return all(
        any(
            (witness.keys is None or witness.keys.matches(key))
            and node_accepts(expander, witness.value, each)
            for key, each in value.items()
        )
        for witness in shape.witnesses
    )


# --- small values and small schemas -------------------------------------------------------

KEYS = ["a", "b", "ab"]
SCALARS = [None, True, False, 0, 1, 1.0, 1.5, 2, 6, "", "a", "b", "ab", "aab"]


def small_values() -> Iterator[object]:
    """Scalars, and arrays and objects of a few of them."""
    yield from SCALARS
    few = [None, True, 0, 1, 1.5, "a", "ab"]
    yield []
    yield from ([each] for each in few)
    yield from ([x, y] for x, y in itertools.product([True, 1, "a", "ab"], repeat=2))
    yield from ([1, 1, "a"], ["a", 1, True], [[]], [[1], {}], [{"a": 1}], ["a", "a", "a"])
    yield {}
    for key in (*KEYS, "c"):
        yield from ({key: each} for each in few)
    for one, two in itertools.combinations(KEYS, 2):
        yield from ({one: x, two: y} for x, y in itertools.product([True, 1, "a"], repeat=2))
    yield from ({"a": {"a": 1}}, {"a": {}}, {"b": [1]}, {"a": {"b": "a"}, "b": {"a": True}})
    yield from (dict.fromkeys(KEYS, 1), {"a": 1, "b": "a", "ab": None, "c": 1})


VALUES = list(small_values())
keys = st.sampled_from(KEYS)
patterns = st.sampled_from(["a", "^a", "b$", "^a*$", "^.$"])
scalars = st.sampled_from(SCALARS)
constants = scalars | st.sampled_from([[], [1], ["a", 1], {}, {"a": 1}, {"a": {}, "b": "a"}])
types = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])
counts = st.integers(0, 2)


def keywords_of(schemas: st.SearchStrategy) -> st.SearchStrategy:
    """One keyword with its value, as a dictionary; its schemas are drawn from ``schemas``."""
    lists = st.lists(schemas, min_size=1, max_size=3)
    of_schemas = {
        **dict.fromkeys(["allOf", "anyOf", "oneOf", "prefixItems"], lists),
        **dict.fromkeys(
            [
                "not",
                "if",
                "then",
                "else",
                "items",
                "contains",
                "additionalProperties",
                "propertyNames",
                "unevaluatedProperties",
                "unevaluatedItems",
            ],
            schemas,
        ),
        **dict.fromkeys(
            ["properties", "dependentSchemas"], st.dictionaries(keys, schemas, max_size=2)
        ),
        "patternProperties": st.dictionaries(patterns, schemas, max_size=2),
    }
    plain = {
        "type": types | st.lists(types, min_size=1, max_size=3, unique=True),
        "enum": st.lists(constants, min_size=1, max_size=4),
        "const": constants,
        "required": st.lists(keys, max_size=2, unique=True),
        "dependentRequired": st.dictionaries(keys, st.lists(keys, max_size=2), max_size=2),
        "uniqueItems": st.just(True),
        "pattern": patterns,
        "multipleOf": st.sampled_from([1, 2, 3, 1.5]),
        **dict.fromkeys(
            ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"],
            st.sampled_from([0, 1, 1.5, 2]),
        ),
        **dict.fromkeys(
            [
                *("minLength", "maxLength", "minItems", "maxItems", "minProperties"),
                *("maxProperties", "minContains", "maxContains"),
            ],
            counts,
        ),
    }
    drawn = [
        values.map(lambda value, keyword=keyword: {keyword: value})
        for keyword, values in {**of_schemas, **plain}.items()
    ]
    return st.one_of(drawn)


def merged(parts: list[dict]) -> dict:
    return {key: value for part in parts for key, value in part.items()}


def schemas(depth: int = 2) -> st.SearchStrategy:
    """Random schemas of draft 2020-12, ``depth`` levels of subschemas deep."""
    leaves = st.booleans() | st.just({})
    found: st.SearchStrategy = leaves | st.fixed_dictionaries({"type": types})
    for _ in range(depth):
        found = st.lists(keywords_of(found), min_size=1, max_size=4).map(merged) | leaves
    return found
