"""Masks: the walk over the trie against the definition, token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grammar_machines import SYMBOLS, reachable, starts, vocabularies
from refllm.decode.grammar.automaton import State
from refllm.decode.grammar.masks import TokenMasks, naive_mask
from refllm.decode.grammar.token_trie import TokenTrie


@pytest.mark.theorem(
    "The mask of a state equals reading every token byte by byte, for every reachable state of "
    "random automata with recursive frames, length limits and captured text, and every vocabulary",
    source="design, §2",
)
@given(starts(), vocabularies(), st.sets(st.integers(0, 3), max_size=2))
def test_the_mask_equals_brute_force(
    start: State | None, tokens: list[bytes | None], ends: set[int]
) -> None:
    if start is None:
        return
    ends = {end for end in ends if end < len(tokens)}
    masks = TokenMasks(TokenTrie(tokens), ends)
    singles = [bytes([symbol]) for symbol in SYMBOLS]
    # every token was read from these, so none is too ambiguous
    for state in reachable(start, [*tokens, *singles], 15):
        expected = naive_mask(state, tokens, ends)
        np.testing.assert_array_equal(masks.mask(state), expected)
        np.testing.assert_array_equal(masks.mask(state), expected)  # from the cache
