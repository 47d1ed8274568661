"""The layers: what each is invariant to, where it must not overflow, and Llama 3's
frequencies against transformers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.model.layers import apply_rope, rms_norm, rope_table, sigmoid, swiglu
from refllm.model.rope import Llama3Scaling, rope_frequencies
from strategies import KINDS, arrays, seeds

EPS32 = float(np.finfo("float32").eps)
EPS64 = float(np.finfo("float64").eps)


def rotated(xp, x, positions, theta=10_000.0):
    """x[T, H, D] at positions[T], in float64, back on the host."""
    frequencies = xp.asarray(np.array(rope_frequencies(x.shape[-1], theta)))
    cos, sin = rope_table(frequencies, xp.asarray(np.asarray(positions)), xp.float64)
    return to_host(apply_rope(xp.asarray(x), cos, sin))


# --- RMSNorm ------------------------------------------------------------------------------


@pytest.mark.theorem(
    "rms_norm(c·x) = rms_norm(x) for c > 0, up to ε", source="Zhang & Sennrich 2019, section 3"
)
@given(
    x=arrays(
        st.integers(1, 5),
        st.integers(1, 33),
        dtype="float64",
        kinds=["normal", "outlier_column", "one_sided"],
    ),
    exponent=st.integers(-20, 20),
)
def test_invariance_rms_norm_ignores_the_scale_of_its_input(xp, x, exponent):
    gain = np.linspace(0.5, 2.0, x.shape[-1])
    assume(np.min(np.mean(x * x, axis=-1)) > 1e-6)
    c = 2.0**exponent  # a power of two: scaling itself rounds nothing
    plain = to_host(rms_norm(xp.asarray(x), xp.asarray(gain), 1e-30))
    scaled = to_host(rms_norm(xp.asarray(c * x), xp.asarray(gain), 1e-30 * c * c))
    # With ε scaled along, every intermediate differs by a power of two: only the order of a
    # sum could differ.
    np.testing.assert_allclose(scaled, plain, rtol=8 * EPS64 * x.shape[-1], atol=0)


@given(
    x=arrays(
        st.integers(1, 4),
        st.integers(1, 33),
        dtype="float64",
        kinds=["normal", "outlier_column", "constant"],
    )
)
def test_exact_value_rms_norm_is_the_formula(xp, x):
    gain = np.linspace(-1.0, 2.0, x.shape[-1])
    expected = np.array(
        [
            [
                g * v / math.sqrt(math.fsum(u * u for u in row) / len(row) + 1e-5)
                for v, g in zip(row, gain, strict=True)
            ]
            for row in x.tolist()
        ]
    )
    got = to_host(rms_norm(xp.asarray(x), xp.asarray(gain), 1e-5))
    np.testing.assert_allclose(
        got, expected, rtol=EPS64 * (x.shape[-1] + 8), atol=0
    )  # a sum of N terms, and 8 more roundings


def test_degenerate_a_row_of_zeros_stays_zero(xp):
    out = to_host(rms_norm(xp.zeros((2, 8), dtype=xp.float32), xp.ones(8, dtype=xp.float32), 1e-6))
    assert np.array_equal(out, np.zeros((2, 8), dtype="float32"))


# --- RoPE ---------------------------------------------------------------------------------


@pytest.mark.theorem("⟨R_m q, R_n k⟩ depends on m − n only", source="Su et al. 2021, eq. 16")
@given(
    seed=seeds,
    half=st.integers(1, 8),
    m=st.integers(0, 4000),
    n=st.integers(0, 4000),
    shift=st.integers(0, 4000),
)
def test_invariance_a_rope_score_depends_on_the_distance_only(xp, seed, half, m, n, shift):
    q, k = np.random.default_rng(seed).standard_normal((2, 1, 1, 2 * half))
    scores = [float(np.sum(rotated(xp, q, [m + s]) * rotated(xp, k, [n + s]))) for s in (0, shift)]
    # An angle up to 8000 is off by 8000·ε/2; both vectors carry two such angles, and D
    # products are summed.
    bound = (4 * 8000 + 4 * half) * EPS64 * float(np.linalg.norm(q) * np.linalg.norm(k))
    assert abs(scores[0] - scores[1]) <= bound


@given(seed=seeds, half=st.integers(1, 8), m=st.integers(0, 10**6))
def test_round_trip_the_inverse_rotation_undoes_rope_and_lengths_stay(xp, seed, half, m):
    x = np.random.default_rng(seed).standard_normal((1, 2, 2 * half))
    frequencies = xp.asarray(np.array(rope_frequencies(2 * half, 10_000.0)))
    cos, sin = rope_table(frequencies, xp.asarray(np.array([m])), xp.float64)
    there = apply_rope(xp.asarray(x), cos, sin)
    back = to_host(apply_rope(there, cos, -sin))
    # cos² + sin² is off by 2ε at most and four products are rounded: no angle error, both
    # use the same table
    scale = np.linalg.norm(x, axis=-1, keepdims=True)
    assert np.all(np.abs(back - x) <= 8 * EPS64 * scale)
    np.testing.assert_allclose(
        np.linalg.norm(to_host(there), axis=-1), scale[..., 0], rtol=EPS64 * (8 + 2 * half)
    )


def test_position_zero_is_not_rotated(xp):
    x = np.random.default_rng(0).standard_normal((3, 2, 8))
    assert np.array_equal(rotated(xp, x, [0, 0, 0]), x)


@given(seed=seeds, half=st.integers(1, 4), m=st.integers(0, 500))
def test_exact_value_rope_is_multiplication_by_a_complex_number(xp, seed, half, m):
    """The pair (x_i, x_{i+D/2}) as x_i + j·x_{i+D/2}, times e^{jmθ_i}: the half-split
    pairing of the checkpoints.
    """
    x = np.random.default_rng(seed).standard_normal((1, 1, 2 * half))
    theta = np.array([100.0 ** (-2.0 * i / (2 * half)) for i in range(half)])
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * m * theta)
    expected = np.concatenate([z.real, z.imag], axis=-1)
    tolerance = (m + 8) * EPS64 * np.abs(x).max() * 2
    np.testing.assert_allclose(rotated(xp, x, [m], theta=100.0), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_table_has_the_dtype_that_is_asked_for(xp, dtype):
    frequencies = xp.asarray(np.array(rope_frequencies(6, 100.0)))
    cos, sin = rope_table(frequencies, xp.asarray(np.arange(4)), dtype)
    assert cos.dtype == sin.dtype == np.dtype(dtype)
    assert (cos.shape, sin.shape) == ((4, 1, 1, 3), (4, 1, 2, 3))


def test_angles_are_computed_in_float64_also_for_a_float32_table(xp):
    """At position 131,071 an angle in float32 is off by up to 0.004 radians; the table must
    not be.
    """
    position = 131_071
    frequencies = rope_frequencies(64, 10_000.0)
    cos, sin = rope_table(
        xp.asarray(np.array(frequencies)), xp.asarray(np.array([position])), xp.float32
    )
    assert to_host(cos).dtype == np.float32
    # the last of sin's two halves is the positive one
    for table, exact in ((cos, math.cos), (sin, math.sin)):
        expected = np.array([exact(position * f) for f in frequencies])
        # the one rounding to float32
        assert np.abs(to_host(table)[0, 0, -1] - expected).max() <= EPS32


SCALINGS = [
    (8.0, 1.0, 4.0, 8192),
    (32.0, 1.0, 4.0, 8192),
    (2.0, 0.5, 16.0, 128),
    (4.0, 1.0, 1.5, 4096),
]


@pytest.mark.oracle
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_oracle_llama3_frequencies_are_those_of_transformers(scaling, head_dim, theta):
    oracle("torch")
    functions = oracle("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    factor, low, high, original = scaling
    config = oracle("transformers").LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        },
    )
    theirs, attention_factor = functions["llama3"](config, "cpu")
    ours = np.array(rope_frequencies(head_dim, theta, Llama3Scaling(*scaling)))
    assert attention_factor == 1.0
    # transformers computes in float32: θ^x costs a few ulp, and the smooth band divides by
    # (high − low).
    np.testing.assert_allclose(
        ours, theirs.double().numpy(), rtol=16 * EPS32 * (1 + high / (high - low)), atol=0
    )


@given(st.sampled_from(SCALINGS), st.sampled_from([8, 64, 128]))
def test_bound_llama3_slows_each_frequency_by_at_most_the_factor_and_keeps_the_order(
    scaling, head_dim
):
    factor, low, high, original = scaling
    plain = np.array(rope_frequencies(head_dim, 500_000.0))
    scaled = np.array(rope_frequencies(head_dim, 500_000.0, Llama3Scaling(*scaling)))
    assert np.all(scaled <= plain)
    assert np.all(scaled >= plain / factor)
    assert np.all(np.diff(scaled) < 0)
    turns = original * plain / (2 * math.pi)
    assert np.array_equal(scaled[turns > high], plain[turns > high])
    assert np.array_equal(scaled[turns < low], plain[turns < low] / factor)
    between = (turns > low) & (turns < high)
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / factor))


# --- sigmoid, SwiGLU ----------------------------------------------------------------------


@pytest.mark.theorem(
    "σ(−x) = 1 − σ(x), without overflow for any finite x", source="σ(x) = ½(1 + tanh(x/2))"
)
@given(x=arrays(st.integers(1, 40), kinds=KINDS))
def test_bound_sigmoid_never_overflows_and_is_symmetric(xp, x):
    with np.errstate(over="raise", invalid="raise"):
        y = to_host(sigmoid(xp.asarray(x)))
        mirrored = to_host(sigmoid(xp.asarray(-x)))
    assert np.all((y >= 0) & (y <= 1))
    assert np.all(np.abs(y + mirrored - 1) <= EPS32)
    exact = 0.5 * (1 + np.tanh(0.5 * x.astype("float64")))
    # absolute: below σ = ε the form ½(1 + tanh) gives 0
    assert np.all(np.abs(y - exact) <= 4 * EPS32)


@given(
    x=arrays(
        st.integers(1, 40), kinds=["normal", "outlier_column", "zero", "constant", "denormal"]
    ),
    seed=seeds,
)
def test_exact_value_swiglu_is_silu_of_the_gate_times_up(xp, x, seed):
    up = np.random.default_rng(seed).standard_normal(x.shape).astype("float32")
    kept = x.copy()
    got = to_host(swiglu(xp.asarray(x), xp.asarray(up)))
    x64 = x.astype("float64")
    up64 = up.astype("float64")
    expected = x64 / (1 + np.exp(-x64)) * up64
    # σ is right to 4ε absolutely, two products follow; each product of denormals is off by
    # half a step of its own.
    steps = float(np.finfo("float32").smallest_subnormal) * (1 + np.abs(up64))
    assert np.all(np.abs(got - expected) <= 6 * EPS32 * np.abs(x64 * up64) + steps)
    assert np.array_equal(x, kept)  # the gate is not scratch space


def test_bound_swiglu_of_the_largest_gates_is_finite(xp):
    """silu(−max) is 0 and silu(max) is max: no inf − inf, no 0 · inf on the way."""
    top = float(np.finfo("float32").max)
    gate = np.array([-top, -1e30, -1e4, -104.0, -90.0, 0.0, 90.0, 1e4, top], dtype="float32")
    with np.errstate(over="raise", invalid="raise"):
        got = to_host(swiglu(xp.asarray(gate), xp.ones(9, dtype=xp.float32)))
    assert np.array_equal(got[:5], np.zeros(5, dtype="float32"))
    assert np.array_equal(got[5:], gate[5:])
