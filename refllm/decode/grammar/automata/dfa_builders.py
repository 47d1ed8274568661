"""Making automata: from words, from edges, and from the states that a function finds.

``explore`` is the one loop behind every construction here: it follows a function from state to
state, counts the states while it goes, and raises ``GrammarError`` when there are more than
``MAX_STATES`` (or more table entries than ``MAX_ENTRIES``), before memory or time are spent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from refllm.decode.grammar.automata.alphabet import (
    CHARACTERS,
    SURROGATES,
    Alphabet,
    Interval,
    alphabet_of,
)
from refllm.decode.grammar.automata.dfa import ACCEPT, DEAD, DFA
from refllm.decode.grammar.automata.dfa_minimization import minimize, trim
from refllm.decode.grammar.errors import GrammarError

MAX_STATES = 50_000
MAX_ENTRIES = 4_000_000  # states × classes

Key = TypeVar("Key", bound=Hashable)


def too_large(what: str) -> GrammarError:
    """The error of an automaton that would be too large; ``what`` begins the sentence."""
    return GrammarError(
        f"{what} needs an automaton of more than {MAX_STATES:,} states: use smaller repetition "
        "counts or fewer alternatives"
    )


def explore(
    alphabet: Alphabet,
    start: Key | None,
    row_of: Callable[[Key], Iterable[Key | None]],
    label_of: Callable[[Key], int],
    *,
    what: str = "this grammar",
) -> DFA:
    """The automaton whose states are the keys that ``row_of`` reaches from ``start``.

    ``row_of(key)`` gives the next key for each class of the alphabet, None for the dead state;
    ``label_of(key)`` gives the labels that it accepts. The result is trimmed, not minimized.
    """
    if start is None:
        return never(alphabet.size)
    most = min(MAX_STATES, MAX_ENTRIES // alphabet.count)
    numbers: dict[Key | None, int] = {None: DEAD, start: 1}
    pending = [start]
    table = [[DEAD] * alphabet.count]
    for key in pending:
        row = []
        for target in row_of(key):
            number = numbers.get(target)
            if number is None:
                assert target is not None
                number = len(numbers)
                if number > most:
                    raise too_large(what)
                numbers[target] = number
                pending.append(target)
            row.append(number)
        table.append(row)
    labels = [0, *map(label_of, pending)]
    return trim(alphabet, table, 1, labels)


def from_edges(
    size: int,
    edges: Sequence[Iterable[tuple[int, int, int]]],
    start: int,
    labels: Mapping[int, int],
    *,
    what: str = "this grammar",
) -> DFA:
    """The automaton with edges ``(low, high, target)`` out of each state: trimmed.

    ``edges[state]`` are disjoint intervals of symbols. State 0 is dead and has none; ``labels``
    holds the accepting states.
    """
    groups: dict[tuple[Interval, ...], int] = {}
    moves: list[list[tuple[int, int]]] = []
    for out in edges:
        by_target: dict[int, list[Interval]] = {}
        for low, high, target in out:
            by_target.setdefault(target, []).append((low, high))
        moves.append(
            [
                (groups.setdefault(tuple(sorted(intervals)), len(groups)), target)
                for target, intervals in by_target.items()
            ]
        )
    alphabet, parts = alphabet_of(size, list(groups))
    if len(edges) > MAX_STATES or len(edges) * alphabet.count > MAX_ENTRIES:
        raise too_large(what)
    table = []
    for out_groups in moves:
        row = [DEAD] * alphabet.count
        for group, target in out_groups:
            for cls in parts[group]:
                row[cls] = target
        table.append(row)
    return trim(alphabet, table, start, [labels.get(state, 0) for state in range(len(edges))])


def from_words(words: Mapping[Sequence[int] | str, int], *, size: int) -> DFA:
    """The finite language of these words, each accepted with its label; minimal.

    A word is a text, ``bytes``, or a sequence of symbols. The labels of equal words are joined.
    """
    edges: list[dict[int, int]] = [{}, {}]
    labels: dict[int, int] = {}
    for word, label in words.items():
        here = 1
        for symbol in map(ord, word) if isinstance(word, str) else word:
            target = edges[here].setdefault(symbol, len(edges))
            if target == len(edges):
                edges.append({})
                if len(edges) > MAX_STATES:
                    raise too_large("a list of words")
            here = target
        labels[here] = labels.get(here, 0) | label
    rows = [[(symbol, symbol, to) for symbol, to in out.items()] for out in edges]
    return minimize(from_edges(size, rows, 1, labels, what="a list of words"))


def literal(word: Sequence[int] | str, *, size: int) -> DFA:
    """The language of one word: a text, ``bytes`` or a sequence of symbols."""
    return from_words({word if isinstance(word, str) else tuple(word): ACCEPT}, size=size)


def never(size: int) -> DFA:
    """The empty language."""
    return DFA(Alphabet(size, (0,), (0,)), [[DEAD]], DEAD, (0,))


def valid_symbols(size: int) -> list[Interval]:
    """The symbols that may occur at all: every byte, or every code point but surrogates."""
    if size != CHARACTERS:
        return [(0, size - 1)]
    return [(0, SURROGATES[0] - 1), (SURROGATES[1] + 1, size - 1)]


def symbols(intervals: Iterable[Interval], *, size: int) -> DFA:
    """The language of one symbol out of disjoint intervals."""
    edges = [[], [(low, high, 2) for low, high in intervals], []]
    return minimize(from_edges(size, edges, 1, {2: ACCEPT}))


def anything(size: int) -> DFA:
    """The language of all words (without surrogates, if the symbols are characters)."""
    edges = [[], [(low, high, 1) for low, high in valid_symbols(size)]]
    return minimize(from_edges(size, edges, 1, {1: ACCEPT}))
