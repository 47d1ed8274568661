"""Random networks of every architecture, and the rounding error that their outputs may have.

The weights are larger than a new network's, so that attention is far from uniform and the
rotation, the window, the biases and the norms all change the output: a test that passes
without one of them would prove nothing. ``refllm.model.naive`` is what outputs are compared
with.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from refllm.backend import to_numpy
from refllm.checkpoints.tensor_files import tensor_shapes
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.model.attention import CausalAttend
from refllm.model.config import ModelConfig
from refllm.model.llama import forward, logits
from refllm.model.rope import LinearScaling, Llama3Scaling, YarnScaling

EPS = float(np.finfo(np.float64).eps)

# One network of each kind that is loaded, and a prompt longer than their windows and
# "original" RoPE contexts.
VOCAB = 300
TOKENS = np.random.default_rng(7).integers(0, VOCAB, 40)
SIZES = {"vocab_size": VOCAB, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 32)
NETWORKS = {
    "llama": ModelConfig("llama", **SIZES, head_dim=10, bos_token_id=0, eos_token_ids=(0,)),
    "llama-tied-mha": ModelConfig(
        "llama", **SIZES | {"num_key_value_heads": 4}, head_dim=10, tie_word_embeddings=True
    ),
    "llama3-rope": ModelConfig(
        "llama", **SIZES, head_dim=10, rope_theta=500.0, rope_scaling=LLAMA3, eos_token_ids=(1, 2)
    ),
    "llama-yarn": ModelConfig(
        "llama", **SIZES, head_dim=16, rope_theta=500.0, rope_scaling=YarnScaling(4.0, 32, 1.2, 8.0)
    ),
    "qwen3-linear": ModelConfig(
        "qwen3", **SIZES, head_dim=16, qk_norm=True, rope_scaling=LinearScaling(4.0)
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
    """The largest absolute difference of two float64 computations of ``out`` for ``count``
    tokens.

    Each of L layers sums at most n terms, with an error of n·eps relative to their size;
    scores here are below 64, and an error of a score is a relative error of its weight.
    """
    n = max(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_dim,
        count,
    )
    return 64 * (config.num_hidden_layers + 1) * n * EPS * float(np.abs(out).max())
