"""Whether one JSON value fits a schema: the definition, keyword by keyword.

The naive twin of ``schema_algebra.py``. It looks at a finished value, top down, where the algebra
must know which values *can* fit; so it is short, and says what each keyword means. A value that
fits comes with what was *evaluated* in it, the keys and items that some schema looked at, for
``unevaluatedProperties`` and ``unevaluatedItems``.

>>> fits({"type": "object", "required": ["a"]}, {"a": 1})
True
>>> fits({"properties": {"a": True}, "unevaluatedProperties": False}, {"b": 1})
False

Sources: JSON Schema core and validation, 2020-12; older dialects by ``schema_keywords.py``.

Left out: why a value does not fit; schemas that apply themselves to the same value without end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import cast

from refllm.array_types import Loose
from refllm.decode.grammar.json_scalars import formats
from refllm.decode.grammar.json_scalars.json_values import freeze
from refllm.decode.grammar.json_schema.schema_documents import FALSE, SchemaDocument
from refllm.decode.grammar.json_schema.schema_keywords import Keywords
from refllm.decode.grammar.json_schema.shapes import Location
from refllm.decode.grammar.patterns import regex

Locations = Mapping[str, Location]


@dataclass
class Evaluated:
    """The keys and the items of one value that schemas have looked at."""

    keys: set[str] = field(default_factory=set)
    items: set[int] = field(default_factory=set)

    def add(self, other: Evaluated | None) -> bool:
        """Take over what another schema evaluated; False if it did not fit."""
        if other is None:
            return False
        self.keys |= other.keys
        self.items |= other.items
        return True


def fits(schema: object, value: Loose, *, assert_formats: bool = True) -> bool:
    """Whether a JSON value, as ``json.loads`` returns it, fits a schema.

    Raises GrammarError for a malformed schema, where the value leads to it.
    """
    document = SchemaDocument(schema, assert_formats=assert_formats)
    return evaluate(document, document.root, value) is not None


def evaluate(document: SchemaDocument, location: Location, value: Loose) -> Evaluated | None:
    """What the schema at ``location`` evaluates in a value; None if the value does not fit."""
    if location == FALSE:
        return None
    keywords = document.resolve(location)
    if not (_type_fits(keywords, value) and _constants_fit(keywords, value)):
        return None
    if isinstance(value, str) and not _string_fits(keywords, value):
        return None
    if _is_number(value) and not _number_fits(keywords, value):
        return None
    found = Evaluated()

    def inside(where: Location, each: Loose) -> bool:
        return evaluate(document, where, each) is not None

    def same(where: Location) -> Evaluated | None:
        return evaluate(document, where, value)

    if not _applied(keywords, value, same, found):
        return None
    if isinstance(value, list) and not _items_fit(keywords, value, inside, found):
        return None
    if isinstance(value, dict) and not _members_fit(keywords, value, inside, found):
        return None
    return found


def _is_number(value: Loose) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _type_fits(keywords: Keywords, value: Loose) -> bool:
    """``type``."""
    if "type" not in keywords:
        return True
    types = cast(Sequence[str], keywords["type"])
    if value is None:
        return "null" in types
    if isinstance(value, bool):
        return "boolean" in types
    if _is_number(value):
        exact = "integer_is_exact" in keywords
        whole = isinstance(value, int) if exact else value == int(value)
        return "number" in types or (whole and "integer" in types)
    if isinstance(value, str):
        return "string" in types
    return ("array" if isinstance(value, list) else "object") in types


def _constants_fit(keywords: Keywords, value: Loose) -> bool:
    """``const`` and ``enum``."""
    frozen = freeze(value)
    if "const" in keywords and freeze(keywords["const"]) != frozen:
        return False
    allowed = cast("list[Loose]", keywords.get("enum", [value]))
    return any(freeze(each) == frozen for each in allowed)


def _string_fits(keywords: Keywords, value: str) -> bool:
    """``minLength``, ``maxLength``, ``pattern``, ``format``."""
    if not _counts(keywords, "Length", len(value)):
        return False
    if "pattern" in keywords and not _found(cast(str, keywords["pattern"]), value):
        return False
    rule = formats.format_rule(cast(str, keywords.get("format", "")))
    return rule is None or any(
        dfa.matches(value) and low <= len(value) and (high is None or len(value) <= high)
        for dfa, low, high in rule.accepted
    )


def _found(pattern: str, text: str) -> bool:
    """Whether a regular expression is found in a text."""
    dfa, low, high = regex.from_pattern_with_length(pattern)
    return dfa.matches(text) and low <= len(text) and (high is None or len(text) <= high)


def _number_fits(keywords: Keywords, value: int | float) -> bool:
    """Bounds and ``multipleOf``, in the exact arithmetic of the decimals as written."""
    checks: dict[str, Callable[[float, float], bool]] = {
        "minimum": lambda x, bound: x >= bound,
        "maximum": lambda x, bound: x <= bound,
        "exclusiveMinimum": lambda x, bound: x > bound,
        "exclusiveMaximum": lambda x, bound: x < bound,
        "multipleOf": lambda x, by: (Fraction(repr(x)) / Fraction(repr(by))).denominator == 1,
    }
    return all(
        check(value, cast(float, keywords[keyword]))
        for keyword, check in checks.items()
        if keyword in keywords
    )


def _applied(
    keywords: Keywords,
    value: Loose,
    same: Callable[[Location], Evaluated | None],
    found: Evaluated,
) -> bool:
    """The keywords that apply schemas to the value itself."""
    if "$ref" in keywords and not found.add(same(keywords["$ref"])):
        return False
    for each in cast(Sequence[Location], keywords.get("allOf", ())):
        if not found.add(same(each)):
            return False
    for keyword in ("anyOf", "oneOf"):
        if keyword in keywords:  # all alternatives evaluate, not only the first that fits
            parts = cast(Sequence[Location], keywords[keyword])
            fitting = sum([found.add(same(each)) for each in parts])
            if fitting == 0 or (fitting > 1 and keyword == "oneOf"):
                return False
    if "not" in keywords and same(keywords["not"]) is not None:
        return False
    if "if" in keywords:
        holds = found.add(same(keywords["if"]))
        then_or_else = "then" if holds else "else"
        if then_or_else in keywords and not found.add(same(keywords[then_or_else])):
            return False
    if isinstance(value, dict):
        for key, each in cast(Locations, keywords.get("dependentSchemas", {})).items():
            if key in value and not found.add(same(each)):
                return False
    return True


def _items_fit(
    keywords: Keywords,
    value: list[Loose],
    inside: Callable[[Location, Loose], bool],
    found: Evaluated,
) -> bool:
    """The keywords of arrays."""
    if not _counts(keywords, "Items", len(value)):
        return False
    if "uniqueItems" in keywords and len({freeze(each) for each in value}) < len(value):
        return False
    prefix = cast(Sequence[Location], keywords.get("prefixItems", ()))
    for index, (where, each) in enumerate(zip(prefix, value, strict=False)):
        found.items.add(index)
        if not inside(where, each):
            return False
    if "items" in keywords:
        found.items.update(range(len(value)))
        if not all(inside(keywords["items"], x) for x in value[len(prefix) :]):
            return False
    if "contains" in keywords:
        where = keywords["contains"]
        matching = [index for index, each in enumerate(value) if inside(where, each)]
        found.items.update(matching)
        if not _counts({"minContains": 1, **keywords}, "Contains", len(matching)):
            return False
    if "unevaluatedItems" in keywords:
        where = keywords["unevaluatedItems"]
        rest = [each for index, each in enumerate(value) if index not in found.items]
        found.items.update(range(len(value)))
        return all(inside(where, each) for each in rest)
    return True


def _members_fit(
    keywords: Keywords,
    value: dict[str, Loose],
    inside: Callable[[Location, Loose], bool],
    found: Evaluated,
) -> bool:
    """The keywords of objects."""
    if not _counts(keywords, "Properties", len(value)):
        return False
    if not all(key in value for key in cast(Sequence[str], keywords.get("required", ()))):
        return False
    dependent = cast(Mapping[str, Sequence[str]], keywords.get("dependentRequired", {}))
    if not all(other in value for key in dependent if key in value for other in dependent[key]):
        return False
    names = keywords.get("propertyNames")
    if names is not None and not all(inside(names, key) for key in value):
        return False
    properties = cast(Locations, keywords.get("properties", {}))
    patterns = cast(Locations, keywords.get("patternProperties", {}))
    known: set[str] = set()
    for key, each in value.items():
        schemas = [where for name, where in properties.items() if name == key]
        schemas += [where for pattern, where in patterns.items() if _found(pattern, key)]
        if schemas:
            known.add(key)
        if not all(inside(where, each) for where in schemas):
            return False
    found.keys |= known
    for keyword, done in (("additionalProperties", known), ("unevaluatedProperties", found.keys)):
        if keyword in keywords:
            where = keywords[keyword]
            if not all(inside(where, each) for key, each in value.items() if key not in done):
                return False
            found.keys.update(value)
    return True


def _counts(keywords: Keywords, what: str, count: int) -> bool:
    """``min…`` and ``max…`` of characters, items or keys."""
    most = cast("int | None", keywords.get(f"max{what}"))
    return cast(int, keywords.get(f"min{what}", 0)) <= count and (most is None or count <= most)
