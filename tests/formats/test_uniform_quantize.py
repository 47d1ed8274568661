"""Uniform affine quantisation: error bounds of every rule, zero, idempotence, order,
symmetry, granularities, reference implementations.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.formats import quantized_linear
from refllm.formats.quantized_linear import effective_bits, fake_quantize, quantize
from refllm.formats.uniform import (
    RULES,
    Scheme,
    dequantize_codes,
    qparams,
    quantize_codes,
    ranges,
)
from schemes import FORCED, columns, rows, schemes, slack, spread
from strategies import arrays, build, seeds

# all kinds but ± the largest value: its image under a rule with −2^(b−1) may be one scale
# larger, which is infinite
FINITE = ("normal", "outlier_column", "zero", "constant", "denormal", "one_sided")
dtypes = st.sampled_from(["float32", "float64"])


def coded(x, scheme, xp):
    """(codes, scale, zero point) on the host."""
    x = xp.asarray(x)
    scale, zero = qparams(x, scheme)
    return to_host(quantize_codes(x, scale, zero, scheme)), to_host(scale), to_host(zero)


# --- the error ----------------------------------------------------------------------------


@pytest.mark.theorem(
    "|x̂ − x| ≤ s/2 for every rule that forces zero into the range, ≤ s for the power form, "
    "at every granularity",
    source="formats/uniform.py, table of rules",
)
@given(schemes(rules=FORCED), rows, columns, st.sampled_from(FINITE), dtypes, seeds)
def test_error_bound(pure_xp, scheme, m, n, kind, dtype, seed):
    x = build(kind, (m, n), seed, dtype)
    back = to_host(fake_quantize(pure_xp.asarray(x), scheme))
    assert back.dtype == dtype
    step = spread(to_host(qparams(pure_xp.asarray(x), scheme)[0]), scheme, (m, n)).astype(
        np.longdouble
    )
    error = np.abs(back.astype(np.longdouble) - x)
    assert (error <= (1.0 if scheme.rule == "power" else 0.5) * step + slack(x, step, scheme)).all()


@pytest.mark.theorem(
    "The bounds are attained: half a scale at +a by half_integer, a whole one at +a by the "
    "power form",
    source="formats/uniform.py, table of rules",
)
@pytest.mark.parametrize("bits", range(1, 9))
def test_error_bound_is_attained(pure_xp, bits):
    for rule, whole in (("half_integer", 0.5), ("half_integer_unsigned", 0.5), ("power", 1.0)):
        scheme = Scheme(bits, rule, "tensor")
        x = pure_xp.asarray(np.array([-1.0, 0.25, 1.0]) * scheme.steps)  # a scale of 1
        back = to_host(fake_quantize(x, scheme))
        assert to_host(x)[2] - back[2] == whole, rule


@pytest.mark.theorem(
    "AWQ's asymmetric rule errs by s/2 if min ≤ 0 ≤ max, and by more than any multiple of "
    "the range if not",
    source="AWQ 2023, published code: one-sided groups",
)
@given(schemes(rules=["awq"]), rows, columns, seeds)
def test_error_of_awq(pure_xp, scheme, m, n, seed):
    x = build("normal", (m, n), seed, "float64")
    scale, _ = qparams(pure_xp.asarray(x), scheme)
    step = spread(to_host(scale), scheme, (m, n))
    error = np.abs(to_host(fake_quantize(pure_xp.asarray(x), scheme)) - x)
    lo, hi = (
        spread(to_host(bound), scheme, (m, n)) for bound in ranges(pure_xp.asarray(x), scheme)
    )
    around_zero = (lo <= 0) & (hi >= 0)
    assert (error <= 0.5 * step + slack(x, step, scheme))[around_zero].all()
    tensor = Scheme(scheme.bits, "awq", "tensor")
    for distance in (10.0, 1e3, 1e6):  # the range is 1, and no code stands for more than 1
        far = distance + np.linspace(0, 1, 16)
        assert (
            np.abs(to_host(fake_quantize(pure_xp.asarray(far), tensor)) - far) >= distance - 1.001
        ).all()


@given(schemes(), rows, columns, seeds)
def test_the_widest_values_have_codes_and_half_of_them_come_back(pure_xp, scheme, m, n, seed):
    for dtype in ("float32", "float64"):
        x = build("extreme", (m, n), seed, dtype)
        codes, _, _ = coded(x, scheme, pure_xp)
        assert codes.min() >= scheme.qmin
        assert codes.max() <= scheme.qmax
        assert np.isfinite(to_host(fake_quantize(pure_xp.asarray(x * 0.4), scheme))).all()


@pytest.mark.theorem(
    "A constant group comes back as it was, to rounding, under both asymmetric rules",
    source="formats/uniform.py, definition of the rules",
)
@given(schemes(rules=["asymmetric", "asymmetric_signed"]), rows, columns, dtypes, seeds)
def test_constant_groups_are_exact(pure_xp, scheme, m, n, dtype, seed):
    x = build("constant", (m, n), seed, dtype)
    back = to_host(fake_quantize(pure_xp.asarray(x), scheme))
    np.testing.assert_allclose(back, x, rtol=3 * np.finfo(dtype).eps, atol=0)


# --- codes --------------------------------------------------------------------------------


@pytest.mark.theorem(
    "Zero comes back as exactly zero, under every rule",
    source="formats/uniform.py, definition of the rules",
)
@given(schemes(), rows, columns, st.sampled_from(FINITE), dtypes, seeds)
def test_zero_is_exact(pure_xp, scheme, m, n, kind, dtype, seed):
    x = build(kind, (m, n), seed, dtype)
    scale, zero = qparams(pure_xp.asarray(x), scheme)
    nothing = pure_xp.asarray(np.zeros((m, n), dtype=dtype))
    codes = quantize_codes(nothing, scale, zero, scheme)
    np.testing.assert_array_equal(to_host(codes), spread(to_host(zero), scheme, (m, n)))
    assert not to_host(dequantize_codes(codes, scale, zero, scheme)).any()


@given(schemes(), rows, columns, st.sampled_from(FINITE), dtypes, seeds)
def test_codes_are_small_integers_within_the_scheme(xp, scheme, m, n, kind, dtype, seed):
    codes, _, _ = coded(build(kind, (m, n), seed, dtype), scheme, xp)
    assert codes.dtype == (np.int8 if scheme.signed else np.uint8)
    assert scheme.qmin <= codes.min() <= codes.max() <= scheme.qmax


@pytest.mark.theorem(
    "quantize(dequantize(q)) = q for every code q, zero point z and scale s (all q and z up "
    "to 4 bits enumerated)",
    source="formats/uniform.py, definition of the rules",
)
@given(schemes(layouts=[("channel", None)]), st.floats(-30, 30), dtypes, seeds)
def test_idempotence(pure_xp, scheme, exponent, dtype, seed):
    every = np.arange(scheme.qmin, scheme.qmax + 1)
    zeros = np.array([scheme.zero]) if scheme.symmetric else every
    rng = np.random.default_rng(seed)
    if zeros.size > 16:
        zeros = rng.choice(zeros, 16, replace=False)
    codes = np.broadcast_to(every, (zeros.size, every.size)).astype(
        np.int8 if scheme.signed else np.uint8
    )
    scale = pure_xp.asarray((10.0**exponent * rng.uniform(0.5, 2.0, (zeros.size, 1))).astype(dtype))
    zero = pure_xp.asarray(zeros[:, None].astype(np.int32))
    x = dequantize_codes(pure_xp.asarray(codes), scale, zero, scheme)
    np.testing.assert_array_equal(to_host(quantize_codes(x, scale, zero, scheme)), codes)


@pytest.mark.theorem(
    "x₁ ≤ x₂ implies q₁ ≤ q₂, inside the range and outside",
    source="formats/uniform.py, definition of the rules",
)
@given(
    schemes(layouts=[("tensor", None)]), st.sampled_from(FINITE), dtypes, st.floats(0.1, 10), seeds
)
def test_monotone(pure_xp, scheme, kind, dtype, wider, seed):
    scale, zero = qparams(pure_xp.asarray(build(kind, (3, 20), seed, dtype)), scheme)
    rng = np.random.default_rng(seed)
    x = np.sort(
        (wider * build(kind, (200,), seed + 1 if seed < 2**32 - 1 else 0, dtype)).astype(dtype)
    )
    # halves of scales, where rounding decides
    ties = (rng.integers(-40, 40, 50) + 0.5) * float(scale)
    x = np.sort(np.concatenate([x, ties.astype(dtype)]))
    codes = to_host(quantize_codes(pure_xp.asarray(x), scale, zero, scheme)).astype(int)
    assert (np.diff(codes) >= 0).all()


@pytest.mark.theorem(
    "q(2^k x) = q(x) for every whole k", source="formats/uniform.py, definition of the rules"
)
@given(
    schemes(rules=FORCED),
    rows,
    columns,
    st.sampled_from(["normal", "outlier_column", "constant", "one_sided"]),
    dtypes,
    st.integers(-12, 12),
    seeds,
)
def test_power_of_two_equivariance(pure_xp, scheme, m, n, kind, dtype, k, seed):
    x = build(kind, (m, n), seed, dtype)
    np.testing.assert_array_equal(
        coded(x * 2.0**k, scheme, pure_xp)[0], coded(x, scheme, pure_xp)[0]
    )


@pytest.mark.theorem(
    "q(−x) − z = −(q(x) − z) for symmetric rules, except where one of the two is clipped at "
    "the one code without an "
    "opposite; for the restricted rule without exception",
    source="formats/uniform.py, definition of the rules",
)
@given(
    schemes(rules=["restricted", "half_integer", "half_integer_unsigned", "power"]),
    rows,
    columns,
    st.sampled_from(FINITE),
    dtypes,
    seeds,
)
def test_antisymmetry(pure_xp, scheme, m, n, kind, dtype, seed):
    x = build(kind, (m, n), seed, dtype)
    there, back = (coded(v, scheme, pure_xp)[0].astype(int) - scheme.zero for v in (x, -x))
    lowest = scheme.qmin - scheme.zero
    lonely = (there == lowest) | (back == lowest)
    if scheme.rule == "restricted":
        lonely[...] = False
    np.testing.assert_array_equal(there[~lonely], -back[~lonely])


def test_the_two_orders_of_rounding_differ_on_ties(pure_xp):
    """Half a scale with z = 1: round, then add gives 0 + 1; add, then round gives rint(1.5)."""
    x = pure_xp.asarray(np.array([0.5, 1.5, -0.5]))
    one = pure_xp.asarray(np.array(1.0))
    zero = pure_xp.asarray(np.array(1, dtype=np.int32))
    assert to_host(quantize_codes(x, one, zero, Scheme(4, "asymmetric", "tensor"))).tolist() == [
        1,
        3,
        1,
    ]
    assert to_host(
        quantize_codes(x, one, zero, Scheme(4, "asymmetric_signed", "tensor"))
    ).tolist() == [
        2,
        2,
        0,
    ]


def test_values_far_outside_are_clipped_before_they_become_integers(xp):
    """x/s overflows, and a cast of infinity differs between NumPy and CuPy: the codes are
    the outermost ones.
    """
    x = np.array([[3e38, -3e38, 1.0, 0.0], [3e38, -3e38, 2e38, 0.0]], dtype=np.float32)
    scale = np.array([[1e-38], [1e38]], dtype=np.float32)
    for rule in RULES:
        scheme = Scheme(4, rule, "channel")
        zero = np.full((2, 1), scheme.zero, dtype=np.int32)
        codes = (
            to_host(
                quantize_codes(xp.asarray(x), xp.asarray(scale), xp.asarray(zero), scheme)
            ).astype(int)
            - zero
        )
        low = scheme.qmin - scheme.zero
        high = scheme.qmax - scheme.zero
        assert codes.tolist() == [[high, low, high, 0], [3, max(low, -3), 2, 0]], rule


# --- granularities ------------------------------------------------------------------------


@pytest.mark.theorem(
    "Groups as long as a row are channels; the channel of a single row is the tensor; "
    "channels are tokens; blocks of "
    "1×g are groups and one block of all is the tensor: bit for bit",
    source="formats/uniform.py, definition of the rules",
)
@given(
    st.sampled_from(RULES), st.integers(2, 8), rows, columns, st.sampled_from(FINITE), dtypes, seeds
)
def test_granularities_agree_where_they_are_the_same(pure_xp, rule, bits, m, n, kind, dtype, seed):
    x = build(kind, (m, n), seed, dtype)

    def equal(v, first, second):
        for a, b in zip(
            coded(v, Scheme(bits, rule, *first), pure_xp),
            coded(v, Scheme(bits, rule, *second), pure_xp),
            strict=True,
        ):
            np.testing.assert_array_equal(a.reshape(-1), b.reshape(-1))

    equal(x, ("group", n), ("channel", None))
    equal(x, ("token", None), ("channel", None))
    equal(x, ("block", (1, 4)), ("group", 4))
    equal(x, ("block", (m, n)), ("tensor", None))
    equal(x, ("block", 64), ("tensor", None))
    equal(x[:1], ("channel", None), ("tensor", None))


@given(schemes(), st.integers(1, 9), columns, st.integers(1, 40), seeds)
def test_pieces_join(xp, scheme, m, n, piece, seed):
    """Quantised in pieces of any size, a matrix has the same codes, and the same values
    come back.
    """
    x = xp.asarray(build("normal", (m, n), seed))
    whole = quantize(x, scheme)
    floats = to_host(fake_quantize(x, scheme))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_linear, "TILE", (piece, piece))
        pieces = quantize(x, scheme)
        np.testing.assert_array_equal(to_host(fake_quantize(x, scheme)), floats)
    np.testing.assert_array_equal(to_host(pieces.packed()), to_host(whole.packed()))
    np.testing.assert_array_equal(to_host(whole.codes), coded(to_host(x), scheme, xp)[0])
    np.testing.assert_array_equal(to_host(whole.dequantize()), floats)


def test_fake_quantize_takes_any_number_of_axes(pure_xp):
    x = build("normal", (2, 3, 8), 0)
    for layout in (("token", None), ("group", 4)):
        scheme = Scheme(4, "asymmetric", *layout)
        flat = to_host(fake_quantize(pure_xp.asarray(x.reshape(6, 8)), scheme))
        np.testing.assert_array_equal(
            to_host(fake_quantize(pure_xp.asarray(x), scheme)), flat.reshape(2, 3, 8)
        )
    scheme = Scheme(4, "asymmetric", "tensor")
    one = to_host(fake_quantize(pure_xp.asarray(x.reshape(1, 48)), scheme)).reshape(-1)
    for shape in ((2, 3, 8), (48,)):
        np.testing.assert_array_equal(
            to_host(fake_quantize(pure_xp.asarray(x.reshape(shape)), scheme)).reshape(-1), one
        )
    assert float(fake_quantize(pure_xp.asarray(np.array(2.0)), scheme)) == 2.0
    none = fake_quantize(pure_xp.asarray(np.zeros((0, 8))), Scheme(8, "restricted", "token"))
    assert none.shape == (0, 8)


# --- rejections -----------------------------------------------------------------------------


def test_what_cannot_be_quantised_is_rejected_by_name(xp):
    scheme = Scheme(4, "half_integer", "channel")
    bad = np.ones((2, 8), dtype=np.float32)
    bad[1, 3] = np.nan
    fine = xp.asarray(np.ones((2, 8), dtype=np.float32))
    one = xp.asarray(np.ones((2, 1), dtype=np.float32))
    zero = xp.asarray(np.zeros((2, 1), dtype=np.int32))
    calls = [
        lambda: quantize(xp.asarray(bad), scheme, name="up_proj"),
        lambda: fake_quantize(xp.asarray(bad), scheme, name="up_proj"),
        lambda: quantize_codes(xp.asarray(bad), one, zero, scheme, name="up_proj"),
        lambda: quantize(xp.asarray(bad), scheme, scale=one, name="up_proj"),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"up_proj: holds NaN or infinity, first at index \(1, 3\)"
        ):
            call()
    with pytest.raises(
        ValueError, match=r"up_proj: what is packed is a matrix \[M, N\], got shape \(8,\)"
    ):
        quantize(fine[0, :], scheme, name="up_proj")
    for step in (0.0, -1.0, np.nan, np.inf):
        scale = xp.asarray(np.array([[1.0], [step]], dtype=np.float32))
        with pytest.raises(ValueError, match="up_proj: a scale is a finite number above 0"):
            quantize_codes(fine, scale, zero, scheme, name="up_proj")
    with pytest.raises(ValueError, match=r"takes \(2, 1\) at granularity 'channel'"):
        quantize_codes(fine, xp.asarray(np.ones(2, dtype=np.float32)), zero, scheme)
    with pytest.raises(ValueError, match=r"takes \(2, 1\) at granularity 'channel'"):
        dequantize_codes(fine, one, xp.asarray(np.zeros((1, 2), dtype=np.int32)), scheme)


@pytest.mark.parametrize("size", [3, 7, (1, 100), 10**12, (10**12, 2)])
def test_a_block_may_be_larger_than_what_it_holds(pure_xp, size):
    x = build("normal", (3, 5), 0)
    bounds = (size, size) if isinstance(size, int) else size
    fits = Scheme(4, "asymmetric", "block", (min(bounds[0], 3), min(bounds[1], 5)))
    big = to_host(fake_quantize(pure_xp.asarray(x), Scheme(4, "asymmetric", "block", size)))
    np.testing.assert_array_equal(big, to_host(fake_quantize(pure_xp.asarray(x), fits)))


@pytest.mark.parametrize("odd", [True, 4.0, "4", None])
def test_sizes_of_a_scheme_are_integers(odd):
    with pytest.raises(ValueError, match="bits is an integer in 1..8, got"):
        Scheme(odd, "asymmetric", "channel")
    for granularity in ("group", "block"):
        with pytest.raises(ValueError, match=f"'{granularity}' takes a positive integer"):
            Scheme(4, "asymmetric", granularity, odd)


# --- accounting ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "bits"),
    [
        ((4, 128, 16, 16), 4.25),
        ((4, 128, 16, 4), 4.15625),
        ((4, 128, 16, 0), 4.125),
        ((4, 32, 16, 0), 4.5),
        ((4, 32, 16, 16), 5.0),
        ((8, 4096, 16, 0), 8 + 16 / 4096),
    ],
)
def test_accountings_of_the_specs(arguments, bits):
    """Bits per weight with scale and zero point; 4.25 is the usual figure."""
    width, group, scale, zero = arguments
    assert effective_bits(width, group, scale_bits=scale, zero_bits=zero) == bits


# --- reference implementations ------------------------------------------------------------


@pytest.mark.oracle
@given(
    st.sampled_from([r for r in FORCED if r not in ("half_integer", "asymmetric_signed")]),
    st.integers(2, 8),
    st.booleans(),
    arrays(4, 12, kinds=FINITE[:-2] + FINITE[-1:]),
)
def test_round_trip_equals_fake_quantize_of_torch(rule, bits, channels, x):
    """torch multiplies by 1/s in float32; with scales that are powers of two that is the
    same division.
    """
    torch = oracle("torch")
    scheme = Scheme(bits, rule, "channel" if channels else "tensor")
    scale, zero = qparams(x, scheme)
    scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
    ours = dequantize_codes(quantize_codes(x, scale, zero, scheme), scale, zero, scheme)
    limits = scheme.qmin, scheme.qmax
    tensor = torch.from_numpy(x)
    z = torch.from_numpy(zero.reshape(-1))
    if channels:
        theirs = torch.fake_quantize_per_channel_affine(
            tensor, torch.from_numpy(scale.reshape(-1)), z, 0, *limits
        )
    else:
        theirs = torch.fake_quantize_per_tensor_affine(tensor, float(scale), int(zero), *limits)
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.oracle
def test_multiplying_by_the_reciprocal_differs_only_next_to_ties():
    """A million values, any scale: torch's codes differ from ours by one, and only where
    x/s is a tie to rounding.
    """
    torch = oracle("torch")
    x = build("normal", (1_000_000,), 0)
    scheme = Scheme(8, "asymmetric", "tensor")
    scale, zero = qparams(x, scheme)
    ours = dequantize_codes(quantize_codes(x, scale, zero, scheme), scale, zero, scheme)
    theirs = torch.fake_quantize_per_tensor_affine(
        torch.from_numpy(x), float(scale), int(zero), 0, 255
    ).numpy()
    differs = np.abs(ours - theirs) > 0.5 * float(scale)
    quotient = x.astype(np.float64) / float(scale)
    from_tie = np.abs(quotient - np.floor(quotient) - 0.5)
    assert (from_tie[differs] <= 2**-22 * np.abs(quotient[differs])).all()
    assert differs.sum() < 100


STRATEGIES = {
    "tensor": ("tensor", {}),
    "channel": ("channel", {}),
    "token": ("token", {"dynamic": True}),
    "group": ("group", {"group_size": 4}),
    "block": ("block", {"block_structure": [2, 4]}),
}


@pytest.mark.oracle
@pytest.mark.theorem(
    "Codes and dequantised values of half_integer and asymmetric_signed equal "
    "compressed-tensors', at all "
    "granularities, bit for bit",
    source="compressed_tensors.quantization.lifecycle.forward",
)
@given(
    st.sampled_from(["half_integer", "asymmetric_signed"]),
    st.integers(2, 8),
    st.sampled_from(sorted(STRATEGIES)),
    st.sampled_from(["normal", "outlier_column", "constant", "one_sided"]),
    seeds,
)
def test_codes_equal_compressed_tensors(rule, bits, granularity, kind, seed):
    torch = oracle("torch")
    reference = oracle("compressed_tensors.quantization")
    forward = oracle("compressed_tensors.quantization.lifecycle.forward")
    size = {"group": 4, "block": (2, 4)}.get(granularity)
    scheme = Scheme(bits, rule, granularity, size)
    x = build(kind, (6, 12), seed)
    x.flat[::7] = 0.0  # ties of the zero point
    scale, zero = qparams(x, scheme)
    strategy, more = STRATEGIES[granularity]
    args = reference.QuantizationArgs(
        num_bits=bits, symmetric=scheme.symmetric, strategy=strategy, **more
    )
    s = torch.from_numpy(scale.copy())
    z = torch.from_numpy(zero.astype(np.int8))
    theirs = forward.quantize(torch.from_numpy(x), s, z, args, dtype=torch.int8)
    codes = quantize_codes(x, scale, zero, scheme)
    np.testing.assert_array_equal(codes, theirs.numpy())
    floats = forward.fake_quantize(torch.from_numpy(x), s, z, args)
    np.testing.assert_array_equal(dequantize_codes(codes, scale, zero, scheme), floats.numpy())
