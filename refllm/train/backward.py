"""The loss of a batch and its gradients, the backward pass written by hand beside the
forward.

Each layer appears as a pair: the forward keeps what the backward needs in a tuple, and the
backward names the derivative that it implements. Parameters and gradients are flat dicts
under Hugging Face's tensor names.

| symbol | name                                  | shape                   |
|--------|---------------------------------------|-------------------------|
| x      | residual stream                       | [B·S, N]                |
| P      | attention probabilities of C queries  | [B, G, R·C, ≤S], R = H/G|
| dY     | derivative of the loss for Y          | shape of Y              |

Sources: the chain rule; the identity Σ_j dP_ij P_ij = Σ_d dO_id O_id (Dao et al. 2022,
FlashAttention, appendix B.2) saves one pass over the S×S matrix.

The products of the projections, forward and backward, are a ``Product``'s: float32 matrices
unless told otherwise, 8-bit ones in ``fp8``. Those of the attention and of the output head
are always float32.

Left out: the loss itself (see ``loss``); Qwen's biases and query/key norms and sliding
windows, which are all refused; dropout, recomputation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

from refllm.backend import Array, asarray_like, namespace, scatter_add
from refllm.model.config import ModelConfig, UnsupportedModel
from refllm.model.layers import apply_rope, rope_frequencies, rope_table, sigmoid
from refllm.train.loss import Rows, cross_entropy, cross_entropy_and_gradients

Tensors = dict[str, Array]
# queries at a time: their probabilities stay in the cache, and the upper triangle is
# skipped
_TILE = 256


class Product(Protocol):
    """How a projection Y = X Wᵀ and its two derivatives are computed."""

    def forward(self, x: Array, weight: Array) -> Array:
        """x[T, N], weight[M, N] → x Wᵀ [T, M], a new array."""
        ...

    def backward(self, x: Array, weight: Array, d_out: Array) -> tuple[Array, Array]:
        """dY[T, M] → dX = dY W [T, N] and dW = dYᵀ X [M, N]."""
        ...


class Plain:
    """The products as they are."""

    def forward(self, x: Array, weight: Array) -> Array:
        """X Wᵀ"""
        return x @ weight.T

    def backward(self, x: Array, weight: Array, d_out: Array) -> tuple[Array, Array]:
        """dX, dW"""
        return d_out @ weight, d_out.T @ x


PLAIN = Plain()


class _Batch(NamedTuple):
    """What every layer needs to know about the batch."""

    size: int  # B
    length: int  # S
    cos: Array  # [B·S, 1, 1, D/2], see ``rope_table``
    sin: Array  # [B·S, 1, 2, D/2]
    mask: Array  # [C, C]: the tile on the diagonal
    product: Product


def loss_and_gradients(
    params: Tensors,
    config: ModelConfig,
    tokens: Array,
    teacher: Rows | None = None,
    product: Product = PLAIN,
) -> tuple[float, Tensors]:
    """Mean cross-entropy (nats) of predicting ``tokens[:, 1:]`` from ``tokens[:, :-1]``,
    and its gradients.

    tokens[B, S+1] integers. ``teacher(rows)``, if given, returns target probabilities
    [rows, V] for a slice of the flattened positions, and the loss is the cross-entropy
    against them (see ``distill``).

    Raises
    ------
    UnsupportedModel
        for what the module docstring leaves out.
    """
    xp = namespace(tokens, *params.values())
    inputs = tokens[:, :-1]  # [B, S], [B·S]
    targets = tokens[:, 1:].reshape(-1)
    hidden, norm_saved, kept = _forward(params, config, inputs, product=product)
    grads: Tensors = {}
    head_name = output_name(config)
    loss, d_hidden, grads[head_name] = cross_entropy_and_gradients(
        hidden, params[head_name], targets, teacher
    )
    dx, grads["model.norm.weight"] = _norm_backward(d_hidden, norm_saved)
    for i in reversed(range(config.num_hidden_layers)):
        dx = _layer_backward(params, f"model.layers.{i}.", config, dx, kept.pop(), grads)
    embedding = params["model.embed_tokens.weight"]
    d_embedding = grads.setdefault("model.embed_tokens.weight", xp.zeros_like(embedding))
    # a tied head has left its own share there already
    scatter_add(d_embedding, inputs.reshape(-1), dx)
    return loss, grads


def mean_loss(params: Tensors, config: ModelConfig, tokens: Array) -> float:
    """The loss of ``loss_and_gradients`` without the gradients; tokens[B, S+1] → nats per
    token.
    """
    hidden = hidden_states(params, config, tokens[:, :-1])
    return cross_entropy(hidden, params[output_name(config)], tokens[:, 1:].reshape(-1))


def hidden_states(params: Tensors, config: ModelConfig, inputs: Array) -> Array:
    """Run the network up to the last norm: tokens[B, S] → [B·S, N]; logits are this times
    the head's transpose.
    """
    return _forward(params, config, inputs, keep=False)[0]


def output_name(config: ModelConfig) -> str:
    """Name of the matrix [V, N] that turns hidden states into logits."""
    if config.tie_word_embeddings:
        return "model.embed_tokens.weight"
    return "lm_head.weight"


def _forward(
    params: Tensors,
    config: ModelConfig,
    inputs: Array,
    *,
    keep: bool = True,
    product: Product = PLAIN,
) -> tuple[Array, Any, list[Any]]:
    """tokens[B, S] → last norm's output [B·S, N], what its backward needs, and (``keep``)
    what each layer's needs.
    """
    if config.attention_bias or config.qk_norm or config.sliding_window:
        raise UnsupportedModel(
            "training supports the plain llama network: no biases, query/key norms or window"
        )
    xp = namespace(inputs, *params.values())
    size, length = inputs.shape
    if size * length == 0:
        raise ValueError(
            "there are no positions to predict: a batch needs a sequence of two tokens or more"
        )
    embedding = params["model.embed_tokens.weight"]
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    cos, sin = rope_table(
        asarray_like(frequencies, inputs, "float64"), xp.arange(length), embedding.dtype
    )
    cos, sin = (xp.tile(t, (size, 1, 1, 1)) for t in (cos, sin))  # of all B·S tokens
    batch = _Batch(
        size, length, cos, sin, _causal_mask(xp, min(length, _TILE), embedding.dtype), product
    )
    x = embedding[inputs.reshape(-1)]  # [B·S, N]
    kept: list[Any] = []
    for i in range(config.num_hidden_layers):
        x, saved = _layer(params, f"model.layers.{i}.", config, x, batch)
        if keep:  # else each layer's memory is free for the next one, and stays in the cache
            kept.append(saved)
        del saved
    hidden, norm_saved = _norm(x, params["model.norm.weight"], config.rms_norm_eps)
    return hidden, norm_saved, kept


def _causal_mask(xp: Any, length: int, dtype: Any) -> Array:
    """[S, S]: 0 where key ≤ query, a large negative number above the diagonal."""
    upper = xp.arange(length)[None, :] > xp.arange(length)[:, None]
    return xp.where(upper, xp.asarray(-1e30, dtype=dtype), xp.asarray(0, dtype=dtype))


def _norm(x: Array, gain: Array, eps: float) -> tuple[Array, tuple[Array, ...]]:
    """RMSNorm of x[T, N], keeping x̂ = x / rms and 1 / rms."""
    xp = namespace(x)
    inverse = 1.0 / xp.sqrt(xp.einsum("tn,tn->t", x, x)[:, None] * (1.0 / x.shape[1]) + eps)
    unit = x * inverse
    return unit * gain, (unit, inverse, gain)


def _norm_backward(dy: Array, saved: tuple[Array, ...]) -> tuple[Array, Array]:
    """dx = (dŷ − x̂ · mean(dŷ·x̂)) / rms with dŷ = dy·g;  dg = Σ dy·x̂."""
    xp = namespace(dy)
    unit, inverse, gain = saved
    d_gain = xp.einsum("tn,tn->n", dy, unit)
    dx = dy * gain
    dx -= unit * (xp.einsum("tn,tn->t", dx, unit)[:, None] * (1.0 / unit.shape[1]))
    dx *= inverse
    return dx, d_gain


def _layer(
    params: Tensors, at: str, config: ModelConfig, x: Array, batch: _Batch
) -> tuple[Array, Any]:
    """One decoder layer: x + Attention(norm(x)), then x + MLP(norm(x))."""
    attention_in, norm1 = _norm(x, params[at + "input_layernorm.weight"], config.rms_norm_eps)
    attended, attention = _attention(params, at + "self_attn.", config, attention_in, batch)
    forward = batch.product.forward
    x = forward(attended, params[at + "self_attn.o_proj.weight"]) + x
    mlp_in, norm2 = _norm(x, params[at + "post_attention_layernorm.weight"], config.rms_norm_eps)
    gate = forward(mlp_in, params[at + "mlp.gate_proj.weight"])
    up = forward(mlp_in, params[at + "mlp.up_proj.weight"])
    sig = sigmoid(gate)
    act = gate * sig
    # The product and not its factor is cheap to make again: act · up is not kept.
    x = forward(act * up, params[at + "mlp.down_proj.weight"]) + x
    return x, (norm1, attention_in, attention, attended, norm2, mlp_in, up, sig, act)


def _layer_backward(
    params: Tensors, at: str, config: ModelConfig, dx: Array, saved: Any, grads: Tensors
) -> Array:
    """The derivative for the layer's output → for its input; the weights' own go into
    ``grads``.
    """
    norm1, attention_in, attention, attended, norm2, mlp_in, up, sig, act = saved
    backward = attention[0].product.backward

    def linear(name: str, inputs: Array, d_out: Array) -> Array:
        d_in, grads[at + name] = backward(inputs, params[at + name], d_out)
        return d_in

    d_product = linear("mlp.down_proj.weight", act * up, dx)
    d_up = d_product * act
    d_gate = d_product  # the same memory: d_product is not needed again
    d_gate *= up
    d_gate *= sig + act * (1.0 - sig)  # silu'(g) = σ + g σ (1 − σ), and act = g σ
    d_mlp_in = linear("mlp.gate_proj.weight", mlp_in, d_gate)
    d_mlp_in += linear("mlp.up_proj.weight", mlp_in, d_up)
    d_norm, grads[at + "post_attention_layernorm.weight"] = _norm_backward(d_mlp_in, norm2)
    dx += d_norm

    d_attended = linear("self_attn.o_proj.weight", attended, dx)
    d_q, d_k, d_v = _attention_backward(config, d_attended, attention)
    d_attention_in = linear("self_attn.q_proj.weight", attention_in, d_q)
    d_attention_in += linear("self_attn.k_proj.weight", attention_in, d_k)
    d_attention_in += linear("self_attn.v_proj.weight", attention_in, d_v)
    d_norm, grads[at + "input_layernorm.weight"] = _norm_backward(d_attention_in, norm1)
    dx += d_norm
    return dx


def _heads_first(x: Array, size: int, length: int, groups: int) -> Array:
    """[B·S, G·R, D] → [B, G, R·S, D]: the queries of one key head under each other."""
    xp = namespace(x)
    heads = x.shape[1] // groups
    dim = x.shape[2]
    x = x.reshape(size, length, groups, heads, dim).transpose(0, 2, 3, 1, 4)
    return xp.ascontiguousarray(x).reshape(size, groups, heads * length, dim)


def _tokens_first(x: Array, size: int, length: int, groups: int) -> Array:
    """The inverse of ``_heads_first``: [B, G, R·S, D] → [B·S, G·R, D]."""
    dim = x.shape[-1]
    x = x.reshape(size, groups, -1, length, dim).transpose(0, 3, 1, 2, 4)
    return x.reshape(size * length, -1, dim)


def _query_tiles(length: int) -> list[range]:
    """Positions in tiles: a tile's queries see keys up to the tile's end, so the upper
    triangle is skipped.
    """
    return [range(a, min(a + _TILE, length)) for a in range(0, length, _TILE)]


def _rows(x: Array, tile: range, length: int) -> Array:
    """The tile's rows of x[B, G, R·S, D], for all R heads: [B, G, R·C, D]."""
    size, groups, _, dim = x.shape
    return x.reshape(size, groups, -1, length, dim)[:, :, :, tile.start : tile.stop].reshape(
        size, groups, -1, dim
    )


def _put_rows(x: Array, tile: range, length: int, values: Array) -> None:
    """The inverse of ``_rows``: write values[B, G, R·C, D] into their places in x[B, G,
    R·S, D].
    """
    size, groups, _, dim = x.shape
    places = x.reshape(size, groups, -1, length, dim)[:, :, :, tile.start : tile.stop]
    places[...] = values.reshape(places.shape)


def _attention(
    params: Tensors, at: str, config: ModelConfig, x: Array, batch: _Batch
) -> tuple[Array, Any]:
    """Causal grouped-query attention of whole sequences; x[B·S, N] → [B·S, H·D]."""
    xp = namespace(x)
    size, length, cos, sin, mask, product = batch
    groups = config.num_key_value_heads
    dim = config.head_dim
    q, k, v = (
        product.forward(x, params[at + name + "_proj.weight"]).reshape(size * length, heads, dim)
        for name, heads in (("q", config.num_attention_heads), ("k", groups), ("v", groups))
    )
    q = apply_rope(q, cos, sin)
    k = apply_rope(k, cos, sin)
    q *= 1.0 / math.sqrt(dim)
    q, k, v = (_heads_first(t, size, length, groups) for t in (q, k, v))
    out = xp.empty_like(q)
    tiles = []
    for tile in _query_tiles(length):
        rows = _rows(q, tile, length)
        p = rows @ k[:, :, : tile.stop].swapaxes(-1, -2)  # [B, G, R·C, keys up to the tile's end]
        diagonal = p.reshape(size, groups, -1, len(tile), tile.stop)[..., tile.start :]
        diagonal += mask[: len(tile), : len(tile)]  # a view: the R heads of a group share the mask
        p -= xp.max(p, axis=-1, keepdims=True)
        xp.exp(p, out=p)
        p *= 1.0 / xp.sum(p, axis=-1, keepdims=True)
        _put_rows(out, tile, length, p @ v[:, :, : tile.stop])
        tiles.append((tile, rows, p))
    attended = _tokens_first(out, size, length, groups).reshape(size * length, -1)
    return attended, (batch, k, v, out, tiles)


def _attention_backward(
    config: ModelConfig, d_attended: Array, saved: Any
) -> tuple[Array, Array, Array]:
    """dV = Pᵀ dO;  dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O));  dQ = dS K;  dK = dSᵀ Q."""
    xp = namespace(d_attended)
    (size, length, cos, sin, _, _), k, v, out, tiles = saved
    groups = config.num_key_value_heads
    dim = config.head_dim
    d_out = _heads_first(d_attended.reshape(size * length, -1, dim), size, length, groups)
    d_q = xp.empty_like(out)
    d_k = xp.zeros_like(k)
    d_v = xp.zeros_like(v)
    for tile, rows, p in tiles:
        seen = slice(0, tile.stop)
        d_o = _rows(d_out, tile, length)
        d_v[:, :, seen] += p.swapaxes(-1, -2) @ d_o
        d_s = d_o @ v[:, :, seen].swapaxes(-1, -2)
        d_s -= xp.einsum("bgrd,bgrd->bgr", d_o, _rows(out, tile, length))[..., None]
        d_s *= p
        _put_rows(d_q, tile, length, d_s @ k[:, :, seen])
        d_k[:, :, seen] += d_s.swapaxes(-1, -2) @ rows  # rows already carry 1/√D
    d_q *= 1.0 / math.sqrt(dim)
    d_q, d_k, d_v = (_tokens_first(t, size, length, groups) for t in (d_q, d_k, d_v))
    d_q = apply_rope(d_q, cos, -sin)  # a rotation's transpose is its inverse
    d_k = apply_rope(d_k, cos, -sin)
    rows = size * length
    return d_q.reshape(rows, -1), d_k.reshape(rows, -1), d_v.reshape(rows, -1)
