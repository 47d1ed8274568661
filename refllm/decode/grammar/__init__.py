"""Structured output: grammars as byte automata, and which tokens may follow.

``compile`` makes a ``Grammar`` of a regular expression, a JSON Schema, an EBNF grammar or a list of
choices. Read ``dfa.py`` first, then ``automaton.py`` and ``masks.py``.

1. ``dfa``, ``alphabet``, ``dfa_operations``, ``regex``, ``utf8``: what is regular.
2. ``automaton``: terminals, frames and stacks; the simple definition.
3. ``vocabulary``, ``token_trie``, ``trie_walk``, ``masks``: which tokens may follow.
4. ``forced``: what must follow.
5. ``ebnf``, ``context_free``: grammars of rules.
6. ``schema``, ``schema_algebra``, ``shapes``, ``json_frames``: JSON Schema.
7. ``grammar``: the public way, which joins them.
"""

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.grammar import Grammar, compile
from refllm.decode.grammar.vocabulary import token_bytes

__all__ = ["Grammar", "GrammarError", "compile", "token_bytes"]
