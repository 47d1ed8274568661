"""What a decode step costs with keys and values in few bits: KIVI's cache against a float32
cache.

    python benchmarks/kivi.py --output benchmarks/results/kivi.json

The bundled model decodes one token after another behind a prompt of ``--contexts`` tokens,
once with every value in float32 (``refllm.kv.contiguous``), once with codes of ``--bits``
bits (``refllm.kv.kivi_cache``, groups of 32, the newest 128 tokens in full). The caches
take turns, step by step, and hold the same tokens. NumPy decodes all codes before it
multiplies, so few bits cost time here; what they save is memory, which is counted.

One thread, float32. Left out: batches, kernels that decode while they multiply, and the
time of a prompt.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, finish, network, ratios, shown, table
from threadpoolctl import threadpool_limits

from refllm.api import Model, load
from refllm.decode.fast.captured_step import make_decode_step
from refllm.decode.generate import prefill
from refllm.kv.contiguous import ContiguousPolicy
from refllm.kv.interface import CachePolicy
from refllm.kv.kivi import Kivi
from refllm.measure.memory import kv_bytes


def measure(
    model: Model, context: int, bits: Sequence[int], steps: int, rounds: int
) -> list[dict[str, Any]]:
    """One result a number of bits at a length: the ratio of the steps' times in each round,
    and the bytes.
    """
    rng = np.random.default_rng(0)
    config = model.config
    like = model.weights["norm"]
    prompt = rng.integers(1, config.vocab_size, context).tolist()
    settings = [Kivi(b, b) for b in bits]
    policies: list[CachePolicy] = [ContiguousPolicy(), *settings]
    compute = make_decode_step(model.weights, config)
    caches = []
    for policy in policies:
        cache = policy.new_cache(config, 1, context + steps * (rounds + 1), like=like)
        prefill(model.weights, config, [prompt], cache)
        caches.append(cache)
    times: list[list[float]] = [[] for _ in caches]
    for index in range(rounds + 1):  # the first is warm-up
        spent = [0.0] * len(caches)
        for token in rng.integers(1, config.vocab_size, steps).tolist():
            for i, cache in enumerate(caches):
                began = time.perf_counter()
                compute([token], cache.positions([1]), cache.view([1]))
                cache.advance([1])
                spent[i] += time.perf_counter() - began
        if index:
            for mine, total in zip(times, spent, strict=True):
                mine.append(total / steps)
    full = kv_bytes(config, context, bits=32)
    return [
        {
            "context": context,
            "bits": kivi.key_bits,
            "full_us": round(1e6 * float(np.median(times[0])), 1),
            "kivi_us": round(1e6 * float(np.median(mine)), 1),
            "ratio": ratios(mine, times[0]),
            "bytes": kivi.nbytes(config, context, full=32),
            "full_bytes": full,
        }
        for kivi, mine in zip(settings, times[1:], strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with network(options.model) as (path, what), threadpool_limits(1):
        model = load(str(path), backend="numpy")
        record = {
            "benchmark": "kivi",
            "environment": environment((), {"refllm": 1}),
            "settings": {
                "model": what,
                "contexts": options.contexts,
                "bits": options.bits,
                "steps": options.steps,
                "rounds": options.rounds,
                "group": Kivi().group,
                "residual": Kivi().residual,
            },
            "results": [
                row
                for context in options.contexts
                for row in measure(model, context, options.bits, options.steps, options.rounds)
            ],
        }
    rows = [
        [
            r["context"],
            r["bits"],
            f"{r['full_us']:.0f}",
            f"{r['kivi_us']:.0f}",
            shown(r["ratio"]),
            f"{r['bytes'] / 1e3:.0f}",
            f"{100 * r['bytes'] / r['full_bytes']:.0f}%",
        ]
        for r in record["results"]
    ]
    table(
        "a decode step, microseconds, KIVI / full (measured here); bytes of the cache, of "
        "float32's (counted)",
        ["context", "bits", "full", "KIVI", "KIVI / full", "kB", "of full"],
        rows,
    )
    finish(record, options.output)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A decode step with a cache in few bits, and in full."
    )
    parser.add_argument("--model", help="a checkpoint; the bundled model if there is none")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024, 1800])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--steps", type=int, default=16, help="tokens a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
