"""What continuous batching and chunked prefill gain: useful slots counted, latencies and
goodput projected by the roofline.

| part     | question                                                                 | values    |
|----------|--------------------------------------------------------------------------|-----------|
| useful   | of the decode slots of a static batch, how many yield a token?           | counted   |
| chunks   | a step's token budget: gaps between tokens against the first token       | projected |
| goodput  | up to which arrival rate do 90 % of the requests meet the limits?        | projected |
| swapping | preemption by recompute against moving blocks to the host, by block size | projected |

Sources: Orca, Yu et al. 2022; Sarathi-Serve, Agrawal et al. 2024; DistServe, Zhong et al.
2024 (goodput as a rate); Kwon et al. 2023, section 7.3 (swapping).

Where it loses: at a low rate all policies are the same; a small budget delays the first
token and reads the prefix once per chunk; a batch of one has nothing to pad.

Left out: other devices and shapes (``refllm simulate``); the time of the scheduler itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from refllm.array_types import Json
from refllm.kv.block_pool import BlockPool
from refllm.measure.device import DEVICES
from refllm.measure.memory import LLAMA_8B
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, coloured, new_figure, styled
from refllm.measure.records import Record, Values, write
from refllm.measure.roofline_clock import RooflineClock
from refllm.serve import factory
from refllm.serve.baselines.reservations import PaddedKVManager
from refllm.serve.baselines.static_batching import StaticBatching
from refllm.serve.scheduler import Scheduler
from refllm.serve.swapping import SwappingKVManager
from refllm.simulate.clock import UnitClock
from refllm.simulate.metrics import Limits, attainment, capacity
from refllm.simulate.simulator import Simulator
from refllm.simulate.workload import AZURE_CHAT, SHAREGPT, requests, useful_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCHES = (1, 2, 4, 8, 16, 32, 64)
BUDGETS: tuple[int | None, ...] = (128, 256, 512, 1024, 2048, None)  # None: prompts whole
RATES = (0.5, 1, 2, 4, 8, 16, 32, 48, 64, 96)
LIMITS = Limits(ttft=0.5, tpot=0.02)
SLOTS = 131_072  # of a Llama-3-8B shape beside its weights: 17 GB
CLOCK = RooflineClock(LLAMA_8B, DEVICES["a100"])


def useful_data(seeds: Sequence[int], count: int) -> list[Json]:
    """Static batches of each size: the exact expectation, and what the real scheduler counted."""
    exact = SHAREGPT.pmfs()[1]
    rows = []
    for batch in BATCHES:
        counted = []
        for seed in seeds:
            asked = requests(SHAREGPT, count // batch * batch, np.random.default_rng(seed))
            run = Simulator(
                StaticBatching(PaddedKVManager(10**9), max_sequences=batch), UnitClock()
            ).run(asked)
            counted.append(run.all.rows / (run.all.rows + run.all.padding_rows))
        rows.append({"batch": batch, "exact": useful_share(exact, batch), "counted": counted})
    return rows


def chunks_data(count: int, rate: float = 3.0) -> list[Json]:
    """Azure's conversations, whose prompts are long, by the token budget of a step."""
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
        assert report.itl is not None  # there are gaps between tokens, and first tokens
        assert report.ttft is not None
        rows.append(
            {
                "budget": budget,
                "itl": report.itl._asdict(),
                "ttft": report.ttft._asdict(),
                "throughput": report.output_throughput,
            }
        )
    return rows


def goodput_data(count: int) -> Json:
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
            pool = BlockPool(SLOTS // 16, 16)
            scheduler = factory.make(pool=pool, **options)  # type: ignore[arg-type]
            run = Simulator(scheduler, CLOCK).run(asked)
            met[float(rate)] = attainment(run.recorder.timelines.values(), LIMITS)
        lines[name] = {"met": list(met.values()), "capacity": capacity(met)}
    return {
        "rates": list(RATES),
        "limits": {name: limit for name, limit in LIMITS._asdict().items() if limit < math.inf},
        "lines": lines,
    }


def swapping_data(count: int, slots: int = 6000) -> list[Json]:
    """A pool that is too small, so that many requests are preempted: projected time of
    recompute and of swapping, by block size.
    """
    rows = []
    for block in (1, 4, 16, 64, 256):
        asked = requests(SHAREGPT, count, np.random.default_rng(0))
        row: Json = {"block": block}
        for method in ("recompute", "swap"):
            pool = BlockPool(slots // block, block)
            # without host blocks it recomputes
            memory = SwappingKVManager(pool, host_blocks=0 if method == "recompute" else None)
            run = Simulator(Scheduler(memory, max_sequences=None), CLOCK).run(asked)
            row[method] = {
                "duration": run.duration,
                "preemptions": run.preemptions,
                "computed": run.all.tokens,
                "moved": run.moved.tokens,
            }
        rows.append(row)
    return rows


def batching_data(count: int = 600) -> Json:
    """Values of the figure ``batching``."""
    return {
        "useful": useful_data(range(5), 1024 if count >= 400 else 64),
        "chunks": chunks_data(count // 2),
        "goodput": goodput_data(count),
        "swapping": swapping_data(count // 3),
    }


# --- the figure ---------------------------------------------------------------------------


@styled
def draw(values: Values) -> Figure:
    """Values of ``batching_data``: useful slots, chunks, goodput and swapping, a panel each."""
    fig = new_figure(6.2)
    panels = fig.subplots(2, 2)
    _draw_useful(panels[0, 0], values["useful"])
    _draw_chunks(panels[0, 1], values["chunks"])
    _draw_goodput(panels[1, 0], values["goodput"])
    _draw_swapping(panels[1, 1], values["swapping"])
    return fig


def _draw_useful(ax: Axes, rows: Sequence[Json]) -> None:
    """Share of a batch's slots that yield a token, by batch size."""
    batches = [row["batch"] for row in rows]
    ax.axhline(1, color=TECHNIQUE, label="continuous")
    ax.plot(batches, [row["exact"] for row in rows], color=FULL, label="static, E[O] / E[max O]")
    for row in rows:
        label = "static, counted (5 seeds)" if row is rows[0] else None
        x = [row["batch"]] * len(row["counted"])
        ax.plot(x, row["counted"], "o", color=NEAREST, ms=4, label=label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [str(b) for b in batches])
    ax.minorticks_off()
    ax.set(
        title="Static batches waste slots (A)",
        xlabel="requests in the batch (log)",
        ylabel="slots that yield a token (share)",
        ylim=(0, 1.08),
    )
    ax.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.92))


def _draw_chunks(ax: Axes, rows: Sequence[Json]) -> None:
    """Time between tokens and to the first one, by the token budget of a step."""
    x = np.arange(len(rows))
    lines = {
        "ITL, 99th percentile": (TECHNIQUE, "itl", "p99"),
        "ITL, median": (MORE[2], "itl", "p50"),
        "TTFT, median": (NEAREST, "ttft", "p50"),
    }
    for name, (colour, what, which) in lines.items():
        times = [1e3 * row[what][which] for row in rows]
        ax.plot(x, times, color=colour, marker="o", ms=4, label=name)
    ax.set_yscale("log")
    ax.set_xticks(x, ["none" if row["budget"] is None else str(row["budget"]) for row in rows])
    ax.yaxis.set_major_formatter("{x:,g}")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 4)
    ax.set(
        title="Small chunks: low ITL, later TTFT (C)",
        xlabel="budget of a step (tokens)",
        ylabel="time (ms, log)",
    )
    ax.legend(fontsize=8, loc="upper right")


def _draw_goodput(ax: Axes, values: Values) -> None:
    """Share of requests within their limits, by arrival rate."""
    colours = (FULL, NEAREST, MORE[2], TECHNIQUE)
    for colour, (name, line) in coloured(colours, values["lines"].items()):
        at_least = "≥ " if line["capacity"] == max(values["rates"]) else ""  # the highest tried
        label = f"{name}: {at_least}{line['capacity']:.3g}/s"
        ax.plot(values["rates"], line["met"], color=colour, marker="o", ms=3.5, label=label)
    ax.axhline(0.9, color="black", lw=0.8, ls=":")
    ax.set_xscale("log")
    shown = values["rates"][::2]
    ax.set_xticks(shown, [f"{rate:g}" for rate in shown])
    ax.minorticks_off()
    limits = values["limits"]
    ax.set_title(
        "Paging sustains the highest rate (C):\n"
        f"TTFT ≤ {limits['ttft']:g} s, TPOT ≤ {1e3 * limits['tpot']:g} ms"
    )
    ax.set(xlabel="arrivals (requests per second, log)", ylabel="share of requests", ylim=(0, 1.05))
    # between the falling lines: lower it would hide the first points of a policy that fails
    # at once
    ax.legend(
        fontsize=7.5,
        loc="upper left",
        bbox_to_anchor=(0.02, 0.85),
        handlelength=1.3,
        borderaxespad=0,
        title="goodput at 90 % within the limits",
        title_fontsize=7.5,
        alignment="left",
    )


def _draw_swapping(ax: Axes, rows: Sequence[Json]) -> None:
    """Time of the whole run with both methods of preemption, by block size."""
    x = np.arange(len(rows))
    for colour, method, shift in ((TECHNIQUE, "recompute", -0.2), (NEAREST, "swap", 0.2)):
        times = [row[method]["duration"] for row in rows]
        ax.bar(x + shift, times, width=0.36, color=colour, label=method)
    ax.set_xticks(x, [str(row["block"]) for row in rows])
    longest = max(row[method]["duration"] for row in rows for method in ("recompute", "swap"))
    ax.set(
        title="Swapping small blocks is slow (C)",
        xlabel="tokens per block",
        ylabel="time of the run (seconds)",
        ylim=(0, 1.25 * longest),
    )
    ax.legend(fontsize=8, ncols=2)


def main(folder: str = "figures/data") -> None:
    """Write the data of the figure ``batching``: some minutes."""
    hardware = (
        "Llama-3-8B shape, bf16, on an A100 SXM 80 GB by its data sheet; "
        "shares of slots are counted"
    )
    write(
        f"{folder}/batching.json",
        Record("python -m refllm.experiments.batching", "A, C", hardware, batching_data()),
    )


if __name__ == "__main__":
    main()
