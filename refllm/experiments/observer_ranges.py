"""What each observer does to a heavy-tailed tensor: where it cuts, and what that does to
the error of rounding.

    python -m refllm.experiments.observer_ranges          # writes
    figures/data/observers.json; `refllm figures` draws it

The tensor is drawn from Student's t distribution with 3 degrees of freedom, whose tail
falls as x⁻⁴ (activations of large networks are like that), in batches of which the first
has a fifth of the others' size: a moving average hardly gets beyond it. Every observer sees
the same batches in the same order.

| symbol | name                                                                       |
|--------|----------------------------------------------------------------------------|
| cut    | the largest magnitude that the observer's range keeps                      |
| beyond | share of the numbers that are clipped                                      |
| error  | ‖x̂ − x‖² / ‖x‖² of the whole tensor, rounded with the range's step         |

Left out: ranges by channel; what the error does to a network (``quality``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refllm.formats.uniform import Scheme, dequantize_codes, quantize_codes
from refllm.measure.records import Record, write
from refllm.quant.observers import MSE, Entropy, MinMax, MovingAverage, Observer, Percentile
from refllm.quant.report import relative_error

BATCHES = 8
SIZE = 1 << 14
FIRST = 0.2
FREEDOM = 3
BITS = (8, 4)
BINS = 60


def observers(bits: int) -> dict[str, Callable[[], Observer]]:
    """Every observer by the name that the figure gives it, for codes of so many bits."""
    scheme = Scheme(bits, "half_integer", "tensor")
    return {
        "min-max": MinMax,
        "moving average": MovingAverage,
        "percentile 99.99": lambda: Percentile(99.99),
        "percentile 99.9": lambda: Percentile(99.9),
        "MSE": lambda: MSE(
            scheme, averaging=1.0, grid=200, max_shrink=0.995, norm=2.0, patience=None
        ),
        "entropy": lambda: Entropy(bits, start=max(16, 1 << (bits - 1))),
    }


def batches(seed: int = 0) -> list[np.ndarray]:
    """``BATCHES`` batches of ``SIZE`` numbers, the first of them smaller in size."""
    rng = np.random.default_rng(seed)
    parts = [rng.standard_t(FREEDOM, SIZE).astype(np.float32) for _ in range(BATCHES)]
    return [np.float32(FIRST) * parts[0], *parts[1:]]


def observed(parts: Sequence[np.ndarray], bits: int) -> list[dict[str, Any]]:
    """A row for each observer: what it cuts, and what its range does to all of the tensor."""
    x = np.concatenate(parts)
    scheme = Scheme(bits, "half_integer", "tensor")
    rows = []
    for name, make in observers(bits).items():
        observer = make()
        # the search has no mean to take: it sees the whole
        for part in parts if name != "MSE" else [x]:
            observer.observe(part)
        scale, zero = observer.qparams(scheme)
        back = dequantize_codes(quantize_codes(x, scale, zero, scheme), scale, zero, scheme)
        cut = float(observer.absmax)
        rows.append(
            {
                "observer": name,
                "bits": bits,
                "cut": cut,
                "beyond": float(np.mean(np.abs(x) > cut)),
                "error": relative_error(x, back),
            }
        )
    return rows


def values(seed: int = 0) -> dict[str, Any]:
    """What the record holds: the histogram of |x| on logarithmic bins, and the rows."""
    parts = batches(seed)
    size = np.abs(np.concatenate(parts))
    edges = np.geomspace(0.01, float(size.max()), BINS + 1)
    counts, _ = np.histogram(size, edges)
    return {
        "tensor": f"Student's t, {FREEDOM} degrees of freedom, {size.size:,} numbers",
        "edges": edges.tolist(),
        "density": (counts / size.size / np.diff(edges)).tolist(),
        "rows": [row for bits in BITS for row in observed(parts, bits)],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Show the tensor to every observer and write the record that the figure is drawn from."""
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.observer_ranges", description=main.__doc__
    )
    parser.add_argument("--output", type=Path, default=Path("figures/data/observers.json"))
    chosen = parser.parse_args(arguments)
    write(
        chosen.output, Record("python -m refllm.experiments.observer_ranges", "A", "none", values())
    )


if __name__ == "__main__":
    main()
