"""Automata: every fact that is computed on the graph, against enumeration of words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from automata import SYMBOLS, all_words, dfas, labelled_dfas, language
from refllm.decode.grammar.automata.alphabet import BYTES, CHARACTERS, alphabet_of, common_alphabet
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_builders import (
    anything,
    from_edges,
    from_words,
    literal,
    never,
    symbols,
)
from refllm.decode.grammar.errors import GrammarError

LONGEST = 6  # words of random automata (at most 6 states) up to here decide all facts


@pytest.mark.theorem(
    "words(limit) are the first words of the language, shorter ones first, in order",
    source="DFA.words",
)
@given(dfas, st.integers(0, 40))
def test_words_are_the_first_words_of_the_language(dfa: DFA, limit: int):
    expected = [word for word in all_words(SYMBOLS, LONGEST) if dfa.matches(word)]
    found = dfa.words(limit)
    known = [word for word in found if len(word) <= LONGEST]
    assert known == expected[:limit]
    assert found[: len(known)] == known
    assert len(set(found)) == len(found)
    assert all(dfa.matches(word) for word in found)
    assert len(found) == limit or found == expected


@given(dfas)
def test_finite_longest_and_cardinality_equal_enumeration(dfa: DFA):
    # A language is infinite iff it has a word of S to 2 S - 1 symbols (pumping lemma).
    live = dfa.states - 1
    assume(2 * live - 1 <= LONGEST)
    words = language(dfa, LONGEST)
    finite = all(len(word) < live for word in words)
    assert dfa.finite == finite
    assert dfa.cardinality == (len(words) if finite else None)
    assert dfa.longest == (max(map(len, words)) if finite and words else None)


@given(dfas)
def test_distance_and_shortest_equal_enumeration(dfa: DFA):
    for state in range(dfa.states):
        from_here = [w for w in all_words(SYMBOLS, 5) if dfa.labels[dfa.run(w, state)]]
        if not from_here:
            assert state == 0
            assert dfa.distance(state) is None
            assert dfa.shortest(state) is None
        else:
            assert dfa.distance(state) == len(from_here[0])
            assert dfa.shortest(state) == from_here[0]


@given(labelled_dfas)
def test_reachable_labels_are_those_of_the_words_that_follow(dfa: DFA):
    for state in range(dfa.states):
        labels = 0
        for word in all_words(SYMBOLS, 5):
            labels |= dfa.labels[dfa.run(word, state)]
        assert dfa.reachable_labels(state) == labels


@pytest.mark.theorem("every state but the dead one accepts some word", source="dfa.py, trimmed")
@given(dfas)
def test_every_state_but_the_dead_one_is_live(dfa: DFA):
    assert set(dfa.table[0]) == {0}
    assert dfa.labels[0] == 0
    assert all(distance >= 0 for distance in dfa.distances[1:])
    reached = {dfa.start, *(t for row in dfa.table[1:] for t in row)}
    assert reached | {0} == set(range(dfa.states)) | {0}


def test_byte_table_is_step_for_every_state_and_byte():
    dfa = from_words({b"\x00\xff": 1, b"\x7f": 2, b"\x80abc": 4}, size=BYTES)
    expected = [[dfa.step(state, byte) for byte in range(BYTES)] for state in range(dfa.states)]
    np.testing.assert_array_equal(dfa.byte_table, expected)
    assert dfa.byte_table.dtype == np.int32
    with pytest.raises(TypeError, match="over bytes"):
        _ = literal("a", size=CHARACTERS).byte_table


@given(st.dictionaries(st.text("abc", max_size=4), st.sampled_from([1, 2, 4]), max_size=8))
def test_from_words_accepts_each_word_with_its_label_and_no_other(words: dict[str, int]):
    dfa = from_words(words, size=CHARACTERS)
    assert {"".join(map(chr, w)): dfa.label(w) for w in dfa.words(20)} == words
    assert dfa.cardinality == len(words)


def test_degenerate_languages():
    assert never(BYTES).empty
    assert never(BYTES).words(3) == []
    assert never(BYTES).finite
    assert never(BYTES).cardinality == 0
    assert never(BYTES).shortest() is None
    assert literal("", size=CHARACTERS).words(3) == [()]
    assert literal("", size=CHARACTERS).longest == 0
    assert symbols([], size=BYTES).empty
    assert anything(BYTES).cardinality is None
    assert anything(BYTES).matches(b"\x00\xff")


def test_no_text_with_a_surrogate_is_accepted():
    everything = anything(CHARACTERS)
    for code in (0xD7FF, 0xE000, 0x10FFFF):
        assert everything.matches([code])
    for code in (0xD800, 0xDFFF):
        assert not everything.matches([code])


@given(st.lists(st.lists(st.integers(0, 19), max_size=8), min_size=1, max_size=4))
def test_alphabet_of_has_one_class_per_combination_of_sets(lists: list[list[int]]):
    members = [set(numbers) for numbers in lists]
    sets = [[(number, number) for number in sorted(group)] for group in members]
    alphabet, parts = alphabet_of(20, sets)
    kind = [tuple(symbol in group for group in members) for symbol in range(20)]
    for a in range(20):
        for b in range(20):
            assert (alphabet.class_of(a) == alphabet.class_of(b)) == (kind[a] == kind[b])
    for group, classes in zip(members, parts, strict=True):
        assert group == {s for s in range(20) if alphabet.class_of(s) in classes}
    assert sum(alphabet.weights) == 20
    assert [alphabet.class_of(s) for s in alphabet.representatives] == list(range(alphabet.count))


@given(st.lists(st.sets(st.integers(0, 9)), min_size=1, max_size=3))
def test_common_alphabet_refines_each_and_is_the_coarsest(groups: list[set[int]]):
    alphabets = [alphabet_of(10, [[(s, s) for s in sorted(group)]])[0] for group in groups]
    common, maps = common_alphabet(alphabets)
    for alphabet, columns in zip(alphabets, maps, strict=True):
        assert [columns[common.class_of(s)] for s in range(10)] == [
            alphabet.class_of(s) for s in range(10)
        ]
    kinds = {tuple(a.class_of(s) for a in alphabets) for s in range(10)}
    assert common.count == len(kinds)


def test_too_many_states_are_rejected_before_they_are_built():
    chain = [[], *([(0, 0, state + 1)] for state in range(1, 60_000)), []]
    with pytest.raises(GrammarError, match="more than 50,000 states"):
        from_edges(2, chain, 1, {60_000: 1})
    with pytest.raises(GrammarError, match="more than 50,000 states"):
        from_words({(0,) * 60_000: 1}, size=2)
