"""Automata over bytes against Python's encoder and ``json.dumps``."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from automata import patterns
from refllm.decode.grammar.automata.alphabet import BYTES, CHARACTERS
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_builders import anything, from_words, never, symbols
from refllm.decode.grammar.automata.dfa_minimization import minimize
from refllm.decode.grammar.automata.dfa_operations import labelled_union, with_length
from refllm.decode.grammar.automata.utf8 import (
    json_string,
    json_string_counted,
    to_bytes,
    utf8_ranges,
)
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.patterns.regex import from_pattern

SURROGATES = range(0xD800, 0xE000)
EDGES = sorted(
    {code + d for code in (0, 0x20, 0x22, 0x5C, 0x80, 0x800, 0x1000, 0xD800, 0xE000, 0x10000)
     for d in (-1, 0, 1)} | {0x3F, 0x40, 0x7FF, 0x40000, 0x10FFFE, 0x10FFFF}
)  # fmt: skip
characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from(
    [chr(code) for code in EDGES if code >= 0 and code not in SURROGATES]
)
texts = st.text(characters, max_size=8)
codes = st.sampled_from([code for code in EDGES if code >= 0]) | st.integers(0, 0x10FFFF)


@pytest.mark.theorem(
    "the byte ranges of an interval are the UTF-8 forms of its characters, each once",
    source="RFC 3629",
)
@given(codes, codes)
@example(0, 0x10FFFF)
@example(0xD700, 0xE100)
@example(0xD800, 0xDFFF)
def test_utf8_ranges_hold_each_character_once(low: int, high: int):
    low, high = min(low, high), max(low, high)
    sequences = list(utf8_ranges(low, high))
    sizes = [np.prod([b - a + 1 for a, b in sequence], dtype=int) for sequence in sequences]
    surrogates = max(0, min(high, 0xDFFF) - max(low, 0xD800) + 1)
    assert sum(sizes) == high - low + 1 - surrogates
    end = low - 1
    for sequence, size in zip(sequences, sizes, strict=True):
        # Each is an interval of characters, which begins after the one before has ended.
        first = ord(bytes(a for a, _ in sequence).decode())
        last = ord(bytes(b for _, b in sequence).decode())
        assert end < first <= last <= high
        assert last - first + 1 == size
        end = last
    heads = [sequence[0] for sequence in sequences]
    for one in heads:
        for other in heads:
            assert one == other or one[1] < other[0] or other[1] < one[0]


@pytest.mark.theorem(
    "to_bytes accepts the UTF-8 form of exactly the accepted texts", source="RFC 3629"
)
@given(st.lists(st.tuples(codes, codes), min_size=1, max_size=3), st.lists(texts, max_size=20))
def test_to_bytes_accepts_the_encoded_texts(pairs: list[tuple[int, int]], words: list[str]):
    dfa = labelled_union(
        [(symbols([(min(p), max(p))], size=CHARACTERS), 1 << i) for i, p in enumerate(pairs)]
    )
    encoded = to_bytes(dfa)
    for low, high in pairs:
        words += [chr(code) for code in (low, high, low - 1, high + 1) if 0 <= code <= 0x10FFFF]
    for word in words:
        if not any(ord(letter) in SURROGATES for letter in word):
            assert encoded.label(word.encode()) == dfa.label(word)


@given(st.binary(max_size=6))
@example("\ud800".encode("utf-8", "surrogatepass"))
@example(b"\xc0\x80")
@example(b"\xf4\x90\x80\x80")
@example(b"\xe0\x80\x80")
def test_to_bytes_accepts_no_bytes_that_are_not_utf8(data: bytes):
    try:
        data.decode()
        valid = True
    except UnicodeDecodeError:
        valid = False
    assert to_bytes(anything(CHARACTERS)).matches(data) == valid


@pytest.mark.theorem(
    "json_string accepts what json.dumps(ensure_ascii=False) writes for exactly the accepted texts",
    source="json",
)
@given(patterns(), st.lists(texts | st.text("ab-\n", max_size=4), min_size=1, max_size=20))
@example("^[^]$", [chr(code) for code in range(0x81)])
@example('^[^"\\\\]$', ['"', "\\", "/", "\x7f", "\u2028", "😀"])
def test_json_string_is_what_json_dumps_writes(pattern: str, words: list[str]):
    dfa = from_pattern(pattern, search=True)
    quoted = json_string(dfa)
    for word in words:
        written = json.dumps(word, ensure_ascii=False).encode()
        assert quoted.label(written) == dfa.label(word)


@pytest.mark.theorem(
    "what json_string accepts, json.dumps writes: no other spelling of the same text", source="json"
)
@given(st.data())
def test_json_string_accepts_one_spelling(data: st.DataObject):
    quoted = json_string(anything(CHARACTERS))
    state = quoted.start
    written = bytearray()
    for _ in range(40):
        followers = [byte for byte in range(BYTES) if quoted.step(state, byte)]
        if not followers:
            break
        byte = data.draw(st.sampled_from(followers))
        written.append(byte)
        state = quoted.step(state, byte)
    else:
        # Where nothing ends it by chance, the shortest way to a closing quote does.
        written += bytes(quoted.shortest(state) or ())
    text = json.loads(written.decode())
    assert json.dumps(text, ensure_ascii=False).encode() == written


@pytest.mark.parametrize(
    "spelling",
    [
        b'"\\/"', b'"\\u0041"', b'"\\u000A"', b'"\\u000a"', b'"\\u001F"', b'"\x1f"', b'"\n"', b'"',
        b'""a', b'"\\ud83d\\ude00"', b'"\xed\xa0\x80"', b"a",
    ],
)  # fmt: skip
def test_other_spellings_are_not_accepted(spelling: bytes):
    assert not json_string(anything(CHARACTERS)).matches(spelling)


@pytest.mark.theorem(
    "the increments along the bytes of a JSON string sum to its number of characters",
    source="json_string_counted",
)
@given(texts)
@example("".join(map(chr, range(0x20))) + '"\\é€😀')
def test_increments_count_characters(text: str):
    quoted, increments = json_string_counted(anything(CHARACTERS))
    state = quoted.start
    counts = []
    for byte in json.dumps(text, ensure_ascii=False).encode():
        counts.append(int(increments[state, byte]))
        state = quoted.step(state, byte)
    assert sum(counts) == len(text)
    assert increments.shape == (quoted.states, BYTES)
    assert increments.dtype == np.int8
    # A character counts with its last byte, so the text without its last byte counts one less.
    assert counts[0] == counts[-1] == 0
    assert not text or counts[-2] == 1


@given(patterns())
def test_every_state_over_bytes_is_live_and_few_are_equivalent(pattern: str):
    dfa = from_pattern(pattern, search=True)
    for encoded in (to_bytes(dfa), json_string(dfa)):
        assert all(distance >= 0 for distance in encoded.distances[1:])
        smallest = minimize(encoded)
        assert smallest.states <= encoded.states <= smallest.states + dfa.states
        assert minimize(smallest).states == smallest.states


def test_labels_stay_on_their_words():
    words = {"": 1, "a": 2, "é\n": 4, "é": 3}
    dfa = from_words(words, size=CHARACTERS)
    for word, label in words.items():
        assert to_bytes(dfa).label(word.encode()) == label
        assert json_string(dfa).label(json.dumps(word, ensure_ascii=False).encode()) == label
    assert json_string(dfa).cardinality == 4


def test_the_same_automaton_has_one_json_string_as_long_as_it_lives():
    dfa = from_words({"a": 1}, size=CHARACTERS)
    quoted = json_string(dfa)
    assert json_string(dfa) is json_string_counted(dfa)[0] is quoted
    kept = weakref.ref(quoted)
    del dfa, quoted
    gc.collect()
    assert kept() is None


def test_degenerate_and_rejected_languages():
    assert to_bytes(never(CHARACTERS)).empty
    quoted, increments = json_string_counted(never(CHARACTERS))
    assert quoted.empty
    assert increments.shape == (1, BYTES)
    assert json_string(from_words({"": 1}, size=CHARACTERS)).words(2) == [tuple(b'""')]
    with pytest.raises(TypeError, match="over characters"):
        json_string(anything(BYTES))
    many: DFA = with_length(anything(CHARACTERS), 0, 20_000)
    with pytest.raises(GrammarError, match="more than 50,000 states"):
        json_string(many)
