"""JSON Schema → automaton: the public way, which joins the parts and checks the whole.

    schema ──SchemaDocument──▶ locations ──SchemaAlgebra──▶ shapes ──JsonFrames──▶ threads

``compile_schema`` walks everything that a text can reach, twice: first all schemas, so that
malformed ones and references that lead nowhere are found; then all nodes of the algebra, so that
whatever cannot be enforced is an error now, with its JSON Pointer and keyword, and not in the
middle of a text. Nothing is enforced approximately.

A schema that no value fits is an error that says "unsatisfiable".

| limit | of |
|---|---|
| ``SECONDS`` | time to compile |
| ``MOST_NODES`` | nodes of the algebra |
| ``dfa.MAX_STATES`` | states of one DFA |
| ``schema_documents.MAX_DEPTH`` | objects and arrays inside each other, in the schema |

Left out: annotations (``title``, ``default`` …) and keywords that are not known, which ask
nothing of a value; the latter are listed in the notes, unknown formats too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from refllm.decode.grammar.automaton import Automaton, State
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_machine.json_frames import JsonFrames
from refllm.decode.grammar.json_machine.json_text import Whitespace
from refllm.decode.grammar.json_machine.object_keys import Order
from refllm.decode.grammar.json_scalars.formats import format_rule
from refllm.decode.grammar.json_schema.schema_algebra import SchemaAlgebra
from refllm.decode.grammar.json_schema.schema_dialects import ANNOTATIONS, DIALECTS
from refllm.decode.grammar.json_schema.schema_documents import SchemaDocument, SchemaLocation
from refllm.decode.grammar.json_schema.schema_errors import located
from refllm.decode.grammar.json_schema.schema_keywords import IN_PLACE, schemas_in
from refllm.decode.grammar.json_schema.shapes import Location, Node

SECONDS = 10.0
MOST_NODES = 20_000


class SchemaAutomaton:
    """The texts of the JSON values that fit a schema (``Automaton``)."""

    def __init__(self, frames: JsonFrames, node: Node) -> None:
        self.frames = frames
        self.node = node

    def start(self) -> State | None:
        """The state before the first byte."""
        return self.frames.start(self.node)


def compile_schema(
    schema: object,
    *,
    order: Order = "any",
    whitespace: Whitespace = "default",
    assert_formats: bool = True,
) -> tuple[Automaton, tuple[str, ...]]:
    """The automaton of a JSON Schema, and notes about what it does not enforce.

    Parameters
    ----------
    schema
        a dict, a boolean, JSON text, or a pydantic model
    order
        ``"any"``: the keys of an object in any order; ``"schema"``: in the order of definition
    whitespace
        ``"default"``: what ``json.dumps`` writes with its default separators, compactly or with
        an indent; ``"compact"``: no whitespace
    assert_formats
        False makes ``format`` an annotation

    Raises
    ------
    GrammarError
        for a schema that is malformed, unsatisfiable, or cannot be enforced; one sentence with
        the keyword and the JSON Pointer of the schema at fault.

    >>> automaton, notes = compile_schema({"type": "string", "colour": "red"})
    >>> notes
    ("'colour' at # is not a keyword of 2020-12: it is not enforced",)
    """
    clock = _Clock(SECONDS)
    document = SchemaDocument(schema, assert_formats=assert_formats)
    try:
        locations = _reachable_schemas(document)
        algebra = SchemaAlgebra(document)
        node = algebra.start(document.root)
        if not algebra.inhabited(node):
            raise GrammarError("the JSON Schema is unsatisfiable: no JSON value fits it")
        frames = JsonFrames(algebra, order=order, whitespace=whitespace)
        _check_nodes(node, frames, clock)
    except GrammarError as error:
        if error.keyword is None or error.pointer is not None:
            raise
        raise located(error, document.root) from None
    except RecursionError:
        raise GrammarError(
            "the JSON Schema applies too many schemas inside each other: shorten its chains of "
            "$ref, allOf and properties"
        ) from None
    return SchemaAutomaton(frames, node), tuple(_notes(document, locations))


class _Clock:
    """Time that is left to compile."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise GrammarError when the time is over."""
        if time.monotonic() > self.end:
            raise GrammarError(
                f"the JSON Schema takes more than {self.seconds:g} s to compile: simplify its "
                "anyOf, oneOf, not and patternProperties"
            )


def _reachable_schemas(document: SchemaDocument) -> list[SchemaLocation]:
    """Every schema that the root applies, each checked; in the order of discovery.

    Raises GrammarError for a schema that applies itself to the same value.
    """
    found: dict[Location, None] = {document.root: None}
    pending = [document.root]
    in_place: dict[Location, list[Location]] = {}
    while pending:
        location = pending.pop()
        inside = list(schemas_in(document.resolve(location)))
        in_place[location] = [each for keyword, each in inside if keyword in IN_PLACE]
        for _, each in inside:
            if each not in found:
                found[each] = None
                pending.append(each)
    _reject_circles(in_place)
    return [location for location in found if isinstance(location, SchemaLocation)]


def _reject_circles(applied: Mapping[Location, list[Location]]) -> None:
    """Raise GrammarError if a schema is applied to the value that it is applied to already."""
    done: set[Location] = set()
    for first in applied:
        path: dict[Location, Iterator[Location]] = {}
        stack = [first] if first not in done else []
        while stack:
            location = stack[-1]
            following = path.setdefault(location, iter(applied[location]))
            for each in following:
                if each in path:
                    raise GrammarError(
                        f"$ref at {each}: the schema applies itself to the same value, by way "
                        f"of {location}",
                        keyword="$ref",
                        pointer=str(each),
                    )
                if each not in done:
                    stack.append(each)
                    break
            else:
                done.add(location)
                del path[location]
                stack.pop()


def _check_nodes(root: Node, frames: JsonFrames, clock: _Clock) -> None:
    """Expand every node that a text can reach, so that no error is left for later."""
    found = {root}
    pending = [root]
    while pending:
        clock.check()
        for node in _nodes_inside(pending.pop(), frames):
            if node not in found:
                found.add(node)
                pending.append(node)
        if len(found) > MOST_NODES:
            raise GrammarError(
                f"the JSON Schema combines its schemas in more than {MOST_NODES:,} ways: "
                "simplify its anyOf, oneOf, not and patternProperties"
            )


def _nodes_inside(node: Node, frames: JsonFrames) -> Iterator[Node]:
    """The nodes of the values inside the values of a node."""
    shapes = frames.shapes.expand(node)
    for array in shapes.arrays:
        yield from frames.array_text(array).table.nodes()
    for shape in shapes.objects:
        yield from frames.object_text(shape).table.nodes()


def _notes(document: SchemaDocument, locations: list[SchemaLocation]) -> Iterator[str]:
    """What is not enforced, once per keyword or format."""
    told: set[str] = set()
    for location in locations:
        keywords = DIALECTS[location.dialect].keywords
        for keyword, value in document.source(location).items():
            note = ""
            if keyword == "format" and document.assert_formats:
                if isinstance(value, str) and format_rule(value) is None:
                    keyword = value
                    note = f"format {value!r} at {location} is not known: it is not enforced"
            elif keyword not in keywords and keyword not in ANNOTATIONS:
                note = (
                    f"{keyword!r} at {location} is not a keyword of {location.dialect}: "
                    "it is not enforced"
                )
            if note and keyword not in told:
                told.add(keyword)
                yield note
