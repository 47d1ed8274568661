"""The classes of characters that a pattern tells apart, and the conditions between two of them."""

from __future__ import annotations

from collections.abc import Sequence

from refllm.decode.grammar.automata.alphabet import CHARACTERS, Interval, alphabet_of
from refllm.decode.grammar.patterns.position_automaton import WORD, PositionAutomaton, bits_of
from refllm.decode.grammar.patterns.regex_classes import Dialect
from refllm.decode.grammar.patterns.regex_tree import BOUNDARY, END_OR_NEWLINE, NOT_BOUNDARY
from refllm.decode.grammar.patterns.unicode_classes import escape_set

NEWLINE = 0x0A
FINAL_NEWLINE = CHARACTERS  # a symbol of its own: the line end that ends the text


class Context:
    """What conditions on an edge are about: the characters before and after it, as classes.

    ``alphabet`` tells apart what the positions of an automaton read, and ``more_sets``;
    ``members[class]`` are the positions that read a class, with ``WORD`` if it holds word
    characters; ``newline`` is the class of a line end that ends the text, if that matters.
    """

    def __init__(
        self,
        automaton: PositionAutomaton,
        dialect: Dialect,
        more_sets: Sequence[tuple[Interval, ...]] = (),
    ) -> None:
        self._follow = automaton.follow
        conditions = automaton.conditions
        numbers = {symbols: index for index, symbols in enumerate(dict.fromkeys(automaton.symbols))}
        sets = [*numbers, escape_set("w", dialect), *more_sets]
        asks_boundary = conditions & (BOUNDARY | NOT_BOUNDARY) != 0
        if not asks_boundary:
            sets[len(numbers)] = ()
        size = CHARACTERS
        if conditions & END_OR_NEWLINE:
            # A line end that ends the text is another symbol than one that does not.
            size += 1
            sets = [*map(_with_final_newline, sets), ((FINAL_NEWLINE, FINAL_NEWLINE),)]
        self.alphabet, parts = alphabet_of(size, sets)
        self.newline = parts[-1][0] if conditions & END_OR_NEWLINE else None
        words = parts[len(numbers)]
        self.members = [WORD if cls in words else 0 for cls in range(self.alphabet.count)]
        for position, symbols in enumerate(automaton.symbols):
            for cls in parts[numbers[symbols]]:
                self.members[cls] |= 1 << position

    def edges(self, mask: int) -> dict[int, int]:
        """Where some positions lead, under each condition; 0 is the condition that always holds."""
        found: dict[int, int] = {}
        for position in bits_of(mask):
            for condition, targets in self._follow[position].items():
                found[condition] = found.get(condition, 0) | targets
        return found

    def holds(self, condition: int, mask: int, cls: int) -> bool:
        """Whether a condition holds between the text so far and a next character of a class."""
        if condition & END_OR_NEWLINE and cls != self.newline:
            return False
        return _boundary_holds(condition, (mask ^ self.members[cls]) & WORD != 0)

    def holds_at_end(self, condition: int, mask: int) -> bool:
        """Whether a condition holds at the end of the text."""
        return _boundary_holds(condition, mask & WORD != 0)


def _boundary_holds(condition: int, boundary: bool) -> bool:
    """Whether what a condition asks of ``\\b`` and ``\\B`` is so, given if there is a boundary."""
    if condition & BOUNDARY and not boundary:
        return False
    return not (condition & NOT_BOUNDARY and boundary)


def _with_final_newline(symbols: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """A set that holds the line end, with the symbol of the final one."""
    if any(low <= NEWLINE <= high for low, high in symbols):
        return (*symbols, (FINAL_NEWLINE, FINAL_NEWLINE))
    return symbols
