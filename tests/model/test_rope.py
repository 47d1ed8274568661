"""RoPE's scalings: against their naive twins and transformers, what each is bounded by, what
is rejected.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.model import naive
from refllm.model.config import ModelConfig
from refllm.model.layers import apply_rope, rope_table
from refllm.model.rope import (
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    rope_frequencies,
    yarn_attention_factor,
    yarn_range,
)
from refllm.model.rope_config import write_scaling

EPS32 = float(np.finfo("float32").eps)
HEADS = st.sampled_from([4, 16, 64, 96, 128])
THETAS = st.sampled_from([500.0, 10_000.0, 1e6])


@st.composite
def yarns(draw: st.DrawFn) -> YarnScaling:
    """YaRN with every option, over contexts of a checkpoint's size."""
    factor = draw(st.floats(1.0, 64.0))
    slow = draw(st.floats(0.25, 4.0))
    return YarnScaling(
        factor,
        draw(st.integers(64, 131_072)),
        draw(st.floats(0.25, 2.0)),
        slow * draw(st.floats(1.5, 40.0)),
        slow,
        draw(st.booleans()),
    )


def ramp_exists(head_dim: int, theta: float, scaling: YarnScaling) -> bool:
    """Whether the ramp is not empty, and its ends, where they are rounded, are no integers:
    there the two ways to count turns may round to different pairs.
    """
    exact = replace(scaling, truncate=False)
    try:
        low, high = yarn_range(head_dim, theta, scaling)
        ends = yarn_range(head_dim, theta, exact)
    except ValueError:
        return False
    near = any(abs(end - round(end)) < 1e-9 and end > 0 for end in ends)
    return high - low > 1e-3 and not near


@pytest.mark.theorem(
    "YaRN's frequencies are those of the naive twin, which counts turns",
    source="Peng et al. 2023, §3.2",
)
@given(HEADS, THETAS, yarns())
def test_oracle_yarn_equals_its_naive_twin(head_dim, theta, scaling):
    assume(ramp_exists(head_dim, theta, scaling))
    config = ModelConfig("llama", 9, 8, 8, 1, 1, 1, head_dim, 1e-5, theta, scaling)
    ours = rope_frequencies(head_dim, theta, scaling)
    theirs = [naive.frequency(config, i) for i in range(head_dim // 2)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=0)


@given(HEADS, THETAS, st.floats(0.5, 64.0))
def test_oracle_linear_equals_its_naive_twin(head_dim, theta, factor):
    config = ModelConfig(
        "llama", 9, 8, 8, 1, 1, 1, head_dim, 1e-5, theta, LinearScaling(factor, 0.5)
    )
    ours = rope_frequencies(head_dim, theta, config.rope_scaling)
    theirs = [naive.frequency(config, i) for i in range(head_dim // 2)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-14, atol=0)
    assert config.attention_factor == 0.5


@pytest.mark.theorem(
    "YaRN slows each frequency by at most the factor: pairs before the ramp keep theirs, pairs "
    "behind it are divided by the factor",
    source="Peng et al. 2023, §3.2",
)
@given(HEADS, THETAS, yarns())
def test_bound_yarn_between_extrapolation_and_interpolation(head_dim, theta, scaling):
    assume(ramp_exists(head_dim, theta, scaling))
    plain = np.array(rope_frequencies(head_dim, theta))
    scaled = np.array(rope_frequencies(head_dim, theta, scaling))
    low, high = yarn_range(head_dim, theta, scaling)
    pair = np.arange(head_dim // 2)
    assert np.all(scaled <= plain * (1 + 1e-15))
    assert np.all(scaled >= plain / scaling.factor * (1 - 1e-15))
    np.testing.assert_array_equal(scaled[pair <= low], plain[pair <= low])
    np.testing.assert_array_equal(scaled[pair >= high], plain[pair >= high] / scaling.factor)


def test_yarn_of_one_pair_by_hand():
    """L = 64, base 10⁴, D = 8: pair i makes 64/2π · 10^−i turns: 10.2, 1.02, 0.1, 0.01.

    With β = 5 and α = 0.5 the ramp runs from pair 0 (rounded down from 0.31) to pair 2 (up
    from 1.31): pair 1 is half way.
    """
    scaling = YarnScaling(4.0, 64, 1.0, 5.0, 0.5)
    assert yarn_range(8, 1e4, scaling) == (0, 2)
    found = rope_frequencies(8, 1e4, scaling)
    np.testing.assert_allclose(found, [1.0, 0.1 * 0.625, 0.01 / 4, 0.001 / 4], rtol=1e-14)
    exact = yarn_range(8, 1e4, replace(scaling, truncate=False))
    np.testing.assert_allclose(exact, [math.log10(64 / 10 / math.pi), math.log10(64 / math.pi)])


def test_the_ramp_ends_before_the_head_does():
    """A slow end beyond the last element of the head counts as D − 1, as in transformers and
    llama.cpp, though the head has D/2 pairs: pair 1 is a third of the way, not a quarter.
    """
    scaling = YarnScaling(4.0, 131_072, 1.0, 20_000.0, 0.25)
    assert yarn_range(4, 500.0, scaling) == (0, 3)
    plain = rope_frequencies(4, 500.0)
    found = rope_frequencies(4, 500.0, scaling)
    np.testing.assert_allclose(found, [plain[0], plain[1] * (1 / 3 / 4 + 2 / 3)], rtol=1e-14)


def test_degenerate_ramp_of_no_width_is_a_step():
    """Both ends at pair 0: it keeps its frequency, all others are slowed by the factor."""
    scaling = YarnScaling(4.0, 6, 1.0)  # six positions are less than a turn of pair 0
    assert yarn_range(8, 1e4, scaling) == (0, 0)
    found = rope_frequencies(8, 1e4, scaling)
    np.testing.assert_allclose(found, [1.0, 0.025, 0.0025, 0.00025], rtol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1.0,), 1.0),
        ((0.5,), 1.0),  # no factor below 1 changes the scores
        ((math.e,), 1.1),
        ((math.e**2, 0.5, 2.0), 1.1 / 1.4),
        ((math.e, 2.0, 0.0), 1.1),  # 0 is none
        ((math.e, 0.0, 2.0), 1.1),
        ((math.e, None, None), 1.1),
    ],
)
def test_the_attention_factor_by_hand(arguments, expected):
    assert yarn_attention_factor(*arguments) == pytest.approx(expected, rel=1e-15)


@pytest.mark.theorem(
    "Scores of rotated queries and keys grow by the square of the attention factor",
    source="Peng et al. 2023, §3.4: √(1/t) on both",
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_invariance_of_scores_up_to_the_attention_factor(xp, dtype):
    x = np.random.default_rng(1).standard_normal((5, 2, 8)).astype(dtype)
    frequencies = xp.asarray(np.array(rope_frequencies(8, 100.0)))
    scores = []
    for factor in (1.0, 1.5):
        table = rope_table(frequencies, xp.asarray(np.arange(5)), dtype, LinearScaling(1.0, factor))
        assert all(t.dtype == dtype for t in table)
        turned = to_host(apply_rope(xp.asarray(x), *table)).astype(np.float64)
        scores.append(turned[:, 0] @ turned[:, 1].T)
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(scores[1], 2.25 * scores[0], atol=64 * eps, rtol=64 * eps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(0.0), "linear RoPE scaling needs positive factors, and factor is 0"),
        (lambda: LinearScaling(-4.0), "factor is -4.0"),
        (lambda: LinearScaling(math.nan), "factor is nan"),
        (lambda: LinearScaling(math.inf), "factor is inf"),
        (lambda: LinearScaling(4.0, 0.0), "attention_factor is 0.0"),
        (lambda: Llama3Scaling(math.inf, 1.0, 4.0, 8), "factor is inf"),
        (
            lambda: YarnScaling(-4.0, 64, 1.0),
            "yarn RoPE scaling needs positive factors, and factor",
        ),
        (lambda: YarnScaling(4.0, 0, 1.0), "original_max_position_embeddings is 0"),
        (lambda: YarnScaling(4.0, 64, math.nan), "attention_factor is nan"),
        (lambda: YarnScaling(4.0, 64, 1.0, -1.0), "beta_fast is -1.0"),
        (lambda: YarnScaling(4.0, 64, 1.0, 2.0, 0.0), "beta_slow is 0.0"),
        (lambda: YarnScaling(4.0, 64, 1.0, 1.0, 2.0), "needs beta_fast above beta_slow, got 1.0"),
        (lambda: rope_frequencies(8, 1.0, YarnScaling(4.0, 64, 1.0)), "a rope_theta above 1"),
        (
            lambda: ModelConfig(
                "llama", 9, 8, 8, 1, 1, 1, 8, rope_scaling=YarnScaling(4.0, 1, 1.0, 5.0, 4.0)
            ),
            "no pairs between beta_fast 5.0 and beta_slow 4.0 turns in 1 positions",
        ),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.oracle
@pytest.mark.theorem(
    "Frequencies and attention factor of linear and YaRN scaling are transformers'",
    source="transformers' ROPE_INIT_FUNCTIONS",
)
@given(HEADS, THETAS, yarns(), st.sampled_from([None, (0.7, 0.0), (0.7, 1.3)]))
def test_oracle_frequencies_equal_transformers(head_dim, theta, scaling, mscales):
    functions = oracle("transformers").modeling_rope_utils.ROPE_INIT_FUNCTIONS
    assume(ramp_exists(head_dim, theta, scaling))
    entry = write_scaling(scaling)
    if mscales is not None:  # then the factor is computed from them
        entry.pop("attention_factor", None)
        entry |= {"mscale": mscales[0], "mscale_all_dim": mscales[1]}
        implied = yarn_attention_factor(scaling.factor, *mscales)
        scaling = replace(scaling, attention_factor=implied)
    config = oracle("transformers").LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=1 << 22,
        rope_parameters={**entry, "rope_theta": theta},
    )
    theirs, factor = functions["yarn"](config, "cpu")
    low, high = yarn_range(head_dim, theta, scaling)
    # float32 powers cost a few ulp, and the ramp divides by its width
    np.testing.assert_allclose(
        rope_frequencies(head_dim, theta, scaling),
        theirs.double().numpy(),
        rtol=32 * EPS32 * (1 + scaling.factor * (1 + high / (high - low))),
    )
    assert scaling.attention_factor == pytest.approx(factor, rel=1e-15)

    config.rope_parameters = {"rope_type": "linear", "factor": scaling.factor, "rope_theta": theta}
    theirs, factor = functions["linear"](config, "cpu")
    ours = rope_frequencies(head_dim, theta, LinearScaling(scaling.factor))
    np.testing.assert_allclose(ours, theirs.double().numpy(), rtol=16 * EPS32)
    assert factor == 1.0
