"""The 24× of paged serving over padded generation, on the real engine, taken apart: padding ×
batch × kernel.

Sources: vLLM's announcement of 2023 (24 times the throughput of Hugging Face's generation)
and the benchmark behind it, which forms padded batches in the order of arrival; Kwon et al.
2023, section 6.

| run            | batch                                     | memory of a request  | factor  |
|----------------|-------------------------------------------|----------------------|---------|
| static, padded | closed until the longest member has ended | a row of a rectangle |         |
| Orca (Max)     | requests join and leave at every step     | the longest allowed  | padding |
| paged, as few  | the same, at most as many as Orca (Max)   | blocks               | kernel  |
| paged          | as many as there is memory for            | blocks               | batch   |

The factor of a row compares it with the row above; "kernel" is contiguous against paged. The
product of the three factors is the whole, exactly. The larger batch is due to paging; less
padding is due to iteration-level scheduling, which Orca had before it; the kernel is what
paging costs: keys gathered through a block table. The factor of about two that better kernels
and a faster host contributed in the announcement is not here: all runs share one network.

Where it loses: a batch counts for less than its size where a larger step takes longer, as
on two cores; and paging admits every request that fits at the moment, so it preempts, and
what is recomputed costs in full (``tokens``). Reservations of the exact length, which no
server knows in advance, are then as fast.

Memory is stated in tokens: 15,700 slots and lengths of at most 2,048, as in the paper, both
scaled to the context of the bundled model. Requests run to their lengths (``ignore_eos``).
Seconds are measured; steps and batches are counted.

Left out: arrivals over time; a GPU, where a step of a larger batch takes hardly longer
(``experiments.batching``).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from refllm.api import Model, load
from refllm.array_types import Json
from refllm.corpus import held_out_documents
from refllm.experiments.paging import SLOTS, make_scheduler
from refllm.kv.block_pool import BlockPool
from refllm.measure.device import processor
from refllm.measure.plotting import (
    FULL,
    MORE,
    NEAREST,
    TECHNIQUE,
    annotate_right,
    new_figure,
    styled,
)
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
    """Held-out text for prompts, which the bundled model was not trained on."""
    tokens: list[int] = []
    for document in held_out_documents():
        tokens += model.tokenizer.encode(document.text)
    return Passages(tokens)


class PlanCounter:
    """A callback for the plans of an engine: counts steps, rows, and computed tokens."""

    def __init__(self) -> None:
        self.steps = 0
        self.rows = 0
        self.computed = 0
        self.padded = 0  # computed tokens, with padding rows

    def __call__(self, plan: Plan) -> None:
        """Count one plan."""
        self.steps += 1
        self.rows += len(plan.items)
        self.computed += plan.tokens
        self.padded += sum(new for _, new in plan.batch())


def serve_once(model: Model, asked: Sequence[Request], name: str, scale: float) -> Json:
    """One run of the real engine over all requests: seconds of the clock and of the
    processor, steps, batch.
    """
    slots = int(SLOTS * scale) // 16 * 16  # whole blocks
    longest = int(2048 * scale)
    few = slots // longest if name == "paged, as few" else None

    def make(pool: BlockPool) -> BaseScheduler:
        policy = name.split(",")[0]
        return make_scheduler(policy, slots, longest=longest, max_sequences=few, pool=pool)

    counter = PlanCounter()
    engine = Engine(model, num_blocks=slots // 16, block_size=16, scheduler=make, on_plan=counter)
    for request in asked:
        engine.submit(request)
    began = time.perf_counter()
    busy = time.process_time()
    results = engine.run()
    seconds = time.perf_counter() - began
    processor = time.process_time() - busy
    assert all(len(results[r.request_id].tokens) == r.max_tokens for r in asked)
    return {
        "seconds": seconds,
        "processor": processor,
        "steps": counter.steps,
        "batch": counter.rows / counter.steps,
        "tokens": counter.computed,
        "with padding": counter.padded,
    }


def unpadding_data(model: Model, *, count: int = 160, rounds: int = 3, scale: float = 0.25) -> Json:
    """Values of the figure ``unpadding``. In every round each run takes its turn; a ratio
    is formed within a round.
    """
    asked = requests(SHAREGPT, count, np.random.default_rng(0), tokens=held_out(model), scale=scale)
    runs: dict[str, list[Json]] = {name: [] for name in RUNS}
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


def factors(runs: dict[str, list[Json]], clock: str) -> dict[str, list[float]]:
    """name → [median, lowest, highest] of the rounds' ratios; "all three" is their product,
    round by round.
    """
    pairs = FACTORS | {"all three": (RUNS[0], RUNS[-1])}
    found = {}
    for name, (slow, fast) in pairs.items():
        ratios = [a[clock] / b[clock] for a, b in zip(runs[slow], runs[fast], strict=True)]
        found[name] = [statistics.median(ratios), min(ratios), max(ratios)]
    return found


def hardware() -> str:
    """Where a measurement was made, and how busy the machine was."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"{processor()}, {os.cpu_count()} cores, one BLAS thread, float32, "
        f"NumPy {np.__version__}, load average {load:.1f} before"
    )


# --- the figure ---------------------------------------------------------------------------

# names in the record → in the figure
NAMES = {"static": "static, padded", "paged, as few": "paged, batch of Orca (Max)"}
# factor → which rates are divided, colour
DIVIDED = {
    "padding": ("no padding: Orca (Max) ÷ static", FULL),
    "kernel": ("paged kernel: same batch ÷ Orca (Max)", NEAREST),
    "batch": ("larger batch: paged ÷ same batch", TECHNIQUE),
    "all three": ("all three: paged ÷ static", "black"),
}


@styled
def draw(values: Values) -> Figure:
    """Values of ``unpadding_data``: requests per second by policy, and the factors between
    them.
    """
    fig = new_figure(5.0)
    upper, lower = fig.subplots(2, 1, height_ratios=(6, 4))
    _draw_rates(upper, values)
    _draw_factors(lower, values["factors"]["processor"])
    for ax in (upper, lower):
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
    return fig


def _draw_rates(ax: Axes, values: Values) -> None:
    """Requests per second of each run, with its mean batch and its steps."""
    rows = values["rows"]
    most = 0.0
    for y, row in enumerate(rows):
        rates = sorted(values["requests"] / seconds for seconds in row["processor"])
        most = max(most, rates[-1])
        colour = TECHNIQUE if row["run"].startswith("paged") else FULL
        _draw_bar(ax, y, float(np.median(rates)), rates[0], rates[-1], colour)
        annotate_right(ax, f"batch {row['batch']:.1f}, {row['steps']:,} steps", rates[-1], y)
    ax.set_yticks(range(len(rows)), [NAMES.get(row["run"], row["run"]) for row in rows])
    ax.set_xlim(0, 1.5 * most)
    ax.set(
        title=f"Paging runs the largest batches in {values['slots']:,} slots",
        xlabel="requests per second of processor time",
    )


def _draw_factors(ax: Axes, factors: Json) -> None:
    """The factors, with the range of the rounds."""
    for y, (name, (middle, low, high)) in enumerate(factors.items()):
        _draw_bar(ax, y, middle, low, high, DIVIDED[name][1])
        annotate_right(ax, f"{middle:.2f}×", high, y)
    ax.axvline(1, color="black", lw=0.8, ls=":")
    ax.set_yticks(range(len(factors)), [DIVIDED[name][0] for name in factors], fontsize=9)
    ax.set_xlim(0, 1.15 * max(high for _, _, high in factors.values()))
    ax.set(
        title="Most of the speedup is from not padding",
        xlabel="times as fast: median of the ratios within a round",
    )


def _draw_bar(ax: Axes, y: float, middle: float, low: float, high: float, colour: str) -> None:
    """A bar to the middle, and whiskers around it that are visible on a dark bar, too."""
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
