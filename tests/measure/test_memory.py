"""Bytes by formula against the bytes of a real weight tree and of a real cache."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_roofline import weight_tensors

from counting import CountingModule
from refllm.kv.contiguous import ContiguousCache
from refllm.measure.memory import (
    LLAMA_8B,
    LLAMA_70B,
    human,
    kv_bytes,
    kv_bytes_per_token,
    long_context_example,
    max_sequences,
    max_tokens,
    parameters,
    weight_bytes,
)
from refllm.model.llama import build
from strategies import model_configs

bit_widths = st.sampled_from([1, 2, 3, 4, 4.5, 6.5625, 8, 16, 32])


def tree_bytes(node, seen):
    """Bytes of every distinct array and weight of the tree; a tied head is counted once."""
    if isinstance(node, dict):
        return sum(tree_bytes(v, seen) for k, v in node.items() if k != "rope_frequencies")
    if isinstance(node, list):
        return sum(tree_bytes(v, seen) for v in node)
    if id(node) in seen:
        return 0
    seen.add(id(node))
    return node.nbytes


@given(model_configs())
@pytest.mark.theorem(
    "Weight bytes by formula are the bytes of the built tree, a tied head counted once",
    source="counting: N = L·N_l + V·d·(1 if tied else 2), plus norms and biases",
)
def test_weight_bytes_are_those_of_the_tree(config):
    tensors = {
        k: v.bare.astype(np.float32) for k, v in weight_tensors(config, CountingModule()).items()
    }
    assert weight_bytes(config, 32) == tree_bytes(build(config, tensors), set())
    assert parameters(config).total == config.num_parameters


@given(
    model_configs(),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from(["float16", "float32", "float64"]),
)
@pytest.mark.theorem(
    "KV bytes by formula, 2·L·G·D·b per token, are the bytes that the cache allocated",
    source="counting: a key and a value for each layer, key head and dimension",
)
def test_kv_bytes_are_those_of_the_cache(config, sequences, tokens, dtype):
    cache = ContiguousCache(config, sequences, tokens, like=np.zeros(1, dtype))
    bits = 8 * np.dtype(dtype).itemsize
    assert kv_bytes(config, tokens, sequences, bits=bits) == cache.nbytes
    assert kv_bytes_per_token(config, bits) * tokens * sequences == cache.nbytes


def test_bytes_of_a_cache_are_rounded_up_once():
    """2·1·1·2 elements of 3 bits are 1.5 bytes per token: 2, 3 and 5 bytes for 1, 2 and 3."""
    config = dataclasses.replace(
        LLAMA_8B, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2
    )
    assert kv_bytes_per_token(config, 3) == 1.5
    assert [kv_bytes(config, n, bits=3) for n in (0, 1, 2, 3)] == [0, 2, 3, 5]
    assert kv_bytes(config, 1, 3, bits=3) == 5  # the sequences lie behind each other
    assert kv_bytes(config, 5, 0, bits=3) == 0


@given(model_configs(), bit_widths, bit_widths)
def test_bits_are_paid_by_the_parameters_they_belong_to(config, bits, other):
    p = parameters(config)
    exact = ((p.attention + p.mlp) * bits + (p.embedding + p.head + p.small) * other) / 8
    assert weight_bytes(config, bits, other_bits=other) == math.ceil(exact)
    assert (
        weight_bytes(config, bits)
        == weight_bytes(config, bits, other_bits=bits)
        == math.ceil(p.total * bits / 8)
    )


@given(st.floats(0, 1e12) | st.floats(0, 1e10), st.integers(1, 64), bit_widths, bit_widths)
@pytest.mark.theorem(
    "max_tokens and max_sequences are the largest that fit: one more exceeds the budget",
    source="refllm/measure/memory.py",
)
def test_what_fits_is_the_most_that_fits(budget, sequences, bits, kv_bits):
    def need(tokens, count):
        return weight_bytes(LLAMA_8B, bits) + kv_bytes_per_token(LLAMA_8B, kv_bits) * tokens * count

    context = max_tokens(LLAMA_8B, budget, sequences=sequences, bits=bits, kv_bits=kv_bits)
    assert context >= 0  # also where the weights alone exceed the budget
    assert context == 0 or need(context, sequences) <= budget
    assert need(context + 1, sequences) > budget
    count = max_sequences(LLAMA_8B, budget, 1000, bits=bits, kv_bits=kv_bits)
    assert count == 0 or need(1000, count) <= budget
    assert need(1000, count + 1) > budget


@pytest.mark.theorem(
    "A 70B model (80 layers, 64 heads of 128) needs 262.144 GB for 100,000 tokens in fp16, "
    "with 8 KV heads 32.768 GB",
    source="2·80·64·128·2 B · 100,000; the 40 GB of Lu 2025, §1.11, is neither",
)
def test_the_70b_example():
    assert list(long_context_example().values()) == [262_144_000_000, 32_768_000_000]
    # 100K as 100 · 1024
    assert list(long_context_example(102_400).values()) == [250 * 2**30, 31.25 * 2**30]
    assert kv_bytes(LLAMA_70B, 131_072) == 40 * 2**30  # the length at which 8 heads do take 40 GiB
    assert LLAMA_70B.num_parameters == 68_976_648_192
    assert LLAMA_8B.num_parameters == 8_030_261_248
    assert (LLAMA_70B.max_position_embeddings, LLAMA_8B.max_position_embeddings) == (4096, 8192)
    assert kv_bytes_per_token(LLAMA_8B) == 128 * 1024


def test_a_window_bounds_the_cache_that_forgets():
    config = dataclasses.replace(LLAMA_8B, family="mistral", sliding_window=4096)
    assert kv_bytes(config, 10_000, forget_window=True) == kv_bytes(config, 4096)
    assert kv_bytes(config, 100, forget_window=True) == kv_bytes(config, 100)
    assert kv_bytes(config, 10_000) == kv_bytes(LLAMA_8B, 10_000, forget_window=True)


def test_sizes_are_printed_in_decimal_and_binary():
    assert human(0) == "0 B"
    assert human(999) == "999 B"
    assert human(1_000_000) == "1.00 MB (0.95 MiB)"
    assert human(32_768_000_000) == "32.77 GB (30.52 GiB)"
    assert human(5e15) == "5000.00 TB (4547.47 TiB)"


@pytest.mark.parametrize(
    "call",
    [
        lambda: weight_bytes(LLAMA_8B, 0),
        lambda: weight_bytes(LLAMA_8B, -1, other_bits=16),
        lambda: weight_bytes(LLAMA_8B, 4, other_bits=math.inf),
        lambda: kv_bytes(LLAMA_8B, 1, bits=math.nan),
        lambda: kv_bytes(LLAMA_8B, -1),
        lambda: kv_bytes(LLAMA_8B, math.inf),
        lambda: max_tokens(LLAMA_8B, math.inf),
        lambda: max_sequences(LLAMA_8B, math.nan, 8),
        lambda: max_tokens(LLAMA_8B, 1e9, sequences=0),
        lambda: max_sequences(LLAMA_8B, 1e9, 0),
    ],
)
def test_impossible_sizes_are_rejected(call):
    with pytest.raises(ValueError, match=r"must be positive|sequence|context|budget"):
        call()
