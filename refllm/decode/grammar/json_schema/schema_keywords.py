"""The keywords of one schema in one normal form, whatever its dialect.

The normal form is that of draft 2020-12, with a location in place of each schema:

| keyword | value |
|---|---|
| ``type`` | list of type names; ``integer_is_exact``: True if 1.0 is not an integer (draft 4) |
| ``const``, ``enum`` | as they are |
| ``minimum`` … ``multipleOf`` | numbers; draft 4's boolean exclusive bounds become numbers |
| ``minLength`` … ``maxContains`` | integers |
| ``pattern``, ``format`` | strings |
| ``uniqueItems`` | True, or left out |
| ``required``, ``dependentRequired`` | list of keys; key → list of keys |
| ``$ref``, ``items``, ``contains``, ``not``, ``if``, ``additionalProperties`` … | a location |
| ``allOf``, ``anyOf``, ``oneOf``, ``prefixItems`` | list of locations |
| ``properties``, ``patternProperties``, ``dependentSchemas`` | object of locations |

Older spellings are rewritten: ``items`` lists and ``additionalItems``, ``dependencies``;
``$dynamicRef`` and ``$recursiveRef`` become ``$ref`` (or ``allOf``, beside a ``$ref``). Keywords
that the dialect does not have are left out, and so are annotations.

Values of the wrong type raise GrammarError with the pointer and the keyword.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias, cast

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.schema_dialects import (
    DIALECTS,
    ONE_SCHEMA,
    SCHEMA_LISTS,
    SCHEMA_OBJECTS,
    Dialect,
    words,
)
from refllm.decode.grammar.json_schema.shapes import Location

if TYPE_CHECKING:
    from refllm.decode.grammar.json_schema.schema_documents import SchemaDocument, SchemaLocation

Keywords: TypeAlias = Mapping[str, object]

TYPES = words("array boolean integer null number object string")
COUNTS = words(
    "minLength maxLength minItems maxItems minProperties maxProperties minContains maxContains"
)
BOUNDS = words("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf")
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
# Keywords that apply schemas to the same value, not to a part of it.
IN_PLACE = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")


def normal_form(
    schema: Mapping[str, object], location: SchemaLocation, document: SchemaDocument
) -> Keywords:
    """The keywords of ``schema``, which stands at ``location``, in normal form."""
    return _Normalizer(schema, location, document).keywords()


def schemas_in(keywords: Keywords) -> Iterator[tuple[str, Location]]:
    """(keyword, location) of every schema that normalized keywords apply."""
    for keyword, value in keywords.items():
        if keyword == "$ref" or keyword in ONE_SCHEMA:
            yield keyword, value
        elif keyword in SCHEMA_LISTS:
            yield from ((keyword, each) for each in cast("list[Location]", value))
        elif keyword in SCHEMA_OBJECTS:
            yield from ((keyword, each) for each in cast("dict[str, Location]", value).values())


class _Normalizer:
    """One schema on the way to its normal form."""

    def __init__(
        self, schema: Mapping[str, object], location: SchemaLocation, document: SchemaDocument
    ) -> None:
        self.schema = schema
        self.location = location
        self.document = document
        self.dialect: Dialect = DIALECTS[location.dialect]

    def keywords(self) -> Keywords:
        """The normal form."""
        if self.dialect.lone_ref and self.schema.get("$ref") is not None:
            return {"$ref": self.document.refer(self.location, "$ref", self.schema["$ref"])}
        found: dict[str, object] = {}
        for keyword, value in self.schema.items():
            if keyword in self.dialect.keywords and keyword not in REFERENCES:
                self.add(found, keyword, value)
        if self.dialect.item_lists:
            self.split_items(found)
        if self.dialect.boolean_bounds:
            _number_bounds(found)
        if self.dialect.exact_integers and "type" in found:
            found["integer_is_exact"] = True
        if "if" not in found:
            found.pop("then", None)
            found.pop("else", None)
        self.add_references(found)
        return found

    def add(self, found: dict[str, object], keyword: str, value: object) -> None:
        """Check one keyword and add it, its schemas as locations."""
        if keyword in COUNTS:
            found[keyword] = self.count(keyword, value)
        elif keyword in BOUNDS:
            found[keyword] = self.bound(keyword, value)
        elif keyword == "items" and self.dialect.item_lists and isinstance(value, list):
            found["prefixItems"] = [self.schema_at(keyword, i) for i in range(len(value))]
        elif keyword in ONE_SCHEMA:
            found[keyword] = self.schema_at(keyword)
        elif keyword in SCHEMA_LISTS:
            self.expect(keyword, isinstance(value, list) and value, "a list of schemas")
            found[keyword] = [
                self.schema_at(keyword, i) for i in range(len(cast(list[object], value)))
            ]
        elif keyword in SCHEMA_OBJECTS:
            self.expect(keyword, isinstance(value, Mapping), "an object of schemas")
            found[keyword] = {k: self.schema_at(keyword, k) for k in cast(Keywords, value)}
        elif keyword == "dependencies":
            self.split_dependencies(found, value)
        elif keyword != "format" or self.document.assert_formats:
            self.add_simple(found, keyword, value)

    def add_simple(self, found: dict[str, object], keyword: str, value: object) -> None:
        """Check and add a keyword without schemas."""
        check, wanted = CHECKS[keyword]
        self.expect(keyword, check(value), wanted)
        if keyword == "type" and isinstance(value, str):
            value = [value]
        if keyword != "uniqueItems" or value:
            found[keyword] = value

    def count(self, keyword: str, value: object) -> int:
        """A number of characters, items or keys."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        ok = number and math.isfinite(cast(float, value)) and cast(float, value) >= 0
        ok = ok and cast(float, value) == int(cast(float, value))
        self.expect(keyword, ok, "a non-negative integer")
        return int(cast(float, value))

    def bound(self, keyword: str, value: object) -> object:
        """A bound of numbers, or a divisor."""
        if self.dialect.boolean_bounds and keyword.startswith("exclusive"):
            self.expect(keyword, isinstance(value, bool), "true or false")
            return value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        ok = number and (isinstance(value, int) or math.isfinite(cast(float, value)))
        self.expect(keyword, ok, "a number")
        if keyword == "multipleOf":
            self.expect(keyword, cast(float, value) > 0, "a positive number")
        return value

    def split_items(self, found: dict[str, object]) -> None:
        """``items`` and ``additionalItems`` of older dialects as ``prefixItems`` and ``items``."""
        rest = found.pop("additionalItems", None)
        if "prefixItems" in found and rest is not None:
            found["items"] = rest

    def split_dependencies(self, found: dict[str, object], value: object) -> None:
        """``dependencies`` as ``dependentRequired`` and ``dependentSchemas``."""
        self.expect("dependencies", isinstance(value, Mapping), "an object")
        keys: dict[str, list[str]] = {}
        schemas: dict[str, Location] = {}
        for key, each in cast(Keywords, value).items():
            if isinstance(each, list):
                self.expect("dependencies", _is_keys(each), "an object of lists of keys")
                keys[key] = each
            else:
                schemas[key] = self.schema_at("dependencies", key)
        if keys:
            found["dependentRequired"] = keys
        if schemas:
            found["dependentSchemas"] = schemas

    def add_references(self, found: dict[str, object]) -> None:
        """``$ref`` and its kind; a second one joins ``allOf``."""
        targets = [
            self.document.refer(self.location, keyword, self.schema[keyword])
            for keyword in REFERENCES
            if keyword in self.dialect.keywords and keyword in self.schema
        ]
        if targets:
            found["$ref"] = targets[0]
        if len(targets) > 1:
            found["allOf"] = [*cast("list[Location]", found.get("allOf", [])), *targets[1:]]

    def schema_at(self, *keys: str | int) -> Location:
        """The location of a schema inside this one."""
        pointer = self.location.pointer
        for key in keys:
            pointer = f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}"
        try:
            return self.document.locate(pointer, self.location.dialect, self.location.scope)
        except GrammarError as error:
            error.keyword = error.keyword or str(keys[0])
            raise

    def expect(self, keyword: str, ok: object, wanted: str) -> None:
        """Raise GrammarError unless a keyword has the right type of value."""
        if not ok:
            raise GrammarError(
                f"{keyword} at {self.location} must be {wanted}",
                keyword=keyword,
                pointer=self.location.pointer,
            )


def _number_bounds(found: dict[str, object]) -> None:
    """Draft 4's boolean ``exclusiveMinimum`` and ``exclusiveMaximum`` as numbers."""
    for side in ("Minimum", "Maximum"):
        exclusive = found.pop(f"exclusive{side}", False)
        bound = found.get(side.lower())
        if exclusive and bound is not None:
            found[f"exclusive{side}"] = found.pop(side.lower())


def _is_type(value: object) -> bool:
    if isinstance(value, str):
        return value in TYPES
    return isinstance(value, list) and all(isinstance(x, str) and x in TYPES for x in value)


def _is_keys(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_key_lists(value: object) -> bool:
    return isinstance(value, Mapping) and all(_is_keys(each) for each in value.values())


def _is_finite(value: object) -> bool:
    """Whether no number in a JSON value is infinite or NaN."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(_is_finite(each) for each in value.values())
    return all(_is_finite(each) for each in value) if isinstance(value, list) else True


# Keywords without schemas → (what their value must be, in words)
CHECKS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "type": (_is_type, f"a type or a list of types ({', '.join(sorted(TYPES))})"),
    "enum": (lambda x: isinstance(x, list) and _is_finite(x), "a list of JSON values"),
    "const": (_is_finite, "a JSON value"),
    "required": (_is_keys, "a list of keys"),
    "pattern": (lambda x: isinstance(x, str), "a regular expression"),
    "format": (lambda x: isinstance(x, str), "the name of a format"),
    "uniqueItems": (lambda x: isinstance(x, bool), "true or false"),
    "dependentRequired": (_is_key_lists, "an object of lists of keys"),
}
