"""Record what NVIDIA's modelopt makes of a few samples: ``entropy.json``, for
``test_histogram``, ``test_observers``.

    python -m venv reference
    reference/bin/pip install nvidia-modelopt==0.47.0 scipy torch requests
    reference/bin/python tests/golden/make_entropy.py

Two kinds of case. *cuts*: a histogram that NumPy counted, and the bins that modelopt's
entropy and percentile functions keep of it. *calibrators*: batches that its
``HistogramCalibrator`` collected one after the other, with the largest magnitude first, and
the amax of each method. Samples are drawn from a seed: the tests draw the same ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("entropy.json")
PERCENTILES = [50.0, 99.0, 99.9, 99.99]

# kind of sample, its seed and size, bins, bits, unsigned, first candidate
CUTS: list[dict[str, Any]] = [
    {
        "kind": "normal",
        "seed": 0,
        "size": 100_003,
        "bins": 2048,
        "bits": 8,
        "unsigned": False,
        "start": 128,
    },
    {
        "kind": "student",
        "seed": 1,
        "size": 100_003,
        "bins": 2048,
        "bits": 8,
        "unsigned": False,
        "start": 128,
    },
    {
        "kind": "outlier",
        "seed": 2,
        "size": 50_021,
        "bins": 2048,
        "bits": 8,
        "unsigned": False,
        "start": 128,
    },
    {
        "kind": "relu",
        "seed": 3,
        "size": 100_003,
        "bins": 2048,
        "bits": 8,
        "unsigned": True,
        "start": 256,
    },
    {
        "kind": "relu",
        "seed": 4,
        "size": 30_011,
        "bins": 1000,
        "bits": 8,
        "unsigned": False,
        "start": 128,
    },
    {
        "kind": "laplace",
        "seed": 5,
        "size": 20_011,
        "bins": 300,
        "bits": 4,
        "unsigned": False,
        "start": 128,
    },
    {
        "kind": "laplace",
        "seed": 6,
        "size": 5_003,
        "bins": 257,
        "bits": 5,
        "unsigned": False,
        "start": 16,
    },
    {
        "kind": "uniform",
        "seed": 7,
        "size": 10_007,
        "bins": 512,
        "bits": 8,
        "unsigned": False,
        "start": 128,
    },
    {
        "kind": "relu",
        "seed": 9,
        "size": 20_011,
        "bins": 600,
        "bits": 8,
        "unsigned": True,
        "start": 128,
    },
    {
        "kind": "student",
        "seed": 8,
        "size": 401,
        "bins": 2048,
        "bits": 8,
        "unsigned": False,
        "start": 128,
    },
]
CALIBRATORS: list[dict[str, Any]] = [
    {"kind": "normal", "seed": 20, "size": 30_011, "batches": 1},
    {"kind": "student", "seed": 21, "size": 30_011, "batches": 3},
    {"kind": "relu", "seed": 22, "size": 30_011, "batches": 4},
    {"kind": "outlier", "seed": 23, "size": 30_011, "batches": 2},
]


def sample(kind: str, seed: int, size: int) -> np.ndarray:
    """The float32 sample that (kind, seed, size) stands for."""
    rng = np.random.default_rng(seed)
    if kind == "student":
        x = rng.standard_t(3, size)
    elif kind == "laplace":
        x = rng.laplace(size=size)
    elif kind == "uniform":
        x = rng.uniform(-1, 1, size)
    else:
        x = rng.standard_normal(size)
    if kind == "outlier":
        x[:: size // 20] *= 50.0
    if kind == "relu":
        x = np.maximum(x, 0.0)
    return x.astype(np.float32)


def histogram(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Counts [bins] and edges [bins + 1] of the magnitudes, up to the largest."""
    x = np.abs(sample(case["kind"], case["seed"], case["size"])).astype(np.float64)
    return np.histogram(x, bins=case["bins"], range=(0.0, float(x.max())))


def batches(case: dict[str, Any]) -> list[np.ndarray]:
    """The sample in parts, the one with the largest magnitude first: no later one makes the
    histogram grow.
    """
    parts = np.array_split(sample(case["kind"], case["seed"], case["size"]), case["batches"])
    first = int(np.argmax([np.abs(p).max() for p in parts]))
    return [parts[first], *parts[:first], *parts[first + 1 :]]


def main() -> None:
    """Needs modelopt."""
    import modelopt
    import torch
    from modelopt.torch.quantization.calib.histogram import (
        HistogramCalibrator,
        _compute_amax_entropy,
        _compute_amax_percentile,
    )

    made: dict[str, Any] = {"modelopt": modelopt.__version__, "cuts": [], "calibrators": []}
    for case in CUTS:
        counts, _ = histogram(case)
        # edges of width 1: what comes back is a number of bins
        at = np.arange(len(counts) + 1, dtype=np.float64)
        cut = _compute_amax_entropy(
            counts.copy(), at, case["bits"], case["unsigned"], 1, case["start"]
        )
        percentiles = [int(_compute_amax_percentile(counts, at, p)) for p in PERCENTILES]
        made["cuts"].append({"entropy": int(cut), "percentiles": percentiles})
        print(case, made["cuts"][-1], flush=True)
    for case in CALIBRATORS:
        calibrator = HistogramCalibrator(num_bits=8, unsigned=False)
        for batch in batches(case):
            calibrator.collect(torch.from_numpy(batch.copy()))
        counted = calibrator._calib_hist.int().tolist()
        percentiles = [
            float(calibrator.compute_amax("percentile", percentile=p)) for p in PERCENTILES
        ]
        entropy = float(calibrator.compute_amax("entropy"))
        made["calibrators"].append(
            {"entropy": entropy, "percentiles": percentiles, "counts": counted}
        )
        print(case, entropy, percentiles, flush=True)
    FILE.write_text(json.dumps(made, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
