"""What speculative decoding gains: tokens per step, speedup over γ, and the batch size from
which it gains nothing.

The measurement is a benchmark, ``benchmarks/speculative.py``, which writes
figures/data/speculative.json; this file draws it. In its panels A stands for counted, B for
measured and C for projected values.

| figure            | shows                                               |
|-------------------|-----------------------------------------------------|
| speculative       | per task: τ, tokens per step, and the speedup, by γ |
| speculative_batch | the speedup in the engine, by batch size            |

Left out: the texts themselves (``benchmarks/results/speculative.json`` says how they were
chosen).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from refllm.array_types import Json
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, axes, new_figure, styled
from refllm.measure.records import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# task and drafter in the record → title
TASKS = (
    ("code", "model", "Held-out code, draft model"),
    ("copy", "n-gram", "Copy-heavy text, n-grams"),
)
GAMMA = "γ, drafted tokens per step"
SPEEDUP = "speedup (times as fast)"
TEMPERATURES = (TECHNIQUE, NEAREST, MORE[0])  # colours, coldest first
# tree drafters in the record → colour, marker, label
TREES = {
    "tree": (NEAREST, "^", "model tree (B)"),
    "n-gram, tree": (MORE[0], "s", "n-gram tree (B)"),
}


@styled
def draw(values: Values) -> Figure:
    """The record of ``benchmarks/speculative.py`` → a column for each task: tokens per step
    over γ, speedup over γ.
    """
    fig = new_figure(6.0)
    panels = fig.subplots(2, len(TASKS))
    panels[0, 1].sharey(panels[0, 0])
    for (task, drafter, title), (above, below) in zip(TASKS, panels.T, strict=True):
        inside = [r for r in values["results"] if r["task"] == task]
        chain = [r for r in inside if r["drafter"] == drafter]
        _draw_lengths(above, chain)
        above.set_title(title)
        _draw_speedups(below, chain, inside)
    # not before both have their lines: it ends the search for the upper limit
    panels[0, 0].set_ylim(bottom=1)
    return fig


def _draw_lengths(ax: Axes, rows: Sequence[Json]) -> None:
    """τ over γ, a line for each temperature, and what independent acceptance would give."""
    temperatures = sorted({r["temperature"] for r in rows})
    for colour, temperature in zip(TEMPERATURES, temperatures, strict=False):
        line = _by_gamma(r for r in rows if r["temperature"] == temperature)
        gammas = [r["gamma"] for r in line]
        label = f"temperature {temperature:g}"
        ax.plot(gammas, [r["length"] for r in line], color=colour, marker="o", ms=4, label=label)
        if line[0]["drafter"] == "model":  # the formula has no steps without a draft
            formula = [sum(r["alpha"] ** i for i in range(r["gamma"] + 1)) for r in line]
            ax.plot(gammas, formula, color=colour, lw=1, ls=":")
    if rows[0]["drafter"] == "model":
        ax.plot([], [], color="black", lw=1, ls=":", label="(1 − αᵞ⁺¹) / (1 − α)")
    ax.set_xticks(sorted({r["gamma"] for r in rows}))
    ax.set(xlabel=GAMMA, ylabel="τ, tokens per step (A)")
    if rows[0]["drafter"] == "model":
        ax.legend(fontsize=8, loc="upper left")
    else:
        ax.legend(fontsize=8, loc="center right")


def _draw_speedups(ax: Axes, rows: Sequence[Json], all_drafters: Sequence[Json]) -> None:
    """Speedup over γ at the lowest temperature: measured, predicted, and if memory-bound."""
    temperature = min(r["temperature"] for r in rows)
    line = _by_gamma(r for r in rows if r["temperature"] == temperature)
    gammas = [r["gamma"] for r in line]
    ax.axhline(1, color=FULL, lw=1)
    for name, (colour, marker, label) in TREES.items():
        wanted = (name, temperature)
        tree = _by_gamma(r for r in all_drafters if (r["drafter"], r["temperature"]) == wanted)
        if tree:
            medians = [r["speedup"]["median"] for r in tree]
            x = [r["gamma"] for r in tree]
            ax.plot(x, medians, color=colour, marker=marker, ms=4, label=label)
    medians = [r["speedup"]["median"] for r in line]
    below = [r["speedup"]["median"] - r["speedup"]["low"] for r in line]
    above = [r["speedup"]["high"] - r["speedup"]["median"] for r in line]
    label = "chain (B)" if line[0]["drafter"] == "model" else "n-grams (B)"
    ax.errorbar(
        gammas, medians, yerr=(below, above), color=TECHNIQUE, marker="o", ms=4, label=label
    )
    formula = [r["formula"] for r in line]
    ax.plot(gammas, formula, color=TECHNIQUE, lw=1, ls="--", label="τ t(1) / (t(γ+1) + γ c)")
    flat = [r["flat"] for r in line]
    ax.plot(gammas, flat, color=MORE[3], lw=1.4, ls=":", label="if memory-bound (C)")
    ax.set_ylim(0, 1.75 * max(flat))  # room for the legend above the lines
    ax.set_xticks(gammas)
    ax.set(xlabel=GAMMA, ylabel=SPEEDUP, title=f"Speedup at temperature {temperature:g}")
    ax.legend(
        fontsize=7.5, loc="upper center", ncols=2, columnspacing=0.8, handlelength=1.5,
        labelspacing=0.3,
    )  # fmt: skip


def _by_gamma(rows: Iterable[Json]) -> list[Json]:
    """Rows in the order of γ."""
    return sorted(rows, key=lambda row: row["gamma"])


@styled
def draw_batches(values: Values) -> Figure:
    """The same record → speedup in the engine over the batch size."""
    rows = values["batches"]
    fig, ax = axes(
        "In the engine drafts pay off for small batches only",
        "sequences in the batch (log)",
        "speedup (times as fast, B)",
        figsize=(7.2, 3.4),
    )
    sizes = [r["batch"] for r in rows]
    ax.axhline(1, color=FULL, lw=1)
    for name, colour, label in (
        ("fixed", NEAREST, "γ = 3 always"),
        ("adaptive", TECHNIQUE, "γ by measured cost and α"),
    ):
        medians = [r[name]["median"] for r in rows]
        ax.plot(sizes, medians, color=colour, marker="o", ms=4, label=label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=9)
    return fig
