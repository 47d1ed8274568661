"""What a step costs, in operations and bytes, and how fast a device could do it: the roofline model.

A step is a ragged batch of (past, new): sequence i brings ``new`` tokens after ``past`` that are cached. One
multiply-add is 2 FLOP. All counts are elementary and exact; they are tested against the operations counted
from the shapes that an instrumented array module executed (``tests/counting.py``).

| symbol   | name                                | formula                                                   |
|----------|-------------------------------------|-----------------------------------------------------------|
| N_l      | products' parameters in a layer     | N·D·(2H + 2G) + 3·N·F, F the width of the MLP             |
| linear   | FLOP of products with weights       | 2·L·N_l·n + 2·V·N·rows, n new tokens, rows of logits      |
| attention| FLOP of q·kᵀ and p·v                | 4·L·H·D·Σ keys seen, causal: n·p + n(n+1)/2 a sequence    |
| kv       | bytes of K and V of a token         | 2·L·G·D·b                                                 |
| ridge    | intensity where both limits meet    | peak FLOP/s ÷ peak bytes/s                                |
| MFU, MBU | share of the peak that is used      | FLOP/t/peak, (weights + KV read)/t/peak                   |

Sources: Williams et al. 2009 (roofline); Pope et al. 2022, "Efficiently scaling transformer inference", §3.

Left out: elementwise work (norms, softmax, SwiGLU) and activations, whose bytes count in a large prefill only;
communication between devices; what a kernel wastes (masked tiles, keys read once for each tile of queries).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from refllm.model.config import ModelConfig

_MEASURE_SECONDS = 1.0
Batch = Sequence[tuple[int, int]]  # (past, new) of every sequence


@dataclass(frozen=True)
class Cost:
    """Operations and memory traffic of one step; costs add up."""

    linear_flops: int
    attention_flops: int
    weight_bytes: float  # every weight once a step, however many sequences share it
    kv_read_bytes: float
    kv_write_bytes: float

    @property
    def flops(self) -> int:
        return self.linear_flops + self.attention_flops

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.kv_read_bytes + self.kv_write_bytes

    @property
    def intensity(self) -> float:
        """FLOP a byte; infinite for a step that moves nothing."""
        return self.flops / self.bytes if self.bytes else float("inf")

    @property
    def linear_intensity(self) -> float:
        """Of the products with weights: about 2·n/b for n tokens in the step and b bytes a weight."""
        return self.linear_flops / self.weight_bytes if self.weight_bytes else float("inf")

    @property
    def attention_intensity(self) -> float:
        """Of attention over the cache: 2·(H/G)/b in a decode step, whatever the batch and the context."""
        return self.attention_flops / self.kv_read_bytes if self.kv_read_bytes else float("inf")

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
    n, d = config.hidden_size, config.head_dim
    heads = config.num_attention_heads + config.num_key_value_heads
    return 2 * n * d * heads + 3 * n * config.intermediate_size


def keys_seen(past: int, new: int, window: int | None = None) -> int:
    """Σ over the new queries of the keys that each sees: min(past + t + 1, window) for t = 0 … new − 1."""
    growing = new if window is None else min(new, max(0, window - past))  # queries whose window is not full
    full = (new - growing) * (window or 0)
    return growing * past + growing * (growing + 1) // 2 + full


def step_cost(
    config: ModelConfig,
    batch: Batch,
    *,
    weight_bytes_per_param: float = 2.0,
    kv_bytes_per_number: float = 2.0,
    logits_rows: int | None = None,
) -> Cost:
    """Operations and bytes of one step over a ragged batch [(past, new), …].

    ``logits_rows`` is the number of rows that meet the LM head: by default one a sequence with new tokens, the
    row that is sampled from. The head counts also where it is tied; the embedding lookup costs its rows' bytes
    and no FLOP. Keys and values are read once a step, the new ones included.

    Raises
    ------
    ValueError
        for a negative past or new, or for more rows of logits than tokens.
    """
    if any(past < 0 or new < 0 for past, new in batch):
        raise ValueError(f"step_cost: past and new must not be negative, got {list(batch)}")
    tokens = sum(new for _, new in batch)
    rows = sum(new > 0 for _, new in batch) if logits_rows is None else logits_rows
    if not 0 <= rows <= tokens:
        raise ValueError(f"step_cost: {rows} rows of logits from {tokens} tokens")
    if tokens == 0:
        return Cost(0, 0, 0, 0, 0)
    layers, width = config.num_hidden_layers, config.hidden_size
    head = config.vocab_size * width
    window = config.sliding_window
    seen = sum(keys_seen(past, new, window) for past, new in batch)
    # a window's queries reach back window − 1 tokens before the first of them
    read = sum(past + new if window is None else min(past + new, new + window - 1) for past, new in batch if new)
    stored = config.num_parameters - head * (1 if config.tie_word_embeddings else 2)  # layers, norms, biases
    weights = stored + (head if rows else 0) + tokens * width
    kv = 2 * layers * config.num_key_value_heads * config.head_dim * kv_bytes_per_number
    return Cost(
        linear_flops=2 * layers * layer_parameters(config) * tokens + 2 * head * rows,
        attention_flops=4 * layers * config.num_attention_heads * config.head_dim * seen,
        weight_bytes=weights * weight_bytes_per_param,
        kv_read_bytes=kv * read,
        kv_write_bytes=kv * tokens,
    )


@dataclass(frozen=True)
class Device:
    """What the roofline knows of a device."""

    name: str
    peak_flops: float  # FLOP/s of dense products in the precision that the name states
    peak_bandwidth: float  # bytes/s of main memory
    overhead: float = 0.0  # seconds a step that neither limit explains: launches, the interpreter
    source: str = ""

    @property
    def ridge(self) -> float:
        """FLOP a byte at which compute and memory take equally long."""
        return self.peak_flops / self.peak_bandwidth


# Peaks of the vendor's data sheets, without structured sparsity (with it the sheets print twice as much).
DEVICES = {
    "h200": Device("H200 SXM, bf16 dense", 989e12, 4.8e12, source="NVIDIA H200 data sheet: 1,979 TFLOP/s sparse"),
    "a100": Device("A100 SXM 80 GB, bf16 dense", 312e12, 2.039e12, source="NVIDIA A100 data sheet"),
}


def projected_seconds(cost: Cost, device: Device) -> float:
    """max(FLOP / peak FLOP/s, bytes / peak bytes/s) + overhead: a lower bound, kind C (projected)."""
    return max(cost.flops / device.peak_flops, cost.bytes / device.peak_bandwidth) + device.overhead


def mfu(cost: Cost, seconds: float, device: Device) -> float:
    """Model FLOP utilisation: the share of the peak FLOP/s that a step of ``seconds`` used."""
    return cost.flops / seconds / device.peak_flops


def mbu(cost: Cost, seconds: float, device: Device) -> float:
    """Model bandwidth utilisation: (weights + KV read) / seconds / peak bandwidth."""
    return (cost.weight_bytes + cost.kv_read_bytes) / seconds / device.peak_bandwidth


def measure_machine(threads: int = 1, *, size: int = 1024, megabytes: int = 256, repeats: int = 5) -> Device:
    """Measure this machine in about a second: sgemm rate and memory bandwidth, kind B (measured here).

    ``threads`` BLAS threads. The rate is that of a float32 product of two matrices of ``size``; the bandwidth
    that of a dot product of two float32 vectors of ``megabytes`` together, beyond any last-level cache. Both are
    medians of ``repeats`` calls after one to warm up, or of as many as a busy machine does in a second each.
    """
    with threadpool_limits(limits=threads, user_api="blas"):
        a = np.ones((size, size), np.float32)
        out = np.empty_like(a)
        gemm = _median_seconds(lambda: np.matmul(a, a, out=out), repeats)
        x, y = np.ones((2, megabytes * 1_000_000 // 8), np.float32)
        read = _median_seconds(lambda: np.dot(x, y), repeats)
        blas: dict[str, Any] = next((p for p in threadpool_info() if p.get("user_api") == "blas"), {})
    name = f"{_processor()}, float32, {threads} thread{'s' if threads > 1 else ''}"
    how = f"sgemm {size}³ and dot of {megabytes} MB, medians of {repeats}; NumPy {np.__version__}, "
    how += (
        f"{blas.get('internal_api', 'unknown BLAS')} {blas.get('version', '')}, {blas.get('num_threads', '?')} threads"
    )
    return Device(name, 2.0 * size**3 / gemm, (x.nbytes + y.nbytes) / read, source=how)


def _median_seconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < _MEASURE_SECONDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def plot_roofline(devices: Sequence[Device], points: Mapping[str, Cost]) -> Any:
    """The roofline of one or more devices with steps as points on the first one's: a matplotlib Figure."""
    from refllm.study import figures

    return figures.roofline(roofline_data(devices, points))


def roofline_data(devices: Sequence[Device], points: Mapping[str, Cost]) -> dict[str, Any]:
    """The numbers behind ``plot_roofline``, ready for a figure's data file."""
    return {
        "devices": [
            {"name": d.name, "peak_flops": d.peak_flops, "peak_bandwidth": d.peak_bandwidth, "source": d.source}
            for d in devices
        ],
        "points": [{"label": label, "intensity": c.intensity} for label, c in points.items()],
    }
