"""A small batch through the network, again and again, with as few array calls as there can be.

``model.llama.forward`` serves any batch of any family, and makes its arrays anew each time. In a decode step of a small
model a good part of the time goes by between the products. What depends on shapes alone is done here once for each
number of rows, as a GPU captures a graph:

- arrays of a step are written in place, and the views of them that the calls take are kept;
- products are bound to their operands (``joint.bound``), with rows added where more are multiplied faster: such a row
  is zeros from the embedding to the logits;
- √N is multiplied into the norms' gains, x/√(Σx²/N + ε) · g = x/√(Σx² + Nε) · √N g;
- angles are looked up.

``forward`` is its oracle: equal within rounding, for any tokens at any positions of any cache.

| symbol | name                            | shape           |
|--------|---------------------------------|-----------------|
| T      | rows: tokens of the step        |                 |
| x, h   | residual stream, normed         | [T, N]          |
| y      | q, k and v of all heads         | [T, H + 2G, D]  |
| z      | logits                          | [T, V]          |
| nudge  | N ε                             |                 |

For one token at a time through a draft model there is ``decode.lean``, with the weights themselves rearranged.

Left out: biases, norms of heads, quantised weights, and GPUs: ``stepper`` gives the network itself for these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Protocol

import numpy as np

from refllm.backend import Array, asarray_like, namespace
from refllm.model import llama
from refllm.model.attention import Attend
from refllm.model.config import ModelConfig
from refllm.model.joint import bound
from refllm.model.layers import rope_table
from refllm.model.llama import Weights
from refllm.model.weights import Dense

ROWS = 64  # beyond, products take the time
LEAST = 8  # rows that there is memory for, at least
ANGLES = 256  # positions whose angles are looked up, at first


class Stepper(Protocol):
    """T tokens at their positions → logits[T, V] after each, valid until the next call.

    ``attend`` has copied what it keeps when it returns, as the caches of ``refllm.kv`` do.
    """

    def __call__(self, tokens: Sequence[int], positions: Sequence[int], attend: Attend) -> Array: ...


def stepper(weights: Weights, config: ModelConfig) -> Stepper:
    """The captured form of a network where there is one, else the network itself."""
    return CapturedStep(weights, config) if fits(config, weights) else partial(whole, weights, config)


def whole(
    weights: Weights, config: ModelConfig, tokens: Sequence[int], positions: Sequence[int], attend: Attend
) -> Array:
    """The same of the network, as large as the batch may be."""
    placed = asarray_like([tokens, positions], weights["norm"], "int64")  # one transfer for both
    return llama.logits(weights, llama.forward(weights, config, placed[0], placed[1], attend))


def fits(config: ModelConfig, weights: Weights) -> bool:
    """Whether a network can be captured: on the host, unquantised, and of the plain family."""
    plain = not (config.attention_bias or config.qk_norm)
    projections = [w for layer in weights["layers"] for name, w in layer.items() if name.endswith("_proj")]
    dense = all(type(w) is Dense for w in (*projections, weights["lm_head"], weights["embed_tokens"]))
    return plain and dense and namespace(weights["norm"]) is np


class CapturedStep:
    """The ``Stepper`` of a plain network on the host; a batch above ``ROWS`` goes through the network."""

    def __init__(self, weights: Weights, config: ModelConfig):
        self.weights, self.config = weights, config
        self.nudge = config.hidden_size * config.rms_norm_eps  # Nε
        gains = [(layer["input_layernorm"], layer["post_attention_layernorm"]) for layer in weights["layers"]]
        root = math.sqrt(config.hidden_size)
        self.gains, self.last_gain = [(a * root, b * root) for a, b in gains], weights["norm"] * root
        self.angles = self._angles(ANGLES)
        self.room, self.memory = 0, dict[str, Array]()
        self.captured: dict[int, SimpleNamespace] = {}  # by number of rows

    def __call__(self, tokens: Sequence[int], positions: Sequence[int], attend: Attend) -> Array:
        rows = len(tokens)
        if not 0 < rows <= ROWS:
            return whole(self.weights, self.config, tokens, positions, attend)
        if max(positions) >= len(self.angles[0]):
            self.angles = self._angles(2 * max(positions))
        at = np.asarray(positions)
        cos, sin = self.angles[0][at], self.angles[1][at]
        c = self.captured.get(rows) or self._capture(rows)
        c.first[...] = self.weights["embed_tokens"].rows(np.asarray(tokens))
        for index, (before, after) in enumerate(self.gains):
            qkv, o, gate_up, down = c.products[index]
            norm(c, before, self.nudge)
            qkv()
            rotate(c, cos, sin)
            c.mixed[...] = attend(index, c.q, c.k, c.v)
            o()
            c.x += c.delta
            norm(c, after, self.nudge)
            gate_up()
            activate(c)
            down()
            c.x += c.delta
        norm(c, self.last_gain, self.nudge)
        c.head()
        logits: Array = c.logits
        return logits

    def _angles(self, positions: int) -> tuple[Array, Array]:
        return rope_table(self.weights["rope_frequencies"], np.arange(positions), self.last_gain.dtype)

    def _capture(self, rows: int) -> SimpleNamespace:
        """The arrays of a step of so many rows, the views of them that calls take, and the products bound to them."""
        config, layers, head = self.config, self.weights["layers"], self.weights["lm_head"]
        n, f, d = config.hidden_size, config.intermediate_size, config.head_dim
        wide, groups = config.num_attention_heads, config.num_key_value_heads
        full = max(weight.full(rows) for weight in (head, *layers[0].values()) if isinstance(weight, Dense))
        if full > self.room:  # all numbers of rows share what is written before it is read
            self.room, self.memory, self.captured = max(LEAST, 1 << (full - 1).bit_length()), {}, {}

        def shared(name: str, *shape: int) -> Array:
            if name not in self.memory:
                self.memory[name] = np.zeros((self.room, *shape), dtype=self.last_gain.dtype)
            return self.memory[name][:full]

        # rows that were added are zeros here, and so they are everywhere
        x, mixed = (np.zeros((full, width), dtype=self.last_gain.dtype) for width in (n, wide * d))
        h, delta, act, z = shared("h", n), shared("delta", n), shared("act", f), shared("z", head.shape[0])
        y, gate_up, size = shared("y", (wide + 2 * groups) * d), shared("gate_up", 2 * f), shared("size")
        heads = y[:rows].reshape(rows, -1, d)
        pairs = heads[:, : wide + groups].reshape(rows, -1, 2, d // 2)
        rotated, turned = (shared(name, wide + groups, 2, d // 2)[:rows] for name in ("rotated", "turned"))
        qk = rotated.reshape(rows, -1, d)
        c = SimpleNamespace(
            x=x, first=x[:rows], h=h, delta=delta, size=size, column=size[:, None],
            pairs=pairs, swapped=pairs[:, :, ::-1], rotated=rotated, turned=turned,
            q=qk[:, :wide], k=qk[:, wide:], v=heads[:, wide + groups :], mixed=mixed[:rows].reshape(rows, wide, d),
            gate=gate_up[:, :f], up=gate_up[:, f:], half=shared("half", f), act=act,
            head=head.bind(h, z), logits=z[:rows],
            products=[
                (
                    bound(h, y, [layer["q_proj"], layer["k_proj"], layer["v_proj"]]),
                    layer["o_proj"].bind(mixed, delta),
                    bound(h, gate_up, [layer["gate_proj"], layer["up_proj"]]),
                    layer["down_proj"].bind(act, delta),
                )
                for layer in layers
            ],
        )  # fmt: skip
        self.captured[rows] = c
        return c


def norm(c: SimpleNamespace, gain: Array, nudge: float) -> None:
    """h = x / √(Σx² + Nε) · √N g, as ``layers.rms_norm``."""
    np.vecdot(c.x, c.x, out=c.size)
    c.size += nudge
    np.sqrt(c.size, out=c.size)
    np.divide(c.x, c.column, out=c.h)
    c.h *= gain


def rotate(c: SimpleNamespace, cos: Array, sin: Array) -> None:
    """x₁ cos − x₂ sin, x₂ cos + x₁ sin for the pairs of q and k, as ``layers.apply_rope``."""
    np.multiply(c.pairs, cos, out=c.rotated)
    np.multiply(c.swapped, sin, out=c.turned)
    c.rotated += c.turned


def activate(c: SimpleNamespace) -> None:
    """silu(gate) · up = ½ gate (1 + tanh ½ gate) · up, as ``layers.swiglu``."""
    np.multiply(c.gate, 0.5, out=c.half)
    np.tanh(c.half, out=c.act)
    c.act += 1.0
    c.act *= c.half
    c.act *= c.up
