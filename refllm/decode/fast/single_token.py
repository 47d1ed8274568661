"""One token of one sequence through a small network, with as few array calls as there can
be.

A draft model of two layers, 64 wide, multiplies for 30 microseconds a step;
``model.llama.forward`` adds 150 of Python between the products, as it serves any batch of
any family. What does not depend on the token is done once here:

- norm gains and 1/√D are multiplied into the weights behind them, so that a norm is one
  number for the whole row: W (g ⊙ x / rms) = (W ⊙ g) x / rms;
- the rotation's other half, rot(y) = (−y₂, y₁), is a row of the weight with its sign: R W
  beside W makes RoPE two products with a table and a sum;
- arrays are written in place; the cache is the contiguous one, of which this is just
  another ``attend``.

About 20 calls a layer. ``forward`` is its oracle: equal within rounding at every position.

| symbol | name                                   | shape                        |
|--------|----------------------------------------|------------------------------|
| x      | residual stream                        | [N]                          |
| y      | q, k, v and the rotated q, k           | [(H + 2G + H + G) · D]       |
| K, V   | the cache's strips of this sequence    | [G, D, cap], [G, cap, D]     |

Left out: batches (``decode.fast.captured_step``, which leaves the weights as they are),
biases, norms of heads, windows, quantised weights, GPUs (a captured graph does this there).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refllm.backend import Array, namespace, to_numpy
from refllm.kv.contiguous import ContiguousCache
from refllm.model.config import ModelConfig
from refllm.model.llama import Layer, Weights
from refllm.model.weights import Dense

# of the residual stream: beyond, products take the time, and copies of the weights the
# memory
WIDEST = 128


def fits(config: ModelConfig, weights: Weights) -> bool:
    """Whether this form exists for a network: small, on the host, unquantised, and of the
    plain family.
    """
    plain = not (config.attention_bias or config.qk_norm or config.sliding_window)
    layers = [
        w for layer in weights["layers"] for name, w in layer.items() if name.endswith("_proj")
    ]
    dense = all(type(w) is Dense for w in (*layers, weights["lm_head"], weights["embed_tokens"]))
    return plain and dense and config.hidden_size <= WIDEST and namespace(weights["norm"]) is np


class LeanStep:
    """``step(token)`` → logits[V] of the next token, valid until the next call; the cache
    is one token longer.
    """

    def __init__(self, weights: Weights, config: ModelConfig, cache: ContiguousCache):
        self.config = config
        self.cache = cache
        self.embedding = weights["embed_tokens"].dequantize()
        self.head = weights["lm_head"].dequantize() * weights["norm"]
        self.layers = [self._layer(layer) for layer in weights["layers"]]
        self.rotating = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        angles = np.arange(cache.capacity)[:, None] * to_numpy(weights["rope_frequencies"])
        heads = config.num_attention_heads + config.num_key_value_heads
        self.cos, self.sin = (
            np.tile(np.concatenate((t, t), axis=1), (1, heads)).astype(self.head.dtype)
            for t in (np.cos(angles), np.sin(angles))
        )
        self.logits = np.empty(config.vocab_size, dtype=self.head.dtype)

    def _layer(self, layer: Layer) -> tuple[Any, ...]:
        """Weights as [in, out] with the gains in them: qkv and its rotated half, o, gate
        and up, down.
        """
        dim = self.config.head_dim
        attention = layer["input_layernorm"]
        mlp = layer["post_attention_layernorm"]
        q, k, v = (layer[f"{c}_proj"].dequantize() * attention for c in "qkv")
        q = q * (1.0 / math.sqrt(dim))
        turned = [w.reshape(-1, 2, dim // 2, w.shape[1])[:, ::-1] for w in (q, k)]
        turned = [
            (w * np.asarray([-1.0, 1.0], dtype=w.dtype)[:, None, None]).reshape(-1, w.shape[-1])
            for w in turned
        ]
        joint = np.concatenate((q, k, v, *turned))
        gate_up = np.concatenate([layer[f"{c}_proj"].dequantize() * mlp for c in ("gate", "up")])
        o = layer["o_proj"].dequantize()
        down = layer["down_proj"].dequantize()
        return tuple(np.ascontiguousarray(w.T) for w in (joint, o, gate_up, down))

    def step(self, token: int, sequence: int = 0, *, head: bool = True) -> Array | None:
        """The token at the next position of a sequence; without ``head`` its keys and
        values only.
        """
        config = self.config
        cache = self.cache
        b = sequence
        at = cache.lengths[b]
        n = 1.0 / config.hidden_size
        eps = config.rms_norm_eps
        if at >= cache.capacity:
            raise ValueError(f"the cache of the draft holds {cache.capacity} tokens and is full")
        groups = config.num_key_value_heads
        dim = config.head_dim
        rotating = self.rotating
        wide = config.num_attention_heads * dim
        half = config.intermediate_size
        cos = self.cos[at]
        sin = self.sin[at]
        x = self.embedding[token].copy()
        for index, (joint, o, gate_up, down) in enumerate(self.layers):
            y = x @ joint
            y *= 1.0 / math.sqrt(x @ x * n + eps)
            qk = y[:rotating] * cos
            qk += y[-rotating:] * sin
            keys = cache.keys[index, b, :, :, : at + 1]
            values = cache.values[index, b, :, : at + 1]
            keys[:, :, at] = qk[wide:].reshape(groups, dim)
            values[:, at] = y[rotating : rotating + groups * dim].reshape(groups, dim)
            if not head and index == len(self.layers) - 1:
                break  # of the last layer nobody wants more
            p = qk[:wide].reshape(groups, -1, dim) @ keys  # [G, R, S]
            p -= p.max(axis=-1, keepdims=True)
            np.exp(p, out=p)
            mixed = p @ values
            mixed /= p.sum(axis=-1, keepdims=True)
            x += mixed.reshape(-1) @ o
            h = x @ gate_up
            h *= 1.0 / math.sqrt(x @ x * n + eps)
            gate = h[:half]
            gate *= 0.5
            silu = np.tanh(gate)
            silu += 1.0
            silu *= gate
            silu *= h[half:]
            x += silu @ down
        cache.lengths[b] = at + 1
        if not head:
            return None
        x *= 1.0 / math.sqrt(x @ x * n + eps)
        return np.dot(self.head, x, out=self.logits)
