"""What the tests of automata and regular expressions share: words, random automata, patterns.

A language is compared with another by *all* words up to a length over a few symbols.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import product

import numpy as np
from hypothesis import strategies as st

from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_builders import from_edges
from strategies import seeds

Word = tuple[int, ...]

SYMBOLS = 3  # the size of the alphabet of random automata


@cache
def all_words(symbols: int, longest: int) -> tuple[Word, ...]:
    """All words over 0 … symbols-1 of at most ``longest`` symbols, shorter ones first."""
    lengths = range(longest + 1)
    return tuple(word for n in lengths for word in product(range(symbols), repeat=n))


@cache
def all_texts(letters: str, longest: int) -> tuple[str, ...]:
    """All texts of these letters of at most ``longest`` characters, shorter ones first."""
    return tuple("".join(text) for n in range(longest + 1) for text in product(letters, repeat=n))


def language(dfa: DFA, longest: int) -> dict[Word, int]:
    """The words of at most ``longest`` symbols that are accepted, with their labels."""
    found = {word: dfa.label(word) for word in all_words(dfa.size, longest)}
    return {word: label for word, label in found.items() if label}


def random_dfa(seed: int, states: int = 4, labels: Iterable[int] = (1,)) -> DFA:
    """A trimmed, mostly not minimal automaton over ``SYMBOLS`` symbols."""
    rng = np.random.default_rng(seed)
    edges: list[list[tuple[int, int, int]]] = [[]]
    for _ in range(states):
        targets = rng.integers(0, states + 1, SYMBOLS).tolist()
        edges.append([(symbol, symbol, to) for symbol, to in enumerate(targets) if to])
    accepted = rng.choice([0, 0, *labels], states).tolist()
    return from_edges(SYMBOLS, edges, 1, {s + 1: label for s, label in enumerate(accepted)})


dfas = st.builds(random_dfa, seeds, st.integers(1, 5))
labelled_dfas = st.builds(random_dfa, seeds, st.integers(1, 5), st.just((1, 2, 5)))

LETTERS = "ab-\n"  # word characters, another one, and the line end
_ATOMS = ["a", "b", "-", r"\n", ".", r"\w", r"\W", r"\s", "[ab]", "[^a]", "[^-b]", "[a-b]", "(?:)"]
_ASSERTIONS = ["^", "$", r"\b", r"\B"]
_QUANTIFIERS = ["*", "+", "?", "{2}", "{1,2}", "{0,3}", "{2,}", "*?", "{1,3}?"]


def patterns(*, lookaheads: bool = False) -> st.SearchStrategy[str]:
    """Regular expressions over ``LETTERS`` that Python's ``re`` and ECMA 262 both read."""

    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        group = inner.map("(?:{})".format)
        ways = [
            st.lists(inner, min_size=2, max_size=3).map("".join),
            st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
            st.tuples(group, st.sampled_from(_QUANTIFIERS)).map("".join),
        ]
        if lookaheads:
            ahead = st.sampled_from(["(?={})", "(?!{})"])
            ways.append(st.tuples(ahead, inner).map(lambda pair: pair[0].format(pair[1])))
        return st.one_of(ways)

    leaves = st.sampled_from(_ATOMS) | st.sampled_from(_ASSERTIONS)
    return st.recursive(leaves, extend, max_leaves=8)
