"""The automaton, byte by byte: frames that recurse, text that is captured, states as values."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grammar_machines import SYMBOLS, reachable, read, starts, too_ambiguous_rejects
from refllm.decode.grammar.automata.alphabet import BYTES
from refllm.decode.grammar.automata.dfa_operations import from_words, literal, star, symbols
from refllm.decode.grammar.automaton import Stack, State, Terminal, accepting, enter
from refllm.decode.grammar.errors import GrammarError

OPEN = Terminal(from_words({b"(": 1, b"x": 2}, size=BYTES))
CLOSE = Terminal(literal(b")", size=BYTES))


@dataclass(frozen=True)
class Brackets:
    """( … ) around another of its kind, or x; ``inside`` after the opening bracket."""

    inside: bool = False
    captures = False

    def resume(
        self, label_bits: int, text: bytes | None, below: Stack | None
    ) -> Iterator[tuple[Terminal | None, Stack | None]]:
        if self.inside:
            yield CLOSE, below
        elif label_bits == 2:
            yield None, below
        else:
            yield OPEN, Stack(Brackets(), Stack(Brackets(inside=True), below))


@dataclass(frozen=True)
class Twice:
    """The text above, then a colon, then the same text again."""

    phase: int = 0
    text: bytes = b""

    @property
    def captures(self) -> bool:
        return self.phase != 1

    def resume(
        self, label_bits: int, text: bytes | None, below: Stack | None
    ) -> Iterator[tuple[Terminal | None, Stack | None]]:
        if self.phase == 0:
            assert text is not None
            yield Terminal(literal(b":", size=BYTES)), Stack(Twice(1, text), below)
        elif self.phase == 1:
            assert text is None
            yield letters(), Stack(Twice(2, self.text), below)
        elif text == self.text:
            yield None, below


@dataclass(frozen=True)
class Endless:
    """Left recursion: resumes at once, on a larger stack."""

    depth: int = 0
    captures = False

    def resume(
        self, label_bits: int, text: bytes | None, below: Stack | None
    ) -> Iterator[tuple[Terminal | None, Stack | None]]:
        yield None, Stack(Endless(self.depth + 1), below)


@dataclass(frozen=True)
class Through:
    """Reads nothing: the frame below goes on."""

    captures = False

    def resume(
        self, label_bits: int, text: bytes | None, below: Stack | None
    ) -> Iterator[tuple[Terminal | None, Stack | None]]:
        yield None, below


def letters() -> Terminal:
    return Terminal(star(symbols([(97, 98)], size=BYTES)))


def whole(start: State | None, text: bytes) -> bool:
    after = read(start, text)
    return after is not None and accepting(after)


@pytest.mark.theorem(
    "Frames that push themselves accept exactly the balanced texts, of every length up to a bound",
    source="design, §2",
)
def test_a_recursive_frame_accepts_balanced_texts() -> None:
    start = enter([(OPEN, Stack(Brackets()))])
    legal = {b"(" * n + b"x" + b")" * n for n in range(5)}
    for length in range(8):
        for text in map(bytes, itertools.product(b"(x)", repeat=length)):
            assert whole(start, text) == (text in legal)


def test_a_capturing_frame_gets_what_was_read_above_it() -> None:
    start = enter([(letters(), Stack(Twice()))])
    for length in range(6):
        for text in map(bytes, itertools.product(b"ab:", repeat=length)):
            first, colon, second = text.partition(b":")
            legal = bool(colon) and first == second and b":" not in second
            assert whole(start, text) == legal


@dataclass(frozen=True)
class Outer:
    """Captures everything above it, which inner frames capture in part; keeps what it gets."""

    captures = True

    def resume(
        self, label_bits: int, text: bytes | None, below: Stack | None
    ) -> Iterator[tuple[Terminal | None, Stack | None]]:
        assert text is not None
        yield Terminal(literal(b"=" + text, size=BYTES)), below


def test_nested_captures_each_get_their_own_text() -> None:
    start = enter([(letters(), Stack(Twice(), Stack(Outer())))])
    assert whole(start, b"ab:ab=ab:ab")
    assert not whole(start, b"ab:ab=ab")
    assert not whole(start, b"ab:aa=ab:aa")


def test_deep_nesting_needs_no_deep_recursion() -> None:
    start = enter([(OPEN, Stack(Brackets()))])
    depth = 3000
    opened = read(start, b"(" * depth)
    again = read(enter([(OPEN, Stack(Brackets()))]), b"(" * depth)
    assert opened == again
    assert opened != read(start, b"(" * (depth - 1))
    assert hash(opened) == hash(again)
    assert whole(opened, b"x" + b")" * depth)
    assert not whole(opened, b"x" + b")" * (depth - 1))


def test_many_frames_can_end_at_once() -> None:
    stack = None
    for _ in range(3000):
        stack = Stack(Through(), stack)
    assert whole(enter([(CLOSE, stack)]), b")")


def test_left_recursion_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(GrammarError, match="left-recursive"):
        enter([(None, Stack(Endless()))])


def test_a_terminal_without_a_legal_text_is_no_way_to_go_on() -> None:
    assert enter([(Terminal(literal(b"a", size=BYTES), allowed=2), None)]) is None
    assert enter([]) is None


@given(starts(), st.lists(st.sampled_from(SYMBOLS), max_size=6).map(bytes))
def test_a_step_leaves_the_old_state_as_it_was(start: State | None, text: bytes) -> None:
    if start is None:
        return
    before = (set(start.threads), start.finished, hash(start))
    reachable(start, [text, text[:2]], 5)
    assert (set(start.threads), start.finished, hash(start)) == before


@given(starts(), st.lists(st.sampled_from(SYMBOLS), max_size=6).map(bytes))
def test_a_pickled_state_accepts_the_same_texts(start: State | None, text: bytes) -> None:
    if start is None:
        return
    with too_ambiguous_rejects():
        singles = [bytes([symbol]) for symbol in SYMBOLS]
        states = reachable(start, singles, 3)
        for state, copy in zip(states, pickle.loads(pickle.dumps(states)), strict=True):
            for end in range(len(text) + 1):
                mine = read(state, text[:end])
                other = read(copy, text[:end])
                assert (mine is None) == (other is None)
                assert mine is None or (mine.finished, len(mine.threads)) == (
                    other.finished,
                    len(other.threads),
                )
