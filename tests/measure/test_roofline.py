"""Every formula against the operations and bytes that an instrumented array module counted
while it ran.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from counting import CountingModule
from refllm.kv import batched_attention, contiguous
from refllm.kv.contiguous import ContiguousCache
from refllm.measure.device import DEVICES, DeviceSpec
from refllm.measure.memory import LLAMA_8B
from refllm.measure.roofline import (
    Cost,
    keys_seen,
    layer_parameters,
    mbu,
    mfu,
    projected_seconds,
    step_cost,
)
from refllm.model.attention import attention, flash_attention
from refllm.model.config import ModelConfig
from refllm.model.llama import build, forward, logits
from strategies import model_configs, partitions, seeds

BYTES = 8  # the instrumented network runs in float64
batches = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)
decodes = st.lists(st.integers(0, 50), min_size=1, max_size=5)


def weight_tensors(config, module):
    """Tensors under Hugging Face's names, every one of role "weight"."""
    n = config.hidden_size
    d = config.head_dim
    f = config.intermediate_size
    h = config.num_attention_heads * d
    g = config.num_key_value_heads * d
    layer = {
        "input_layernorm.weight": (n,),
        "post_attention_layernorm.weight": (n,),
        "self_attn.q_proj.weight": (h, n),
        "self_attn.k_proj.weight": (g, n),
        "self_attn.v_proj.weight": (g, n),
        "self_attn.o_proj.weight": (n, h),
        "mlp.gate_proj.weight": (f, n),
        "mlp.up_proj.weight": (f, n),
        "mlp.down_proj.weight": (n, f),
    }
    if config.attention_bias:
        layer |= {
            "self_attn.q_proj.bias": (h,),
            "self_attn.k_proj.bias": (g,),
            "self_attn.v_proj.bias": (g,),
        }
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
    shapes = {
        f"model.layers.{i}.{name}": s
        for i in range(config.num_hidden_layers)
        for name, s in layer.items()
    }
    shapes |= {"model.embed_tokens.weight": (config.vocab_size, n), "model.norm.weight": (n,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, n)
    return {name: module.array(np.full(shape, 0.5), "weight") for name, shape in shapes.items()}


def run_counted(config, batch, rows):
    """Run one step over a contiguous cache that holds each sequence's past; return what it
    counted.

    A prefill goes sequence by sequence: in one product it would compute the masked half of
    the scores too.
    """
    module = CountingModule()
    weights = build(config, weight_tensors(config, module))
    cache = ContiguousCache(
        config, len(batch), max(p + n for p, n in batch) or 1, like=module.array(np.zeros(1))
    )
    cache.keys.role = "kv"
    cache.values.role = "kv"
    cache.lengths[:] = [past for past, _ in batch]
    counts = [new for _, new in batch]
    tokens = module.array(np.zeros(sum(counts), np.int64))
    positions = module.array(np.asarray(cache.positions(counts), np.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched_attention, "MAX_SCORES", 0)
        hidden = forward(weights, config, tokens, positions, cache.view(counts))
    if rows:
        logits(weights, hidden[:rows])
    return module.counts


def with_attention(monkeypatch, function):
    monkeypatch.setattr(contiguous, "flash_attention", function)


@given(model_configs(), st.integers(1, 4), st.integers(0, 20))
@pytest.mark.theorem(
    "A decode step's FLOP and bytes, by formula, are those that the network executed",
    source=(
        "counting: 2·N_mm per token, 4·L·H·D·s for attention, one read of the weights, 2·L·G·D·b·s "
        "of the cache"
    ),
)
def test_decode_step_costs_what_was_executed(config, sequences, past):
    # the padded decode step reads the whole strip
    config = dataclasses.replace(config, sliding_window=None)
    batch = [(past, 1)] * sequences
    counted = run_counted(config, batch, sequences)
    cost = step_cost(config, batch, weight_bytes_per_param=BYTES, kv_bytes_per_value=BYTES)
    assert cost.linear_flops == counted.flops["weight"]
    assert cost.attention_flops == counted.flops["kv"]
    assert counted.flops[""] == 0
    assert cost.weight_bytes == counted.read["weight"]
    assert cost.kv_read_bytes == counted.read["kv"]
    assert cost.kv_write_bytes == counted.written["kv"]


@given(model_configs(), batches, st.data())
@pytest.mark.theorem(
    "A ragged step's FLOP (causal attention, windows included) and bytes, by formula, are "
    "those executed",
    source="counting: 4·L·H·D·(n·p + n(n+1)/2) for n new tokens after p",
)
def test_ragged_step_costs_what_was_executed(config, batch, data):
    assume(any(new > 1 for _, new in batch))
    # a window in half of the cases, of any family: few random configurations bring one that
    # is short enough
    config = dataclasses.replace(config, sliding_window=data.draw(st.none() | st.integers(1, 6)))
    tokens = sum(new for _, new in batch)
    rows = data.draw(st.integers(0, tokens))
    cost = step_cost(
        config, batch, weight_bytes_per_param=BYTES, kv_bytes_per_value=BYTES, logits_rows=rows
    )
    counted = run_counted(config, batch, rows)  # one tile of queries: keys are read once
    assert cost.linear_flops == counted.flops["weight"]
    assert cost.weight_bytes == counted.read["weight"]
    assert cost.kv_read_bytes == counted.read["kv"]
    assert cost.kv_write_bytes == counted.written["kv"]
    with pytest.MonkeyPatch.context() as patch:  # tiles of one query compute no masked score
        with_attention(patch, lambda *a, **k: flash_attention(*a, **k, tile_q=1))
        assert cost.attention_flops == run_counted(config, batch, rows).flops["kv"]


@given(model_configs(), batches)
def test_naive_attention_pays_for_the_masked_half(config, batch):
    """n·(p + n) scores instead of n·p + n(n+1)/2: n(n−1)/2 more a sequence, and a window
    saves it nothing.
    """
    assume(any(new > 1 for _, new in batch))
    config = dataclasses.replace(config, sliding_window=None)
    with pytest.MonkeyPatch.context() as patch:
        with_attention(patch, attention)
        counted = run_counted(config, batch, 0).flops["kv"]
    per_score = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    wasted = sum(new * (new - 1) // 2 for _, new in batch)
    assert counted == step_cost(config, batch).attention_flops + per_score * wasted


@given(model_configs(), decodes.filter(lambda d: len(set(d)) > 1))
def test_padded_decode_pays_for_the_longest_sequence(config, pasts):
    """The contiguous cache's batched decode step costs what so many sequences of the
    longest would.
    """
    config = dataclasses.replace(config, sliding_window=None)
    counted = run_counted(config, [(p, 1) for p in pasts], len(pasts))
    padded = step_cost(config, [(max(pasts), 1)] * len(pasts), kv_bytes_per_value=BYTES)
    assert counted.flops["kv"] == padded.attention_flops
    assert counted.read["kv"] == padded.kv_read_bytes


@given(st.integers(0, 30), st.integers(0, 30), st.none() | st.integers(1, 20))
def test_keys_seen_is_the_sum_over_queries(past, new, window):
    expected = sum(
        past + t + 1 if window is None else min(past + t + 1, window) for t in range(new)
    )
    assert keys_seen(past, new, window) == expected


@given(model_configs(), st.integers(1, 40), st.integers(0, 20), st.data())
@pytest.mark.theorem(
    "The FLOP of a prompt's chunks sum to those of the whole prompt, but for the LM head's term",
    source="counting: causal attention is additive over chunks",
)
def test_chunking_conserves_flops(config, length, past, data):
    chunks = data.draw(partitions(length))
    steps = []
    at = past
    for n in chunks:
        steps.append(step_cost(config, [(at, n)]))
        at += n
    total = sum(steps[1:], steps[0])
    whole = step_cost(config, [(past, length)])
    head = 2 * config.vocab_size * config.hidden_size  # one row of logits a chunk
    assert total.flops == whole.flops + (len(chunks) - 1) * head
    assert total.attention_flops == whole.attention_flops
    assert total.kv_write_bytes == whole.kv_write_bytes
    unsampled = [step_cost(config, [(past, n)], logits_rows=0).linear_flops for n in chunks]
    assert sum(unsampled) + head == whole.linear_flops


@given(model_configs(), st.integers(1, 60), st.integers(1, 9), st.sampled_from([1, 2, 4]))
@pytest.mark.theorem(
    "Decode attention does 2·(H/G)/b FLOP per byte, whatever the batch and the context",
    source="counting: 4·H·D·s FLOP over 2·G·D·s·b bytes",
)
def test_decode_attention_intensity_is_independent_of_batch_and_context(config, past, sequences, b):
    config = dataclasses.replace(config, sliding_window=None)
    cost = step_cost(config, [(past, 1)] * sequences, kv_bytes_per_value=b)
    assert (
        cost.attention_intensity
        == 2 * (config.num_attention_heads // config.num_key_value_heads) / b
    )
    drafts = step_cost(config, [(past, 4)], kv_bytes_per_value=b)  # verifying drafts multiplies it
    assert drafts.attention_intensity > 2 * cost.attention_intensity * (past / (past + 4))


@given(batches, batches)
def test_costs_of_sequences_add_up_but_weights_are_read_once(a, b):
    batched_attention = step_cost(LLAMA_8B, a + b)
    apart = step_cost(LLAMA_8B, a) + step_cost(LLAMA_8B, b)
    assert batched_attention.flops == apart.flops
    assert (
        batched_attention.kv_read_bytes + batched_attention.kv_write_bytes
        == apart.kv_read_bytes + apart.kv_write_bytes
    )
    if all(any(new for _, new in x) for x in (a, b)):
        stored = 2.0 * (LLAMA_8B.num_parameters - LLAMA_8B.vocab_size * LLAMA_8B.hidden_size)
        assert apart.weight_bytes - batched_attention.weight_bytes == stored


def test_constants_of_the_literature():
    """Llama-3-8B: 8.03 B parameters, 128 KiB of cache per token in fp16; its linear intensity
    is the batch size.
    """
    assert LLAMA_8B.num_parameters == 8_030_261_248
    assert layer_parameters(LLAMA_8B) == 218_103_808
    one = step_cost(LLAMA_8B, [(0, 1)])
    assert one.kv_write_bytes == 128 * 1024
    assert one.linear_flops == 2 * (32 * 218_103_808 + 128_256 * 4096)
    assert step_cost(LLAMA_8B, [(0, 1)] * 64).linear_intensity == pytest.approx(64, rel=1e-3)
    assert step_cost(
        LLAMA_8B, [(0, 1)] * 64, weight_bytes_per_param=0.5
    ).linear_intensity == pytest.approx(256, rel=1e-3)
    assert DEVICES["h200"].ridge == pytest.approx(206, abs=0.5)
    assert DEVICES["a100"].ridge == pytest.approx(153, abs=0.5)


@given(batches, st.floats(1e9, 1e15), st.floats(1e9, 1e13), st.floats(0, 1))
def test_projection_is_the_slower_limit(batch, flops, bandwidth, overhead):
    device = DeviceSpec("a device", flops, bandwidth, overhead)
    cost = step_cost(LLAMA_8B, batch)
    seconds = projected_seconds(cost, device)
    assert seconds - overhead >= cost.flops / flops * (1 - 1e-6) - 1e-12
    assert seconds - overhead >= cost.bytes / bandwidth * (1 - 1e-6) - 1e-12
    if cost.bytes:
        limited = cost.flops / flops if cost.intensity > device.ridge else cost.bytes / bandwidth
        assert seconds == pytest.approx(limited + overhead)
        # at the projected time without overhead one of the two resources is used to the
        # full
        bound = projected_seconds(cost, dataclasses.replace(device, overhead=0.0))
        # counted in the bytes, not in MBU's definition
        written = cost.kv_write_bytes / bound / bandwidth
        assert max(mfu(cost, bound, device), mbu(cost, bound, device) + written) == pytest.approx(1)


def test_the_empty_step_costs_nothing():
    cost = step_cost(LLAMA_8B, [(5, 0)])
    assert cost == step_cost(LLAMA_8B, []) == Cost(0, 0, 0, 0, 0)
    assert cost.intensity == cost.linear_intensity == cost.attention_intensity == math.inf
    assert projected_seconds(cost, DeviceSpec("a device", 1, 1, 0.5)) == 0.5


@pytest.mark.parametrize(
    ("batch", "rows"), [([(-1, 1)], None), ([(1, -1)], None), ([(0, 2)], 3), ([(0, 2)], -1)]
)
def test_impossible_steps_are_rejected(batch, rows):
    with pytest.raises(ValueError, match="step_cost"):
        step_cost(LLAMA_8B, batch, logits_rows=rows)


@pytest.mark.parametrize("bytes_", [-1, float("nan"), float("inf")])
def test_bytes_are_finite_and_not_negative(bytes_):
    for name in ("weight_bytes_per_param", "kv_bytes_per_value"):
        with pytest.raises(ValueError, match="step_cost"):
            step_cost(LLAMA_8B, [(0, 1)], **{name: bytes_})


def test_what_takes_no_bytes_is_free():
    """Weights that never leave the cache, or a step without a cache: 0 bytes are allowed."""
    plain = step_cost(LLAMA_8B, [(5, 1)])
    cached = step_cost(LLAMA_8B, [(5, 1)], weight_bytes_per_param=0)
    assert cached.weight_bytes == 0
    assert cached.kv_read_bytes == plain.kv_read_bytes > 0
    without = step_cost(LLAMA_8B, [(5, 1)], kv_bytes_per_value=0)
    assert without.kv_read_bytes == without.kv_write_bytes == 0
    assert without.weight_bytes == plain.weight_bytes > 0


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_share_of_the_peak_needs_a_time(seconds):
    for share in (mfu, mbu):
        with pytest.raises(ValueError, match="finite time above 0"):
            share(step_cost(LLAMA_8B, [(0, 1)]), seconds, DEVICES["h200"])


@given(seeds)
def test_counting_runs_numpy_unchanged(seed):
    """The instrument itself: the counted network's logits are NumPy's."""
    rng = np.random.default_rng(seed)
    config = ModelConfig("qwen3", 11, 8, 6, 2, 4, 2, 4, qk_norm=True)
    module = CountingModule()
    plain = {k: rng.standard_normal(v.shape) for k, v in weight_tensors(config, module).items()}
    tokens = rng.integers(0, 11, 7)
    results = []
    for wrap in (np.asarray, module.array):
        weights = build(config, {k: wrap(v) for k, v in plain.items()})
        cache = ContiguousCache(config, 1, 9, like=wrap(np.zeros(1)))
        hidden = forward(weights, config, wrap(tokens), wrap(np.arange(7)), cache.view([7]))
        results.append(logits(weights, hidden))
    np.testing.assert_array_equal(results[0], results[1].bare)
