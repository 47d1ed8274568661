"""Peaks of a device, as the roofline needs them: from data sheets, or measured on this machine.

| quantity | how it is measured here                                                  |
|----------|--------------------------------------------------------------------------|
| FLOP/s   | a float32 product of two square matrices, 2·n³ operations                |
| bytes/s  | a dot product of two vectors that no cache holds, each element read once |

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

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

import refllm
from refllm.array_types import Json
from refllm.errors import InputError

_MEASURE_SECONDS = 1.0


@dataclass(frozen=True)
class DeviceSpec:
    """The peaks of a device, and the time per step that they do not explain.

    >>> DeviceSpec("a device", peak_flops=2e12, peak_bandwidth=1e11).ridge
    20.0
    """

    name: str
    peak_flops: float  # FLOP/s of dense products in the precision that the name states
    peak_bandwidth: float  # bytes/s of main memory
    overhead: float = 0.0  # seconds per step: kernel launches, the interpreter
    source: str = ""

    def __post_init__(self) -> None:
        if not (
            0 < self.peak_flops < inf and 0 < self.peak_bandwidth < inf and 0 <= self.overhead < inf
        ):
            raise InputError(
                f"a device needs finite peaks above 0 and an overhead of 0 or more, got {self}"
            )

    @property
    def ridge(self) -> float:
        """FLOP per byte at which compute and memory take equally long."""
        return self.peak_flops / self.peak_bandwidth


# Peaks of the vendor's data sheets, without structured sparsity (with it the sheets print
# twice as much).
DEVICES = {
    "h200": DeviceSpec(
        "H200 SXM, bf16 dense",
        989e12,
        4.8e12,
        source="NVIDIA H200 data sheet: 1,979 TFLOP/s sparse",
    ),
    "a100": DeviceSpec(
        "A100 SXM 80 GB, bf16 dense", 312e12, 2.039e12, source="NVIDIA A100 data sheet"
    ),
}


def measure_machine(
    threads: int = 1, *, size: int = 1024, megabytes: int = 256, repeats: int = 5
) -> DeviceSpec:
    """Measure this machine in about a second: sgemm rate and memory bandwidth.

    ``threads`` BLAS threads. The rate is that of a float32 product of two matrices of
    ``size``; the bandwidth that of a dot product of two float32 vectors of ``megabytes``
    together, more than any last-level cache holds. Both are medians of ``repeats`` calls
    after one to warm up, or of as many as a busy machine completes in a second.
    """
    with threadpool_limits(limits=threads, user_api="blas"):
        a = np.ones((size, size), np.float32)
        out = np.empty_like(a)
        gemm = _median_seconds(lambda: np.matmul(a, a, out=out), repeats)
        x, y = np.ones((2, megabytes * 1_000_000 // 8), np.float32)
        read = _median_seconds(lambda: np.dot(x, y), repeats)
        blas: Json = next((p for p in threadpool_info() if p.get("user_api") == "blas"), {})
    name = f"{processor()}, float32, {threads} thread{'s' if threads > 1 else ''}"
    library = f"{blas.get('internal_api', 'unknown BLAS')} {blas.get('version', '')}"
    source = (
        f"sgemm {size}³ and dot of {megabytes} MB, medians of {repeats}; "
        f"NumPy {np.__version__}, {library}, {blas.get('num_threads', '?')} threads"
    )
    return DeviceSpec(name, 2.0 * size**3 / gemm, (x.nbytes + y.nbytes) / read, source=source)


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of ``call``, after one call to warm up."""
    call()
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < _MEASURE_SECONDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def processor() -> str:
    """The name of the processor, where the system reports it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_details() -> str:
    """Name, family and model number, and the widest vector instructions of the processor:
    virtual machines often hide the exact name.
    """
    fields = _cpuinfo()
    if not fields:
        return processor()
    flags = fields.get("flags", "").split()
    vectors = next((name for name in ("amx_tile", "avx512f", "avx2") if name in flags), "")
    number = "/".join(fields.get(key, "?") for key in ("cpu family", "model"))
    return f"{processor()}, family/model {number} {vectors}".strip()


def _cpuinfo() -> dict[str, str]:
    """What Linux says about the last of its processors; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def one_thread() -> str:
    """Hardware and versions of a measurement on one BLAS thread, for a record."""
    return f"{processor()}, one thread, NumPy {np.__version__}, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    """Versions of the software behind a measurement, for a record."""
    return {
        "refllm": refllm.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
