"""Distillation targets against a plain softmax, and what the loss of the student does with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.model.config import ModelConfig
from refllm.train.backward import hidden_states, loss_and_gradients, output_name
from refllm.train.distill import make_teacher
from refllm.train.loop import initialize, train
from refllm.train.schedule import Phase, Plan

V = 31


def network(seed: int, *, width: int = 16, tied: bool = True, dtype: str = "float64"):
    config = ModelConfig("llama", V, width, 24, 1, 4, 2, 4, tie_word_embeddings=tied)
    params = initialize(config, np.random.default_rng(seed))
    return {k: (v if v.ndim == 1 else 10 * v).astype(dtype) for k, v in params.items()}, config


def softmax(z):
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
)
def test_targets_are_the_mixture_of_tempered_softmax_and_label(seed, temperature, alpha, tied):
    params, config = network(seed, tied=tied)
    tokens = np.random.default_rng(seed).integers(0, V, (2, 8))
    targets = make_teacher(params, config, temperature, alpha)(tokens)
    z = hidden_states(params, config, tokens[:, :-1]) @ params[output_name(config)].T
    expected = alpha * softmax(z / temperature) + (1 - alpha) * np.eye(V)[tokens[:, 1:].reshape(-1)]
    # any chunking of the rows
    got = np.concatenate([targets(slice(a, min(a + 5, 14))) for a in range(0, 14, 5)])
    # A logit of magnitude |z| in float64 carries an error of about N·eps·|z|, and exp makes
    # it relative.
    tolerance = 16 * np.finfo(np.float64).eps * (1 + np.abs(z).max() / temperature)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(got.sum(axis=-1), 1.0, rtol=0, atol=V * np.finfo(np.float64).eps)


@given(st.integers(0, 2**32 - 1))
def test_alpha_zero_is_training_without_a_teacher(seed):
    params, config = network(seed)
    tokens = np.random.default_rng(seed).integers(0, V, (2, 8))
    plain, plain_grads = loss_and_gradients(params, config, tokens)
    mixed, grads = loss_and_gradients(
        params, config, tokens, make_teacher(*network(seed + 1), alpha=0.0)(tokens)
    )
    assert mixed == pytest.approx(plain, rel=1e-13)
    for name, g in plain_grads.items():
        np.testing.assert_allclose(grads[name], g, rtol=0, atol=1e-13 * np.abs(g).max())


def test_invariance_every_array_library_gives_the_same_targets(xp):
    params, config = network(0)
    tokens = np.random.default_rng(0).integers(0, V, (2, 8))
    expected = make_teacher(params, config, 0.7, 0.4)(tokens)(slice(3, 9))
    on_device = {name: xp.asarray(w) for name, w in params.items()}
    got = make_teacher(on_device, config, 0.7, 0.4)(xp.asarray(tokens))(slice(3, 9))
    np.testing.assert_allclose(to_host(got), expected, rtol=0, atol=1e-13)


@pytest.mark.theorem(
    "∇ cross-entropy(p, q) = ∇ KL(p ‖ q), and it is zero at q = p",
    source="Hinton et al. 2015, section 2",
)
@given(st.integers(0, 2**32 - 1))
def test_a_student_equal_to_its_teacher_has_no_gradient(seed):
    """softmax(z) − p = 0 at q = p, and the loss there is the entropy of p (Gibbs'
    inequality's equality case).
    """
    params, config = network(seed)
    tokens = np.random.default_rng(seed).integers(0, V, (2, 8))
    targets = make_teacher(params, config)(tokens)
    loss, grads = loss_and_gradients(params, config, tokens, targets)
    p = targets(slice(0, 14))
    assert loss == pytest.approx(float(-(p * np.log(p)).sum(axis=-1).mean()), rel=1e-12)
    scale = max(np.abs(g).max() for g in loss_and_gradients(params, config, tokens)[1].values())
    assert max(np.abs(g).max() for g in grads.values()) <= 1e-13 * scale


def test_distillation_raises_the_acceptance_of_the_student(tmp_path: Path):
    """Σ min(p, q), the probability that speculative decoding accepts, rises on fresh
    tokens.
    """
    teacher_params, teacher_config = network(0, width=32, dtype="float32")
    _, config = network(1)
    stream = np.random.default_rng(2).integers(0, V, 4000).astype(np.int32)
    fresh = np.random.default_rng(3).integers(0, V, (4, 17))
    plan = Plan((Phase(60, 4, 16),), peak_rate=1e-2, warmup=5, workers=1)
    teacher = make_teacher(teacher_params, teacher_config)

    def acceptance(params):
        whole = slice(0, 64)
        return (
            np.minimum(teacher(fresh)(whole), make_teacher(params, config)(fresh)(whole))
            .sum(axis=-1)
            .mean()
        )

    before = acceptance(initialize(config, np.random.default_rng([plan.seed, 0])))
    state = train(config, [stream], plan, tmp_path, teacher=teacher)
    assert acceptance(state.params) > before + 0.05


def test_bound_a_teacher_of_enormous_logits_does_not_overflow(xp):
    """At a low temperature the teacher is certain: its targets are one-hot, not NaN."""
    params, config = network(0, dtype="float32")
    tokens = xp.asarray(np.random.default_rng(0).integers(0, V, (2, 8)))
    p = to_host(
        make_teacher({n: xp.asarray(w) for n, w in params.items()}, config, 1e-6)(tokens)(
            slice(0, 14)
        )
    )
    np.testing.assert_allclose(
        np.sort(p, axis=-1)[:, -2:], np.tile([0.0, 1.0], (14, 1)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_not_positive_and_finite_is_rejected(temperature):
    with pytest.raises(ValueError, match="temperature"):
        make_teacher(*network(0), temperature)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_outside_zero_to_one_is_rejected(alpha):
    with pytest.raises(ValueError, match="alpha"):
        make_teacher(*network(0), alpha=alpha)


def test_a_teacher_of_another_vocabulary_is_rejected():
    params, config = network(0)
    tokens = np.zeros((1, 5), dtype=np.int64)
    with pytest.raises(ValueError, match="teacher"):
        loss_and_gradients(params, config, tokens, lambda rows: np.full((4, V + 1), 1 / (V + 1)))
