"""Which parts of rules become one DFA."""

from __future__ import annotations

import pytest

from random_rules import accepts
from refllm.decode.grammar.automaton import Terminal
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars import regular_parts
from refllm.decode.grammar.rule_grammars.context_free import ContextFree
from refllm.decode.grammar.rule_grammars.ebnf import parse
from refllm.decode.grammar.rule_grammars.shipped import shipped


def terminals(automaton):
    """The distinct terminals of a grammar."""
    found = set()
    for productions in automaton.form.table.values():
        for first, following in productions:
            parts = (first, *(each.symbol for each in following))
            found |= {part for part in parts if isinstance(part, Terminal)}
    return found


def test_rules_that_are_not_recursive_become_one_dfa():
    automaton = ContextFree(
        parse('root ::= a{2,3} ("-" a)* | b\na ::= b | [0-9]+ b?\nb ::= "x" | "y" "z"')
    )
    assert len(terminals(automaton)) == 1
    assert accepts(automaton, "1x2-yz")
    assert not accepts(automaton, "1x-")


def test_of_a_recursive_grammar_the_largest_regular_parts_are_terminals():
    automaton = ContextFree(
        parse('root ::= "(" ws "[" (root | [0-9]+ "." | "x") "]" ws ")"\nws ::= " "*')
    )
    assert len(terminals(automaton)) == 3  # fmt: skip
    assert len(terminals(ContextFree(parse(shipped("json"))))) <= 12


def test_equal_parts_share_their_terminal():
    automaton = ContextFree(parse('root ::= "x" root? "y" | "z" root? "y"'))
    assert len(terminals(automaton)) == 3


def test_too_many_states_together_are_an_error():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regular_parts, "MAX_STATES", 10)
        ContextFree(parse('root ::= "abcd"'))
        with pytest.raises(GrammarError, match="more than 10 states together"):
            ContextFree(parse('root ::= "abcdefghijk"'))
