"""What continuous batching and chunked prefill buy: useful slots counted, latencies and
goodput projected.

| part     | question                                                                       | kind |
|----------|--------------------------------------------------------------------------------|------|
| useful   | of the decode slots of a static batch, how many yield a token                  | A    |
| chunks   | budget of a step against the gaps between tokens, and what it costs            | C    |
| goodput  | at which rate of arrivals do 90 % of the requests still meet the limits        | C    |
| swapping | preempting by recompute against moving blocks to the host, by size of a block  | C    |

Sources: Orca, Yu et al. 2022; Sarathi-Serve, Agrawal et al. 2024; DistServe, Zhong et al.
2024 (goodput as a rate); Kwon et al. 2023, section 7.3 (swapping).

Where it loses: at a low rate all policies are the same; a small budget makes the first
token wait and reads the prefix once a chunk; a batch of one has nothing to pad.

Left out: other devices and shapes (``refllm simulate``); the time of the scheduler itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from refllm.kv.block_pool import BlockPool
from refllm.measure.device import DEVICES
from refllm.measure.memory import LLAMA_8B
from refllm.measure.records import Record, write
from refllm.measure.roofline_clock import RooflineClock
from refllm.serve import factory
from refllm.serve.baselines.reservations import Rectangle
from refllm.serve.baselines.static_batching import Static
from refllm.serve.scheduler import Scheduler
from refllm.serve.swapping import Swapping
from refllm.simulate.metrics import Limits, attainment, capacity
from refllm.simulate.simulator import Simulator, Ticks
from refllm.simulate.workload import AZURE_CHAT, SHAREGPT, requests, useful_share

BATCHES = (1, 2, 4, 8, 16, 32, 64)
BUDGETS: tuple[int | None, ...] = (128, 256, 512, 1024, 2048, None)  # None: prompts whole
RATES = (0.5, 1, 2, 4, 8, 16, 32, 48, 64, 96)
LIMITS = Limits(ttft=0.5, tpot=0.02)
SLOTS = 131_072  # of a Llama-3-8B shape beside its weights: 17 GB
CLOCK = RooflineClock(LLAMA_8B, DEVICES["a100"])


def useful_data(seeds: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Static batches of each size: the exact expectation, and what the real scheduler
    counted.
    """
    exact = SHAREGPT.pmfs()[1]
    rows = []
    for batch in BATCHES:
        counted = []
        for seed in seeds:
            asked = requests(SHAREGPT, count // batch * batch, np.random.default_rng(seed))
            run = Simulator(Static(Rectangle(10**9), max_sequences=batch), Ticks()).run(asked)
            counted.append(run.all.rows / (run.all.rows + run.all.ghosts))
        rows.append({"batch": batch, "exact": useful_share(exact, batch), "counted": counted})
    return rows


def chunks_data(count: int, rate: float = 3.0) -> list[dict[str, Any]]:
    """Azure's conversations, whose prompts are long, by the budget of a step."""
    rows = []
    for budget in BUDGETS:
        asked = requests(AZURE_CHAT, count, np.random.default_rng(0), rate=rate)
        scheduler = factory.make(
            "fcfs",
            BlockPool(SLOTS // 16, 16),
            max_batch_tokens=budget,
            chunked=budget is not None,
            max_sequences=None,
        )
        report = Simulator(scheduler, CLOCK).run(asked).summary()
        assert report.itl is not None and report.ttft is not None  # noqa: PT018 (for the type checker)
        rows.append(
            {
                "budget": budget,
                "itl": report.itl._asdict(),
                "ttft": report.ttft._asdict(),
                "throughput": report.output_throughput,
            }
        )
    return rows


def goodput_data(count: int) -> dict[str, Any]:
    """ShareGPT's lengths at each rate: share of the requests within the limits, and the
    capacity, by policy.
    """
    served = {
        "static": {"policy": "static", "max_sequences": 32, "longest": 2048},
        "Orca (Max)": {"policy": "orca-max", "max_sequences": None},
        "paged, prompts whole": {
            "policy": "fcfs",
            "chunked": False,
            "max_batch_tokens": None,
            "max_sequences": None,
        },
        "paged, chunks of 512": {"policy": "fcfs", "max_batch_tokens": 512, "max_sequences": None},
    }
    lines = {}
    for name, options in served.items():
        met = {}
        for rate in RATES:
            asked = requests(SHAREGPT, count, np.random.default_rng(0), rate=rate)
            scheduler = factory.make(pool=BlockPool(SLOTS // 16, 16), **options)  # type: ignore[arg-type]
            run = Simulator(scheduler, CLOCK).run(asked)
            met[float(rate)] = attainment(run.recorder.timelines.values(), LIMITS)
        lines[name] = {"met": list(met.values()), "capacity": capacity(met)}
    return {
        "rates": list(RATES),
        "limits": {name: limit for name, limit in LIMITS._asdict().items() if limit < math.inf},
        "lines": lines,
    }


def swapping_data(count: int, slots: int = 6000) -> list[dict[str, Any]]:
    """A pool that is too small, so that many are preempted: projected time with each way,
    by size of a block.
    """
    rows = []
    for block in (1, 4, 16, 64, 256):
        asked = requests(SHAREGPT, count, np.random.default_rng(0))
        row: dict[str, Any] = {"block": block}
        for way in ("recompute", "swap"):
            pool = BlockPool(slots // block, block)
            # without room there: recompute
            memory = Swapping(pool, host_blocks=0 if way == "recompute" else None)
            run = Simulator(Scheduler(memory, max_sequences=None), CLOCK).run(asked)
            row[way] = {
                "duration": run.duration,
                "preemptions": run.preemptions,
                "computed": run.all.tokens,
                "moved": run.moved.tokens,
            }
        rows.append(row)
    return rows


def batching_data(count: int = 600) -> dict[str, Any]:
    """Values of the figure ``batching``."""
    return {
        "useful": useful_data(range(5), 1024 if count >= 400 else 64),
        "chunks": chunks_data(count // 2),
        "goodput": goodput_data(count),
        "swapping": swapping_data(count // 3),
    }


def main(folder: str = "figures/data") -> None:
    """Write the data of the figure ``batching``: some minutes."""
    hardware = "Llama-3-8B shape, bf16, on an A100 SXM 80 GB by its data sheet; shares of slots are counted"
    write(
        f"{folder}/batching.json",
        Record("python -m refllm.experiments.batching", "A, C", hardware, batching_data()),
    )


if __name__ == "__main__":
    main()
