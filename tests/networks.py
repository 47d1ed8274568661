"""Random networks, and the network's definition in loops: one token, one head and one key
at a time.

The weights are larger than a fresh network's, so that attention is far from uniform and the
rotation, the window, the biases and the norms all change the output: a test that passes
without one of them proves nothing.
"""

from __future__ import annotations

import cmath
import math
from functools import cache
from typing import Any

import numpy as np

from refllm.backend import to_numpy
from refllm.checkpoints.tensor_files import tensor_shapes
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.model.attention import CausalAttend
from refllm.model.config import ModelConfig, RopeScaling
from refllm.model.llama import forward, logits

EPS = float(np.finfo(np.float64).eps)

# One network of each kind that is loaded, and a prompt longer than their windows and
# "original" RoPE contexts.
VOCAB = 300
TOKENS = np.random.default_rng(7).integers(0, VOCAB, 40)
SIZES = {"vocab_size": VOCAB, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 32)
NETWORKS = {
    "llama": ModelConfig("llama", **SIZES, head_dim=10, bos_token_id=0, eos_token_ids=(0,)),
    "llama-tied-mha": ModelConfig(
        "llama", **SIZES | {"num_key_value_heads": 4}, head_dim=10, tie_word_embeddings=True
    ),
    "llama3-rope": ModelConfig(
        "llama", **SIZES, head_dim=10, rope_theta=500.0, rope_scaling=LLAMA3, eos_token_ids=(1, 2)
    ),
    "mistral-window": ModelConfig("mistral", **SIZES, head_dim=16, sliding_window=7),
    "mistral-no-window": ModelConfig("mistral", **SIZES, head_dim=10),
    "qwen2": ModelConfig("qwen2", **SIZES, head_dim=10, attention_bias=True, rope_theta=1e6),
    "qwen3-tied": ModelConfig(
        "qwen3", **SIZES, head_dim=16, qk_norm=True, tie_word_embeddings=True, rms_norm_eps=1e-6
    ),
    "qwen3": ModelConfig("qwen3", **SIZES, head_dim=16, qk_norm=True),
}


@cache
def tokenizer() -> Tokenizer:
    """A small tokenizer: fewer ids than ``VOCAB``."""
    return Tokenizer.train(["def f(x):\n    return x\n" * 3], 280)


def full_logits(weights: Any, config: ModelConfig, xp: Any = np) -> np.ndarray:
    """Host logits [T, V] of ``TOKENS`` by the library, without a cache."""
    attend = CausalAttend([len(TOKENS)], config.sliding_window)
    hidden = forward(
        weights, config, xp.asarray(TOKENS), xp.asarray(np.arange(len(TOKENS))), attend
    )
    return to_numpy(logits(weights, hidden))


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Within 2e-5 of the largest logit: the bound that the project states for float32."""
    assert ours.shape == theirs.shape
    return bool(np.abs(ours.astype(np.float64) - theirs).max() <= 2e-5 * np.abs(theirs).max())


def random_tensors(config: ModelConfig, seed: int, dtype: Any = "float64") -> dict[str, np.ndarray]:
    """Host tensors under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config):
        x = rng.standard_normal(shape)
        if name.endswith("bias"):
            x *= 0.5
        elif len(shape) == 1:
            x = 1.0 + 0.3 * x  # norm gains
        elif "embed_tokens" not in name:
            x *= (2.0 if "q_proj" in name or "k_proj" in name else 1.0) / math.sqrt(shape[1])
        tensors[name] = x.astype(dtype)
    return tensors


def tolerance(config: ModelConfig, count: int, out: np.ndarray) -> float:
    """Absolute error that two float64 computations of ``out`` for ``count`` tokens may
    differ by.

    Each of L layers sums at most n numbers, n·eps relative to their size; scores here are
    below 64 in size, and an error of a score is that of its weight.
    """
    n = max(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_dim,
        count,
    )
    return 64 * (config.num_hidden_layers + 1) * n * EPS * float(np.abs(out).max())


def naive_hidden(
    config: ModelConfig, tensors: dict[str, np.ndarray], tokens: list[int]
) -> np.ndarray:
    """Hidden states after the last norm, [T, N] in float64, of one sequence."""
    x = [tensors["model.embed_tokens.weight"][t].astype(np.float64) for t in tokens]
    for i in range(config.num_hidden_layers):
        weight = {
            k.removeprefix(f"model.layers.{i}."): v.astype(np.float64) for k, v in tensors.items()
        }
        attended = _attention(
            config, weight, [_norm(row, weight["input_layernorm.weight"], config) for row in x]
        )
        x = [
            row + weight["self_attn.o_proj.weight"] @ a for row, a in zip(x, attended, strict=True)
        ]
        for t, row in enumerate(x):
            h = _norm(row, weight["post_attention_layernorm.weight"], config)
            gate = weight["mlp.gate_proj.weight"] @ h
            silu = np.array([g / (1 + math.exp(-g)) for g in gate])
            x[t] = row + weight["mlp.down_proj.weight"] @ (
                silu * (weight["mlp.up_proj.weight"] @ h)
            )
    return np.stack(
        [_norm(row, tensors["model.norm.weight"].astype(np.float64), config) for row in x]
    )


def naive_logits(
    config: ModelConfig, tensors: dict[str, np.ndarray], tokens: list[int]
) -> np.ndarray:
    """Logits [T, V] in float64 of one sequence."""
    head = tensors["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return naive_hidden(config, tensors, tokens) @ head.astype(np.float64).T


def _norm(x: np.ndarray, gain: np.ndarray, config: ModelConfig) -> np.ndarray:
    return x / math.sqrt(sum(x**2) / len(x) + config.rms_norm_eps) * gain


def _attention(
    config: ModelConfig, weight: dict[str, np.ndarray], rows: list[np.ndarray]
) -> list[np.ndarray]:
    heads: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}
    for position, row in enumerate(rows):
        for letter, kept in heads.items():
            y = weight[f"self_attn.{letter}_proj.weight"] @ row
            y = y + weight.get(f"self_attn.{letter}_proj.bias", 0.0)
            y = y.reshape(-1, config.head_dim)
            if config.qk_norm and letter != "v":
                y = np.stack(
                    [_norm(head, weight[f"self_attn.{letter}_norm.weight"], config) for head in y]
                )
            kept.append(
                y if letter == "v" else np.stack([_rotated(head, position, config) for head in y])
            )
    out = []
    share = config.num_attention_heads // config.num_key_value_heads
    for t in range(len(rows)):
        seen = range(
            0 if config.sliding_window is None else max(0, t - config.sliding_window + 1), t + 1
        )
        mixed = []
        for h in range(config.num_attention_heads):
            scores = [
                heads["q"][t][h] @ heads["k"][j][h // share] / math.sqrt(config.head_dim)
                for j in seen
            ]
            p = [math.exp(s - max(scores)) for s in scores]
            mixed.append(
                sum(a * heads["v"][j][h // share] for a, j in zip(p, seen, strict=True)) / sum(p)
            )
        out.append(np.concatenate(mixed))
    return out


def _rotated(head: np.ndarray, position: int, config: ModelConfig) -> np.ndarray:
    """RoPE as multiplication of the complex numbers x_i + j·x_{i+D/2} by
    e^{j·position·θ_i}.
    """
    half = config.head_dim // 2
    turned = [
        complex(head[i], head[i + half]) * cmath.exp(1j * position * _frequency(config, i))
        for i in range(half)
    ]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def _frequency(config: ModelConfig, i: int) -> float:
    """θ_i; with Llama 3's scaling by the wavelength, as its authors wrote it."""
    frequency = config.rope_theta ** (-2 * i / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    if wavelength < s.original_max_position_embeddings / s.high_freq_factor:
        return frequency
    if wavelength > s.original_max_position_embeddings / s.low_freq_factor:
        return frequency / s.factor
    smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    return (1 - smooth) * frequency / s.factor + smooth * frequency
