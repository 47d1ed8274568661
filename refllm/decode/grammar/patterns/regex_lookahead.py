"""The subset construction with lookaheads, which are regular and so need no search.

Whether ``(?=x)`` holds at a place depends on the rest of the text. That is a condition on the
future, so the automaton carries it along: an *obligation* is a state of the automaton of ``x``
followed by anything (for ``(?!x)`` of its complement), from which the rest of the text must be
accepted. A state is a set of pairs (obligations, positions): the text is accepted if one pair has
a last position and all its obligations are met. An obligation that every text meets is dropped;
one that no text meets drops its pair.

So ``^(?!mode)`` costs what the intersection of two automata costs, and a lookahead within a
repetition, ``((?!mode).)*``, is exact as well.
"""

from __future__ import annotations

from collections.abc import Iterator

from refllm.decode.grammar.automata.alphabet import SURROGATES, Interval
from refllm.decode.grammar.automata.dfa import ACCEPT, DEAD, DFA
from refllm.decode.grammar.automata.dfa_builders import explore, too_large
from refllm.decode.grammar.patterns.position_automaton import (
    FIRST_LOOKAHEAD,
    START,
    WORD,
    PositionAutomaton,
    bits_of,
)
from refllm.decode.grammar.patterns.regex_context import NEWLINE, Context

MAX_WORK = 300_000  # pairs of one state and one class looked at

Obligation = tuple[int, int]  # which lookahead, and the state of its automaton
Obligations = frozenset[Obligation]
Key = frozenset[tuple[Obligations, int]]  # obligations with the positions that have them

_FREE: Obligations = frozenset()


class _Lookahead:
    """The automaton of one lookahead's obligation, its table over the common classes."""

    def __init__(self, dfa: DFA, context: Context) -> None:
        self.start = dfa.start
        self.met_at_end = [label != 0 for label in dfa.labels]
        columns = [
            dfa.alphabet.class_of(symbol if symbol < dfa.size else NEWLINE)
            for symbol in context.alphabet.representatives
        ]
        self.table = [[row[column] for column in columns] for row in dfa.table]
        self.always_met = {state for state in range(dfa.states) if _accepts_all(dfa, state)}

    def step(self, state: int, cls: int) -> int | None:
        """The state after a character; DEAD if it is not met, None if it is met for good."""
        target = self.table[state][cls]
        return None if target in self.always_met else target


def _accepts_all(dfa: DFA, state: int) -> bool:
    """Whether a state of a minimal automaton accepts every text (surrogates are in none)."""
    if not dfa.labels[state]:
        return False
    alphabet = dfa.alphabet
    surrogates = alphabet.class_of(SURROGATES[0])
    alone = alphabet.weights[surrogates] == SURROGATES[1] - SURROGATES[0] + 1
    row = dfa.table[state]
    return alone and all(row[cls] == state for cls in range(alphabet.count) if cls != surrogates)


def class_intervals(dfa: DFA) -> list[tuple[Interval, ...]]:
    """The intervals of each class of an automaton's alphabet."""
    sets: list[list[Interval]] = [[] for _ in range(dfa.alphabet.count)]
    for low, high, cls in dfa.alphabet.intervals():
        sets[cls].append((low, high))
    return [tuple(intervals) for intervals in sets]


def determinize_with_lookaheads(
    automaton: PositionAutomaton,
    context: Context,
    dfas: list[DFA],
    *,
    finished: int,
    what: str,
) -> DFA:
    """The automaton of a pattern whose lookahead i asks that ``dfas[i]`` accepts what follows.

    ``context`` tells apart all classes of ``dfas``; from the positions ``finished`` every text
    is accepted, if no obligation is left.
    """
    lookaheads = [_Lookahead(dfa, context) for dfa in dfas]
    tail = 1 << len(automaton.symbols) - 1
    work = 0

    def advance(obligations: Obligations, cls: int) -> Obligations | None:
        """The obligations after a character; None if one of them cannot be met any more."""
        found = set()
        for number, state in obligations:
            target = lookaheads[number].step(state, cls)
            if target == DEAD:
                return None
            if target is not None:
                found.add((number, target))
        return frozenset(found)

    def begun(condition: int) -> Obligations:
        """The obligations of the lookaheads in a condition, before the next character."""
        numbers = bits_of(condition >> FIRST_LOOKAHEAD)
        return frozenset((number, lookaheads[number].start) for number in numbers)

    def row_of(key: Key) -> Iterator[Key | None]:
        nonlocal work
        leads = [
            (obligations | begun(condition), condition, mask, positions)
            for obligations, mask in key
            for condition, positions in context.edges(mask & ~WORD).items()
        ]
        work += len(leads) * context.alphabet.count
        if work > MAX_WORK:
            raise too_large(what)
        for cls, members in enumerate(context.members):
            found: dict[Obligations, int] = {}
            for obligations, condition, mask, positions in leads:
                targets = (positions | WORD) & members
                if targets <= WORD or not context.holds(condition, mask, cls):
                    continue
                left = advance(obligations, cls)
                if left is not None:
                    found[left] = found.get(left, 0) | targets
            yield _canonical(found, finished, tail)

    def label_of(key: Key) -> int:
        for obligations, mask in key:
            for condition, positions in automaton.accept.items():
                if mask & positions and context.holds_at_end(condition, mask):
                    every = obligations | begun(condition)
                    if all(lookaheads[number].met_at_end[state] for number, state in every):
                        return ACCEPT
        return 0

    start: Key = frozenset([(_FREE, START)])
    return explore(context.alphabet, start, row_of, label_of, what=what)


def _canonical(found: dict[Obligations, int], finished: int, tail: int) -> Key | None:
    """A state without positions that it holds with fewer obligations as well."""
    if found.get(_FREE, 0) & finished:
        return frozenset([(_FREE, tail)])
    pairs = []
    for obligations, mask in found.items():
        kept = tail | mask & WORD if mask & finished else mask
        for others, positions in found.items():
            if others < obligations:
                kept &= ~positions | WORD
        if kept > WORD:
            pairs.append((obligations, kept))
    return frozenset(pairs) if pairs else None
