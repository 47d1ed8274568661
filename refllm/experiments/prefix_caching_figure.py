"""The figure of ``experiments.prefix_caching``: hit rates by program and memory, speedups, and
the formula's beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from refllm.array_types import Json
from refllm.measure.plotting import MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# (cache, order) → colour, marker; each has its own height within a program's row
SERIES = {
    ("radix", "lpm"): (TECHNIQUE, "o"),
    ("radix", "fcfs"): (MORE[2], "o"),
    ("hash", "lpm"): (MORE[3], "D"),
    ("hash", "fcfs"): (NEAREST, "D"),
}


@styled
def draw(values: Values) -> Figure:
    """Values of ``prefix_caching.prefixes_data`` → above, hit rates by program, a panel for
    each size of memory; below, speedups at the largest memory, and all beside the formula's.
    """
    programs = values["programs"]
    sizes = sorted({row["memory"] for rows in programs.values() for row in rows})
    fig = new_figure(6.2)
    grid = fig.add_gridspec(2, 1)
    upper = fig.add_subfigure(grid[0])
    lower = fig.add_subfigure(grid[1])
    panels = upper.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for panel, size in zip(panels, sizes, strict=True):
        _draw_hit_rates(panel, programs, size)
    left, right = lower.subplots(1, 2, width_ratios=(5, 4))
    _draw_speedups(left, programs, sizes[-1])
    _draw_formula(right, programs)
    handles = [
        left.plot([], [], mark, color=colour, label=f"{cache}, {order.upper()}")[0]
        for (cache, order), (colour, mark) in SERIES.items()
    ]
    handles.append(left.plot([], [], "|", color="black", ms=9, mew=1.5, label="best possible")[0])
    upper.legend(
        handles=handles,
        loc="outside upper left",
        ncols=5,
        fontsize=8.5,
        title="Hit rates (A): the order of requests matters more than the kind of cache",
        title_fontsize=11.5,
        alignment="left",
    )
    return fig


def _select(rows: Sequence[Json], cache: str, order: str, memory: int) -> list[Json]:
    """The row of one cache and order at one size of memory, if it was measured."""
    wanted = (cache, order, memory)
    return [row for row in rows if (row["cache"], row["order"], row["memory"]) == wanted]


def _draw_rows(ax: Axes, programs: Values, size: int, key: str) -> None:
    """A row for each program, a dot for each cache and order."""
    for y, rows in enumerate(programs.values()):
        for at, ((cache, order), (colour, mark)) in enumerate(SERIES.items()):
            for row in _select(rows, cache, order, size):
                value = row[key] if key == "hit" else row[key][0]
                ax.plot(value, y + 0.17 * (at - 1.5), mark, color=colour, ms=4.5)
    ax.set_yticks(range(len(programs)), list(programs), fontsize=9)
    ax.set_ylim(len(programs) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    for y in range(len(programs) - 1):
        ax.axhline(y + 0.5, color="#e4e4e4", lw=0.7)


def _draw_hit_rates(ax: Axes, programs: Values, size: int) -> None:
    """Hit rates at one size of memory, and the best that any cache could have."""
    _draw_rows(ax, programs, size, "hit")
    for y, rows in enumerate(programs.values()):
        ax.plot(rows[0]["best"], y, "|", color="black", ms=19, mew=1.5, zorder=1)
    plural = "s" if size > 1 else ""
    ax.set_title(f"memory: {size} longest request{plural}", fontsize=9.5)
    ax.set(xlabel="hit rate (share of tokens)", xlim=(-0.06, 1.0))


def _draw_speedups(ax: Axes, programs: Values, size: int) -> None:
    """Processor time without a cache divided by the time with it."""
    _draw_rows(ax, programs, size, "speedup, processor")
    ax.axvline(1, color="black", lw=0.8, ls=":")
    ax.set_title(f"Speedup over no cache, memory {size}× (B)", fontsize=10)
    ax.set(xlabel="times as fast, processor time", xlim=(0, None))


def _draw_formula(ax: Axes, programs: Values) -> None:
    """Measured speedups of all programs and sizes over those of the formula."""
    rows = [row for several in programs.values() for row in several if row["cache"]]
    for row in rows:
        colour, mark = SERIES[row["cache"], row["order"]]
        ax.plot(row["formula"], row["speedup, processor"][0], mark, color=colour, ms=4, alpha=0.8)
    most = max(max(row["formula"], row["speedup, processor"][0]) for row in rows)
    ax.plot([0.5, 1.1 * most], [0.5, 1.1 * most], color="black", lw=0.8, ls=":")
    ax.set_title("The formula predicts most of it (B)", fontsize=10)
    ax.set(xlabel="speedup by the formula", ylabel="times as fast, measured")
