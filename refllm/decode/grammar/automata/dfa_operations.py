"""Boolean algebra and products of automata: and, or, not, concatenation, length limits.

Every function takes automata over the same symbols (bytes or characters) and returns a minimal
one. Labels (``dfa.py``) are kept as each function says.

=======================  ===================================================================
``intersect(a, b, …)``   words in all languages; labels of the first
``union(a, b, …)``       words in any language; labels are joined
``difference(a, b)``     words of a that are not in b; labels of a
``complement(a)``        words that are not in a
``concatenate(a, b, …)`` a word of a, then one of b, …; labels of the last
``star(a)``              any number of words of a
``optional(a)``          a word of a, or the empty word
``labelled_union``       a union that says which of its languages a word is in
``with_length``          words whose length lies in a range
=======================  ===================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from refllm.decode.grammar.automata.alphabet import Alphabet, common_alphabet
from refllm.decode.grammar.automata.dfa import ACCEPT, DEAD, DFA
from refllm.decode.grammar.automata.dfa_builders import (
    MAX_STATES,
    anything,
    explore,
    from_edges,
    from_words,
    literal,
    never,
    symbols,
)
from refllm.decode.grammar.automata.dfa_minimization import minimize, same_language

__all__ = [
    "MAX_STATES",
    "anything",
    "complement",
    "concatenate",
    "contains",
    "difference",
    "explore",
    "from_edges",
    "from_words",
    "intersect",
    "labelled_union",
    "literal",
    "minimize",
    "never",
    "optional",
    "relabel",
    "same_language",
    "star",
    "symbols",
    "union",
    "with_length",
]

States = tuple[int, ...]
Rows = list[list[tuple[int, ...]]]


def relabel(dfa: DFA, label: int) -> DFA:
    """The same words, all accepted with ``label``."""
    return minimize(
        DFA(dfa.alphabet, dfa.table, dfa.start, tuple(label if bits else 0 for bits in dfa.labels))
    )


def intersect(*dfas: DFA) -> DFA:
    """The words that are in every language, with the labels of the first."""

    def row_of(states: States, rows: Iterable[States]) -> Iterator[States | None]:
        return (None if DEAD in targets else targets for targets in rows)

    def label_of(bits: States) -> int:
        return bits[0] if all(bits) else 0

    return _product(dfas, row_of, label_of, dead=any(dfa.empty for dfa in dfas))


def difference(a: DFA, b: DFA) -> DFA:
    """The words of a that are not in b, with the labels of a."""

    def row_of(states: States, rows: Iterable[States]) -> Iterator[States | None]:
        return (None if targets[0] == DEAD else targets for targets in rows)

    def label_of(bits: States) -> int:
        return bits[0] if not bits[1] else 0

    return _product((a, b), row_of, label_of, dead=a.empty)


def complement(dfa: DFA) -> DFA:
    """Every word that is not in the language (and, over characters, has no surrogate)."""
    return difference(anything(dfa.size), dfa)


def contains(a: DFA, b: DFA) -> bool:
    """Whether every word of b is in a."""
    return difference(b, a).empty


def _product(
    dfas: Sequence[DFA],
    row_of: Callable[[States, Iterable[States]], Iterator[States | None]],
    label_of: Callable[[States], int],
    *,
    dead: bool,
) -> DFA:
    """The automaton that runs all automata side by side; its states are tuples of their states."""
    if dead:
        return never(dfas[0].size)
    alphabet, maps = common_alphabet(dfa.alphabet for dfa in dfas)
    # Rows over the common alphabet, each computed when it is needed first.
    tables: list[list[list[int] | None]] = [[None] * dfa.states for dfa in dfas]

    def expand(states: States) -> Iterator[States | None]:
        rows = []
        for dfa, columns, table, state in zip(dfas, maps, tables, states, strict=True):
            row = table[state]
            if row is None:
                old = dfa.table[state]
                row = [old[cls] for cls in columns]
                table[state] = row
            rows.append(row)
        return row_of(states, zip(*rows, strict=True))

    def labels(states: States) -> int:
        return label_of(tuple(dfa.labels[s] for dfa, s in zip(dfas, states, strict=True)))

    start = tuple(dfa.start for dfa in dfas)
    return minimize(explore(alphabet, start, expand, labels, what="an intersection"))


def _shared(dfas: Sequence[DFA]) -> tuple[Alphabet, Rows, list[int], list[int]]:
    """Several automata as one table: the alphabet, rows of states, labels, and each one's offset.

    A row holds, per class of the common alphabet, the next states: one, or none for the dead one.
    """
    alphabet, maps = common_alphabet(dfa.alphabet for dfa in dfas)
    rows: Rows = []
    labels: list[int] = []
    offsets: list[int] = []
    for dfa, columns in zip(dfas, maps, strict=True):
        offset = len(rows)
        offsets.append(offset)
        target_of = [(), *((offset + state,) for state in range(1, dfa.states))]
        for row in dfa.table:
            rows.append([target_of[row[cls]] for cls in columns])
        labels.extend(dfa.labels)
    return alphabet, rows, labels, offsets


def _determinize(
    alphabet: Alphabet, rows: Rows, starts: Iterable[int], labels: Sequence[int], what: str
) -> DFA:
    """The subset construction: a state is the set of states that the automaton may be in."""

    def row_of(states: frozenset[int]) -> Iterator[frozenset[int] | None]:
        for targets in zip(*(rows[state] for state in states), strict=True):
            joined = frozenset(target for group in targets for target in group)
            yield joined or None

    def label_of(states: frozenset[int]) -> int:
        bits = 0
        for state in states:
            bits |= labels[state]
        return bits

    start = frozenset(starts)
    return minimize(explore(alphabet, start or None, row_of, label_of, what=what))


def union(*dfas: DFA) -> DFA:
    """The words that are in any of the languages; the labels of each are joined."""
    live = [dfa for dfa in dfas if not dfa.empty]
    if len(live) < 2:
        return minimize(live[0]) if live else never(dfas[0].size)
    alphabet, rows, labels, offsets = _shared(live)
    starts = [offset + dfa.start for offset, dfa in zip(offsets, live, strict=True)]
    return _determinize(alphabet, rows, starts, labels, "a union")


def labelled_union(parts: Iterable[tuple[DFA, int]]) -> DFA:
    """The union of languages, each accepted with its own label (a bit set)."""
    return union(*(relabel(dfa, label) for dfa, label in parts))


def concatenate(*dfas: DFA) -> DFA:
    """A word of the first, then one of the second, and so on; labels of the last."""
    result = dfas[0]
    for other in dfas[1:]:
        result = _concatenate(result, other)
    return minimize(result) if len(dfas) == 1 else result


def _concatenate(a: DFA, b: DFA) -> DFA:
    if a.empty or b.empty:
        return never(a.size)
    alphabet, rows, labels, (_, offset) = _shared((a, b))
    joint = offset + b.start
    labels[: a.states] = [0] * a.states
    starts = _enter(rows, range(a.states), {s for s, bits in enumerate(a.labels) if bits}, joint)
    return _determinize(alphabet, rows, starts(a.start), labels, "a concatenation")


def star(dfa: DFA) -> DFA:
    """Any number of words of the language, one after the other; plain label."""
    if dfa.empty:
        return literal((), size=dfa.size)
    alphabet, rows, labels, _ = _shared((dfa,))
    ends = {state for state, bits in enumerate(labels) if bits}
    _enter(rows, range(dfa.states), ends, dfa.start)
    repeated = [ACCEPT if bits else 0 for bits in labels]
    return optional(_determinize(alphabet, rows, [dfa.start], repeated, "a repetition"))


def _enter(
    rows: Rows, states: Iterable[int], ends: set[int], joint: int
) -> Callable[[int], tuple[int, ...]]:
    """Let each of ``states`` that enters one of ``ends`` enter ``joint`` as well, in place."""

    def joined(state: int) -> tuple[int, ...]:
        return (state, joint) if state in ends and state != joint else (state,)

    for state in states:
        rows[state] = [joined(*targets) if targets else () for targets in rows[state]]
    return joined


def optional(dfa: DFA) -> DFA:
    """The language and the empty word; plain label."""
    return union(relabel(dfa, ACCEPT), literal((), size=dfa.size))


def with_length(dfa: DFA, minimum: int = 0, maximum: int | None = None) -> DFA:
    """The words of ``minimum`` to ``maximum`` symbols (None: no upper limit); labels are kept.

    The product with a counter of that many states: for small limits. Larger ones are counted
    beside the automaton (``utf8.json_string_counted``).
    """
    if maximum is not None and maximum < minimum:
        return never(dfa.size)
    last = minimum if maximum is None else maximum
    distances = dfa.distances

    def row_of(key: tuple[int, int]) -> Iterator[tuple[int, int] | None]:
        state, count = key
        count = count + 1 if maximum is not None else min(count + 1, last)
        # States from which the word cannot end in time are left out before they are counted.
        room = None if maximum is None else last - count
        for target in dfa.table[state]:
            if target == DEAD or (room is not None and distances[target] > room):
                yield None
            else:
                yield target, count

    def label_of(key: tuple[int, int]) -> int:
        return dfa.labels[key[0]] if key[1] >= minimum else 0

    start = None if dfa.empty else (dfa.start, 0)
    if start and maximum is not None and distances[dfa.start] > maximum:
        start = None
    return minimize(explore(dfa.alphabet, start, row_of, label_of, what="a length limit"))
