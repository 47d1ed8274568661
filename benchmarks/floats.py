"""Encoding and decoding small floats against ml_dtypes, in turn, in one process and on one
thread.

    python benchmarks/floats.py --output benchmarks/results/floats.json

Both are NumPy operations of one thread without BLAS: no engine in a process of its own is
needed. The ratio is ml_dtypes' time over ours, so 2 means twice as fast. Left out: GPUs,
float16 (NumPy's own type).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import ml_dtypes
import numpy as np

from refllm.formats.minifloat import dequantize, quantize

ML_DTYPES = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e2m1": "float4_e2m1fn",
    "e8m0": "float8_e8m0fnu",
    "bf16": "bfloat16",
}


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(fmt: str, x: np.ndarray, rounds: int) -> dict[str, Any]:
    dtype = np.dtype(getattr(ml_dtypes, ML_DTYPES[fmt]))
    reference = x.astype(dtype)
    codes = quantize(x, fmt, "saturate")
    calls = {
        "encode": (lambda: quantize(x, fmt), lambda: x.astype(dtype)),
        "decode": (lambda: dequantize(codes, fmt), lambda: reference.astype(np.float32)),
    }
    found: dict[str, Any] = {}
    for name, (ours, theirs) in calls.items():
        # the first touches the memory
        pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:]
        found[name] = {
            "ratio": common.ratios([b for _, b in pairs], [a for a, _ in pairs]),
            "ns": common.spread([1e9 * a / x.size for a, _ in pairs]),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numbers", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    settings = {"numbers": chosen.numbers, "rounds": chosen.rounds}
    record: dict[str, Any] = {"benchmark": "floats", "settings": settings}
    record["environment"] = common.environment(["ml_dtypes"], {"refllm": 1, "ml_dtypes": 1})
    x = np.abs(
        np.random.default_rng(0).standard_normal(chosen.numbers).astype(np.float32)
    ) + np.float32(1e-3)
    record["results"] = {fmt: measure(fmt, x, chosen.rounds) for fmt in ML_DTYPES}
    rows = [
        (
            fmt,
            *(
                cell
                for name in ("encode", "decode")
                for cell in (common.shown(f[name]["ratio"]), f"{f[name]['ns']['median']:.2f}")
            ),
        )
        for fmt, f in record["results"].items()
    ]
    common.table(
        "Times as fast as ml_dtypes (range of the rounds), and our nanoseconds a number",
        ("format", "encode", "ns", "decode", "ns"),
        rows,
    )
    common.finish(record, chosen.output)


if __name__ == "__main__":
    main()
