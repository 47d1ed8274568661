"""The network: one pure function over a ragged batch, from tokens to hidden states to logits.

Source: Touvron et al. 2023 (Llama), with grouped-query attention (Llama 2), Mistral's window, Qwen2's biases
on q, k, v and Qwen3's RMSNorm on the query and key heads (before RoPE).

The batch has no padding and no batch axis: T tokens of any number of sequences stand one after the other,
and which sequence a token belongs to is known to ``attend`` alone. So prefill, decode, chunked prefill and
verification of a draft are one and the same call.

| symbol | name              | shape                        |
|--------|-------------------|------------------------------|
| x      | residual stream   | [T, N]                       |
| q, k, v| heads             | [T, H, D], [T, G, D]         |
| W      | a ``Linear``      | multiplies as x Wᵀ           |

Left out: everything that a model card calls "extra": dropout, soft-capping, mixture of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refllm.backend import Array, asarray_like, namespace
from refllm.model.attention import Attend
from refllm.model.config import ModelConfig
from refllm.model.layers import apply_rope, rms_norm, rope_frequencies, rope_table, swiglu
from refllm.model.weights import Dense

Layer = dict[str, Any]  # norm gains and biases as arrays, projections as Linear
Weights = dict[str, Any]  # "embed_tokens", "layers": list[Layer], "norm", "lm_head", "rope_frequencies"

PROJECTIONS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def build(config: ModelConfig, tensors: Mapping[str, Array]) -> Weights:
    """Arrange tensors under Hugging Face's names as the weight tree that ``forward`` walks.

    A tied head is the embedding object itself: one copy in memory serves lookup and product.
    """
    embedding = Dense(tensors["model.embed_tokens.weight"])
    layers = [build_layer(config, tensors, i) for i in range(config.num_hidden_layers)]
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    norm = tensors["model.norm.weight"]
    return {
        "embed_tokens": embedding,
        "layers": layers,
        "norm": norm,
        "lm_head": embedding if config.tie_word_embeddings else Dense(tensors["lm_head.weight"]),
        "rope_frequencies": asarray_like(frequencies, norm, "float64"),
    }


def build_layer(config: ModelConfig, tensors: Mapping[str, Array], index: int) -> Layer:
    """Layer ``index`` alone, for those who work layer by layer and hold one at a time."""
    at = f"model.layers.{index}."
    layer: Layer = {key: Dense(tensors[f"{at}{name}.weight"]) for key, name in PROJECTIONS.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        layer[norm] = tensors[f"{at}{norm}.weight"]
    if config.attention_bias:
        layer |= {f"{c}_bias": tensors[f"{at}self_attn.{c}_proj.bias"] for c in "qkv"}
    if config.qk_norm:
        layer |= {f"{c}_norm": tensors[f"{at}self_attn.{c}_norm.weight"] for c in "qk"}
    return layer


def forward(weights: Weights, config: ModelConfig, tokens: Array, positions: Array, attend: Attend) -> Array:
    """tokens[T], positions[T] (integers) → hidden states after the last norm, [T, N]."""
    namespace(tokens, positions, weights["norm"])  # refuses a mix of libraries
    x = weights["embed_tokens"].rows(tokens)
    rotation = rope_table(weights["rope_frequencies"], positions, x.dtype)
    for index, layer in enumerate(weights["layers"]):
        x = decoder_layer(layer, config, x, rotation, attend, index)
    return rms_norm(x, weights["norm"], config.rms_norm_eps)


def decoder_layer(layer: Layer, config: ModelConfig, x: Array, rotation: Any, attend: Attend, index: int) -> Array:
    """One layer of the residual stream, x[T, N] → [T, N]; ``rotation`` is ``rope_table``'s pair for these tokens.

    x ← x + attention(norm(x)), then x ← x + mlp(norm(x)).
    """
    h = rms_norm(x, layer["input_layernorm"], config.rms_norm_eps)
    x = x + layer["o_proj"].matmul(mixed_heads(layer, config, h, rotation, attend, index))
    h = rms_norm(x, layer["post_attention_layernorm"], config.rms_norm_eps)
    return x + layer["down_proj"].matmul(swiglu(layer["gate_proj"].matmul(h), layer["up_proj"].matmul(h)))


def mixed_heads(layer: Layer, config: ModelConfig, h: Array, rotation: Any, attend: Attend, index: int) -> Array:
    """h[T, N] → what each head read, side by side, [T, H·D]: the input of ``o_proj``."""
    xp = namespace(h)
    attended = attend(index, *_heads(layer, config, h, rotation))
    return xp.reshape(attended, (h.shape[0], config.num_attention_heads * config.head_dim))


def logits(weights: Weights, hidden: Array) -> Array:
    """hidden[T, N] → [T, V]; pass only the rows that will be sampled from: V · N products a row."""
    out: Array = weights["lm_head"].matmul(hidden)
    return out


def _heads(layer: Layer, config: ModelConfig, h: Array, rotation: Any) -> tuple[Array, Array, Array]:
    """h[T, N] → rotated q[T, H, D], rotated k[T, G, D], v[T, G, D]."""
    xp = namespace(h)
    q, k, v = (layer[name].matmul(h) for name in ("q_proj", "k_proj", "v_proj"))
    if config.attention_bias:
        q, k, v = q + layer["q_bias"], k + layer["k_bias"], v + layer["v_bias"]
    q, k, v = (xp.reshape(t, (t.shape[0], t.shape[1] // config.head_dim, config.head_dim)) for t in (q, k, v))
    if config.qk_norm:  # over D, one gain for all heads, before the rotation
        q = rms_norm(q, layer["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, layer["k_norm"], config.rms_norm_eps)
    return apply_rope(q, *rotation), apply_rope(k, *rotation), v
