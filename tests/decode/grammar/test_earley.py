"""Earley's recogniser against languages that are known otherwise: ``re``, and counting."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from random_rules import texts
from refllm.decode.grammar.rule_grammars.earley import recognizes
from refllm.decode.grammar.rule_grammars.ebnf import parse
from refllm.decode.grammar.rule_grammars.rules import (
    Characters,
    Literal,
    Pattern,
    Position,
    Rule,
    RuleSet,
)


def equal(text):
    half = len(text) // 2
    return text == "a" * half + "b" * half


def balanced(text):
    depth = 0
    for letter in text:
        depth += 1 if letter == "a" else -1
        if depth < 0:
            return False
    return depth == 0


LANGUAGES = {
    "equal numbers": ('root ::= "" | "a" root "b"', equal),
    "palindromes": (
        'root ::= "" | "a" | "b" | "a" root "a" | "b" root "b"',
        lambda text: text == text[::-1],
    ),
    "balanced": ('root ::= ("a" root "b")*', balanced),
    "left recursion": (
        'root ::= root "b" | "a"',
        lambda text: re.fullmatch("ab*", text) is not None,
    ),
    "nothing but empty": ("root ::= e e e\ne ::= f?\nf ::= e", lambda text: text == ""),
    "empty in many ways": ('root ::= root root | "" | "a"', lambda text: set(text) <= {"a"}),
    "counts": (
        'root ::= ("a" | "ab"){2,3}',
        lambda text: re.fullmatch("(a|ab){2,3}", text) is not None,
    ),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_oracle_languages_that_are_known(name):
    grammar, member = LANGUAGES[name]
    rules = parse(grammar)
    for text in texts("ab", 7):
        assert recognizes(rules, text) == member(text), text


def test_oracle_hidden_left_recursion():
    rules = parse('root ::= e root "b" | "a"\ne ::= "" | "b" "b"')
    for text in texts("ab", 7):  # (bb)^m a b^n, with at least as many b as pairs
        found = re.fullmatch("((?:bb)*)a(b*)", text)
        expected = found is not None and len(found[1]) // 2 <= len(found[2])
        assert recognizes(rules, text) == expected, text


@given(st.from_regex(r"\A[ab]{0,3}[?*+]?(\|[ab]{1,2})?\Z").filter(lambda p: p[:1] not in "?*+"))
def test_oracle_a_regular_expression_is_matched_as_a_whole(source):
    place = Position(1, 1)
    grammar = RuleSet("root", {"root": Rule("root", Pattern(source, "", place), place)})
    for text in texts("ab", 4):
        assert recognizes(grammar, text) == (re.fullmatch(source, text) is not None)


def test_terminals():
    place = Position(1, 1)

    def accepted(terminal, letters):
        grammar = RuleSet("root", {"root": Rule("root", terminal, place)})
        return [text for text in texts(letters, 2) if recognizes(grammar, text)]

    assert accepted(Literal("aé"), "aéÉ") == ["aé"]
    assert accepted(Literal("aé", ignore_case=True), "aéÉA") == ["aé", "aÉ", "Aé", "AÉ"]
    assert accepted(Characters(((98, 99), (101, 101))), "abcde") == ["b", "c", "e"]
    assert accepted(Pattern("A.?", "is", place), "aA\n") == [
        "a", "A", "aa", "aA", "a\n", "Aa", "AA", "A\n",
    ]  # fmt: skip
