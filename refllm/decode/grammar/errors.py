"""The one error of a grammar that cannot be compiled or cannot be enforced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from refllm.errors import InputError


class GrammarError(InputError):
    """A regular expression, grammar or JSON Schema that is malformed or cannot be enforced.

    ``keyword`` is the JSON Schema keyword at fault and ``pointer`` the JSON Pointer (RFC 6901)
    of the schema that holds it; both are None for grammars of other kinds.
    """

    def __init__(
        self, message: str, *, keyword: str | None = None, pointer: str | None = None
    ) -> None:
        super().__init__(message)
        self.keyword = keyword
        self.pointer = pointer


@contextmanager
def about(keyword: str) -> Iterator[None]:
    """A ``GrammarError`` raised inside is about this keyword, if it names none."""
    try:
        yield
    except GrammarError as error:
        error.keyword = error.keyword or keyword
        raise
