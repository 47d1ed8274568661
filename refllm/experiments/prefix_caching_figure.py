"""The figure of ``experiments.prefix_caching``: hit rates, and speedups beside the formula's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WAYS = {
    "none fcfs": FULL,
    "hash fcfs": NEAREST,
    "hash lpm": MORE[3],
    "radix fcfs": MORE[2],
    "radix lpm": TECHNIQUE,
}


@styled
def draw(values: Values) -> Figure:
    """Values of ``experiments.prefix_caching``: hit rates by program and memory, and
    speedups beside the formula's.
    """
    programs = values["programs"]
    fig = new_figure(6.2)
    parts: Any = fig.subfigures(2, 1, height_ratios=(4, 5))
    upper, lower = parts
    _hit_rates(upper.subplots(1, len(programs), sharey=True), programs)
    upper.supxlabel("memory, in longest requests", fontsize=10)
    left, right = lower.subplots(1, 2, width_ratios=(5, 4))
    _speedups(left, programs)
    rows = [row for some in programs.values() for row in some if _way(row) != "none fcfs"]
    most = max(max(row["formula"], row["speedup, processor"][0]) for row in rows)
    for row in rows:
        right.plot(
            row["formula"],
            row["speedup, processor"][0],
            "o",
            color=WAYS[_way(row)],
            ms=4,
            alpha=0.8,
        )
    right.plot([0.5, 1.1 * most], [0.5, 1.1 * most], color="black", lw=0.8, ls=":")
    right.set(
        title="Beside the formula (B)",
        xlabel="speedup by the formula",
        ylabel="times as fast, measured",
    )
    for way, colour in WAYS.items():
        if way != "none fcfs":
            left.plot([], [], color=colour, label=way.replace(" ", ", "), **_line(way))
    upper.suptitle("Hit rates by program (A)", x=0.01, ha="left", fontsize=11.5)
    upper.legend(
        *left.get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=8.5
    )
    return fig


def _hit_rates(panels: Sequence[Axes], programs: Values) -> None:
    """A panel a program: hit rates by memory, and the best that any cache could have."""
    for ax, (name, rows) in zip(panels, programs.items(), strict=True):
        for way, colour in WAYS.items():
            mine = [row for row in rows if _way(row) == way]
            if way != "none fcfs":
                ax.plot(
                    [row["memory"] for row in mine],
                    [row["hit"] for row in mine],
                    color=colour,
                    **_line(way),
                )
        ax.axhline(rows[0]["best"], color="black", lw=0.9, ls=":")
        ax.set_xticks(sorted({row["memory"] for row in rows}))
        ax.margins(x=0.15)  # rings are not cut off
        ax.set_title(name.replace(" of ", " of\n").replace("-", "-\n"), fontsize=9)
    panels[0].set_ylim(-0.06, 1.03)
    panels[0].set_ylabel("hit rate (A), best dotted", fontsize=9)


def _line(way: str) -> dict[str, Any]:
    """Where a hash and a radix cache agree, the radix cache's line is seen through the
    other's rings and dashes.
    """
    if way.startswith("hash"):
        return {"lw": 1.1, "ls": (0, (3, 2)), "marker": "o", "ms": 7, "mfc": "none", "zorder": 3}
    return {"lw": 1.8, "marker": "o", "ms": 4}


def _speedups(ax: Axes, programs: Values) -> None:
    """Speedup over no cache at the largest memory."""
    largest = max(row["memory"] for rows in programs.values() for row in rows)
    ways = [way for way in WAYS if way != "none fcfs"]
    for y, rows in enumerate(programs.values()):
        for at, way in enumerate(ways):
            row = next(r for r in rows if _way(r) == way and r["memory"] == largest)
            ax.barh(
                y + 0.2 * (at - 1.5), row["speedup, processor"][0], height=0.19, color=WAYS[way]
            )
    ax.axvline(1, color="black", lw=0.8, ls=":")
    ax.set_yticks(range(len(programs)), list(programs))
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(
        title=f"Speed over no cache, memory {largest}× (B)", xlabel="times as fast, processor time"
    )


def _way(row: Values) -> str:
    return f"{row['cache'] or 'none'} {row['order']}"
