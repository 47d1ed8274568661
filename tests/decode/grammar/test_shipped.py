"""The texts of the shipped grammars are read by the programs that they are made for."""

from __future__ import annotations

import ast
import json
import sqlite3

import numpy as np
import pytest

from random_rules import ShortestTexts, accepts
from refllm import load
from refllm.decode.grammar import compile
from refllm.decode.grammar.automaton import step
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.masks import naive_mask
from refllm.decode.grammar.rule_grammars.context_free import ContextFree
from refllm.decode.grammar.rule_grammars.earley import recognizes
from refllm.decode.grammar.rule_grammars.ebnf import parse
from refllm.decode.grammar.rule_grammars.shipped import names, shipped

AUTOMATA = {name: ContextFree(parse(shipped(name))) for name in names()}


def read_sql(text):
    """SQLite parses the statement: what it may still miss is a name, not a word of its syntax."""
    with sqlite3.connect(":memory:") as connection:
        try:
            connection.execute("EXPLAIN " + text)
        except sqlite3.OperationalError as error:
            if any(part in str(error) for part in ("syntax", "unrecognized", "incomplete")):
                raise AssertionError(f"{text}: {error}") from error
    connection.close()


def read_lines(text):
    assert all(line.startswith("- ") and len(line) > 2 for line in text.splitlines())


READERS = {
    "json": json.loads,
    "sql_select": read_sql,
    "python_expression": lambda text: ast.parse(text, mode="eval"),
    "list": read_lines,
}


def random_text(automaton: ContextFree, rng: np.random.Generator, length: int) -> str:
    """A text whose bytes are drawn, each legal one alike, up to a length; then it is closed."""
    state = automaton.start()
    text = b""
    while len(text) < length:
        order = rng.permutation(256)
        if rng.random() < 0.7:  # printable characters first: else most of it is in strings
            order = sorted(order, key=lambda byte: not 32 <= byte < 127)
        found = ((int(byte), step(state, int(byte))) for byte in order)
        byte, after = next((each for each in found if each[1] is not None), (0, None))
        if after is None:
            break
        text += bytes([byte])
        state = after
    return ShortestTexts(automaton).closed(text, state).decode()


@pytest.mark.parametrize("name", READERS)
def test_oracle_random_texts_are_read_by_their_program(name):
    rng = np.random.default_rng(0)
    for length in (0, 1, 3, 10, *range(20, 60, 3)):
        READERS[name](random_text(AUTOMATA[name], rng, length))


@pytest.fixture(scope="module")
def tokenizer():
    return load("stdlib").tokenizer


@pytest.mark.parametrize("name", READERS)
def test_outputs_of_random_logits_are_read_by_their_program(tokenizer, name):
    grammar = compile(ebnf=shipped(name), tokenizer=tokenizer)
    shortest = ShortestTexts(grammar.automaton)
    rng = np.random.default_rng(1)
    for length in (2, 5, 8, 12):
        state = grammar.start
        text = b""
        for _ in range(length):
            logits = np.where(grammar.mask(state), rng.normal(size=grammar.vocabulary), -np.inf)
            token = int(np.argmax(logits))
            if token in grammar.end_tokens:
                break
            text += grammar.masks.trie.tokens[token]
            state = grammar.advance(state, token)
        READERS[name](shortest.closed(text, state).decode())


@pytest.mark.parametrize("name", names())
def test_oracle_masks_are_those_of_reading_each_token(tokenizer, name):
    grammar = compile(ebnf=shipped(name), tokenizer=tokenizer)
    rng = np.random.default_rng(2)
    text = EXAMPLES[name][0].encode()
    tokens = list(grammar.masks.trie.tokens)
    for cut in (0, len(text) // 2, len(text)):
        state = grammar.read(grammar.start, text[:cut])
        mask = grammar.mask(state)
        legal = rng.permutation(np.flatnonzero(mask))[:40]
        others = rng.permutation(np.flatnonzero(~mask))[:300]
        for token in map(int, [*legal, *others, *grammar.end_tokens]):
            one = naive_mask(state, [tokens[token]], [0] if token in grammar.end_tokens else [])
            assert mask[token] == one[0], (cut, tokens[token])


EXAMPLES = {
    "json": ['{"a": [1, -2.5e3, true],\n  "é\\n\\u00e9": {}}', " [ ] ", "0", '"\\""'],
    "arithmetic": ["3 * (x + 0.5) = 4\n", "1 - 2 - -a = 0\n2 = 2\n"],
    "list": ["- a\n- b c\n"],
    "chess": ["1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 4. O-O b5+", "1. f3 e5 2. g4 Qh4# 0-1"],
    "sql_select": [
        "SELECT * FROM t;",
        "SELECT DISTINCT a, t.b AS c FROM t LEFT JOIN u ON t.a = u.b WHERE NOT a < 3 AND"
        " b LIKE 'x''%' GROUP BY a HAVING COUNT(*) > 2 ORDER BY b DESC, c LIMIT 3 OFFSET 1;",
        "SELECT CASE WHEN a IS NOT NULL THEN a + 1 ELSE -2 * (b || 'c') END FROM (SELECT a FROM t)"
        " AS u WHERE a NOT IN (SELECT b FROM t) OR EXISTS (SELECT 1 FROM t);",
    ],
    "python_expression": [
        "f(x, y=[1, 2])[0, 1:n] if a and not b else {k: v for k, v in z if v > 0}",
        "1 + 2 * -x ** 3 << y | ~z",
        "lambda x, y: (x, ~y)",
        "a is not b or c not in d == e",
        "notx.y(z for z in ())",
    ],
}  # fmt: skip
COUNTEREXAMPLES = {
    "json": ["", "{a: 1}", "[1,]", "01", '"\n"', "nul", "[1] 2"],
    "arithmetic": ["3 = x\n", "1 + = 2\n", "1=1\n"],
    "list": ["", "- \n", "a\n", "- a"],
    "chess": ["e4", "1. e9 e5", "1. e8 e5", "1. e4 e5 2. Nf3 "],
    "sql_select": ["SELECT FROM t;", "SELECT a FROM select;", "SELECT a FROM t", "SELECT a t;"],
    "python_expression": ["", "a b", "if", "1.real", "f(a=1, b)", "x if y", "lambda", "not", "(a"],
}  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_oracle_examples_and_counterexamples(name):
    rules = parse(shipped(name))
    for text in EXAMPLES[name]:
        READERS.get(name, str)(text)
        assert accepts(AUTOMATA[name], text), text
        if len(text) < 40:
            assert recognizes(rules, text), text
    for text in COUNTEREXAMPLES[name]:
        assert not accepts(AUTOMATA[name], text), text
        assert not recognizes(rules, text), text


def test_every_shipped_grammar_is_described():
    from refllm.decode.grammar.rule_grammars import shipped as module

    assert all(f"| `{name}`" in (module.__doc__ or "") for name in names())


@pytest.mark.parametrize("name", ["sqlselect", "json.gbnf", "../grammars/json", ""])
def test_an_unknown_name_is_rejected(name):
    with pytest.raises(GrammarError, match="choose one of arithmetic, chess, json, list"):
        shipped(name)
