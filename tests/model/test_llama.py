"""The network: against its definition in loops, and against itself in other chunks, batches
and positions.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fakecupy
from conftest import to_host
from networks import random_tensors, tolerance
from refllm.kv.contiguous import ContiguousCache
from refllm.model.attention import CausalAttend
from refllm.model.config import ModelConfig
from refllm.model.llama import build, forward, logits
from refllm.model.naive import naive_logits
from refllm.model.rope import Llama3Scaling
from refllm.model.weights import Dense
from refllm.train.backward import hidden_states
from strategies import model_configs, partitions, seeds


def built(xp, config: ModelConfig, seed: int, dtype: str = "float64"):
    return build(
        config, {name: xp.asarray(t) for name, t in random_tensors(config, seed, dtype).items()}
    )


def ids(xp, tokens: list[int]):
    return xp.asarray(np.array(tokens, dtype=np.int64))


def run(
    xp, weights, config: ModelConfig, sequences: list[list[int]], first: int = 0
) -> list[np.ndarray]:
    """Hidden states of each sequence, all in one ragged batch without a cache; positions
    start at ``first``.
    """
    positions = [first + i for tokens in sequences for i in range(len(tokens))]
    attend = CausalAttend([len(tokens) for tokens in sequences], config.sliding_window)
    out = to_host(
        forward(
            weights,
            config,
            ids(xp, [t for tokens in sequences for t in tokens]),
            ids(xp, positions),
            attend,
        )
    )
    return [out[a:b] for a, b in pairwise(np.cumsum([0, *map(len, sequences)]).tolist())]


def run_chunked(
    xp, weights, config: ModelConfig, sequences: list[list[int]], chunks: list[list[int]]
) -> list[np.ndarray]:
    """The same through a cache: step i brings ``chunks[b][i]`` tokens of sequence b, 0 once
    it is finished.
    """
    like = xp.zeros(1, dtype=weights["norm"].dtype)
    cache = ContiguousCache(config, len(sequences), max(map(len, sequences)), like=like)
    outputs: list[list[np.ndarray]] = [[] for _ in sequences]
    for i in range(max(map(len, chunks))):
        counts = [mine[i] if i < len(mine) else 0 for mine in chunks]
        tokens = [t for b, n in enumerate(counts) for t in sequences[b][cache.lengths[b] :][:n]]
        positions = cache.positions(counts)
        out = to_host(
            forward(weights, config, ids(xp, tokens), ids(xp, positions), cache.view(counts))
        )
        cache.advance(counts)
        for b, (a, z) in enumerate(pairwise(np.cumsum([0, *counts]).tolist())):
            outputs[b].append(out[a:z])
    return [np.concatenate(parts) for parts in outputs]


@st.composite
def batches(draw, most: int = 3):
    """A network, a seed for its weights, and one to three sequences of its tokens."""
    config = draw(model_configs())
    token = st.integers(0, config.vocab_size - 1)
    sequences = draw(st.lists(st.lists(token, min_size=1, max_size=10), min_size=1, max_size=most))
    return config, draw(seeds), sequences


@pytest.mark.theorem(
    "the network is its definition, of every family: RMSNorm, biases, query/key norms, RoPE "
    "as a complex rotation, grouped heads, the window, SwiGLU",
    source="Touvron et al. 2023; Jiang et al. 2023 (Mistral); Qwen2, Qwen3 reports; in "
    "loops in refllm/model/naive.py",
)
@given(batches(most=1))
def test_network_is_its_definition(xp, batch):
    config, seed, (tokens,) = batch
    weights = built(xp, config, seed)
    hidden = run(xp, weights, config, [tokens])[0]
    ours = to_host(logits(weights, xp.asarray(hidden)))
    expected = naive_logits(config, random_tensors(config, seed), tokens)
    np.testing.assert_allclose(
        ours, expected, rtol=0, atol=tolerance(config, len(tokens), expected)
    )


@pytest.mark.parametrize(
    "dropped", [(), ("k_proj",), ("up_proj",)], ids=["joint", "k alone", "up alone"]
)
def test_fused_weights_compute_the_definition(xp, dropped):
    """Widths of 64, which are stored in blocks and multiplied together, unless one of them
    was replaced.
    """
    config = ModelConfig("qwen3", 64, 64, 128, 2, 4, 2, 32, attention_bias=True, qk_norm=True)
    tensors = random_tensors(config, 0)
    tokens = list(range(9))
    weights = built(xp, config, 0)
    for layer in weights["layers"]:
        assert (layer["k_proj"].fused is not None) == (xp is np)
        layer |= {name: Dense(xp.asarray(layer[name].dequantize())) for name in dropped}
    ours = to_host(logits(weights, xp.asarray(run(xp, weights, config, [tokens])[0])))
    expected = naive_logits(config, tensors, tokens)
    np.testing.assert_allclose(
        ours, expected, rtol=0, atol=tolerance(config, len(tokens), expected)
    )


@pytest.mark.theorem(
    "forward(…, rows) = forward(…)[rows]: the last layer may compute the requested rows only",
    source="row by row",
)
@given(batches(), st.data())
def test_chosen_rows_are_the_rows_of_the_full_forward(xp, batch, data):
    config, seed, sequences = batch
    weights = built(xp, config, seed)
    tokens = [t for sequence in sequences for t in sequence]
    positions = [i for sequence in sequences for i in range(len(sequence))]
    rows = data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=4))

    def hidden(*chosen):
        attend = CausalAttend([len(sequence) for sequence in sequences], config.sliding_window)
        return to_host(
            forward(weights, config, ids(xp, tokens), ids(xp, positions), attend, *chosen)
        )

    full = hidden()
    some = hidden(ids(xp, rows))
    assert some.shape == (len(rows), config.hidden_size)
    np.testing.assert_allclose(some, full[rows], rtol=0, atol=tolerance(config, len(tokens), full))


@pytest.mark.parametrize(
    "without",
    [
        {"sliding_window": None},
        {"rope_scaling": None},
        {"rope_theta": 1e6},
        {"attention_bias": False},
        {"qk_norm": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_switch_changes_the_output(without):
    """The comparison above is not vacuous: with a switch off the definition gives other
    logits.
    """
    config = ModelConfig(
        "llama",
        29,
        16,
        24,
        2,
        4,
        2,
        8,
        rope_theta=500.0,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16),
        sliding_window=4,
        attention_bias=True,
        qk_norm=True,
    )
    tensors = random_tensors(config, 0)
    tokens = list(range(12))
    full = naive_logits(config, tensors, tokens)
    changed = replace(config, **without)
    dropped = {k: v for k, v in tensors.items() if changed.attention_bias or not k.endswith("bias")}
    assert np.abs(naive_logits(changed, dropped, tokens) - full).max() > 1e6 * tolerance(
        config, 12, full
    )


@pytest.mark.theorem(
    "prefill in any chunks, decode included, of any ragged batch = one causal forward of "
    "each sequence alone",
    source="serving arithmetic; the attend seam",
)
@given(batches(), st.data())
def test_chunked_prefill_and_decode_are_the_full_forward(xp, batch, data):
    config, seed, sequences = batch
    weights = built(xp, config, seed)
    chunks = [data.draw(partitions(len(tokens), empty=True)) for tokens in sequences]
    for tokens, mine in zip(
        sequences, run_chunked(xp, weights, config, sequences, chunks), strict=True
    ):
        alone = run(xp, weights, config, [tokens])[0]
        np.testing.assert_allclose(mine, alone, rtol=0, atol=tolerance(config, len(tokens), alone))


@pytest.mark.theorem(
    "decoding token by token, sequences of different lengths in one batch = the full forward",
    source="serving arithmetic",
)
@given(batches(), st.data())
def test_batched_decode_is_the_full_forward(xp, batch, data):
    config, seed, sequences = batch
    weights = built(xp, config, seed)
    steps = data.draw(st.integers(0, min(map(len, sequences)) - 1))
    chunks = [[len(tokens) - steps] + [1] * steps for tokens in sequences]
    for tokens, mine in zip(
        sequences, run_chunked(xp, weights, config, sequences, chunks), strict=True
    ):
        alone = run(xp, weights, config, [tokens])[0]
        ours, full = (to_host(logits(weights, xp.asarray(h))) for h in (mine, alone))
        np.testing.assert_allclose(ours, full, rtol=0, atol=tolerance(config, len(tokens), full))


@pytest.mark.theorem(
    "a sequence's hidden states do not depend on its neighbours in the batch, nor on their order",
    source="the attend seam",
)
@given(batches(), st.data())
def test_batch_composition_changes_nothing(xp, batch, data):
    config, seed, sequences = batch
    weights = built(xp, config, seed)
    order = data.draw(st.permutations(range(len(sequences))))
    shuffled = run(xp, weights, config, [sequences[b] for b in order])
    for b, mine in zip(order, shuffled, strict=True):
        alone = run(xp, weights, config, [sequences[b]])[0]
        np.testing.assert_allclose(
            mine, alone, rtol=0, atol=tolerance(config, len(sequences[b]), alone)
        )


@pytest.mark.theorem("a token's hidden state depends on no later token", source="causality")
@given(batches(most=1), st.data())
def test_a_prefix_ignores_what_follows(xp, batch, data):
    config, seed, (tokens,) = batch
    weights = built(xp, config, seed)
    cut = data.draw(st.integers(1, len(tokens)))
    whole, part = (run(xp, weights, config, [t])[0] for t in (tokens, tokens[:cut]))
    np.testing.assert_allclose(
        whole[:cut], part, rtol=0, atol=tolerance(config, len(tokens), whole)
    )


@pytest.mark.theorem(
    "adding a constant to all positions changes nothing: RoPE is relative",
    source="Su et al. 2021, §3.2.2",
)
@given(batches(most=1), st.integers(0, 5000))
def test_positions_are_relative(xp, batch, shift):
    config, seed, (tokens,) = batch
    weights = built(xp, config, seed)
    here, there = (run(xp, weights, config, [tokens], first)[0] for first in (0, shift))
    # an angle of up to (shift + T) radians is rounded by eps times that
    bound = tolerance(config, len(tokens), here) * (1 + shift + len(tokens))
    np.testing.assert_allclose(there, here, rtol=0, atol=bound)


@given(model_configs(families=("llama",)), seeds, st.integers(1, 3), st.integers(1, 8))
def test_training_runs_the_same_network(config, seed, count, length):
    """``backward`` has a forward of its own, which keeps what the gradients need: it is
    this one.
    """
    tensors = random_tensors(config, seed)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (count, length))
    expected = np.concatenate(run(np, build(config, tensors), config, tokens.tolist()))
    ours = hidden_states(tensors, config, tokens)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance(config, length, expected))


def test_a_tied_head_is_the_embedding_itself(xp):
    config = ModelConfig("llama", 64, 8, 8, 1, 2, 1, 4, tie_word_embeddings=True)
    weights = built(xp, config, 0)
    assert weights["lm_head"] is weights["embed_tokens"]
    hidden = np.random.default_rng(0).standard_normal((3, 8))
    embedding = random_tensors(config, 0)["model.embed_tokens.weight"]
    expected = hidden @ embedding.T
    ours = to_host(logits(weights, xp.asarray(hidden)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance(config, 3, expected))


@pytest.mark.parametrize("foreign", ["tokens", "positions", "weights"])
def test_libraries_are_not_mixed(foreign):
    config = ModelConfig("llama", 64, 8, 8, 1, 2, 1, 4)
    libraries = dict.fromkeys(("tokens", "positions", "weights"), np) | {foreign: fakecupy}
    weights = built(libraries["weights"], config, 0)
    ids = np.arange(3)
    tokens = libraries["tokens"].asarray(ids)
    positions = libraries["positions"].asarray(ids)

    def attend(layer, q, k, v):
        raise AssertionError("computed before the check")

    with pytest.raises(TypeError, match="fakecupy and numpy are mixed"):
        forward(weights, config, tokens, positions, attend)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("chunks", [[6], [4, 1, 1]], ids=["prefill", "decode"])
def test_float32_stays_float32(xp, family, chunks):
    """No float64 scalar or angle leaks into the residual stream, which would double every
    later product.
    """
    config = ModelConfig(
        family, 30, 16, 24, 2, 4, 2, 8, attention_bias=family == "qwen2", qk_norm=family == "qwen3"
    )
    weights = built(xp, config, 0, "float32")
    narrow = run_chunked(xp, weights, config, [list(range(6))], [chunks])[0]
    assert narrow.dtype == np.float32
    wide = run(np, built(np, config, 0), config, [list(range(6))])[0]
    ratio = float(np.finfo(np.float32).eps) / float(np.finfo(np.float64).eps)
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=ratio * tolerance(config, 6, wide))


@pytest.mark.parametrize("lengths", [[3, 3], [1, 3]], ids=["same length", "ragged"])
def test_a_decode_step_waits_for_nothing(lengths):
    """On a device: no value comes back to the host, and what goes there does not grow with
    the layers.
    """
    to_device = []
    for layers in (1, 3):
        config = ModelConfig("llama", 30, 16, 24, layers, 4, 2, 8)
        weights = built(fakecupy, config, 0, "float32")
        cache = ContiguousCache(config, 2, 8, like=weights["norm"])
        for counts in (lengths, [1, 1]):
            tokens = [1] * sum(counts)
            positions = cache.positions(counts)
            with fakecupy.counting() as counted:
                attend = cache.view(counts)
                logits(
                    weights,
                    forward(
                        weights, config, ids(fakecupy, tokens), ids(fakecupy, positions), attend
                    ),
                )
            cache.advance(counts)
        assert counted.d2h == counted.syncs == 0
        to_device.append(counted.h2d)
    assert to_device[0] == to_device[1] <= 6
