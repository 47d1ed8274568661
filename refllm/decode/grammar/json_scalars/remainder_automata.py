"""Readers of JSON numbers that are, or are not, multiples of a decimal; and of single values.

A divisor is written ``n / 10**places`` with the fewest places. A number whose digits are read one
by one is a multiple if those digits, with ``places`` digits after the point, form an integer that
n divides: the remainder modulo n is all that must be remembered. ``decimal_automata.py`` explains
readers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from refllm.decode.grammar.json_scalars.decimal_automata import EXPONENT, MINUS, PLUS, POINT, Reader

FLOAT_DIGITS = 16  # ``repr`` writes at most so many digits before a point
LEAST_POWER = 5  # ``repr`` writes an exponent from 1e-05 downwards
NEVER = -1  # the remainder of a number that no further digit makes a multiple


@dataclass(frozen=True)
class Divisor:
    """``n / 10**places``, and whether its multiples or all other numbers are accepted."""

    n: int
    places: int
    positive: bool

    def accepts(self, remainder: int, place: int) -> bool:
        """Whether digits with this remainder, ``place`` of them after the point, are accepted."""
        if remainder == NEVER:
            return not self.positive
        missing: int = 10 ** (self.places - place)
        return (remainder * missing % self.n == 0) == self.positive

    def read(self, remainder: int, place: int, digit: int) -> tuple[int, int] | None:
        """The remainder and place after one more digit behind the point; None: never accepted."""
        if remainder != NEVER and place < self.places:
            return (10 * remainder + digit) % self.n, place + 1
        if digit == 0:
            return remainder, place
        return None if self.positive else (NEVER, self.places)


@dataclass(frozen=True)
class DividedDigits:
    """The digits before the point, with no leading zero."""

    divisor: Divisor
    remainder: int = 0
    count: int = 0  # digits read, where they are counted
    read: str = ""  # "", "0" or "digits"

    @property
    def accepting(self) -> bool:
        """Whether an integer was read that is accepted."""
        return bool(self.read) and self.divisor.accepts(self.remainder, 0)

    def step(self, symbol: int) -> Iterable[Reader]:
        """One more digit, or the point."""
        divisor = self.divisor
        if symbol == POINT and self.read:
            if self.count <= FLOAT_DIGITS:
                yield DividedFraction(divisor, self.remainder, 0)
        elif symbol == 0 and not self.read:
            yield DividedDigits(divisor, 0, 0, "0")
        elif symbol <= 9 and self.read != "0":
            # All integers are multiples of 1, infinity is none: count digits where that is cheap.
            count = min(self.count + 1, FLOAT_DIGITS + 1) if divisor.n == 1 else 0
            remainder = (10 * self.remainder + symbol) % divisor.n
            yield DividedDigits(divisor, remainder, count, "digits")


@dataclass(frozen=True)
class DividedFraction:
    """The digits after the point, at least one."""

    divisor: Divisor
    remainder: int
    place: int
    read: bool = False

    @property
    def accepting(self) -> bool:
        """Whether the number is accepted."""
        return self.read and self.divisor.accepts(self.remainder, self.place)

    def step(self, symbol: int) -> Iterable[Reader]:
        """One more digit."""
        if symbol <= 9:
            after = self.divisor.read(self.remainder, self.place, symbol)
            if after is not None:
                yield DividedFraction(self.divisor, *after, True)


@dataclass(frozen=True)
class DividedMantissa:
    """A mantissa whose exponent is -5 or less, but no less than -``places``."""

    divisor: Divisor
    remainder: int = 0
    place: int = -1  # digits read after the point; -1: nothing read
    point: bool = False
    complete: bool = False  # the last digit read is no 0 behind the point
    accepting = False

    def step(self, symbol: int) -> Iterable[Reader]:
        """The digit before the point, the point, a digit behind it, or the exponent's letter."""
        divisor = self.divisor
        remainder = (10 * self.remainder + symbol) % divisor.n
        if symbol == EXPONENT and self.complete:
            powers = range(LEAST_POWER, divisor.places + 1)
            yield NegativePower(frozenset(power for power in powers if self._accepts(power)))
        elif symbol == POINT and self.complete and not self.point:
            yield DividedMantissa(divisor, self.remainder, 0, point=True)
        elif symbol <= 9 and self.point and self.place < divisor.places:
            yield DividedMantissa(divisor, remainder, self.place + 1, True, symbol > 0)
        elif symbol <= 9 and self.point and not divisor.positive:
            yield DividedMantissa(divisor, 0, self.place, True, symbol > 0)
        elif 1 <= symbol <= 9 and self.place < 0:
            yield DividedMantissa(divisor, remainder, 0, complete=True)

    def _accepts(self, power: int) -> bool:
        if self.place + power > self.divisor.places:
            return not self.divisor.positive
        return self.divisor.accepts(self.remainder, self.place + power)


@dataclass(frozen=True)
class NegativePower:
    """A negative exponent out of some."""

    powers: frozenset[int]
    signed: bool = False
    value: int = 0

    @property
    def accepting(self) -> bool:
        """Whether the exponent is one of them."""
        return self.value in self.powers

    def step(self, symbol: int) -> Iterable[Reader]:
        """The sign, or one more digit."""
        if symbol == MINUS and not self.signed and self.powers:
            yield NegativePower(self.powers, True)
        elif symbol <= 9 and self.signed:
            value = 10 * self.value + symbol
            if value <= max(self.powers):
                yield NegativePower(self.powers, True, value)


@dataclass(frozen=True)
class Literal:
    """One number as it is written, then any number of zeros where ``zeros`` is set."""

    text: str
    zeros: bool

    @property
    def accepting(self) -> bool:
        """Whether all of it was read."""
        return not self.text

    def step(self, symbol: int) -> Iterable[Reader]:
        """The next character, or one more zero."""
        if self.text:
            if symbol == _SYMBOLS[self.text[0]]:
                yield Literal(self.text[1:], self.zeros)
        elif symbol == 0 and self.zeros:
            yield self


_SYMBOLS = {**{str(d): d for d in range(10)}, "+": PLUS, "-": MINUS, ".": POINT, "e": EXPONENT}
