"""What a step of the network costs, in operations and bytes, and the least time that a
device needs for it: the roofline model.

A step is a ragged batch of (past, new): each sequence computes ``new`` tokens after ``past``
cached ones. One multiply-add is 2 FLOP. All counts are elementary and exact; they are
tested against the operations counted from the shapes that an instrumented array module
executed (``tests/counting.py``).

| symbol    | name                             | formula                                     |
|-----------|----------------------------------|---------------------------------------------|
| N_l       | parameters of a layer's products | N·D·(2H + 2G) + 3·N·F, F the MLP's width    |
| linear    | FLOP of products with weights    | 2·L·N_l·n + 2·V·N·rows, n new tokens        |
| attention | FLOP of q·kᵀ and p·v             | 4·L·H·D·Σ keys, causal: n·p + n(n+1)/2 each |
| kv        | bytes of K and V per token       | 2·L·G·D·b                                   |
| ridge     | intensity where both limits meet | peak FLOP/s ÷ peak bytes/s                  |
| MFU, MBU  | share of the peak that is used   | FLOP/t/peak, (weights + KV read)/t/peak     |

Sources: Williams et al. 2009 (roofline); Pope et al. 2022, "Efficiently scaling transformer
inference", §3.

Left out: elementwise work (norms, softmax, SwiGLU) and activations, whose bytes count in a
large prefill only; communication between devices; what a kernel wastes (masked tiles, keys
read once for each tile of queries).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from refllm.errors import InputError
from refllm.measure.device import DeviceSpec
from refllm.model.config import ModelConfig

Batch = Sequence[tuple[int, int]]  # (past, new) of every sequence


@dataclass(frozen=True)
class Cost:
    """Operations and memory traffic of one step; costs add up."""

    linear_flops: int
    attention_flops: int
    weight_bytes: float  # every weight once per step, however many sequences share it
    kv_read_bytes: float
    kv_write_bytes: float

    @property
    def flops(self) -> int:
        """All operations."""
        return self.linear_flops + self.attention_flops

    @property
    def bytes(self) -> float:
        """All traffic with main memory."""
        return self.weight_bytes + self.kv_read_bytes + self.kv_write_bytes

    @property
    def intensity(self) -> float:
        """FLOP per byte; infinite for a step that moves nothing."""
        if self.bytes:
            return self.flops / self.bytes
        return float("inf")

    @property
    def linear_intensity(self) -> float:
        """Of the products with weights: about 2·n/b for n tokens in the step and b bytes per
        weight.
        """
        if self.weight_bytes:
            return self.linear_flops / self.weight_bytes
        return float("inf")

    @property
    def attention_intensity(self) -> float:
        """Of attention over the cache: 2·(H/G)/b in a decode step, whatever the batch and
        the context.
        """
        if self.kv_read_bytes:
            return self.attention_flops / self.kv_read_bytes
        return float("inf")

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.linear_flops + other.linear_flops,
            self.attention_flops + other.attention_flops,
            self.weight_bytes + other.weight_bytes,
            self.kv_read_bytes + other.kv_read_bytes,
            self.kv_write_bytes + other.kv_write_bytes,
        )


def layer_parameters(config: ModelConfig) -> int:
    """N_l: parameters of one layer's seven products (norms and biases multiply nothing)."""
    n = config.hidden_size
    d = config.head_dim
    heads = config.num_attention_heads + config.num_key_value_heads
    return 2 * n * d * heads + 3 * n * config.intermediate_size


def keys_seen(past: int, new: int, window: int | None = None) -> int:
    """Σ over the new queries of the keys that each attends to: min(past + t + 1, window) for
    t = 0 … new − 1.

    >>> keys_seen(past=3, new=2)  # 4 + 5
    9
    >>> keys_seen(past=3, new=2, window=4)  # 4 + 4
    8
    """
    if window is None:
        return new * past + new * (new + 1) // 2
    growing = min(new, max(0, window - past))  # queries whose window is not full
    return growing * past + growing * (growing + 1) // 2 + (new - growing) * window


def keys_read(past: int, new: int, window: int | None = None) -> int:
    """Keys that a step reads for ``new`` > 0 queries together: with a window, those from
    window − 1 tokens before the first query on.

    >>> keys_read(past=100, new=2), keys_read(past=100, new=2, window=4)
    (102, 5)
    """
    if window is None:
        return past + new
    return min(past + new, new + window - 1)


def step_cost(
    config: ModelConfig,
    batch: Batch,
    *,
    weight_bytes_per_param: float = 2.0,
    kv_bytes_per_value: float = 2.0,
    logits_rows: int | None = None,
) -> Cost:
    """Operations and bytes of one step over a ragged batch [(past, new), …].

    ``logits_rows`` is the number of rows that meet the LM head: by default one per sequence
    with new tokens, the row that is sampled from. The head counts also where it is tied;
    the embedding lookup costs its rows' bytes and no FLOP. Keys and values are read once per
    step, the new ones included.

    >>> from refllm.measure.memory import LLAMA_8B
    >>> round(step_cost(LLAMA_8B, [(1000, 1)] * 64).linear_intensity)  # FLOP per byte of weights
    64

    Raises
    ------
    ValueError
        for a negative past or new, for more rows of logits than tokens, or for bytes that
        are negative or not finite.
    """
    if not (0 <= weight_bytes_per_param < inf and 0 <= kv_bytes_per_value < inf):
        raise InputError(
            f"step_cost: {weight_bytes_per_param} bytes per weight, "
            f"{kv_bytes_per_value} per cached value"
        )
    if any(past < 0 or new < 0 for past, new in batch):
        raise InputError(f"step_cost: past and new must not be negative, got {list(batch)}")
    tokens = sum(new for _, new in batch)
    rows = logits_rows
    if rows is None:
        rows = sum(new > 0 for _, new in batch)
    if not 0 <= rows <= tokens:
        raise InputError(f"step_cost: {rows} rows of logits from {tokens} tokens")
    if tokens == 0:
        return Cost(0, 0, 0, 0, 0)
    layers = config.num_hidden_layers
    width = config.hidden_size
    head = config.vocab_size * width
    window = config.sliding_window
    seen = sum(keys_seen(past, new, window) for past, new in batch)
    read = sum(keys_read(past, new, window) for past, new in batch if new)
    # layers, norms, biases
    stored = config.num_parameters - head * (1 if config.tie_word_embeddings else 2)
    weights = stored + (head if rows else 0) + tokens * width
    kv = 2 * layers * config.num_key_value_heads * config.head_dim * kv_bytes_per_value
    return Cost(
        linear_flops=2 * layers * layer_parameters(config) * tokens + 2 * head * rows,
        attention_flops=4 * layers * config.num_attention_heads * config.head_dim * seen,
        weight_bytes=weights * weight_bytes_per_param,
        kv_read_bytes=kv * read,
        kv_write_bytes=kv * tokens,
    )


def projected_seconds(cost: Cost, device: DeviceSpec) -> float:
    """max(FLOP / peak FLOP/s, bytes / peak bytes/s) + overhead: a lower bound, projected, not
    measured.
    """
    return max(cost.flops / device.peak_flops, cost.bytes / device.peak_bandwidth) + device.overhead


def mfu(cost: Cost, seconds: float, device: DeviceSpec) -> float:
    """Model FLOP utilisation: the share of the peak FLOP/s that a step of ``seconds`` used."""
    return cost.flops / _measured(seconds) / device.peak_flops


def mbu(cost: Cost, seconds: float, device: DeviceSpec) -> float:
    """Model bandwidth utilisation: (weights + KV read) / seconds / peak bandwidth."""
    return (cost.weight_bytes + cost.kv_read_bytes) / _measured(seconds) / device.peak_bandwidth


def _measured(seconds: float) -> float:
    """``seconds`` as they are, or ValueError unless they are positive and finite."""
    if not 0 < seconds < inf:
        raise InputError(f"a step takes a finite time above 0, got {seconds} seconds")
    return seconds
