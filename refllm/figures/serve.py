"""Figures of serving: what paging, continuous batching and prefix caching buy."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, Values, coloured, styled

WAYS = {
    "none fcfs": FULL,
    "hash fcfs": NEAREST,
    "hash lpm": MORE[3],
    "radix fcfs": MORE[2],
    "radix lpm": TECHNIQUE,
}

# which rows of ``unpadding`` a factor compares: their rates divided
DIVIDED = {"padding": "Orca (Max) ÷ static", "kernel": "paged, as few ÷ Orca (Max)", "batch": "paged ÷ paged, as few",
           "all three": "paged ÷ static"}  # fmt: skip


@styled
def paging(values: Values) -> Figure:
    """Values of ``experiments.paging``: mean batch by policy beside the paper's, and by the
    size of a block.
    """
    rows = values["policies"]
    blocks = values["blocks"]
    fig = Figure(layout="constrained", figsize=(7.2, 4.4))
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


@styled
def batching(values: Values) -> Figure:
    """Values of ``experiments.batching``: useful slots, chunks, goodput and swapping, a
    panel each.
    """
    fig = Figure(layout="constrained", figsize=(7.2, 6.1))
    panels = fig.subplots(2, 2)
    _useful(panels[0, 0], values["useful"])
    _chunks(panels[0, 1], values["chunks"])
    _goodput(panels[1, 0], values["goodput"])
    _swapping(panels[1, 1], values["swapping"])
    return fig


def _useful(ax: Axes, rows: Sequence[Any]) -> None:
    batches = [row["batch"] for row in rows]
    ax.plot(batches, [row["exact"] for row in rows], color=FULL, label="E[O] / E[max O], exact")
    for row in rows:
        label = "counted, 5 seeds" if row is rows[0] else None
        ax.plot(
            [row["batch"]] * len(row["counted"]),
            row["counted"],
            "o",
            color=NEAREST,
            ms=4,
            label=label,
        )
    ax.axhline(1, color=TECHNIQUE, label="continuous")
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [str(b) for b in batches])
    ax.minorticks_off()
    ax.set(
        title="Useful slots of a static batch (A)", xlabel="requests in the batch", ylim=(0, 1.08)
    )
    ax.set_ylabel("share that yields a token")
    ax.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.92))


def _chunks(ax: Axes, rows: Sequence[Any]) -> None:
    x = np.arange(len(rows))
    lines = {
        "between tokens, 99 %": (TECHNIQUE, "itl", "p99"),
        "between tokens, median": (MORE[2], "itl", "p50"),
        "to the first token, median": (NEAREST, "ttft", "p50"),
    }
    for name, (colour, what, which) in lines.items():
        ax.plot(
            x, [1e3 * row[what][which] for row in rows], color=colour, marker="o", ms=4, label=name
        )
    ax.set_yscale("log")
    ax.set_xticks(x, ["whole" if row["budget"] is None else str(row["budget"]) for row in rows])
    ax.yaxis.set_major_formatter("{x:,g}")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 4)
    ax.set(title="Chunked prefill (C)", xlabel="tokens a step may compute", ylabel="time (ms)")
    ax.legend(fontsize=8, loc="upper right")


def _goodput(ax: Axes, values: Values) -> None:
    for colour, (name, line) in coloured(
        (FULL, NEAREST, MORE[2], TECHNIQUE), values["lines"].items()
    ):
        # the highest that was tried
        at_least = "≥ " if line["capacity"] == max(values["rates"]) else ""
        label = f"{name}: {at_least}{line['capacity']:.3g}/s"
        ax.plot(values["rates"], line["met"], color=colour, marker="o", ms=3.5, label=label)
    ax.axhline(0.9, color="black", lw=0.8, ls=":")
    ax.set_xscale("log")
    shown = values["rates"][::2]
    ax.set_xticks(shown, [f"{rate:g}" for rate in shown])
    ax.minorticks_off()
    limits = values["limits"]
    title = f"Requests within their limits (C):\nTTFT ≤ {limits['ttft']:g} s, TPOT ≤ {1e3 * limits['tpot']:g} ms"
    ax.set(
        title=title,
        xlabel="requests that arrive in a second",
        ylabel="share of requests",
        ylim=(0, 1.05),
    )
    # between the falling lines: lower it would hide the first point of those that fail at
    # once
    ax.legend(
        fontsize=7.5,
        loc="upper left",
        bbox_to_anchor=(0.02, 0.85),
        handlelength=1.3,
        borderaxespad=0,
        title="capacity, 90 % within",
        title_fontsize=7.5,
        alignment="left",
    )


def _swapping(ax: Axes, rows: Sequence[Any]) -> None:
    x = np.arange(len(rows))
    for colour, way, shift in ((TECHNIQUE, "recompute", -0.2), (NEAREST, "swap", 0.2)):
        ax.bar(
            x + shift, [row[way]["duration"] for row in rows], width=0.36, color=colour, label=way
        )
    ax.set_xticks(x, [str(row["block"]) for row in rows])
    ax.set(title="Preempting: the whole run (C)", xlabel="tokens in a block", ylabel="seconds")
    ax.set_ylim(
        0, 1.25 * max(row[way]["duration"] for row in rows for way in ("recompute", "swap"))
    )
    ax.legend(fontsize=8, ncols=2)


@styled
def unpadding(values: Values) -> Figure:
    """Values of ``experiments.unpadding``: requests a second by policy, and the factors
    between them.
    """
    fig = Figure(layout="constrained", figsize=(7.2, 4.85))
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


@styled
def prefixes(values: Values) -> Figure:
    """Values of ``experiments.prefix_caching``: hit rates by program and memory, and
    speedups beside the formula's.
    """
    programs = values["programs"]
    fig = Figure(layout="constrained", figsize=(7.2, 6.2))
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
