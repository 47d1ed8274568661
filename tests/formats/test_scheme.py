"""Schemes: their codes, and what is rejected."""

from __future__ import annotations

import pytest
from hypothesis import given

from refllm.formats.granularity import Granularity
from refllm.formats.uniform import RULES, Scheme
from schemes import schemes

# rule: (qmin, qmax, zero point of the symmetric ones, divisor of a or hi − lo), at 4 bits
AT_4_BITS = {
    "restricted": (-7, 7, 0, 7.0),
    "half_integer": (-8, 7, 0, 7.5),
    "half_integer_unsigned": (0, 15, 8, 7.5),
    "power": (-8, 7, 0, 8.0),
    "asymmetric": (0, 15, None, 15.0),
    "asymmetric_signed": (-8, 7, None, 15.0),
    "awq": (0, 15, None, 15.0),
}


def test_the_table_of_rules():
    assert set(AT_4_BITS) == set(RULES)
    for rule, (qmin, qmax, zero, steps) in AT_4_BITS.items():
        scheme = Scheme(4, rule, "tensor")
        assert (scheme.qmin, scheme.qmax, scheme.steps) == (qmin, qmax, steps), rule
        assert scheme.symmetric == (zero is not None), rule
        assert zero is None or scheme.zero == zero, rule
        assert scheme.signed == (qmin < 0), rule
        assert scheme.qmin + scheme.offset >= 0, rule
        assert scheme.qmax + scheme.offset < 16, rule


@given(schemes())
def test_codes_fit_their_bits(scheme):
    stored = scheme.qmin + scheme.offset, scheme.qmax + scheme.offset
    assert stored == (int(scheme.rule == "restricted"), 2**scheme.bits - 1)
    assert not scheme.symmetric or scheme.qmin <= scheme.zero <= scheme.qmax


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "power", "tensor"), "bits is an integer in 1..8, got 0"),
        ((9, "power", "tensor"), "got 9"),
        ((2.5, "power", "tensor"), "got 2.5"),
        ((1, "restricted", "tensor"), "at 1 bit"),
        (
            (4, "symmetric", "tensor"),
            "unknown rule 'symmetric'; choose one of restricted, half_integer",
        ),
        ((4, "power", "row"), "unknown granularity 'row'; choose one of tensor, channel"),
        ((4, "power", "channel", 32), "takes no group_size"),
        ((4, "power", "group"), "takes a positive integer, got None"),
        ((4, "power", "group", 0), "takes a positive integer, got 0"),
        ((4, "power", "group", -1), "takes a positive integer, got -1"),
        ((4, "power", "group", (1, 32)), "takes a positive integer, got"),
        ((4, "power", "block"), "or a pair of them, got None"),
        ((4, "power", "block", (4, 0)), "or a pair of them, got"),
        ((4, "power", "block", (4, 4, 4)), "or a pair of them, got"),
    ],
)
def test_schemes_that_cannot_exist_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scheme(*arguments)


def test_the_geometry_of_a_scheme():
    scheme = Scheme(4, "power", "block", (2, 3))
    assert scheme.geometry == Granularity("block", (2, 3))
    assert scheme.block == (2, 3)
    assert scheme.scale_shape((4, 9)) == (2, 3)
