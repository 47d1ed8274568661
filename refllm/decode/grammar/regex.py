"""Regular expressions → minimal automata over characters.

``parse`` (``regex_syntax.py``) makes a tree, ``PositionAutomaton`` its positions and which may
follow which, the subset construction here the deterministic automaton, and
``dfa_minimization.py`` the smallest one:

    text → tree → positions → sets of positions = states → minimal DFA

>>> dfa = from_pattern("^[a-f0-9]{4}$", search=True)
>>> dfa.matches("c0de"), dfa.matches("coda")
(True, False)

**Dialects.** ``ecma`` (ECMA 262, Unicode mode) is the default, as JSON Schema asks for it. Its
``\\d``, ``\\w`` and ``.`` accept less than those of Python's ``re``, and its ``$`` does not stand
before a final line end: what ``\\w+`` accepts here, validators of both kinds accept. ``python``
means exactly what ``re.compile(pattern)`` does.

**Size.** Positions are counted before they are built, states and work while they are: a pattern
that needs more than ``MAX_STATES`` is rejected within about a second.

**Left out**: see ``regex_syntax.py``. Lookaheads are exact, anywhere (``regex_lookahead.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from refllm.decode.grammar.alphabet import CHARACTERS, Alphabet, alphabet_of
from refllm.decode.grammar.dfa import ACCEPT, DFA
from refllm.decode.grammar.dfa_builders import explore, too_large
from refllm.decode.grammar.dfa_minimization import minimize
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.position_automaton import START, WORD, PositionAutomaton, bits_of
from refllm.decode.grammar.regex_classes import Dialect
from refllm.decode.grammar.regex_syntax import parse
from refllm.decode.grammar.regex_tree import (
    BOUNDARY,
    END_OR_NEWLINE,
    NOT_BOUNDARY,
    Node,
    Repeat,
    Sequence,
    Symbols,
)
from refllm.decode.grammar.unicode_classes import ANY, escape_set

MAX_WORK = 3_000_000  # positions looked at in one subset construction
NEWLINE = 0x0A
FINAL_NEWLINE = CHARACTERS  # a symbol of its own: the line end that ends the text


@lru_cache(maxsize=512)
def from_pattern(pattern: str, *, search: bool, dialect: Dialect = "ecma") -> DFA:
    """The minimal automaton, over characters, of the texts that a regular expression matches.

    With ``search`` a match anywhere in the text suffices (JSON Schema's ``pattern``,
    ``re.search``), without it the whole text must match (``re.fullmatch``). Raises
    ``GrammarError`` if the pattern is malformed, not supported or too large.
    """
    shown = pattern if len(pattern) <= 60 else pattern[:57] + "..."
    tree = parse(pattern, dialect)
    return compile_tree(tree, dialect, search=search, what=f"regular expression {shown!r}")


def compile_tree(tree: Node, dialect: Dialect, *, search: bool, what: str) -> DFA:
    """The minimal automaton of a syntax tree; ``what`` begins the sentence of an error."""
    everything = Repeat(Symbols(ANY), 0, None)
    whole = Sequence((everything, tree, everything)) if search else tree
    try:
        automaton = PositionAutomaton.of(whole)
    except GrammarError as error:
        raise GrammarError(f"{what} {error}") from None
    if automaton.lookaheads:
        raise GrammarError(f"{what}: lookaheads are not supported")
    return minimize(determinize(automaton, dialect, search=search, what=what))


def determinize(automaton: PositionAutomaton, dialect: Dialect, *, search: bool, what: str) -> DFA:
    """The subset construction: a state is the set of positions that the text may have reached."""
    conditions = automaton.conditions
    context = Context(automaton, dialect, conditions)
    plain = [edges.get(0, 0) for edges in automaton.follow]
    conditional = sum(1 << p for p, edges in enumerate(automaton.follow) if edges.keys() - {0})
    finished = _finished(automaton, plain) if search else 0
    tail = 1 << len(plain) - 1  # the last position: anything after the match
    members = context.members
    work = 0

    def row_of(mask: int) -> Iterator[int | None]:
        nonlocal work
        work += mask.bit_count()
        if work > MAX_WORK:
            raise too_large(what)
        reached = WORD
        for position in bits_of(mask & ~WORD):
            reached |= plain[position]
        if not mask & conditional:
            targets = [reached & inside for inside in members]
        else:
            edges = context.edges(mask & conditional)
            targets = []
            for cls, inside in enumerate(members):
                found = reached
                for condition, positions in edges.items():
                    if context.holds(condition, mask, cls):
                        found |= positions
                targets.append(found & inside)
        return (
            (tail if target & finished else target) if target > WORD else None for target in targets
        )

    def label_of(mask: int) -> int:
        for condition, positions in automaton.accept.items():
            if mask & positions and context.holds_at_end(condition, mask):
                return ACCEPT
        return 0

    dfa = explore(context.alphabet, START, row_of, label_of, what=what)
    return _resolve_final_newline(dfa) if context.newline is not None else dfa


def _finished(automaton: PositionAutomaton, plain: list[int]) -> int:
    """The positions of a search from which every text is accepted: the match is complete."""
    tail = 1 << len(plain) - 1
    accepting = automaton.accept.get(0, 0)
    return sum(1 << p for p, after in enumerate(plain) if after & tail and accepting >> p & 1)


class Context:
    """What conditions on an edge are about: the characters before and after it, as classes."""

    def __init__(self, automaton: PositionAutomaton, dialect: Dialect, conditions: int) -> None:
        self._automaton = automaton
        sets = {symbols: index for index, symbols in enumerate(dict.fromkeys(automaton.symbols))}
        distinct = list(sets)
        if conditions & (BOUNDARY | NOT_BOUNDARY):
            distinct.append(escape_set("w", dialect))
        size = CHARACTERS
        if conditions & END_OR_NEWLINE:
            # A line end that ends the text is another symbol than one that does not.
            size += 1
            distinct = [
                (*symbols, (FINAL_NEWLINE, FINAL_NEWLINE))
                if any(low <= NEWLINE <= high for low, high in symbols)
                else symbols
                for symbols in distinct
            ]
            distinct.append(((FINAL_NEWLINE, FINAL_NEWLINE),))
        self.alphabet, parts = alphabet_of(size, distinct)
        self.newline = parts.pop()[0] if conditions & END_OR_NEWLINE else None
        words = parts.pop() if conditions & (BOUNDARY | NOT_BOUNDARY) else ()
        # members[class]: the positions that read it, and WORD if it holds word characters
        self.members = [WORD if cls in words else 0 for cls in range(self.alphabet.count)]
        for position, symbols in enumerate(automaton.symbols):
            for cls in parts[sets[symbols]]:
                self.members[cls] |= 1 << position

    def edges(self, mask: int) -> dict[int, int]:
        """Where the positions lead under each condition other than none."""
        found: dict[int, int] = {}
        for position in bits_of(mask):
            for condition, targets in self._automaton.follow[position].items():
                if condition:
                    found[condition] = found.get(condition, 0) | targets
        return found

    def holds(self, condition: int, mask: int, cls: int) -> bool:
        """Whether a condition holds between the text so far and a next character of a class."""
        if condition & END_OR_NEWLINE and cls != self.newline:
            return False
        return _boundary_holds(condition, (mask ^ self.members[cls]) & WORD != 0)

    def holds_at_end(self, condition: int, mask: int) -> bool:
        """Whether a condition holds at the end of the text."""
        return _boundary_holds(condition, mask & WORD != 0)


def _boundary_holds(condition: int, boundary: bool) -> bool:
    """Whether what a condition asks of ``\\b`` and ``\\B`` is so, given if there is a boundary."""
    if condition & BOUNDARY and not boundary:
        return False
    return not (condition & NOT_BOUNDARY and boundary)


def _resolve_final_newline(dfa: DFA) -> DFA:
    """Read the one line end for both of its symbols.

    A state is a state of ``dfa`` and whether the text may end here, which after a line end is
    decided by where the final line end would have led.
    """
    size = dfa.size - 1
    newline = dfa.alphabet.class_of(NEWLINE)
    final = dfa.alphabet.class_of(FINAL_NEWLINE)
    alphabet, parts = alphabet_of(size, [((NEWLINE, NEWLINE),), *_class_sets(dfa.alphabet, size)])
    columns = [0] * alphabet.count
    for old, classes in enumerate(parts[1:]):
        for cls in classes:
            columns[cls] = old
    ends = parts[0][0]

    def row_of(key: tuple[int, int]) -> Iterator[tuple[int, int] | None]:
        row = dfa.table[key[0]]
        for cls, old in enumerate(columns):
            target = row[old]
            label = dfa.labels[row[final] if cls == ends else target]
            yield (target, label) if target or label else None

    start = (dfa.start, dfa.labels[dfa.start])
    assert alphabet.class_of(NEWLINE) == ends
    assert columns[ends] == newline
    return explore(alphabet, start, row_of, lambda key: key[1])


def _class_sets(alphabet: Alphabet, size: int) -> list[tuple[tuple[int, int], ...]]:
    """The intervals of each class, up to ``size``."""
    sets: list[list[tuple[int, int]]] = [[] for _ in range(alphabet.count)]
    for low, high, cls in alphabet.intervals():
        if low < size:
            sets[cls].append((low, min(high, size - 1)))
    return [tuple(intervals) for intervals in sets]
