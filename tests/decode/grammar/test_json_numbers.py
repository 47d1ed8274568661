"""Rules of numbers: each automaton against exact arithmetic on what ``json.dumps`` writes."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_scalars.json_numbers import (
    integer,
    interval,
    multiple_of,
    multiples_within,
    number,
    values,
)

EDGES = [
    *(0, 0.0, -0.0, 1, 1.0, -1, 0.1, 0.3, 5e-324, 1e-20, 1e-5, 9.5e-5, 1e16, 2.0**53, 2**53 + 1),
    *(2**63 - 1, 2**63, 2.0**63, 9223372036854776000, 2**64, 1e22, 1e23, 10**23, 65535, 65535.0),
    *(1.7976931348623157e308, 10**309, -(10**309), -1e23, -5e-324, -0.5, 99999999999.99),
]
finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.one_of(
    st.sampled_from(EDGES),
    st.integers(-300, 300),
    st.integers(),
    finite,
    st.builds(round, st.floats(-200, 200), st.integers(0, 3)),
    st.builds(
        lambda digits, power: float(f"{digits}e{power}"),
        st.integers(-999, 999),
        st.integers(-12, 25),
    ),
)


def accepts(dfa, value) -> bool:
    text = value if isinstance(value, str) else json.dumps(value)
    return dfa.matches(text.encode())


def neighbours(bound) -> list:
    """Numbers at and next to a bound, in both kinds."""
    found = [bound, math.floor(bound) - 1, math.floor(bound), math.floor(bound) + 1]
    if abs(bound) <= 1.7e308:
        near = float(bound)
        found += [near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)]
    return found


@given(st.none() | numbers, st.none() | numbers, st.booleans(), st.booleans(), st.lists(numbers))
@example(0, None, True, False, [5e-324, 0, -0.0, 1e-300, 1e-5])
@example(None, 2**63 - 1, False, False, [2.0**63])
@example(None, 9223372036854776000, False, True, [2.0**63])
@example(1e23, 10**23, False, False, [1e23, 10**23])
@pytest.mark.theorem(
    "An interval accepts exactly the numbers that Python compares as within bounds, as json.dumps "
    "writes them; the negation accepts exactly the others.",
    source="JSON Schema 2020-12 validation §6.2",
)
def test_interval_is_exact_comparison(low, high, without_low, without_high, candidates):
    bounds = {"exclusive_minimum": without_low, "exclusive_maximum": without_high}
    inside = interval(low, high, **bounds)
    outside = interval(low, high, **bounds, positive=False)
    for bound in (low, high):
        candidates += [] if bound is None else neighbours(bound)
    for value in candidates:
        above = low is None or (value > low if without_low else value >= low)
        below = high is None or (value < high if without_high else value <= high)
        assert accepts(inside, value) == (above and below)
        assert accepts(outside, value) != (above and below)


@given(numbers, st.integers(-30, 30), st.integers(0, 999), st.sampled_from(["e", "E"]))
def test_other_spellings_are_within_bounds_when_they_are_read(bound, power, digits, letter):
    """Numbers that ``json.dumps`` would not write like this are never accepted wrongly."""
    spellings = [f"{digits}.00", f"{digits}.{abs(power)}5", f"{power}.50", f"-{digits}.0"]
    if digits:
        mantissa = f"{str(digits)[0]}.{str(digits)[1:]}0"
        spellings += [f"{mantissa}{letter}{power}", f"-{mantissa}{letter}+{abs(power)}"]
        spellings += [f"{mantissa}{letter}-0{abs(power)}"]
    least, most = interval(bound), interval(None, bound)
    for text in spellings:
        value = json.loads(text)
        assert accepts(number(), text)
        assert accepts(least, text) <= (value >= bound)
        assert accepts(most, text) <= (value <= bound)
        if Fraction(Decimal(text)) != Fraction(Decimal(repr(bound))):
            assert accepts(least, text) == (value >= bound) or value == bound
        assert accepts(interval(bound, exclusive_minimum=True), text) <= (value > bound)


@pytest.mark.parametrize(
    "text",
    ["01", "-", "+1", "1.", ".5", "1e", "1e+", "--1", "1.5.0", "1e5.0", "", "NaN", " 1", "0x1"],
)
def test_what_is_no_json_number_is_rejected(text):
    for dfa in (number(), integer(), interval(-5, 5), multiple_of(0.5), values((1, 0, 1.5))):
        assert not accepts(dfa, text)


@given(numbers)
def test_integers_are_those_of_the_draft(value):
    is_int = isinstance(value, int)
    whole = is_int or value.is_integer()
    assert accepts(integer(draft4=True), value) == is_int
    assert accepts(integer(draft4=True, positive=False), value) != is_int
    if is_int or abs(value) <= 1e308:
        assert accepts(integer(), value) == whole
    assert accepts(integer(positive=False), value) != whole


@pytest.mark.parametrize("text", ["1e400", "1" + "0" * 400 + ".0", "1e309", "1.5e16e", "1.5"])
def test_infinity_and_fractions_are_no_integers(text):
    assert not accepts(integer(), text)


DIVISORS = [
    1,
    2,
    3,
    7,
    10,
    11,
    64,
    100,
    365,
    1.0,
    0.5,
    0.1,
    0.01,
    2.5,
    0.25,
    0.003,
    1e-5,
    1e-8,
    2.5e-6,
]


@given(st.sampled_from(DIVISORS), st.lists(numbers), st.integers(-2000, 2000))
@pytest.mark.theorem(
    "multipleOf accepts exactly the decimals that the divisor divides; where it decides nothing "
    "(floats from 1e16 on) it accepts no non-multiple, and its negation accepts nothing.",
    source="JSON Schema 2020-12 validation §6.2.1",
)
def test_multiples_are_exact_remainders(divisor, candidates, factor):
    multiples, others = multiple_of(divisor), multiple_of(divisor, positive=False)
    exact = Fraction(Decimal(repr(divisor)))
    candidates += [factor * divisor, float(factor * exact), factor, factor / 10, factor / 1e7]
    for value in candidates:
        divides = (Fraction(Decimal(json.dumps(value))) / exact).denominator == 1
        if isinstance(value, float) and abs(value) >= 1e16:
            assert accepts(multiples, value) <= (Fraction(value) / exact).denominator
            assert not accepts(others, value)
            assert accepts(multiples, value) == (abs(value) <= 1e308 and divisor in LARGE)
        else:
            assert accepts(multiples, value) == divides
            assert accepts(others, value) != divides


LARGE = {1, 2, 0.5, 0.1, 0.01, 0.25, 1e-5, 1e-8, 2.5e-6}  # they divide every even integer


def test_zeros_behind_a_mantissa_make_no_multiple_another_number():
    for text in ("2.0000000000e-05", "2.0e-05", "2.000000000000000000"):
        assert not accepts(multiple_of(1e-5, positive=False), text)


@given(
    st.sampled_from([0.123456789, 1234577, 7]),
    st.integers(-900, 900),
    st.integers(0, 20),
    st.booleans(),
)
def test_a_bounded_interval_lists_the_multiples_of_a_large_divisor(divisor, first, count, open_):
    exact = Fraction(Decimal(repr(divisor)))
    low, high = (Decimal(repr(divisor)) * (first + n) for n in (0, count))
    ends = {"exclusive_minimum": open_, "exclusive_maximum": open_}
    listed = multiples_within(divisor, low, high, **ends)
    for n in range(first - 2, first + count + 3):
        within = first < n < first + count if open_ else first <= n <= first + count
        assert accepts(listed, float(n * exact)) == within
        assert not accepts(listed, float(n * exact) + 0.001)


def test_divisors_that_need_too_many_states_are_rejected_by_name():
    with pytest.raises(GrammarError, match="multipleOf 0.123456789") as error:
        multiple_of(0.123456789)
    assert error.value.keyword == "multipleOf"
    with pytest.raises(GrammarError, match="too many multiples"):
        multiples_within(0.123456789, 0, 1e9)
    for divisor in (0, -1, math.inf):
        with pytest.raises(GrammarError, match="must be > 0"):
            multiple_of(divisor)
    for bound in (math.inf, math.nan):
        with pytest.raises(GrammarError, match="must be finite"):
            interval(bound)


@given(st.lists(numbers, max_size=5), st.lists(numbers))
@example([1], [True, 1.0])
@example([1e23], [10**23, 99999999999999991611392])
def test_values_are_compared_as_numbers(allowed, candidates):
    only, others = values(tuple(allowed)), values(tuple(allowed), positive=False)
    for value in allowed:
        candidates += neighbours(value)
    for value in candidates:
        if isinstance(value, bool):
            continue
        assert accepts(only, value) == (value in allowed)
        assert accepts(others, value) != (value in allowed)


def test_values_in_other_spellings():
    assert all(accepts(values((1, 0, 1e-5)), text) for text in ("1.00", "-0", "0.0", "1e-05"))
    assert accepts(values((1e-5,)), "0.00001")
    assert accepts(values((1e16,)), "10000000000000000")
    assert not accepts(values((1,), positive=False), "1.000")
    assert not accepts(values((0.1,), positive=False), "0.1000000000000000055511151231257827")
    assert values(()).empty


def test_many_excluded_values_are_rejected_by_name():
    with pytest.raises(GrammarError, match="excluded one by one"):
        values(tuple(range(501)), positive=False)
    outside = values(tuple(range(40)), positive=False)
    assert [n for n in range(-5, 50) if accepts(outside, n)] == [*range(-5, 0), *range(40, 50)]


@pytest.mark.parametrize(
    ("dfa", "most"),
    [
        (number, 11),
        (integer, 45),
        (lambda: integer(draft4=True), 5),
        (lambda: interval(0), 14),
        (lambda: interval(0, 65535), 40),
        (lambda: interval(1000000000, 4294967295), 120),
        (lambda: interval(-90, 90), 30),
        (lambda: interval(0, exclusive_minimum=True), 50),
        (lambda: multiple_of(0.01), 50),
        (lambda: multiple_of(3), 10),
    ],
)
def test_automata_of_common_rules_are_small(dfa, most):
    assert dfa().states <= most
