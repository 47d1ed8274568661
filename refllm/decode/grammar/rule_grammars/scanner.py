"""Reading the text of a grammar from left to right, with the place of every error.

What the parsers of both syntaxes share: where they are, what comes next, and how an error says
where it is.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars.rules import MAX_DEPTH, Position

DIGITS = re.compile(r"[0-9]+")
MAX_REPEAT = 10**9  # counts above are mistakes


class Scanner:
    """A text and a place in it. ``blank`` says what separates words on a line: blanks, comments."""

    def __init__(self, text: str, blank: str) -> None:
        self.text = text
        self.offset = 0
        self.depth = 0  # of open groups
        self._lines = [0, *(found.end() for found in re.finditer("\n", text))]
        self._blank = re.compile(rf"(?:{blank})*")
        self._space = re.compile(rf"(?:{blank}|\s)*")

    @property
    def at_end(self) -> bool:
        return self.offset >= len(self.text)

    def position(self, offset: int | None = None) -> Position:
        """Line and column of an offset (default: of the current one)."""
        at = self.offset if offset is None else offset
        line = bisect_right(self._lines, at)
        return Position(line, at - self._lines[line - 1] + 1)

    def error(self, message: str, offset: int | None = None) -> GrammarError:
        """The error to raise: ``message`` with the place in the grammar."""
        return GrammarError(f"the grammar's {self.position(offset)}: {message}")

    def next_is(self, prefix: str) -> bool:
        return self.text.startswith(prefix, self.offset)

    def take(self, prefix: str) -> bool:
        """Whether ``prefix`` comes next; if so it is read."""
        if not self.next_is(prefix):
            return False
        self.offset += len(prefix)
        return True

    def expect(self, prefix: str, why: str) -> None:
        """Read ``prefix``, or raise."""
        if not self.take(prefix):
            raise self.error(f"expected {prefix!r} {why}, found {self.found()}")

    def peek(self, pattern: re.Pattern[str]) -> bool:
        """Whether ``pattern`` matches here."""
        return pattern.match(self.text, self.offset) is not None

    def match(self, pattern: re.Pattern[str]) -> str | None:
        """What ``pattern`` matches here, which is then read; None if it does not match."""
        found = pattern.match(self.text, self.offset)
        if found is None:
            return None
        self.offset = found.end()
        return found.group()

    def skip(self, *, lines: bool) -> None:
        """Read blanks and comments, and with ``lines`` the ends of lines."""
        self.match(self._space if lines else self._blank)

    @contextmanager
    def group(self, begin: int) -> Iterator[None]:
        """A group that began at the offset ``begin``: within it, lines may break anywhere."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"groups are nested deeper than {MAX_DEPTH}", begin)
        yield
        self.depth -= 1

    def skip_in_rule(self) -> None:
        """Read what separates the elements of a rule: ends of lines only within groups."""
        self.skip(lines=self.depth > 0)

    def found(self) -> str:
        """What comes next, for an error."""
        if self.at_end:
            return "the end of the grammar"
        if self.text[self.offset] in "\r\n":
            return "the end of the line"
        return repr(self.text[self.offset])

    def count(self, digits: str) -> int:
        """A count of repetitions, read from its digits."""
        if len(digits) > len(str(MAX_REPEAT)) or int(digits) > MAX_REPEAT:
            raise self.error(f"a count of more than {MAX_REPEAT:,} repetitions")
        return int(digits)

    def check_range(self, minimum: int, maximum: int | None) -> None:
        """Raise if no count is in the range."""
        if maximum is not None and maximum < minimum:
            raise self.error(f"a repetition of at least {minimum} and at most {maximum} times")
