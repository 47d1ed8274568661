"""The single-token step against the network whose forward pass it repeats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from networks import NETWORKS, TOKENS, full_logits, random_tensors, tolerance
from refllm.decode.fast.single_token import SingleTokenStep, is_supported
from refllm.kv.contiguous import ContiguousCache
from refllm.model.attention import CausalAttend
from refllm.model.config import ModelConfig
from refllm.model.llama import build, forward, logits
from strategies import model_configs, seeds


def network(config: ModelConfig, seed: int, dtype: str = "float64"):
    return build(config, random_tensors(config, seed, dtype))


@pytest.mark.theorem(
    "Norm gains, 1/√D and the rotation's other half multiplied into the weights leave the "
    "function unchanged",
    source="W (g ⊙ x / rms) = (W ⊙ g) x / rms; rot(W x) = rot(W) x",
)
@given(config=model_configs(families=["llama"]), seed=seeds)
def test_a_single_token_step_is_the_network_at_every_position(config, seed):
    weights = network(config, seed)
    rng = np.random.default_rng(seed)
    assert is_supported(config, weights)
    tokens = rng.integers(0, config.vocab_size, 8)
    expected = logits(weights, forward(weights, config, tokens, np.arange(8), CausalAttend([8])))
    cache = ContiguousCache(config, 2, 9, like=weights["norm"])
    step = SingleTokenStep(weights, config, cache)
    for i, token in enumerate(tokens):
        found = step.step(int(token), 1)
        np.testing.assert_allclose(found, expected[i], rtol=0, atol=tolerance(config, 8, expected))
    assert cache.lengths == [0, 8]
    cache.truncate(1, 3)  # a rollback is done by the cache
    cache.keys[:, 1, :, :, 3:] = cache.values[:, 1, :, 3:] = np.nan
    for token in tokens[3:-1]:
        step.append(int(token), 1)
    np.testing.assert_allclose(
        step.step(int(tokens[-1]), 1), expected[-1], rtol=0, atol=tolerance(config, 8, expected)
    )
    step.step(0, 1)
    with pytest.raises(ValueError, match="holds 9 tokens and is full"):
        step.step(0, 1)


def test_it_continues_a_prefill_of_the_network():
    """The cache is the contiguous one: the single-token step reads what the network wrote
    there, and the other way round.
    """
    config = NETWORKS["llama"]
    weights = network(config, 1)
    expected = full_logits(weights, config)
    cache = ContiguousCache(config, 1, 50, like=weights["norm"])
    forward(weights, config, TOKENS[:20], np.arange(20), cache.view([20]))
    cache.advance([20])
    step = SingleTokenStep(weights, config, cache)
    atol = tolerance(config, 40, expected)
    for i in range(20, 30):
        np.testing.assert_allclose(step.step(int(TOKENS[i])), expected[i], rtol=0, atol=atol)
    hidden = forward(weights, config, TOKENS[30:], np.arange(30, 40), cache.view([10]))
    np.testing.assert_allclose(logits(weights, hidden), expected[30:], rtol=0, atol=atol)


def test_large_queries_and_keys_stay_finite():
    """q and k times 300: scores of 10⁵ whose exponentials would overflow."""
    config = NETWORKS["llama"]
    tensors = random_tensors(config, 1)
    for name in list(tensors):
        if "q_proj" in name or "k_proj" in name:
            tensors[name] = tensors[name] * 300.0
    weights = build(config, tensors)
    expected = full_logits(weights, config)
    cache = ContiguousCache(config, 1, 40, like=weights["norm"])
    step = SingleTokenStep(weights, config, cache)
    found = np.stack([step.step(int(token)).copy() for token in TOKENS[:40]])
    atol = 300.0**2 * tolerance(config, 40, expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    assert atol < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral-window"])
def test_families_with_more_operations_use_the_network(name):
    assert not is_supported(NETWORKS[name], network(NETWORKS[name], 0))


def test_quantised_and_wide_networks_use_the_network():
    config = NETWORKS["llama"]
    weights = network(config, 0)
    assert is_supported(config, weights)
    weights["layers"][0]["q_proj"] = object()
    assert not is_supported(config, weights)
    wide = ModelConfig("llama", 8, 192, 8, 1, 1, 1, 8)
    assert not is_supported(wide, network(wide, 0))
