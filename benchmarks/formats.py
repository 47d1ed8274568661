"""How fast values are quantised to GGUF's bytes and back, against ggml's own C on one thread.

    python benchmarks/formats.py --output benchmarks/results/formats.json
    python benchmarks/formats.py --whole Llama-3.2-1B --output benchmarks/results/formats_whole.json

Both work on the same float32 matrix, in this process, one thread each, in turns; a ratio is
formed within each round, and its median over the rounds is shown. The clock is the
process's CPU time: a millisecond of C fits between two interruptions by other programs and a
hundred of NumPy do not, which would count against NumPy. The comparison calls
ggml_quantize_chunk and dequantize_row of llama-cpp-python's shared library; bytes are compared
before anything is timed.

``--whole`` writes a float32 checkpoint of random values in a published model's shapes (5
GB for 1B) into a temporary folder, converts it with as many processes as there are cores,
and prints how long that took, without a comparison.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, finish, table
from threadpoolctl import threadpool_limits

from refllm.formats.gguf.codec import dequantize, quantize
from refllm.formats.gguf.types import TYPES, row_bytes

BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
WITHOUT = ("Q8_0", "MXFP4")  # take no importance
WHOLE = {"Llama-3.2-1B": (128_256, 2048, 8192, 16, 32, 8, 64), "tiny": (512, 256, 512, 2, 4, 2, 64)}


class Ggml:
    """ggml's quantisers through its shared library."""

    def __init__(self) -> None:
        import llama_cpp

        self.lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
        self.floats = ctypes.POINTER(ctypes.c_float)
        size = ctypes.c_int64
        self.lib.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            self.floats,
            ctypes.c_void_p,
            size,
            size,
            size,
            self.floats,
        ]

    def quantize(self, x: np.ndarray, type: str, weights: np.ndarray | None = None) -> np.ndarray:
        out = np.empty((x.shape[0], row_bytes(type, x.shape[1])), dtype=np.uint8)
        given = None if weights is None else weights.ctypes.data_as(self.floats)
        self.lib.ggml_quantize_chunk(
            TYPES[type].id, x.ctypes.data_as(self.floats), out.ctypes.data, 0, *x.shape, given
        )
        return out

    def dequantize(self, raw: np.ndarray, type: str) -> np.ndarray:
        out = np.empty(
            (raw.shape[0], raw.shape[1] // TYPES[type].size * TYPES[type].block), dtype=np.float32
        )
        function = getattr(self.lib, "dequantize_row_" + type.lower().replace("_k", "_K"))
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function(raw.ctypes.data, out.ctypes.data, out.size)
        return out


def race(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int
) -> tuple[float, float, float]:
    """Median seconds of each, and the median of the rounds' ratios ours/theirs."""
    times: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        lap = []
        for function in (ours, theirs) if number % 2 else (theirs, ours):
            began = time.process_time()
            function()
            lap.append(time.process_time() - began)
        if number:  # the first is the warm-up
            times.append((lap[0], lap[1]) if number % 2 else (lap[1], lap[0]))
    a, b = (statistics.median(t[i] for t in times) for i in (0, 1))
    return a, b, statistics.median(x / y for x, y in times)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each type: encoding, encoding with importance, decoding."""
    ggml = Ggml()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((options.rows, options.columns)).astype(np.float32)
    weights = rng.uniform(0.1, 2, options.columns).astype(np.float32)
    rows = []
    for type in options.types:
        row: dict[str, Any] = {"type": type}
        for what, w in (("encode", None), ("encode with importance", weights)):
            if w is not None and type in WITHOUT:
                continue
            if not np.array_equal(quantize(x, type, w), ggml.quantize(x, type, w)):
                raise AssertionError(f"{type}, {what}: the bytes differ")
            row[what] = lap(
                race(
                    lambda t=type, w=w: quantize(x, t, w),
                    lambda t=type, w=w: ggml.quantize(x, t, w),
                    options.rounds,
                ),
                x,
            )
        raw = quantize(x, type)
        if not np.array_equal(dequantize(raw, type), ggml.dequantize(raw, type)):
            raise AssertionError(f"{type}: decoded numbers differ")
        row["decode"] = lap(
            race(
                lambda r=raw, t=type: dequantize(r, t),
                lambda r=raw, t=type: ggml.dequantize(r, t),
                options.rounds,
            ),
            x,
        )
        rows.append(row)
    return rows


def lap(found: tuple[float, float, float], x: np.ndarray) -> dict[str, float]:
    ours, theirs, ratio = found
    return {
        "ns": round(1e9 * ours / x.size, 2),
        "peer_ns": round(1e9 * theirs / x.size, 2),
        "ratio": round(ratio, 2),
    }


def whole(name: str, type: str, workers: int) -> dict[str, Any]:
    """Seconds of a conversion of random weights in a published model's shapes."""
    from refllm.checkpoints.tensor_files import tensor_shapes
    from refllm.checkpoints.tokenizer import Tokenizer
    from refllm.checkpoints.writer import save
    from refllm.model.config import ModelConfig
    from refllm.quant.to_gguf import convert

    config = ModelConfig(
        "llama", *WHOLE[name], tie_word_embeddings=True, bos_token_id=0, eos_token_ids=(0,)
    )

    class Random(dict[str, np.ndarray]):  # each tensor is drawn when it is written
        def __getitem__(self, key: str) -> np.ndarray:
            shape = dict(tensor_shapes(config))[key]
            return np.random.default_rng(len(key)).standard_normal(
                shape, dtype=np.float32
            ) * np.float32(0.02)

    with tempfile.TemporaryDirectory() as folder:
        shapes = {
            key: np.broadcast_to(np.float32(0), shape) for key, shape in tensor_shapes(config)
        }
        tensors = Random(shapes)
        save(
            Path(folder) / "hf",
            config,
            tensors,
            Tokenizer.train(["a b c"], 300),
            dtype="float32",
            max_shard_bytes=1 << 30,
        )
        began = time.perf_counter()
        made = convert(Path(folder) / "hf", Path(folder) / "x.gguf", type, workers=workers)
        seconds = time.perf_counter() - began
    return {
        "shapes": name,
        "type": type,
        "parameters": config.num_parameters,
        "seconds": round(seconds, 1),
        "bits per weight": round(made.bits_per_weight, 4),
        "processes": workers,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    record: dict[str, Any] = {"benchmark": "formats"}
    if options.whole:
        record["environment"] = environment((), {"refllm": 1})
        record["settings"] = {
            "whole": options.whole,
            "type": options.type,
            "workers": options.workers,
            "rounds": 1,
        }
        found = whole(options.whole, options.type, options.workers)
        record["results"] = found
        print("\n" + ", ".join(f"{key} {value}" for key, value in found.items()))
        finish(record, options.output)
        return 0
    with threadpool_limits(1):
        record["environment"] = environment(("llama-cpp-python",), {"refllm": 1, "ggml": 1})
        record["settings"] = {
            name: getattr(options, name) for name in ("rows", "columns", "rounds")
        }
        record["results"] = measure(options)
    rows = []
    for r in record["results"]:
        cells = (r.get(what) for what in ("encode", "encode with importance", "decode"))
        rows.append(
            [r["type"], *(f"{c['ns']:.1f} ({c['ratio']:.2f}×)" if c else "" for c in cells)]
        )
    table(
        "ns per value, and times ggml's (measured here)",
        ["type", "encode", "with importance", "decode"],
        rows,
    )
    finish(record, options.output)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How fast numbers become GGUF's bytes, against ggml's C."
    )
    parser.add_argument("--types", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--whole", choices=WHOLE, help="convert a whole checkpoint of these shapes instead"
    )
    parser.add_argument("--type", default="Q4_K_M", help="the mix, with --whole")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes, with --whole"
    )
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
