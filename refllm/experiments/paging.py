"""What paging buys, counted: mean batch and use of memory under full load, by how memory is
given out.

Source: Kwon et al. 2023, section 6 and figure 2: OPT-13B on a 40 GB card keeps 15,700
tokens; ShareGPT's lengths, at most 2,048 tokens; Orca's three variants as they are rebuilt
there, with a buddy allocator.

| policy      | memory of a request                                                  | batch in the paper |
|-------------|----------------------------------------------------------------------|--------------------|
| Orca (Max)  | 2,048 slots in one run                                               | 7.00               |
| Orca (Pow2) | prompt + output rounded up to a power of two, at most 2,048, one run | 9.81               |
| Oracle      | prompt + output in one run; buddies round it up, first fit does not  | 13.62              |
| paged       | blocks of 16, as they are needed; preemption by recompute            | 30.42              |

No model, no clock, no data set: lengths are drawn from a log-normal with ShareGPT's means
(``simulate.workload``), and the real scheduler runs as long as somebody waits. Kind A.

Left out: time. A larger batch takes longer a step: see ``experiments.batching`` for a
clock, ``experiments.unpadding`` for a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from refllm.kv.block_pool import BlockPool
from refllm.measure.plotting import FULL, NEAREST, TECHNIQUE, new_figure, styled
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
    """A reservation never exceeds the longest sequence that is allowed at all."""

    def size(self, request: Request) -> int:
        return max(
            len(request.prompt) + request.max_tokens, min(self.longest, super().size(request))
        )


def scheduler(
    name: str,
    slots: int,
    *,
    longest: int = LONGEST,
    block: int = 16,
    seats: int | None = None,
    pool: BlockPool | None = None,
) -> BaseScheduler:
    """A policy of the table over ``slots``, computing prompts whole; ``pool`` is an
    engine's own.
    """
    limits: dict[str, Any] = {"max_batch_tokens": None, "max_sequences": seats}
    if name == "paged":
        return Scheduler(PagedKVManager(pool or BlockPool(slots // block, block)), **limits)
    if name == "static":
        batch = max(1, slots // longest)
        return StaticBatching(
            PaddedKVManager(slots, longest=longest), max_sequences=min(batch, seats or batch)
        )
    rule = {"Orca (Max)": "max", "Orca (Pow2)": "pow2"}.get(name, "oracle")
    return Scheduler(
        Capped(slots, rule, longest=longest, buddy="first fit" not in name), chunked=False, **limits
    )


def serve(name: str, asked: Sequence[Request], **options: Any) -> SimulationResult:
    """Everybody at once, counted in steps."""
    return Simulator(scheduler(name, **{"slots": SLOTS, **options}), UnitClock()).run(asked)


def load(seed: int, count: int) -> list[Request]:
    """ShareGPT's lengths."""
    return requests(SHAREGPT, count, np.random.default_rng(seed))


def policies_data(seeds: Sequence[int], count: int) -> list[dict[str, Any]]:
    """A row a policy: what it did under full load, a number for each seed."""
    rows = []
    for name in ("Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", "Orca (Oracle), first fit", "paged"):
        runs = [serve(name, load(seed, count)) for seed in seeds]
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


def static_data(seeds: Sequence[int], count: int) -> dict[str, Any]:
    """Padded batches of at most seven, as the baselines of the paper's blog ran: steps and
    useful slots.
    """
    runs = [serve("static", load(seed, count)) for seed in seeds]
    return {
        "steps": [run.all.steps for run in runs],
        "useful": [run.all.rows / (run.all.rows + run.all.padding_rows) for run in runs],
    }


def blocks_data(seeds: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Paged with blocks of each size."""
    rows = []
    for block in BLOCKS:
        runs = [serve("paged", load(seed, count), block=block) for seed in seeds]
        rows.append(
            {
                "block": block,
                "batch": [run.saturated.batch for run in runs],
                "utilisation": [run.saturated.utilisation for run in runs],
            }
        )
    return rows


def plenty_data(count: int, seats: int = 32) -> list[dict[str, Any]]:
    """Where paging buys nothing: memory for everybody who has a seat (Alpaca's short
    answers, ten times the slots).
    """
    asked = requests(ALPACA, count, np.random.default_rng(0))
    runs = {name: serve(name, asked, slots=10 * SLOTS, seats=seats) for name in PAPER}
    return [{"policy": name, "batch": run.saturated.batch} for name, run in runs.items()]


def paging_data(seeds: Sequence[int] = range(5), count: int = 1000) -> dict[str, Any]:
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


# --- the figure ----------------------------------------------------------------------


@styled
def draw(values: Values) -> Figure:
    """Values of ``experiments.paging``: mean batch by policy beside the paper's, and by the
    size of a block.
    """
    rows = values["policies"]
    blocks = values["blocks"]
    fig = new_figure(4.4)
    left, right = fig.subplots(1, 2, width_ratios=(4, 3))
    for y, row in enumerate(rows):
        batch = mean(row["batch"])
        colour = TECHNIQUE if row["policy"] == "paged" else FULL
        left.barh(y, batch, color=colour, height=0.62)
        low = min(row["batch"])
        high = max(row["batch"])
        left.errorbar(
            batch, y, xerr=[[batch - low], [high - batch]], color="black", lw=1, capsize=2
        )
        if row["paper"]:  # at the bar's lower edge: the whiskers stay in sight
            left.plot(row["paper"], y + 0.31, "D", color=NEAREST, ms=5.5, zorder=3)
        inside = batch > 20
        left.annotate(
            f"{batch:.1f}, {mean(row['utilisation']):.0%} of the slots used",
            (low if inside else high, y),
            xytext=(-6 if inside else 6, 0),
            textcoords="offset points",
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
            fontsize=8.5,
        )
    left.plot([], [], "D", color=NEAREST, ms=5.5, label="the paper's measurement")
    left.set_yticks(range(len(rows)), [row["policy"].replace(", ", ",\n") for row in rows])
    left.invert_yaxis()
    left.grid(visible=False, axis="y")
    # room for what stands behind the bars
    left.set_xlim(0, 1.2 * max(mean(row["batch"]) for row in rows))
    left.set(
        title=f"Requests that run in {values['slots']:,} slots",
        xlabel="mean batch while somebody waits",
    )
    left.legend(loc="upper right", fontsize=8.5)
    _block_sizes(right, blocks)
    return fig


def _block_sizes(ax: Axes, blocks: Sequence[Any]) -> None:
    """The mean batch by the tokens in a block, and the share of slots used at each point."""
    sizes = [row["block"] for row in blocks]
    ax.plot(sizes, [mean(row["batch"]) for row in blocks], color=TECHNIQUE, marker="o")
    for row in blocks:  # under the line, which falls to the right
        ax.annotate(
            f"{mean(row['utilisation']):.0%}",
            (row["block"], mean(row["batch"])),
            xytext=(0, -8),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=7,
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    ax.minorticks_off()
    ax.set_xlim(min(sizes) / 1.8, max(sizes) * 1.8)
    ax.set_ylim(0, 1.15 * max(mean(row["batch"]) for row in blocks))
    ax.set(
        title="By size of a block",
        xlabel="tokens in a block",
        ylabel="mean batch; share of slots used",
    )


def main(folder: str = "figures/data") -> None:
    """Write the data of the figure ``paging``: two minutes."""
    write(
        f"{folder}/paging.json",
        Record("python -m refllm.experiments.paging", "A", "none", paging_data()),
    )


if __name__ == "__main__":
    main()
