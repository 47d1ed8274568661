"""A pushdown automaton over bytes whose terminals are DFAs: the simple definition, one byte at a
time.

What is regular (a string, a number, a literal) is one ``Terminal``, a DFA. What is not (an
object, an array, a rule of a context-free grammar) is a ``Frame`` on a stack. A ``State`` is a
set of threads, the ways in which the bytes read so far can be parsed. Each thread is somewhere in
the DFA of its terminal; where that accepts, the thread may leave it, and the frame on top of its
stack says what may follow (``Frame.resume``). A thread that leaves with an empty stack has read a
whole text: the state accepts.

States are values. Reading a byte returns a new state that shares the rest of the stacks, so that
branching and rolling back cost nothing. Two token sequences of the same bytes lead to equal
states.

Every thread can be completed, if frames push only terminals and frames that can be: a thread
whose DFA can no longer accept is dropped at once.

Sources: persistent stacks and one automaton per rule, XGrammar (arXiv 2411.15100, §3); DFAs as
the terminals of a context-free grammar that needs no lexer of its own, llguidance
(``docs/toktrie.md``, and derivre). Fast masks for all tokens are in ``masks``.

| symbol    | name                                   | type                          |
|-----------|----------------------------------------|-------------------------------|
| q         | ``Thread.state``, a state of the DFA   | int, 0 is dead                |
| labels    | bit set of what the DFA accepted in q  | int                           |

Threads that differ by their stacks alone become one whose stack is a fork, where the frames allow
it (``stacks``): an ambiguous context-free grammar has no more threads than its terminals have
states.

Left out: left recursion (a frame that resumes at once in a copy of itself would never read a
byte; ``settle`` stops it with an error).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from refllm.array_types import Array
from refllm.decode.grammar.automata.counts import UNBOUNDED, RemainingCounts, remaining_counts
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.stacks import Entry, Frame, Joinable, Stack, join, parts

__all__ = [
    "Automaton",
    "Entry",
    "Frame",
    "Resumption",
    "Stack",
    "State",
    "Terminal",
    "Thread",
    "accepting",
    "enter",
    "leave",
    "settle",
    "step",
]

MAX_THREADS = 5_000


@dataclass(frozen=True)
class Terminal:
    """A regular part of the text: what ``dfa`` (over bytes) accepts with one of the labels
    ``allowed``, and ``minimum`` to ``maximum`` characters of it.

    ``increments`` int8[S, 256] says which bytes complete a character (see ``utf8``); it is needed
    only where the length is limited. With ``capture`` the bytes read are passed to ``resume``.
    """

    dfa: DFA
    allowed: int = -1
    minimum: int = 0
    maximum: int | None = None
    capture: bool = False
    increments: Array | None = field(default=None, compare=False, repr=False)

    @property
    def counted(self) -> bool:
        """Whether the length is limited, so that characters are counted."""
        return self.minimum > 0 or self.maximum is not None

    @cached_property
    def remaining(self) -> RemainingCounts:
        """How many characters may follow each state of the DFA."""
        assert self.increments is not None, "a length limit needs increments"
        labels = np.array(self.dfa.labels) & self.allowed
        return remaining_counts(
            np.asarray(self.dfa.byte_table), np.asarray(self.increments), labels != 0
        )

    def alive(self, state: int, count: int) -> bool:
        """Whether the DFA, in ``state`` after ``count`` characters, can still accept."""
        if not self.dfa.reachable_labels(state) & self.allowed:
            return False
        if not self.counted:
            return True
        return self.remaining.possible(state, *self.limits(count))

    @cached_property
    def edges(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Per state the states that a byte leads to, with the characters that it completes, each
        pair once; without those that reach no allowed label.
        """
        dfa = self.dfa
        first = dfa.alphabet.representatives
        adds = np.zeros((dfa.states, len(first)), dtype=np.int8)
        if self.increments is not None:
            adds = np.asarray(self.increments)[:, list(first)]
        rows = zip(dfa.table, adds.tolist(), strict=True)
        pairs = [sorted(set(zip(row, added, strict=True))) for row, added in rows]
        alive = [bool(dfa.reachable_labels(state) & self.allowed) for state in range(dfa.states)]
        return tuple(tuple((s, n) for s, n in row if alive[s]) for row in pairs)

    def continues(self, state: int, count: int) -> bool:
        """Whether another byte may be read in ``state`` after ``count`` characters."""
        if not self.counted:
            return bool(self.edges[state])
        return any(self.alive(after, count + added) for after, added in self.edges[state])

    def limits(self, count: int) -> tuple[int, int]:
        """The fewest and the most characters that may follow ``count`` of them."""
        most = UNBOUNDED if self.maximum is None else self.maximum - count
        return self.minimum - count, most

    def accepted(self, state: int, count: int) -> int:
        """The labels accepted in ``state`` after ``count`` characters; 0 where it does not."""
        if count < self.minimum or (self.maximum is not None and count > self.maximum):
            return 0
        return self.dfa.labels[state] & self.allowed


class Thread(NamedTuple):
    """One way to parse what was read: a place in a terminal, and the stack below.

    ``texts`` has what was read above each capturing frame of the stack, lowest first, and last
    what the terminal read if that captures.
    """

    terminal: Terminal
    state: int
    count: int  # type: ignore[assignment]  # tuple has a method of this name
    texts: tuple[bytes, ...]
    stack: Stack | None


class Resumption(NamedTuple):
    """A stack whose top is to be resumed: with these labels, ``texts`` of its capturing frames
    and ``text`` of the terminal that was left. Without a stack the whole text was read.
    """

    stack: Stack | None
    labels: int
    texts: tuple[bytes, ...]
    text: bytes | None


class State:
    """A set of threads, and whether what was read is a whole text (``finished``)."""

    __slots__ = ("_hash", "finished", "threads")

    def __init__(self, threads: frozenset[Thread], finished: bool) -> None:
        self.threads = threads
        self.finished = finished
        self._hash = hash((threads, finished))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, State):
            return NotImplemented
        return (
            self._hash == other._hash
            and self.finished == other.finished
            and self.threads == other.threads
        )

    def __reduce__(self) -> tuple[object, ...]:
        return State, (self.threads, self.finished)

    def __repr__(self) -> str:
        return f"State({set(self.threads)}, finished={self.finished})"


class Automaton(Protocol):
    """A grammar: where its texts begin."""

    def start(self) -> State | None:
        """The state before the first byte; None if no text is legal."""
        ...


def enter(entries: Iterable[Entry]) -> State | None:
    """The state that begins with any of these terminals on their stacks; None without one."""
    return settle(opened for terminal, stack in entries for opened in _open(terminal, stack, ()))


def step(state: State, byte: int) -> State | None:
    """The state after one more byte; None if no legal text continues so.

    >>> from refllm.decode.grammar.automata.dfa_builders import literal
    >>> state = enter([(Terminal(literal(b"ab", size=256)), None)])
    >>> accepting(step(step(state, 97), 98)), step(state, 98)
    (True, None)
    """
    return settle(moved for thread in state.threads if (moved := _move(thread, byte)) is not None)


def accepting(state: State) -> bool:
    """Whether the bytes read are a whole text of the grammar."""
    return state.finished


def settle(waiting: Iterable[Thread | Resumption]) -> State | None:
    """The state of these threads and of all that follow them without reading a byte; None in
    place of a state without threads that does not accept.

    Raises
    ------
    GrammarError
        if there are more than ``MAX_THREADS``: the grammar is left-recursive, or too ambiguous.
    """
    stack = list(waiting)
    found: set[Thread | Resumption] = set()
    joinable: set[Stack | None] = set()  # to be resumed together, when nothing else is left
    finished = False
    while stack or joinable:
        if not stack:
            for part in parts(join(joinable)):
                if part is None:
                    finished = True
                else:
                    stack.extend(_resume(Resumption(part, 1, (), None)))
            joinable = set()
            continue
        item = stack.pop()
        if item in found:
            continue
        found.add(item)
        if len(found) > MAX_THREADS:
            raise GrammarError(
                f"the grammar can be parsed in more than {MAX_THREADS} ways at once: it is "
                "left-recursive or too ambiguous"
            )
        if isinstance(item, Thread):
            labels = item.terminal.accepted(item.state, item.count)
            if labels:
                stack.append(leave(item, labels))
        elif item.stack is None:
            finished = True
        elif isinstance(item.stack.frame, Joinable):
            joinable.add(item.stack)
        else:
            stack.extend(_resume(item))
    threads = _joined(
        item
        for item in found
        if isinstance(item, Thread) and item.terminal.continues(item.state, item.count)
    )
    if not threads and not finished:
        return None
    return State(threads, finished)


def _joined(threads: Iterable[Thread]) -> frozenset[Thread]:
    """The threads; those that differ by their stacks alone become one, where these can join."""
    found: list[Thread] = []
    stacks: dict[Thread, set[Stack | None]] = {}
    for thread in threads:
        stack = thread.stack
        if stack is not None and isinstance(stack.frame, Joinable):
            stacks.setdefault(thread._replace(stack=None), set()).add(stack)
        else:
            found.append(thread)
    found.extend(thread._replace(stack=join(several)) for thread, several in stacks.items())
    return frozenset(found)


def leave(thread: Thread, labels: int) -> Resumption:
    """What remains to be done when ``thread`` leaves its terminal with these labels."""
    texts = thread.texts
    text = None
    if thread.terminal.capture:
        text = texts[-1]
        texts = texts[:-1]
    return Resumption(thread.stack, labels, texts, text)


def _move(thread: Thread, byte: int) -> Thread | None:
    """The thread after one more byte of its terminal; None if it dies."""
    terminal, state, count, texts, stack = thread
    if terminal.counted:
        assert terminal.increments is not None
        count += int(terminal.increments[state, byte])
    state = terminal.dfa.step(state, byte)
    if not terminal.alive(state, count):
        return None
    if texts:
        texts = tuple(text + bytes([byte]) for text in texts)
    return Thread(terminal, state, count, texts, stack)


def _open(
    terminal: Terminal | None, stack: Stack | None, texts: tuple[bytes, ...]
) -> Iterator[Thread | Resumption]:
    """The thread at the start of ``terminal``, with empty texts for the frames pushed with it;
    a resumption where there is no terminal; nothing where the terminal accepts no text.
    """
    capturing = 0 if stack is None else stack.captures
    texts = texts[:capturing] + (b"",) * (capturing - len(texts))
    if terminal is None:
        yield Resumption(stack, 1, texts, None)
        return
    if terminal.capture:
        texts = (*texts, b"")
    if terminal.alive(terminal.dfa.start, 0):
        yield Thread(terminal, terminal.dfa.start, 0, texts, stack)


def _resume(item: Resumption) -> Iterator[Thread | Resumption]:
    """What may follow when the top of the stack is resumed."""
    stack, labels, texts, text = item
    assert stack is not None
    if stack.frame.captures:
        text = texts[-1]
        texts = texts[:-1]
    for terminal, following in stack.frame.resume(labels, text, stack.below):
        yield from _open(terminal, following, texts)
