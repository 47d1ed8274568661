"""The algebra of automata against the algebra of sets of words, and its laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automata import SYMBOLS, all_words, dfas, labelled_dfas, language
from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_minimization import (
    equivalent_states,
    minimize,
    same_language,
)
from refllm.decode.grammar.automata.dfa_operations import (
    anything,
    complement,
    concatenate,
    contains,
    difference,
    from_words,
    intersect,
    labelled_union,
    literal,
    never,
    optional,
    relabel,
    star,
    symbols,
    union,
    with_length,
)
from refllm.decode.grammar.errors import GrammarError

N = 5
WORDS = all_words(SYMBOLS, N)


@given(labelled_dfas, labelled_dfas, dfas)
def test_boolean_operations_are_those_of_sets_of_words(a: DFA, b: DFA, c: DFA):
    in_a, in_b, in_c = (language(dfa, N) for dfa in (a, b, c))
    assert language(intersect(a, b, c), N) == {
        w: label for w, label in in_a.items() if w in in_b and w in in_c
    }
    assert language(union(a, b, c), N) == {
        w: in_a.get(w, 0) | in_b.get(w, 0) | in_c.get(w, 0)
        for w in WORDS
        if w in in_a or w in in_b or w in in_c
    }
    assert language(difference(a, b), N) == {w: x for w, x in in_a.items() if w not in in_b}
    assert language(complement(a), N) == {w: 1 for w in WORDS if w not in in_a}
    assert language(relabel(a, 8), N) == dict.fromkeys(in_a, 8)


@given(dfas, labelled_dfas)
def test_concatenation_is_that_of_words(a: DFA, b: DFA):
    in_a, in_b = language(a, N), language(b, N)
    expected: dict[tuple[int, ...], int] = {}
    for first in in_a:
        for second, label in in_b.items():
            if len(first) + len(second) <= N:
                expected[first + second] = expected.get(first + second, 0) | label
    assert language(concatenate(a, b), N) == expected


@given(dfas)
def test_star_is_the_least_fixed_point(a: DFA):
    words = [word for word in language(a, N) if word]
    expected = {()}
    added = {()}
    while added:
        added = {x + y for x in added for y in words if len(x) + len(y) <= N} - expected
        expected |= added
    assert set(language(star(a), N)) == expected
    assert set(language(optional(a), N)) == {(), *language(a, N)}


@given(labelled_dfas, st.integers(0, 4), st.none() | st.integers(0, 5))
def test_with_length_keeps_the_words_of_these_lengths(a: DFA, minimum: int, maximum: int | None):
    limited = with_length(a, minimum, maximum)
    assert language(limited, N) == {
        w: label
        for w, label in language(a, N).items()
        if minimum <= len(w) and (maximum is None or len(w) <= maximum)
    }
    if maximum is not None:
        assert limited.finite


@given(labelled_dfas, dfas)
def test_labelled_union_says_which_language_a_word_is_in(a: DFA, b: DFA):
    joined = labelled_union([(a, 2), (b, 4)])
    for word in WORDS:
        assert joined.label(word) == 2 * a.matches(word) + 4 * b.matches(word)


@pytest.mark.theorem("De Morgan's laws and double complement hold as equal automata", source="sets")
@given(dfas, dfas)
def test_de_morgan_and_double_complement(a: DFA, b: DFA):
    assert same_language(complement(union(a, b)), intersect(complement(a), complement(b)))
    assert same_language(complement(intersect(a, b)), union(complement(a), complement(b)))
    assert same_language(complement(complement(a)), a)
    assert same_language(difference(a, b), intersect(a, complement(b)))
    assert contains(a, b) == (set(language(b, N)) <= set(language(a, N)))


@pytest.mark.theorem(
    "in a minimal automaton no two states are equivalent, and its language is unchanged",
    source="Myhill and Nerode; Valmari and Lehtinen, STACS 2008",
)
@given(labelled_dfas)
def test_minimization_leaves_no_two_equivalent_states(dfa: DFA):
    smallest = minimize(dfa)
    assert language(smallest, N) == language(dfa, N)
    futures = {
        tuple(smallest.labels[smallest.run(word, state)] for word in WORDS)
        for state in range(smallest.states)
    }
    assert len(futures) == smallest.states


@given(labelled_dfas)
def test_equivalent_states_equals_the_table_filling_algorithm(dfa: DFA):
    different = {
        (p, q) for p in range(dfa.states) for q in range(p) if dfa.labels[p] != dfa.labels[q]
    }
    different |= {(p, 0) for p in range(1, dfa.states)}
    before = -1
    while len(different) != before:
        before = len(different)
        for p in range(dfa.states):
            for q in range(p):
                pairs = zip(dfa.table[p], dfa.table[q], strict=True)
                if any((max(x, y), min(x, y)) in different for x, y in pairs):
                    different.add((p, q))
    block = equivalent_states(dfa.table, dfa.labels)
    for p in range(dfa.states):
        for q in range(p):
            assert (block[p] != block[q]) == ((p, q) in different)


@pytest.mark.theorem("automata of one language have equal minimal tables", source="Myhill, Nerode")
@given(labelled_dfas, labelled_dfas)
def test_same_language_iff_the_same_words(a: DFA, b: DFA):
    # Two automata of at most 6 states differ on a word of at most 6 + 6 - 2 symbols.
    one_sided = difference(a, b).empty and difference(b, a).empty
    assert same_language(a, b) == (one_sided and language(a, N) == language(b, N))
    assert same_language(union(a, b), union(b, a))


def test_a_minimal_alphabet_has_no_two_equal_columns():
    dfa = union(symbols([(97, 99)], size=CHARACTERS), symbols([(100, 122)], size=CHARACTERS))
    assert dfa.alphabet.starts == (0, 97, 123)
    assert dfa.states == 3


def test_complement_over_characters_accepts_no_surrogate():
    outside = complement(literal("a", size=CHARACTERS))
    assert not outside.matches([0xD800])
    assert outside.matches([0xE000])
    assert outside.matches([0x61, 0x61])
    assert same_language(complement(never(CHARACTERS)), anything(CHARACTERS))


def test_with_length_leaves_out_what_cannot_end_in_time():
    words = from_words({"ab": 1, "abcdefgh": 1}, size=CHARACTERS)
    assert with_length(words, 0, 4).words(9) == [(97, 98)]
    assert with_length(words, 3, 7).empty
    assert with_length(words, 5, 4).empty


def test_a_product_that_is_too_large_is_rejected():
    # The 17th symbol from the end is 1: 2 ** 17 states.
    ending = concatenate(literal((1,), size=2), with_length(anything(2), 16, 16))
    with pytest.raises(GrammarError, match="more than 50,000 states"):
        concatenate(anything(2), ending)
