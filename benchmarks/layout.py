"""Which layout ``Dense`` stores a weight in: one product, by the plain matrix and by each layout
of ``refllm.model.weight_layout``, for 1 to 512 rows.

    python benchmarks/layout.py --output benchmarks/results/layout.json
    python benchmarks/layout.py --shapes 960,576 3072,576 576,1536 49152,576

x[rows, N] times W[M, N] transposed, with W as one matrix (``x @ W.T``), and in blocks of 64
columns ([M/64, N, 64]), in tiles of 32 ([M/32, N, 32]) and in one block of all ([1, N, M]).
``chosen`` is the layout that the table in ``weight_layout`` picks for this processor's kernels;
``OPENBLAS_CORETYPE=Haswell`` or ``SkylakeX`` measures another family, where the processor has
its instructions.

The default shapes are the bundled model's: the head, the gate, the way back. Each layout walks
through copies of the weight that fill ``--megabytes`` together, as the weights of a decode step
do: a single one would sit in the first caches and flatter all. The layouts take turns; times
are lower quartiles over the rounds, and the results are compared.

One thread, float32. Left out: other BLAS libraries than NumPy's.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, finish, table
from threadpoolctl import threadpool_limits

from refllm.model.weight_layout import Blocks, OneBlock, Tiles, has_blocks, layout_for

SHAPES = ((4096, 256), (768, 256), (256, 768))  # M × N
ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
LAYOUTS = (Blocks, Tiles, OneBlock)


def measure(shape: tuple[int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One result per row count: microseconds per product in each layout, and the median ratio
    of the rounds, plain ÷ chosen.
    """
    m, n = shape
    if not has_blocks(shape):
        raise SystemExit(f"a weight of {m} output columns is not stored in blocks")
    rng = np.random.default_rng(0)
    copies = max(1, (options.megabytes << 20) // (4 * m * n))
    plain = [rng.standard_normal(shape, dtype=np.float32) for _ in range(copies)]
    stored = {layout.__name__: laid_out(layout, plain) for layout in LAYOUTS}
    chosen = layout_for(m).__name__
    out = []
    for count in options.rows:
        x = rng.standard_normal((count, n), dtype=np.float32)
        for weights in stored.values():
            check(x @ plain[0].T, weights[0].matmul(x))
        rounds: dict[str, list[float]] = {name: [] for name in ("plain", *stored)}
        for _ in range(options.rounds):
            rounds["plain"].append(seconds(lambda w, x=x: x @ w.T, plain))
            for name, weights in stored.items():
                rounds[name].append(seconds(lambda w, x=x: w.matmul(x), weights))
        ratio = np.median([a / b for a, b in zip(rounds["plain"], rounds[chosen], strict=True)])
        quartiles = {name: 1e6 * float(np.percentile(t, 25)) for name, t in rounds.items()}
        out.append(
            {
                "m": m,
                "n": n,
                "rows": count,
                "plain_us": round(quartiles.pop("plain"), 2),
                "layouts_us": {name: round(time, 2) for name, time in quartiles.items()},
                "chosen": chosen,
                "ratio": round(float(ratio), 3),
            }
        )
    return out


def laid_out(layout: type[Blocks], matrices: Sequence[np.ndarray]) -> list[Blocks]:
    """Each W[M, N] in a layout, in one array, as in a ``WeightArena``."""
    m, n = matrices[0].shape
    width = layout.width(m)
    arena = np.empty((len(matrices), m // width, n, width), dtype=np.float32)
    return [layout(data).fill(w) for data, w in zip(arena, matrices, strict=True)]


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
    with threadpool_limits(1):
        record = {
            "benchmark": "layout",
            "environment": environment((), {"numpy": 1}),
            "settings": {
                "rows": options.rows,
                "rounds": options.rounds,
                "working_set_bytes": options.megabytes << 20,
            },
            "results": [r for shape in options.shapes for r in measure(shape, options)],
        }
    for m, n in options.shapes:
        results = [r for r in record["results"] if (r["m"], r["n"]) == (m, n)]
        rows = [
            [
                r["rows"],
                f"{r['plain_us']:.0f}",
                *(f"{time:.0f}" for time in r["layouts_us"].values()),
                f"{r['ratio']:.2f}x",
            ]
            for r in results
        ]
        title = f"x[rows, {n}] by W[{m}, {n}] transposed, microseconds; chosen: "
        header = ["rows", "plain", *results[0]["layouts_us"], "plain / chosen"]
        table(title + results[0]["chosen"], header, rows)
    finish(record, options.output)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Layouts of a weight against the plain matrix.")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--shapes", type=_shape, nargs="+", default=list(SHAPES), metavar="M,N", help="W[M, N]"
    )
    parser.add_argument(
        "--megabytes", type=int, default=16, help="copies of the weight fill so much together"
    )
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, int]:
    m, n = text.split(",")
    return int(m), int(n)


if __name__ == "__main__":
    sys.exit(main())
