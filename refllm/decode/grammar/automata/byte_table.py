"""A DFA over bytes under construction: rows of 256 next states, filled in by hand.

The JSON frames build their separators and keys so: whole words and whole DFAs are laid into one
table, with a label where each of them ends. Nothing is determinised or minimised, so that the
cost is one row per state.

| symbol | name | shape |
|---|---|---|
| δ | ``rows``, next state per state and byte, 0 = dead | int32[S, 256] |

Left out: everything that needs a product of automata (``dfa_operations.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refllm.decode.grammar.automata.alphabet import BYTES, Alphabet
from refllm.decode.grammar.automata.dfa import DFA


class ByteTable:
    """The rows and labels of a DFA over bytes; state 0 is dead.

    >>> table = ByteTable()
    >>> end = table.new_state(label=4)
    >>> start = table.new_state(edges={b"x"[0]: end})
    >>> sorted(table.dfa(start).labels)
    [0, 0, 4]
    """

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = [np.zeros(BYTES, np.int32)]
        self._labels: list[int] = [0]

    def new_state(
        self,
        label: int = 0,
        edges: Mapping[int, int] | None = None,
        row: np.ndarray | None = None,
    ) -> int:
        """A new state with the edges of ``row`` int32[256], then those of ``edges``."""
        self._rows.append(np.zeros(BYTES, np.int32) if row is None else row.copy())
        self._labels.append(label)
        state = len(self._rows) - 1
        if edges is not None:
            self.connect(state, edges)
        return state

    def connect(self, state: int, edges: Mapping[int, int]) -> None:
        """Set the next states of ``state`` for the given bytes."""
        row = self._rows[state]
        for byte, target in edges.items():
            row[byte] = target

    def relabel(self, state: int, label: int) -> None:
        """Set the labels that a state accepts."""
        self._labels[state] = label

    def target(self, state: int, symbol: bytes) -> int:
        """The next state of ``state`` for a single byte."""
        return int(self._rows[state][symbol[0]])

    def live(self, state: int) -> bool:
        """Whether the state accepts or has an edge to another state."""
        return bool(self._labels[state]) or bool(self._rows[state].any())

    def include(self, dfa: DFA) -> int:
        """Lay a DFA over bytes into the table; returns the offset to be added to its states."""
        offset = len(self._rows) - 1
        table = np.asarray(dfa.byte_table, np.int32)  # [S, 256]
        shifted = np.where(table > 0, table + offset, 0).astype(np.int32)
        self._rows.extend(shifted[1:])
        self._labels.extend(dfa.labels[1:])
        return offset

    def overlay(self, dfa: DFA | None, words: Mapping[bytes, int]) -> int:
        """Lay in a DFA whose words ``words`` have other labels: 0 removes the word.

        Each word has states of its own, which leave to the states of ``dfa`` where the text
        departs from all of ``words``. Returns the start state; 0 if nothing is accepted.
        """
        offset = 0 if dfa is None else self.include(dfa)
        start = 0 if dfa is None or dfa.start == 0 else dfa.start + offset
        # a trie: the edges and the label of each node, beside the state of ``dfa`` there
        children: list[dict[int, int]] = [{}]
        beside = [start]
        relabelled: dict[int, int] = {}
        for word, label in words.items():
            node = 0
            for byte in word:
                if byte not in children[node]:
                    children[node][byte] = len(children)
                    children.append({})
                    beside.append(int(self._rows[beside[node]][byte]))
                node = children[node][byte]
            relabelled[node] = label
        states = [0] * len(children)
        for node in range(len(children) - 1, -1, -1):  # children before parents
            label = relabelled.get(node, self._labels[beside[node]])
            edges = {byte: states[child] for byte, child in children[node].items()}
            state = self.new_state(label, edges, self._rows[beside[node]])
            states[node] = state if self.live(state) else 0
        return states[0]

    def dfa(self, start: int) -> DFA:
        """The DFA that begins in ``start``; only states reached from it are kept."""
        rows = np.stack(self._rows)  # [S, 256]
        alphabet = _alphabet_of(rows)
        table = rows[:, list(alphabet.representatives)].tolist()
        numbers = {0: 0, start: 1} if start else {0: 0}  # old state → new one
        order = list(numbers)
        for state in order:
            for target in set(table[state]):
                if target not in numbers:
                    numbers[target] = len(numbers)
                    order.append(target)
        reached = [[numbers[target] for target in table[state]] for state in order]
        labels = tuple(self._labels[state] for state in order)
        return DFA(alphabet, reached, numbers[start], labels)


def _alphabet_of(rows: np.ndarray) -> Alphabet:
    """The bytes with equal columns of ``rows`` int32[S, 256] as classes."""
    columns: dict[bytes, int] = {}
    starts: list[int] = []
    classes: list[int] = []
    for byte, column in enumerate(np.ascontiguousarray(rows.T)):
        cls = columns.setdefault(column.tobytes(), len(columns))
        if not classes or classes[-1] != cls:
            starts.append(byte)
            classes.append(cls)
    return Alphabet(BYTES, tuple(starts), tuple(classes))


def byte_edges(symbol: bytes, target: int) -> dict[int, int]:
    """The edge with this single byte to a state; none to state 0."""
    return {symbol[0]: target} if target else {}
