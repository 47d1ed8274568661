"""Literals, strings and numbers as terminals: DFAs over bytes, shared by equal languages.

Where items are compared (``uniqueItems``) a terminal keeps its text, and the values that are
forbidden are taken out of its DFA as far as that is necessary: a text from which endlessly many
others can be reached is only rejected when it ends, by the frame below.

Left out: nothing; numbers are ``json_numbers.py``'s, strings ``regex.py``'s and ``formats.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from refllm.array_types import Loose
from refllm.decode.grammar.automata.alphabet import BYTES, CHARACTERS
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_builders import from_words, literal
from refllm.decode.grammar.automata.dfa_operations import difference
from refllm.decode.grammar.automata.utf8 import json_string, json_string_counted
from refllm.decode.grammar.automaton import Terminal
from refllm.decode.grammar.json_scalars.json_values import Frozen, Truth
from refllm.decode.grammar.json_scalars.number_texts import canonical, short_texts, texts_of
from refllm.decode.grammar.json_schema.shapes import NumberShape, StringShape, ValueShapes


class Scalars:
    """The terminals of scalar shapes, made when they are first needed."""

    def __init__(self) -> None:
        self._literals: dict[frozenset[str], DFA] = {}
        self._strings: dict[tuple[DFA, int, int | None, bool], Terminal] = {}
        self._without: dict[tuple[DFA, frozenset[Frozen]], DFA] = {}

    def terminals(
        self, shapes: ValueShapes, forbidden: frozenset[Frozen] | None
    ) -> Iterator[Terminal]:
        """The terminals of all scalars of ``shapes``; None in place of the forbidden values if
        values are not compared.
        """
        capture = forbidden is not None
        values = forbidden or frozenset()
        literals = shapes.literals - {_literal_of(value) for value in values}
        if literals:
            yield Terminal(self._literal_dfa(literals), capture=capture)
        for string in shapes.strings:
            terminal = self._string(string, values, capture)
            if not terminal.dfa.empty:
                yield terminal
        for number in shapes.numbers:
            dfa = self._number(number, values)
            if not dfa.empty:
                yield Terminal(dfa, capture=capture)

    def _literal_dfa(self, literals: frozenset[str]) -> DFA:
        if literals not in self._literals:
            words: dict[Sequence[int] | str, int] = {
                literal.encode(): 1 for literal in sorted(literals)
            }
            self._literals[literals] = from_words(words, size=BYTES)
        return self._literals[literals]

    def _string(self, shape: StringShape, forbidden: frozenset[Frozen], capture: bool) -> Terminal:
        counted = shape.minimum > 0 or shape.maximum is not None
        words: frozenset[Frozen] = frozenset(
            value
            for value in forbidden
            if isinstance(value, str)
            and shape.dfa.matches(value)
            and (counted or shape.dfa.bounded(shape.dfa.run(map(ord, value))))
        )
        dfa = self._difference(shape.dfa, words, _string_language)
        known = dfa, shape.minimum, shape.maximum, capture
        if known not in self._strings:
            if counted:
                quoted, increments = json_string_counted(dfa)
                terminal = Terminal(quoted, -1, shape.minimum, shape.maximum, capture, increments)
            else:
                terminal = Terminal(json_string(dfa), capture=capture)
            self._strings[known] = terminal
        return self._strings[known]

    def _number(self, shape: NumberShape, forbidden: frozenset[Frozen]) -> DFA:
        canon = canonical(shape.dfa)
        values = {
            value
            for value in forbidden
            if isinstance(value, int | float)
            and any(
                (state := canon.run(text)) and canon.bounded(state) for text in short_texts(value)
            )
        }
        return self._difference(shape.dfa, frozenset(values), texts_of)

    def _difference(
        self,
        dfa: DFA,
        values: frozenset[Frozen],
        language: Callable[[Loose], DFA],
    ) -> DFA:
        """The texts that are in the ``language`` of none of these values."""
        if not values:
            return dfa
        if (dfa, values) not in self._without:
            # mostly one value came to those that were taken out before
            for value in values:
                known = self._without.get((dfa, values - {value}))
                if known is not None:
                    self._without[dfa, values] = difference(known, language(value))
                    break
            else:
                rest = dfa
                for value in values:
                    rest = difference(rest, language(value))
                self._without[dfa, values] = rest
        return self._without[dfa, values]


def _string_language(value: str) -> DFA:
    return literal(value, size=CHARACTERS)


def _literal_of(value: Frozen) -> str:
    """The literal with this value; an empty text for any other value."""
    if value is None:
        return "null"
    return value.value if isinstance(value, Truth) else ""
