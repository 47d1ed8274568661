"""Rotations leave the function unchanged, spread outliers, and can be quantised like any model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.errors import InputError
from refllm.formats.uniform import Scheme
from refllm.model.attention import CausalAttend
from refllm.model.llama import PROJECTIONS, forward, logits
from refllm.quant.export import export
from refllm.quant.hadamard import hadamard_transform
from refllm.quant.layer_inputs import walk
from refllm.quant.layer_io import ModelSource
from refllm.quant.recipe import quantize_model
from refllm.quant.rotation import (
    RotatedAttend,
    RotatedLinear,
    Rotations,
    fold_norms,
    random_hadamard,
    rotate,
)
from tiny_models import tiny_model

FAMILIES = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "tied": {"tie_word_embeddings": True},
    "an asymmetric matrix per head": {"head_dim": 12, "attention_bias": True},
}
IDS = [[1, 5, 9, 2, 8, 3, 3], [4, 7, 7, 1, 6]]


def network(seed: int = 0, **changes):
    """A random network in float64 whose gains and biases are far from 1 and 0."""
    model = tiny_model(seed, hidden_size=24, intermediate_size=48, **{"head_dim": 8} | changes)
    rng = np.random.default_rng(seed + 1)
    for layer in model.weights["layers"]:
        for name, value in layer.items():
            if isinstance(value, np.ndarray):
                layer[name] = rng.uniform(0.5, 2.0, value.shape)
    model.weights["norm"] = rng.uniform(0.5, 2.0, model.weights["norm"].shape)
    return model


def outputs(model, tokens, wrap=lambda attend: attend):
    """Logits [T, V] of a full forward."""
    ids = np.asarray(tokens)
    attend = wrap(CausalAttend([len(tokens)]))
    hidden = forward(model.weights, model.config, ids, np.arange(len(tokens)), attend)
    return logits(model.weights, hidden)


@pytest.mark.theorem(
    "An orthogonal matrix folded into the weights, with the gains folded first and transforms "
    "before down_proj, leaves the logits unchanged",
    source="Ashkboos et al. 2024 (QuaRot, §3; SliceGPT, theorem 1)",
)
@pytest.mark.parametrize("family", FAMILIES)
@given(
    seed=st.integers(0, 99),
    stream=st.booleans(),
    heads=st.booleans(),
    mlp=st.booleans(),
)
@settings(max_examples=12)
def test_a_rotated_network_computes_the_same_function(family, seed, stream, heads, mlp):
    model = network(seed, **FAMILIES[family])
    rotated = rotate(model, Rotations(stream, heads, mlp, seed))
    for tokens in IDS:
        expected = outputs(model, tokens)
        found = outputs(rotated, tokens)
        assert np.abs(found - expected).max() <= 1e-11 * np.abs(expected).max()
    assert not rotated.config.tie_word_embeddings
    assert isinstance(rotated.weights["layers"][0]["down_proj"], RotatedLinear) == mlp


def test_every_rotation_is_applied():
    """Each changes the weights that its row of the table names, and no others."""
    model = network()
    plain = rotate(model, Rotations(stream=False, heads=False, mlp=False))
    changed = {
        "stream": {*PROJECTIONS},
        "heads": {"v_proj", "o_proj"},
        "mlp": {"down_proj"},
    }
    off = dict.fromkeys(changed, False)
    for name, expected in changed.items():
        rotated = rotate(model, Rotations(**(off | {name: True})))
        found = {
            key
            for key in PROJECTIONS
            if not np.allclose(
                getattr(
                    rotated.weights["layers"][0][key], "weight", rotated.weights["layers"][0][key]
                ).dequantize(),
                plain.weights["layers"][0][key].dequantize(),
            )
        }
        assert found == expected
        same = np.allclose(
            rotated.weights["embed_tokens"].dequantize(),
            plain.weights["embed_tokens"].dequantize(),
        )
        assert same == (name != "stream")


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_the_gains_leaves_ones_and_the_same_function(family):
    model = network(3, **FAMILIES[family])
    folded = SimpleNamespace(config=model.config, weights=fold_norms(model.weights))
    expected = outputs(model, IDS[0])
    assert np.abs(outputs(folded, IDS[0]) - expected).max() <= 1e-11 * np.abs(expected).max()
    for layer in [*folded.weights["layers"], {"norm": folded.weights["norm"]}]:
        for name in ("input_layernorm", "post_attention_layernorm", "norm"):
            assert np.all(layer.get(name, np.ones(1)) == 1)


def test_rotated_keys_are_cached_rotated_and_scores_are_unchanged():
    model = network(1)
    seen = []

    class Watched(CausalAttend):
        def __call__(self, layer, q, k, v):
            seen.append(k)
            return super().__call__(layer, q, k, v)

    tokens = IDS[0]
    ids = np.asarray(tokens)
    results = []
    for wrap in (lambda attend: attend, RotatedAttend):
        attend = wrap(Watched([len(tokens)]))
        hidden = forward(model.weights, model.config, ids, np.arange(len(tokens)), attend)
        results.append(logits(model.weights, hidden))
    assert np.abs(results[0] - results[1]).max() <= 1e-12 * np.abs(results[0]).max()
    layers = len(seen) // 2
    for plain, rotated in zip(seen[:1], seen[layers : layers + 1], strict=True):
        assert np.allclose(hadamard_transform(plain), rotated)
        assert not np.allclose(plain, rotated)


def test_the_signs_are_drawn_from_the_seed_and_the_matrix_is_orthogonal():
    a, b, c = random_hadamard(24, 0), random_hadamard(24, 0), random_hadamard(24, 1)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert np.allclose(a @ a.T, np.eye(24), atol=1e-14)
    assert np.allclose(np.abs(a), 24**-0.5)


def test_calibration_sees_the_inputs_that_the_quantised_weight_multiplies():
    """``down_proj`` of a rotated network reads transformed inputs, in GPTQ's Hessian too."""
    model = network(2)
    rotated = rotate(model)

    def inputs_of(source):
        run = next(walk(source, [IDS[0]]))
        return {names[0]: next(iter(run.inputs())) for names in run.stages()}

    plain = inputs_of(ModelSource(model.config, model.weights))
    found = inputs_of(ModelSource(rotated.config, rotated.weights))
    assert np.allclose(found["down_proj"], hadamard_transform(plain["down_proj"]))
    assert np.allclose(
        found["o_proj"].reshape(-1, 8),
        hadamard_transform(plain["o_proj"].reshape(-1, 8)),
    )  # R₂ is H / √D: v R₂ is the transform of a symmetric matrix of order 8


@pytest.mark.parametrize("method", ["rtn", "gptq", "smoothquant"])
def test_a_rotated_network_is_quantised_and_its_transform_stays(method):
    model = network(4)
    rotated = rotate(model)
    scheme = Scheme(8, "restricted", "channel")
    made, report = quantize_model(rotated, method, scheme, IDS)
    expected = outputs(model, IDS[0])
    assert np.abs(outputs(made, IDS[0]) - expected).max() <= 0.1 * np.abs(expected).max()
    for layer in made.weights["layers"]:
        assert isinstance(layer["down_proj"], RotatedLinear)
        assert set(layer) == set(model.weights["layers"][0])
    assert len(report.tensors) == 7 * model.config.num_hidden_layers
    assert all(row.output_error is None or row.output_error < 1e-3 for row in report.tensors)


def test_an_outlier_channel_disappears_in_the_rotated_stream():
    model = network(5)
    embedding = model.weights["embed_tokens"].dequantize()
    embedding[:, 3] *= 300
    weights = model.weights | {"embed_tokens": type(model.weights["embed_tokens"])(embedding)}
    spiked = SimpleNamespace(config=model.config, weights=weights)

    def ratio(record):
        x = record.weights["embed_tokens"].dequantize()
        return np.abs(x).max() / np.median(np.abs(x))

    assert ratio(spiked) > 100
    assert ratio(rotate(spiked)) < 4


def test_what_cannot_be_rotated_or_exported_is_named(tmp_path):
    model = network(6)
    quantised, _ = quantize_model(model, "rtn", Scheme(4, "half_integer", "channel"))
    with pytest.raises(InputError, match="q_proj is .*quantise it after the rotation"):
        rotate(quantised)
    odd = SimpleNamespace(config=replace(model.config, hidden_size=30), weights=model.weights)
    with pytest.raises(InputError, match="no Hadamard matrix of order 30"):
        rotate(odd)
    made, _ = quantize_model(rotate(model), "rtn", Scheme(4, "half_integer", "channel"))
    with pytest.raises(InputError, match=r"down_proj reads a Hadamard transform.*mlp=False"):
        export(tmp_path / "out", made)
    assert not (tmp_path / "out").exists()
