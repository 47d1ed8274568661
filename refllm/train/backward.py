"""The loss of a batch and its gradients, with the backward pass written by hand next to the
forward pass.

Each layer is a pair of functions: the forward returns what the backward needs in a tuple,
and the backward names the derivative that it implements. Parameters and gradients are flat
dicts under Hugging Face's tensor names.

| symbol | name                                  | shape                   |
|--------|---------------------------------------|-------------------------|
| x      | residual stream                       | [B·S, N]                |
| P      | attention probabilities of C queries  | [B, G, R·C, ≤S], R = H/G|
| F      | width of the MLP                      |                         |
| dY     | derivative of the loss for Y          | shape of Y              |

Sources: the chain rule; the identity Σ_j dP_ij P_ij = Σ_d dO_id O_id (Dao et al. 2022,
FlashAttention, appendix B.2) saves one pass over the S×S matrix.

A ``Product`` computes the matrix products of the projections, forward and backward: in
float32 by default, in 8 bits with ``train.fp8``. Those of the attention and of the output
head are always float32.

Left out: the loss itself (see ``train.loss``); Qwen's biases and query/key norms and sliding
windows, which are all rejected; dropout, recomputation.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from refllm.backend import Array, DType, Namespace, asarray_like, namespace, scatter_add
from refllm.errors import InputError
from refllm.model.config import ModelConfig, UnsupportedModel
from refllm.model.layers import apply_rope, rope_table, sigmoid
from refllm.model.rope import rope_frequencies
from refllm.train.loss import TargetRows, cross_entropy, cross_entropy_and_gradients

Tensors = dict[str, Array]
# queries at a time: their probabilities stay in the processor's cache, and the keys after a
# tile are skipped
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
    """The products in the dtype of their operands."""

    def forward(self, x: Array, weight: Array) -> Array:
        """x[T, N], weight[M, N] → X Wᵀ [T, M]."""
        return x @ weight.T

    def backward(self, x: Array, weight: Array, d_out: Array) -> tuple[Array, Array]:
        """dY[T, M] → dX[T, N], dW[M, N]."""
        return d_out @ weight, d_out.T @ x


PLAIN = Plain()


class _Batch(NamedTuple):
    """What every layer needs of the batch."""

    size: int  # B
    length: int  # S
    cos: Array  # [B·S, 1, 1, D/2], see ``rope_table``
    sin: Array  # [B·S, 1, 2, D/2]
    mask: Array  # [C, C]: the tile on the diagonal
    product: Product


_NormSaved = tuple[Array, Array, Array]  # x̂[T, N], 1 / rms [T, 1], gain[N]


class _AttentionSaved(NamedTuple):
    """What the backward pass of the attention needs."""

    batch: _Batch
    k: Array  # [B, G, S, D], rotated
    v: Array  # [B, G, S, D]
    out: Array  # [B, G, R·S, D]
    tiles: list[tuple[range, Array, Array]]  # positions, queries [B, G, R·C, D], P


class _LayerSaved(NamedTuple):
    """What the backward pass of a layer needs, all [B·S, …]."""

    norm1: _NormSaved
    attention_in: Array
    attention: _AttentionSaved
    attended: Array
    norm2: _NormSaved
    mlp_in: Array
    up: Array
    sig: Array  # σ(gate)
    act: Array  # silu(gate)


def loss_and_gradients(
    params: Tensors,
    config: ModelConfig,
    tokens: Array,
    teacher: TargetRows | None = None,
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
    inputs = tokens[:, :-1]  # [B, S]
    targets = tokens[:, 1:].reshape(-1)  # [B·S]
    hidden, norm_saved, kept = _forward(params, config, inputs, product=product)
    grads: Tensors = {}
    head_name = output_name(config)
    loss, d_hidden, grads[head_name] = cross_entropy_and_gradients(
        hidden, params[head_name], targets, teacher
    )
    dx, grads["model.norm.weight"] = _norm_backward(d_hidden, norm_saved)  # [B·S, N]
    for i in reversed(range(config.num_hidden_layers)):
        dx = _layer_backward(params, f"model.layers.{i}.", config, dx, kept.pop(), grads)
    embedding = params["model.embed_tokens.weight"]
    d_embedding = grads.setdefault("model.embed_tokens.weight", xp.zeros_like(embedding))
    # a tied head has its own share in d_embedding already
    scatter_add(d_embedding, inputs.reshape(-1), dx)
    return loss, grads


def mean_loss(params: Tensors, config: ModelConfig, tokens: Array) -> float:
    """The loss of ``loss_and_gradients`` without the gradients; tokens[B, S+1] → nats per token."""
    hidden = hidden_states(params, config, tokens[:, :-1])
    return cross_entropy(hidden, params[output_name(config)], tokens[:, 1:].reshape(-1))


def hidden_states(params: Tensors, config: ModelConfig, inputs: Array) -> Array:
    """Run the network up to the last norm: tokens[B, S] → [B·S, N]; logits are this times
    the transposed head.
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
) -> tuple[Array, _NormSaved, list[_LayerSaved]]:
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
        raise InputError(
            "there are no positions to predict: a batch needs a sequence of two tokens or more"
        )
    embedding = params["model.embed_tokens.weight"]
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    on_device = asarray_like(frequencies, inputs, "float64")  # [D/2]
    table = rope_table(on_device, xp.arange(length), embedding.dtype, config.rope_scaling)
    cos, sin = (xp.tile(t, (size, 1, 1, 1)) for t in table)  # of all B·S tokens
    mask = _causal_mask(xp, min(length, _TILE), embedding.dtype)
    batch = _Batch(size, length, cos, sin, mask, product)
    x = embedding[inputs.reshape(-1)]  # [B·S, N]
    kept: list[_LayerSaved] = []
    for i in range(config.num_hidden_layers):
        x, saved = _layer(params, f"model.layers.{i}.", config, x, batch)
        if keep:  # otherwise the next layer reuses this one's memory, which is in the cache
            kept.append(saved)
        del saved
    hidden, norm_saved = _norm(x, params["model.norm.weight"], config.rms_norm_eps)
    return hidden, norm_saved, kept


def _causal_mask(xp: Namespace, length: int, dtype: DType) -> Array:
    """[S, S]: 0 where key ≤ query, a large negative value above the diagonal."""
    upper = xp.arange(length)[None, :] > xp.arange(length)[:, None]
    return xp.where(upper, xp.asarray(-1e30, dtype=dtype), xp.asarray(0, dtype=dtype))


def _norm(x: Array, gain: Array, eps: float) -> tuple[Array, _NormSaved]:
    """RMSNorm of x[T, N], keeping x̂ = x / rms and 1 / rms."""
    xp = namespace(x)
    square = xp.einsum("tn,tn->t", x, x)[:, None]  # [T, 1]
    inverse = 1.0 / xp.sqrt(square * (1.0 / x.shape[1]) + eps)
    unit = x * inverse  # x̂ [T, N]
    return unit * gain, (unit, inverse, gain)


def _norm_backward(dy: Array, saved: _NormSaved) -> tuple[Array, Array]:
    """dx = (dŷ − x̂ · mean(dŷ·x̂)) / rms with dŷ = dy·g;  dg = Σ dy·x̂."""
    xp = namespace(dy)
    unit, inverse, gain = saved
    d_gain = xp.einsum("tn,tn->n", dy, unit)  # [N]
    dx = dy * gain  # dŷ [T, N]
    dx -= unit * (xp.einsum("tn,tn->t", dx, unit)[:, None] * (1.0 / unit.shape[1]))
    dx *= inverse
    return dx, d_gain


def _layer(
    params: Tensors, prefix: str, config: ModelConfig, x: Array, batch: _Batch
) -> tuple[Array, _LayerSaved]:
    """One decoder layer of x[B·S, N]: x + Attention(norm(x)), then x + MLP(norm(x))."""
    attention_in, norm1 = _norm(x, params[prefix + "input_layernorm.weight"], config.rms_norm_eps)
    attended, attention = _attention(params, prefix + "self_attn.", config, attention_in, batch)
    forward = batch.product.forward
    x = forward(attended, params[prefix + "self_attn.o_proj.weight"]) + x  # [B·S, N]
    gain = params[prefix + "post_attention_layernorm.weight"]
    mlp_in, norm2 = _norm(x, gain, config.rms_norm_eps)
    gate = forward(mlp_in, params[prefix + "mlp.gate_proj.weight"])  # [B·S, F]
    up = forward(mlp_in, params[prefix + "mlp.up_proj.weight"])  # [B·S, F]
    sig = sigmoid(gate)
    act = gate * sig
    # act · up is not kept: the backward pass recomputes it from its factors
    x = forward(act * up, params[prefix + "mlp.down_proj.weight"]) + x  # [B·S, N]
    saved = _LayerSaved(norm1, attention_in, attention, attended, norm2, mlp_in, up, sig, act)
    return x, saved


def _layer_backward(
    params: Tensors, prefix: str, config: ModelConfig, dx: Array, saved: _LayerSaved, grads: Tensors
) -> Array:
    """The derivative for the layer's output [B·S, N] → for its input; those for the weights
    go into ``grads``.
    """
    norm1, attention_in, attention, attended, norm2, mlp_in, up, sig, act = saved
    backward = attention.batch.product.backward

    def linear(name: str, inputs: Array, d_out: Array) -> Array:
        """The derivative for a projection's input; that for its weight goes into ``grads``."""
        d_in, grads[prefix + name] = backward(inputs, params[prefix + name], d_out)
        return d_in

    d_product = linear("mlp.down_proj.weight", act * up, dx)  # [B·S, F]
    d_up = d_product * act
    d_gate = d_product  # the same memory: d_product is not needed again
    d_gate *= up
    d_gate *= sig + act * (1.0 - sig)  # silu'(g) = σ + g σ (1 − σ), and act = g σ
    d_mlp_in = linear("mlp.gate_proj.weight", mlp_in, d_gate)  # [B·S, N]
    d_mlp_in += linear("mlp.up_proj.weight", mlp_in, d_up)
    d_norm, grads[prefix + "post_attention_layernorm.weight"] = _norm_backward(d_mlp_in, norm2)
    dx += d_norm  # the residual connection passes dx on unchanged

    d_attended = linear("self_attn.o_proj.weight", attended, dx)  # [B·S, H·D]
    d_q, d_k, d_v = _attention_backward(config, d_attended, attention)
    d_attention_in = linear("self_attn.q_proj.weight", attention_in, d_q)  # [B·S, N]
    d_attention_in += linear("self_attn.k_proj.weight", attention_in, d_k)
    d_attention_in += linear("self_attn.v_proj.weight", attention_in, d_v)
    d_norm, grads[prefix + "input_layernorm.weight"] = _norm_backward(d_attention_in, norm1)
    dx += d_norm
    return dx


def _heads_first(x: Array, size: int, length: int, groups: int) -> Array:
    """[B·S, G·R, D] → [B, G, R·S, D]: queries that share a key head are stacked."""
    xp = namespace(x)
    shared = x.shape[1] // groups  # R
    dim = x.shape[2]
    x = x.reshape(size, length, groups, shared, dim).transpose(0, 2, 3, 1, 4)  # [B, G, R, S, D]
    return xp.ascontiguousarray(x).reshape(size, groups, shared * length, dim)


def _tokens_first(x: Array, size: int, length: int, groups: int) -> Array:
    """The inverse of ``_heads_first``: [B, G, R·S, D] → [B·S, G·R, D]."""
    dim = x.shape[-1]
    x = x.reshape(size, groups, -1, length, dim).transpose(0, 3, 1, 2, 4)  # [B, S, G, R, D]
    return x.reshape(size * length, -1, dim)


def _query_tiles(length: int) -> list[range]:
    """Positions in tiles: a tile's queries see keys up to the end of the tile, so the keys
    after it are skipped.
    """
    return [range(a, min(a + _TILE, length)) for a in range(0, length, _TILE)]


def _rows(x: Array, tile: range, length: int) -> Array:
    """The tile's rows of x[B, G, R·S, D], for all R heads: [B, G, R·C, D]."""
    size, groups, _, dim = x.shape
    rows = x.reshape(size, groups, -1, length, dim)[:, :, :, tile.start : tile.stop]
    return rows.reshape(size, groups, -1, dim)


def _set_rows(x: Array, tile: range, length: int, values: Array) -> None:
    """The inverse of ``_rows``: write values[B, G, R·C, D] to the tile's rows of
    x[B, G, R·S, D].
    """
    size, groups, _, dim = x.shape
    rows = x.reshape(size, groups, -1, length, dim)[:, :, :, tile.start : tile.stop]
    rows[...] = values.reshape(rows.shape)  # [B, G, R, C, D], a view of x


def _attention(
    params: Tensors, prefix: str, config: ModelConfig, x: Array, batch: _Batch
) -> tuple[Array, _AttentionSaved]:
    """Causal grouped-query attention of complete sequences; x[B·S, N] → [B·S, H·D]."""
    xp = namespace(x)
    size, length, cos, sin, mask, product = batch
    groups = config.num_key_value_heads
    dim = config.head_dim

    def project(name: str, heads: int) -> Array:
        """The heads of a projection, [B·S, heads, D]."""
        y = product.forward(x, params[f"{prefix}{name}_proj.weight"])
        return y.reshape(size * length, heads, dim)

    q = apply_rope(project("q", config.num_attention_heads), cos, sin)  # [B·S, H, D]
    k = apply_rope(project("k", groups), cos, sin)  # [B·S, G, D]
    v = project("v", groups)
    q *= 1.0 / math.sqrt(dim)
    q, k, v = (_heads_first(t, size, length, groups) for t in (q, k, v))  # [B, G, R·S or S, D]
    out = xp.empty_like(q)
    tiles = []
    for tile in _query_tiles(length):
        rows = _rows(q, tile, length)  # [B, G, R·C, D]
        p = rows @ k[:, :, : tile.stop].swapaxes(-1, -2)  # [B, G, R·C, tile.stop]
        diagonal = p.reshape(size, groups, -1, len(tile), tile.stop)[..., tile.start :]
        diagonal += mask[: len(tile), : len(tile)]  # a view of p: all R heads share the mask
        p -= xp.max(p, axis=-1, keepdims=True)
        xp.exp(p, out=p)
        p *= 1.0 / xp.sum(p, axis=-1, keepdims=True)
        _set_rows(out, tile, length, p @ v[:, :, : tile.stop])
        tiles.append((tile, rows, p))
    attended = _tokens_first(out, size, length, groups).reshape(size * length, -1)  # [B·S, H·D]
    return attended, _AttentionSaved(batch, k, v, out, tiles)


def _attention_backward(
    config: ModelConfig, d_attended: Array, saved: _AttentionSaved
) -> tuple[Array, Array, Array]:
    """dV = Pᵀ dO;  dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O));  dQ = dS K;  dK = dSᵀ Q."""
    xp = namespace(d_attended)
    batch, k, v, out, tiles = saved
    size, length, cos, sin, _, _ = batch
    groups = config.num_key_value_heads
    dim = config.head_dim
    d_out = d_attended.reshape(size * length, -1, dim)  # [B·S, H, D]
    d_out = _heads_first(d_out, size, length, groups)  # [B, G, R·S, D]
    d_q = xp.empty_like(out)
    d_k = xp.zeros_like(k)
    d_v = xp.zeros_like(v)
    for tile, rows, p in tiles:
        seen = slice(0, tile.stop)
        d_o = _rows(d_out, tile, length)  # [B, G, R·C, D]
        d_v[:, :, seen] += p.swapaxes(-1, -2) @ d_o
        d_s = d_o @ v[:, :, seen].swapaxes(-1, -2)  # [B, G, R·C, tile.stop]
        d_s -= xp.einsum("bgrd,bgrd->bgr", d_o, _rows(out, tile, length))[..., None]
        d_s *= p
        _set_rows(d_q, tile, length, d_s @ k[:, :, seen])
        d_k[:, :, seen] += d_s.swapaxes(-1, -2) @ rows  # the rows include the factor 1/√D
    d_q *= 1.0 / math.sqrt(dim)
    d_q, d_k, d_v = (_tokens_first(t, size, length, groups) for t in (d_q, d_k, d_v))
    d_q = apply_rope(d_q, cos, -sin)  # a rotation's transpose
    d_k = apply_rope(d_k, cos, -sin)
    count = size * length
    return d_q.reshape(count, -1), d_k.reshape(count, -1), d_v.reshape(count, -1)
