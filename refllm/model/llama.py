"""The network: one pure function over a ragged batch, from tokens to hidden states to logits.

Source: Touvron et al. 2023 (Llama), with grouped-query attention (Llama 2), Mistral's
window, Qwen2's biases on q, k, v and Qwen3's RMSNorm on the query and key heads (before
RoPE).

The batch has no padding and no batch axis: T tokens of any number of sequences are
concatenated, and only ``attend`` knows which sequence a token belongs to. So prefill,
decode, chunked prefill and the verification of a draft are the same call.

| symbol | name              | shape                        |
|--------|-------------------|------------------------------|
| x      | residual stream   | [T, N]                       |
| q, k, v| heads             | [T, H, D], [T, G, D]         |
| F      | width of the MLP  |                              |
| W      | a ``Linear``      | multiplies as x Wᵀ           |

Left out: dropout, soft-capping, mixture of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refllm.backend import Array, asarray_like, namespace
from refllm.model.attention import Attend
from refllm.model.config import ModelConfig
from refllm.model.layers import apply_rope, rms_norm, rope_table, swiglu
from refllm.model.rope import rope_frequencies
from refllm.model.weight_layout import WeightArena
from refllm.model.weights import as_linear, fuse, fused_matmul

Layer = dict[str, Any]  # norm gains and biases as arrays, projections as Linear
# "embed_tokens", "layers": list[Layer], "norm", "lm_head", "rope_frequencies"
Weights = dict[str, Any]
Rotation = tuple[Array, Array]  # ``rope_table``'s cos[T, 1, 1, D/2] and sin[T, 1, 2, D/2]

PROJECTIONS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}

# How the names of their weights end in a checkpoint, for ``str.endswith``
PROJECTION_WEIGHTS = tuple(f".{path}.weight" for path in PROJECTIONS.values())

# Keys whose weights multiply the same input, in the order of PROJECTIONS
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def forward(
    weights: Weights,
    config: ModelConfig,
    tokens: Array,
    positions: Array,
    attend: Attend,
    rows: Array | None = None,
) -> Array:
    """tokens[T], positions[T] (integers) → hidden states after the last norm, [T, N].

    ``rows`` (integers), if given, are the tokens whose hidden states are wanted,
    [len(rows), N]: after its keys and values the last layer computes these alone. A prefill
    samples from the last token of each prompt only, and so saves nearly a whole layer.

    Raises
    ------
    TypeError
        if tokens, positions and weights belong to different array libraries.
    """
    namespace(tokens, positions, weights["norm"])
    x = weights["embed_tokens"].rows(tokens)  # [T, N]
    frequencies = weights["rope_frequencies"]
    rotation = rope_table(frequencies, positions, x.dtype, config.rope_scaling)
    last = config.num_hidden_layers - 1
    for index, layer in enumerate(weights["layers"]):
        wanted = rows if index == last else None
        x = decoder_layer(layer, config, x, rotation, attend, index, wanted)
    return rms_norm(x, weights["norm"], config.rms_norm_eps)


def decoder_layer(
    layer: Layer,
    config: ModelConfig,
    x: Array,
    rotation: Rotation,
    attend: Attend,
    index: int,
    rows: Array | None = None,
) -> Array:
    """One layer of the residual stream, x[T, N] → [T, N]; ``rotation`` is ``rope_table``'s
    pair for these tokens.

    x ← x + attention(norm(x)), then x ← x + mlp(norm(x)); for ``rows`` of the tokens only,
    if given.
    """
    h = rms_norm(x, layer["input_layernorm"], config.rms_norm_eps)
    heads = mixed_heads(layer, config, h, rotation, attend, index)  # [T, H·D]
    if rows is not None:
        x = x[rows]  # [R, N]
        heads = heads[rows]  # [R, H·D]
    x = x + layer["o_proj"].matmul(heads)  # [T, N]
    h = rms_norm(x, layer["post_attention_layernorm"], config.rms_norm_eps)
    gate_up = fused_matmul(h, layer["gate_proj"], layer["up_proj"])  # [T, 2·F]
    f = config.intermediate_size
    mlp: Array = layer["down_proj"].matmul(swiglu(gate_up[:, :f], gate_up[:, f:]))  # [T, N]
    return x + mlp


def mixed_heads(
    layer: Layer, config: ModelConfig, h: Array, rotation: Rotation, attend: Attend, index: int
) -> Array:
    """h[T, N] → the attention outputs of all heads, concatenated, [T, H·D]: ``o_proj``'s input."""
    attended = attend(index, *_heads(layer, config, h, rotation))  # [T, H, D]
    width = config.num_attention_heads * config.head_dim
    return attended.reshape(h.shape[0], width)  # [T, H·D]


def _heads(
    layer: Layer, config: ModelConfig, h: Array, rotation: Rotation
) -> tuple[Array, Array, Array]:
    """h[T, N] → rotated q[T, H, D], rotated k[T, G, D], v[T, G, D]: views of one array or two."""
    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    y = fused_matmul(h, layer["q_proj"], layer["k_proj"], layer["v_proj"])  # [T, (H+2G)·D]
    y = y.reshape(y.shape[0], heads + 2 * groups, config.head_dim)  # [T, H+2G, D]
    q = slice(0, heads)
    k = slice(heads, heads + groups)
    v = slice(heads + groups, None)
    if config.attention_bias:
        for part, bias in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias")):
            y[:, part] += layer[bias].reshape(-1, config.head_dim)  # [H, D] or [G, D]
    if config.qk_norm:  # over D, one gain for all heads, before the rotation
        y[:, q] = rms_norm(y[:, q], layer["q_norm"], config.rms_norm_eps)
        y[:, k] = rms_norm(y[:, k], layer["k_norm"], config.rms_norm_eps)
    rotated = apply_rope(y[:, : heads + groups], *rotation)  # [T, H+G, D], q and k at once
    return rotated[:, q], rotated[:, k], y[:, v]


def logits(weights: Weights, hidden: Array) -> Array:
    """hidden[T, N] → logits[T, V]; pass only the rows that are sampled from, since each row
    costs V · N multiply-adds.
    """
    out: Array = weights["lm_head"].matmul(hidden)  # [T, V]
    return out


def build(config: ModelConfig, tensors: Mapping[str, Array]) -> Weights:
    """Arrange tensors under Hugging Face's names as the weight tree that ``forward`` walks.

    A tied head is the embedding object itself: one copy in memory serves lookup and
    product.
    """
    embedding = as_linear(tensors["model.embed_tokens.weight"])
    norm = tensors["model.norm.weight"]
    arena = None
    if getattr(tensors, "quantization", None) is None:  # quantised weights need no arena
        arena = WeightArena(projection_shapes(config) * config.num_hidden_layers, norm)
    layers = [build_layer(config, tensors, i, arena) for i in range(config.num_hidden_layers)]
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    head = embedding
    if not config.tie_word_embeddings:
        head = as_linear(tensors["lm_head.weight"])
    return {
        "embed_tokens": embedding,
        "layers": layers,
        "norm": norm,
        "lm_head": head,
        "rope_frequencies": asarray_like(frequencies, norm, "float64"),
    }


def build_layer(
    config: ModelConfig, tensors: Mapping[str, Array], index: int, arena: WeightArena | None = None
) -> Layer:
    """Layer ``index`` alone, for callers that hold one layer in memory at a time."""
    prefix = f"model.layers.{index}."
    layer: Layer = {}
    for keys in SAME_INPUT:
        weights = (tensors[f"{projection_name(index, key)}.weight"] for key in keys)
        layer |= zip(keys, fuse(weights, arena), strict=True)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        layer[norm] = tensors[f"{prefix}{norm}.weight"]
    if config.attention_bias:
        layer |= {f"{c}_bias": tensors[f"{prefix}self_attn.{c}_proj.bias"] for c in "qkv"}
    if config.qk_norm:
        layer |= {f"{c}_norm": tensors[f"{prefix}self_attn.{c}_norm.weight"] for c in "qk"}
    return layer


def projection_name(index: int, key: str) -> str:
    """The name of a layer's projection in a checkpoint, without ``.weight``.

    >>> projection_name(3, "down_proj")
    'model.layers.3.mlp.down_proj'
    """
    return f"model.layers.{index}.{PROJECTIONS[key]}"


def projection_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(M, N) of a layer's projections, in the order of ``PROJECTIONS``."""
    n = config.hidden_size
    f = config.intermediate_size
    d = config.head_dim
    wide = config.num_attention_heads * d  # H·D
    narrow = config.num_key_value_heads * d  # G·D
    return [(wide, n), (narrow, n), (narrow, n), (n, wide), (f, n), (f, n), (n, f)]
