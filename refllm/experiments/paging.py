"""What paging gains, counted: mean batch and use of memory under full load, by how memory is
allocated.

Source: Kwon et al. 2023, section 6 and figure 2: OPT-13B on a 40 GB card keeps 15,700
tokens; ShareGPT's lengths, at most 2,048 tokens; Orca's three variants as they are rebuilt
there, with a buddy allocator.

| policy      | memory of a request                                          | paper's batch |
|-------------|--------------------------------------------------------------|---------------|
| Orca (Max)  | a contiguous range of 2,048 slots                            | 7.00          |
| Orca (Pow2) | prompt + output rounded up to a power of two, at most 2,048  | 9.81          |
| Oracle      | prompt + output; buddies round it up, first fit does not     | 13.62         |
| paged       | blocks of 16, allocated when needed; preemption by recompute | 30.42         |

No model, no clock, no data set: lengths are drawn from a log-normal with ShareGPT's means
(``simulate.workload``), and the real scheduler runs as long as a request is waiting.

Left out: time. A step of a larger batch takes longer: see ``experiments.batching`` for a
clock, ``experiments.unpadding`` for a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np

from refllm.array_types import Json
from refllm.kv.block_pool import BlockPool
from refllm.measure.plotting import FULL, NEAREST, TECHNIQUE, annotate_right, new_figure, styled
from refllm.measure.records import Record, Values, write
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.baselines.reservations import PaddedKVManager, ReservedKVManager
from refllm.serve.baselines.static_batching import StaticBatching
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.request import Request
from refllm.serve.scheduler import Scheduler
from refllm.simulate.clock import UnitClock
from refllm.simulate.simulator import Simulator
from refllm.simulate.totals import SimulationResult
from refllm.simulate.workload import ALPACA, SHAREGPT, requests

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SLOTS = 15_700
LONGEST = 2048
PAPER = {"Orca (Max)": 7.00, "Orca (Pow2)": 9.81, "Orca (Oracle)": 13.62, "paged": 30.42}
BLOCKS = (1, 16, 32, 64, 128, 256)


class Capped(ReservedKVManager):
    """A reservation never exceeds the longest sequence that is allowed."""

    def size(self, request: Request) -> int:
        """Slots of a reservation."""
        return max(
            len(request.prompt) + request.max_tokens, min(self.longest, super().size(request))
        )


def make_scheduler(
    name: str,
    slots: int,
    *,
    longest: int = LONGEST,
    block: int = 16,
    max_sequences: int | None = None,
    pool: BlockPool | None = None,
) -> BaseScheduler:
    """A policy of the table over ``slots``, which computes prompts whole; ``pool`` is an
    engine's own.
    """
    if name == "paged":
        memory = PagedKVManager(pool or BlockPool(slots // block, block))
        return Scheduler(memory, max_batch_tokens=None, max_sequences=max_sequences)
    if name == "static":
        batch = max(1, slots // longest)
        if max_sequences is not None:
            batch = min(batch, max_sequences)
        return StaticBatching(PaddedKVManager(slots, longest=longest), max_sequences=batch)
    rule = {"Orca (Max)": "max", "Orca (Pow2)": "pow2"}.get(name, "oracle")
    reserved = Capped(slots, rule, longest=longest, buddy="first fit" not in name)
    return Scheduler(reserved, chunked=False, max_batch_tokens=None, max_sequences=max_sequences)


def simulate_policy(
    name: str,
    asked: Sequence[Request],
    *,
    slots: int = SLOTS,
    block: int = 16,
    max_sequences: int | None = None,
) -> SimulationResult:
    """All requests arrive at once; time is counted in steps."""
    scheduler = make_scheduler(name, slots, block=block, max_sequences=max_sequences)
    return Simulator(scheduler, UnitClock()).run(asked)


def sharegpt_requests(seed: int, count: int) -> list[Request]:
    """Requests of ShareGPT's lengths."""
    return requests(SHAREGPT, count, np.random.default_rng(seed))


def policies_data(seeds: Sequence[int], count: int) -> list[Json]:
    """A row for each policy under full load, with one value per seed."""
    rows = []
    for name in ("Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", "Orca (Oracle), first fit", "paged"):
        runs = [simulate_policy(name, sharegpt_requests(seed, count)) for seed in seeds]
        rows.append(
            {
                "policy": name,
                "paper": PAPER.get(name),
                "batch": [run.saturated.batch for run in runs],
                "utilisation": [run.saturated.utilisation for run in runs],
                "filled": [run.saturated.filled for run in runs],
                "steps": [run.all.steps for run in runs],
                "preemptions": [run.preemptions for run in runs],
            }
        )
    return rows


def static_data(seeds: Sequence[int], count: int) -> Json:
    """Padded batches of at most seven, as the baselines of vLLM's announcement ran: steps and
    useful slots.
    """
    runs = [simulate_policy("static", sharegpt_requests(seed, count)) for seed in seeds]
    return {
        "steps": [run.all.steps for run in runs],
        "useful": [run.all.rows / (run.all.rows + run.all.padding_rows) for run in runs],
    }


def blocks_data(seeds: Sequence[int], count: int) -> list[Json]:
    """Paged with blocks of each size."""
    rows = []
    for block in BLOCKS:
        runs = [simulate_policy("paged", sharegpt_requests(s, count), block=block) for s in seeds]
        rows.append(
            {
                "block": block,
                "batch": [run.saturated.batch for run in runs],
                "utilisation": [run.saturated.utilisation for run in runs],
            }
        )
    return rows


def plenty_data(count: int, max_sequences: int = 32) -> list[Json]:
    """Where paging gains nothing: ``max_sequences`` and not memory limits the batch (Alpaca's
    short answers, ten times the slots).
    """
    asked = requests(ALPACA, count, np.random.default_rng(0))
    rows = []
    for name in PAPER:
        run = simulate_policy(name, asked, slots=10 * SLOTS, max_sequences=max_sequences)
        rows.append({"policy": name, "batch": run.saturated.batch})
    return rows


def paging_data(seeds: Sequence[int] = range(5), count: int = 1000) -> Json:
    """Values of the figure ``paging``."""
    return {
        "slots": SLOTS,
        "seeds": list(seeds),
        "requests": count,
        "policies": policies_data(seeds, count),
        "static": static_data(seeds[:2], count // 2),
        "blocks": blocks_data(seeds[:2], count),
        "plenty": plenty_data(count),
    }


# --- the figure ---------------------------------------------------------------------------


@styled
def draw(values: Values) -> Figure:
    """Values of ``paging_data``: mean batch and slots used, above by policy (with the paper's
    batch), below by block size.
    """
    fig = new_figure(5.6)
    panels = fig.subplots(2, 2, height_ratios=(5, 4), width_ratios=(4, 3))
    _draw_policies(panels[0, 0], values["policies"], "batch")
    _draw_policies(panels[0, 1], values["policies"], "utilisation")
    panels[0, 0].set(
        title="Paging runs the most requests at once",
        xlabel=f"mean batch under full load (requests in {values['slots']:,} slots)",
    )
    panels[0, 1].set(title="… and wastes the least", xlabel="slots used (share)", xlim=(0, 1.2))
    panels[0, 1].set_yticks(panels[0, 1].get_yticks(), [])
    _draw_block_sizes(panels[1, 0], values["blocks"], "batch")
    _draw_block_sizes(panels[1, 1], values["blocks"], "utilisation")
    panels[1, 0].set(title="Larger blocks waste more", ylabel="mean batch (requests)")
    panels[1, 1].set(title="… of their last slots", ylabel="slots used (share)", ylim=(0, 1.05))
    return fig


def _draw_policies(ax: Axes, rows: Sequence[Json], key: str) -> None:
    """Bars: the mean over seeds of one quantity, with the range of the seeds."""
    for y, row in enumerate(rows):
        middle = mean(row[key])
        low = min(row[key])
        high = max(row[key])
        colour = TECHNIQUE if row["policy"] == "paged" else FULL
        ax.barh(y, middle, color=colour, height=0.62)
        ax.errorbar(
            middle, y, xerr=[[middle - low], [high - middle]], color="black", lw=1, capsize=2
        )
        text = f"{middle:.1f}" if key == "batch" else f"{middle:.0%}"
        annotate_right(ax, text, high, y)
        if key == "batch" and row["paper"]:  # at the bar's lower edge: the whiskers stay visible
            ax.plot(row["paper"], y + 0.31, "D", color=NEAREST, ms=5.5, zorder=3)
    ax.set_yticks(range(len(rows)), [row["policy"].replace(", ", ",\n") for row in rows])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    if key == "batch":
        ax.set_xlim(0, 1.2 * max(mean(row[key]) for row in rows))
        ax.plot([], [], "D", color=NEAREST, ms=5.5, label="measured by Kwon et al.")
        ax.legend(loc="upper right", fontsize=8.5)


def _draw_block_sizes(ax: Axes, rows: Sequence[Json], key: str) -> None:
    """One quantity by the tokens per block."""
    sizes = [row["block"] for row in rows]
    ax.plot(sizes, [mean(row[key]) for row in rows], color=TECHNIQUE, marker="o", ms=5)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    ax.minorticks_off()
    ax.set(xlabel="tokens per block (log)", ylim=(0, 1.15 * max(mean(row[key]) for row in rows)))


def main(folder: str = "figures/data") -> None:
    """Write the data of the figure ``paging``: two minutes."""
    record = Record("python -m refllm.experiments.paging", "A", "none", paging_data())
    write(f"{folder}/paging.json", record)


if __name__ == "__main__":
    main()
