"""Objects of a JSON Schema: keys, their values, counts of keys, dependencies.

Atoms, each with its opposite:

| atom | opposite |
|---|---|
| every key of a set has a value that fits S | some key of the set has a value that does not |
| a key is required | it is absent: every value of it fits no schema |
| the number of keys is in a range | it is below or above |

Left out: what a conjunction of them means (``object_conjunctions.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from refllm.decode.grammar.errors import about
from refllm.decode.grammar.json_schema.array_rules import NEVER, SignedLocation, opposite
from refllm.decode.grammar.json_schema.formulas import (
    Count,
    Evaluation,
    Formula,
    every,
    implies,
)
from refllm.decode.grammar.json_schema.key_sets import ALL_KEYS, KeySet, named
from refllm.decode.grammar.json_schema.shapes import Location
from refllm.decode.grammar.patterns import regex


@dataclass(frozen=True)
class Required:
    """The key occurs."""

    key: str

    def negated(self) -> Formula:
        """The key does not occur."""
        return Members(named(self.key), NEVER)


@dataclass(frozen=True)
class Members:
    """The value of every key of a set fits a schema. ``position`` orders keys by definition."""

    keys: KeySet
    schema: SignedLocation
    position: int = field(default=-1, compare=False)

    def negated(self) -> Formula:
        """Some key of the set has a value that does not fit."""
        key = self.keys.only()
        if key is None:
            return Member(self.keys, opposite(self.schema))
        if self.schema == NEVER:
            return Required(key)
        other = Members(self.keys, opposite(self.schema), self.position)
        return every((Required(key), other))


@dataclass(frozen=True)
class Member:
    """Some key of a set occurs, and its value fits a schema."""

    keys: KeySet
    schema: SignedLocation

    def negated(self) -> Formula:
        """No key of the set has such a value."""
        return Members(self.keys, opposite(self.schema))


@dataclass(frozen=True)
class EvaluatedKeys(Evaluation):
    """The keys of a set are evaluated."""

    keys: KeySet


def object_formula(keywords: Mapping[str, object], position: int) -> list[Formula]:
    """What the object keywords of a schema ask of an object.

    ``position`` is the number of the first key of ``properties`` in the order of definition.
    Schemas of dependencies and ``unevaluatedProperties`` are left to the algebra.
    """
    found: list[Formula] = []
    low = cast(int, keywords.get("minProperties", 0))
    high = cast("int | None", keywords.get("maxProperties"))
    if low or high is not None:
        found.append(Count(low, high))
    found.extend(Required(key) for key in cast("list[str]", keywords.get("required", [])))
    properties = cast("Mapping[str, Location]", keywords.get("properties", {}))
    patterns = cast("Mapping[str, Location]", keywords.get("patternProperties", {}))
    for i, (key, schema) in enumerate(properties.items()):
        found.append(Members(named(key), (schema, True), position + i))
    for pattern, schema in patterns.items():
        with about("patternProperties"):
            regex.from_pattern(pattern, search=True)
        found.append(Members(KeySet(bases=frozenset({pattern})), (schema, True)))
    known = KeySet(frozenset(properties), frozenset(patterns))
    if "additionalProperties" in keywords:
        found.append(Members(known.complement(), (keywords["additionalProperties"], True)))
        found.append(EvaluatedKeys(ALL_KEYS))
    elif not known.nothing:
        found.append(EvaluatedKeys(known))
    dependent = cast("Mapping[str, list[str]]", keywords.get("dependentRequired", {}))
    for key, others in dependent.items():
        found.append(implies(Required(key), every(Required(other) for other in others)))
    return found


def constant_object(value: Mapping[str, Location]) -> Formula:
    """The one object with these keys, each with the value of a schema (of a constant)."""
    parts: list[Formula] = [Members(named(*value).complement(), NEVER)]
    for position, (key, schema) in enumerate(value.items()):
        parts.append(Required(key))
        parts.append(Members(named(key), (schema, True), position))
    return every(parts)
