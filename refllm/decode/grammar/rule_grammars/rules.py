"""Context-free rules as a syntax tree: what ``gbnf`` and ``lark`` read, and ``earley`` and
``context_free`` work on.

| node            | its texts                                                                |
|-----------------|--------------------------------------------------------------------------|
| `Literal`       | one text; with ``ignore_case`` also in other letter case                 |
| `Characters`    | any one character of a set                                                  |
| `Pattern`       | what a regular expression matches as a whole                             |
| `Reference`     | the texts of the rule of that name                                       |
| `Concatenation` | one text of each item, one after the other; without items the empty text |
| `Alternatives`  | the texts of any of its options; without options there is none           |
| `Repetition`    | ``minimum`` to ``maximum`` (None: any number) texts of its item          |

A rule nests at most ``MAX_DEPTH`` groups, so that functions may recurse over its tree; rules may
refer to each other in chains of any length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from refllm.decode.grammar.automata.alphabet import CHARACTERS, SURROGATES
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.patterns.unicode_classes import Set
from refllm.errors import did_you_mean

MAX_DEPTH = 64  # of groups within groups, in one rule


class Position(NamedTuple):
    """Where something stands in the grammar's text; both count from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}"


@dataclass(frozen=True)
class Literal:
    """One text; with ``ignore_case`` each letter in any case, as ``re.IGNORECASE`` has it."""

    text: str
    ignore_case: bool = False


@dataclass(frozen=True)
class Characters:
    """One character out of ``members``, ranges of code points with both ends included."""

    members: Set


@dataclass(frozen=True)
class Pattern:
    """A regular expression in Python's syntax; ``flags`` are of the letters i and s."""

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


def repeated(item: Expression, minimum: int, maximum: int | None) -> Repetition:
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
    return code < CHARACTERS and not SURROGATES[0] <= code <= SURROGATES[1]


def missing_start(start: str, names: Iterable[str]) -> GrammarError:
    """The error of a grammar without its first rule."""
    near = did_you_mean(start, names)
    return GrammarError(f"the grammar has no rule {start!r}, from which texts are derived{near}")
