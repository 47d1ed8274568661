"""Scales and zero points: the formulas of the rules, the limits of the arithmetic, and
the reference implementations' values.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.formats.uniform import (
    RULES,
    Scheme,
    qparams,
    range_to_qparams,
    ranges,
    reachable,
    require_finite,
)
from schemes import FORCED, columns, place, rows, schemes
from strategies import KINDS, arrays, build, seeds

dtypes = st.sampled_from(["float32", "float64"])
PLAIN = ("normal", "outlier_column", "constant", "one_sided")


@given(schemes(), rows, columns, st.sampled_from(KINDS), dtypes, seeds)
def test_ranges_are_the_extremes_of_what_shares_a_scale(pure_xp, scheme, m, n, kind, dtype, seed):
    x = build(kind, (m, n), seed, dtype)
    lo, hi = map(to_host, ranges(pure_xp.asarray(x), scheme))
    assert lo.shape == hi.shape == scheme.scale_shape((m, n))
    assert lo.dtype == hi.dtype == dtype
    members = {}
    for i in range(m):
        for j in range(n):
            members.setdefault(place(scheme.geometry, i, j), []).append(x[i, j])
    for index, values in members.items():
        assert (lo[index], hi[index]) == (min(values), max(values))


def by_hand(x, bits, rule):
    """(s, z) of one range, straight from the table, in float64."""
    a = np.abs(x).max()
    lo = min(x.min(), 0.0)
    hi = max(x.max(), 0.0)
    most = 2**bits - 1
    if rule == "restricted":
        return a / (2 ** (bits - 1) - 1), 0
    if rule in ("half_integer", "half_integer_unsigned"):
        return a / (most / 2), 2 ** (bits - 1) if rule == "half_integer_unsigned" else 0
    if rule == "power":
        return a / 2 ** (bits - 1), 0
    if rule == "awq":
        s = max(x.max() - x.min(), 1e-5) / most
        return s, int(np.clip(-np.rint(x.min() / s), 0, most))
    s = (hi - lo) / most
    if rule == "asymmetric":
        return s, int(np.clip(np.rint(-lo / s), 0, most))
    least = -(2 ** (bits - 1))
    return s, int(np.rint(np.clip(least - lo / s, least, least + most)))


@given(schemes(layouts=[("tensor", None)]), st.sampled_from(PLAIN), seeds)
def test_formulas_of_the_table(pure_xp, scheme, kind, seed):
    x = build(kind, (9,), seed, "float64")
    scale, zero = qparams(pure_xp.asarray(x), scheme)
    assert to_host(scale).shape == to_host(zero).shape == ()
    assert to_host(zero).dtype == np.int32
    step, point = by_hand(x, scheme.bits, scheme.rule)
    np.testing.assert_allclose(float(scale), step, rtol=4 * np.finfo("float64").eps)
    assert int(zero) == point


@pytest.mark.theorem(
    "Zero points are codes of the scheme, for every rule and every kind of input",
    source="formats/uniform.py, definition of the rules",
)
@given(schemes(), arrays(rows, columns, dtype="float32"))
def test_zero_points_are_codes_and_scales_are_normal_numbers(pure_xp, scheme, x):
    scale, zero = map(to_host, qparams(pure_xp.asarray(x), scheme))
    assert (zero >= scheme.qmin).all()
    assert (zero <= scheme.qmax).all()
    assert (scale >= np.finfo("float32").smallest_normal).all()
    assert (scale < np.inf).all()


@pytest.mark.theorem(
    "Scaling the input by 2^k multiplies the scale by 2^k and leaves the zero point, bit for bit",
    source="formats/uniform.py, definition of the rules",
)
@given(schemes(), rows, columns, st.sampled_from(PLAIN), dtypes, st.integers(-12, 12), seeds)
def test_power_of_two_equivariance(pure_xp, scheme, m, n, kind, dtype, k, seed):
    if scheme.rule == "awq":  # a range below 1e-5 is taken as 1e-5: keep away from it
        kind = "normal"
        scheme = Scheme(scheme.bits, "awq", "tensor")
        m = 4
        n = 20
    x = build(kind, (m, n), seed, dtype)
    first, second = (
        tuple(map(to_host, qparams(pure_xp.asarray(v), scheme))) for v in (x, x * 2.0**k)
    )
    np.testing.assert_array_equal(second[0], first[0] * 2.0**k)
    np.testing.assert_array_equal(second[1], first[1])


@pytest.mark.theorem(
    "A scale never grows when its range shrinks: groups within channels within the tensor",
    source="formats/uniform.py, definition of the rules",
)
@given(
    st.sampled_from(FORCED),
    st.integers(2, 8),
    rows,
    st.sampled_from(["normal", "outlier_column", "one_sided"]),
    seeds,
)
def test_finer_granularity_has_finer_scales(pure_xp, rule, bits, m, kind, seed):
    x = pure_xp.asarray(build(kind, (m, 12), seed))
    layouts = [("tensor", None), ("channel", None), ("group", 6), ("group", 2)]
    steps = [to_host(qparams(x, Scheme(bits, rule, *layout))[0]) for layout in layouts]
    for coarse, fine in itertools.pairwise(steps):
        wide = (
            np.repeat(coarse, fine.shape[1] // coarse.shape[1], axis=1)
            if coarse.ndim == 2
            else coarse
        )
        assert (fine <= wide).all()


def test_all_zero_ranges_get_what_the_upstream_of_the_rule_gives(pure_xp):
    """All-zero ranges; the zero point of GPTQ's rule is that of the range ±1."""
    choices = {
        "restricted": (1.0, 0),
        "power": (1.0, 0),
        "half_integer": (2.0**-23, 0),
        "half_integer_unsigned": (2 / 15, 8),
        "asymmetric": (2 / 15, 7),  # 1/s is just below 7.5 in float32
        "asymmetric_signed": (2.0**-23, -8),
        "awq": (1e-5 / 15, 0),
    }
    assert set(choices) == set(RULES)
    zeros = pure_xp.zeros((2, 4), dtype=pure_xp.float32)
    for rule, (step, point) in choices.items():
        scale, zero = map(to_host, qparams(zeros, Scheme(4, rule, "channel")))
        np.testing.assert_allclose(scale, np.full((2, 1), step, dtype="float32"), rtol=2**-22)
        assert (zero == point).all(), rule


@pytest.mark.parametrize(
    ("rule", "bits"),
    [(rule, bits) for rule in RULES for bits in (1, 2, 4, 8) if (rule, bits) != ("restricted", 1)],
)
def test_the_widest_and_the_narrowest_ranges_have_scales(pure_xp, rule, bits):
    for dtype in ("float32", "float64"):
        info = np.finfo(dtype)
        scheme = Scheme(bits, rule, "channel")
        wide = np.array(
            [[-info.max, info.max], [info.max, info.max], [-info.max, 0.0]], dtype=dtype
        )
        scale, _ = map(to_host, qparams(pure_xp.asarray(wide), scheme))
        assert (np.isfinite(scale)).all()
        a = float(info.max)
        if bits > 1 and rule in FORCED and rule not in ("asymmetric", "asymmetric_signed"):
            np.testing.assert_allclose(scale, a / scheme.steps, rtol=4 * info.eps)
        elif bits > 1 and rule in FORCED:
            np.testing.assert_allclose(
                scale / a, np.array([[2.0], [1.0], [1.0]]) / scheme.steps, rtol=4 * info.eps
            )
        narrow = np.full((1, 2), info.smallest_subnormal, dtype=dtype)
        scale, _ = map(to_host, qparams(pure_xp.asarray(narrow), scheme))
        assert scale[0, 0] >= info.smallest_normal


@given(arrays(rows, columns), st.floats(-30, 30))
def test_reachable_changes_no_quotient_that_is_a_code(pure_xp, x, exponent):
    scale = np.full((1, 1), 10.0**exponent, dtype="float32")
    held = to_host(reachable(pure_xp.asarray(x), pure_xp.asarray(scale))).astype("float64")
    wide = x.astype("float64")
    step = float(scale[0, 0])
    assert (np.abs(held) <= 1024 * step * (1 + 2**-22)).all()
    inside = np.abs(wide) <= 1023 * step
    np.testing.assert_array_equal(held[inside], wide[inside])
    assert (np.abs(held[~inside]) >= 1022 * step).all()


# --- rejections -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "layout", [("tensor", None), ("channel", None), ("group", 4), ("block", 3)]
)
def test_non_finite_input_is_rejected_by_name_and_place(pure_xp, bad, layout):
    x = np.ones((5, 8), dtype=np.float32)
    x[3, 2] = bad
    x[4, 7] = bad
    with pytest.raises(ValueError, match=r"q_proj: holds NaN or infinity, first at index \(3, 2\)"):
        qparams(pure_xp.asarray(x), Scheme(4, "half_integer", *layout), name="q_proj")


@pytest.mark.parametrize(
    ("shape", "bad", "index"),
    [
        ((2, 3, 4), [(1, 2, 3)], r"\(1, 2, 3\)"),
        ((2, 3, 4), [(1, 0, 1), (0, 2, 0)], r"\(0, 2, 0\)"),
        ((5,), [(4,), (3,)], r"\(3,\)"),
        ((), [()], r"\(\)"),
    ],
)
def test_the_first_index_in_any_number_of_axes(pure_xp, shape, bad, index):
    x = np.zeros(shape, dtype=np.float32)
    require_finite(pure_xp.asarray(x), "w")
    for at, value in zip(bad, (np.nan, np.inf), strict=False):
        x[at] = value
    with pytest.raises(ValueError, match=f"w: holds NaN or infinity, first at index {index}"):
        require_finite(pure_xp.asarray(x), "w")


def test_other_input_is_rejected_by_name(pure_xp):
    channel = Scheme(4, "half_integer", "channel")
    tensor = Scheme(4, "half_integer", "tensor")
    with pytest.raises(ValueError, match=r"k_proj: groups of 3 do not divide a row of 8"):
        qparams(
            pure_xp.ones((2, 8), dtype=pure_xp.float32),
            Scheme(4, "power", "group", 3),
            name="k_proj",
        )
    with pytest.raises(
        TypeError, match=r"k_proj: quantisation computes in float32 or float64, got .*int32"
    ):
        qparams(pure_xp.ones((2, 8), dtype=pure_xp.int32), channel, name="k_proj")
    for shape, scheme in (
        ((3, 0), channel),
        ((0, 3), tensor),
        ((0,), tensor),
        ((0, 3), Scheme(4, "power", "block", 2)),
    ):
        with pytest.raises(ValueError, match=r"k_proj: an array of shape .* has no range"):
            qparams(pure_xp.zeros(shape, dtype=pure_xp.float32), scheme, name="k_proj")


def test_no_tokens_have_no_scales(pure_xp):
    scale, zero = qparams(
        pure_xp.zeros((0, 3), dtype=pure_xp.float32), Scheme(8, "restricted", "token")
    )
    assert scale.shape == zero.shape == (0, 1)
    scale, _ = qparams(
        pure_xp.zeros((0, 4), dtype=pure_xp.float32), Scheme(8, "restricted", "group", 2)
    )
    assert scale.shape == (0, 2)


def test_float16_is_rejected(xp):
    with pytest.raises(TypeError, match="got float16; convert it first"):
        qparams(xp.asarray(np.ones((2, 8), dtype=np.float16)), Scheme(4, "power", "channel"))


@pytest.mark.parametrize(
    ("lo", "hi"), [(1.0, 0.5), (np.nan, 1.0), (0.0, np.nan), (-np.inf, 0.0), (0.0, np.inf)]
)
def test_ranges_that_are_none_are_rejected(pure_xp, lo, hi):
    bounds = (pure_xp.asarray(np.array([-1.0, lo])), pure_xp.asarray(np.array([1.0, hi])))
    with pytest.raises(
        ValueError, match="observer of layer 3: a range needs finite bounds lo ≤ hi"
    ):
        range_to_qparams(*bounds, Scheme(4, "power", "channel"), name="observer of layer 3")


# --- reference implementations ------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.theorem(
    "Scale and zero point of half_integer and asymmetric_signed equal compressed-tensors', "
    "bit for bit",
    source="compressed_tensors.quantization.utils.calculate_qparams",
)
@given(
    st.sampled_from(["half_integer", "asymmetric_signed"]),
    st.integers(2, 8),
    rows,
    st.sampled_from(["normal", "outlier_column", "constant", "one_sided", "zero"]),
    seeds,
)
def test_scales_equal_compressed_tensors(rule, bits, m, kind, seed):
    torch = oracle("torch")
    reference = oracle("compressed_tensors.quantization")
    helpers = oracle("compressed_tensors.quantization.utils.helpers")
    scheme = Scheme(bits, rule, "group", 4)
    lo, hi = ranges(build(kind, (m, 12), seed), scheme)
    args = reference.QuantizationArgs(
        num_bits=bits, symmetric=scheme.symmetric, strategy="group", group_size=4
    )
    theirs = helpers.calculate_qparams(torch.from_numpy(lo), torch.from_numpy(hi), args)
    scale, zero = range_to_qparams(lo, hi, scheme)
    np.testing.assert_array_equal(scale, theirs[0].numpy())
    if kind != "zero":  # there its zero point is 0/0 made an integer
        np.testing.assert_array_equal(zero, theirs[1].numpy())


@pytest.mark.oracle
@given(st.booleans(), st.sampled_from(["normal", "outlier_column", "constant", "one_sided"]), seeds)
def test_scales_equal_the_observers_of_torch(symmetric, kind, seed):
    """Its quint8 range is [0, 255] with zero forced in; its symmetric qint8 has a/127.5,
    our half_integer.
    """
    torch = oracle("torch")
    observer = oracle("torch.ao.quantization.observer")
    x = build(kind, (5, 8), seed)
    if symmetric:
        reference = observer.MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    else:
        reference = observer.MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    reference(torch.from_numpy(x))
    scale, zero = qparams(x, Scheme(8, "half_integer" if symmetric else "asymmetric", "tensor"))
    step, point = reference.calculate_qparams()
    assert float(scale) == float(step)
    assert int(zero) == int(point)
