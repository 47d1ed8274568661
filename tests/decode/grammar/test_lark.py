"""Lark's common part is read as Lark reads it; what is left out is rejected by name."""

from __future__ import annotations

import re

import pytest

from conftest import oracle
from random_rules import accepts, texts
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars.context_free import ContextFree
from refllm.decode.grammar.rule_grammars.earley import recognizes
from refllm.decode.grammar.rule_grammars.lark import parse_lark
from refllm.decode.grammar.rule_grammars.lark_terminals import COMMON
from refllm.decode.grammar.rule_grammars.rules import (
    Alternatives,
    Characters,
    Concatenation,
    Literal,
    Pattern,
    Position,
    Reference,
    Repetition,
)

PLACE = Position(1, 1)


def body(text):
    """The tree of the one rule of a grammar."""
    return parse_lark(f"start: {text}").rules["start"].body


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ('"ab"', Literal("ab")),
        ('"ab"i', Literal("ab", ignore_case=True)),
        ('""', Concatenation(())),
        (r'"\n\t\"\\\x41\u00e9\."', Literal('\n\t"\\Aé\\.')),
        ('"a".."c"', Characters(((97, 99),))),
        (r"/a[^\/]\//i", Pattern("a[^/]/", "i", PLACE)),
        ("NAME", Reference("NAME", PLACE)),
        ('["a"]', Repetition(Literal("a"), 0, 1)),
        ('("a")?', Repetition(Literal("a"), 0, 1)),
        ('"a"~3', Repetition(Literal("a"), 3, 3)),
        ('"a" ~ 2 .. 3', Repetition(Literal("a"), 2, 3)),
        ('"a" -> one\n  | "b" -> two', Alternatives((Literal("a"), Literal("b")))),
        ('"a" // one\n # two\n  | "b"', Alternatives((Literal("a"), Literal("b")))),
        ('(\n"a"\n"b"\n)', Concatenation((Literal("a"), Literal("b")))),
        ('| "a"', Alternatives((Concatenation(()), Literal("a")))),
        ('"a" \\\n "b"', Concatenation((Literal("a"), Literal("b")))),
    ],
)
def test_each_element(text, tree):
    assert body(text) == tree


def test_modifiers_and_priorities_change_no_text():
    plain = parse_lark('start: a B\na: "x"\nB: "y"')
    decorated = parse_lark('?start: a B\n!?a.2: "x" -> z\nB.-1: "y"')
    assert {name: rule.body for name, rule in plain.rules.items()} == {
        name: rule.body for name, rule in decorated.rules.items()
    }


def test_imports():
    grammar = parse_lark(
        "start: INT\n%import common.INT\n%import common (WS, DIGIT)\n%import common.LETTER -> L"
    )
    assert list(grammar.rules) == ["start", "INT", "WS", "DIGIT", "L"]


def test_ignored_terminals_stand_before_terminals_of_rules_and_at_the_end():
    grammar = parse_lark('start: "a" B\nB: "b" "c"\n%ignore " "\n%ignore "_"')
    expected = {
        text
        for text in texts("abc _", 5)
        if re.fullmatch(r"[ _]*a[ _]*bc[ _]*", text)
    }  # fmt: skip
    assert {text for text in texts("abc _", 5) if recognizes(grammar, text)} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('start: "a', "line 1, column 8: this string does not end on its line"),
        ("start: /a", "line 1, column 8: this regular expression does not end"),
        ("start: /a/x", "the flag 'x' of a regular expression is not supported"),
        ("start: Ab", "line 1, column 8: a name is in small letters"),
        ('Start: "a"', "expected the name of a rule"),
        ('start{a}: "b"', "'start' has parameters: templates are not supported"),
        ("start: a{b}", "line 1, column 8: 'a' has arguments: templates are not supported"),
        ("%declare X", "line 1, column 1: the directive %declare is not supported"),
        ('%override start: "a"', "the directive %override is not supported"),
        ("%import common.NUMBR", "no terminal 'NUMBR' in 'common'; did you mean 'NUMBER'"),
        ("%import python.NAME", "from the module 'common' only"),
        ("%import .other.NAME", "from the module 'common' only"),
        ('start: ("a"', "expected '\\)' for the '\\(' of line 1, column 8"),
        ('start: "b".."a"', "the range 'b' to 'a' is empty"),
        ('start: "ab".."c"', "one character each"),
        ('start: "a"..b', "expected a string after '..', found 'b'"),
        (r'start: "\x1"', "line 1, column 9: the escape .* is no character"),
        (r'start: "\ud800"', "line 1, column 9: the escape .* is no character"),
        ('start: "a"~', "expected a count after '~'"),
        ('start: "a"~3..1', "at least 3 and at most 1"),
        ('start: "a")', "line 1, column 11: expected the end of the line, found '\\)'"),
        ('start: "a" -> 3', "expected a name after '->'"),
        ('start: "a"\nstart: "b"', "line 2, column 1: 'start' is defined a second time"),
        ('begin: "a"', "the grammar has no rule 'start'"),
    ],
)
def test_errors_name_the_place(text, message):
    with pytest.raises(GrammarError, match=message):
        parse_lark(text)


# --- against Lark itself ----------------------------------------------------------------------


def lark_accepts(grammar):
    """Which texts Lark's own Earley parser accepts, terminals being wherever their text is."""
    lark = oracle("lark")
    parser = lark.Lark(grammar, parser="earley", lexer="dynamic_complete", ambiguity="resolve")

    def accepted(text):
        try:
            parser.parse(text)
        except lark.exceptions.LarkError:
            return False
        return True

    return accepted


GRAMMARS = {
    "rules": ('start: a "b" | "b" a\na: "a" | a "a"', "ab", 5),
    "optional": ('start: ["a"] "b"? ("a" | "b" "b")', "ab", 4),
    "counts": ('start: "a"~2..3 ("b" "a"~2)*', "ab", 7),
    "terminals": ('start: A+ "b"\nA: "a" B?\nB: "b" | "ab"', "ab", 5),
    "ignore": ('start: "a" x*\nx: "b" "b"\n%ignore " "', "ab ", 5),
    "ignore two": ('start: (A "b")+\nA: "a" "b"?\n%ignore " "\n%ignore "_"', "ab _", 4),
    "ignore what rules need": ('start: "a" " " "b"\n%ignore " "', "ab ", 5),
    "case": ('start: "ab"i "b"', "abAB", 4),
    "range": ('start: ("a".."b")~2 | "c".."c"', "abc", 3),
    "regex": ("start: /a+b?/ /[^a]/", "ab\n", 4),
    "flags": ("start: /A.b/is", "abA\n", 3),
    "imports": ("start: INT WORD?\n%import common (INT, WORD)\n%ignore / /", "1a ", 4),
    "escapes": (r'start: "\"" /\\/ "\\" "\." "\x61"', '"\\.a', 6),
    "left recursion": ('start: start "a" | x "b" |\nx: start', "ab", 5),
    "empty": ('start: a a "b"\na: | "a" a', "ab", 5),
    "keywords are names": ('start: "if" NAME | NAME\nNAME: /[fi]+/', "if", 4),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", GRAMMARS)
def test_oracle_the_texts_are_those_that_lark_accepts(name):
    text, letters, longest = GRAMMARS[name]
    accepted = lark_accepts(text)
    grammar = parse_lark(text)
    automaton = ContextFree(grammar)
    for each in texts(letters, longest):
        # Lark's lexer has no place for an empty text
        expected = accepted(each)
        assert accepts(automaton, each) == expected, each
        assert recognizes(grammar, each) == expected, each


@pytest.mark.oracle
@pytest.mark.parametrize("name", sorted(COMMON))
def test_oracle_common_terminals(name):
    accepted = lark_accepts(f"start: X\nX: T\n%import common.{name} -> T")
    automaton = ContextFree(parse_lark(f"start: {name}\n%import common.{name}"))
    letters = {"ESCAPED_STRING": '"\\a\n', "C_COMMENT": "/*a\n"}.get(name, "1aG.e-+_#/ \t\r\n")
    for each in texts(letters, 6 if name in ("ESCAPED_STRING", "C_COMMENT") else 3):
        assert accepts(automaton, each) == accepted(each), each
