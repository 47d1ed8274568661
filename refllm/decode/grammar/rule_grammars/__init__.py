"""Context-free grammars in GBNF and in Lark's syntax, as frames of the pushdown automaton.

Read ``earley`` first, the definition; then ``context_free``. ``ebnf`` reads a text, ``shipped`` the
grammars of ``grammars/``.
"""
