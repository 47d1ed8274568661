"""Which texts are regular? Deterministic automata over bytes and characters, and their algebra.

Read ``dfa`` first. ``alphabet`` has its symbols, ``dfa_builders`` and ``dfa_operations`` make and
combine automata, ``dfa_minimization`` makes them smallest, ``utf8`` turns characters into bytes and
JSON strings, ``counts`` keeps lengths outside of the states.
"""
