"""Text that knows which of its characters a chat template wrote itself.

A chat template mixes its own control tokens with a user's words, and both are text::

    '<|im_start|>user\\n' + content + '<|im_end|>\\n'

Once they are joined, nothing tells the template's ``<|im_end|>`` from one that stands in the
content, and the user could end the turn and begin a system turn. So each string literal of a
template is a ``TemplateText``: a ``str`` with one byte per character that says whether a
literal wrote it. So is each text of a message, where no literal wrote anything. Joining,
slicing, stripping, splitting, replacing, changing case and formatting carry the bytes along.

Everything that is not listed here, and every method of a plain ``str``, returns a plain
``str``, whose characters count as the user's. So an operation that was forgotten can make a
template's control token ordinary text; it can never make a control token of the user's words.
And since a ``TemplateText`` equals, hashes and compares as the ``str`` that it is, a template
renders as it would without it.

| name        | meaning                                                              |
|-------------|----------------------------------------------------------------------|
| ``literal`` | a text that the template wrote                                       |
| ``written`` | bytes[characters]: 1 where a literal wrote the character, else 0     |
| ``concat``  | texts joined                                                         |
| ``runs``    | a text in runs of characters that literals wrote, or did not         |

Left out: ``center``, ``ljust``, ``zfill``, ``translate``, ``partition`` and iteration over
characters: the result is a plain ``str``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, SupportsIndex

__all__ = ["TemplateText", "concat", "literal", "runs", "written"]

# One conversion of a format string, in a group; or an escaped % or brace, in none
_PERCENT = re.compile(r"%%|(%(?:\([^)]*\))?[^%a-zA-Z]*[a-zA-Z])")
_BRACES = re.compile(r"\{\{|\}\}|(\{(?:[^{}]|\{[^{}]*\})*\})")
_PRIVATE_USE = range(0xE000, 0xF900)


class TemplateText(str):
    """A ``str`` and, for each character, whether a literal of the template wrote it.

    >>> text = literal("<|im_start|>") + "words" + literal("<|im_end|>")
    >>> text
    '<|im_start|>words<|im_end|>'
    >>> list(written(text[10:15]))
    [1, 1, 0, 0, 0]
    >>> type(literal("x").center(3)).__name__
    'str'
    """

    # a template cannot read names that begin with an underscore
    _written: bytes

    def __new__(cls, text: str = "", marks: bytes | None = None) -> TemplateText:
        """``marks``: a byte per character; None: nothing was written by a literal."""
        made = super().__new__(cls, text)
        made._written = bytes(len(made)) if marks is None else marks
        return made

    def __str__(self) -> str:
        return self  # not a plain copy, which ``str(text)`` would be

    # --- joining and taking apart -----------------------------------------------------------

    def __add__(self, other: str) -> TemplateText:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> TemplateText:
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> TemplateText:
        return TemplateText(super().__mul__(times), self._written * times)

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> TemplateText:
        part = super().__getitem__(key)  # first: its errors are those of a str
        marks = self._written[key if isinstance(key, slice) else slice(key, _after(key))]
        return TemplateText(part, marks)

    def join(self, parts: Iterable[str], /) -> TemplateText:
        """See ``str.join``."""
        listed = list(parts)
        with_self = chain.from_iterable((self, part) for part in listed[1:])
        return concat([*listed[:1], *with_self])

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """See ``str.replace``."""
        if not old:
            return super().replace(old, new, count)
        return TemplateText(new, written(new)).join(self.split(old, count))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        """See ``str.split``."""
        return self._cut(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        """See ``str.rsplit``."""
        return self._cut(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[Any]:
        """See ``str.splitlines``."""
        lines = []
        start = 0
        for line, whole in zip(
            super().splitlines(keepends), super().splitlines(keepends=True), strict=True
        ):
            lines.append(self[start : start + len(line)])
            start += len(whole)
        return lines

    def _cut(self, pieces: list[str], sep: str | None) -> list[TemplateText]:
        """The pieces of a split, in order, with their bytes."""
        cut = []
        start = 0
        for piece in pieces:
            if sep is None:  # only white space stands between pieces
                start = self.find(piece, start)
            cut.append(self[start : start + len(piece)])
            start += len(piece) + len(sep or "")
        return cut

    # --- white space, affixes and case --------------------------------------------------------

    def lstrip(self, chars: str | None = None, /) -> TemplateText:
        """See ``str.lstrip``."""
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> TemplateText:
        """See ``str.rstrip``."""
        return self[: len(super().rstrip(chars))]

    def strip(self, chars: str | None = None, /) -> TemplateText:
        """See ``str.strip``."""
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> TemplateText:
        """See ``str.removeprefix``."""
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> TemplateText:
        """See ``str.removesuffix``."""
        return self[: len(super().removesuffix(suffix))]

    def upper(self) -> str:
        """See ``str.upper``."""
        return self._recased(super().upper())

    def lower(self) -> str:
        """See ``str.lower``."""
        return self._recased(super().lower())

    def title(self) -> str:
        """See ``str.title``."""
        return self._recased(super().title())

    def capitalize(self) -> str:
        """See ``str.capitalize``."""
        return self._recased(super().capitalize())

    def _recased(self, text: str) -> str:
        # No character becomes none, so an equal length means one for one.
        return TemplateText(text, self._written) if len(text) == len(self) else text

    # --- formatting ---------------------------------------------------------------------------

    def __mod__(self, values: Any) -> str:
        return self.formatted(_PERCENT, lambda text: text % values)

    def formatted(self, conversions: re.Pattern[str], apply: Callable[[str], str]) -> str:
        """``apply(self)``, the values of the ``conversions`` being the user's.

        They are found by marking them in the format string with a character that does not
        occur elsewhere; a plain ``str`` where that changes the result.
        """
        plain = str.__str__(self)  # a plain copy
        result = apply(plain)
        used = set(plain + result)
        mark = next((chr(c) for c in _PRIVATE_USE if chr(c) not in used), None)
        if mark is None or 0 in self._written:
            return result
        pieces = apply(conversions.sub(lambda m: f"{mark}{m[0]}{mark}" if m[1] else m[0], plain))
        parts = pieces.split(mark)
        if "".join(parts) != result:
            return result
        return concat(part if i % 2 else literal(part) for i, part in enumerate(parts))

    def braces_formatted(self, apply: Callable[[str], str]) -> str:
        """``formatted`` with the conversions of ``str.format``."""
        return self.formatted(_BRACES, apply)


def literal(text: str) -> TemplateText:
    """A text whose characters a template wrote."""
    return TemplateText(text, b"\1" * len(text))


def written(text: str) -> bytes:
    """A byte per character: 1 where a literal wrote it, 0 elsewhere and in a plain ``str``."""
    return text._written if isinstance(text, TemplateText) else bytes(len(text))


def concat(parts: Iterable[str]) -> TemplateText:
    """The parts joined."""
    listed = list(parts)
    return TemplateText("".join(listed), b"".join(map(written, listed)))


def runs(text: str) -> Iterator[tuple[bool, str]]:
    """The text in runs: (whether literals wrote it, the run as a plain ``str``)."""
    plain = str.__str__(text)
    for run in re.finditer(rb"\x01+|\x00+", written(text)):
        yield run[0][0] == 1, plain[run.start() : run.end()]


def _after(key: SupportsIndex) -> int | None:
    """The end of the slice that holds the one item at ``key``: None after the last one."""
    return None if int(key) == -1 else int(key) + 1
