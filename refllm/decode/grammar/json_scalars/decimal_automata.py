"""Automata that read a JSON number digit by digit and compare it with bounds.

Two facts make intervals of decimals regular. To compare a decimal with a bound it is enough to
remember how many digits agreed so far and, once two digits differ, which of the two was greater
(before the point the number of digits decides first). And a number in scientific form,
``d.ddde±xx``, is greater than a bound in the same form if its exponent is greater, or if the
exponents are equal and its mantissa is greater: so the order of the mantissas says which
exponents may follow.

A *reader* is a small immutable object, the state after some bytes of a number: ``step(symbol)``
gives the readers after one more. ``automaton`` follows a set of readers in parallel (a number may
still become an integer, a decimal or a number with an exponent) and returns the minimal DFA.
The rules of JSON Schema that are built of them are in ``json_numbers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from refllm.decode.grammar.automata.alphabet import BYTES, alphabet_of
from refllm.decode.grammar.automata.dfa import ACCEPT, DFA
from refllm.decode.grammar.automata.dfa_builders import explore
from refllm.decode.grammar.automata.dfa_minimization import minimize

# What a reader sees: the digits 0 … 9 as integers, and these.
PLUS, MINUS, POINT, EXPONENT = 10, 11, 12, 13
_BYTES = (*(bytes([48 + digit]) for digit in range(10)), b"+", b"-", b".", b"Ee")
_ALPHABET, _COLUMNS = alphabet_of(BYTES, [[(byte, byte) for byte in group] for group in _BYTES])
# The symbol of each class of bytes; -1 for bytes that are in no number.
_SYMBOLS = [
    next((symbol for symbol, classes in enumerate(_COLUMNS) if cls in classes), -1)
    for cls in range(_ALPHABET.count)
]


class Reader(Protocol):
    """The state after some bytes of a number. Hashable."""

    @property
    def accepting(self) -> bool:
        """Whether the number may end here."""
        ...

    def step(self, symbol: int) -> Iterable[Reader]:
        """The readers after one more symbol; none if no number goes on like this."""
        ...


def automaton(readers: Iterable[Reader]) -> DFA:
    """The minimal DFA over bytes of the numbers that at least one of ``readers`` accepts."""
    steps: dict[Reader, list[tuple[Reader, ...]]] = {}  # reader → its successors per class

    def row_of(state: frozenset[Reader]) -> Iterator[frozenset[Reader] | None]:
        for reader in state:
            if reader not in steps:
                successors = [*(tuple(reader.step(symbol)) for symbol in range(len(_BYTES))), ()]
                steps[reader] = [successors[symbol] for symbol in _SYMBOLS]
        for cls in range(_ALPHABET.count):
            after = frozenset([new for reader in state for new in steps[reader][cls]])
            yield after or None

    def label_of(state: frozenset[Reader]) -> int:
        return ACCEPT * any(reader.accepting for reader in state)

    start = frozenset(readers)
    return minimize(explore(_ALPHABET, start, row_of, label_of, what="a rule of numbers"))


# --- comparing with bounds --------------------------------------------------------------------

Order = tuple[int, int]  # (digits read, -1 less · 0 equal so far · 1 greater)
ABOVE, BELOW = -1, -2  # places after the point at which the digits no longer agree


@dataclass(frozen=True)
class Bound:
    """A magnitude ≥ 0 that a decimal is compared with while its digits are read."""

    whole: str  # the digits before the point, without leading zeros: "" for 0
    fraction: str  # the digits after the point, without trailing zeros

    @classmethod
    def of(cls, value: Decimal | int) -> Bound:
        """The bound with the value of a decimal ≥ 0."""
        whole, _, fraction = f"{Decimal(value):f}".partition(".")
        return cls(whole.lstrip("0"), fraction.rstrip("0"))

    def read_whole(self, order: Order, digit: int) -> Order:
        """The order after one more digit before the point (never a leading zero)."""
        count, sign = order
        if count >= len(self.whole):
            return len(self.whole) + 1, 1
        return count + 1, sign or _sign(digit - int(self.whole[count]))

    def read_point(self, order: Order) -> int:
        """The place after the point from which digits are compared, or ABOVE or BELOW."""
        return _PLACES[self._compare_digits(order)]

    def read_fraction(self, place: int, digit: int) -> int:
        """The place after one more digit behind the point."""
        if place < 0:
            return place
        inside = place < len(self.fraction)
        sign = _sign(digit - int(self.fraction[place : place + 1] or "0"))
        return _PLACES[sign] or place + inside

    def compare_whole(self, order: Order) -> int:
        """The sign of (number read - bound) if the number ends before a point."""
        return self._compare_digits(order) or -bool(self.fraction)

    def compare_fraction(self, place: int) -> int:
        """The sign of (number read - bound) if the number ends at this place after the point."""
        if place == ABOVE:
            return 1
        return -(place == BELOW or place < len(self.fraction))

    def _compare_digits(self, order: Order) -> int:
        count, sign = order
        return _sign(count - len(self.whole)) or sign


class Unlimited(Bound):
    """No bound: every number is below it."""

    def read_whole(self, order: Order, digit: int) -> Order:
        """Nothing to remember."""
        return order

    def read_point(self, order: Order) -> int:
        """Below."""
        return BELOW

    def compare_whole(self, order: Order) -> int:
        """Below."""
        return -1


UNLIMITED = Unlimited("", "")
_PLACES = {-1: BELOW, 0: 0, 1: ABOVE}  # by the sign of a comparison


def _sign(difference: int) -> int:
    return (difference > 0) - (difference < 0)


Orders = tuple[Order, Order]
Places = tuple[int, int]
UNREAD: Orders = ((0, 0), (0, 0))


class Interval:
    """Magnitudes from ``low`` to ``high``, both included; no upper limit if it is None.

    Compared by identity, so that readers that share one are hashed quickly.
    """

    def __init__(self, low: Decimal | int, high: Decimal | int | None) -> None:
        self.low = Bound.of(low)
        self.high: Bound = UNLIMITED
        if high is not None:
            self.high = Bound.of(high)

    def read_whole(self, orders: Orders, digit: int) -> Orders:
        """The orders towards both bounds after one more digit before the point."""
        return self.low.read_whole(orders[0], digit), self.high.read_whole(orders[1], digit)

    def read_point(self, orders: Orders) -> Places:
        """The places towards both bounds after the point."""
        return self.low.read_point(orders[0]), self.high.read_point(orders[1])

    def read_fraction(self, places: Places, digit: int) -> Places:
        """The places towards both bounds after one more digit behind the point."""
        return (
            self.low.read_fraction(places[0], digit),
            self.high.read_fraction(places[1], digit),
        )

    def compare_whole(self, orders: Orders) -> tuple[bool, bool]:
        """Whether a number that ends before a point is ≥ ``low``, and whether it is ≤ ``high``."""
        return self.low.compare_whole(orders[0]) >= 0, self.high.compare_whole(orders[1]) <= 0

    def compare_fraction(self, places: Places) -> tuple[bool, bool]:
        """The same for a number that ends after the point."""
        return self.low.compare_fraction(places[0]) >= 0, self.high.compare_fraction(places[1]) <= 0

    def missed_whole(self, orders: Orders) -> bool:
        """Whether no number that begins with these digits is in the interval."""
        if self.high is UNLIMITED:
            return False
        (count, above_low), (_, above_high) = orders
        length = len(self.high.whole)
        # If both bounds have one length, so has every number between them.
        outside = above_low < 0 or above_high > 0
        return count > length or (outside and len(self.low.whole) == length)

    def missed(self, places: Places) -> bool:
        """The same for a number after the point."""
        return places[0] == BELOW or places[1] == ABOVE


# --- readers of the three forms of a number ---------------------------------------------------


@dataclass(frozen=True)
class Minus:
    """A minus sign, then one of ``readers``."""

    readers: tuple[Reader, ...]
    accepting = False

    def step(self, symbol: int) -> Iterable[Reader]:
        """The readers of what follows the sign."""
        return self.readers if symbol == MINUS else ()


@dataclass(frozen=True)
class Digits:
    """The digits before the point of a number in an interval, with no leading zero.

    With ``point`` the number must go on with a point and more digits, without it must end.
    """

    interval: Interval
    point: bool
    orders: Orders = UNREAD
    read: str = ""  # "", "0" or "digits"

    @property
    def accepting(self) -> bool:
        """Whether an integer within the interval was read."""
        return bool(self.read) and not self.point and all(self.interval.compare_whole(self.orders))

    def step(self, symbol: int) -> Iterable[Reader]:
        """One more digit, or the point."""
        if symbol == POINT and self.point and self.read:
            places = self.interval.read_point(self.orders)
            if not self.interval.missed(places):
                yield Fraction(self.interval, places)
        elif symbol == 0 and not self.read:
            yield Digits(self.interval, self.point, self.orders, "0")
        elif symbol <= 9 and self.read != "0":
            orders = self.interval.read_whole(self.orders, symbol)
            if not self.interval.missed_whole(orders):
                yield Digits(self.interval, self.point, orders, "digits")


@dataclass(frozen=True)
class Fraction:
    """The digits after the point, at least one."""

    interval: Interval
    places: Places
    read: bool = False

    @property
    def accepting(self) -> bool:
        """Whether the number is within the interval."""
        return self.read and all(self.interval.compare_fraction(self.places))

    def step(self, symbol: int) -> Iterable[Reader]:
        """One more digit."""
        if symbol <= 9:
            places = self.interval.read_fraction(self.places, symbol)
            if not self.interval.missed(places):
                yield Fraction(self.interval, places, True)


@dataclass(frozen=True)
class Mantissa:
    """The mantissa of ``d.ddde±xx`` with d ≥ 1, compared with the mantissas of both bounds."""

    scale: Scale
    orders: Orders = UNREAD
    places: Places | None = None  # None before the point
    read: bool = False  # a digit before the point, or after it
    accepting = False

    def step(self, symbol: int) -> Iterable[Reader]:
        """The digit before the point, the point, a digit behind it, or the exponent's letter."""
        scale = self.scale
        if symbol == EXPONENT and self.read:
            yield Power(*scale.exponents(self.orders, self.places))
        elif self.places is not None and symbol <= 9:
            places = scale.mantissas.read_fraction(self.places, symbol)
            yield Mantissa(scale, UNREAD, places, True)
        elif symbol == POINT and self.read and self.places is None:
            yield Mantissa(scale, UNREAD, scale.mantissas.read_point(self.orders))
        elif 1 <= symbol <= 9 and not self.read and self.places is None:
            yield Mantissa(scale, scale.mantissas.read_whole(self.orders, symbol), None, True)


class Scale:
    """Magnitudes > 0 from ``low`` to ``high`` in scientific form. Compared by identity.

    A ``low`` of 0 and a ``high`` of None are no limits.
    """

    def __init__(self, low: Decimal, high: Decimal | None) -> None:
        self.mantissas = Interval(_mantissa(low), high and _mantissa(high))
        self.low = float(low.adjusted()) if low else -math.inf  # the exponents of the bounds
        self.high = float(high.adjusted()) if high else math.inf
        self._exponents: dict[tuple[bool, bool], tuple[Interval | None, Interval | None]] = {}

    def exponents(
        self, orders: Orders, places: Places | None
    ) -> tuple[Interval | None, Interval | None]:
        """The exponents after a mantissa: the magnitudes of those < 0, and of those ≥ 0."""
        if places is None:
            within = self.mantissas.compare_whole(orders)
        else:
            within = self.mantissas.compare_fraction(places)
        if within not in self._exponents:
            # A mantissa beyond that of the bound needs an exponent on the other side of its own.
            low, high = self.low + (not within[0]), self.high - (not within[1])
            positive = negative = None
            if high >= max(low, 0):
                positive = _exponents(max(low, 0), high)
            if low <= min(high, 0):
                negative = _exponents(max(-high, 0), -low)
            self._exponents[within] = negative, positive
        return self._exponents[within]


def _exponents(low: float, high: float) -> Interval:
    return Interval(int(low), None if math.isinf(high) else int(high))


def _mantissa(value: Decimal) -> Decimal:
    """The value with its first digit before the point; 0 for 0."""
    return value.scaleb(-value.adjusted())


@dataclass(frozen=True)
class Power:
    """The exponent after its letter: a sign or the first digit."""

    negative: Interval | None
    positive: Interval | None
    accepting = False

    def step(self, symbol: int) -> Iterable[Reader]:
        """A sign, or the first digit."""
        if symbol == MINUS and self.negative:
            yield PowerDigits(self.negative)
        elif symbol == PLUS and self.positive:
            yield PowerDigits(self.positive)
        elif symbol <= 9 and self.positive:
            yield from PowerDigits(self.positive).step(symbol)


@dataclass(frozen=True)
class PowerDigits:
    """The digits of the exponent, leading zeros allowed."""

    interval: Interval
    orders: Orders = UNREAD
    read: bool = False

    @property
    def accepting(self) -> bool:
        """Whether the exponent is within the interval."""
        return self.read and all(self.interval.compare_whole(self.orders))

    def step(self, symbol: int) -> Iterable[Reader]:
        """One more digit."""
        if symbol == 0 and self.orders == UNREAD:
            yield PowerDigits(self.interval, UNREAD, True)
        elif symbol <= 9:
            yield PowerDigits(self.interval, self.interval.read_whole(self.orders, symbol), True)
