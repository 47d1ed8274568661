"""Skip this file on a first reading: it shows how OpenBLAS and NumPy decode one token fast,
and computes nothing that its definition, ``model/llama.py``, does not.

A single-token step runs one token of one sequence through a small network, with as few
array calls as possible: about 20 per layer.

It was measured to take 61 to 65 microseconds per greedy draft token of the bundled draft
model (two layers, 64 wide), where the captured step takes 97 to 104: 35 to 38 % less, under
both of OpenBLAS's kernel families (AVX2 and AVX-512). What does not depend on the token is
done once, in the constructor:

- norm gains and 1/√D are multiplied into the weights behind them, so that a norm is one
  factor for the whole row: W (g ⊙ x / rms) = (W ⊙ g) x / rms;
- the rotation's other half, rot(y) = (−y₂, y₁), is a row of the weight with its sign: R W
  beside W makes RoPE two products with a table and a sum;
- arrays are written in place; keys and values go to the contiguous cache, of which this is
  another ``attend``.

``forward`` is its oracle: equal within rounding at every position.

| symbol | name                                            | shape                     |
|--------|-------------------------------------------------|---------------------------|
| x      | residual stream                                 | [N]                       |
| y      | q, k, v and the rotated q, k                    | [(H + 2G + H + G) · D]    |
| K, V   | the key and value buffers of this sequence      | [G, D, cap], [G, cap, D]  |

Left out: batches (``decode.fast.captured_step``, which leaves the weights as they are),
biases, norms of heads, windows, quantised weights, GPUs (a captured graph does this there).
"""

from __future__ import annotations

import math

import numpy as np

from refllm.backend import NUMPY, namespace, to_numpy
from refllm.errors import InputError
from refllm.kv.contiguous import ContiguousCache
from refllm.model.config import ModelConfig
from refllm.model.llama import Layer, Weights
from refllm.model.weights import Dense

# Of the residual stream. In a wider network the products dominate the time, and the copies
# of the weights the memory.
MAX_WIDTH = 128


def is_supported(config: ModelConfig, weights: Weights) -> bool:
    """Whether this form exists for a network: small, on the host, unquantised, without
    biases, norms of heads and windows.
    """
    plain = not (config.attention_bias or config.qk_norm or config.sliding_window)
    layers = [
        w for layer in weights["layers"] for name, w in layer.items() if name.endswith("_proj")
    ]
    dense = all(type(w) is Dense for w in (*layers, weights["lm_head"], weights["embed_tokens"]))
    host = namespace(weights["norm"]) is NUMPY
    return plain and dense and config.hidden_size <= MAX_WIDTH and host


class SingleTokenStep:
    """``step(token)`` → logits[V] of the next token, valid until the next call; the cache
    is one token longer. ``append(token)`` computes the keys and values only.
    """

    def __init__(self, weights: Weights, config: ModelConfig, cache: ContiguousCache):
        self.config = config
        self.cache = cache
        heads = config.num_attention_heads + config.num_key_value_heads
        self.embedding = to_numpy(weights["embed_tokens"].dequantize())  # [V, N]
        self.head = to_numpy(weights["lm_head"].dequantize() * weights["norm"])  # [V, N]
        self.layers = [self._fold(layer) for layer in weights["layers"]]
        self.rotating = heads * config.head_dim  # rows of y that RoPE rotates
        angles = np.arange(cache.capacity)[:, None] * to_numpy(weights["rope_frequencies"])
        factor = config.attention_factor
        self.cos, self.sin = (  # [cap, (H + G)·D]
            np.tile(np.concatenate((t, t), axis=1), (1, heads)).astype(self.head.dtype)
            for t in (factor * np.cos(angles), factor * np.sin(angles))
        )
        self.logits = np.empty(config.vocab_size, dtype=self.head.dtype)

    def _fold(self, layer: Layer) -> tuple[np.ndarray, ...]:
        """Weights as [in, out] with the gains in them: qkv and its rotated half, o, gate
        and up, down.
        """
        dim = self.config.head_dim
        attention = layer["input_layernorm"]
        mlp = layer["post_attention_layernorm"]
        q, k, v = (layer[f"{c}_proj"].dequantize() * attention for c in "qkv")
        q = q * (1.0 / math.sqrt(dim))
        sign = np.asarray([-1.0, 1.0], dtype=q.dtype)[:, None, None]
        rotated = []
        for w in (q, k):
            halves = w.reshape(-1, 2, dim // 2, w.shape[1])[:, ::-1]  # [heads, 2, D/2, N]
            rotated.append((halves * sign).reshape(-1, w.shape[1]))  # [heads·D, N]
        joint = np.concatenate((q, k, v, *rotated))  # [(H + 2G + H + G)·D, N]
        gate_up = np.concatenate([layer[f"{c}_proj"].dequantize() * mlp for c in ("gate", "up")])
        o = layer["o_proj"].dequantize()
        down = layer["down_proj"].dequantize()
        joint, o, gate_up, down = (np.ascontiguousarray(w.T) for w in (joint, o, gate_up, down))
        return joint, o, gate_up, down

    def step(self, token: int, sequence: int = 0) -> np.ndarray:
        """Compute the token at the next position of a sequence → logits[V]. ValueError if
        the cache is full.

        Mirrors ``llama.logits`` of ``llama.forward``.
        """
        x = self._forward(token, sequence, last_output=True)
        x *= 1.0 / math.sqrt(x @ x * (1.0 / x.shape[0]) + self.config.rms_norm_eps)
        return np.dot(self.head, x, out=self.logits)  # [V]

    def append(self, token: int, sequence: int = 0) -> None:
        """Compute only the keys and values of the token at the next position."""
        self._forward(token, sequence, last_output=False)

    def _forward(self, token: int, sequence: int, last_output: bool) -> np.ndarray:
        """x[N] after all layers; without ``last_output`` the last layer stops after its keys
        and values. Mirrors ``llama.forward``.
        """
        config = self.config
        cache = self.cache
        at = cache.lengths[sequence]
        if at >= cache.capacity:
            raise InputError(f"the cache of the draft holds {cache.capacity} tokens and is full")
        per_width = 1.0 / config.hidden_size
        eps = config.rms_norm_eps
        groups = config.num_key_value_heads
        dim = config.head_dim
        rotating = self.rotating
        queries = config.num_attention_heads * dim
        ffn = config.intermediate_size
        cos = self.cos[at]
        sin = self.sin[at]
        x: np.ndarray = self.embedding[token].copy()  # [N]
        for index, (joint, o, gate_up, down) in enumerate(self.layers):
            y = x @ joint  # [(H + 2G + H + G)·D]
            y *= 1.0 / math.sqrt(x @ x * per_width + eps)
            qk = y[:rotating] * cos  # [(H + G)·D]
            qk += y[-rotating:] * sin
            keys = cache.keys[index, sequence, :, :, : at + 1]  # [G, D, S]
            values = cache.values[index, sequence, :, : at + 1]  # [G, S, D]
            keys[:, :, at] = qk[queries:].reshape(groups, dim)
            values[:, at] = y[rotating : rotating + groups * dim].reshape(groups, dim)
            if not last_output and index == len(self.layers) - 1:
                break
            p = qk[:queries].reshape(groups, -1, dim) @ keys  # [G, R, S]
            p -= p.max(axis=-1, keepdims=True)
            np.exp(p, out=p)
            mixed = p @ values  # [G, R, D]
            mixed /= p.sum(axis=-1, keepdims=True)
            x += mixed.reshape(-1) @ o
            h = x @ gate_up  # [2F]
            h *= 1.0 / math.sqrt(x @ x * per_width + eps)
            gate = h[:ffn]
            gate *= 0.5
            silu = np.tanh(gate)
            silu += 1.0
            silu *= gate
            silu *= h[ffn:]
            x += silu @ down
        cache.lengths[sequence] = at + 1
        return x
