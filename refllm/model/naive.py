"""The network for one token, in loops: read it before ``model.llama``, whose oracle it is.

Source: as ``model.llama``: Touvron et al. 2023 (Llama), with grouped-query attention,
Mistral's window, Qwen2's biases and Qwen3's norms on the query and key heads.

| symbol | name                                                             | shape      |
|--------|------------------------------------------------------------------|------------|
| x      | residual stream of the token                                     | [N]        |
| q      | query heads                                                      | [H][D]     |
| k, v   | key and value heads; head h of H reads head h // (H/G) of G      | [G][D]     |
| cache  | per layer: the keys and the values of all tokens so far          | [S][G][D]  |

Weights are a dictionary under Hugging Face's names, W[M, N] (out × in), so that each line
can be held against a checkpoint's file. All arithmetic is float64 on the host.

Left out: everything that makes it fast. A matrix-vector product is NumPy's; tokens, heads
and keys are Python loops.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from refllm.model.config import ModelConfig
from refllm.model.rope import LinearScaling, Llama3Scaling, YarnScaling

Vector = np.ndarray  # float64, one axis
Tensors = Mapping[str, np.ndarray]
Cache = list[tuple[list[list[Vector]], list[list[Vector]]]]  # [L] of (keys, values) [S][G][D]


def naive_logits(config: ModelConfig, tensors: Tensors, tokens: Sequence[int]) -> np.ndarray:
    """Logits after each token of one sequence, [T, V] in float64: one token at a time."""
    cache = empty_cache(config)
    return np.stack([next_logits(config, tensors, token, cache) for token in tokens])


def empty_cache(config: ModelConfig) -> Cache:
    """The cache of a sequence that has no token yet."""
    return [([], []) for _ in range(config.num_hidden_layers)]


def next_logits(config: ModelConfig, tensors: Tensors, token: int, cache: Cache) -> Vector:
    """Read one token, append its keys and values to ``cache``, return the logits [V]."""
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    head: np.ndarray = tensors[name].astype(np.float64)  # [V, N]
    logits: Vector = head @ next_hidden(config, tensors, token, cache)
    return logits


def next_hidden(config: ModelConfig, tensors: Tensors, token: int, cache: Cache) -> Vector:
    """As ``next_logits``, up to the last norm: the hidden state [N]."""
    x = tensors["model.embed_tokens.weight"][token].astype(np.float64)  # [N]
    for index, (keys, values) in enumerate(cache):
        prefix = f"model.layers.{index}."
        layer = {
            name.removeprefix(prefix): tensor.astype(np.float64)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        h = rms_norm(x, layer["input_layernorm.weight"], config)
        read = attention(config, layer, h, keys, values)  # [H·D]
        x = x + layer["self_attn.o_proj.weight"] @ read  # [N]
        h = rms_norm(x, layer["post_attention_layernorm.weight"], config)
        x = x + mlp(layer, h)
    return rms_norm(x, tensors["model.norm.weight"].astype(np.float64), config)


def rms_norm(x: Vector, gain: Vector, config: ModelConfig) -> Vector:
    """x / sqrt(mean(x²) + ε) · g."""
    y: Vector = x / math.sqrt(sum(x**2) / len(x) + config.rms_norm_eps) * gain
    return y


def mlp(layer: Tensors, h: Vector) -> Vector:
    """SwiGLU: W_down (silu(W_gate h) · W_up h), with silu(g) = g / (1 + e^−g)."""
    gate = layer["mlp.gate_proj.weight"] @ h  # [F]
    up = layer["mlp.up_proj.weight"] @ h  # [F]
    silu = np.array([g / (1 + math.exp(-g)) for g in gate])
    out: Vector = layer["mlp.down_proj.weight"] @ (silu * up)  # [N]
    return out


def attention(
    config: ModelConfig,
    layer: Tensors,
    h: Vector,
    keys: list[list[Vector]],
    values: list[list[Vector]],
) -> Vector:
    """h[N] → the outputs of all query heads, concatenated, [H·D]; appends to keys and values."""
    position = len(keys)
    queries = [rotate(head, position, config) for head in heads(config, layer, h, "q")]
    keys.append([rotate(head, position, config) for head in heads(config, layer, h, "k")])
    values.append(list(heads(config, layer, h, "v")))

    first = 0
    if config.sliding_window is not None:
        first = max(0, position + 1 - config.sliding_window)
    share = config.num_attention_heads // config.num_key_value_heads
    out = []
    for index, query in enumerate(queries):
        group = index // share
        scores = [query @ key[group] / math.sqrt(config.head_dim) for key in keys[first:]]
        weights = [math.exp(score - max(scores)) for score in scores]
        read = sum(w * value[group] for w, value in zip(weights, values[first:], strict=True))
        out.append(read / sum(weights))
    return np.concatenate(out)


def heads(config: ModelConfig, layer: Tensors, h: Vector, which: str) -> Iterator[Vector]:
    """The query, key or value heads of a token before rotation; ``which`` is "q", "k", "v"."""
    y = layer[f"self_attn.{which}_proj.weight"] @ h  # [H·D] or [G·D]
    if config.attention_bias:
        y = y + layer[f"self_attn.{which}_proj.bias"]
    for start in range(0, len(y), config.head_dim):
        head = y[start : start + config.head_dim]  # [D]
        if config.qk_norm and which != "v":
            head = rms_norm(head, layer[f"self_attn.{which}_norm.weight"], config)
        yield head


def rotate(head: Vector, position: int, config: ModelConfig) -> Vector:
    """RoPE: multiply the complex numbers x_i + j·x_{i+D/2} by m·e^{j·position·θ_i}, with m the
    attention factor.
    """
    half = config.head_dim // 2
    turned = [
        config.attention_factor
        * complex(head[i], head[i + half])
        * cmath.exp(1j * position * frequency(config, i))
        for i in range(half)
    ]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def frequency(config: ModelConfig, i: int) -> float:
    """θ_i in radians per position, scaled as ``model.rope`` describes."""
    theta: float = config.rope_theta ** (-2 * i / config.head_dim)
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling):
        return theta / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return llama3(theta, scaling)
    if isinstance(scaling, YarnScaling):
        return yarn(config, scaling, i)
    return theta


def llama3(theta: float, scaling: Llama3Scaling) -> float:
    """Llama 3's scaling by the wavelength, as its authors did."""
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / theta
    if wavelength < original / scaling.high_freq_factor:
        return theta
    if wavelength > original / scaling.low_freq_factor:
        return theta / scaling.factor
    low = scaling.low_freq_factor
    smooth = (original / wavelength - low) / (scaling.high_freq_factor - low)
    return (1 - smooth) * theta / scaling.factor + smooth * theta


def yarn(config: ModelConfig, scaling: YarnScaling, i: int) -> float:
    """YaRN by counting turns: the last pair that still makes β of them within the context of
    training keeps its frequency, the first one that makes at most α is slowed by the factor,
    and the pairs between are mixed. (Without ``truncate`` the two ends lie between pairs.)
    """
    dim = config.head_dim
    base = config.rope_theta

    def turns(pair: float) -> float:
        wavelength: float = 2 * math.pi * base ** (2 * pair / dim)
        return scaling.original_max_position_embeddings / wavelength

    last: float
    first: float
    if scaling.truncate:
        pairs = range(dim)
        last = max((p for p in pairs if turns(p) >= scaling.beta_fast), default=0)
        first = min((p for p in pairs if turns(p) <= scaling.beta_slow), default=dim - 1)
    else:
        last = max(0.0, dim / 2 * math.log(turns(0) / scaling.beta_fast, base))
        first = min(dim - 1.0, dim / 2 * math.log(turns(0) / scaling.beta_slow, base))
    theta: float = base ** (-2 * i / dim)
    if i <= last:
        return theta
    if i >= first:
        return theta / scaling.factor
    share = (i - last) / (first - last)
    return share * theta / scaling.factor + (1 - share) * theta
