"""Why ``Dense`` stores a weight in blocks of output columns: one product, plain against
blocked, for 1 to 512 rows.

    python benchmarks/layout.py --output benchmarks/results/layout.json

x[rows, N] times W[M, N] transposed, once with W as one matrix (``x @ W.T``), once as
``refllm.model.weights.Dense`` stores it on this processor: with AVX-512 in blocks of 64
columns ([M/64, N, 64], a batched product), without it in one block of all ([1, N, M]). From
2 rows on OpenBLAS repacks the whole plain weight for every product, which costs more than the
few multiplications themselves. With AVX-512 it multiplies a block of 64 columns
without packing; otherwise it packs contiguous columns faster than rows, and up to 3 rows are
multiplied one by one.

The shapes are the bundled model's: the head, the gate, the way back. Each layout walks
through copies of the weight that fill 16 MB together, as the weights of a decode step do: a
single one would sit in the first caches and flatter both. The two take turns; times are
lower quartiles over the rounds, and the two results are compared.

One thread, float32. Left out: other widths than 64 (``--block`` tries one), other BLAS
libraries than NumPy's.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from common import environment, finish, table
from threadpoolctl import threadpool_limits

from refllm.model import weights
from refllm.model.weights import Dense

SHAPES = ((4096, 256), (768, 256), (256, 768))  # M × N
ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
WORKING_SET = 16 << 20  # bytes


def measure(
    shape: tuple[int, int], rows: Sequence[int], rounds: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """One result a row count: microseconds a product, both ways, and the median ratio of
    the rounds.
    """
    m, n = shape
    copies = max(1, WORKING_SET // (4 * m * n))
    plain = [rng.standard_normal(shape, dtype=np.float32) for _ in range(copies)]
    blocked = [Dense(w) for w in plain]
    if not blocked[0].blocked:
        raise SystemExit(f"{m} output columns are not stored in blocks of {weights.BLOCK}")
    out = []
    for count in rows:
        x = rng.standard_normal((count, n), dtype=np.float32)
        check(x @ plain[0].T, blocked[0].matmul(x))
        pairs = []
        for _ in range(rounds):
            one = seconds(lambda w, x=x: x @ w.T, plain)
            two = seconds(lambda w, x=x: w.matmul(x), blocked)
            pairs.append((one, two))
        times = 1e6 * np.percentile(pairs, 25, axis=0)
        ratio = float(np.median([a / b for a, b in pairs]))
        out.append(
            {
                "m": m,
                "n": n,
                "rows": count,
                "plain_us": round(float(times[0]), 2),
                "blocked_us": round(float(times[1]), 2),
                "ratio": round(ratio, 3),
            }
        )
    return out


def seconds(product: Callable[[Any], Any], copies: Sequence[Any]) -> float:
    """Time of one product, averaged over a walk through all copies."""
    began = time.perf_counter()
    for weight in copies:
        product(weight)
    return (time.perf_counter() - began) / len(copies)


def check(plain: np.ndarray, blocked: np.ndarray) -> None:
    """The same products summed in another order: rounding of N terms of size about 1 apart."""
    n = plain.shape[1]
    bound = 8 * np.finfo(np.float32).eps * math.sqrt(n) * float(np.abs(plain).max())
    if not np.abs(plain - blocked).max() <= bound:
        raise SystemExit("the two layouts disagree: the comparison is void")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    rng = np.random.default_rng(0)
    if weights.has_small_kernels():
        layout = f"blocks of {options.block} columns"
    else:
        layout = "one block of all columns"
    with threadpool_limits(1), mock.patch.object(weights, "BLOCK", options.block):
        record = {
            "benchmark": "layout",
            "environment": environment((), {"numpy": 1}),
            "settings": {
                "rows": options.rows,
                "rounds": options.rounds,
                "block": options.block,
                "layout": layout,
                "working_set_bytes": WORKING_SET,
            },
            "results": [
                r for shape in SHAPES for r in measure(shape, options.rows, options.rounds, rng)
            ],
        }
    for m, n in SHAPES:
        rows = [
            [r["rows"], f"{r['plain_us']:.0f}", f"{r['blocked_us']:.0f}", f"{r['ratio']:.2f}x"]
            for r in record["results"]
            if (r["m"], r["n"]) == (m, n)
        ]
        title = f"x[rows, {n}] by W[{m}, {n}] transposed, microseconds, blocked: {layout}"
        table(title, ["rows", "plain", "blocked", "plain / blocked"], rows)
    finish(record, options.output)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plain against blocked weights, by rows.")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--block", type=int, default=weights.BLOCK, help="output columns a block, with AVX-512"
    )
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
