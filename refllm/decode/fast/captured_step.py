"""A small batch through the network, again and again, with as few array calls as there can
be.

``model.llama.forward`` serves any batch of any family, and makes its arrays anew each time.
In a decode step of a small model a good part of the time goes by between the products. What
depends on shapes alone is done here once for each number of rows, as a GPU captures a
graph:

- arrays of a step are written in place, and the views of them that the calls take are kept;
- products are bound to their operands (``joint.bound``), with rows added where more are
  multiplied faster: such a row is zeros from the embedding to the logits;
- angles are looked up, those of the first positions.

``forward`` is its oracle: equal within rounding, for any tokens at any positions of any
cache, and of the weights as they are at the call: where one was exchanged everything is
captured anew.

| symbol | name                            | shape           |
|--------|---------------------------------|-----------------|
| T      | rows: tokens of the step        |                 |
| x, h   | residual stream, normed         | [T, N]          |
| y      | q, k and v of all heads         | [T, H + 2G, D]  |
| z      | logits                          | [T, V]          |

For one token at a time through a draft model there is ``decode.fast.single_token``, with
the weights themselves rearranged.

Left out: biases, norms of heads, quantised weights, and GPUs: ``stepper`` gives the network
itself for these.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import is_
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from refllm.backend import Array, asarray_like, namespace
from refllm.model import llama
from refllm.model.attention import Attend
from refllm.model.config import ModelConfig
from refllm.model.layers import rope_table
from refllm.model.llama import Weights
from refllm.model.weights import Dense, bound

ENDS = ("embed_tokens", "norm", "lm_head")
ROWS = 64  # beyond, products take the time
LEAST = 8  # rows that there is memory for, at least
ANGLES = 256  # positions whose angles are looked up, at first
MOST_ANGLES = 2048  # and at most; those of later ones are worked out at each step


class Stepper(Protocol):
    """T tokens at their positions → logits[T, V] after each, valid until the next call.

    ``attend`` has copied what it keeps when it returns, as the caches of ``refllm.kv`` do.
    """

    def __call__(
        self, tokens: Sequence[int], positions: Sequence[int], attend: Attend
    ) -> Array: ...


def stepper(weights: Weights, config: ModelConfig) -> Stepper:
    """The captured form of a network where there is one, else the network itself."""
    if fits(config, weights):
        return CapturedStep(weights, config)
    return partial(whole, weights, config)


def whole(
    weights: Weights,
    config: ModelConfig,
    tokens: Sequence[int],
    positions: Sequence[int],
    attend: Attend,
) -> Array:
    """The same of the network, as large as the batch may be."""
    placed = asarray_like([tokens, positions], weights["norm"], "int64")  # one transfer for both
    return llama.logits(weights, llama.forward(weights, config, placed[0], placed[1], attend))


def fits(config: ModelConfig, weights: Weights) -> bool:
    """Whether a network can be captured: on the host, unquantised, of one type, and of the
    plain family.
    """
    norm = weights["norm"]
    if config.attention_bias or config.qk_norm or namespace(norm) is not np:
        return False
    parts = [
        weights["lm_head"],
        weights["embed_tokens"],
        *(part for layer in weights["layers"] for part in layer.values()),
    ]
    return all(isinstance(part, np.ndarray) or type(part) is Dense for part in parts) and all(
        part.dtype == norm.dtype for part in parts
    )


class CapturedStep:
    """The ``Stepper`` of a plain network on the host; a batch above ``ROWS`` goes through
    the network.
    """

    def __init__(self, weights: Weights, config: ModelConfig):
        self.weights = weights
        self.config = config
        self._begin()

    def _begin(self, parts: Sequence[Any] = ()) -> None:
        """Everything anew, for the weights as they are now."""
        self.parts = parts  # what is bound: all weights, or nothing where they cannot be captured
        self.angles = self._angles(np.arange(ANGLES))
        self.room = 0
        self.memory = dict[str, Array]()
        self.captured: dict[int, SimpleNamespace] = {}  # by number of rows

    def __reduce__(self) -> Any:  # a copy binds anew: views and bound products cannot be copied
        return type(self), (self.weights, self.config)

    def __call__(self, tokens: Sequence[int], positions: Sequence[int], attend: Attend) -> Array:
        rows = len(tokens)
        layers = self.weights["layers"]
        parts = [self.weights[name] for name in ENDS] + [
            part for layer in layers for part in layer.values()
        ]
        if len(parts) != len(self.parts) or not all(map(is_, parts, self.parts)):
            self._begin(parts if fits(self.config, self.weights) else ())
        if not (self.parts and 0 < rows <= ROWS):
            return whole(self.weights, self.config, tokens, positions, attend)
        cos, sin = self._turns(np.asarray(positions, dtype=np.int64))
        c = self.captured.get(rows) or self._capture(rows)
        c.first[...] = self.weights["embed_tokens"].rows(np.asarray(tokens, dtype=np.int64))
        eps = self.config.rms_norm_eps
        for index, layer in enumerate(layers):
            qkv, o, gate_up, down = c.products[index]
            norm(c, layer["input_layernorm"], eps)
            qkv()
            rotate(c, cos, sin)
            c.mixed[...] = attend(index, c.q, c.k, c.v)
            o()
            c.x += c.delta
            norm(c, layer["post_attention_layernorm"], eps)
            gate_up()
            activate(c)
            down()
            c.x += c.delta
        norm(c, self.weights["norm"], eps)
        c.head()
        logits: Array = c.logits
        return logits

    def _turns(self, positions: Array) -> tuple[Array, Array]:
        """cos and sin of each token's angles."""
        last = int(positions.max())
        if last >= MOST_ANGLES:
            return self._angles(positions)
        if last >= len(self.angles[0]):
            self.angles = self._angles(np.arange(min(2 * last, MOST_ANGLES)))
        return self.angles[0][positions], self.angles[1][positions]

    def _angles(self, positions: Array) -> tuple[Array, Array]:
        return rope_table(self.weights["rope_frequencies"], positions, self.weights["norm"].dtype)

    def _capture(self, rows: int) -> SimpleNamespace:
        """The arrays of a step of so many rows, the views of them that calls take, and the
        products bound to them.
        """
        config = self.config
        layers = self.weights["layers"]
        head = self.weights["lm_head"]
        dtype = self.weights["norm"].dtype
        n = config.hidden_size
        f = config.intermediate_size
        d = config.head_dim
        wide = config.num_attention_heads
        groups = config.num_key_value_heads
        full = max(
            weight.full(rows) for weight in (head, *layers[0].values()) if isinstance(weight, Dense)
        )
        if full > self.room:  # all numbers of rows share what is written before it is read
            self.room = max(LEAST, 1 << (full - 1).bit_length())
            self.memory = {}
            self.captured = {}

        def shared(name: str, *shape: int) -> Array:
            if name not in self.memory:
                self.memory[name] = np.zeros((self.room, *shape), dtype=dtype)
            return self.memory[name][:full]

        # rows that were added are zeros here, and so they are everywhere
        x, mixed = (np.zeros((full, width), dtype=dtype) for width in (n, wide * d))
        h = shared("h", n)
        delta = shared("delta", n)
        act = shared("act", f)
        z = shared("z", head.shape[0])
        y = shared("y", (wide + 2 * groups) * d)
        gate_up = shared("gate_up", 2 * f)
        size = shared("size")
        heads = y[:rows].reshape(rows, -1, d)
        pairs = heads[:, : wide + groups].reshape(rows, -1, 2, d // 2)
        rotated, turned = (
            shared(name, wide + groups, 2, d // 2)[:rows] for name in ("rotated", "turned")
        )
        qk = rotated.reshape(rows, -1, d)
        c = SimpleNamespace(
            x=x,
            first=x[:rows],
            h=h,
            delta=delta,
            size=size,
            column=size[:, None],
            pairs=pairs,
            swapped=pairs[:, :, ::-1],
            rotated=rotated,
            turned=turned,
            q=qk[:, :wide],
            k=qk[:, wide:],
            v=heads[:, wide + groups :],
            mixed=mixed[:rows].reshape(rows, wide, d),
            gate=gate_up[:, :f],
            up=gate_up[:, f:],
            half=shared("half", f),
            act=act,
            head=head.bind(h, z),
            logits=z[:rows],
            products=[
                (
                    bound(h, y, [layer["q_proj"], layer["k_proj"], layer["v_proj"]]),
                    layer["o_proj"].bind(mixed, delta),
                    bound(h, gate_up, [layer["gate_proj"], layer["up_proj"]]),
                    layer["down_proj"].bind(act, delta),
                )
                for layer in layers
            ],
        )
        self.captured[rows] = c
        return c


def norm(c: SimpleNamespace, gain: Array, eps: float) -> None:
    """h = x / √(Σx²/N + ε) · g, as ``layers.rms_norm``."""
    np.vecdot(c.x, c.x, out=c.size)
    c.size *= 1.0 / c.x.shape[1]
    c.size += eps
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
