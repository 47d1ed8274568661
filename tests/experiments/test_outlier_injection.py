"""Injected outliers change no bit of what a network computes, and SmoothQuant removes them,
whatever α.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import to_host
from networks import NETWORKS, TOKENS, full_logits, random_tensors
from refllm.experiments.outlier_injection import (
    INPUTS,
    NORM_INPUTS,
    choose_channels,
    inject_key_outliers,
    inject_outliers,
)
from refllm.model.attention import CausalAttend
from refllm.model.llama import build, forward
from refllm.quant.smoothquant import migration_scale, smooth_layer
from refllm.quant.taps import tapped
from strategies import seeds

FACTORS = st.sampled_from([2.0**k for k in (-3, 0, 1, 7, 10)])


def weights_of(family, seed=0, xp=np, dtype="float32"):
    config = NETWORKS[family]
    return config, build(
        config, {k: xp.asarray(v) for k, v in random_tensors(config, seed, dtype).items()}
    )


def absmax_of(config, weights):
    """max |x| of each input, by (layer, projection)."""
    seen = {}
    full_logits(
        tapped(weights, lambda i, name, x: seen.setdefault((i, name), np.abs(x).max(axis=0))),
        config,
    )
    return seen


@pytest.mark.theorem(
    "Measuring a channel between a norm (or up_proj) and its readers in another power of two "
    "changes no bit of the "
    "network's output",
    source="products by powers of two are exact",
)
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3-tied", "mistral-window", "llama-tied-mha"]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=4)
@given(seed=seeds, factor=FACTORS, inputs=st.sets(st.sampled_from(sorted(INPUTS))))
def test_invariance_injection_is_bit_exact(xp, family, dtype, seed, factor, inputs):
    config, weights = weights_of(family, seed, xp, dtype)
    channels = choose_channels(config.hidden_size, 5, np.random.default_rng(seed))
    # the same layout of memory on both sides: ``fold`` makes weights of their own, which
    # the library multiplies alike
    still = inject_outliers(weights, channels, 1.0, INPUTS)
    injected = inject_outliers(weights, channels, factor, sorted(inputs))
    assert np.array_equal(full_logits(injected, config, xp), full_logits(still, config, xp))
    assert injected.keys() == weights.keys()


@settings(max_examples=8)
@given(seed=seeds, factor=FACTORS, name=st.sampled_from(sorted(INPUTS)))
def test_exact_value_only_the_chosen_channels_grow_and_by_the_factor(seed, factor, name):
    config, weights = weights_of("llama", seed)
    channels = choose_channels(config.hidden_size, 3, np.random.default_rng(seed))
    before = absmax_of(config, weights)
    after = absmax_of(config, inject_outliers(weights, channels, factor, [name]))
    for (layer, target), old in before.items():
        grown = np.ones(len(old), dtype="float32")
        if target in INPUTS[name].targets:
            grown[channels] = factor
        assert np.array_equal(after[layer, target], old * grown)


@pytest.mark.theorem(
    "SmoothQuant's network does not depend on injected outliers, whatever α: s is p times as "
    "large where they are",
    source="(p a)^α / (w/p)^(1−α) = p · a^α / w^(1−α)",
)
@settings(max_examples=10)
@given(seed=seeds, alpha=st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]), factor=FACTORS)
def test_invariance_smoothing_takes_them_out_again(seed, alpha, factor):
    config, weights = weights_of("llama", seed, dtype="float64")
    channels = choose_channels(config.hidden_size, 4, np.random.default_rng(seed))
    injected = inject_outliers(weights, channels, factor)
    seen = absmax_of(config, weights)
    after = absmax_of(config, injected)
    eps = float(np.finfo("float64").eps)
    for i, (plain, grown) in enumerate(zip(weights["layers"], injected["layers"], strict=True)):
        names = {"input_layernorm": "q_proj", "post_attention_layernorm": "up_proj"}
        smooth, _ = smooth_layer(plain, {n: seen[i, n] for n in names.values()}, alpha)
        again, _ = smooth_layer(grown, {n: after[i, n] for n in names.values()}, alpha)
        for norm in names:
            np.testing.assert_allclose(again[norm], smooth[norm], rtol=16 * eps)
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            np.testing.assert_allclose(
                again[name].dequantize(), smooth[name].dequantize(), rtol=16 * eps
            )


def test_injection_is_the_migration_run_backwards():
    config, weights = weights_of("llama", dtype="float64")
    weight = weights["layers"][0]["gate_proj"].dequantize()
    absmax = np.ones(config.hidden_size)
    injected = inject_outliers(weights, [3], 128.0)["layers"][0]["gate_proj"].dequantize()
    grown = absmax * np.where(np.arange(config.hidden_size) == 3, 128.0, 1.0)
    ratio = migration_scale(grown, injected) / migration_scale(absmax, weight)
    np.testing.assert_allclose(ratio, grown, rtol=1e-14)


def test_the_weights_that_are_injected_into_do_not_change():
    weights = weights_of("llama")[1]
    before = [
        (layer["input_layernorm"].tobytes(), layer["up_proj"].dequantize().tobytes())
        for layer in weights["layers"]
    ]
    inject_outliers(weights, [0, 7], 128.0, INPUTS)
    assert [
        (layer["input_layernorm"].tobytes(), layer["up_proj"].dequantize().tobytes())
        for layer in weights["layers"]
    ] == before


@pytest.mark.theorem(
    "Keys measured in another power of two, and queries in its inverse, leave every bit of "
    "the output as it was",
    source=(
        "products by powers of two are exact; a rotation mixes the two channels of a pair, and "
        "no others"
    ),
)
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "llama3-rope", "mistral-window", "llama-tied-mha"]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=4)
@given(seed=seeds, factor=FACTORS)
def test_invariance_injection_into_keys_is_bit_exact(xp, family, dtype, seed, factor):
    config, weights = weights_of(family, seed, xp, dtype)
    pairs = choose_channels(config.head_dim // 2, 2, np.random.default_rng(seed))
    still, injected = (inject_key_outliers(weights, config, pairs, by) for by in (1.0, factor))
    assert np.array_equal(full_logits(injected, config, xp), full_logits(still, config, xp))


def keys_of(config, weights):
    """The keys that the network hands to its memory, [L, S, G, D]."""
    kept = []
    plain = CausalAttend([len(TOKENS)], config.sliding_window)

    def attend(layer, q, k, v):
        kept.append(k.copy())
        return plain(layer, q, k, v)

    forward(weights, config, TOKENS, np.arange(len(TOKENS)), attend)
    return np.stack(kept)


@settings(max_examples=8)
@given(seed=seeds, factor=FACTORS, family=st.sampled_from(["llama", "qwen2", "mistral-window"]))
def test_exact_value_both_channels_of_an_outlier_pair_grow_and_no_others(seed, factor, family):
    config, weights = weights_of(family, seed, dtype="float64")
    pairs = choose_channels(config.head_dim // 2, 2, np.random.default_rng(seed))
    grown = np.ones(config.head_dim)
    grown[[*pairs, *(i + config.head_dim // 2 for i in pairs)]] = factor
    before = keys_of(config, weights)
    after = keys_of(config, inject_key_outliers(weights, config, pairs, factor))
    np.testing.assert_allclose(
        after, before * grown, rtol=0, atol=1e-12 * np.abs(before * grown).max()
    )


def test_keys_that_cannot_get_outliers_are_rejected():
    config, weights = weights_of("llama")
    for pairs in ([-1], [5]):
        with pytest.raises(ValueError, match="a head has pairs 0 to 4, got"):
            inject_key_outliers(weights, config, pairs)
    with pytest.raises(ValueError, match="a factor of 3 is no power of two"):
        inject_key_outliers(weights, config, [0], 3)
    config, weights = weights_of("qwen3")
    with pytest.raises(ValueError, match="keys that are normed take no factor"):
        inject_key_outliers(weights, config, [0])
    tiny = replace(NETWORKS["llama"], num_hidden_layers=1)
    tensors = random_tensors(tiny, 0, "float32")
    tensors["model.layers.0.self_attn.q_proj.weight"][2, 1] = (
        np.finfo("float32").smallest_subnormal * 3
    )
    with pytest.raises(ValueError, match="layer 0's q_proj has values that 8 rounds"):
        inject_key_outliers(build(tiny, tensors), tiny, [2])
    config, weights = weights_of("qwen2")
    for name, value in (
        ("q_bias", np.finfo("float32").smallest_subnormal),
        ("k_bias", np.float32(3e38)),
    ):
        layers = [layer | {name: np.full_like(layer[name], value)} for layer in weights["layers"]]
        with (
            np.errstate(over="ignore"),
            pytest.raises(ValueError, match=f"layer 0's {name} has values that 8 rounds"),
        ):
            inject_key_outliers(weights | {"layers": layers}, config, [2])


def test_channels_are_drawn_without_repetition():
    rng = np.random.default_rng(0)
    drawn = [choose_channels(40, 3, rng) for _ in range(50)]
    assert all(len(set(c)) == 3 and c == sorted(c) and 0 <= c[0] and c[-1] < 40 for c in drawn)
    assert len({tuple(c) for c in drawn}) > 40
    assert choose_channels(40, 0, rng) == []
    with pytest.raises(ValueError, match="41 of 40 channels"):
        choose_channels(40, 41, rng)


def test_factors_inputs_channels_and_weights_that_do_not_fit_are_rejected():
    config, weights = weights_of("llama")
    for factor in (3.0, 0.0, -2.0, float("inf"), float("nan"), 100.0):
        with pytest.raises(ValueError, match="is no power of two"):
            inject_outliers(weights, [1], factor)
    with pytest.raises(
        ValueError,
        match="no input is called heads; they are attention input, MLP input, MLP hidden",
    ):
        inject_outliers(weights, [1], 2.0, ["heads"])
    for channel in (-1, config.hidden_size):
        with pytest.raises(ValueError, match=r"the attention input has channels 0 to 39, got"):
            inject_outliers(weights, [channel], 2.0, NORM_INPUTS)
    tiny = replace(NETWORKS["llama"], num_hidden_layers=1)
    tensors = random_tensors(tiny, 0, "float32")
    tensors["model.layers.0.self_attn.k_proj.weight"][2, 1] = (
        np.finfo("float32").smallest_subnormal * 3
    )
    with pytest.raises(
        ValueError, match="layer 0's k_proj has weights too small to be divided by 128"
    ):
        inject_outliers(build(tiny, tensors), [1], 128.0)
    assert to_host(inject_outliers(build(tiny, tensors), [2], 128.0)["norm"]).shape == (40,)
