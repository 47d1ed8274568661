"""Formats of strings (``format`` of JSON Schema) as automata over characters.

Left out: every format, for the time being; ``format_rule`` knows none, so that all of them are
annotations.
"""

from __future__ import annotations

from dataclasses import dataclass

from refllm.decode.grammar.dfa import DFA

Languages = tuple[tuple[DFA, int, int | None], ...]  # (characters, least length, greatest length)


@dataclass(frozen=True, eq=False)
class FormatRule:
    """The strings that a format accepts: the union of ``accepted``."""

    accepted: Languages
    opposite: Languages

    def rejected(self) -> Languages:
        """The strings that it does not accept."""
        return self.opposite


def format_rule(name: str) -> FormatRule | None:
    """The rule of a format; None if it is unknown, so that it is an annotation."""
    return None
