"""A DFA over bytes built by hand reads what was laid into it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.automata.alphabet import BYTES
from refllm.decode.grammar.automata.byte_table import ByteTable, byte_edges
from refllm.decode.grammar.automata.dfa_builders import from_words

short_words = st.binary(max_size=4).map(lambda word: bytes(97 + byte % 3 for byte in word))
languages = st.dictionaries(short_words, st.sampled_from([1, 2, 4]), max_size=6)


@given(languages, st.dictionaries(short_words, st.sampled_from([0, 8, 16]), max_size=6))
def test_an_overlay_relabels_its_words_and_no_others(base, words) -> None:
    table = ByteTable()
    dfa = table.dfa(table.overlay(from_words(base, size=BYTES), words))
    expected = {word: label for word, label in (base | words).items() if label}
    assert {bytes(word): dfa.label(word) for word in dfa.words(99)} == expected


@given(languages, st.dictionaries(short_words, st.sampled_from([0, 8]), max_size=6))
def test_every_state_of_an_overlay_can_accept(base, words) -> None:
    table = ByteTable()
    dfa = table.dfa(table.overlay(from_words(base, size=BYTES), words))
    assert all(dfa.distance(state) is not None for state in range(1, dfa.states))


def test_an_overlay_of_nothing_holds_the_words_alone() -> None:
    table = ByteTable()
    assert table.dfa(table.overlay(None, {b"ab": 2, b"a": 0})).words(9) == [(97, 98)]
    assert table.overlay(None, {b"ab": 0}) == 0


def test_two_languages_in_one_table_keep_apart() -> None:
    table = ByteTable()
    first = table.include(from_words({b"a": 1}, size=BYTES))
    second = table.include(from_words({b"b": 2}, size=BYTES))
    ones = from_words({b"a": 1}, size=BYTES).start
    dfa = table.dfa(table.new_state(edges=byte_edges(b"x", ones + first)))
    assert dfa.words(9) == [tuple(b"xa")]
    dfa = table.dfa(table.new_state(edges=byte_edges(b"x", ones + second)))
    assert dfa.words(9) == [tuple(b"xb")]


def test_an_edge_to_the_dead_state_is_no_edge() -> None:
    assert byte_edges(b"a", 0) == {}
    table = ByteTable()
    state = table.new_state(edges=byte_edges(b"a", 0))
    assert not table.live(state)
    assert table.dfa(0).empty
