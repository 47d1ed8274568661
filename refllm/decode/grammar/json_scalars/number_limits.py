"""Limits of numbers: the first and last integer, and the first and last float, within bounds.

A JSON number without a point or an exponent is an integer of any size, any other one is read as a
float64. Python compares both with a bound exactly, so an interval has limits of two kinds: the
last integer that is at most the bound, and the last float that is, written as ``repr`` writes it.
The shortest decimals that ``repr`` writes are ordered like the floats themselves, so a text is
compared with that decimal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_scalars import decimal_automata as automata

Number = int | float | Decimal

MAX_FLOAT = math.nextafter(math.inf, 0)
# The least float > 0 is 5e-324. Without an exponent it would take a chain of 324 states.
LEAST_PLAIN = Decimal("1e-20")
PLAIN_BELOW = 10**16  # ``repr`` writes greater floats with an exponent


class Limit(NamedTuple):
    """The first or last integer, and the first or last float, that a bound allows."""

    whole: int
    decimal: Decimal  # as ``repr`` writes the float; infinite if no float is allowed

    def negated(self) -> Limit:
        """The same limit on the other side of zero."""
        return Limit(-self.whole, -self.decimal)


def upper(bound: Number | None, exclusive: bool) -> Limit | None:
    """The limit of ``maximum`` or ``exclusiveMaximum``; None: no limit."""
    if bound is None:
        return None
    return last_below(exact_value(bound), exclusive)


def lower(bound: Number | None, exclusive: bool) -> Limit | None:
    """The limit of ``minimum`` or ``exclusiveMinimum``; None: no limit."""
    if bound is None:
        return None
    return last_below(-exact_value(bound), exclusive).negated()


def last_below(exact: Fraction, exclusive: bool) -> Limit:
    """The last integer and the last float that are at most, or less than, ``exact``."""
    whole = math.ceil(exact) - 1 if exclusive else math.floor(exact)
    nearest = nearest_float(exact)
    while math.isfinite(nearest) and (nearest >= exact if exclusive else nearest > exact):
        nearest = math.nextafter(nearest, -math.inf)
    if nearest == math.inf:
        nearest = MAX_FLOAT
    return Limit(whole, Decimal(repr(nearest)))


def exact_value(value: Number) -> Fraction:
    """The value that Python compares with; ``GrammarError`` if it is infinite or NaN."""
    if not is_finite(value):
        raise GrammarError(f"a bound of a number must be finite, not {value}")
    return Fraction(value)


def is_finite(value: Number) -> bool:
    """Whether a number, also an integer beyond the floats, is finite."""
    if isinstance(value, Decimal):
        return value.is_finite()
    return isinstance(value, int) or math.isfinite(value)


def nearest_float(value: Fraction) -> float:
    """The float that a value is read as; infinite where that overflows."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def readers_between(low: Limit | None, high: Limit | None) -> list[automata.Reader]:
    """The readers of the numbers between two limits: those ≥ 0, and a minus with those ≤ 0."""
    mirrored = _magnitudes(high and high.negated(), low and low.negated())
    return [*_magnitudes(low, high), automata.Minus(tuple(mirrored))]


def _magnitudes(low: Limit | None, high: Limit | None) -> Iterator[automata.Reader]:
    """The readers of the unsigned numbers between two limits."""
    low = low or Limit(0, Decimal(0))
    first = max(low.whole, 0)
    if high is None or high.whole >= first:
        yield automata.Digits(automata.Interval(first, high and high.whole), point=False)
    least = max(low.decimal, Decimal(0))
    most = None if high is None else high.decimal
    if least.is_infinite() or (most is not None and most < least):
        return
    # Without an exponent, magnitudes beyond 1e16 or below 1e-20 (but 0) need not be told apart.
    plain_least = max(least, LEAST_PLAIN) if least else least
    plain_most = None if most is None else min(most, Decimal(PLAIN_BELOW))
    if plain_most and plain_most < LEAST_PLAIN:
        plain_most = Decimal(0)
    if plain_least < PLAIN_BELOW and (plain_most is None or plain_least <= plain_most):
        yield automata.Digits(automata.Interval(plain_least, plain_most), point=True)
    if most != 0:
        yield automata.Mantissa(automata.Scale(least, most))
