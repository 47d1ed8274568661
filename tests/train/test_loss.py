"""The cross-entropy and its gradients against the plain formula, central differences and
torch.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fakecupy
from conftest import oracle, to_host
from refllm.train import loss as module
from refllm.train.loss import cross_entropy, cross_entropy_and_gradients
from strategies import seeds

EPS64 = float(np.finfo("float64").eps)
N = 5
V = 11


def problem(seed: int, count: int = 7, scale: float = 1.0):
    """hidden[T, N], head[V, N], targets[T], and a target distribution t[T, V]."""
    rng = np.random.default_rng(seed)
    hidden = scale * rng.standard_normal((count, N))
    head = rng.standard_normal((V, N))
    t = rng.random((count, V))
    return hidden, head, rng.integers(0, V, count), t / t.sum(axis=-1, keepdims=True)


def plain_loss(hidden, head, t) -> float:
    z = hidden @ head.T
    top = z.max(axis=-1, keepdims=True)
    log_q = z - top - np.log(np.exp(z - top).sum(axis=-1, keepdims=True))
    return float(-(t * log_q).sum(axis=-1).mean())


@given(
    seed=seeds,
    count=st.integers(1, 9),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    taught=st.booleans(),
)
def test_exact_value_the_loss_is_minus_the_mean_of_t_log_q(xp, seed, count, scale, taught):
    hidden, head, targets, t = problem(seed, count, scale)
    expected = plain_loss(hidden, head, t if taught else np.eye(V)[targets])
    on_device = [xp.asarray(x) for x in (hidden, head, targets)]
    teacher = (lambda rows: xp.asarray(t)[rows]) if taught else None
    loss, d_hidden, d_head = cross_entropy_and_gradients(*on_device, teacher)
    tolerance = 4 * (N + V) * EPS64 * (1 + float(np.abs(hidden @ head.T).max()))
    assert loss == pytest.approx(expected, rel=0, abs=tolerance)
    if not taught:
        assert cross_entropy(*on_device) == loss
    assert to_host(d_hidden).shape == hidden.shape
    assert to_host(d_head).shape == head.shape


@pytest.mark.theorem(
    "∂(−Σ t log softmax(z))/∂z = softmax(z) − t", source="Goodfellow et al. 2016, section 6.2.2.3"
)
@given(seed=seeds, taught=st.booleans())
def test_oracle_the_gradients_are_central_differences(xp, seed, taught):
    hidden, head, targets, t = problem(seed)
    t = t if taught else np.eye(V)[targets]
    _, *grads = cross_entropy_and_gradients(
        xp.asarray(hidden),
        xp.asarray(head),
        xp.asarray(targets),
        (lambda rows: xp.asarray(t)[rows]) if taught else None,
    )
    rng = np.random.default_rng(seed + 1)
    for which, grad in enumerate(grads):
        direction = rng.standard_normal(grad.shape)

        def slope(h, which=which, direction=direction):
            values = []
            for sign in (1, -1):
                point = [hidden.copy(), head.copy()]
                point[which] += sign * h * direction
                values.append(plain_loss(*point, t))
            return (values[0] - values[1]) / (2 * h)

        h = 1e-5
        # The error of a central difference is c·h²: two step sizes measure it. Rounding of
        # the loss adds ε·|loss|/h.
        tolerance = (
            abs(slope(2 * h) - slope(h)) + 64 * EPS64 * (1 + abs(plain_loss(hidden, head, t))) / h
        )
        assert abs(float(np.sum(to_host(grad) * direction)) - slope(h)) <= tolerance


@given(seed=seeds, rows=st.integers(1, 20), count=st.integers(1, 20))
def test_invariance_the_chunk_of_rows_changes_nothing(seed, rows, count):
    hidden, head, targets, t = problem(seed, count)
    whole = cross_entropy_and_gradients(hidden, head, targets, lambda at: t[at])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", rows)
        parts = cross_entropy_and_gradients(hidden, head, targets, lambda at: t[at])
        assert cross_entropy(hidden, head, targets) == pytest.approx(
            plain_loss(hidden, head, np.eye(V)[targets])
        )
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=8 * (count + N + V) * EPS64 * (1 + np.abs(hidden).max())
        )


def test_bound_the_largest_logits_do_not_overflow(xp):
    """A right answer that is certain costs 0, a wrong one its logit's distance, in float32
    up to 1e37.
    """
    head = xp.asarray(np.eye(2, 1, dtype="float32"))  # z = (h, 0)
    for h, target, expected in ((1e37, 0, 0.0), (1e37, 1, 1e37), (-1e37, 0, 1e37)):
        hidden = xp.asarray(np.array([[h]], dtype="float32"))
        loss, d_hidden, d_head = cross_entropy_and_gradients(
            hidden, head, xp.asarray(np.array([target]))
        )
        assert loss == pytest.approx(expected, rel=1e-6)
        assert np.isfinite(to_host(d_hidden)).all()
        assert np.isfinite(to_host(d_head)).all()


def test_exact_value_an_undecided_network_pays_the_logarithm_of_the_vocabulary(xp):
    hidden = xp.zeros((4, N), dtype=xp.float64)
    head = xp.ones((V, N), dtype=xp.float64)
    assert cross_entropy(hidden, head, xp.asarray(np.arange(4))) == pytest.approx(
        math.log(V), rel=4 * EPS64
    )


def test_the_loss_does_not_wait_for_the_device_between_its_chunks():
    """Three chunks: when the teacher is asked for the last one, no number has been read
    back.
    """
    on_device = [fakecupy.asarray(x) for x in problem(0, 3 * module.ROWS)]
    t = on_device[3]
    syncs = []
    with fakecupy.counting() as counted:
        cross_entropy_and_gradients(
            *on_device[:3], lambda rows: (syncs.append(counted.syncs), t[rows])[1]
        )
    assert syncs == [0, 0, 0]
    assert counted.syncs == 3


def test_a_teacher_of_another_vocabulary_is_rejected():
    hidden, head, targets, _ = problem(0)
    with pytest.raises(
        ValueError, match=r"teacher's probabilities are \(7, 12\), the network's logits \(7, 11\)"
    ):
        cross_entropy_and_gradients(
            hidden, head, targets, lambda rows: np.full((7, V + 1), 1 / (V + 1))
        )


def test_no_positions_have_no_mean():
    _, head, _, _ = problem(0)
    with pytest.raises(ValueError, match="no positions"):
        cross_entropy(np.zeros((0, N)), head, np.zeros(0, dtype=int))


@pytest.mark.oracle
@given(seed=seeds, taught=st.booleans())
def test_oracle_loss_and_gradients_are_those_of_torch(seed, taught):
    torch = oracle("torch")
    hidden, head, targets, t = problem(seed, 300)  # more than one chunk
    h, w = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
    theirs = torch.nn.functional.cross_entropy(h @ w.T, torch.from_numpy(t if taught else targets))
    theirs.backward()
    loss, d_hidden, d_head = cross_entropy_and_gradients(
        hidden, head, targets, (lambda at: t[at]) if taught else None
    )
    assert loss == pytest.approx(theirs.item(), rel=64 * EPS64)
    np.testing.assert_allclose(
        d_hidden, h.grad.numpy(), rtol=0, atol=64 * EPS64 / 300 * np.abs(head).max()
    )
    np.testing.assert_allclose(
        d_head, w.grad.numpy(), rtol=0, atol=300 * EPS64 * np.abs(hidden).max()
    )
