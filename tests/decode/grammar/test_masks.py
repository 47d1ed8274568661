"""Masks: the walk over the trie against the definition, token by token."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grammar_machines import (
    SYMBOLS,
    dfas,
    reachable,
    read,
    starts,
    terminals,
    vocabularies,
)
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.grammar.automata.alphabet import BYTES
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_operations import anything, literal
from refllm.decode.grammar.automata.utf8 import json_string_counted
from refllm.decode.grammar.automaton import State, Terminal, enter
from refllm.decode.grammar.bounded_cache import BoundedCache
from refllm.decode.grammar.masks import TokenMasks, naive_mask
from refllm.decode.grammar.token_trie import ROOT, TokenTrie, trie_of

SINGLES = [bytes([symbol]) for symbol in SYMBOLS]


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
    # every token was read from these, so none is too ambiguous
    for state in reachable(start, [*tokens, *SINGLES], 15):
        expected = naive_mask(state, tokens, ends)
        np.testing.assert_array_equal(masks.mask(state), expected)
        np.testing.assert_array_equal(masks.mask(state), expected)  # from the cache


@given(starts(), vocabularies(), st.integers(0, 3))
def test_caches_too_small_for_anything_change_no_mask(
    start: State | None, tokens: list[bytes | None], kilobytes: int
) -> None:
    if start is None:
        return
    masks = TokenMasks(TokenTrie(tokens), mask_bytes=1024 * kilobytes, walk_bytes=1024 * kilobytes)
    for state in reachable(start, [*tokens, *SINGLES], 8):
        np.testing.assert_array_equal(masks.mask(state), naive_mask(state, tokens))
        for cache in (masks.masks, masks.walks, masks.following):
            cache.check()


@pytest.mark.theorem(
    "Every state that tokens reach accepts or has a legal token, if each byte is a token and each "
    "terminal can be completed",
    source="specs/serving.md, I5.2",
)
@given(terminals(), vocabularies(single=True))
def test_there_are_no_dead_ends(terminal: Terminal, tokens: list[bytes | None]) -> None:
    start = enter([(terminal, None)])
    if start is None:
        return
    masks = TokenMasks(TokenTrie(tokens))
    for state in reachable(start, tokens, 15):
        assert state.finished or masks.mask(state).any()


@given(starts(), st.lists(st.sampled_from(SYMBOLS), max_size=6).map(bytes), st.data())
def test_equal_bytes_lead_to_equal_states_however_they_are_cut(
    start: State | None, text: bytes, data: st.DataObject
) -> None:
    if start is None:
        return
    reachable(start, [text], 2)  # rejects what is too ambiguous
    cut = data.draw(st.integers(0, len(text)))
    first = read(start, text[:cut])
    parts = read(first, text[cut:]) if first is not None else None
    whole = read(start, text)
    assert parts == whole
    if whole is None:
        return
    assert hash(parts) == hash(whole)
    masks = TokenMasks(TokenTrie([b"a", b"b"]))
    masks.mask(whole)
    masks.mask(parts)
    assert (masks.masks.hits, masks.masks.misses) == (1, 1)


@given(dfas(), vocabularies(), st.data())
def test_allowed_labels_are_those_of_the_language_that_accepts_them_alone(
    dfa: DFA, tokens: list[bytes | None], data: st.DataObject
) -> None:
    allowed = data.draw(st.sampled_from([1, 2, 3]))
    accepted = tuple(label & allowed for label in dfa.labels)
    assume(any(accepted))
    start = enter([(Terminal(dfa, allowed), None)])
    masks = TokenMasks(TokenTrie(tokens))
    # by enumeration: a token is legal if some text of up to S more bytes is accepted
    texts = [bytes(t) for n in range(dfa.states) for t in itertools.product(SYMBOLS, repeat=n)]
    assume(len(texts) < 4000)
    expected = [
        bool(token) and any(accepted[dfa.run(token + text)] for text in texts) for token in tokens
    ]
    found = [False] * len(tokens) if start is None else masks.mask(start).tolist()
    assert found == expected


def test_a_string_far_from_its_limit_has_one_mask() -> None:
    dfa, increments = json_string_counted(anything(0x110000))
    terminal = Terminal(dfa, maximum=1000, increments=increments)
    masks = TokenMasks(TokenTrie([bytes([byte]) for byte in range(256)] + [b"abc", b'abc"']))
    state = read(enter([(terminal, None)]), b'"')
    for _ in range(500):
        assert state is not None
        masks.mask(state)
        state = read(state, b"a")
    # the table of the DFA, the walk, and the walk within the limits
    assert masks.walks.misses == 3
    end = read(state, b"a" * 500)
    assert end is not None
    assert np.flatnonzero(masks.mask(end)).tolist() == [ord('"')]


def test_end_tokens_are_legal_exactly_where_the_text_may_end() -> None:
    tokens = [b"a", b"</s>", None, b"a"]
    state = enter([(Terminal(literal(b"a", size=BYTES)), None)])
    masks = TokenMasks(TokenTrie(tokens), [1, 2])
    assert masks.mask(state).tolist() == [True, False, False, True]
    assert masks.mask(read(state, b"a")).tolist() == [False, True, True, False]


def test_a_changed_mask_does_not_change_the_next_one() -> None:
    state = enter([(Terminal(literal(b"a", size=BYTES)), None)])
    masks = TokenMasks(TokenTrie([b"a", b"b"]))
    masks.mask(state)[:] = False
    assert masks.mask(state).tolist() == [True, False]


# --- the trie -------------------------------------------------------------------------------


@given(vocabularies())
def test_the_trie_holds_every_token_at_the_node_of_its_bytes(tokens: list[bytes | None]) -> None:
    trie = TokenTrie(tokens)
    for token, node in zip(tokens, trie.node.tolist(), strict=True):
        assert (node == ROOT) == (not token)
        assert trie.text(node) == (token or b"")
        assert trie.level(np.array([node])).tolist() == [len(token or b"")]
    texts = {token[:end] for token in tokens if token for end in range(len(token) + 1)} | {b""}
    assert {trie.text(node) for node in range(len(trie))} == texts
    for node in range(len(trie)):
        children = range(trie.children[node], trie.children[node + 1])
        assert all(trie.parent[child] == node for child in children)
        assert trie.has_children[node] == (len(children) > 0)


@given(vocabularies(), st.data())
def test_packed_nodes_are_the_tokens_that_stand_there(
    tokens: list[bytes | None], data: st.DataObject
) -> None:
    trie = TokenTrie(tokens)
    some = st.sets(st.integers(1, max(1, len(trie) - 1)))
    nodes = sorted(data.draw(some)) if len(trie) > 1 else []
    packed = trie.pack(np.array(nodes, dtype=np.int32))
    assert trie.unpack(packed).tolist() == [node in nodes for node in trie.node.tolist()]


def test_a_tokenizer_has_one_trie_as_long_as_it_lives() -> None:
    tokenizer = Tokenizer.train(["ab ab"], vocab_size=258)
    trie = trie_of(tokenizer)
    assert trie_of(tokenizer) is trie
    other = Tokenizer.train(["cd cd"], vocab_size=258)
    assert trie_of(other).tokens[257] == b"cd"
    tokenizer.limit = 200
    assert trie_of(tokenizer).vocabulary == 200
    kept = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert kept() is None


# --- the cache ------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=40))
def test_the_cache_keeps_the_most_recent_values_that_fit(uses: list[tuple[int, int]]) -> None:
    cache: BoundedCache[bytes] = BoundedCache(50, len, overhead=1)
    model: dict[int, bytes] = {}  # in the order of use
    for key, size in uses:
        value = model.pop(key, None)
        found = cache.get(key, lambda size=size: bytes(size))
        assert len(found) == (size if value is None else len(value))
        model[key] = found
        while sum(len(each) + 1 for each in model.values()) > 50:
            del model[next(iter(model))]
        cache.check()
        assert len(cache) == len(model)


def test_a_value_larger_than_the_cache_is_not_kept() -> None:
    cache: BoundedCache[bytes] = BoundedCache(3, len, overhead=0)
    assert cache.get("small", lambda: b"123") == b"123"
    assert cache.get("large", lambda: b"1234") == b"1234"
    assert cache.get("small", lambda: b"") == b"123"
    assert len(cache) == 1
