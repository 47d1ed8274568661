"""Figures of serving: what paging, continuous batching and prefix caching buy."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refllm.study.drawing import FULL, MORE, NEAREST, TECHNIQUE, Values, coloured, styled

WAYS = {"none fcfs": FULL, "hash fcfs": NEAREST, "hash lpm": MORE[3], "radix fcfs": MORE[2], "radix lpm": TECHNIQUE}


@styled
def paging(values: Values) -> Figure:
    """Values of ``study.paging``: mean batch by policy beside the paper's, and by the size of a block."""
    rows, blocks = values["policies"], values["blocks"]
    fig = Figure(layout="constrained", figsize=(7.2, 4.4))
    left, right = fig.subplots(1, 2, width_ratios=(4, 3))
    for y, row in enumerate(rows):
        batch, colour = mean(row["batch"]), TECHNIQUE if row["policy"] == "paged" else FULL
        left.barh(y, batch, color=colour, height=0.62)
        low, high = batch - min(row["batch"]), max(row["batch"]) - batch
        left.errorbar(batch, y, xerr=[[low], [high]], color="black", lw=1, capsize=2)
        text = f"{batch:.1f}, {mean(row['utilisation']):.0%} of the slots used"
        if row["paper"]:
            left.plot(row["paper"], y, "D", color=NEAREST, ms=6, zorder=3)
        at, inside = max(batch, row["paper"] or 0), batch > 20
        left.annotate(text, (min(batch, row["paper"] or batch) if inside else at, y), xytext=(-10 if inside else 10, 0),
                      textcoords="offset points", va="center", ha="right" if inside else "left",
                      color="white" if inside else "black", fontsize=8.5)  # fmt: skip
    left.plot([], [], "D", color=NEAREST, ms=6, label="the paper's measurement")
    left.set_yticks(range(len(rows)), [row["policy"].replace(", ", ",\n") for row in rows])
    left.invert_yaxis()
    left.grid(visible=False, axis="y")
    left.set(title=f"Requests that run in {values['slots']:,} slots", xlabel="mean batch while somebody waits")
    left.legend(loc="upper right", fontsize=8.5)
    sizes = [row["block"] for row in blocks]
    right.plot(sizes, [mean(row["batch"]) for row in blocks], color=TECHNIQUE, marker="o")
    for row in blocks:
        right.annotate(f"{mean(row['utilisation']):.0%}", (row["block"], mean(row["batch"])), xytext=(0, 7),
                       textcoords="offset points", ha="center", fontsize=8.5)  # fmt: skip
    right.set_xscale("log", base=2)
    right.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    right.minorticks_off()
    right.set_ylim(0, 1.15 * max(mean(row["batch"]) for row in blocks))
    right.set(title="By size of a block", xlabel="tokens in a block", ylabel="mean batch; share of slots used")
    return fig


@styled
def batching(values: Values) -> Figure:
    """Values of ``study.batching``: useful slots, chunks, goodput and swapping, a panel each."""
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
        ax.plot([row["batch"]] * len(row["counted"]), row["counted"], "o", color=NEAREST, ms=4, label=label)
    ax.axhline(1, color=TECHNIQUE, label="continuous")
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [str(b) for b in batches])
    ax.minorticks_off()
    ax.set(title="Useful slots of a static batch (A)", xlabel="requests in the batch", ylim=(0, 1.08))
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
        ax.plot(x, [1e3 * row[what][which] for row in rows], color=colour, marker="o", ms=4, label=name)
    ax.set_yscale("log")
    ax.set_xticks(x, ["whole" if row["budget"] is None else str(row["budget"]) for row in rows])
    ax.yaxis.set_major_formatter("{x:,g}")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 4)
    ax.set(title="Chunked prefill (C)", xlabel="tokens a step may compute", ylabel="time (ms)")
    ax.legend(fontsize=8, loc="upper right")


def _goodput(ax: Axes, values: Values) -> None:
    for colour, (name, line) in coloured((FULL, NEAREST, MORE[2], TECHNIQUE), values["lines"].items()):
        at_least = "≥ " if line["capacity"] == max(values["rates"]) else ""  # the highest that was tried
        label = f"{name}: {at_least}{line['capacity']:.3g}/s"
        ax.plot(values["rates"], line["met"], color=colour, marker="o", ms=3.5, label=label)
    ax.axhline(0.9, color="black", lw=0.8, ls=":")
    ax.set_xscale("log")
    shown = values["rates"][::2]
    ax.set_xticks(shown, [f"{rate:g}" for rate in shown])
    ax.minorticks_off()
    limits = values["limits"]
    ax.set(title="Requests within their limits (C)", ylim=(0, 1.05))
    ax.set_xlabel(f"arrivals a second; TTFT ≤ {limits['ttft']:g} s, TPOT ≤ {1e3 * limits['tpot']:g} ms")
    ax.set_ylabel("share")
    ax.legend(fontsize=8, loc="center left", title="capacity at 90 %", title_fontsize=8)


def _swapping(ax: Axes, rows: Sequence[Any]) -> None:
    x = np.arange(len(rows))
    for colour, way, shift in ((TECHNIQUE, "recompute", -0.2), (NEAREST, "swap", 0.2)):
        ax.bar(x + shift, [row[way]["duration"] for row in rows], width=0.36, color=colour, label=way)
    ax.set_xticks(x, [str(row["block"]) for row in rows])
    ax.set(title="Preempting: the whole run (C)", xlabel="tokens in a block", ylabel="seconds")
    ax.set_ylim(0, 1.25 * max(row[way]["duration"] for row in rows for way in ("recompute", "swap")))
    ax.legend(fontsize=8, ncols=2)


@styled
def unpadding(values: Values) -> Figure:
    """Values of ``study.unpadding``: requests a second by policy, and the factors between them."""
    rows, factors = values["rows"], values["factors"]["processor"]
    fig = Figure(layout="constrained", figsize=(7.2, 3.9))
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    for y, row in enumerate(rows):
        rates = [values["requests"] / seconds for seconds in row["processor"]]
        rate = float(np.median(rates))
        left.barh(y, rate, color=TECHNIQUE if row["run"].startswith("paged") else FULL, height=0.62)
        left.errorbar(rate, y, xerr=[[rate - min(rates)], [max(rates) - rate]], color="black", lw=1, capsize=2)
        left.annotate(f"batch {row['batch']:.1f}, {row['steps']:,} steps", (max(rates), y), xytext=(6, 0),
                      textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
    left.set_yticks(range(len(rows)), [row["run"] for row in rows])
    left.invert_yaxis()
    left.grid(visible=False, axis="y")
    left.set_xlim(0, 1.5 * max(values["requests"] / min(row["processor"]) for row in rows))
    left.set(title=f"One model, one budget of {values['slots']:,} tokens",
             xlabel="requests per second of processor time")  # fmt: skip
    names = list(factors)
    colours = {"padding": FULL, "kernel": NEAREST, "batch": TECHNIQUE, "all three": "black"}
    for x, name in enumerate(names):
        middle, low, high = factors[name]
        right.bar(x, middle, color=colours.get(name, FULL), width=0.62)
        right.errorbar(x, middle, yerr=[[middle - low], [high - middle]], color=MORE[3], lw=1, capsize=2)
        right.annotate(
            f"{middle:.2f}×", (x, high), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8.5
        )
    right.axhline(1, color="black", lw=0.8, ls=":")
    right.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=9)
    right.grid(visible=False, axis="x")
    right.set_ylim(0, 1.15 * max(high for _, _, high in factors.values()))
    right.set(title="What it is made of", ylabel="times as fast")
    return fig


@styled
def prefixes(values: Values) -> Figure:
    """Values of ``study.prefixes``: hit rates by program and memory, and speedups beside the formula's."""
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
        right.plot(row["formula"], row["speedup, processor"][0], "o", color=WAYS[_way(row)], ms=4, alpha=0.8)
    right.plot([0.5, 1.1 * most], [0.5, 1.1 * most], color="black", lw=0.8, ls=":")
    right.set(title="Beside the formula (B)", xlabel="speedup by the formula", ylabel="times as fast, measured")
    for way, colour in WAYS.items():
        if way != "none fcfs":
            left.plot([], [], color=colour, marker="o", ms=4, label=way.replace(" ", ", "))
    upper.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8.5)
    return fig


def _hit_rates(panels: Sequence[Axes], programs: Values) -> None:
    """A panel a program: hit rates by memory, and the best that any cache could have."""
    for ax, (name, rows) in zip(panels, programs.items(), strict=True):
        for way, colour in WAYS.items():
            mine = [row for row in rows if _way(row) == way]
            if way != "none fcfs":
                ax.plot([row["memory"] for row in mine], [row["hit"] for row in mine], color=colour, marker="o", ms=4,
                        lw=1.5)  # fmt: skip
        ax.axhline(rows[0]["best"], color="black", lw=0.9, ls=":")
        ax.set_xticks(sorted({row["memory"] for row in rows}))
        ax.set_title(name.replace(" of ", " of\n").replace("-", "-\n"), fontsize=9)
    panels[0].set_ylim(-0.03, 1.03)
    panels[0].set_ylabel("hit rate (A), best dotted", fontsize=9)


def _speedups(ax: Axes, programs: Values) -> None:
    """Speedup over no cache at the largest memory."""
    largest = max(row["memory"] for rows in programs.values() for row in rows)
    ways = [way for way in WAYS if way != "none fcfs"]
    for y, rows in enumerate(programs.values()):
        for at, way in enumerate(ways):
            row = next(r for r in rows if _way(r) == way and r["memory"] == largest)
            ax.barh(y + 0.2 * (at - 1.5), row["speedup, processor"][0], height=0.19, color=WAYS[way])
    ax.axvline(1, color="black", lw=0.8, ls=":")
    ax.set_yticks(range(len(programs)), list(programs))
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(title=f"Speed over no cache, memory {largest}× (B)", xlabel="times as fast, processor time")


def _way(row: Values) -> str:
    return f"{row['cache'] or 'none'} {row['order']}"
