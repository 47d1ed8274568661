"""One schema as a formula, per JSON type: which values of the type its keywords allow.

The keywords of one type stand with that type (``string_rules.py``, ``number_rules.py``,
``array_rules.py``, ``object_rules.py``); here are ``type``, ``enum`` and ``const``, and the
keywords that apply other schemas to the same value: ``$ref``, ``allOf``, ``anyOf``, ``oneOf``,
``not``, ``if``, ``dependentSchemas``.

A *kind* is a JSON type, with ``true`` and ``false`` apart: "null", "true", "false", "string",
"number", "array", "object". Of the first three there is one value each, so that their formulas
have no atoms.

Left out: ``unevaluatedProperties`` and ``unevaluatedItems``, which need to know which
alternative holds (``schema_algebra.py``).
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from refllm.decode.grammar.json_schema.array_rules import Item, array_formula
from refllm.decode.grammar.json_schema.formulas import (
    FALSE,
    TRUE,
    Apply,
    Count,
    ExactlyOne,
    Formula,
    either,
    every,
    implies,
)
from refllm.decode.grammar.json_schema.number_rules import Integer, Values, number_formula
from refllm.decode.grammar.json_schema.object_rules import Required, constant_object, object_formula
from refllm.decode.grammar.json_schema.shapes import Location
from refllm.decode.grammar.json_schema.string_rules import Words, string_formula

KINDS = ("null", "true", "false", "number", "string", "array", "object")
TYPE_OF = {"true": "boolean", "false": "boolean"}  # of a kind; other kinds are types
Keywords = Mapping[str, object]


@dataclass(frozen=True)
class Derived:
    """The location of a schema that stands in no document; equal if ``identity`` is.

    ``source`` is the location that it was made from, for messages.
    """

    identity: Hashable
    keywords: Keywords = field(compare=False)
    source: Location = field(compare=False)


def constant(value: object, source: Location) -> Derived:
    """The location of ``{"const": value}``."""
    return Derived(("const", json.dumps(value, sort_keys=True)), {"const": value}, source)


def kind_of(value: object) -> str:
    """The kind of a JSON value.

    >>> [kind_of(each) for each in (None, True, 1, 1.5, "a", [], {})]
    ['null', 'true', 'number', 'number', 'string', 'array', 'object']
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "string"
    if isinstance(value, Mapping):
        return "object"
    return "array" if isinstance(value, Sequence) else "number"


def keyword_formula(keywords: Keywords, kind: str, location: Location, position: int) -> Formula:
    """The values of one kind that a schema allows, its ``unevaluated*`` left out.

    ``position`` numbers its ``properties`` (``object_formula``).
    """
    parts = [_types(keywords, kind)]
    if parts[0] == FALSE:
        return FALSE
    if "const" in keywords:
        parts.append(_constants([keywords["const"]], kind, location))
    if "enum" in keywords:
        parts.append(_constants(cast(Sequence[object], keywords["enum"]), kind, location))
    if FALSE in parts:
        return FALSE
    if kind == "string":
        parts.extend(string_formula(keywords))
    elif kind == "number":
        parts.extend(number_formula(keywords))
    elif kind == "array":
        parts.extend(array_formula(keywords))
    elif kind == "object":
        parts.extend(object_formula(keywords, position))
    parts.extend(_applied(keywords, kind))
    return every(parts)


def _types(keywords: Keywords, kind: str) -> Formula:
    """What ``type`` asks of a value of a kind."""
    allowed = keywords.get("type")
    if allowed is None:
        return TRUE
    types = [allowed] if isinstance(allowed, str) else cast(Sequence[str], allowed)
    if TYPE_OF.get(kind, kind) in types:
        return TRUE
    if kind == "number" and "integer" in types:
        return Integer(draft4=bool(keywords.get("integer_is_exact")))
    return FALSE


def _constants(values: Sequence[object], kind: str, location: Location) -> Formula:
    """The values of a kind that are equal to one of ``values``."""
    alike = [value for value in values if kind_of(value) == kind]
    if not alike:
        return FALSE
    if kind == "string":
        return Words(frozenset(cast("list[str]", alike)))
    if kind == "number":
        return Values(frozenset(cast("list[int | float]", alike)))
    if kind == "array":
        return either(_constant_array(cast(Sequence[object], v), location) for v in alike)
    if kind == "object":
        return either(
            constant_object({key: constant(each, location) for key, each in value.items()})
            for value in cast("list[Mapping[str, object]]", alike)
        )
    return TRUE


def _constant_array(value: Sequence[object], location: Location) -> Formula:
    """The one array with these items."""
    items = [Item(i, (constant(each, location), True)) for i, each in enumerate(value)]
    return every([Count(len(value), len(value)), *items])


def _applied(keywords: Keywords, kind: str) -> list[Formula]:
    """What the schemas ask that the keywords apply to the same value."""
    found: list[Formula] = []
    if "$ref" in keywords:
        found.append(Apply(keywords["$ref"]))
    found.extend(Apply(each) for each in cast(Sequence[Location], keywords.get("allOf", ())))
    if "anyOf" in keywords:
        found.append(either(Apply(x) for x in cast(Sequence[Location], keywords["anyOf"])))
    if "oneOf" in keywords:
        parts = tuple(Apply(each) for each in cast(Sequence[Location], keywords["oneOf"]))
        found.append(ExactlyOne(parts) if len(parts) > 1 else parts[0])
    if "not" in keywords:
        found.append(Apply(keywords["not"]).negated())
    if "if" in keywords:
        condition = Apply(keywords["if"])
        then = Apply(keywords["then"]) if "then" in keywords else TRUE
        other = Apply(keywords["else"]) if "else" in keywords else TRUE
        found.append(either((every((condition, then)), every((condition.negated(), other)))))
    if kind == "object":
        dependent = cast("Mapping[str, Location]", keywords.get("dependentSchemas", {}))
        found.extend(implies(Required(key), Apply(each)) for key, each in dependent.items())
    return found
