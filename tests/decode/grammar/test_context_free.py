"""The pushdown automaton of a grammar has the texts that Earley's recogniser finds."""

from __future__ import annotations

import time

import pytest
from hypothesis import given

from random_rules import LETTERS, accepts, compiled, rule_sets, state_after, texts
from refllm.decode.grammar.automaton import accepting, step
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars import regular_parts
from refllm.decode.grammar.rule_grammars.context_free import ContextFree
from refllm.decode.grammar.rule_grammars.earley import recognizes
from refllm.decode.grammar.rule_grammars.ebnf import parse

SHORT = texts(LETTERS, 5)


def same_texts(grammar: str, letters: str, longest: int) -> list[str]:
    """The texts of a grammar up to a length, on which both ways must agree."""
    rules = parse(grammar)
    automaton = ContextFree(rules)
    found = []
    for text in texts(letters, longest):
        assert accepts(automaton, text) == recognizes(rules, text), text
        if accepts(automaton, text):
            found.append(text)
    return found


@pytest.mark.theorem(
    "the pushdown automaton of a context-free grammar accepts a text iff Earley's recogniser does, "
    "for every text up to a length",
    source="Earley 1970; Hopcroft & Ullman 1979, §4.4 and §4.6",
)
@given(rule_sets())
def test_oracle_the_automaton_accepts_what_earley_does(grammar):
    automaton = compiled(grammar)
    assert [text for text in SHORT if accepts(automaton, text)] == [
        text for text in SHORT if recognizes(grammar, text)
    ]


@given(rule_sets())
def test_invariance_parts_that_are_too_large_are_taken_apart(grammar):
    automaton = compiled(grammar)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regular_parts, "MAX_PART_STATES", 3)
        patch.setattr(regular_parts, "MAX_WEIGHT", 4)
        apart = compiled(grammar)
    assert (automaton is None) == (apart is None)
    assert all(accepts(automaton, text) == accepts(apart, text) for text in texts(LETTERS, 4))


@pytest.mark.theorem(
    "every state of the automaton of a grammar can be completed to a text: there are no dead ends",
    source="Hopcroft & Ullman 1979, §4.4",
)
@given(rule_sets())
def test_every_state_can_be_completed(grammar):
    automaton = compiled(grammar)
    if automaton is None:
        return
    reached = [state_after(automaton, text) for text in texts(LETTERS, 3)]
    for begin in {state for state in reached if state is not None}:
        seen = {begin}
        pending = [begin]
        while pending and not accepting(pending[0]) and len(seen) < 300:
            state = pending.pop(0)
            after = {step(state, byte) for byte in LETTERS.encode()} - {None} - seen
            seen |= after
            pending += sorted(after, key=lambda each: not accepting(each))
        assert pending


LEFT_RECURSIVE = {
    "direct": ('root ::= root "b" | "a"', "ab", 5),
    "twice": ('root ::= root root | root "b" root | "a"', "ab", 6),
    "indirect": ('root ::= x "a" | "b"\nx ::= y "b" | root\ny ::= root | x', "ab", 6),
    "hidden by an empty rule": ('root ::= e root "b" | "a"\ne ::= "a"?', "ab", 6),
    "hidden by a repetition": ('root ::= "b"* root "a" | "a"', "ab", 6),
    "through a repetition": ('root ::= (root "b"){2,3} | "a"', "ab", 9),
    "through a star": ('root ::= (root "b" | x)* "a"\nx ::= root | "b"', "ab", 6),
    "in a circle": ('root ::= x | "a"\nx ::= root | root "b" | x', "ab", 5),
    "at both ends": ('root ::= root "b" root | "a" | ', "ab", 6),
}


@pytest.mark.parametrize("name", LEFT_RECURSIVE)
def test_oracle_left_recursion_is_taken_out_exactly(name):
    assert same_texts(*LEFT_RECURSIVE[name])


@pytest.mark.parametrize("counts", ["{0}", "{1}", "{2,2}", "{0,3}", "{2,}", "{,2}", "{3,5}"])
@pytest.mark.parametrize("item", ['"a"', "root2", '("b" | root2)?'])
def test_oracle_counted_repetition(counts, item):
    same_texts(f'root ::= ({item}){counts} "."\nroot2 ::= "a" | "(" root2 ")"', "ab(.)", 4)


def test_texts_of_all_characters():
    grammar = parse('root ::= "é" [α-ω]+ root? "😀"')
    automaton = ContextFree(grammar)
    assert accepts(automaton, "éαβ😀")
    assert accepts(automaton, "éωéα😀😀")
    assert not accepts(automaton, "éαβ".encode() + b"\xf0\x9f\x98")
    assert state_after(automaton, b"\xc3\xa9\xce") is not None
    assert state_after(automaton, b"\xc3\xa9\xf0") is None


# --- sizes ------------------------------------------------------------------------------------


def test_a_count_of_a_million_costs_nothing():
    automaton = ContextFree(parse('root ::= ("a" | "(" root ")"){999999,1000000}'))
    state = state_after(automaton, "a" * 200)
    assert len(state.threads) <= 2
    assert not accepting(state)
    counted = ContextFree(parse('root ::= ("a" | "(" root ")"){3,1000000}'))
    assert [accepts(counted, "a" * n) for n in (2, 3, 4)] == [False, True, True]


def test_a_regular_count_of_a_million_is_counted_on_the_stack():
    automaton = ContextFree(parse("root ::= [ab]{1000000}"))
    assert len(state_after(automaton, "ab" * 100).threads) == 1


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= root root | "a"',
        'root ::= root root root | root root | "a" | "a" root',
        'root ::= "a" root "x" | "a" root "y" | "a" root "z" | "a"',
        'root ::= "a" root "x" | [ab] root "y" | "ab" root | "a"',
        'root ::= root x | root y | "a"\nx ::= "a" | root\ny ::= "a" | root root',
    ],
)
def test_bound_ambiguity_does_not_multiply_threads(grammar):
    automaton = ContextFree(parse(grammar))
    state = automaton.start()
    for _ in range(25):
        state = step(state, ord("a"))
        assert len(state.threads) <= 8


HOSTILE = {
    "a chain of rules": "\n".join(f'r{n} ::= r{n + 1} | "b"' for n in range(3000))
    + '\nr3000 ::= "a" root?\nroot ::= r0',
    "doubling": "\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(60))
    + '\nr60 ::= "a"\nroot ::= r0',
    "doubling nothing": "\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(60))
    + '\nr60 ::= ""\nroot ::= r0 "a"',
    "exponential ambiguity": "\n".join(
        f'r{n} ::= r{n + 1} "x" | r{n + 1} "y" | s{n + 1} "x"\ns{n} ::= s{n + 1} "x" | r{n + 1} "y"'
        for n in range(100)
    )
    + '\nr100 ::= "a" root?\ns100 ::= "a"\nroot ::= r0',
    "a large DFA": 'root ::= [ab]* "a" [ab]{40} root?',
    "many large DFAs": "root ::= "
    + " | ".join(f'r{n} "."' for n in range(60))
    + "\n"
    + "\n".join(f'r{n} ::= [ab{n}]* "a" [ab]{{{40 + n}}}' for n in range(60)),
    "counts of counts": "root ::= ((([ab]{1000}){1000}){1000})",
    "a long text": 'root ::= "' + "ab" * 20_000 + '" root?',
    "many alternatives": "root ::= " + " | ".join(f'"{n}" root?' for n in range(2000)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_compile_in_seconds(name):
    begin = time.process_time()
    automaton = ContextFree(parse(HOSTILE[name]))
    assert automaton.start() is not None
    assert time.process_time() - begin < 10


def test_left_recursion_through_too_many_rules_is_rejected():
    names = [f"r{n}" for n in range(300)]
    rules = [f'{name} ::= {" | ".join(names)} "x" {name} | "a"' for name in names]
    with pytest.raises(GrammarError, match="left recursion of the grammar goes through too many"):
        ContextFree(parse("root ::= r0\n" + "\n".join(rules)))


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= root",
        'root ::= "a" x\nx ::= x "b" | "b" x',
        "root ::= [^\\x00-\\U0010ffff]",
        'root ::= ("a" x){2}\nx ::= y\ny ::= x',
        "start: /[^\\s\\S]/",
    ],
)
def test_a_grammar_without_texts_is_unsatisfiable(grammar):
    with pytest.raises(GrammarError, match="unsatisfiable"):
        ContextFree(parse(grammar))


def test_degenerate_a_grammar_of_the_empty_text_alone():
    automaton = ContextFree(parse('root ::= "" | x\nx ::= x "a"'))
    assert accepting(automaton.start())
    assert not automaton.start().threads


def test_a_malformed_regular_expression_is_named_with_its_place():
    with pytest.raises(GrammarError, match=r"line 2, column 4: .*back-references"):
        ContextFree(parse("start: A\nA: /(a)\\1/"))


def test_alternatives_without_texts_are_dropped():
    assert same_texts('root ::= "a" | "b" x | "a" "b"\nx ::= "a" x', "ab", 4) == ["a", "ab"]


def test_notes_name_useless_rules():
    automaton = ContextFree(parse('root ::= "a" | x\nx ::= "b" x\ny ::= root\nz ::= ""'))
    assert automaton.notes == (
        "the rule 'y' is never used",
        "the rule 'z' is never used",
        "the rule 'x' derives no text",
    )


def test_a_regular_expression_with_assertions_sees_its_own_text():
    grammar = parse(r'start: "x" A "x"' + "\n" + r"A: /^[ab]+$/")
    automaton = ContextFree(grammar)
    assert accepts(automaton, "xax")
    assert not accepts(automaton, "xx")
    assert accepts(automaton, "xabax")
