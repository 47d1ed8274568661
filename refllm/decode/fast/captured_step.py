"""Skip this file on a first reading: it shows how OpenBLAS and NumPy decode fast, and
computes nothing that its definition, ``model/llama.py``, does not.

A captured step runs a small batch through the network, again and again, with as few array
calls as possible.

``model.llama.forward`` serves any batch of any family, and allocates its arrays in each
call. In a decode step of a small model much of the time passes between the products. What
depends on shapes alone is therefore prepared once per number of rows, as a GPU captures a
CUDA graph:

- the arrays of a step are written in place, and the views of them that calls take are kept;
- products are bound to their operands (``model.weights.bind_fused``), with rows added where more
  are multiplied faster: such a padding row is zeros from the embedding to the logits;
- angles are looked up for the first positions.

``forward`` is its oracle: equal within rounding, for any tokens at any positions of any
cache, and for the weights as they are at the call: if one was exchanged, everything is
captured again.

| symbol | name                            | shape           |
|--------|---------------------------------|-----------------|
| T      | rows: tokens of the step        |                 |
| x, h   | residual stream, normed         | [T, N]          |
| y      | q, k and v of all heads         | [T, H + 2G, D]  |
| z      | logits                          | [T, V]          |

For one token at a time through a draft model there is ``decode.fast.single_token``, which
rearranges the weights themselves.

Left out: biases, norms of heads, quantised weights, and GPUs: ``make_decode_step`` returns
the network itself for these.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import is_
from types import SimpleNamespace
from typing import Protocol

import numpy as np

from refllm.backend import NUMPY, Array, asarray_like, namespace
from refllm.model import llama
from refllm.model.attention import Attend
from refllm.model.config import ModelConfig
from refllm.model.layers import rope_table
from refllm.model.llama import Weights
from refllm.model.weights import Dense, bind_fused

ENDS = ("embed_tokens", "norm", "lm_head")
MAX_ROWS = 64  # larger batches spend their time in the products
MIN_ROWS = 8  # memory is allocated for at least this many rows
INITIAL_POSITIONS = 256  # positions whose angles are looked up, at first
MAX_POSITIONS = 2048  # and at most; later ones are computed at each step


class DecodeStep(Protocol):
    """T tokens at their positions → logits[T, V] after each, valid until the next call.

    ``attend`` has copied what it keeps when it returns, as the caches of ``refllm.kv`` do.
    """

    def __call__(
        self, tokens: Sequence[int], positions: Sequence[int], attend: Attend
    ) -> Array: ...


def make_decode_step(weights: Weights, config: ModelConfig) -> DecodeStep:
    """The captured form of a network where it exists, else the network itself."""
    if can_capture(config, weights):
        return CapturedStep(weights, config)
    return partial(uncaptured_step, weights, config)


def uncaptured_step(
    weights: Weights,
    config: ModelConfig,
    tokens: Sequence[int],
    positions: Sequence[int],
    attend: Attend,
) -> Array:
    """The definition of a ``DecodeStep``: ``forward`` and ``logits``, for any batch."""
    moved = asarray_like([tokens, positions], weights["norm"], "int64")  # one transfer for both
    return llama.logits(weights, llama.forward(weights, config, moved[0], moved[1], attend))


def can_capture(config: ModelConfig, weights: Weights) -> bool:
    """Whether a network can be captured: on the host, unquantised, of one dtype, without
    biases and norms of heads.
    """
    norm = weights["norm"]
    if config.attention_bias or config.qk_norm or namespace(norm) is not NUMPY:
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
    """The ``DecodeStep`` of a plain network on the host; a batch above ``MAX_ROWS`` goes
    through ``forward``.
    """

    def __init__(self, weights: Weights, config: ModelConfig):
        self.weights = weights
        self.config = config
        self._reset()

    def _reset(self, parts: Sequence[object] = ()) -> None:
        """Forget everything that was captured, and bind to the weights as they are now."""
        self.parts = parts  # all weights that are bound; empty where they cannot be captured
        self.angles = self._angles(np.arange(INITIAL_POSITIONS))
        self.rows_allocated = 0
        self.memory = dict[str, Array]()
        self.captured: dict[int, SimpleNamespace] = {}  # by number of rows

    def __reduce__(self) -> tuple[type[CapturedStep], tuple[Weights, ModelConfig]]:
        # a copy binds again: views and bound products cannot be copied
        return type(self), (self.weights, self.config)

    def __call__(self, tokens: Sequence[int], positions: Sequence[int], attend: Attend) -> Array:
        """Mirrors ``llama.forward`` and ``llama.logits``, line for line."""
        rows = len(tokens)
        layers = self.weights["layers"]
        self._check_weights()
        if not (self.parts and 0 < rows <= MAX_ROWS):
            return uncaptured_step(self.weights, self.config, tokens, positions, attend)
        cos, sin = self._rotation(np.asarray(positions, dtype=np.int64))
        c = self.captured.get(rows) or self._capture(rows)
        c.first[...] = self.weights["embed_tokens"].rows(np.asarray(tokens, dtype=np.int64))
        eps = self.config.rms_norm_eps
        for index, layer in enumerate(layers):
            qkv, o, gate_up, down = c.products[index]
            norm(c, layer["input_layernorm"], eps)
            qkv()  # h [T, N] → y [T, (H + 2G)·D]
            rotate(c, cos, sin)
            c.mixed[...] = attend(index, c.q, c.k, c.v)  # [T, H, D]
            o()  # mixed [T, H·D] → delta [T, N]
            c.x += c.delta
            norm(c, layer["post_attention_layernorm"], eps)
            gate_up()  # h [T, N] → gate_up [T, 2F]
            activate(c)
            down()  # act [T, F] → delta [T, N]
            c.x += c.delta
        norm(c, self.weights["norm"], eps)
        c.head()  # h [T, N] → z [T, V]
        logits: Array = c.logits
        return logits

    def _check_weights(self) -> None:
        """Capture again if any weight is another object than the one that was bound."""
        parts = [self.weights[name] for name in ENDS]
        parts += [part for layer in self.weights["layers"] for part in layer.values()]
        if len(parts) != len(self.parts) or not all(map(is_, parts, self.parts)):
            self._reset(parts if can_capture(self.config, self.weights) else ())

    def _rotation(self, positions: Array) -> tuple[Array, Array]:
        """cos and sin of each token's angles, looked up where the table has them."""
        last = int(positions.max())
        if last >= MAX_POSITIONS:
            return self._angles(positions)
        if last >= len(self.angles[0]):
            self.angles = self._angles(np.arange(min(2 * last, MAX_POSITIONS)))
        return self.angles[0][positions], self.angles[1][positions]

    def _angles(self, positions: Array) -> tuple[Array, Array]:
        """``layers.rope_table`` in the network's dtype."""
        frequencies = self.weights["rope_frequencies"]
        dtype = self.weights["norm"].dtype
        return rope_table(frequencies, positions, dtype, self.config.rope_scaling)

    def _capture(self, rows: int) -> SimpleNamespace:
        """The arrays of a step of ``rows`` tokens, the views of them that calls take, and
        the products bound to them.
        """
        config = self.config
        layers = self.weights["layers"]
        head = self.weights["lm_head"]
        n = config.hidden_size
        f = config.intermediate_size
        d = config.head_dim
        heads = config.num_attention_heads
        groups = config.num_key_value_heads
        full = self._padded(rows)
        # Padding rows are zeros in x and mixed, and so they are everywhere.
        x = np.zeros((full, n), dtype=self.weights["norm"].dtype)
        mixed = np.zeros((full, heads * d), dtype=x.dtype)
        h = self._shared("h", full, n)
        delta = self._shared("delta", full, n)
        act = self._shared("act", full, f)
        z = self._shared("z", full, head.shape[0])
        y = self._shared("y", full, (heads + 2 * groups) * d)
        gate_up = self._shared("gate_up", full, 2 * f)
        size = self._shared("size", full)
        qkv = y[:rows].reshape(rows, -1, d)  # [T, H + 2G, D]
        pairs = qkv[:, : heads + groups].reshape(rows, -1, 2, d // 2)  # [T, H + G, 2, D/2]
        rotated = self._shared("rotated", full, heads + groups, 2, d // 2)[:rows]
        turned = self._shared("turned", full, heads + groups, 2, d // 2)[:rows]
        qk = rotated.reshape(rows, -1, d)  # [T, H + G, D]
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
            q=qk[:, :heads],
            k=qk[:, heads:],
            v=qkv[:, heads + groups :],
            mixed=mixed[:rows].reshape(rows, heads, d),
            gate=gate_up[:, :f],
            up=gate_up[:, f:],
            half=self._shared("half", full, f),
            act=act,
            head=head.bind(h, z),
            logits=z[:rows],
            products=[
                (
                    bind_fused(h, y, [layer["q_proj"], layer["k_proj"], layer["v_proj"]]),
                    layer["o_proj"].bind(mixed, delta),
                    bind_fused(h, gate_up, [layer["gate_proj"], layer["up_proj"]]),
                    layer["down_proj"].bind(act, delta),
                )
                for layer in layers
            ],
        )
        self.captured[rows] = c
        return c

    def _padded(self, rows: int) -> int:
        """Rows with padding, at which every product is fast; makes sure that there is
        memory for them.
        """
        weights = (self.weights["lm_head"], *self.weights["layers"][0].values())
        full: int = max(weight.padded_rows(rows) for weight in weights if isinstance(weight, Dense))
        if full > self.rows_allocated:
            self.rows_allocated = max(MIN_ROWS, 1 << (full - 1).bit_length())
            self.memory = {}
            self.captured = {}
        return full

    def _shared(self, name: str, rows: int, *shape: int) -> Array:
        """[rows, *shape] of memory that all numbers of rows share: it is written before it
        is read.
        """
        if name not in self.memory:
            whole = (self.rows_allocated, *shape)
            self.memory[name] = np.zeros(whole, dtype=self.weights["norm"].dtype)
        return self.memory[name][:rows]


def norm(c: SimpleNamespace, gain: Array, eps: float) -> None:
    """h = x / √(Σx²/N + ε) · g. Mirrors ``layers.rms_norm``."""
    np.vecdot(c.x, c.x, out=c.size)  # [T]
    c.size *= 1.0 / c.x.shape[1]
    c.size += eps
    np.sqrt(c.size, out=c.size)
    np.divide(c.x, c.column, out=c.h)  # [T, N]
    c.h *= gain


def rotate(c: SimpleNamespace, cos: Array, sin: Array) -> None:
    """x₁ cos − x₂ sin, x₂ cos + x₁ sin for the pairs of q and k. Mirrors ``layers.apply_rope``."""
    NUMPY.multiply(c.pairs, cos, out=c.rotated)  # [T, H + G, 2, D/2]
    NUMPY.multiply(c.swapped, sin, out=c.turned)
    c.rotated += c.turned


def activate(c: SimpleNamespace) -> None:
    """silu(gate) · up = ½ gate (1 + tanh ½ gate) · up. Mirrors ``layers.swiglu``."""
    np.multiply(c.gate, 0.5, out=c.half)  # [T, F]
    np.tanh(c.half, out=c.act)
    c.act += 1.0
    c.act *= c.half
    c.act *= c.up
