"""The texts of one number, and a language with one text per number: for items that must differ.

A DFA of numbers accepts 2, 2.0, 2.00, 2e0 …, all of one value. ``uniqueItems`` asks two things of
it: how many *values* it has, which its canonical texts answer, and the same numbers without some
values, for which all texts of a value are taken out.

Left out: decimals that are only read as the same float (0.1 and 0.1000000000000000055), which
the array rejects when the item ends.
"""

from __future__ import annotations

import math
from decimal import Decimal
from functools import lru_cache

from refllm.decode.grammar.automata.byte_table import ByteTable, byte_edges
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_operations import intersect
from refllm.decode.grammar.automata.utf8 import to_bytes
from refllm.decode.grammar.patterns.regex import from_pattern

CANONICAL = r"-?(?:0|[1-9]\d*)(?:\.(?:0|\d*[1-9]))?(?:[eE][+-]?(?:0\d?|[1-9]\d*))?"
TEXTS_PER_NUMBER = 32  # at most so many canonical texts have one value: 2, 2.0, 2e0, 2E+00 …


@lru_cache(maxsize=256)
def canonical(numbers: DFA) -> DFA:
    """The numbers of a language without zeros at the end of a fraction, except ``.0``, and with
    at most one in front of an exponent; finite if and only if the values are.
    """
    return intersect(numbers, _language(CANONICAL))


@lru_cache(maxsize=1024)
def texts_of(value: int | float) -> DFA:
    """All texts of a finite number: plain, with zeros appended, and in scientific form.

    >>> two = texts_of(2)
    >>> [two.matches(text) for text in (b"2", b"2.00", b"2e+0", b"0.2E1", b"20e-1", b"2.5")]
    [True, True, True, False, False, False]
    """
    if value == 0:
        return _language(r"-?0(?:\.0+)?(?:[eE][+-]?\d+)?")
    plain, mantissa, exponent = _forms(value)
    table = ByteTable()
    start = table.new_state()
    states = {b"": start}  # a tree of both forms
    for text in (plain, mantissa):
        for at in range(1, len(text) + 1):
            if text[:at] not in states:
                states[text[:at]] = table.new_state()
                table.connect(states[text[: at - 1]], {text[at - 1]: states[text[:at]]})
    table.relabel(states[plain], 1)
    power = _power(table, exponent)
    _append_zeros(table, states[plain], plain, 1, {} if plain != mantissa else power)
    if plain != mantissa:
        _append_zeros(table, states[mantissa], mantissa, 0, power)
    return table.dfa(start)


def _append_zeros(
    table: ByteTable, state: int, text: bytes, label: int, following: dict[int, int]
) -> None:
    """Let zeros follow a number's text, after a point if it has none; then ``following``."""
    zeros = table.new_state(label, following)
    table.connect(zeros, byte_edges(b"0", zeros))
    table.connect(state, following)
    if b"." in text:
        table.connect(state, byte_edges(b"0", zeros))
    else:
        point = table.new_state(edges=byte_edges(b"0", zeros))
        table.connect(state, byte_edges(b".", point))


def _power(table: ByteTable, exponent: int) -> dict[int, int]:
    """The edges of ``e`` and ``E`` to the states of this exponent, with zeros in front."""
    state = table.new_state(1)
    for digit in reversed(str(abs(exponent)).encode()[1:] if exponent else b""):
        state = table.new_state(edges={digit: state})
    first = str(abs(exponent)).encode()[0]
    digits = table.new_state()
    table.connect(digits, byte_edges(b"0", digits) | {first: state})
    if exponent == 0:
        table.connect(state, byte_edges(b"0", state))
    letter = table.new_state()
    if exponent >= 0:
        table.connect(letter, byte_edges(b"0", digits) | {first: state})
        table.connect(letter, byte_edges(b"+", digits))
    if exponent <= 0:
        table.connect(letter, byte_edges(b"-", digits))
    return byte_edges(b"e", letter) | byte_edges(b"E", letter)


def _forms(value: int | float) -> tuple[bytes, bytes, int]:
    """The plain form of a number that is not 0, its mantissa and its exponent, the latter two as
    in ``2.5e-7``; without zeros at the end of a fraction.
    """
    written = _written(value)
    plain = str(int(value)) if value == int(value) else f"{written:f}"
    sign = "-" if value < 0 else ""
    digits = "".join(map(str, written.as_tuple().digits)).rstrip("0")
    mantissa = digits[0] + (f".{digits[1:]}" if len(digits) > 1 else "")
    return plain.encode(), f"{sign}{mantissa}".encode(), written.adjusted()


def short_texts(value: int | float) -> set[bytes]:
    """A text of each form that ``json.dumps`` or a person would write for a number.

    >>> sorted(short_texts(2.0))
    [b'2', b'2.0', b'2e0']
    """
    texts = {repr(value)}
    if math.isfinite(value) if isinstance(value, float) else True:
        if value:
            _, mantissa, exponent = _forms(value)
            texts.add(f"{mantissa.decode()}e{exponent}")
        if value == int(value):
            texts |= {str(int(value)), f"{int(value)}.0"}
        if value == 0:
            texts |= {"-0", "-0.0", "0e0"}
    return {text.encode() for text in texts}


def _written(value: int | float) -> Decimal:
    """The decimal that ``json.dumps`` writes."""
    return Decimal(value) if isinstance(value, int) else Decimal(repr(value))


@lru_cache(maxsize=1024)
def _language(pattern: str) -> DFA:
    return to_bytes(from_pattern(pattern, search=False))
