"""The captured step against the network whose forward pass it repeats."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from networks import NETWORKS, TOKENS, full_logits, random_tensors, tolerance
from refllm.decode.fast import captured_step
from refllm.decode.fast.captured_step import CapturedStep, can_capture, make_decode_step
from refllm.kv.contiguous import ContiguousCache
from refllm.kv.paged import PagedKVCache
from refllm.model.attention import CausalAttend
from refllm.model.config import ModelConfig
from refllm.model.llama import build, forward, logits
from refllm.model.weights import Dense
from strategies import model_configs, seeds
from weight_layouts import PROCESSORS, on_processor

# Every output is a multiple of 64: in blocks, and q, k, v and gate, up are one product each
BLOCKED = ModelConfig("llama", 128, 64, 192, 2, 4, 2, 32)


def network(config: ModelConfig, seed: int, dtype: str = "float64"):
    return build(config, random_tensors(config, seed, dtype))


def full_forward(weights, config: ModelConfig, tokens) -> np.ndarray:
    """Logits after each token by the network, without a cache."""
    attend = CausalAttend([len(tokens)], config.sliding_window)
    return logits(
        weights, forward(weights, config, np.asarray(tokens), np.arange(len(tokens)), attend)
    )


@pytest.mark.theorem(
    "A captured step is the network: for any rows of any sequences, of a contiguous or a paged "
    "cache, in any order",
    source="what a call writes the next one reads",
)
@given(
    config=model_configs(families=["llama", "mistral"]) | st.just(BLOCKED),
    processor=st.sampled_from(PROCESSORS),
    paged=st.booleans(),
    steps=st.lists(
        st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any), min_size=1, max_size=5
    ),
    seed=seeds,
)
def test_a_captured_step_is_the_network(config, processor, paged, steps, seed):
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, config.vocab_size, (3, 16))
    with pytest.MonkeyPatch.context() as patch:
        on_processor(patch, *processor)
        patch.setattr(captured_step, "INITIAL_POSITIONS", 2)
        patch.setattr(captured_step, "MAX_POSITIONS", 9)
        weights = network(config, seed)
        assert can_capture(config, weights)
        step = CapturedStep(weights, config)
        expected = [full_forward(weights, config, text) for text in texts]
        like = weights["norm"]
        cache = (
            PagedKVCache(config, 18, 3, like=like, poison=True)
            if paged
            else ContiguousCache(config, 3, 16, like=like)
        )
        tables = [cache.table() for _ in range(3)] if paged else []
        done = [0, 0, 0]
        for counts in steps:
            for table, count in zip(tables, counts, strict=False):
                cache.reserve(table, count)
            where = (tables, counts) if paged else (counts,)
            tokens = [
                int(t)
                for text, s, n in zip(texts, done, counts, strict=True)
                for t in text[s : s + n]
            ]
            got = step(tokens, cache.positions(*where), cache.view(*where))
            cache.advance(*where)
            parts = [e[s : s + n] for e, s, n in zip(expected, done, counts, strict=True)]
            atol = max(tolerance(config, 16, e) for e in expected)
            np.testing.assert_allclose(got, np.concatenate(parts), rtol=0, atol=atol)
            done = [s + n for s, n in zip(done, counts, strict=True)]


def test_it_continues_a_prefill_of_the_network_and_the_other_way_round():
    config = NETWORKS["llama3-rope"]
    weights = network(config, 1)
    expected = full_logits(weights, config)
    cache = ContiguousCache(config, 1, 50, like=weights["norm"])
    step = CapturedStep(weights, config)
    forward(weights, config, TOKENS[:20], np.arange(20), cache.view([20]))
    cache.advance([20])
    atol = tolerance(config, 40, expected)
    for i in range(20, 30):
        np.testing.assert_allclose(
            step([int(TOKENS[i])], [i], cache.view([1]))[0], expected[i], rtol=0, atol=atol
        )
        cache.advance([1])
    hidden = forward(weights, config, TOKENS[30:], np.arange(30, 40), cache.view([10]))
    np.testing.assert_allclose(logits(weights, hidden), expected[30:], rtol=0, atol=atol)


def test_a_batch_of_many_rows_goes_through_the_network(monkeypatch):
    monkeypatch.setattr(captured_step, "MAX_ROWS", 4)
    config = NETWORKS["llama"]
    weights = network(config, 1)
    step = CapturedStep(weights, config)
    expected = full_logits(weights, config)
    for rows in (4, 5):
        cache = ContiguousCache(config, 1, rows, like=weights["norm"])
        got = step(TOKENS[:rows].tolist(), list(range(rows)), cache.view([rows]))
        np.testing.assert_allclose(
            got, expected[:rows], rtol=0, atol=tolerance(config, 40, expected)
        )
    assert list(step.captured) == [4]


def test_padding_rows_stay_zeros_whatever_the_memory_held(monkeypatch):
    """A batch of NaN leaves its memory to the next, smaller one, which computes a padding
    row.
    """
    on_processor(monkeypatch, "SkylakeX", 1)
    weights = network(BLOCKED, 0)
    weights["embed_tokens"] = Dense(
        np.where(np.arange(128)[:, None] < 4, np.nan, weights["embed_tokens"].dequantize())
    )
    step = CapturedStep(weights, BLOCKED)

    def logits_of(tokens: list[int]) -> np.ndarray:
        cache = ContiguousCache(BLOCKED, len(tokens), 4, like=weights["norm"])
        return step(tokens, [0] * len(tokens), cache.view([1] * len(tokens)))

    first = logits_of([9, 8, 7]).copy()
    assert np.isnan(logits_of([0, 1, 2, 3])).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(logits_of([9, 8, 7]), first)
    c = step.captured[3]
    assert c.x.shape[0] == 4
    assert not c.x[3].any()
    assert not c.h[3].any()


def test_a_smaller_batch_uses_the_memory_of_a_larger_one(monkeypatch):
    monkeypatch.setattr(captured_step, "MIN_ROWS", 1)
    config = NETWORKS["llama"]
    weights = network(config, 0)
    step = CapturedStep(weights, config)
    for rows in (1, 5, 2, 7):  # memory for 1 row, then 8
        cache = ContiguousCache(config, rows, 1, like=weights["norm"])
        step([3] * rows, [0] * rows, cache.view([1] * rows))
    assert step.rows_allocated == 8
    assert list(step.captured) == [5, 2, 7]
    assert np.shares_memory(step.captured[2].logits, step.captured[7].logits)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_families_with_more_operations_use_the_network(name):
    config = NETWORKS[name]
    weights = network(config, 0)
    assert not can_capture(config, weights)
    step = make_decode_step(weights, config)
    expected = full_logits(weights, config)
    cache = ContiguousCache(config, 1, 40, like=weights["norm"])
    got = step(TOKENS.tolist(), list(range(40)), cache.view([40]))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(config, 40, expected))


def test_quantised_networks_and_other_libraries_use_the_network(xp):
    config = NETWORKS["llama"]
    weights = build(config, {name: xp.asarray(t) for name, t in random_tensors(config, 0).items()})
    assert can_capture(config, weights) == (xp is np)
    assert isinstance(make_decode_step(weights, config), CapturedStep) == (xp is np)
    weights["layers"][0]["q_proj"] = object()
    assert not can_capture(config, weights)


@pytest.mark.parametrize(
    "change",
    [
        "a weight",
        "a gain",
        "a gain in place",
        "a layer",
        "a quantised weight",
        "norm",
        "lm_head",
        "embed_tokens",
        "all, in float32",
    ],
)
def test_exchanged_weights_count_from_the_next_step_on(change):
    config = NETWORKS["llama"]
    weights = network(config, 0)
    other = network(config, 1)
    step = CapturedStep(weights, config)

    def logits_of() -> np.ndarray:
        return step(
            [5, 6], [0, 0], ContiguousCache(config, 2, 1, like=weights["norm"]).view([1, 1])
        ).copy()

    def expected() -> np.ndarray:
        view = ContiguousCache(config, 2, 1, like=weights["norm"]).view([1, 1])
        return logits(weights, forward(weights, config, np.array([5, 6]), np.zeros(2, int), view))

    before = logits_of()
    layer = weights["layers"][0]
    if change == "a weight":
        layer["up_proj"] = other["layers"][0]["up_proj"]
    elif change == "a gain":
        layer["input_layernorm"] = other["layers"][0]["input_layernorm"]
    elif change == "a gain in place":
        layer["input_layernorm"] *= 3.0
    elif change == "a layer":
        weights["layers"][0] = other["layers"][0]
    elif change == "a quantised weight":
        layer["up_proj"] = _Twice(layer["up_proj"])
    elif change == "all, in float32":
        weights |= network(config, 1, "float32")
        assert logits_of().dtype == np.float32
    else:
        weights[change] = other[change]
    assert np.abs(logits_of() - before).max() > 1e-3
    coarse = float(np.finfo(expected().dtype).eps / np.finfo(np.float64).eps)
    np.testing.assert_allclose(
        logits_of(), expected(), rtol=0, atol=coarse * tolerance(config, 2, before)
    )


class _Twice:
    """A ``Linear`` that is no ``Dense``."""

    def __init__(self, weight: Dense):
        self.weight = weight
        self.shape = weight.shape

    def matmul(self, x):
        return 2 * self.weight.matmul(x)

    def dequantize(self):
        return 2 * self.weight.dequantize()


def test_a_copy_computes_by_itself():
    config = NETWORKS["llama"]
    weights = network(config, 0)
    step = CapturedStep(weights, config)

    def logits_of(one: CapturedStep, token: int) -> np.ndarray:
        return one([token], [0], ContiguousCache(config, 1, 1, like=weights["norm"]).view([1]))

    first = logits_of(step, 3).copy()
    copied = copy.deepcopy(step)
    np.testing.assert_array_equal(logits_of(copied, 3), first)
    kept = logits_of(step, 3)
    assert np.abs(logits_of(copied, 4) - first).max() > 1e-3
    np.testing.assert_array_equal(kept, first)


def test_far_positions_need_no_table():
    config = NETWORKS["llama"]
    weights = network(config, 0)
    step = CapturedStep(weights, config)
    for at in (10**6, captured_step.MAX_POSITIONS, captured_step.MAX_POSITIONS - 1):
        views = (ContiguousCache(config, 1, 1, like=weights["norm"]).view([1]) for _ in range(2))
        expected = logits(
            weights, forward(weights, config, np.array([3]), np.array([at]), next(views))
        )
        np.testing.assert_allclose(
            step([3], [at], next(views)), expected, rtol=0, atol=tolerance(config, 1, expected)
        )
        assert len(step.angles[0]) <= captured_step.MAX_POSITIONS
    assert len(step.angles[0]) == captured_step.MAX_POSITIONS


def test_a_network_of_two_dtypes_is_not_captured():
    config = NETWORKS["llama"]
    weights = network(config, 0)
    weights["layers"][1]["input_layernorm"] = weights["layers"][1]["input_layernorm"].astype(
        np.float32
    )
    assert not can_capture(config, weights)


def test_tokens_of_any_integer_type():
    config = NETWORKS["llama"]
    weights = network(config, 0)
    step = CapturedStep(weights, config)

    def logits_of(tokens, positions) -> np.ndarray:
        cache = ContiguousCache(config, 2, 8, like=weights["norm"])
        cache.lengths = [3, 5]
        return step(tokens, positions, cache.view([1, 1])).copy()

    expected = logits_of([1, 200], [3, 5])
    for tokens in (
        [1, np.uint64(200)],  # NumPy would make floats of the two
        [np.int8(1), np.uint8(200)],
        np.array([1, 200], dtype=np.uint8),
        np.array([1, 200], dtype=np.int16),
        np.array([1, 200], dtype=np.uint64),
        (1, 200),
    ):
        for positions in ([3, np.uint64(5)], np.array([3, 5], dtype=np.uint8), (3, 5)):
            np.testing.assert_array_equal(logits_of(tokens, positions), expected)


def test_an_empty_step_is_the_networks():
    config = NETWORKS["llama"]
    weights = network(config, 0)
    cache = ContiguousCache(config, 1, 4, like=weights["norm"])
    assert make_decode_step(weights, config)([], [], cache.view([0])).shape == (
        0,
        config.vocab_size,
    )


def test_float32_networks_are_captured_in_float32():
    config = dataclasses.replace(NETWORKS["llama"], rms_norm_eps=1e-5)
    weights = network(config, 3, "float32")
    cache = ContiguousCache(config, 1, 40, like=weights["norm"])
    step = CapturedStep(weights, config)
    got = step(TOKENS.tolist(), list(range(40)), cache.view([40]))
    assert got.dtype == np.float32
    expected = full_logits(network(config, 3), config)
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()
