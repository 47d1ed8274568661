"""The syntax tree of a regular expression.

===================  =======================================================================
:class:`Symbols`     one character out of a set
:class:`Sequence`    one after the other; without parts: the empty word
:class:`Choice`      one of several (``|``)
:class:`Repeat`      ``* + ? {n} {n,} {n,m}``; a lazy quantifier accepts the same words
:class:`Assertion`   ``^ $ \\b \\B``
:class:`Lookahead`   ``(?=…) (?!…)``
===================  =======================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from refllm.decode.grammar.patterns.unicode_classes import Set


@dataclass(frozen=True)
class Symbols:
    """One character out of ``members``."""

    members: Set


@dataclass(frozen=True)
class Sequence:
    """All ``parts``, one after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of ``parts``."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """``minimum`` to ``maximum`` (None: any number) times ``body``."""

    body: Node
    minimum: int
    maximum: int | None


@dataclass(frozen=True)
class Assertion:
    """A condition on the place between two characters (the constants below)."""

    kind: int


BEGIN = 1  # at the beginning of the text
END = 2  # at its end
END_OR_NEWLINE = 4  # at its end, or before a line end that is its last character
BOUNDARY = 8  # between a word character and another one, or an end of the text
NOT_BOUNDARY = 16


@dataclass(frozen=True)
class Lookahead:
    """The rest of the text begins with ``body``; or it does not, if not ``positive``."""

    body: Node
    positive: bool


Node = Symbols | Sequence | Choice | Repeat | Assertion | Lookahead
