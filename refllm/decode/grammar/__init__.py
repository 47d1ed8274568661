"""Structured output: grammars as byte automata, and which tokens may follow.

``compile`` makes a ``Grammar`` of a regular expression, a JSON Schema, an EBNF grammar or a list of
choices. Read ``automaton`` first, then ``masks``; ``grammar`` is the public way, which joins
everything.

| room or file                                 | what it answers                               |
|----------------------------------------------|-----------------------------------------------|
| ``automata``                                 | what is regular: DFAs, and their algebra      |
| ``patterns``                                 | regular expressions                           |
| ``automaton``, ``stacks``                    | terminals, frames and stacks: the definition  |
| ``vocabulary``, ``token_trie``,              | which tokens may follow                       |
| ``trie_walk``, ``masks``, ``bounded_cache``  |                                               |
| ``forced``                                   | what must follow                              |
| ``rule_grammars``                            | grammars of rules: GBNF, Lark                 |
| ``json_scalars``                             | numbers and string formats as DFAs            |
| ``json_schema``                              | which values a schema allows                  |
| ``json_machine``                             | objects and arrays as frames                  |
| ``schema``                                   | a schema as an automaton                      |
| ``conditioning``                             | why masking is not conditioning               |
"""

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.grammar import Grammar, compile
from refllm.decode.grammar.rule_grammars.shipped import shipped
from refllm.decode.grammar.vocabulary import token_bytes

__all__ = ["Grammar", "GrammarError", "compile", "shipped", "token_bytes"]
