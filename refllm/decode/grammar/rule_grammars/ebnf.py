"""Grammars as text: which of two syntaxes a text is written in, and its rules.

| syntax     | a rule           | the rule of whole texts | file      |
|------------|------------------|-------------------------|-----------|
| ``"gbnf"`` | ``name ::= ...`` | ``root``                | ``gbnf``  |
| ``"lark"`` | ``name: ...``    | ``start``               | ``lark``  |

``context_free`` compiles the rules to an automaton; ``earley`` is its naive twin.
"""

from __future__ import annotations

import re

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars.gbnf import parse_gbnf
from refllm.decode.grammar.rule_grammars.lark import parse_lark
from refllm.decode.grammar.rule_grammars.rule_checks import check_references
from refllm.decode.grammar.rule_grammars.rules import RuleSet
from refllm.errors import alternatives

PARSERS = {"gbnf": parse_gbnf, "lark": parse_lark}
# What begins a line of one syntax and not of the other.
FIRST_OF_GBNF = re.compile(r"^[ \t]*[A-Za-z0-9_-]+\s*::=", re.MULTILINE)
FIRST_OF_LARK = re.compile(r"^[ \t]*(?:[?!]{0,2}\w+(?:\.[+-]?\d+)?[ \t]*:|%[a-z])", re.MULTILINE)
MAX_CHARACTERS = 1_000_000


def syntax_of(text: str) -> str:
    """``"gbnf"`` or ``"lark"``, by the first line that only one of them has.

    >>> syntax_of('root ::= "a"'), syntax_of('start: "a"')
    ('gbnf', 'lark')
    """
    gbnf = FIRST_OF_GBNF.search(text)
    lark = FIRST_OF_LARK.search(text)
    if gbnf and (not lark or gbnf.start() <= lark.start()):
        return "gbnf"
    if lark:
        return "lark"
    raise GrammarError(
        "the grammar has no rule: write name ::= ... (GBNF, as in llama.cpp) or name: ... (Lark)"
    )


def parse(text: str, syntax: str | None = None, start: str | None = None) -> RuleSet:
    """The rules of a grammar; every rule that is referred to is defined.

    Parameters
    ----------
    text : the grammar
    syntax : "gbnf" or "lark"; None finds out which
    start : the rule of whole texts; None is ``root`` in GBNF and ``start`` in Lark

    Raises
    ------
    GrammarError
        with line and column, if the text is malformed or refers to a rule that is not defined.
    """
    if len(text) > MAX_CHARACTERS:
        raise GrammarError(
            f"the grammar has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read"
        )
    name = syntax_of(text) if syntax is None else syntax
    if name not in PARSERS:
        raise GrammarError(f"syntax={syntax!r}: {alternatives(syntax, PARSERS)}")
    rules = PARSERS[name](text) if start is None else PARSERS[name](text, start)
    check_references(rules)
    return rules
