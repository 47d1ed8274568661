"""Normal form: nothing begins with itself, and nothing that comes first is empty."""

from __future__ import annotations

from hypothesis import given

from random_rules import compiled, rule_sets
from refllm.decode.grammar.automaton import Terminal
from refllm.decode.grammar.rule_grammars.context_free import ContextFree
from refllm.decode.grammar.rule_grammars.ebnf import parse
from refllm.decode.grammar.rule_grammars.productions import Counted, counted_production


@given(rule_sets())
def test_every_symbol_begins_with_symbols_of_lower_rank(grammar):
    automaton = compiled(grammar)
    if automaton is None:
        return
    form = automaton.form
    for symbol in form.table:
        for production in form.productions(symbol):
            assert form.rank(production.first) < form.rank(symbol)
            for part in (production.first, *(each.symbol for each in production.following)):
                if isinstance(part, Terminal):
                    assert not part.dfa.accepting(part.dfa.start)
                    assert not part.dfa.empty
                else:
                    assert form.productions(part)


def test_a_count_goes_down_to_one():
    left = Counted("x", 2, 3)
    lengths = []
    while True:
        production = counted_production(left)
        assert production.first == "x"
        if not production.following:
            break
        left, optional = production.following[0]
        lengths.append((left.minimum, left.maximum, optional))
    assert lengths == [(1, 2, False), (1, 1, True)]
    endless = Counted("x", 1, None)
    assert counted_production(endless).following == ((endless, True),)


def test_left_recursion_leaves_symbols_that_climb():
    form = ContextFree(parse('root ::= root "b" | "a"')).form
    assert all(form.rank(each.first) == 0 for each in form.productions("root"))
