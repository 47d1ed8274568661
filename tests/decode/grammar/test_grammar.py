"""The public way: compile, mask, advance; what is rejected, and how."""

from __future__ import annotations

import json
import pickle
import re
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grammar_machines import read
from refllm import load
from refllm.checkpoints.tokenizer import MissingTokenizer, Tokenizer
from refllm.decode.grammar import Grammar, GrammarError, compile
from refllm.decode.grammar.masks import naive_mask
from refllm.decode.grammar.token_trie import TokenTrie, trie_of
from refllm.errors import InputError

TOKENIZER = Tokenizer.train(
    ['{"name": "Ada", "age": 36, "tags": ["x", "yz"]} é 12.5 abab yes no true false null\n'] * 3,
    vocab_size=330,
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["x", "yz"]}, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}
DESCRIPTIONS: dict[str, dict[str, object]] = {
    "regex": {"regex": r"(ab|é)+[0-9]{1,3}"},
    "choices": {"choices": ["yes", "no", "yesterday", ""]},
    "ebnf": {"ebnf": 'root ::= "(" root ")" | "x" root | "é"'},
    "json_schema": {"json_schema": SCHEMA},
    "open schema": {"json_schema": {"type": "object", "additionalProperties": {"type": "null"}}},
    "unique": {"json_schema": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}},
}


@cache
def grammar_of(name: str) -> Grammar:
    return compile(tokenizer=TOKENIZER, **DESCRIPTIONS[name])  # type: ignore[arg-type]


def sample(grammar: Grammar, seed: int, most: int = 60) -> list[int]:
    """Legal tokens drawn at random; the end tokens are preferred after ``most / 2`` tokens."""
    rng = np.random.default_rng(seed)
    state = grammar.start
    output: list[int] = []
    while len(output) < most:
        legal = np.flatnonzero(grammar.mask(state))
        ends = [token for token in legal if token in grammar.end_tokens]
        if not len(legal):
            break
        token = int(rng.choice(ends if ends and len(output) > most // 2 else legal))
        output.append(token)
        state = grammar.advance(state, token)
    return output


@pytest.mark.theorem(
    "In every kind of grammar the mask of every sampled state equals brute force over the "
    "vocabulary, and advancing by a token is advancing by its bytes",
    source="specs/serving.md, I5.3",
)
@given(st.sampled_from(sorted(DESCRIPTIONS)), st.integers(0, 2**16))
def test_masks_and_states_of_each_kind(name: str, seed: int) -> None:
    grammar = grammar_of(name)
    tokens = trie_of(TOKENIZER).tokens
    state = grammar.start
    for token in sample(grammar, seed, 12):
        mask = grammar.mask(state)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, naive_mask(state, tokens, grammar.end_tokens))
        assert grammar.accepting(state) == all(mask[end] for end in grammar.end_tokens)
        if token not in grammar.end_tokens:
            assert grammar.advance(state, token) == read(state, tokens[token] or b"")
        state = grammar.advance(state, token)


@pytest.mark.theorem(
    "A completed output of a regular expression full-matches it, and of a JSON Schema is JSON that "
    "it describes",
    source="specs/serving.md, I5.1",
)
@given(st.sampled_from(sorted(DESCRIPTIONS)), st.integers(0, 2**16))
def test_completed_outputs_are_of_the_language(name: str, seed: int) -> None:
    grammar = grammar_of(name)
    output = sample(grammar, seed)
    if not output or output[-1] not in grammar.end_tokens:
        return
    text = TOKENIZER.decode(output[:-1])
    assert grammar.matches(text)
    if name == "regex":
        assert re.fullmatch(str(DESCRIPTIONS[name]["regex"]), text)
    elif name == "choices":
        assert text in DESCRIPTIONS[name]["choices"]  # type: ignore[operator]
    elif name == "json_schema":
        value = json.loads(text)
        assert set(value) <= {"name", "age", "tags"}
        assert len(value["name"]) <= 6
        assert value.get("age", 0) >= 0
        assert all(tag in ("x", "yz") for tag in value.get("tags", []))
    elif name == "unique":
        value = json.loads(text)
        assert len(set(value)) == len(value)


@given(st.sampled_from(sorted(DESCRIPTIONS)), st.integers(0, 2**16))
def test_illegal_tokens_have_probability_zero(name: str, seed: int) -> None:
    grammar = grammar_of(name)
    rng = np.random.default_rng(seed)
    state = grammar.start
    for token in sample(grammar, seed, 6):
        logits = rng.standard_normal(grammar.vocabulary) * 50
        mask = grammar.mask(state)
        weights = np.exp(np.where(mask, logits - logits[mask].max(), -np.inf))
        assert (weights[~mask] == 0).all()
        illegal = int(rng.choice(np.flatnonzero(~mask)))
        with pytest.raises(InputError, match="may not follow"):
            grammar.advance(state, illegal)
        state = grammar.advance(state, token)


def test_nothing_follows_an_end_token() -> None:
    grammar = grammar_of("choices")
    ended = grammar.advance(grammar.start, 0)  # the empty text is a choice
    assert not grammar.mask(ended).any()
    assert not grammar.accepting(ended)
    with pytest.raises(InputError, match="not complete"):
        grammar.advance(ended, 0)


def test_forced_text_and_only_tokens() -> None:
    grammar = compile(choices=["alpha", "alps"], tokenizer=TOKENIZER)
    assert grammar.forced(grammar.start) == b"alp"
    after = grammar.read(grammar.start, b"alph")
    assert after is not None
    assert grammar.forced(after) == b"a"
    assert grammar.only_token(after) == TOKENIZER.encode("a")[0]
    end = grammar.read(after, b"a")
    assert end is not None
    assert grammar.forced(end) == b""
    assert grammar.only_token(end) == 0  # the end token
    assert grammar.only_token(grammar_of("unique").start) is None


@pytest.mark.parametrize("name", sorted(DESCRIPTIONS))
def test_a_pickled_grammar_is_the_same_grammar(name: str) -> None:
    grammar = grammar_of(name)
    copy = pickle.loads(pickle.dumps(grammar))
    mine, other = grammar.start, copy.start
    for token in sample(grammar, 7, 15):
        np.testing.assert_array_equal(grammar.mask(mine), copy.mask(other))
        np.testing.assert_array_equal(grammar.mask(mine), copy.mask(mine))  # states travel
        mine, other = grammar.advance(mine, token), copy.advance(other, token)
    assert copy.notes == grammar.notes


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choices": ["a"]}, "regex and choices"),
        ({"regex": r"[^\s\S]"}, "unsatisfiable"),
        ({"regex": "(?!a)a"}, "unsatisfiable"),
        ({"choices": []}, "unsatisfiable"),
        ({"choices": "yes"}, "list of texts"),
        ({"choices": [1]}, "must be texts"),
        ({"choices": ["\ud800"]}, "not Unicode"),
        ({"regex": 5}, "must be a str"),
        ({"regex": "("}, "regular expression"),
        ({"ebnf": 'root ::= "a" root'}, "unsatisfiable"),
        ({"json_schema": False}, "unsatisfiable"),
        ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "unsatisfiable"),
        ({"regex": "a", "order": "none"}, "order"),
        ({"regex": "a", "whitespace": "wide"}, "whitespace"),
        ({"regex": "a", "end_tokens": [10**6]}, "outside the vocabulary"),
    ],
)
def test_what_cannot_be_compiled_is_one_clear_error(
    description: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        compile(tokenizer=TOKENIZER, **description)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_grammar_errors_are_input_errors_and_a_tokenizer_is_needed() -> None:
    assert issubclass(GrammarError, InputError)
    with pytest.raises(InputError, match="no tokenizer"):
        compile(regex="a", tokenizer=MissingTokenizer("somewhere"))
    with pytest.raises(InputError, match=r"model\.tokenizer"):
        compile(regex="a", tokenizer="gpt2")  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_outside_the_vocabulary_is_an_error(token: int) -> None:
    grammar = grammar_of("regex")
    with pytest.raises(InputError, match="outside the vocabulary"):
        grammar.advance(grammar.start, token)


def test_notes_say_what_the_vocabulary_cannot_do() -> None:
    assert grammar_of("regex").notes == ()
    tokenizer = Tokenizer.train(["ab"], vocab_size=257)
    tokenizer.limit = 60
    tokenizer.end_tokens = frozenset()
    notes = compile(choices=["!"], tokenizer=tokenizer).notes
    assert any("single byte" in note for note in notes)
    assert any("no end token" in note for note in notes)


def test_a_grammar_serves_the_bundled_model() -> None:
    model = load("stdlib")
    grammar = compile(regex="[ab]{3}", tokenizer=model.tokenizer)
    assert grammar.vocabulary == model.config.vocab_size
    assert grammar.end_tokens == set(model.config.eos_token_ids)
    assert re.fullmatch("[ab]{3}", model.generate("a or b?", max_tokens=5, grammar=grammar))


def test_an_automaton_of_ones_own_serves_as_well() -> None:
    class Nothing:
        def start(self) -> None:
            return None

    with pytest.raises(GrammarError, match="unsatisfiable"):
        Grammar(Nothing(), TokenTrie([b"a"]))
