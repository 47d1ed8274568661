"""JSON Schema documents: where each schema stands, what it is called, what references mean.

``SchemaDocument(schema)`` has a ``root`` location; ``resolve(location)`` returns the keywords of
the schema that stands there in one normal form (``schema_keywords.py``), in which every schema
inside it is a location again. So the algebra sees neither dialects nor references by name.

A location is a JSON Pointer (RFC 6901) in the document, with the dialect that applies there. A
schema that is ``false`` is at the location ``"false"`` wherever it stands.

References are resolved within the document: by pointer (``#/$defs/a``), by anchor (``#a``), and by
the URI of a schema with an ``$id``. ``$dynamicRef`` means the outermost schema resource on the way
to it that has the anchor (core, 8.2.3.2), so a location also carries the ambiguous dynamic anchors
of the resources through which it was reached; the same for ``$recursiveRef`` of 2019-09.

Sources: JSON Schema core 2020-12, sections 8.2 and 9; RFC 3986, section 5.2.

Left out: references to other documents, the meta-schemas included, which are rejected by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import unquote, urldefrag, urljoin

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.schema_dialects import (
    DEFINITIONS,
    DIALECTS,
    NEWEST,
    ONE_SCHEMA,
    SCHEMA_LISTS,
    SCHEMA_OBJECTS,
    URIS,
    Dialect,
    dialect_named,
)
from refllm.decode.grammar.json_schema.schema_keywords import Keywords, normal_form
from refllm.decode.grammar.json_schema.shapes import Location

MAX_DEPTH = 256  # of objects and arrays inside each other
FALSE: Location = "false"
TRUE: Location = "true"
RECURSIVE = ""  # the name of the one anchor of 2019-09's $recursiveRef


class SchemaLocation(NamedTuple):
    """Where a schema stands, and what applies to it from where it was reached."""

    pointer: str  # "#" is the whole document
    dialect: str
    scope: tuple[tuple[str, str], ...] = ()  # (dynamic anchor, pointer), outermost first

    def __str__(self) -> str:
        return self.pointer


def child(pointer: str, key: str | int) -> str:
    """The pointer to a member of what ``pointer`` points to.

    >>> child("#/properties", "a/b")
    '#/properties/a~1b'
    """
    return f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}"


def read_schema(schema: object) -> object:
    """The schema as plain JSON values: from a dict, a boolean, JSON text or a pydantic model.

    A pydantic model is anything with a method ``model_json_schema``. Raises GrammarError for text
    that is not JSON, for other objects, and for more than ``MAX_DEPTH`` levels.
    """
    to_schema = getattr(schema, "model_json_schema", None)
    if callable(to_schema):
        schema = to_schema()
    if isinstance(schema, str | bytes):
        try:
            schema = json.loads(schema)
        except RecursionError:
            raise _too_deep() from None
        except ValueError as error:
            raise GrammarError(f"the JSON Schema is not JSON: {error}") from None
    if not isinstance(schema, Mapping | bool):
        kind = type(schema).__name__
        raise GrammarError(f"a JSON Schema is an object or a boolean, not {kind}")
    level: list[object] = [schema]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        level = [x for each in level for x in _members(each) if isinstance(x, Mapping | list)]
    return schema


def _members(value: object) -> list[object]:
    """The values inside an object or array."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list) else []


def _too_deep() -> GrammarError:
    return GrammarError(
        f"the JSON Schema is nested more than {MAX_DEPTH} levels deep: name its parts in $defs"
    )


class SchemaDocument:
    """A JSON Schema whose schemas are addressed by location.

    ``assert_formats`` False makes ``format`` an annotation. Raises GrammarError, with pointer and
    keyword, for malformed schemas when they are resolved.
    """

    def __init__(self, schema: object, *, assert_formats: bool = True) -> None:
        self.contents = read_schema(schema)
        self.assert_formats = assert_formats
        self._resources: dict[str, str] = {"": "#"}  # base URI → pointer
        self._anchors: dict[tuple[str, str], str] = {}  # (base URI, name) → pointer
        self._dynamic: dict[str, dict[str, str]] = {}  # base URI → name → pointer
        self._bases: dict[str, str] = {}  # pointer → base URI of the schema there
        self._resolved: dict[Location, Keywords] = {FALSE: {"not": TRUE}, TRUE: {}}
        self._index()
        names = [name for anchors in self._dynamic.values() for name in anchors]
        self._ambiguous = {name for name in names if names.count(name) > 1}
        self.root: Location = self.locate("#", NEWEST.name)

    def resolve(self, location: Location) -> Keywords:
        """The keywords of the schema at ``location``, in normal form (``schema_keywords.py``)."""
        if location not in self._resolved:
            assert isinstance(location, SchemaLocation), location
            self._resolved[location] = normal_form(self.source(location), location, self)
        return self._resolved[location]

    def source(self, location: SchemaLocation) -> Mapping[str, object]:
        """The schema at ``location`` as it was written."""
        value = self._value(location.pointer)
        assert isinstance(value, Mapping)
        return value

    def locate(
        self, pointer: str, dialect: str, scope: tuple[tuple[str, str], ...] = ()
    ) -> Location:
        """The location of the schema at ``pointer``, reached from a schema of ``dialect``."""
        value = self._value(pointer)
        if isinstance(value, bool):
            return TRUE if value else FALSE
        if not isinstance(value, Mapping):
            raise GrammarError(
                f"{pointer} is not a schema: a schema is an object or a boolean",
                pointer=pointer,
            )
        found = self._dialect(value, pointer, DIALECTS[dialect])
        if self._ambiguous:
            known = dict(scope)
            for name, anchored in self._dynamic.get(self._base(pointer), {}).items():
                if name in self._ambiguous:
                    known.setdefault(name, anchored)
            scope = tuple(sorted(known.items()))
        return SchemaLocation(pointer, found.name, scope)

    def refer(self, location: SchemaLocation, keyword: str, reference: object) -> Location:
        """The location that a ``$ref``, ``$dynamicRef`` or ``$recursiveRef`` refers to."""
        if not isinstance(reference, str):
            raise GrammarError(
                f"{keyword} at {location} is not a string",
                keyword=keyword,
                pointer=location.pointer,
            )
        base, target = self._target(location, keyword, reference)
        name = urldefrag(reference).fragment
        if keyword == "$recursiveRef":
            name = RECURSIVE
        dynamic = keyword != "$ref" and self._dynamic.get(base, {}).get(name) == target
        if dynamic:
            target = dict(location.scope).get(name, target)
        try:
            return self.locate(target, location.dialect, location.scope)
        except GrammarError as error:
            raise GrammarError(
                f"{keyword} {reference!r} at {location}: {error}",
                keyword=keyword,
                pointer=location.pointer,
            ) from None

    def _target(self, location: SchemaLocation, keyword: str, reference: str) -> tuple[str, str]:
        """(base URI, pointer) of a reference, dynamic scope left out."""
        base = self._base(location.pointer)
        uri, fragment = base, reference[1:]
        if not reference.startswith("#"):
            uri, fragment = urldefrag(urljoin(base, reference))
        start = self._resources.get(uri)
        problem = "nothing stands there"
        if start is None:
            problem = "references to other documents are not followed: copy it into $defs"
            if uri in URIS:
                problem = "references to meta-schemas are not followed"
        elif not fragment:
            return uri, start
        elif fragment.startswith("/"):
            pointer = start
            for token in unquote(fragment[1:]).split("/"):
                pointer = child(pointer, token.replace("~1", "/").replace("~0", "~"))
            if self._value(pointer) is not None:
                return uri, pointer
        elif (uri, unquote(fragment)) in self._anchors:
            return uri, self._anchors[uri, unquote(fragment)]
        raise GrammarError(
            f"{keyword} {reference!r} at {location}: {problem}",
            keyword=keyword,
            pointer=location.pointer,
        )

    def _value(self, pointer: str) -> object:
        """What a pointer points to; None if there is nothing."""
        value: object = self.contents
        for token in pointer.split("/")[1:]:
            key = token.replace("~1", "/").replace("~0", "~")
            if isinstance(value, Mapping):
                value = value.get(key)
            elif isinstance(value, Sequence) and not isinstance(value, str) and key.isdecimal():
                value = value[int(key)] if int(key) < len(value) else None
            else:
                return None
        return value

    def _base(self, pointer: str) -> str:
        """The base URI at a pointer: that of the nearest known schema around it."""
        while pointer not in self._bases and pointer != "#":
            pointer = pointer.rpartition("/")[0]
        return self._bases.get(pointer, "")

    def _dialect(self, schema: Mapping[str, object], pointer: str, outer: Dialect) -> Dialect:
        """The dialect of a schema inside one of the dialect ``outer``."""
        found = dialect_named(schema.get("$schema"), outer)
        if found is None:
            raise GrammarError(
                f"$schema {schema['$schema']!r} at {pointer} is none of "
                f"{', '.join(DIALECTS)}: name one of them",
                keyword="$schema",
                pointer=pointer,
            )
        return found

    def _index(self) -> None:
        """Note the base URI, the name and the anchors of every schema of the document."""
        todo: list[tuple[str, object, str, Dialect]] = [("#", self.contents, "", NEWEST)]
        while todo:
            pointer, schema, base, outer = todo.pop()
            if not isinstance(schema, Mapping) or pointer in self._bases:
                continue
            dialect = self._dialect(schema, pointer, outer)
            name = schema.get(dialect.id_keyword)
            if isinstance(name, str) and not (dialect.lone_ref and "$ref" in schema):
                if name.startswith("#") and dialect.fragment_ids:
                    self._anchors.setdefault((base, name[1:]), pointer)
                else:
                    base = urljoin(base, name).removesuffix("#")
                    self._resources.setdefault(base, pointer)
            self._bases[pointer] = base
            self._note_anchors(schema, pointer, base)
            inside = _schemas_inside(schema, pointer)
            todo.extend((where, each, base, dialect) for where, each in inside)

    def _note_anchors(self, schema: Mapping[str, object], pointer: str, base: str) -> None:
        """Note the anchors of one schema."""
        for keyword in ("$anchor", "$dynamicAnchor"):
            name = schema.get(keyword)
            if isinstance(name, str):
                self._anchors.setdefault((base, name), pointer)
                if keyword == "$dynamicAnchor":
                    self._dynamic.setdefault(base, {}).setdefault(name, pointer)
        if schema.get("$recursiveAnchor") is True:
            self._dynamic.setdefault(base, {}).setdefault(RECURSIVE, pointer)


def _schemas_inside(schema: Mapping[str, object], pointer: str) -> list[tuple[str, object]]:
    """(pointer, schema) of the schemas directly inside one, of all dialects."""
    found: list[tuple[str, object]] = []
    for keyword, value in schema.items():
        where = child(pointer, keyword)
        if keyword in ONE_SCHEMA and not isinstance(value, list):
            found.append((where, value))
        elif isinstance(value, list) and (keyword in SCHEMA_LISTS or keyword == "items"):
            found.extend((child(where, i), each) for i, each in enumerate(value))
        elif isinstance(value, Mapping) and (
            keyword in SCHEMA_OBJECTS or keyword in DEFINITIONS or keyword == "dependencies"
        ):
            found.extend((child(where, key), each) for key, each in value.items())
    return found
