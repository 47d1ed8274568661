"""Literals, strings and numbers as terminals: DFAs over bytes, shared by equal languages.

Where items are compared (``uniqueItems``) a terminal keeps its text, and the values that are
forbidden are taken out of its DFA as far as that is necessary: a text from which endlessly many
others can be reached is only rejected when it ends, by the frame below.

Left out: nothing; numbers are ``json_numbers.py``'s, strings ``regex.py``'s and ``formats.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterator

from refllm.decode.grammar.alphabet import BYTES, CHARACTERS
from refllm.decode.grammar.automaton import Terminal
from refllm.decode.grammar.dfa import DFA
from refllm.decode.grammar.dfa_builders import from_words
from refllm.decode.grammar.dfa_operations import difference
from refllm.decode.grammar.json_values import Frozen, Truth
from refllm.decode.grammar.shapes import NumberShape, StringShape, ValueShapes
from refllm.decode.grammar.utf8 import json_string, json_string_counted


class Scalars:
    """The terminals of scalar shapes, made when they are first needed."""

    def __init__(self) -> None:
        self._literals: dict[frozenset[str], DFA] = {}
        self._strings: dict[tuple[DFA, int, int | None, bool], Terminal] = {}
        self._without: dict[tuple[DFA, frozenset[str | bytes]], DFA] = {}

    def terminals(
        self, shapes: ValueShapes, forbidden: frozenset[Frozen] | None
    ) -> Iterator[Terminal]:
        """The terminals of all scalars of ``shapes``; None in place of the forbidden values if
        values are not compared.
        """
        capture = forbidden is not None
        values = forbidden or frozenset()
        literals = shapes.literals - {_literal(value) for value in values}
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
            words = {literal.encode(): 1 for literal in sorted(literals)}
            self._literals[literals] = from_words(words, size=BYTES)
        return self._literals[literals]

    def _string(self, shape: StringShape, forbidden: frozenset[Frozen], capture: bool) -> Terminal:
        counted = shape.minimum > 0 or shape.maximum is not None
        words = frozenset(
            value
            for value in forbidden
            if isinstance(value, str)
            and shape.dfa.matches(value)
            and (counted or shape.dfa.bounded(shape.dfa.run(map(ord, value))))
        )
        dfa = self._difference(shape.dfa, words, CHARACTERS)
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
        words = frozenset(
            text
            for value in forbidden
            if isinstance(value, int | float)
            for text in number_texts(value)
            if (state := shape.dfa.run(text)) and shape.dfa.bounded(state)
        )
        return self._difference(shape.dfa, words, BYTES)

    def _difference(self, dfa: DFA, words: frozenset[str | bytes], size: int) -> DFA:
        """The language without some words."""
        if not words:
            return dfa
        if (dfa, words) not in self._without:
            without = from_words(dict.fromkeys(sorted(words), 1), size=size)
            self._without[dfa, words] = difference(dfa, without)
        return self._without[dfa, words]


def number_texts(value: int | float) -> set[bytes]:
    """The texts of a number that ``json.dumps`` may write: as an integer and as a float.

    >>> sorted(number_texts(2.0))
    [b'2', b'2.0']
    """
    texts = {repr(value)}
    if value == 0:
        texts |= {"0", "-0", "0.0", "-0.0"}
    if value == int(value):
        texts.add(str(int(value)))
    try:
        texts.add(repr(float(value)))
    except OverflowError:  # an integer beyond the floats
        pass
    return {text.encode() for text in texts}


def _literal(value: Frozen) -> str:
    """The literal with this value; an empty text for any other value."""
    if value is None:
        return "null"
    return value.value if isinstance(value, Truth) else ""
