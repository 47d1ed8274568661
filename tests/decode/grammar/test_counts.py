"""Length limits beside a DFA: which states are alive, against enumeration of what may follow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grammar_machines import dfas
from refllm.decode.grammar.automata.alphabet import BYTES
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_operations import literal, star
from refllm.decode.grammar.automaton import Terminal


def numbers_by_enumeration(
    dfa: DFA, increments: np.ndarray, accepting: set[int], most: int
) -> list[set[int]]:
    """The numbers of characters up to ``most`` that may follow each state: forwards, as pairs."""
    found = []
    for first in range(dfa.states):
        seen = {(first, 0)}
        pending = [(first, 0)]
        while pending:
            state, count = pending.pop()
            for byte in dfa.alphabet.representatives:
                after = dfa.step(state, byte), count + int(increments[state, byte])
                if after[0] and after[1] <= most and after not in seen:
                    seen.add(after)
                    pending.append(after)
        found.append({count for state, count in seen if state in accepting})
    return found


@pytest.mark.theorem(
    "A state is alive under a length limit exactly if some continuation has a number of "
    "characters within it",
    source="design, §2",
)
@given(dfas(states=4), st.integers(0, 2**16), st.sampled_from([-1, 1, 2]), st.data())
def test_alive_means_that_a_length_within_the_limits_can_be_reached(
    dfa: DFA, seed: int, allowed: int, data: st.DataObject
) -> None:
    increments = np.random.default_rng(seed).integers(0, 2, (dfa.states, BYTES)).astype(np.int8)
    minimum = data.draw(st.integers(0, 6))
    maximum = data.draw(st.none() | st.integers(minimum, 8))
    terminal = Terminal(dfa, allowed, minimum, maximum, increments=increments)
    accepting = {i for i, label in enumerate(dfa.labels) if label & allowed}
    most = 30  # beyond it every set of numbers repeats: at most 5 states, limits up to 8
    # one symbol for each class, so that increments of other bytes do not matter
    for byte in range(BYTES):
        first = dfa.alphabet.representatives[dfa.alphabet.class_of(byte)]
        increments[:, byte] = increments[:, first]
    numbers = numbers_by_enumeration(dfa, increments, accepting, most)
    for state in range(1, dfa.states):
        for count in range(10):
            high = most if maximum is None else maximum - count
            expected = any(minimum - count <= n <= high for n in numbers[state])
            assert terminal.alive(state, count) == expected
            if terminal.counted:
                low, up = terminal.limits(count)
                one = terminal.remaining.within(np.array([state]), np.array([low]), np.array([up]))
                assert bool(one[0]) == expected


def test_lengths_that_are_no_interval_are_exact() -> None:
    pairs = star(literal(b"ab", size=BYTES))
    each_byte = np.ones((pairs.states, BYTES), dtype=np.int8)
    odd = Terminal(pairs, minimum=3, maximum=3, increments=each_byte)
    assert not odd.alive(pairs.start, 0)
    far = Terminal(pairs, minimum=1001, maximum=1002, increments=each_byte)
    assert far.alive(pairs.start, 0)
    assert not Terminal(pairs, minimum=1001, maximum=1001, increments=each_byte).alive(1, 0)
    assert far.remaining.levels is not None
