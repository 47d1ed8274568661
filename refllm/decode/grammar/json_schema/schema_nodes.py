"""Nodes: sets of signed schemas, in a form in which equal ones are found to be equal.

Schemas that say nothing are left out, a schema beside its own negation makes a node ``NOTHING``,
and ``$ref``, ``not`` and lists of one schema that stand alone are followed, so that the schema
that is meant stands in the node.

Left out: equality of schemas that are written differently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

from refllm.decode.grammar.json_schema import array_rules
from refllm.decode.grammar.json_schema.keyword_formulas import Derived, Keywords
from refllm.decode.grammar.json_schema.shapes import NOTHING, Location, Node

LONGEST_CHAIN = 100  # of schemas that only refer to another; longer ones are left as they are
SignedLocation = tuple[Location, bool]


class Documents(Protocol):
    """Where schemas come from (``schema_documents.py``)."""

    def resolve(self, location: Location) -> Keywords | bool:
        """The keywords of a schema under their names of 2020-12, subschemas as locations.

        ``str(location)`` is its JSON Pointer.
        """
        ...


class SchemaNodes:
    """The nodes of the schemas of one document."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        self._canonical: dict[SignedLocation, SignedLocation] = {}

    def start(self, location: Location) -> Node:
        """The node of the values that fit the schema at a location."""
        return self.node([(location, True)])

    def node(self, schemas: Iterable[SignedLocation]) -> Node:
        """The node of schemas that hold together: ``NOTHING`` where two contradict each other."""
        found = frozenset(map(self.simplest, schemas)) - {array_rules.ALWAYS}
        if array_rules.NEVER in found:
            return NOTHING
        if len(found) > 1 and any((location, not sign) in found for location, sign in found):
            return NOTHING
        return found

    def simplest(self, schema: SignedLocation) -> SignedLocation:
        """An equal schema: past ``$ref``, ``not`` and ``allOf`` that stand alone."""
        known = self._canonical.get(schema)
        if known is not None:
            return known
        location, sign = schema
        for _ in range(LONGEST_CHAIN):
            keywords = self.keywords(location)
            if isinstance(keywords, bool):
                location, sign = array_rules.NEVER if keywords != sign else array_rules.ALWAYS
                break
            if not keywords:
                location, sign = array_rules.ALWAYS if sign else array_rules.NEVER
                break
            if len(keywords) != 1:
                break
            (key, value), *_ = keywords.items()
            if key == "$ref":
                location = value
            elif key == "not":
                location, sign = value, not sign
            elif key in ("allOf", "anyOf", "oneOf") and len(cast(list[Location], value)) == 1:
                location = cast(list[Location], value)[0]
            else:
                break
        self._canonical[schema] = location, sign
        return location, sign

    def keywords(self, location: Location) -> Keywords | bool:
        """The keywords of a schema."""
        if isinstance(location, Derived):
            return location.keywords
        if location == array_rules.NEVER[0]:
            return False
        return self.documents.resolve(location)
