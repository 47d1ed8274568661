"""Random automata for the tests of grammars: small DFAs, frames that recurse, tokens of every kind.

A random frame is a row of a table: for each alternative the labels that it wants, a terminal, and
the frames that it pushes. Frames push only above terminals that read at least one byte, so that no
grammar is left-recursive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st

from refllm.decode.grammar.automata.alphabet import BYTES
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_builders import from_edges, literal
from refllm.decode.grammar.automaton import Stack, State, Terminal, enter, step
from refllm.decode.grammar.errors import GrammarError

LETTERS = "ab,é"
SYMBOLS = sorted(set(LETTERS.encode()))


@st.composite
def dfas(draw: st.DrawFn, *, states: int = 4, labels: int = 2, empty: bool = True) -> DFA:
    """A trimmed DFA over the bytes of ``LETTERS``, with a few others in ranges; ``empty`` allows
    the empty text.
    """
    size = draw(st.integers(1, states))
    # with few edges, states that accept and cannot go on are common
    targets_of = st.sampled_from([0] * draw(st.sampled_from([1, 12])) + list(range(1, size + 1)))
    edges: list[list[tuple[int, int, int]]] = [[]]
    for _ in range(size):
        targets = draw(st.lists(targets_of, min_size=len(SYMBOLS), max_size=len(SYMBOLS)))
        edges.append(
            [
                (symbol, symbol, target)
                for symbol, target in zip(SYMBOLS, targets, strict=True)
                if target
            ]
        )
    accepted = {i: draw(st.integers(0, 2**labels - 1)) for i in range(1, size + 1)}
    accepted[size] = accepted[size] or 1
    if not empty:  # a new start that nothing returns to
        edges.append(list(edges[1]))
        return from_edges(BYTES, edges, size + 1, accepted)
    return from_edges(BYTES, edges, 1, accepted)


@st.composite
def terminals(draw: st.DrawFn, *, empty: bool = True) -> Terminal:
    """A terminal, with limits and captures in any combination."""
    dfa = draw(dfas(empty=empty))
    if dfa.empty:
        dfa = literal(b"a", size=BYTES)
    allowed = draw(st.sampled_from([-1, 1, 2, 3]))
    capture = draw(st.booleans())
    if not draw(st.booleans()):
        return Terminal(dfa, allowed, capture=capture)
    # classes of bytes count alike in each state
    seed = draw(st.integers(0, 2**16))
    counts = np.random.default_rng(seed).integers(0, 2, (dfa.states, dfa.alphabet.count))
    lengths = np.diff(np.array((*dfa.alphabet.starts, BYTES)))
    columns = np.repeat(np.array(dfa.alphabet.classes), lengths)
    minimum = draw(st.integers(0, 3))
    maximum = draw(st.none() | st.integers(minimum, minimum + 3))
    increments = counts[:, columns].astype(np.int8)
    return Terminal(dfa, allowed, minimum, maximum, capture, increments)


@dataclass(frozen=True)
class Alternative:
    """One way to go on: wanted if the labels have one of ``labels`` and, of a captured text, the
    length has this parity.
    """

    labels: int
    parity: int | None
    terminal: Terminal | None
    pushed: tuple[int, ...]


@dataclass(eq=False)
class Table:
    """The frames of one random grammar."""

    captures: list[bool] = field(default_factory=list)
    rows: list[list[Alternative]] = field(default_factory=list)

    def stack(self, names: Iterable[int], below: Stack | None) -> Stack | None:
        """``below`` with these frames pushed, the last one on top."""
        for name in names:
            below = Stack(RandomFrame(self, name), below)
        return below


@dataclass(frozen=True)
class RandomFrame:
    """Row ``name`` of ``table``."""

    table: Table
    name: int

    @property
    def captures(self) -> bool:
        return self.table.captures[self.name]

    def resume(
        self, label_bits: int, text: bytes | None, below: Stack | None
    ) -> Iterator[tuple[Terminal | None, Stack | None]]:
        for each in self.table.rows[self.name]:
            if not label_bits & each.labels:
                continue
            if text is not None and each.parity is not None and len(text) % 2 != each.parity:
                continue
            yield each.terminal, self.table.stack(each.pushed, below)


@st.composite
def starts(draw: st.DrawFn) -> State | None:
    """The first state of a random grammar: one terminal or two, on stacks of up to three frames."""
    table = Table()
    names = draw(st.integers(1, 3))
    for _ in range(names):
        table.captures.append(draw(st.booleans()))
        row = []
        for _ in range(draw(st.integers(1, 3))):
            pushed = draw(st.lists(st.integers(0, names - 1), max_size=2).map(tuple))
            terminal: Terminal | None = draw(terminals(empty=not pushed))
            if not pushed and draw(st.booleans()):
                terminal = None
            labels = draw(st.sampled_from([1, 2, 3]))
            parity = draw(st.none() | st.integers(0, 1))
            row.append(Alternative(labels, parity, terminal, pushed))
        table.rows.append(row)
    entries = []
    for _ in range(draw(st.integers(1, 2))):
        pushed = draw(st.lists(st.integers(0, names - 1), max_size=3))
        entries.append((draw(terminals(empty=not pushed)), table.stack(pushed, None)))
    return enter(entries)


@st.composite
def vocabularies(draw: st.DrawFn, *, single: bool = False) -> list[bytes | None]:
    """Tokens over the bytes of ``LETTERS``: equal ones, empty ones, some that are no text, some
    that end inside a character; with ``single`` every byte is a token.
    """
    text = st.text(LETTERS, min_size=1, max_size=5).map(str.encode)
    part = st.lists(st.sampled_from(SYMBOLS), max_size=3).map(bytes)
    tokens: list[bytes | None] = draw(st.lists(text | part | st.none(), max_size=12))
    tokens += draw(st.lists(st.sampled_from(tokens), max_size=2)) if tokens else []
    if single:
        tokens += [bytes([symbol]) for symbol in SYMBOLS]
    return draw(st.permutations(tokens))


@contextmanager
def too_ambiguous_rejects() -> Iterator[None]:
    """Random grammars that become too ambiguous are no examples."""
    try:
        yield
    except GrammarError:
        reject()


def read(state: State | None, text: bytes) -> State | None:
    """The state after ``text``, byte by byte."""
    for byte in text:
        if state is None:
            return None
        state = step(state, byte)
    return state


def reachable(start: State, tokens: Iterable[bytes | None], limit: int) -> list[State]:
    """The first ``limit`` states that tokens reach, breadth first; a grammar that becomes too
    ambiguous rejects the example.
    """
    found = [start]
    seen = {start}
    for state in found:
        for token in tokens:
            with too_ambiguous_rejects():
                after = read(state, token) if token else None
            if after is not None and after not in seen and len(found) < limit:
                seen.add(after)
                found.append(after)
    return found
