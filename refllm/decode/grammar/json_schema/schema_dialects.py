"""The dialects of JSON Schema: which keywords each of them has.

A schema names its dialect in ``$schema``. One that names none is read as draft 2020-12, and so is
one with an unknown URI of json-schema.org (a misspelled one, mostly). A schema inside another one
may name a dialect of its own.

| dialect | URI | what differs from its successor |
|---|---|---|
| draft-04 | ``http://json-schema.org/draft-04/schema#`` | ``id``; boolean ``exclusiveMinimum`` |
| draft-06 | ``http://json-schema.org/draft-06/schema#`` | no ``if`` |
| draft-07 | ``http://json-schema.org/draft-07/schema#`` | siblings of ``$ref`` are ignored |
| 2019-09 | ``https://json-schema.org/draft/2019-09/schema`` | ``items`` arrays, ``$recursiveRef`` |
| 2020-12 | ``https://json-schema.org/draft/2020-12/schema`` | the current one |

Sources: the specifications at https://json-schema.org/specification-links. Where they leave a
choice, the one of the ``jsonschema`` library (``_keywords.py``, ``_legacy_keywords.py``).

Left out: draft 3 and meta-schemas of one's own (``$vocabulary``), which are rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


def words(text: str) -> frozenset[str]:
    """The set of the words of a text."""
    return frozenset(text.split())


# Keywords whose value is one schema, a list of schemas, or an object of schemas.
ONE_SCHEMA = words(
    "additionalItems additionalProperties contains else if items not propertyNames then "
    "unevaluatedItems unevaluatedProperties"
)
SCHEMA_LISTS = words("allOf anyOf oneOf prefixItems")
SCHEMA_OBJECTS = words("dependentSchemas patternProperties properties")
DEFINITIONS = words("$defs definitions")  # schemas that only references apply

# Keywords that ask nothing of a value.
ANNOTATIONS = words(
    "$schema $id id $anchor $dynamicAnchor $recursiveAnchor $vocabulary $comment $defs definitions "
    "title description default examples example deprecated readOnly writeOnly "
    "contentEncoding contentMediaType contentSchema"
)

DRAFT4 = words(
    "$ref additionalItems additionalProperties allOf anyOf dependencies enum format items "
    "maxItems maxLength maxProperties maximum exclusiveMaximum minItems minLength "
    "minProperties minimum exclusiveMinimum multipleOf not oneOf pattern patternProperties "
    "properties required type uniqueItems"
)
DRAFT6 = DRAFT4 | {"const", "contains", "propertyNames"}
DRAFT7 = DRAFT6 | {"if", "then", "else"}
DRAFT2019 = (DRAFT7 - {"dependencies"}) | words(
    "$recursiveRef dependentRequired dependentSchemas minContains maxContains unevaluatedItems "
    "unevaluatedProperties"
)
DRAFT2020 = (DRAFT2019 - {"$recursiveRef", "additionalItems"}) | {"$dynamicRef", "prefixItems"}


@dataclass(frozen=True)
class Dialect:
    """One dialect: its name, its keywords that ask something of a value, and its old habits."""

    name: str
    keywords: frozenset[str]
    id_keyword: str = "$id"
    fragment_ids: bool = False  # "$id": "#name" is an anchor
    lone_ref: bool = False  # siblings of $ref are ignored
    item_lists: bool = False  # "items" may be a list; the rest is "additionalItems"
    boolean_bounds: bool = False  # "exclusiveMinimum" is a boolean
    exact_integers: bool = False  # 1.0 is not an integer


DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "draft-04",
            DRAFT4,
            id_keyword="id",
            fragment_ids=True,
            lone_ref=True,
            item_lists=True,
            boolean_bounds=True,
            exact_integers=True,
        ),
        Dialect("draft-06", DRAFT6, fragment_ids=True, lone_ref=True, item_lists=True),
        Dialect("draft-07", DRAFT7, fragment_ids=True, lone_ref=True, item_lists=True),
        Dialect("2019-09", DRAFT2019, item_lists=True),
        Dialect("2020-12", DRAFT2020),
    )
}
NEWEST = DIALECTS["2020-12"]
URIS: Mapping[str, str] = {  # without an empty fragment
    "http://json-schema.org/draft-03/schema": "draft-03",
    "http://json-schema.org/draft-04/schema": "draft-04",
    "http://json-schema.org/draft-06/schema": "draft-06",
    "http://json-schema.org/draft-07/schema": "draft-07",
    "https://json-schema.org/draft/2019-09/schema": "2019-09",
    "https://json-schema.org/draft/2020-12/schema": "2020-12",
}


def dialect_named(uri: object, otherwise: Dialect) -> Dialect | None:
    """The dialect of a ``$schema``, ``otherwise`` without one; None for one that is not known.

    >>> dialect_named("http://json-schema.org/draft-07/schema#", NEWEST).name
    'draft-07'
    >>> dialect_named("https://json-schema.org/draft-07/schema", NEWEST).name  # not its URI
    '2020-12'
    >>> dialect_named("https://example.com/mine", NEWEST) is None
    True
    """
    if not isinstance(uri, str):
        return otherwise
    name = URIS.get(uri.removesuffix("#"))
    if name is None:
        return otherwise if urlsplit(uri).hostname == "json-schema.org" else None
    return DIALECTS.get(name)
