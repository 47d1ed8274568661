"""A product of two integer sides: exact sums; scales per token, per batch and from calibration;
which tokens depend on which.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.formats.quantized_linear import quantize
from refllm.formats.uniform import Scheme, dequantize_codes
from refllm.formats.w8a8_linear import W8A8Linear
from strategies import build, seeds

ROWWISE = Scheme(8, "restricted", "channel")
WEIGHTS = [
    ROWWISE,
    Scheme(8, "half_integer", "channel"),
    Scheme(8, "asymmetric", "channel"),
    Scheme(4, "half_integer_unsigned", "group", 4),
    Scheme(8, "restricted", "tensor"),
]
ACTIVATIONS = ["token", "tensor", 0.04]
KINDS = ("normal", "outlier_column", "zero", "constant", "denormal", "one_sided")


def linear(
    xp, seed, scheme=ROWWISE, activation="token", rule="restricted", dtype="float32", shape=(5, 8)
):
    w = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return W8A8Linear(quantize(xp.asarray(w), scheme), activation, rule)


@pytest.mark.theorem(
    "Y = s_x s_w Q_x Q_wᵀ is the product of the rounded activations with the dequantised weight",
    source="Xiao et al. 2023, eq. 2",
)
@given(
    seed=seeds,
    kind=st.sampled_from(KINDS),
    scheme=st.sampled_from(WEIGHTS),
    activation=st.sampled_from(ACTIVATIONS),
    rule=st.sampled_from(["restricted", "half_integer"]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_the_product_is_that_of_both_dequantised_sides(
    xp, seed, kind, scheme, activation, rule, dtype
):
    layer = linear(xp, seed, scheme, activation, rule, dtype)
    x = xp.asarray(build(kind, (3, 8), seed, dtype))
    codes, step = layer.quantize_activations(x)
    left = to_host(
        dequantize_codes(codes, step, xp.zeros(step.shape, dtype=xp.int32), layer.scheme)
    ).astype(np.longdouble)
    right = to_host(layer.dequantize()).astype(np.longdouble)
    y = to_host(layer.matmul(x))
    assert y.dtype == dtype
    # the sums are exact; of each group: the integer, two scales and the sum are rounded, in
    # either factor s·(q − z)
    info = np.finfo(dtype)
    bound = 16 * float(info.eps) * (np.abs(left) @ np.abs(right).T) + 16 * float(
        info.smallest_normal
    )
    assert (np.abs(y - left @ right.T) <= bound).all()


@pytest.mark.theorem(
    "With a scale per token, what a token becomes does not depend on the other tokens of the "
    "batch, bit for bit",
    source="integer sums are exact, and everything else is elementwise",
)
@given(
    seed=seeds, kind=st.sampled_from(KINDS), scheme=st.sampled_from(WEIGHTS), static=st.booleans()
)
def test_invariance_tokens_do_not_see_each_other(xp, seed, kind, scheme, static):
    layer = linear(
        xp, seed, scheme, 0.02 if static else "token", shape=(7, 40 if scheme.group_size else 41)
    )
    x = build(kind, (6, layer.shape[1]), seed)
    together = to_host(layer.matmul(xp.asarray(x)))
    alone = np.concatenate([to_host(layer.matmul(xp.asarray(x[t : t + 1]))) for t in range(6)])
    assert np.array_equal(together, alone)


def test_with_one_scale_for_the_batch_they_do(xp):
    layer = linear(xp, 0, activation="tensor")
    x = np.random.default_rng(1).standard_normal((2, 8)).astype("float32")
    x[1] *= 3000  # the other token's scale leaves nothing of the first
    both, alone = (to_host(layer.matmul(xp.asarray(part))) for part in (x, x[:1]))
    assert not both[0].any()
    assert alone[0].all()


@pytest.mark.theorem(
    "|Ŷ − X Wᵀ| ≤ Σ_j |x_j| s_w/2 + |w_j| s_x/2 + s_x s_w/4",
    source="x̂ = x + δ, ŵ = w + ε with |δ| ≤ s_x/2, |ε| ≤ s_w/2",
)
@given(seed=seeds, kind=st.sampled_from(KINDS), activation=st.sampled_from(["token", "tensor"]))
def test_bound_of_the_error(xp, seed, kind, activation):
    w = np.random.default_rng(seed).standard_normal((5, 8))
    layer = W8A8Linear(quantize(xp.asarray(w), ROWWISE), activation, "restricted")
    x = build(kind, (3, 8), seed, "float64")
    s_x = np.broadcast_to(to_host(layer.quantize_activations(xp.asarray(x))[1]), (3, 1))
    s_w = to_host(layer.weight.scale).T
    bound = (
        0.5 * (np.abs(x).sum(axis=1, keepdims=True) * s_w + s_x * np.abs(w).sum(axis=1))
        + 8 * s_x * s_w / 4
    )
    slack = 64 * float(np.finfo("float64").eps) * (np.abs(x) @ np.abs(w).T) + 1e-300
    assert (np.abs(to_host(layer.matmul(xp.asarray(x))) - x @ w.T) <= bound + slack).all()


@pytest.mark.parametrize("activation", ["token", "tensor"])
@pytest.mark.parametrize("rule", ["restricted", "half_integer"])
def test_tiny_inputs_have_a_scale_of_their_own(xp, activation, rule):
    """Inputs of 1e-21: their codes are those of inputs of 1, and the product is as exact."""
    layer = linear(xp, 0, activation=activation, rule=rule)
    x = build("normal", (3, 8), 1)
    small = x * np.float32(2.0**-70)
    assert 1e-22 < np.abs(small).max() < 1e-20
    codes, scale = layer.quantize_activations(xp.asarray(x))
    tiny_codes, tiny_scale = layer.quantize_activations(xp.asarray(small))
    np.testing.assert_array_equal(to_host(tiny_codes), to_host(codes))
    np.testing.assert_array_equal(to_host(tiny_scale), to_host(scale) * np.float32(2.0**-70))
    y = to_host(layer.matmul(xp.asarray(x)))
    np.testing.assert_array_equal(
        to_host(layer.matmul(xp.asarray(small))), y * np.float32(2.0**-70)
    )


def test_a_tiny_token_beside_a_huge_one(xp):
    layer = linear(xp, 0)
    x = build("normal", (2, 8), 1) * np.array([[1e-21], [1e21]], dtype=np.float32)
    both = to_host(layer.matmul(xp.asarray(x)))
    for t in range(2):
        np.testing.assert_array_equal(both[t], to_host(layer.matmul(xp.asarray(x[t : t + 1])))[0])
    wide = x.astype(np.float64) @ to_host(layer.dequantize()).astype(np.float64).T
    assert (np.abs(both - wide) <= 0.05 * np.abs(wide).max(axis=1, keepdims=True)).all()


def test_float16_activations_are_computed_in_float32(xp):
    layer = linear(xp, 0)
    x = build("normal", (3, 8), 1).astype(np.float16)
    y = to_host(layer.matmul(xp.asarray(x)))
    assert y.dtype == np.float16
    wide = to_host(layer.matmul(xp.asarray(x.astype(np.float32))))
    np.testing.assert_array_equal(y, wide.astype(np.float16))
    assert to_host(layer.matmul(xp.asarray(x[:0]))).dtype == np.float16


@pytest.mark.parametrize("rule", ["restricted", "half_integer"])
@pytest.mark.parametrize("weight_rule", ["restricted", "half_integer", "half_integer_unsigned"])
def test_sums_longer_than_float32_adds_exactly(xp, rule, weight_rule):
    """2,101 products of the largest codes: an odd sum beyond 2²⁴, exact in float64."""
    n = 2101
    x = np.ones((1, n))
    x[0, 0] = -1.0
    scheme = Scheme(8, weight_rule, "channel")
    w = np.full((2, n), -1.0)
    w[1, 1:] = 1.0
    layer = W8A8Linear(quantize(xp.asarray(w), scheme), "token", rule)
    codes, scale = layer.quantize_activations(xp.asarray(x))
    centred = to_host(layer.weight.codes).astype(np.int64) - scheme.zero
    total = to_host(codes).astype(np.int64) @ centred.T
    assert (np.abs(total) > 2**24).all()
    expected = total * to_host(layer.weight.scale).T * to_host(scale)
    np.testing.assert_array_equal(to_host(layer.matmul(xp.asarray(x))), expected)


@pytest.mark.parametrize(
    ("rule", "divisor", "lowest"), [("restricted", 127.0, -127), ("half_integer", 127.5, -128)]
)
def test_exact_scales_of_the_two_rules(xp, rule, divisor, lowest):
    x = np.array(
        [[-2.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [4.0, -3.0, 0.1, 1.0]], dtype="float32"
    )
    layer = linear(xp, 0, rule=rule, shape=(5, 4))
    codes, step = layer.quantize_activations(xp.asarray(x))
    assert to_host(step)[[0, 2], 0].tolist() == [
        np.float32(a) / np.float32(divisor) for a in (2.0, 4.0)
    ]
    # a tie at 127.5 times the scale, up to rounding of the scale
    assert to_host(codes)[0, 0] in (lowest, -127)
    assert to_host(codes)[2, 0] == 127
    assert not to_host(codes)[1].any()
    whole = linear(xp, 0, activation="tensor", rule=rule, shape=(5, 4)).quantize_activations(
        xp.asarray(x)
    )[1]
    assert float(to_host(whole)) == np.float32(4.0) / np.float32(divisor)


def test_a_static_scale_clips_what_calibration_has_not_seen(xp):
    layer = linear(xp, 0, activation=1.0 / 127, shape=(5, 2))
    codes, step = layer.quantize_activations(
        xp.asarray(np.array([[0.5, 100.0], [-1.0, -3e38]], dtype="float32"))
    )
    assert to_host(codes).tolist() == [[64, 127], [-127, -127]]
    assert float(to_host(step)) == np.float32(1.0 / 127)
    assert layer.nbytes == layer.weight.nbytes + 4


def test_it_is_a_linear_that_counts_its_bytes(xp):
    layer = linear(xp, 0)
    assert layer.shape == (5, 8)
    assert layer.nbytes == layer.weight.nbytes == 5 * 8 + 5 * 4
    assert layer.bits_per_weight == 8 * 60 / 40
    assert to_host(layer.matmul(xp.zeros((0, 8), dtype=xp.float32))).shape == (0, 5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rejected_activations_that_are_not_finite_by_name(xp, activation, bad):
    layer = linear(xp, 0, activation=activation)
    x = np.ones((2, 8), dtype="float32")
    x[1, 3] = bad
    with pytest.raises(
        ValueError, match=r"activations: holds NaN or infinity, first at index \(1, 3\)"
    ):
        layer.matmul(xp.asarray(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": 0.0}, "a static scale is finite and above 0"),
        ({"activation": float("inf")}, "a static scale is finite and above 0"),
        ({"activation": float("nan")}, "a static scale is finite and above 0"),
        ({"activation": "row"}, "activation is 'token', 'tensor' or a static scale, got 'row'"),
        ({"scheme": Scheme(8, "restricted", "block", 4)}, "scales per block do not factor out"),
        ({"rule": "asymmetric"}, "a signed rule without zero point, not 'asymmetric'"),
        ({"rule": "half_integer_unsigned"}, "a signed rule without zero point"),
    ],
)
def test_weights_and_activations_without_such_a_product_are_rejected(xp, options, message):
    with pytest.raises(ValueError, match=message):
        linear(xp, 0, **options)
