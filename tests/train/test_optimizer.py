"""AdamW, Muon, clipping and the schedules, against PyTorch step by step and against their
definitions.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.train.optimizer import (
    SCHEDULES,
    AdamW,
    Muon,
    clip_by_global_norm,
    learning_rate,
    optimizer_class,
    orthogonalize,
)
from strategies import seeds

EPS32 = float(np.finfo("float32").eps)
EPS64 = float(np.finfo("float64").eps)
SHAPES = {"matrix": (3, 4), "gain": (5,), "wide": (2, 7)}


def draw(seed: int, scale: float = 1.0, dtype: str = "float64") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()
    }


def moved(xp, tensors):
    """Copies, because the optimizer works in place."""
    return {name: xp.array(t) for name, t in tensors.items()}


# --- AdamW --------------------------------------------------------------------------------


@pytest.mark.oracle
@given(
    seed=seeds,
    beta2=st.sampled_from([0.95, 0.999]),
    decay=st.sampled_from([0.0, 0.1]),
    eps=st.sampled_from([1e-8, 1e-3]),
)
def test_oracle_adamw_takes_the_steps_of_torch(xp, seed, beta2, decay, eps):
    torch = oracle("torch")
    params = draw(seed)
    steps = 12
    theirs = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in params.items()}
    matrices = [w for w in theirs.values() if w.ndim == 2]
    gains = [w for w in theirs.values() if w.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, beta2),
        eps=eps,
    )
    ours = moved(xp, params)
    optimizer = AdamW(beta2=beta2, eps=eps, weight_decay=decay)
    for step in range(steps):
        rate = learning_rate(step, peak=1e-2, warmup=3, total=steps)
        # gradients of very different size in turn
        grads = draw(seed + 1 + step, scale=10.0 ** (step % 5 - 2))
        for group in reference.param_groups:
            group["lr"] = rate
        for name, w in theirs.items():
            w.grad = torch.from_numpy(grads[name].copy())
        reference.step()
        optimizer.update(ours, moved(xp, grads), rate)
        for name, w in theirs.items():
            # About 16 roundings a step and element; a step moves an element by 3.2 rates at
            # most (see the bound).
            tolerance = (
                16 * (step + 1) * EPS64 * (np.abs(params[name]).max() + 4 * 1e-2 * (step + 1))
            )
            np.testing.assert_allclose(
                to_host(ours[name]), w.detach().numpy(), rtol=0, atol=tolerance
            )
            state = reference.state[w]
            for mine, key in ((optimizer.m, "exp_avg"), (optimizer.v, "exp_avg_sq")):
                other = state[key].numpy()
                # m cancels: its error is measured against the largest gradient seen, 10^2
                # times a normal number
                np.testing.assert_allclose(
                    to_host(mine[name]),
                    other,
                    rtol=0,
                    atol=32 * EPS64 * max(np.abs(other).max(), 1e3),
                )
    assert optimizer.step == steps


def test_a_first_step_moves_every_element_by_the_rate_against_its_gradient(xp):
    """m̂ = g and v̂ = g² after one step: w − lr·g/(|g| + ε), whatever the size of g."""
    params = draw(0)
    grads = draw(1, scale=1e3)
    ours = moved(xp, params)
    AdamW(weight_decay=0.0, eps=0.0).update(ours, moved(xp, grads), 1e-3)
    for name, w in params.items():
        np.testing.assert_allclose(
            to_host(ours[name]), w - 1e-3 * np.sign(grads[name]), rtol=0, atol=32 * EPS64
        )


def test_decay_pulls_matrices_and_leaves_gains(xp):
    params = draw(0)
    ours = moved(xp, params)
    AdamW(weight_decay=0.5).update(ours, moved(xp, draw(0, scale=0.0)), 0.1)
    np.testing.assert_allclose(
        to_host(ours["matrix"]), params["matrix"] * (1 - 0.1 * 0.5), rtol=2 * EPS64
    )
    assert np.array_equal(to_host(ours["gain"]), params["gain"])


@given(seed=seeds)
def test_bound_no_step_is_longer_than_the_rate_over_the_root_of_one_minus_beta2(xp, seed):
    """|m̂|/√v̂ ≤ (1 − β₁)/√(1 − β₂) · correction for β₁² < β₂ (Kingma & Ba, section 2.1), here
    below 3.2.
    """
    params = draw(seed, scale=0.0)
    ours = moved(xp, params)
    optimizer = AdamW(weight_decay=0.0)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        before = {name: to_host(w).copy() for name, w in ours.items()}
        optimizer.update(
            ours,
            moved(xp, draw(int(rng.integers(2**31)), scale=float(10.0 ** rng.integers(-4, 5)))),
            1.0,
        )
        assert all(np.abs(to_host(w) - before[name]).max() <= 3.2 for name, w in ours.items())


# --- Muon ---------------------------------------------------------------------------------

matrix_shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.mark.theorem(
    "Newton and Schulz's iteration changes the singular values of a matrix and neither basis",
    source="Jordan et al. 2024, Muon",
)
@given(shape=matrix_shapes, seed=seeds)
def test_exact_value_orthogonalize_is_an_odd_polynomial_of_the_singular_values(xp, shape, seed):
    x = np.random.default_rng(seed).standard_normal(shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.sqrt((s * s).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    got = to_host(orthogonalize(xp.asarray(x)))
    # five steps enlarge an error of the first by at most 3.45^5 = 490
    np.testing.assert_allclose(got, (u * s) @ vt, rtol=0, atol=490 * 64 * EPS64 * max(shape))


@given(seed=seeds, exponent=st.integers(-60, 60))
def test_bound_singular_values_above_a_hundredth_of_the_norm_end_near_one(xp, seed, exponent):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in "uv")
    s = rng.uniform(0.03, 1.0, 8)  # the norm is at most √8: each is above 0.03/2.9 of it
    got = to_host(orthogonalize(xp.asarray(2.0**exponent * (u * s) @ v)))
    singular = np.linalg.svd(got, compute_uv=False)
    assert singular.min() > 0.6
    assert singular.max() < 1.25


def test_degenerate_a_matrix_of_zeros_stays_one(xp):
    assert np.array_equal(
        to_host(orthogonalize(xp.zeros((3, 5), dtype=xp.float32))), np.zeros((3, 5), "float32")
    )


@pytest.mark.oracle
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_oracle_muon_takes_the_steps_of_torch(xp, shape):
    torch = oracle("torch")
    rng = np.random.default_rng(0)
    name = "model.layers.0.mlp.up_proj.weight"
    start = rng.standard_normal(shape).astype("float32")
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    ours = {name: xp.array(start)}
    mine = Muon(weight_decay=0.3)
    for step in range(1, 5):
        grad = rng.standard_normal(shape).astype("float32")
        theirs.grad = torch.from_numpy(grad.copy())
        reference.step()
        mine.update(ours, {name: xp.array(grad)}, 0.1)
        # torch iterates in bfloat16 (8 bits); an update's largest element is below 0.1 ·
        # 0.2 · √9 · 1.2 = 0.07
        np.testing.assert_allclose(
            to_host(ours[name]), theirs.detach().numpy(), rtol=0, atol=step * 0.07 * 2**-3
        )


@given(shape=matrix_shapes, seed=seeds)
def test_exact_value_of_two_steps_of_muon(xp, shape, seed):
    """The second step sees the momentum of the first; both are Nesterov's look ahead."""
    rng = np.random.default_rng(seed)
    name = "model.layers.0.mlp.up_proj.weight"
    w = rng.standard_normal(shape)
    ours = {name: xp.array(w)}
    muon = Muon(weight_decay=0.3, momentum=0.8)
    m = np.zeros(shape)
    for rate in (0.1, 0.05):
        g = rng.standard_normal(shape)
        muon.update(ours, {name: xp.array(g)}, rate)
        m = 0.8 * m + 0.2 * g
        direction = orthogonalize(0.2 * g + 0.8 * m)
        w = (1 - rate * 0.3) * w - rate * 0.2 * math.sqrt(max(shape)) * direction
        # five iterations enlarge an error of the first by at most 490
        np.testing.assert_allclose(to_host(ours[name]), w, rtol=0, atol=490 * 256 * EPS64)
        np.testing.assert_allclose(to_host(muon.m[name]), m, rtol=0, atol=16 * EPS64)


@pytest.mark.theorem(
    "the root mean square of Muon's update is about 0.2 times the rate, whatever the shape",
    source="Liu et al. 2025, arXiv:2502.16982, eq. 4",
)
@pytest.mark.parametrize("shape", [(16, 4), (4, 16), (64, 8), (8, 8)])
def test_bound_the_size_of_an_update_of_muon(xp, shape):
    """An O of min(M, N) singular values s has the mean square s²·min(M, N)/(M·N) = s²/max(M, N);
    s lies within about [0.7, 1.2].
    """
    name = "model.layers.1.self_attn.q_proj.weight"
    params = {name: xp.zeros(shape)}
    gradient = np.random.default_rng(0).standard_normal(shape)
    Muon().update(params, {name: xp.array(gradient)}, 0.5)
    rms = float(np.sqrt((to_host(params[name]) ** 2).mean()))
    assert 0.5 * 0.2 * 0.7 < rms < 0.5 * 0.2 * 1.2


def test_muon_leaves_embedding_head_and_gains_to_adamw(xp):
    names = {
        "model.embed_tokens.weight": (4, 3),
        "lm_head.weight": (4, 3),
        "model.layers.0.input_layernorm.weight": (3,),
    }
    rng = np.random.default_rng(1)
    params = {n: rng.standard_normal(s) for n, s in names.items()} | {
        "model.layers.0.o.weight": rng.standard_normal((3, 3))
    }
    grads = {n: rng.standard_normal(w.shape) for n, w in params.items()}
    one = moved(xp, params)
    other = moved(xp, params)
    AdamW().update(one, moved(xp, grads), 0.1)
    muon = Muon()
    muon.update(other, moved(xp, grads), 0.1)
    for n in names:
        assert np.array_equal(to_host(one[n]), to_host(other[n]))
    assert not np.allclose(
        to_host(one["model.layers.0.o.weight"]), to_host(other["model.layers.0.o.weight"])
    )
    assert muon.v.keys() == names.keys()  # one moment is enough for a matrix


def test_an_unknown_optimizer_is_rejected():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; choose one of adamw, muon"):
        optimizer_class("sgd")


# --- clipping -----------------------------------------------------------------------------


@given(seed=seeds, scale=st.sampled_from([1e-4, 1.0, 1e4]), limit=st.sampled_from([0.1, 1.0, 50.0]))
def test_bound_the_joint_norm_is_at_most_the_limit_and_the_direction_stays(xp, seed, scale, limit):
    grads = draw(seed, scale)
    ours = moved(xp, grads)
    norm = clip_by_global_norm(ours, limit)
    exact = math.sqrt(math.fsum(float(x) ** 2 for g in grads.values() for x in g.reshape(-1)))
    count = sum(g.size for g in grads.values())
    assert norm == pytest.approx(exact, rel=EPS64 * count)
    after = math.sqrt(
        math.fsum(float(x) ** 2 for g in ours.values() for x in to_host(g).reshape(-1))
    )
    assert after <= limit * (1 + EPS64 * count)
    factor = min(1.0, limit / exact)
    for name, g in grads.items():
        np.testing.assert_allclose(
            to_host(ours[name]), factor * g, rtol=EPS64 * (count + 2), atol=0
        )


def test_gradients_within_the_limit_are_not_touched(xp):
    grads = draw(0)
    ours = moved(xp, grads)
    clip_by_global_norm(ours, 1e3)
    assert all(np.array_equal(to_host(ours[name]), g) for name, g in grads.items())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_gives_a_norm_that_is_not_finite(xp, bad):
    """``train`` rejects the step by this norm."""
    grads = draw(0)
    grads["matrix"][1, 2] = bad
    with np.errstate(invalid="ignore"):  # inf · (limit/inf)
        assert not math.isfinite(clip_by_global_norm(moved(xp, grads), 1.0))


@pytest.mark.oracle
@given(seed=seeds, limit=st.sampled_from([0.1, 1.0, 50.0]))
def test_oracle_clipping_is_that_of_torch(xp, seed, limit):
    torch = oracle("torch")
    grads = draw(seed)
    theirs = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads.values()]
    for w, g in zip(theirs, grads.values(), strict=True):
        w.grad = torch.from_numpy(g.copy())
    norm = float(torch.nn.utils.clip_grad_norm_(theirs, limit))
    ours = moved(xp, grads)
    assert clip_by_global_norm(ours, limit) == pytest.approx(norm, rel=32 * EPS64)
    for w, g in zip(theirs, ours.values(), strict=True):
        # torch divides by norm + 1e-6, which shortens the result by that fraction
        np.testing.assert_allclose(
            to_host(g), w.grad.numpy(), rtol=1e-6 / norm + 64 * EPS64, atol=0
        )


# --- schedules ----------------------------------------------------------------------------

plans = st.tuples(st.integers(0, 30), st.integers(1, 200)).map(
    lambda t: {"warmup": t[0], "total": t[0] + t[1]}
)


@given(plan=plans, schedule=st.sampled_from(SCHEDULES))
def test_bound_the_rate_climbs_to_its_peak_and_falls_to_zero(plan, schedule):
    rates = [
        learning_rate(i, peak=3e-3, schedule=schedule, **plan) for i in range(plan["total"] + 1)
    ]
    # the first step has a rate above zero, the last of the warm-up the peak
    top = max(0, plan["warmup"] - 1)
    assert rates[top] == pytest.approx(3e-3, rel=1e-12)
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in pairwise(rates[top:]))
    assert rates[-1] == pytest.approx(0.0, abs=1e-18)
    assert all(0 < rate <= 3e-3 * (1 + EPS64) for rate in rates[:-1])
    # and stays there
    assert learning_rate(plan["total"] + 7, peak=3e-3, schedule=schedule, **plan) == rates[-1]


def test_half_way_down_both_schedules_are_at_half_the_peak():
    for schedule in SCHEDULES:
        assert learning_rate(
            60, peak=1.0, warmup=20, total=100, schedule=schedule
        ) == pytest.approx(0.5, rel=1e-12)
    quarter = [
        learning_rate(40, peak=1.0, warmup=20, total=100, schedule=s) for s in ("cosine", "linear")
    ]
    assert quarter == pytest.approx([0.5 + math.sqrt(0.125), 0.75], rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_degenerate_schedules(schedule):
    """A run that is all warm-up ends at the peak; one without warm-up begins there."""

    def rate(step: int, warmup: int, total: int) -> float:
        return learning_rate(step, peak=1.0, warmup=warmup, total=total, schedule=schedule)

    assert [rate(step, 10, 10) for step in (0, 8, 9, 10)] == [0.1, 0.9, 1.0, 1.0]
    assert [rate(step, 0, 1) for step in (0, 1)] == pytest.approx([1.0, 0.0], abs=1e-16)
    assert rate(0, 0, 0) == 1.0
    assert rate(11, 10, 10) == pytest.approx(0.0, abs=1e-16)


def test_an_unknown_schedule_is_rejected():
    with pytest.raises(ValueError, match="unknown schedule 'step'; choose one of cosine, linear"):
        learning_rate(0, peak=1.0, warmup=1, total=2, schedule="step")


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("schedule", "name"),
    [("cosine", "get_cosine_schedule_with_warmup"), ("linear", "get_linear_schedule_with_warmup")],
)
def test_oracle_the_schedules_are_those_of_transformers(schedule, name):
    """The same curve; in the warm-up ours is one step ahead, because theirs wastes the
    first step on rate 0.
    """
    torch = oracle("torch")
    make = getattr(oracle("transformers.optimization"), name)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = make(optimizer, num_warmup_steps=7, num_training_steps=40).lr_lambdas[0]
    ours = [learning_rate(i, peak=2.0, warmup=7, total=40, schedule=schedule) for i in range(41)]
    expected = [2.0 * theirs(i + 1 if i < 7 else i) for i in range(41)]
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-15)
