"""Forced bytes: the unique legal continuation, found by enumeration."""

from __future__ import annotations

import pytest
from hypothesis import given

from grammar_machines import reachable, starts, too_ambiguous_rejects
from refllm.decode.grammar.automata.alphabet import BYTES
from refllm.decode.grammar.automata.dfa_operations import star, symbols
from refllm.decode.grammar.automaton import State, Terminal, enter, step
from refllm.decode.grammar.forced import forced_byte, forced_bytes


def next_bytes(state: State) -> list[int]:
    """All bytes that may follow, tried one by one."""
    return [byte for byte in range(BYTES) if step(state, byte) is not None]


@pytest.mark.theorem(
    "The forced bytes are the longest text that every continuation begins with: at each of them "
    "the state does not accept and one byte alone is legal, after them neither holds",
    source="Zheng et al. 2024, §4",
)
@given(starts())
def test_forced_bytes_are_the_unique_continuation(start: State | None) -> None:
    if start is None:
        return
    with too_ambiguous_rejects():
        for state in reachable(start, [b"a", b"b", b","], 6):
            at = state
            for byte in forced_bytes(state, 20):
                assert not at.finished
                assert next_bytes(at) == [byte] == [forced_byte(at)]
                after = step(at, byte)
                assert after is not None
                at = after
            if len(forced_bytes(state, 20)) < 20:
                assert at.finished or len(next_bytes(at)) != 1


def test_an_endless_text_is_cut() -> None:
    endless = Terminal(star(symbols([(97, 97)], size=BYTES)), minimum=0)
    state = enter([(endless, None)])
    assert forced_bytes(state) == b""  # it accepts: the text may end
    assert forced_byte(state) is None
