"""Schemes: their codes, what shares a step, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from conftest import to_host
from refllm.formats.uniform import (
    GRANULARITIES,
    RULES,
    Scheme,
    as_blocks,
    expand_scale,
    from_blocks,
)
from schemes import columns, place, rows, schemes

# rule: (qmin, qmax, zero point of the symmetric ones, divisor of a or hi − lo), at 4 bits:
# specs §1
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


@given(schemes(), rows, columns)
def test_blocks_hold_what_shares_a_step(pure_xp, scheme, m, n):
    x = pure_xp.reshape(pure_xp.arange(m * n, dtype=pure_xp.float64), (m, n))
    shape = scheme.scale_shape((m, n))
    steps = pure_xp.reshape(pure_xp.arange(int(np.prod(shape)), dtype=pure_xp.float64), shape)
    back = to_host(
        from_blocks(as_blocks(x, scheme) * 0.0 + expand_scale(steps, scheme, (m, n)), (m, n))
    )
    numbers = np.arange(np.prod(shape)).reshape(shape)
    assert back.tolist() == [[numbers[place(scheme, i, j)] for j in range(n)] for i in range(m)]
    np.testing.assert_array_equal(to_host(from_blocks(as_blocks(x, scheme), (m, n))), to_host(x))


def test_shapes_of_scales():
    shapes = {
        ("tensor", None): (),
        ("channel", None): (6, 1),
        ("token", None): (6, 1),
        ("group", 4): (6, 3),
        ("block", 4): (2, 3),
        ("block", (4, 5)): (2, 3),
        ("block", 128): (1, 1),
    }
    assert {granularity for granularity, _ in shapes} == set(GRANULARITIES)
    for layout, shape in shapes.items():
        assert Scheme(4, "half_integer", *layout).scale_shape((6, 12)) == shape
    assert Scheme(8, "restricted", "token").scale_shape((2, 5, 12)) == (2, 5, 1)
    assert Scheme(8, "restricted", "group", 4).scale_shape((12,)) == (3,)


@pytest.mark.parametrize(
    ("n", "g", "said"),
    [
        (
            100,
            32,
            r"groups of 32 do not divide a row of 100: .* are 25 and 50, or pad the row with zeros to 128",
        ),
        (7, 4, r"are 1 and 7, or .* to 8"),
        (6, 128, r"are 6, or .* to 128"),
        (13, 2, r"are 1 and 13, or .* to 14"),
    ],
)
def test_ragged_groups_are_refused_with_the_nearest_sizes(n, g, said):
    with pytest.raises(ValueError, match=said):
        Scheme(4, "half_integer", "group", g).scale_shape((3, n))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, "power", "tensor"), "bits is a whole number in 1..8, got 0"),
        ((9, "power", "tensor"), "got 9"),
        ((2.5, "power", "tensor"), "got 2.5"),
        ((1, "restricted", "tensor"), "at 1 bit"),
        (
            (4, "symmetric", "tensor"),
            "unknown rule 'symmetric'; choose one of restricted, half_integer",
        ),
        ((4, "power", "row"), "unknown granularity 'row'; choose one of tensor, channel"),
        ((4, "power", "channel", 32), "takes no group_size"),
        ((4, "power", "group"), "takes a positive number, got None"),
        ((4, "power", "group", 0), "takes a positive number, got 0"),
        ((4, "power", "group", -1), "takes a positive number, got -1"),
        ((4, "power", "group", (1, 32)), "takes a positive number, got"),
        ((4, "power", "block"), "or a pair of them, got None"),
        ((4, "power", "block", (4, 0)), "or a pair of them, got"),
        ((4, "power", "block", (4, 4, 4)), "or a pair of them, got"),
    ],
)
def test_schemes_that_cannot_be_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Scheme(*arguments)


def test_arrays_that_do_not_fit_are_refused(xp):
    with pytest.raises(ValueError, match="'channel' does not fit an array of shape"):
        Scheme(4, "power", "channel").scale_shape(())
    with pytest.raises(ValueError, match="'block' does not fit an array of shape"):
        Scheme(4, "power", "block", 4).scale_shape((2, 3, 4))
    with pytest.raises(
        ValueError, match=r"shape \(2,\): an array of shape \(2, 8\) takes \(2, 1\)"
    ):
        expand_scale(xp.asarray(np.ones(2)), Scheme(4, "power", "channel"), (2, 8))
