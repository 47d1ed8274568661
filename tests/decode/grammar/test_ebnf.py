"""Which syntax a text is written in, and names that are not defined."""

from __future__ import annotations

import pytest

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars.ebnf import MAX_CHARACTERS, parse, syntax_of


@pytest.mark.parametrize(
    ("text", "syntax"),
    [
        ('root ::= "a"', "gbnf"),
        ('# start: "a"\n\n  root-2\n ::= "a"', "gbnf"),
        ('root ::= "a"\n\nb: c', "gbnf"),
        ('start: "a"', "lark"),
        ('// root ::= "a"\n?start.2: "a"', "lark"),
        ('%ignore " "\nstart: "a ::= b"', "lark"),
        ("_X: /a/", "lark"),
    ],
)
def test_the_syntax_is_found_out(text, syntax):
    assert syntax_of(text) == syntax


def test_the_syntax_and_the_start_can_be_given():
    assert parse('a ::= "x"', "gbnf", "a").start == "a"
    assert parse('a: "x"', syntax="lark", start="a").start == "a"
    with pytest.raises(GrammarError, match="syntax='ebnf': choose one of gbnf, lark"):
        parse('a: "x"', syntax="ebnf")


@pytest.mark.parametrize("text", ["", "a", "# root ::= x", '"a: b"'])
def test_a_text_without_rules_is_rejected(text):
    with pytest.raises(GrammarError, match="the grammar has no rule"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('root ::= "a"\n  | valeu\nvalue ::= "b"', "line 2, column 5: the rule 'valeu' is not defin"
         "ed; did you mean 'value'"),
        ('root ::= "a"\nx ::= (("b" y)?)', "line 2, column 13: the rule 'y' is not defined$"),
        ("start: NUMBER", "line 1, column 8: the rule 'NUMBER' is not defined"),
        ('start: "a"\n%ignore WS', "line 2, column 9: the rule 'WS' is not defined"),
    ],
)  # fmt: skip
def test_a_missing_rule_is_named_with_its_place(text, message):
    with pytest.raises(GrammarError, match=message):
        parse(text)


def test_a_long_text_is_rejected():
    with pytest.raises(GrammarError, match="at most 1,000,000 are read"):
        parse('root ::= "' + "a" * MAX_CHARACTERS + '"')
