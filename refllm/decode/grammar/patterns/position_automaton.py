"""The position automaton of a regular expression (Glushkov 1961), with conditions on its edges.

Each place in the pattern that reads a character is a *position*; being in a position means that
this character was read last. Which position may follow which is computed from three facts about
each part of the pattern: what may be read first, what may be read last, and whether nothing need
be read. There are no empty edges, and a counted repetition ``x{0,255}`` has 255 positions.

Sets of positions are integers: bit p is position p. Bit 0 is no position but the fact that the
last character was a word character (for ``\\b``), and position 1 is the beginning, before any
character.

Assertions become *conditions*: a bit set on an edge that must hold between the two characters.
``^`` and ``$`` vanish at once, since an edge from one character to the next is neither at the
beginning nor at the end. What is left: ``\\b`` and ``\\B``, Python's ``$`` before a final line end,
and lookaheads, one bit each from ``LOOKAHEAD`` on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.patterns.regex_tree import (
    BEGIN,
    BOUNDARY,
    END,
    END_OR_NEWLINE,
    NOT_BOUNDARY,
    Assertion,
    Choice,
    Lookahead,
    Node,
    Repeat,
    Sequence,
    Symbols,
)
from refllm.decode.grammar.patterns.unicode_classes import Set

MAX_POSITIONS = 20_000
WORD = 1  # bit 0: the last character was a word character
START = 2  # position 1: nothing was read yet
FIRST_LOOKAHEAD = 5  # bit 5 of a condition is lookahead 0

Conditional = dict[int, int]  # condition → set of positions


def positions_of(node: Node) -> int:
    """How many positions a pattern has, computed without building them."""
    match node:
        case Symbols():
            return 1
        case Repeat(body, minimum, maximum):
            return positions_of(body) * (max(minimum, 1) if maximum is None else maximum)
        case Sequence(parts) | Choice(parts):
            return sum(map(positions_of, parts))
    return 0


def bits_of(mask: int) -> Iterator[int]:
    """The positions in a set, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


@dataclass
class Fragment:
    """What is read first and last in a part, and on which conditions nothing need be read."""

    empty: set[int]
    first: Conditional = field(default_factory=dict)
    last: Conditional = field(default_factory=dict)


@dataclass
class PositionAutomaton:
    """``symbols[p]`` are the characters of position p, ``follow[p]`` what may come after it.

    ``accept`` holds the positions with which a text may end, by the condition on its end.
    """

    symbols: list[Set] = field(default_factory=lambda: [(), ()])
    follow: list[Conditional] = field(default_factory=lambda: [{}, {}])
    accept: Conditional = field(default_factory=dict)
    lookaheads: dict[Lookahead, int] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: Node, *, inside_lookahead: bool) -> PositionAutomaton:
        """The automaton of a pattern that is to match a whole text.

        Inside of a lookahead the text before is not known, so ``^`` and ``\\b`` are rejected where
        they would depend on it.
        """
        if positions_of(tree) > MAX_POSITIONS:
            raise GrammarError(
                f"needs more than {MAX_POSITIONS:,} positions: use smaller repetition counts"
            )
        result = cls()
        whole = result._build(tree)
        if inside_lookahead:
            conditions = {*whole.first, *whole.empty}
            if any(condition & (BEGIN | BOUNDARY | NOT_BOUNDARY) for condition in conditions):
                raise GrammarError("'^' or '\\b' at the beginning of a lookahead is not supported")
        result._connect({0: START}, whole.first)
        _add(whole.last, dict.fromkeys(whole.empty, START))
        for condition, positions in whole.last.items():
            if condition & BEGIN:
                positions &= START
            at_end = condition & ~(BEGIN | END | END_OR_NEWLINE)
            _add(result.accept, {at_end: positions})
        return result

    @property
    def conditions(self) -> int:
        """All conditions that occur, as one bit set."""
        found = 0
        for edges in (*self.follow, self.accept):
            for condition in edges:
                found |= condition
        return found

    def _connect(self, last: Conditional, first: Conditional) -> None:
        """Let the characters of ``first`` follow those of ``last``."""
        for before, positions in last.items():
            for after, targets in first.items():
                condition = before | after
                if condition & END:
                    continue  # a character follows
                if condition & BEGIN and positions != START:
                    continue  # a character precedes
                for position in bits_of(positions):
                    _add(self.follow[position], {condition & ~BEGIN: targets})

    def _build(self, node: Node) -> Fragment:
        match node:
            case Symbols(members):
                if not members:
                    return Fragment(set())
                bit = 1 << len(self.symbols)
                self.symbols.append(members)
                self.follow.append({})
                return Fragment(set(), {0: bit}, {0: bit})
            case Assertion(kind):
                return Fragment({kind})
            case Lookahead():
                number = self.lookaheads.setdefault(node, len(self.lookaheads))
                return Fragment({1 << FIRST_LOOKAHEAD + number})
            case Sequence(parts):
                result = Fragment({0})
                for part in parts:
                    result = self._chain(result, self._build(part))
                return result
            case Choice(parts):
                result = Fragment(set())
                for fragment in map(self._build, parts):
                    result.empty |= fragment.empty
                    _add(result.first, fragment.first)
                    _add(result.last, fragment.last)
                return result
            case Repeat():
                return self._repeat(node)

    def _chain(self, a: Fragment, b: Fragment) -> Fragment:
        """a, then b."""
        self._connect(a.last, b.first)
        result = Fragment({x | y for x in a.empty for y in b.empty}, a.first, b.last)
        for condition in a.empty:
            _add(result.first, b.first, condition)
        for condition in b.empty:
            _add(result.last, a.last, condition)
        return result

    def _repeat(self, node: Repeat) -> Fragment:
        """Copies of the body: those that must be, then those that may, each within the one before.

        A body that may be empty need not be, so its copies are all optional and read something.
        """
        if positions_of(node.body) == 0:
            body = self._build(node.body)
            return body if node.minimum else Fragment({0})
        if node.maximum == 0:
            return Fragment({0})
        probe = self._build(node.body)
        minimum = 0 if 0 in probe.empty else node.minimum
        copies = max(minimum, 1) if node.maximum is None else node.maximum
        fragments = [probe, *(self._build(node.body) for _ in range(copies - 1))]
        result = Fragment({0})
        if node.maximum is None:
            self._connect(fragments[-1].last, fragments[-1].first)
        for number, fragment in reversed(list(enumerate(fragments))):
            if number >= minimum:
                fragment.empty = set()
            result = self._chain(fragment, result)
            if number >= minimum:
                result.empty = {0}
        return result


def _add(edges: Conditional, more: Conditional, condition: int = 0) -> None:
    """Join sets of positions into ``edges``, under their own condition and one more."""
    for own, positions in more.items():
        both = own | condition
        edges[both] = edges.get(both, 0) | positions
