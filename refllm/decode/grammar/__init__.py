"""Structured output: grammars as byte automata, and which tokens may follow.

Read ``dfa.py`` first, then ``automaton.py`` and ``masks.py``.
"""

from refllm.decode.grammar.errors import GrammarError

__all__ = ["GrammarError"]
