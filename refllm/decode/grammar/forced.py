"""What a grammar leaves no choice about: bytes and tokens that must follow.

A byte is forced if the state does not accept (the end would be another choice) and every thread
can read this byte alone. The forced bytes of a state are the chain of these. In SGLang's terms,
they are the compressed edge of a finite-state machine; here the chain also runs through frames,
from the closing quote of a key to the opening bracket of its value.

Forced *bytes* may be written by several sequences of tokens. So appending them without sampling
(``decode.jump_forward``) changes the distribution of tokens. A forced *token*, where the mask has
only one, has probability 1 after masking, and appending it changes nothing.

Source: Zheng et al. 2024 (SGLang, arXiv 2312.07104), section 4.

Left out: the tokens of the forced bytes (``decode.jump_forward`` encodes them as the tokenizer
does).
"""

from __future__ import annotations

from collections.abc import Iterator

from refllm.decode.grammar.automaton import State, Thread, step

MOST_FORCED = 4096  # a language without finite texts could go on for ever


def forced_bytes(state: State, most: int = MOST_FORCED) -> bytes:
    """The bytes that follow in every text; empty where there is a choice or the text may end.

    >>> from refllm.decode.grammar.automaton import Terminal, enter
    >>> from refllm.decode.grammar.automata.dfa_operations import from_words
    >>> start = enter([(Terminal(from_words({b"abc": 1, b"abd": 1}, size=256)), None)])
    >>> forced_bytes(start)
    b'ab'
    """
    found = bytearray()
    at: State | None = state
    while at is not None and len(found) < most:
        byte = forced_byte(at)
        if byte is None:
            break
        found.append(byte)
        at = step(at, byte)
    return bytes(found)


def forced_byte(state: State) -> int | None:
    """The only byte that may follow; None if there is another, or if the text may end."""
    if state.finished:
        return None
    tried: set[int] = set()
    legal: int | None = None
    for thread in state.threads:
        for byte in _first_bytes(thread):
            if byte in tried:
                continue
            tried.add(byte)
            # where the terminal ends with this byte, its frame may allow nothing after it
            if step(state, byte) is not None:
                if legal is not None:
                    return None
                legal = byte
    return legal


def _first_bytes(thread: Thread) -> Iterator[int]:
    """The bytes after which the thread's terminal can be completed."""
    terminal = thread.terminal
    row = terminal.dfa.table[thread.state]
    for low, high, cls in terminal.dfa.alphabet.intervals():
        if not row[cls]:
            continue
        for byte in range(low, high + 1):
            count = thread.count
            if terminal.counted:
                assert terminal.increments is not None
                count += int(terminal.increments[thread.state, byte])
            if terminal.alive(row[cls], count):
                yield byte
