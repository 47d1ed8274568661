"""Rules of JSON Schema for numbers, as automata over the bytes of their JSON text.

A rule is a DFA over the number as ``json.dumps`` writes it: integers of any length, floats as
``repr`` gives them (``1.5``, ``1e-05``, ``1.5e+16``, ``-0.0``), and other spellings of the same
values where they cost nothing: trailing zeros after the point, ``1E5``.

**Which values a text has.** A text without a point or an exponent is an integer, compared
exactly. Any other one is read as a float64, so bounds of those are moved to floats: a float is at
most 0.3 if it is at most the greatest float that is ≤ 0.3, and the shortest decimals that ``repr``
writes are ordered like the floats themselves. A bound that no float equals (2**63 - 1, 10**400)
is therefore exact for both kinds, and a text that is accepted is within bounds after
``json.loads`` too. Other spellings that round to the bound itself, such as
1.0000000000000001 for a maximum of 1, are rejected. A positive float below 1e-20 next to
an excluded 0 needs an exponent.

**multipleOf** is the exact arithmetic of decimals: 0.07 is a multiple of 0.01. The package
``jsonschema`` divides floats where the divisor is one (0.07 / 0.01 is 7.000000000000001 there),
so it rejects some multiples that this module accepts. Floats ≥ 1e16 have an exponent, and whether
the integer that such a text stands for is a multiple depends on its rounding; they are accepted
only where every integer is a multiple.

**Negation.** With ``positive=False`` each rule gives the numbers that do not satisfy it. It is
not the complement among all spellings: where a text is rejected by caution, it is rejected by the
negation as well. So texts accepted by both do not exist, and texts of ``json.dumps`` rejected by
both are floats ≥ 1e16 under multipleOf alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import chain, pairwise

from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_operations import union
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_scalars import decimal_automata as automata
from refllm.decode.grammar.json_scalars import remainder_automata as remainders
from refllm.decode.grammar.json_scalars.number_limits import (
    PLAIN_BELOW,
    Number,
    exact_value,
    is_finite,
    last_below,
    lower,
    nearest_float,
    readers_between,
    upper,
)
from refllm.decode.grammar.json_scalars.remainder_automata import Literal

LEAST_FLOAT = Decimal("5e-324")
MAX_INTEGER_FLOAT = Decimal("1e308")  # a short limit keeps the automaton of integers small

MAX_REMAINDERS = 5_000  # states of a multipleOf
MAX_VALUES = 10_000  # multiples listed one by one
MAX_EXCLUDED = 500  # values excluded one by one
MAX_PLAIN = 32  # characters of a small float without an exponent


# --- intervals --------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def interval(
    minimum: Number | None = None,
    maximum: Number | None = None,
    *,
    exclusive_minimum: bool = False,
    exclusive_maximum: bool = False,
    positive: bool = True,
) -> DFA:
    """Numbers from ``minimum`` to ``maximum``, without the ends that are exclusive."""
    if not positive:
        outside: list[automata.Reader] = []
        if minimum is not None:
            outside += readers_between(None, upper(minimum, not exclusive_minimum))
        if maximum is not None:
            outside += readers_between(lower(maximum, not exclusive_maximum), None)
        return automata.automaton(outside)
    return automata.automaton(
        readers_between(lower(minimum, exclusive_minimum), upper(maximum, exclusive_maximum))
    )


# --- all numbers, integers, multiples ---------------------------------------------------------


def number() -> DFA:
    """Every JSON number, an exponent only after a mantissa ``d.ddd`` with d ≥ 1."""
    return interval()


def integer(*, draft4: bool = False, positive: bool = True) -> DFA:
    """Integers. From draft 6 on 1.0 and 1e+16 are integers; in drafts 3 and 4 no float is."""
    if not draft4:
        return multiple_of(1, positive=positive)
    return _integers() if positive else _floats()


@lru_cache
def _integers() -> DFA:
    digits = automata.Digits(automata.Interval(0, None), point=False)
    return automata.automaton([digits, automata.Minus((digits,))])


@lru_cache
def _floats() -> DFA:
    floats = (
        automata.Digits(automata.Interval(0, None), point=True),
        automata.Mantissa(automata.Scale(Decimal(0), None)),
    )
    return automata.automaton([*floats, automata.Minus(floats)])


@lru_cache(maxsize=1024)
def multiple_of(divisor: Number, *, positive: bool = True) -> DFA:
    """Multiples of a decimal > 0, or with ``positive=False`` all other numbers.

    ``GrammarError`` if the automaton would be too large: the remainders modulo the digits of the
    divisor are its states (``multiples_within`` may do).
    """
    n, places = _divisor(divisor)
    if n * (places + 1) > MAX_REMAINDERS:
        raise GrammarError(
            f"multipleOf {divisor} needs more than {MAX_REMAINDERS:,} states; use a divisor with "
            "fewer digits",
            keyword="multipleOf",
        )
    rule = remainders.Divisor(n, places, positive)
    readers: list[automata.Reader] = [
        remainders.DividedDigits(rule),
        remainders.DividedMantissa(rule),
    ]
    if positive and 2 * 10**places % n == 0:
        # Every integer is a multiple, or every even one is; all floats ≥ 1e16 are even.
        scale = automata.Scale(Decimal(PLAIN_BELOW), MAX_INTEGER_FLOAT)
        readers.append(automata.Mantissa(scale))
    if not positive:
        # Floats > 0 with an exponent that are less than the divisor.
        first = min(Fraction(n, 10**places), Fraction(1, 10**4))
        below = last_below(first, exclusive=True)
        if below.decimal > 0:
            scale = automata.Scale(LEAST_FLOAT, below.decimal)
            readers.append(automata.Mantissa(scale))
    return automata.automaton([*readers, automata.Minus(tuple(readers))])


@lru_cache(maxsize=1024)
def multiples_within(
    divisor: Number,
    minimum: Number,
    maximum: Number,
    *,
    exclusive_minimum: bool = False,
    exclusive_maximum: bool = False,
) -> DFA:
    """The multiples of a decimal in a bounded interval, one by one.

    For divisors that are too large for ``multiple_of``; ``GrammarError`` if there are too many.
    """
    n, places = _divisor(divisor)
    step = Fraction(n, 10**places)
    first = math.ceil(exact_value(minimum) / step)
    last = math.floor(exact_value(maximum) / step)
    if exclusive_minimum and first * step == exact_value(minimum):
        first += 1
    if exclusive_maximum and last * step == exact_value(maximum):
        last -= 1
    if last - first >= MAX_VALUES:
        raise GrammarError(
            f"multipleOf {divisor} has too many multiples from {minimum} to {maximum} to be "
            "listed; use a divisor with fewer digits",
            keyword="multipleOf",
        )
    return values(tuple(Decimal(f"{k * n}e-{places}") for k in range(first, last + 1)))


def _divisor(divisor: Number) -> tuple[int, int]:
    """``(n, places)`` with divisor = n / 10**places and the fewest places."""
    if not is_finite(divisor) or divisor <= 0:
        raise GrammarError(f"multipleOf must be > 0, not {divisor}", keyword="multipleOf")
    decimal = Decimal(repr(divisor) if isinstance(divisor, float) else divisor)
    _, digits, exponent = decimal.as_tuple()
    n = int("".join(map(str, digits)))
    places = max(-int(exponent), 0)
    n *= 10 ** max(int(exponent), 0)
    while places and n % 10 == 0:
        n //= 10
        places -= 1
    return n, places


# --- single values ----------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def values(allowed: tuple[Number, ...], *, positive: bool = True) -> DFA:
    """Every spelling of the numbers ``allowed`` (no bools), or all other numbers.

    1 is also spelled 1.0, 1.00 …; 1e-05 also 0.00001.
    """
    if not positive and len(allowed) > MAX_EXCLUDED:
        raise GrammarError(
            f"more than {MAX_EXCLUDED} numbers are excluded one by one; use an interval instead"
        )
    if positive:
        return automata.automaton(Literal(*form) for form in _spellings(allowed))
    ends = [None, *sorted(set(allowed)), None]
    gaps = [
        readers_between(lower(low, exclusive=True), upper(high, exclusive=True))
        for low, high in pairwise(ends)
    ]
    # Few gaps at a time: each state of their automaton is a set of readers.
    parts = [automata.automaton(chain(*gaps[i : i + 8])) for i in range(0, len(gaps), 8)]
    while len(parts) > 1:
        parts = [union(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]


def _spellings(allowed: Iterable[Number]) -> Iterator[tuple[str, bool]]:
    """The text of each value in each form, and whether zeros may be appended to it."""
    for value in allowed:
        exact = exact_value(value)
        nearest = nearest_float(exact)
        if exact.denominator == 1:
            yield str(exact.numerator), False
        if math.isfinite(nearest) and (isinstance(value, Decimal) or nearest == exact):
            yield from _float_spellings(repr(nearest))
        if value == 0:
            yield "-0", False
            yield "-0.0", True


def _float_spellings(text: str) -> Iterator[tuple[str, bool]]:
    yield text, "e" not in text
    plain = f"{Decimal(text):f}"
    if "e-" in text and len(plain) <= MAX_PLAIN:
        yield plain, True
