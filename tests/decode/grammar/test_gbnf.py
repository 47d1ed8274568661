"""GBNF is read as llama.cpp reads it; what is malformed is named with line and column."""

from __future__ import annotations

import pytest

from random_rules import texts
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars.earley import recognizes
from refllm.decode.grammar.rule_grammars.gbnf import parse_gbnf
from refllm.decode.grammar.rule_grammars.rules import (
    MAX_DEPTH,
    Alternatives,
    Characters,
    Concatenation,
    Literal,
    Reference,
    Repetition,
)


def body(text):
    """The tree of the one rule of a grammar."""
    return parse_gbnf(f"root ::= {text}").rules["root"].body


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ('"ab"', Literal("ab")),
        ('""', Concatenation(())),
        ('"\\n\\r\\t\\\\\\"\\[\\]"', Literal('\n\r\t\\"[]')),
        ('"\\x41\\u00e9\\U0001F600"', Literal("Aé😀")),
        ("[a-c_]", Characters(((95, 95), (97, 99)))),
        ("[a-]", Characters(((45, 45), (97, 97)))),
        ("[-a]", Characters(((45, 45), (97, 97)))),
        ("[\\]\\x2d-\\x2f]", Characters(((45, 47), (93, 93)))),
        ("[^\\n]", Characters(((0, 9), (11, 0xD7FF), (0xE000, 0x10FFFF)))),
        (".", Characters(((0, 0xD7FF), (0xE000, 0x10FFFF)))),
        ('"a"?', Repetition(Literal("a"), 0, 1)),
        ('"a"{3}', Repetition(Literal("a"), 3, 3)),
        ('"a"{3,}', Repetition(Literal("a"), 3, None)),
        ('"a"{,3}', Repetition(Literal("a"), 0, 3)),
        ('"a"+?', Repetition(Literal("a"), 0, None)),
        ('"a"?+', Repetition(Literal("a"), 0, None)),
        ('"a"++', Repetition(Literal("a"), 1, None)),
        ('("a"{2}){3}', Repetition(Repetition(Literal("a"), 2, 2), 3, 3)),
        ('("a"?){3}', Repetition(Repetition(Literal("a"), 0, 1), 3, 3)),
        ('"a" | ', Alternatives((Literal("a"), Concatenation(())))),
        (
            '"a" "b" | "c"',
            Alternatives((Concatenation((Literal("a"), Literal("b"))), Literal("c"))),
        ),
        ('(\n"a" # one\n\n| "b" )', Alternatives((Literal("a"), Literal("b")))),
        ('\n  "a" |\n "b"', Alternatives((Literal("a"), Literal("b")))),
        ('"a" # one\n  | "b"', Alternatives((Literal("a"), Literal("b")))),
    ],
)
def test_each_element(text, tree):
    assert body(text) == tree


def test_references_know_where_they_stand():
    grammar = parse_gbnf('# one\nroot ::= "a"\n  | item-2\nitem-2 ::= root\r\n')
    reference = grammar.rules["root"].body.options[1]
    assert isinstance(reference, Reference)
    assert (reference.name, reference.position) == ("item-2", (3, 5))
    assert grammar.rules["item-2"].position == (4, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('root ::= "a', "line 1, column 10: this text does not end"),
        ('root ::= "a\n"', "line 1, column 10: this text does not end"),
        ("root ::= [ab", "line 1, column 10: this set does not end"),
        ("root ::= []", "line 1, column 10: a set without characters"),
        ("root ::= [b-a]", "line 1, column 11: the range 'b' to 'a' is empty"),
        ("root ::= [\\q]", "line 1, column 11: unknown escape"),
        ('root ::= "\\', "line 1, column 11: unknown escape"),
        ('root ::= "\\u12"', "line 1, column 11: expected 4 hexadecimal digits"),
        ('root ::= "\\ud800"', "line 1, column 11: .* is no character"),
        ("root = x", "line 1, column 6: expected '::=' after the name 'root', found '='"),
        ('root ::= ("a"', "expected '\\)' for the '\\(' of line 1, column 10, found the end of"),
        ('root ::= "a" )', "line 1, column 14: expected the end of the rule 'root', found '\\)'"),
        ("root ::= *", "line 1, column 10: expected the end of the rule 'root'"),
        ('root ::= "a"\n::= "b"', "line 2, column 1: expected the name of a rule, found ':'"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 1: the rule 'root' is defined a second"),
        ('root ::= "a"{3,2}', "at least 3 and at most 2"),
        ('root ::= "a"{,}', "a repetition without counts"),
        ('root ::= "a"{x}', "expected a count after '{', found 'x'"),
        ('root ::= "a"{2', "expected '}' after the counts"),
        ('root ::= "a"{2000000000}', "more than 1,000,000,000 repetitions"),
        ('root ::= "a"{2}{3}', "need parentheses"),
        (
            "root ::= <think>",
            "line 1, column 10: tokens as elements of a grammar are not supported",
        ),
        ("root ::= " + "(" * (MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH}"),
        ("rot ::= 'a'", "line 1, column 9: expected the end of the rule"),
        ('rot ::= "a"', "no rule 'root', from which texts are derived; did you mean 'rot'?"),
    ],
)
def test_errors_name_the_place(text, message):
    with pytest.raises(GrammarError, match=message):
        parse_gbnf(text)


def test_groups_may_be_nested_as_deep_as_is_said():
    tree = body("(" * MAX_DEPTH + '"a"' + ")" * MAX_DEPTH)
    assert tree == Literal("a")


@pytest.mark.parametrize("first", ["?", "*", "+"])
@pytest.mark.parametrize("second", ["?", "*", "+"])
def test_oracle_two_operators_in_a_row_are_those_of_a_group(first, second):
    short = parse_gbnf(f'root ::= "a"{first}{second} "b"')
    long = parse_gbnf(f'root ::= x{second} "b"\nx ::= "a"{first}')
    assert all(recognizes(short, text) == recognizes(long, text) for text in texts("ab", 4))
