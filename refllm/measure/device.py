"""What the roofline knows of a device: peaks from data sheets, or this machine's own,
measured.

| quantity       | how it is measured here                                                             |
|----------------|-------------------------------------------------------------------------------------|
| FLOP/s         | a float32 product of two square matrices, 2·n³ operations                           |
| bytes/s        | a dot product of two vectors that no cache holds, each number read once             |

Sources: NVIDIA's data sheets of the H200 and the A100; Williams et al. 2009 for the model
that needs them.

Left out: measuring a GPU (its libraries' peaks need tuned kernels); caches between the
registers and main memory.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

_MEASURE_SECONDS = 1.0


@dataclass(frozen=True)
class Device:
    """What the roofline knows of a device."""

    name: str
    peak_flops: float  # FLOP/s of dense products in the precision that the name states
    peak_bandwidth: float  # bytes/s of main memory
    overhead: float = 0.0  # seconds a step that neither limit explains: launches, the interpreter
    source: str = ""

    def __post_init__(self) -> None:
        if not (
            0 < self.peak_flops < inf and 0 < self.peak_bandwidth < inf and 0 <= self.overhead < inf
        ):
            raise ValueError(
                f"a device needs finite peaks above 0 and an overhead of 0 or more, got {self}"
            )

    @property
    def ridge(self) -> float:
        """FLOP a byte at which compute and memory take equally long."""
        return self.peak_flops / self.peak_bandwidth


# Peaks of the vendor's data sheets, without structured sparsity (with it the sheets print
# twice as much).
DEVICES = {
    "h200": Device(
        "H200 SXM, bf16 dense",
        989e12,
        4.8e12,
        source="NVIDIA H200 data sheet: 1,979 TFLOP/s sparse",
    ),
    "a100": Device("A100 SXM 80 GB, bf16 dense", 312e12, 2.039e12, source="NVIDIA A100 data sheet"),
}


def measure_machine(
    threads: int = 1, *, size: int = 1024, megabytes: int = 256, repeats: int = 5
) -> Device:
    """Measure this machine in about a second: sgemm rate and memory bandwidth, kind B
    (measured here).

    ``threads`` BLAS threads. The rate is that of a float32 product of two matrices of
    ``size``; the bandwidth that of a dot product of two float32 vectors of ``megabytes``
    together, beyond any last-level cache. Both are medians of ``repeats`` calls after one
    to warm up, or of as many as a busy machine does in a second each.
    """
    with threadpool_limits(limits=threads, user_api="blas"):
        a = np.ones((size, size), np.float32)
        out = np.empty_like(a)
        gemm = _median_seconds(lambda: np.matmul(a, a, out=out), repeats)
        x, y = np.ones((2, megabytes * 1_000_000 // 8), np.float32)
        read = _median_seconds(lambda: np.dot(x, y), repeats)
        blas: dict[str, Any] = next(
            (p for p in threadpool_info() if p.get("user_api") == "blas"), {}
        )
    name = f"{processor()}, float32, {threads} thread{'s' if threads > 1 else ''}"
    how = f"sgemm {size}³ and dot of {megabytes} MB, medians of {repeats}; NumPy {np.__version__}, "
    how += f"{blas.get('internal_api', 'unknown BLAS')} {blas.get('version', '')}, {blas.get('num_threads', '?')} threads"
    return Device(name, 2.0 * size**3 / gemm, (x.nbytes + y.nbytes) / read, source=how)


def _median_seconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < _MEASURE_SECONDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
