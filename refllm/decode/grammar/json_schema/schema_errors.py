"""Errors of schemas: each names the keyword, and the JSON Pointer of the schema that holds it."""

from __future__ import annotations

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.keyword_formulas import Derived
from refllm.decode.grammar.json_schema.shapes import NOTHING, Location


def pointer_of(location: Location) -> str:
    """The JSON Pointer of a location, or of the one that it was made from; "" if there is none."""
    while isinstance(location, Derived):
        location = location.source
    if location is None or (location, True) in NOTHING:
        return ""
    return str(location)


def unenforceable(location: Location, keyword: str, what: str) -> GrammarError:
    """The error of a keyword that cannot be enforced; ``what`` ends the sentence."""
    pointer = pointer_of(location)
    return GrammarError(
        f"{keyword} at {pointer} cannot be enforced: it {what}", keyword=keyword, pointer=pointer
    )


def located(error: GrammarError, location: Location) -> GrammarError:
    """An error that says which schema it is about."""
    if error.pointer is not None:
        return error
    pointer = pointer_of(location)
    place = pointer if error.keyword is None else f"{error.keyword} at {pointer}"
    return GrammarError(f"{place}: {error}", keyword=error.keyword, pointer=pointer)
