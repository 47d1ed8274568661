"""SmoothQuant: its scale by the authors' loops, what α means, the same function after
folding, and the levels.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import to_host
from networks import NETWORKS, TOKENS, full_logits, random_tensors
from refllm.formats.quantized_linear import quantize
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear
from refllm.model.llama import PROJECTIONS, build
from refllm.model.weights import Dense
from refllm.quant.layer_io import ModelSource
from refllm.quant.recipe import quantize_model
from refllm.quant.smoothquant import (
    activation_absmax,
    migration_scale,
    smooth_layer,
    w8a8,
)
from refllm.quant.taps import tapped
from strategies import build as array_of
from strategies import seeds
from tiny_models import Record

EPS64 = float(np.finfo("float64").eps)
IDS = [TOKENS.tolist()]


def weights_of(family, seed=0, dtype="float64", xp=np):
    config = NETWORKS[family]
    return config, build(
        config, {k: xp.asarray(v) for k, v in random_tensors(config, seed, dtype).items()}
    )


def seen_by(config, weights, xp=np):
    """max |x| of each input of the first layers' projections, as the network computes them:
    a list of dicts.
    """
    found = [{} for _ in weights["layers"]]

    def observe(i, name, x):
        found[i][name] = xp.max(xp.abs(x), axis=0)

    full_logits(tapped(weights, observe), config, xp)
    return found


# --- the scale ----------------------------------------------------------------------------


def problem(seed, kinds, n=6):
    """a[N] > 0 and two weights [M, N] whose columns are larger than the floors, in float64."""
    rng = np.random.default_rng(seed)
    x = array_of(kinds, (9, n), seed, "float64")
    return np.maximum(np.abs(x).max(axis=0), 1e-3), [rng.uniform(0.01, 2, (m, n)) for m in (3, 5)]


@given(seed=seeds, alpha=st.floats(0, 1), kind=st.sampled_from(["normal", "outlier_column"]))
def test_exact_value_the_scale_is_the_authors_loop(xp, seed, alpha, kind):
    a, weights = problem(seed, kind)
    got = to_host(migration_scale(xp.asarray(a), [xp.asarray(w) for w in weights], alpha))
    for j in range(len(a)):
        w = max(max(max(abs(v) for v in w[:, j].tolist()) for w in weights), 1e-5)
        assert got[j] == pytest.approx(max(a[j] ** alpha / w ** (1 - alpha), 1e-5), rel=8 * EPS64)


@pytest.mark.theorem(
    "α = 1: every channel of X' reaches 1; α = 0: every column of W' does; α = ½: both "
    "reach √(max|X_j| max|W_j|)",
    source="Xiao et al. 2023, section 4, eq. 4",
)
@given(seed=seeds, kind=st.sampled_from(["normal", "outlier_column"]))
def test_exact_value_what_alpha_means(xp, seed, kind):
    a, weights = problem(seed, kind)
    w = np.max([np.abs(v).max(axis=0) for v in weights], axis=0)
    for alpha, x_after, w_after in (
        (1.0, 1.0, a * w),
        (0.0, a * w, 1.0),
        (0.5, np.sqrt(a * w), np.sqrt(a * w)),
    ):
        s = to_host(migration_scale(xp.asarray(a), [xp.asarray(v) for v in weights], alpha))
        np.testing.assert_allclose(a / s, x_after * np.ones_like(a), rtol=16 * EPS64)
        np.testing.assert_allclose(w * s, w_after * np.ones_like(a), rtol=16 * EPS64)


@given(
    seed=seeds,
    alpha=st.floats(0, 1),
    kind=st.sampled_from(["normal", "zero", "denormal", "one_sided"]),
)
def test_bound_the_scale_is_finite_and_above_zero(xp, seed, alpha, kind):
    a = np.abs(array_of(kind, (6,), seed))
    a[seed % 6] = 0.0
    w = array_of(kind, (3, 6), seed + 1)
    w[:, (seed + 1) % 6] = 0.0
    s = to_host(migration_scale(xp.asarray(a), xp.asarray(w), alpha))
    assert s.dtype == np.float32
    assert np.all(np.isfinite(s) & (s > 0))
    assert np.all(s[a == 0] == 1)  # what never woke up is not blown up
    assert np.all(s[a > 0] >= np.float32(1e-5))


def test_degenerate_floors_are_the_authors(xp):
    a = np.array([1.0, 1e-30, 1.0])
    w = np.array([[0.0, 1.0, 2.0]])
    assert to_host(migration_scale(xp.asarray(a), xp.asarray(w), 0.5)).tolist() == pytest.approx(
        [1 / math.sqrt(1e-5), 1e-5, 1 / math.sqrt(2)]
    )


@pytest.mark.parametrize(
    ("a", "w", "alpha", "message"),
    [
        (np.ones(3), np.ones((2, 3)), -0.1, "alpha lies within 0..1, got -0.1"),
        (np.ones(3), np.ones((2, 3)), math.nan, "alpha lies within 0..1"),
        (np.ones(3), np.ones((2, 4)), 0.5, r"weights \(2, 4\) do not read \(3,\) channels"),
        (np.ones(3), [], 0.5, "weights of none do not read"),
        (np.array([1.0, np.inf, 1.0]), np.ones((2, 3)), 0.5, "must be finite, and not negative"),
        (np.array([1.0, -1.0, 1.0]), np.ones((2, 3)), 0.5, "must be finite, and not negative"),
        (np.ones(3), np.full((2, 3), np.nan), 0.5, "must be finite"),
        (np.ones(3, dtype=np.int64), np.full((2, 3), 0.3), 0.5, "absmax is of floats, got int64"),
        (np.ones(3), [np.ones((0, 3))], 0.5, "without rows"),
    ],
)
def test_rejected(xp, a, w, alpha, message):
    with pytest.raises(ValueError, match=message):
        migration_scale(
            xp.asarray(a),
            [xp.asarray(v) for v in w] if isinstance(w, list) else xp.asarray(w),
            alpha,
        )


# --- folding ------------------------------------------------------------------------------


@pytest.mark.theorem(
    "Smoothing changes nothing but what is rounded: the folded model is the original, in "
    "float64 to 1e-12",
    source="Xiao et al. 2023, eq. 3",
)
@pytest.mark.parametrize("family", NETWORKS)
@settings(max_examples=3)
@given(seed=seeds, alpha=st.sampled_from([0.0, 0.5, 0.85, 1.0]))
def test_invariance_the_folded_model_is_the_original(xp, family, seed, alpha):
    config, weights = weights_of(family, seed, xp=xp)
    seen = seen_by(config, weights, xp)
    smooth = [
        smooth_layer(layer, absmax, alpha)
        for layer, absmax in zip(weights["layers"], seen, strict=True)
    ]
    before = full_logits(weights, config, xp)
    after = full_logits(weights | {"layers": [layer for layer, _ in smooth]}, config, xp)
    assert np.abs(after - before).max() <= 1e-12 * np.abs(before).max()
    measured = seen_by(config, weights | {"layers": [layer for layer, _ in smooth]}, xp)
    for (layer, predicted), plain, then in zip(smooth, weights["layers"], measured, strict=True):
        for name in PROJECTIONS:  # the predicted absmax is that of the smoothed inputs
            np.testing.assert_allclose(to_host(predicted[name]), to_host(then[name]), rtol=1e-9)
        for name in ("o_proj", "down_proj"):
            assert layer[name] is plain[name]
        assert np.any(to_host(layer["input_layernorm"]) != to_host(plain["input_layernorm"]))


def test_siblings_share_one_scale_and_any_of_them_names_the_input(xp):
    config, weights = weights_of("llama", xp=xp)
    layer = weights["layers"][0]
    seen = seen_by(config, weights, xp)[0]
    whole, _ = smooth_layer(layer, seen)
    for q, g in (("q_proj", "gate_proj"), ("v_proj", "up_proj")):
        one, _ = smooth_layer(layer, {q: seen[q], g: seen[g]})
        assert np.array_equal(
            to_host(one["k_proj"].dequantize()), to_host(whole["k_proj"].dequantize())
        )
    s = to_host(
        migration_scale(
            seen["q_proj"], [layer[n].dequantize() for n in ("q_proj", "k_proj", "v_proj")]
        )
    )
    for name in ("q_proj", "k_proj", "v_proj"):
        assert np.array_equal(
            to_host(whole[name].dequantize()), to_host(layer[name].dequantize()) * s
        )
    assert np.array_equal(to_host(whole["input_layernorm"]), to_host(layer["input_layernorm"]) / s)
    with pytest.raises(
        ValueError, match="needs the absmax of one of gate_proj, up_proj: calibrate first"
    ):
        smooth_layer(layer, {"q_proj": seen["q_proj"]})


def test_statistics_are_those_of_the_network(xp):
    config, weights = weights_of("qwen2", xp=xp)
    for found, expected in zip(
        activation_absmax(ModelSource(config, weights), IDS),
        seen_by(config, weights, xp),
        strict=True,
    ):
        assert found.keys() == PROJECTIONS.keys()
        for name in PROJECTIONS:
            np.testing.assert_allclose(to_host(found[name]), to_host(expected[name]), rtol=1e-12)


# --- W8A8 ---------------------------------------------------------------------------------


def test_the_levels_are_the_table_s(xp):
    w = xp.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    absmax = xp.asarray(np.array([0.5, 254.0, 3.0]))
    o1, o2, o3 = (w8a8(w, level, absmax=absmax) for level in ("O1", "O2", "O3"))
    assert [layer.scheme.granularity for layer in (o1, o2, o3)] == ["token", "tensor", "tensor"]
    assert [layer.static for layer in (o1, o2, o3)] == [None, None, 2.0]  # 254/127
    assert w8a8(w, "O3", absmax=absmax, rule="half_integer").static == 254 / 127.5
    # all inputs were zero: any scale will do
    assert w8a8(w, "O3", absmax=xp.zeros((3,))).static == 1.0
    for layer in (o1, o2, o3):
        assert layer.weight.scheme == Scheme(8, "restricted", "channel")
        assert np.array_equal(
            to_host(layer.weight.codes), to_host(quantize(w, layer.weight.scheme).codes)
        )
    with pytest.raises(ValueError, match="level O3 quantises with a scale from calibration"):
        w8a8(w, "O3")
    with pytest.raises(ValueError, match="unknown level 'O4'; choose one of O1, O2, O3"):
        w8a8(w, "O4")


def test_what_is_kept_stays_in_floating_point():
    config, weights = weights_of("llama")
    model = Record(config, weights, None)
    made, _ = quantize_model(
        model, "smoothquant", None, IDS, alpha=None, keep=("o_proj", "down_proj")
    )
    for old, new in zip(weights["layers"], made.weights["layers"], strict=True):
        for name in PROJECTIONS:
            kept = name in ("o_proj", "down_proj")
            assert isinstance(new[name], Dense if kept else W8A8Linear)
            assert (new[name] is old[name]) == kept
    with pytest.raises(ValueError, match="no projection is called lm_head"):
        quantize_model(model, "smoothquant", None, IDS, keep=("lm_head",))


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_a_whole_model_is_its_smoothed_layers_in_w8a8(level, alpha):
    """By hand: the absmax of all inputs, then ``smooth_layer`` and ``w8a8`` layer by layer."""
    config, weights = weights_of("llama", dtype="float32")
    absmax = activation_absmax(ModelSource(config, weights), IDS)
    layers = []
    for layer, seen in zip(weights["layers"], absmax, strict=True):
        smooth, after = (layer, seen) if alpha is None else smooth_layer(layer, seen, alpha)
        rounded = {
            name: w8a8(smooth[name].dequantize(), level, absmax=after[name])
            for name in PROJECTIONS
            if name != "down_proj"
        }
        layers.append(smooth | rounded)
    tree = weights | {"layers": layers}
    made, _ = quantize_model(
        Record(config, weights, None),
        "smoothquant",
        None,
        IDS,
        alpha=alpha,
        level=level,
        keep=("down_proj",),
    )
    assert np.array_equal(full_logits(tree, config), full_logits(made.weights, config))


def test_smoothing_repairs_what_an_outlier_channel_breaks():
    """One product: the error with smoothing is a small part of the error without, as the
    paper's figure 2 says.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 128))
    w = rng.standard_normal((32, 128)) / 12
    x[:, 9] *= 100
    s = migration_scale(np.abs(x).max(axis=0), w)
    exact = x @ w.T
    plain, smooth = (np.mean((w8a8(v).matmul(u) - exact) ** 2) for u, v in ((x, w), (x / s, w * s)))
    assert smooth < 0.05 * plain
