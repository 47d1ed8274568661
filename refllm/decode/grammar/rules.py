"""Context-free rules as a syntax tree: what ``gbnf`` and ``lark`` read, and ``earley`` and
``context_free`` work on.

| node            | its texts                                                                |
|-----------------|--------------------------------------------------------------------------|
| `Literal`       | one text; with ``ignore_case`` also in other letter case                 |
| `Characters`    | any one character of some ranges                                         |
| `Pattern`       | what a regular expression matches as a whole                             |
| `Reference`     | the texts of the rule of that name                                       |
| `Concatenation` | one text of each item, one after the other; without items the empty text |
| `Alternatives`  | the texts of any of its options; without options there is none           |
| `Repetition`    | ``minimum`` to ``maximum`` (None: any number) texts of its item          |

A rule nests at most ``MAX_DEPTH`` groups, so that functions may recurse over its tree; rules may
refer to each other in chains of any length.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from refllm.decode.grammar.errors import GrammarError
from refllm.errors import did_you_mean

MAX_DEPTH = 64  # of groups within groups, in one rule
LAST_CHARACTER = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)  # code points that UTF-8 does not encode


class Position(NamedTuple):
    """Where something stands in the grammar's text; both count from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}"


@dataclass(frozen=True)
class Literal:
    """One text. ``ignore_case`` adds the other case of each letter, of ASCII letters in ASCII."""

    text: str
    ignore_case: bool = False


@dataclass(frozen=True)
class Characters:
    """One character: ``ranges`` of code points, both ends included, ascending and disjoint."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pattern:
    """A regular expression in Python's syntax; ``flags`` are of the letters i, m and s."""

    source: str
    flags: str
    position: Position = field(compare=False)


@dataclass(frozen=True)
class Reference:
    """The rule ``name``, and where it is referred to."""

    name: str
    position: Position = field(compare=False)


@dataclass(frozen=True)
class Concatenation:
    """The items, one after the other."""

    items: tuple[Expression, ...]


@dataclass(frozen=True)
class Alternatives:
    """Any one of the options."""

    options: tuple[Expression, ...]


@dataclass(frozen=True)
class Repetition:
    """``minimum`` to ``maximum`` items, one after the other; None: any number."""

    item: Expression
    minimum: int
    maximum: int | None


Expression: TypeAlias = (
    Literal | Characters | Pattern | Reference | Concatenation | Alternatives | Repetition
)

EMPTY = Concatenation(())  # the empty text
NOTHING = Alternatives(())  # no text at all


@dataclass(frozen=True)
class Rule:
    """``name`` derives ``body``; ``position`` is where the rule is defined."""

    name: str
    body: Expression
    position: Position


@dataclass(frozen=True)
class RuleSet:
    """The rules of a grammar by name, and the rule that its texts are derived from."""

    start: str
    rules: dict[str, Rule]


def repeated(item: Expression, minimum: int, maximum: int | None) -> Expression:
    """``minimum`` to ``maximum`` items. The operators ``?``, ``*`` and ``+`` of such an operator
    become one of them.

    >>> repeated(repeated(EMPTY, 1, None), 0, 1)
    Repetition(item=Concatenation(items=()), minimum=0, maximum=None)
    """
    if isinstance(item, Repetition):
        simple = ((0, 1), (0, None), (1, None))
        if (item.minimum, item.maximum) in simple and (minimum, maximum) in simple:
            bounded = maximum is not None and item.maximum is not None
            return Repetition(item.item, item.minimum * minimum, 1 if bounded else None)
    return Repetition(item, minimum, maximum)


def concatenation(items: list[Expression]) -> Expression:
    """The items one after the other, as few nodes as possible."""
    return items[0] if len(items) == 1 else Concatenation(tuple(items))


def alternatives(options: list[Expression]) -> Expression:
    """Any of the options, as few nodes as possible."""
    return options[0] if len(options) == 1 else Alternatives(tuple(options))


def children(node: Expression) -> tuple[Expression, ...]:
    """The nodes directly below this one."""
    match node:
        case Concatenation(items):
            return items
        case Alternatives(options):
            return options
        case Repetition(item):
            return (item,)
    return ()


def references(node: Expression) -> Iterator[Reference]:
    """Every reference in a tree, in the order of the text."""
    if isinstance(node, Reference):
        yield node
    for child in children(node):
        yield from references(child)


def is_character(code: int) -> bool:
    """Whether UTF-8 encodes this code point."""
    return code <= LAST_CHARACTER and not SURROGATES[0] <= code <= SURROGATES[1]


def missing_start(start: str, names: Iterable[str]) -> GrammarError:
    """The error of a grammar without its first rule."""
    near = did_you_mean(start, names)
    return GrammarError(f"the grammar has no rule {start!r}, from which texts are derived{near}")


def any_but(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The ranges of all characters that lie in none of ``ranges``; surrogates lie in no range.

    >>> any_but(((0, 96), (98, 0x10FFFF)))
    ((97, 97),)
    """
    found = []
    low = 0
    for first, last in normal_ranges([*ranges, SURROGATES]):
        if low < first:
            found.append((low, first - 1))
        low = last + 1
    if low <= LAST_CHARACTER:
        found.append((low, LAST_CHARACTER))
    return tuple(found)


def normal_ranges(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same characters in ascending ranges with gaps between them."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def cases(character: str) -> tuple[str, ...]:
    """A character and its other letter cases, where those are one character too.

    An ASCII letter stays in ASCII: "k" is not the Kelvin sign, as it is in Python's ``re``.

    >>> cases("k"), cases("é"), cases("ß"), cases("1")
    (('K', 'k'), ('É', 'é'), ('ß', 'ẞ'), ('1',))
    """
    if character.isascii():
        return tuple(sorted({character.lower(), character.upper()}))
    folded = character.casefold()
    found = {character}
    for other in (character.lower(), character.upper(), unicodedata.normalize("NFC", folded)):
        if len(other) == 1 and other.casefold() == folded:
            found.add(other)
    if character == "ß":  # its capital letter is newer than its upper case, "SS"
        found.add("ẞ")
    return tuple(sorted(found))
