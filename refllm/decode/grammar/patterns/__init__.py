"""Regular expressions: text → tree → positions → DFA.

Read ``regex`` first, then its naive twin ``derivatives``.
"""
