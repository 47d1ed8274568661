"""Reading all tokens at once: one DFA walks the token trie, a level of nodes per array operation.

From a set of root nodes, all in one state of the DFA, the state of every node below them is the
table's entry for its parent's state and its own byte. State 0 is dead and stays dead, so a level
is two gathers over the range of nodes below the live ones; the walk ends where all are dead.

A token may leave the terminal, at its end or in its middle, where the DFA accepts. These places
are the walk's *exits*, grouped by the labels that are accepted there. What follows them depends
on the stack, and is walked with these nodes as roots (``masks``). A token that ends in an exit
is legal without the stack only if the DFA can go on there: the stack may allow nothing, as after
the closing quote of a key that was read before. A walk itself depends on the DFA, the state, the
labels allowed and the roots alone, and is therefore cached.

A length limit is not part of the walk: each node carries the number of characters read since the
roots, and one walk serves every remaining length (``CountedWalk.within``).

| symbol   | name                                            | shape                   |
|----------|-------------------------------------------------|-------------------------|
| K        | nodes of the trie                               |                         |
| S, C     | states and classes of bytes of the DFA          | table int32[S, C]       |
| states   | state of each node, times C; 0 where it is dead | int32[K]                |
| counts   | characters read since the root                  | int32[K]                |

Left out: sharing walks between DFAs with equal parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from refllm.decode.grammar.automata.counts import NEVER, UNBOUNDED, RemainingCounts
from refllm.decode.grammar.automaton import Terminal
from refllm.decode.grammar.token_trie import TokenTrie

_NONE = np.zeros(0, dtype=np.int32)


class Roots:
    """Nodes of the trie where a walk begins, hashable; ``groups`` has those of each level.

    Nodes of one level are never below each other, so that each group's walk gives every node one
    state.
    """

    __slots__ = ("_key", "groups", "nodes")

    def __init__(self, trie: TokenTrie, nodes: np.ndarray) -> None:
        self.nodes = nodes  # int32, ascending, each once
        self._key = nodes.tobytes()
        levels = trie.level(nodes).tolist()
        cuts = [i for i in range(len(levels)) if i == 0 or levels[i] != levels[i - 1]]
        self.groups = [
            (levels[begin], nodes[begin:end]) for begin, end in pairwise([*cuts, len(nodes)])
        ]

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Roots) and self._key == other._key

    @property
    def nbytes(self) -> int:
        """Bytes of the nodes and of the key."""
        return 2 * self.nodes.nbytes


class Reader:
    """A terminal's DFA as arrays: states times the number of classes, so that adding a class
    gives a place in the flat table. States from which only labels that are not allowed can be
    reached are dead.
    """

    def __init__(self, terminal: Terminal) -> None:
        dfa = terminal.dfa
        table = np.array(dfa.table, dtype=np.int32)
        allowed = terminal.allowed
        alive = np.array([bool(dfa.reachable_labels(s) & allowed) for s in range(dfa.states)])
        self.alphabet = dfa.alphabet
        self.classes = table.shape[1]
        self.flat = (table * (alive[table] * self.classes)).astype(np.int32).reshape(-1)
        accepted = [label & allowed for label in dfa.labels]
        # 0, which accepts nothing, is the first
        self.label_sets = (0, *sorted(set(accepted) - {0}))
        place = {labels: i for i, labels in enumerate(self.label_sets)}
        self.label_of = np.array([place[labels] for labels in accepted], dtype=np.int32)
        self.continues: np.ndarray = np.any(alive[table], axis=1)  # bool[S], without length limits
        self.increments: np.ndarray | None = None
        self.remaining: RemainingCounts | None = None
        if terminal.counted:
            assert terminal.increments is not None
            self.remaining = terminal.remaining
            self.edges = terminal.edges
            # the numbers of characters that decide whether a state is alive or continues
            self.needed, self.largest = self._deciding_counts()
            # bytes of one class complete characters alike
            first = list(dfa.alphabet.representatives)
            self.increments = np.asarray(terminal.increments)[:, first].reshape(-1)

    def _deciding_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Per state the largest of the least numbers of characters that it and its successors
        need, and the largest of their most numbers that is bounded, int64[S] each.
        """
        assert self.remaining is not None
        least = np.where(self.remaining.least < NEVER, self.remaining.least, 0)
        most = np.where(self.remaining.most < UNBOUNDED, self.remaining.most, 0)
        needed = least.copy()
        largest = most.copy()
        for state, edges in enumerate(self.edges):
            for after, added in edges:
                needed[state] = max(needed[state], added + least[after])
                largest[state] = max(largest[state], added + most[after])
        return needed, largest

    def continues_within(self, state: int, low: int, high: int) -> bool:
        """Whether a byte may be read after which ``low`` to ``high`` characters may follow."""
        assert self.remaining is not None
        return any(
            self.remaining.possible(after, low - added, high - added)
            for after, added in self.edges[state]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        total: int = self.flat.nbytes + self.label_of.nbytes
        return total + (0 if self.increments is None else self.increments.nbytes)


@dataclass(frozen=True, eq=False)
class Exit:
    """Where the DFA accepts ``labels``: ``nodes`` int32 that have children or where the DFA cannot
    go on, ``inner`` those with children, ``bits`` the tokens that end in ``nodes``, packed uint8.
    """

    labels: int
    nodes: np.ndarray
    inner: np.ndarray
    bits: np.ndarray


@dataclass(frozen=True, eq=False)
class Walk:
    """What a walk means for tokens: ``bits`` are the tokens that end in a live node where the DFA
    can go on, packed uint8.
    """

    bits: np.ndarray
    exits: tuple[Exit, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = [a for one in self.exits for a in (one.nodes, one.inner, one.bits)]
        return self.bits.nbytes + sum(array.nbytes for array in arrays)


@dataclass(frozen=True, eq=False)
class CountedWalk:
    """The live nodes of a terminal whose characters are counted, before any limit."""

    nodes: np.ndarray  # int32[L]
    states: np.ndarray  # int32[L], of the DFA
    counts: np.ndarray  # int32[L], characters since the root
    labels: np.ndarray  # int32[L], place in the reader's ``label_sets``
    reader: Reader

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.nodes, self.states, self.counts, self.labels)
        return sum(array.nbytes for array in arrays)

    @cached_property
    def _effective(self) -> tuple[int, int]:
        """Limits beyond which nothing changes: the smallest such lower, and upper one."""
        longest = int(self.counts.max(initial=0))
        needed = self.counts + self.reader.needed[self.states]
        largest = self.counts + self.reader.largest[self.states]
        return 1 + max(longest, int(largest.max(initial=0))), max(
            longest, int(needed.max(initial=0))
        )

    def clipped(self, low: int, high: int) -> tuple[int, int]:
        """These limits of the characters that may follow the root, each replaced by the nearest
        one that allows the same tokens: far from its limits a string has one mask.
        """
        low = max(low, 0)
        assert self.reader.remaining is not None
        if self.reader.remaining.levels is not None:
            return low, high
        at_most, at_least = self._effective
        low = min(low, at_most)
        return low, min(high, max(low, at_least))

    def within(self, trie: TokenTrie, low: int, high: int) -> Walk:
        """The walk in which ``low`` to ``high`` characters may follow the root."""
        fewest = low - self.counts.astype(np.int64)
        most = high - self.counts.astype(np.int64)
        assert self.reader.remaining is not None
        alive = np.flatnonzero(self.reader.remaining.within(self.states, fewest, most))
        labels = (self.labels * (fewest <= 0))[alive]  # live nodes are within the upper limit
        continues = np.ones(len(alive), dtype=bool)
        accepting = np.flatnonzero(labels)
        continues[accepting] = self._continues(alive[accepting], low, high)
        return _walk_of(trie, self.nodes[alive], labels, continues, self.reader.label_sets)

    def _continues(self, places: np.ndarray, low: int, high: int) -> np.ndarray:
        """Whether another byte may be read within the limits, bool[P]; ``places`` int[P] are of
        live nodes. Nodes of equal state and count are asked once.
        """
        pairs, place = np.unique(
            np.stack([self.states[places], self.counts[places]]), axis=1, return_inverse=True
        )
        possible = [
            self.reader.continues_within(state, low - count, high - count)
            for state, count in pairs.T.tolist()
        ]
        return np.array(possible, dtype=bool)[place.reshape(-1)]


def walk(trie: TokenTrie, reader: Reader, state: int, roots: Roots) -> Walk | CountedWalk:
    """The walk of a DFA from ``state`` at all ``roots``."""
    parts = [_descend(trie, reader, state, level, nodes) for level, nodes in roots.groups]
    nodes = np.concatenate([part[0] for part in parts])
    states = np.concatenate([part[1] for part in parts]) // reader.classes
    labels = reader.label_of[states]
    if reader.remaining is None:
        return _walk_of(trie, nodes, labels, reader.continues[states], reader.label_sets)
    counts = np.concatenate([part[2] for part in parts])
    return CountedWalk(nodes, states, counts, labels, reader)


def _walk_of(
    trie: TokenTrie,
    nodes: np.ndarray,
    labels: np.ndarray,
    continues: np.ndarray,
    label_sets: tuple[int, ...],
) -> Walk:
    """The walk of live ``nodes`` int32[L]; ``labels`` int32[L] are places in ``label_sets``,
    ``continues`` bool[L] says where the DFA can go on.
    """
    exits = []
    places = np.flatnonzero(labels)
    if len(places):
        for label in sorted(set(labels[places].tolist())):
            here = places[labels[places] == label]
            found = nodes[here]
            goes_on = continues[here]
            found = distinct(found[~goes_on | trie.has_children[found]])
            if not len(found):
                continue
            inner = found[trie.has_children[found]]
            exits.append(Exit(label_sets[label], found, inner, trie.pack(found)))
    return Walk(trie.pack(nodes[continues]), tuple(exits))


def distinct(nodes: np.ndarray) -> np.ndarray:
    """The nodes in ascending order, each once."""
    if len(nodes) < 2:
        return nodes
    ordered = np.sort(nodes)
    return ordered[np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))]


def _descend(
    trie: TokenTrie, reader: Reader, state: int, level: int, roots: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The live nodes below ``roots`` of one level: nodes int32[L], states int32[L] times the
    number of classes, counts int32[L] (empty where no characters are counted).
    """
    columns = trie.columns(reader.alphabet)
    counted = reader.increments is not None
    first = int(roots[0])
    last = int(roots[-1])
    # states and counts of the nodes first … last
    states = np.zeros(last - first + 1, dtype=np.int32)
    states[roots - first] = state * reader.classes
    counts = np.zeros_like(states)
    live: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [(_NONE, _NONE, _NONE)]
    while True:
        begin = int(trie.children[first])
        end = int(trie.children[last + 1])
        parents = trie.parent[begin:end] - first
        places = states[parents] + columns[begin:end]  # row 0 of the table is dead, and stays so
        states = reader.flat[places]
        alive = np.flatnonzero(states)
        if not len(alive):
            break
        if counted:
            assert reader.increments is not None
            counts = counts[parents] + reader.increments[places]
        low = int(alive[0])
        high = int(alive[-1]) + 1
        live.append((alive + begin, states[alive], counts[alive] if counted else _NONE))
        states = states[low:high]
        counts = counts[low:high]
        first = begin + low
        last = begin + high - 1
    nodes, found, read = zip(*live, strict=True)
    return np.concatenate(nodes, dtype=np.int32), np.concatenate(found), np.concatenate(read)
