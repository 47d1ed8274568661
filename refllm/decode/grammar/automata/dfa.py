"""Deterministic finite automata: every regular part of a grammar is one of these.

A ``DFA`` reads symbols of an ``Alphabet`` (``alphabet.py``: bytes or Unicode code points), one
state to the next along its table. It is *trimmed*: state 0 is the dead state, from which nothing
is accepted and which is left by no symbol, and from every other state some word is accepted. So
"may this symbol follow?" is "is the next state not 0?", and a mask of tokens never leads into a
dead end.

A state accepts a *set of labels* rather than yes or no, so that one automaton can say which of
several languages the text is in (keys of an object, alternatives of a union). A plain language
has the label 1.

============  ==============================================================================
``alphabet``  which symbols belong to which class (columns of the table)
``table``     ``table[state][class]`` is the next state; a list of S rows of K integers
``start``     the first state; 0 when the language is empty
``labels``    per state the bit set of labels that are accepted there; 0 = not accepting
============  ==============================================================================

Automata are made by ``dfa_builders.py``, combined by ``dfa_operations.py`` and made smallest by
``dfa_minimization.py``; ``regex.py`` compiles regular expressions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import or_

import numpy as np

from refllm.array_types import Array
from refllm.decode.grammar.automata.alphabet import BYTES, Alphabet

DEAD = 0
ACCEPT = 1  # the label of a plain language


@dataclass(frozen=True, eq=False)
class DFA:
    """A deterministic automaton, trimmed (see the module's table). Compared by identity."""

    alphabet: Alphabet
    table: Sequence[Sequence[int]]
    start: int
    labels: tuple[int, ...]

    # --- reading ------------------------------------------------------------------------------

    def step(self, state: int, symbol: int) -> int:
        """The state after ``symbol``; 0 if no accepted word goes on like this."""
        alphabet = self.alphabet
        return self.table[state][alphabet.classes[bisect_right(alphabet.starts, symbol) - 1]]

    def run(self, symbols: Iterable[int], state: int | None = None) -> int:
        """The state after all ``symbols``, read from ``state`` (default: the start)."""
        here = self.start if state is None else state
        for symbol in symbols:
            here = self.step(here, symbol)
            if here == DEAD:
                break
        return here

    def accepting(self, state: int) -> bool:
        """Whether the word read so far is in the language."""
        return self.labels[state] != 0

    def matches(self, symbols: Iterable[int] | str) -> bool:
        """Whether a whole word is in the language: bytes, code points or a text."""
        return self.label(symbols) != 0

    def label(self, symbols: Iterable[int] | str) -> int:
        """The bit set of labels that a whole word is accepted with; 0 = not in the language."""
        if isinstance(symbols, str):
            symbols = map(ord, symbols)
        return self.labels[self.run(symbols)]

    # --- facts --------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The number of symbols: 256 for bytes, 0x110000 for characters."""
        return self.alphabet.size

    @property
    def states(self) -> int:
        """The number of states, the dead state included."""
        return len(self.labels)

    @property
    def empty(self) -> bool:
        """Whether no word at all is accepted."""
        return self.start == DEAD

    @cached_property
    def all_labels(self) -> int:
        """The labels that occur, as one bit set."""
        return reduce(or_, self.labels, 0)

    @cached_property
    def byte_table(self) -> Array:
        """int32[S, 256]: the table with one column per byte (automata over bytes only)."""
        if self.size != BYTES:
            raise TypeError("byte_table exists for an automaton over bytes; apply utf8.to_bytes")
        lengths = np.diff(np.array((*self.alphabet.starts, BYTES)))
        columns = np.repeat(np.array(self.alphabet.classes), lengths)  # [256] class of each byte
        return np.array(self.table, dtype=np.int32)[:, columns]

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """Per state the live states that one symbol leads to, each once, ascending."""
        return tuple(tuple(sorted(set(row) - {DEAD})) for row in self.table)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Per state the states from which one symbol leads there, each once, ascending."""
        before: list[list[int]] = [[] for _ in self.labels]
        for state, following in enumerate(self.successors):
            for target in following:
                before[target].append(state)
        return tuple(map(tuple, before))

    @cached_property
    def _reachable_labels(self) -> list[int]:
        found = list(self.labels)
        pending = [state for state, label in enumerate(found) if label]
        while pending:
            state = pending.pop()
            for before in self.predecessors[state]:
                if found[state] | found[before] != found[before]:
                    found[before] |= found[state]
                    pending.append(before)
        return found

    def reachable_labels(self, state: int) -> int:
        """The labels that are accepted here or after more symbols, as one bit set."""
        return self._reachable_labels[state]

    @cached_property
    def distances(self) -> tuple[int, ...]:
        """Per state the length of the shortest word accepted from there; -1 for the dead state."""
        found = [0 if label else -1 for label in self.labels]
        pending = deque(state for state, label in enumerate(self.labels) if label)
        while pending:
            state = pending.popleft()
            for before in self.predecessors[state]:
                if found[before] < 0:
                    found[before] = found[state] + 1
                    pending.append(before)
        return tuple(found)

    def distance(self, state: int | None = None) -> int | None:
        """The length of the shortest word accepted from a state (default: the start), or None."""
        found = self.distances[self.start if state is None else state]
        return None if found < 0 else found

    def shortest(self, state: int | None = None) -> tuple[int, ...] | None:
        """A shortest word accepted from a state (default: the start), the first in order.

        None from the dead state.
        """
        here = self.start if state is None else state
        if here == DEAD:
            return None
        word = []
        while not self.labels[here]:
            nearer = self.distances[here] - 1
            row = self.table[here]
            word.append(
                min(
                    symbol
                    for symbol, target in zip(self.alphabet.representatives, row, strict=True)
                    if target != DEAD and self.distances[target] == nearer
                )
            )
            here = self.step(here, word[-1])
        return tuple(word)

    @cached_property
    def longest(self) -> int | None:
        """The length of the longest word; None if there is none or they grow without bound."""
        return self._heights[self.start] if self.finite and not self.empty else None

    @cached_property
    def finite(self) -> bool:
        """Whether the language has finitely many words: no live state can be reached again."""
        return len(self._heights) == self.states

    def bounded(self, state: int) -> bool:
        """Whether finitely many words are accepted from a state."""
        return state in self._heights

    @cached_property
    def _heights(self) -> dict[int, int]:
        """The length of the longest word from each state from which words are bounded."""
        open_edges = [len(following) for following in self.successors]
        heights = dict.fromkeys((s for s, edges in enumerate(open_edges) if not edges), 0)
        pending = list(heights)
        while pending:
            state = pending.pop()
            for before in self.predecessors[state]:
                open_edges[before] -= 1
                if not open_edges[before]:
                    heights[before] = 1 + max(heights[next_] for next_ in self.successors[before])
                    pending.append(before)
        return heights

    @cached_property
    def cardinality(self) -> int | None:
        """The number of words; None if there are infinitely many."""
        if not self.finite:
            return None
        counts = [int(bool(label)) for label in self.labels]
        for state in sorted(self._heights, key=self._heights.__getitem__):
            weighted = zip(self.alphabet.weights, self.table[state], strict=True)
            counts[state] += sum(weight * counts[target] for weight, target in weighted)
        return counts[self.start]

    def words(self, limit: int) -> list[tuple[int, ...]]:
        """The first ``limit`` words, shorter ones first, those of one length in order."""
        found: list[tuple[int, ...]] = []
        # able[n]: the states from which some word of exactly n symbols is accepted
        able = [{state for state, label in enumerate(self.labels) if label}]
        last = self.longest if self.finite else None
        while len(found) < limit and not self.empty:
            length = len(able) - 1
            if last is not None and length > last:
                break
            for word in self._words_of(self.start, length, able):
                found.append(word)
                if len(found) == limit:
                    break
            able.append({before for state in able[-1] for before in self.predecessors[state]})
        return found

    def _words_of(
        self, start: int, length: int, able: Sequence[set[int]]
    ) -> Iterator[tuple[int, ...]]:
        """The words of exactly ``length`` symbols from ``start``, in order."""
        if start not in able[length]:
            return
        if length == 0:
            yield ()
            return
        # A stack of iterators in place of recursion: words may be longer than Python's stack.
        word: list[int] = []
        levels = [self._moves(start, able[length - 1])]
        while levels:
            move = next(levels[-1], None)
            if move is None:
                levels.pop()
                if word:
                    word.pop()
                continue
            symbol, state = move
            if len(levels) == length:
                yield (*word, symbol)
                continue
            word.append(symbol)
            levels.append(self._moves(state, able[length - len(levels) - 1]))

    def _moves(self, state: int, able: set[int]) -> Iterator[tuple[int, int]]:
        """Each symbol that leads from a state to one of ``able``, with that state."""
        row = self.table[state]
        for low, high, cls in self.alphabet.intervals():
            if row[cls] in able:
                for symbol in range(low, high + 1):
                    yield symbol, row[cls]
