"""The 24x of paged serving over plain generation, on the real engine, taken apart: padding
× batch × kernel.

Sources: vLLM's announcement of 2023 (24 times the throughput of Hugging Face's generation)
and the benchmark behind it, which forms padded batches in the order of arrival; Kwon et al.
2023, section 6.

| run            | batch                                     | memory of a request  | compared with the one above |
|----------------|-------------------------------------------|----------------------|-----------------------------|
| static, padded | closed until the longest member has ended | a row of a rectangle |                             |
| Orca (Max)     | joined and left at every step             | the longest allowed  | padding                     |
| paged, as few  | the same, at most as many as Orca (Max)   | blocks               | kernel: contiguous to paged |
| paged          | as many as there is memory for            | blocks               | batch                       |

The product of the three factors is the whole, exactly. The batch is paging's; the padding
is iteration-level scheduling's, which Orca had before it; the kernel is what paging costs:
keys gathered through a table. The factor two or so that better kernels and a faster host
had in the announcement is not here: all runs share one network.

Where it loses: a batch counts for less than its size where a larger step takes longer, as
on two cores; and paging admits whoever fits at the moment, so it preempts, and what is
computed again costs in full (``tokens``). Reservations of the exact length, which nobody
knows beforehand, are then as fast.

Memory is stated in tokens: 15,700 slots and lengths of at most 2,048, as in the paper, both
scaled to the context of the bundled model. Requests run to their lengths (``ignore_eos``).
Kind B: seconds; A: steps and batches.

Left out: arrivals over time; a GPU, where a step of a larger batch takes hardly longer
(``experiments.batching``).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from refllm.api import Model, load
from refllm.corpus import held_out_documents
from refllm.experiments.paging import SLOTS, scheduler
from refllm.kv.block_pool import BlockPool
from refllm.measure.device import processor
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Record, Values, write
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.engine import Engine
from refllm.serve.plan import Plan
from refllm.serve.request import Request
from refllm.simulate.programs import Passages
from refllm.simulate.workload import SHAREGPT, requests

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUNS = ("static", "Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", "paged, as few", "paged")
FACTORS = {
    "padding": ("static", "Orca (Max)"),
    "kernel": ("Orca (Max)", "paged, as few"),
    "batch": ("paged, as few", "paged"),
}


def held_out(model: Model) -> Passages:
    """Text for prompts that the bundled model has not seen."""
    return Passages(
        [
            token
            for document in held_out_documents()
            for token in model.tokenizer.encode(document.text)
        ]
    )


class Counted:
    """Hears of every plan of an engine: rows computed, of which useful."""

    def __init__(self) -> None:
        self.steps = 0
        self.rows = 0
        self.computed = 0
        self.padded = 0

    def __call__(self, plan: Plan) -> None:
        self.steps += 1
        self.rows += len(plan.items)
        self.computed += plan.tokens
        self.padded += sum(new for _, new in plan.batch())


def serve_once(model: Model, asked: Sequence[Request], name: str, scale: float) -> dict[str, Any]:
    """One run of the real engine over everybody: seconds of the clock and of the processor,
    steps, batch.
    """
    slots = int(SLOTS * scale) // 16 * 16  # whole blocks
    longest = int(2048 * scale)
    few = slots // longest

    def make(pool: BlockPool) -> BaseScheduler:
        seats = few if name == "paged, as few" else None
        return scheduler(name.split(",")[0], slots, longest=longest, seats=seats, pool=pool)

    counted = Counted()
    engine = Engine(model, num_blocks=slots // 16, block_size=16, scheduler=make, on_plan=counted)
    for request in asked:
        engine.submit(request)
    began = time.perf_counter()
    busy = time.process_time()
    results = engine.run()
    seconds = time.perf_counter() - began
    processor = time.process_time() - busy
    assert all(len(results[r.id].tokens) == r.max_tokens for r in asked)
    return {
        "seconds": seconds,
        "processor": processor,
        "steps": counted.steps,
        "batch": counted.rows / counted.steps,
        "tokens": counted.computed,
        "with padding": counted.padded,
    }


def unpadding_data(
    model: Model, *, count: int = 160, rounds: int = 3, scale: float = 0.25
) -> dict[str, Any]:
    """Values of the figure ``unpadding``. In every round each run takes its turn; a ratio
    is formed within a round.
    """
    asked = requests(SHAREGPT, count, np.random.default_rng(0), tokens=held_out(model), scale=scale)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    with threadpool_limits(limits=1, user_api="blas"):
        for _ in range(rounds):
            for name in RUNS:
                runs[name].append(serve_once(model, asked, name, scale))
    rows = [
        {
            "run": name,
            "seconds": [r["seconds"] for r in several],
            "processor": [r["processor"] for r in several],
            **{key: several[0][key] for key in ("steps", "batch", "tokens", "with padding")},
        }
        for name, several in runs.items()
    ]
    return {
        "requests": count,
        "slots": int(SLOTS * scale) // 16 * 16,
        "longest": int(2048 * scale),
        "rows": rows,
        "factors": {clock: factors(runs, clock) for clock in ("seconds", "processor")},
    }


def factors(runs: dict[str, list[dict[str, Any]]], clock: str) -> dict[str, list[float]]:
    """name → [median, lowest, highest] of the rounds' ratios; "all three" is their product,
    round by round.
    """
    pairs = FACTORS | {"all three": (RUNS[0], RUNS[-1])}
    out = {}
    for name, (slow, fast) in pairs.items():
        ratios = [a[clock] / b[clock] for a, b in zip(runs[slow], runs[fast], strict=True)]
        out[name] = [statistics.median(ratios), min(ratios), max(ratios)]
    return out


def hardware() -> str:
    """Where a measurement was made, and how busy the machine was."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"{processor()}, {os.cpu_count()} cores, one BLAS thread, float32, NumPy "
        f"{np.__version__}, load average "
        f"{load:.1f} before"
    )


# --- the figure ----------------------------------------------------------------------


# which rows of ``unpadding`` a factor compares: their rates divided
DIVIDED = {"padding": "Orca (Max) ÷ static", "kernel": "paged, as few ÷ Orca (Max)", "batch": "paged ÷ paged, as few",
           "all three": "paged ÷ static"}  # fmt: skip


@styled
def draw(values: Values) -> Figure:
    """Values of ``experiments.unpadding``: requests a second by policy, and the factors
    between them.
    """
    fig = new_figure(4.85)
    upper, lower = fig.subplots(2, 1, height_ratios=(6, 4))
    rows = values["rows"]
    for y, row in enumerate(rows):
        rates = sorted(values["requests"] / seconds for seconds in row["processor"])
        colour = TECHNIQUE if row["run"].startswith("paged") else FULL
        _bar(upper, y, float(np.median(rates)), rates[0], rates[-1], colour)
        upper.annotate(
            f"batch {row['batch']:.1f}, {row['steps']:,} steps",
            (rates[-1], y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    upper.set_yticks(range(len(rows)), [row["run"] for row in rows])
    upper.set_xlim(0, 1.45 * max(values["requests"] / min(row["processor"]) for row in rows))
    upper.set(
        title=f"One model, one budget of {values['slots']:,} tokens",
        xlabel="requests per second of processor time",
    )
    factors = values["factors"]["processor"]
    colours = {"padding": FULL, "kernel": NEAREST, "batch": TECHNIQUE, "all three": "black"}
    for y, (name, (middle, low, high)) in enumerate(factors.items()):
        _bar(lower, y, middle, low, high, colours.get(name, FULL))
        lower.annotate(
            f"{middle:.2f}×",
            (high, y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    lower.axvline(1, color="black", lw=0.8, ls=":")
    lower.set_yticks(
        range(len(factors)), [f"{name}: {DIVIDED[name]}" for name in factors], fontsize=9
    )
    lower.set_xlim(0, 1.15 * max(high for _, _, high in factors.values()))
    lower.set(
        title="What it is made of", xlabel="times as fast: median of the ratios within a round"
    )
    for ax in (upper, lower):
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
    return fig


def _bar(ax: Axes, y: float, middle: float, low: float, high: float, colour: str) -> None:
    """A bar to the middle, and whiskers around it that are seen on a dark bar, too."""
    ax.barh(y, middle, color=colour, height=0.62)
    ax.errorbar(
        middle, y, xerr=[[middle - low], [high - middle]], color=MORE[3], lw=1.2, capsize=2.5
    )


def main(folder: str = "figures/data", rounds: int = 3) -> None:
    """Write the data of the figure ``unpadding``: minutes."""
    where = hardware()
    values = unpadding_data(load("stdlib", backend="numpy"), rounds=rounds)
    command = f"python -m refllm.experiments.unpadding {rounds}"
    write(f"{folder}/unpadding.json", Record(command, "A, B", where, values))


if __name__ == "__main__":
    main(rounds=int(sys.argv[1]) if sys.argv[1:] else 3)
