"""Whether a text matches, by derivatives: the naive twin of ``regex.py``.

The derivative of a pattern by a character is the pattern of what may follow that character
(Brzozowski 1964). So a text matches if, after deriving by each of its characters in turn, what is
left accepts the empty text. No automaton is built: this is the definition, in a page, and slow.

    d(c) = ε or ∅        d(a|b) = d(a) | d(b)      d(a{n,m}) = d(a) a{n-1,m-1}
    d(ab) = d(a)b, and d(b) as well where a accepts the empty text

Assertions and lookaheads read nothing, but whether they hold depends on the place. So here a
derivative is taken at a place in a text, not by a character alone.
"""

from __future__ import annotations

from refllm.decode.grammar.patterns.regex_classes import Dialect
from refllm.decode.grammar.patterns.regex_syntax import parse
from refllm.decode.grammar.patterns.regex_tree import (
    BEGIN,
    BOUNDARY,
    END,
    END_OR_NEWLINE,
    Assertion,
    Choice,
    Lookahead,
    Node,
    Repeat,
    Sequence,
    Symbols,
)
from refllm.decode.grammar.patterns.unicode_classes import ANY, Set, escape_set

NOTHING = Choice(())  # the pattern that no text matches
EMPTY = Sequence(())  # the pattern of the empty text


def matches(pattern: str, text: str, *, search: bool, dialect: Dialect = "ecma") -> bool:
    """Whether a text matches a pattern: anywhere (``search``), or as a whole."""
    tree = parse(pattern, dialect)
    everything = Repeat(Symbols(ANY), 0, None)
    rest: Node = Sequence((everything, tree, everything)) if search else tree
    matcher = _Matcher(text, escape_set("w", dialect))
    for place in range(len(text)):
        rest = matcher.derivative(rest, place)
    return matcher.accepts_empty(rest, len(text))


class _Matcher:
    """Derivatives at the places of one text; place i is before its i-th character."""

    def __init__(self, text: str, word: Set) -> None:
        self._text = text
        self._is_word = [_contains(word, letter) for letter in text]

    def accepts_empty(self, node: Node, place: int) -> bool:
        """Whether the pattern may read nothing at a place."""
        match node:
            case Symbols():
                return False
            case Sequence(parts):
                return all(self.accepts_empty(part, place) for part in parts)
            case Choice(parts):
                return any(self.accepts_empty(part, place) for part in parts)
            case Repeat(body, minimum, _):
                return minimum == 0 or self.accepts_empty(body, place)
            case Lookahead(body, positive):
                return self._begins_here(body, place) == positive
            case Assertion(kind):
                return self._holds(kind, place)

    def derivative(self, node: Node, place: int) -> Node:
        """What may follow the character after a place, if the pattern begins at that place."""
        match node:
            case Symbols(members):
                return EMPTY if _contains(members, self._text[place]) else NOTHING
            case Choice(parts):
                return _choice([self.derivative(part, place) for part in parts])
            case Sequence(parts):
                ways = []
                for index, part in enumerate(parts):
                    ways.append(_sequence(self.derivative(part, place), *parts[index + 1 :]))
                    if not self.accepts_empty(part, place):
                        break
                return _choice(ways)
            case Repeat(_, _, 0):
                return NOTHING
            case Repeat(body, minimum, maximum):
                # Where the body may read nothing, so may any of the copies that must be.
                fewer = 0 if self.accepts_empty(body, place) else max(minimum - 1, 0)
                most = None if maximum is None else maximum - 1
                return _sequence(self.derivative(body, place), Repeat(body, fewer, most))
        return NOTHING

    def _begins_here(self, body: Node, place: int) -> bool:
        """Whether some part of the text from a place on matches the body of a lookahead."""
        for end in range(place, len(self._text)):
            if self.accepts_empty(body, end):
                return True
            body = self.derivative(body, end)
        return self.accepts_empty(body, len(self._text))

    def _holds(self, kind: int, place: int) -> bool:
        if kind == BEGIN:
            return place == 0
        if kind == END:
            return place == len(self._text)
        if kind == END_OR_NEWLINE:
            return self._text[place:] in ("", "\n")
        before = place > 0 and self._is_word[place - 1]
        after = place < len(self._text) and self._is_word[place]
        return (before != after) == (kind == BOUNDARY)


def _contains(members: Set, letter: str) -> bool:
    return any(low <= ord(letter) <= high for low, high in members)


def _choice(parts: list[Node]) -> Node:
    """A choice without parts that match nothing, each part once."""
    flat: dict[Node, None] = {}
    for part in parts:
        flat.update(dict.fromkeys(part.parts if isinstance(part, Choice) else (part,)))
    return next(iter(flat)) if len(flat) == 1 else Choice(tuple(flat))


def _sequence(first: Node, *rest: Node) -> Node:
    """A sequence, without empty parts; nothing if its first part matches nothing."""
    if first == NOTHING:
        return NOTHING
    kept = tuple(part for part in (first, *rest) if part != EMPTY)
    return kept[0] if len(kept) == 1 else Sequence(kept)
