"""How fast ``refllm simulate`` is: token-steps per second of the simulator, and what its
jumps save.

    python benchmarks/simulation.py --rounds 3 --output benchmarks/results/simulation.json

A token-step is a token that one request computes in one step: a prompt of P tokens and an
answer of O are P + O − 1 of them, and as many again after a preemption. ``sequence-steps``
count a prompt's chunk once. The baseline is the same simulation plan by plan (``jumps=False``),
whose results are the same; the two take turns in every round.

Traffic with ShareGPT's lengths, all at once; memory for about 7, 30 and 250 requests. Rates
by wall clock and by the processor's time, which a busy machine distorts less.

Left out: the simulation of padded batches, which has no jumps.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, finish, ratios, shown, spread, table

from refllm.kv.block_pool import BlockPool
from refllm.measure.device import DEVICES
from refllm.measure.memory import LLAMA_8B
from refllm.measure.roofline_clock import RooflineClock
from refllm.serve import factory
from refllm.serve.request import Request
from refllm.simulate.simulator import Simulator
from refllm.simulate.workload import SHAREGPT, requests

# name → (policy, slots, requests that may run)
SETTINGS: dict[str, tuple[str, int, int | None]] = {
    "Orca (Max), 15,700 slots": ("orca-max", 15_700, None),
    "paged, 15,700 slots": ("fcfs", 15_700, None),
    "paged, 96,000 slots": ("fcfs", 96_000, 256),
}
TARGET = 200_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Token-steps a second of the simulator.")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    options = parser.parse_args(arguments)
    asked = requests(SHAREGPT, options.requests, np.random.default_rng(0))
    record: dict[str, Any] = {
        "benchmark": "simulation",
        "environment": environment((), {"simulator": 1}),
        "settings": {"requests": options.requests, "rounds": options.rounds, "target": TARGET},
        "results": [],
    }
    for name in SETTINGS:
        runs = [
            [once(name, asked, jumps) for jumps in (True, False)] for _ in range(options.rounds)
        ]
        record["results"].append(result(name, runs))
    show(record)
    finish(record, options.output)
    return 0


def once(name: str, asked: Sequence[Request], jumps: bool) -> dict[str, float]:
    """One simulation: its counts, and what it took."""
    policy, slots, sequences = SETTINGS[name]
    scheduler = factory.make(policy, BlockPool(slots // 16, 16), max_sequences=sequences)
    simulator = Simulator(scheduler, RooflineClock(LLAMA_8B, DEVICES["a100"]), jumps=jumps)
    wall = time.perf_counter()
    busy = time.process_time()
    run = simulator.run(asked)
    wall = time.perf_counter() - wall
    busy = time.process_time() - busy
    return {
        "wall": wall,
        "processor": busy,
        "tokens": run.all.tokens,
        "sequences": run.all.rows,
        "batch": run.all.batch,
    }


def result(name: str, runs: list[list[dict[str, float]]]) -> dict[str, Any]:
    """The row of the table. ValueError if the jumps changed what was counted."""
    jumped, plain = zip(*runs, strict=True)
    if any(a["tokens"] != b["tokens"] or a["sequences"] != b["sequences"] for a, b in runs):
        raise ValueError(
            f"{name}: the simulation with jumps counted something else than the one without"
        )
    rates = {
        clock: {
            what: spread([run[what] / run[clock] for run in jumped])
            for what in ("tokens", "sequences")
        }
        for clock in ("wall", "processor")
    }
    return {
        "setting": name,
        "batch": jumped[0]["batch"],
        "token_steps_per_second": {clock: rate["tokens"] for clock, rate in rates.items()},
        "sequence_steps_per_second": {clock: rate["sequences"] for clock, rate in rates.items()},
        "ratio_to_plan_by_plan": ratios(
            [b["processor"] for b in plain], [a["processor"] for a in jumped]
        ),
    }


def show(record: dict[str, Any]) -> None:
    print(
        f"\nThe simulator, {record['settings']['requests']} requests (measured here); target "
        f"{TARGET:,} token-steps a second"
    )
    rows = []
    for row in record["results"]:
        tokens = row["token_steps_per_second"]
        sequences = row["sequence_steps_per_second"]
        rows.append(
            [
                row["setting"],
                f"{row['batch']:.1f}",
                *(f"{tokens[c]['median']:,.0f}" for c in tokens),
                f"{sequences['processor']['median']:,.0f}",
                shown(row["ratio_to_plan_by_plan"]),
            ]
        )
    header = [
        "setting",
        "mean batch",
        "token-steps/s",
        "by processor",
        "sequence-steps/s",
        "with jumps / without",
    ]
    table("medians of the rounds", header, rows)


if __name__ == "__main__":
    sys.exit(main())
