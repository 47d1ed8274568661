"""What speculative decoding buys: tokens per step, speedup over γ, and the batch from which
it buys nothing.

The measurement is a benchmark, ``benchmarks/speculative.py``, which writes
figures/data/speculative.json; this file draws it. What it measures (A: counted, B: measured
here, C: projected) stands there.

Left out: the texts themselves (``benchmarks/results/speculative.json`` says how they were
chosen).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TASKS = (
    ("code", "model", "held-out code, draft model"),
    ("copy", "n-gram", "copy-heavy text, n-grams"),
)


_SPEED = "speed-up over\nno drafts (times)"


_COLOURS = (TECHNIQUE, NEAREST, MORE[0])


@styled
def draw(values: Values) -> Figure:
    """The record of ``benchmarks/speculative.py``: tokens a step over γ, speed-up over γ,
    and over the batch.
    """
    fig = new_figure(6.24)
    grid = fig.add_gridspec(3, 2)
    upper = [fig.add_subplot(grid[0, 0])]
    upper.append(fig.add_subplot(grid[0, 1], sharey=upper[0]))
    for column, (task, drafter, title) in enumerate(_TASKS):
        rows = [r for r in values["results"] if (r["task"], r["drafter"]) == (task, drafter)]
        _lengths(upper[column], rows, title)
        others = [
            r
            for r in values["results"]
            if r["task"] == task and r["drafter"] not in ("model", "n-gram")
        ]
        _speeds(fig.add_subplot(grid[1, column]), rows, others, title)
    # not before both have their lines: it ends the search for the upper limit
    upper[0].set_ylim(bottom=1)
    _batches(fig.add_subplot(grid[2, :]), values["batches"])
    return fig


def _lengths(ax: Axes, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    ax.set(title=title, xlabel="γ, drafted tokens a step", ylabel="τ, tokens a step (A)")
    for colour, temperature in zip(
        _COLOURS, sorted({r["temperature"] for r in rows}), strict=False
    ):
        some = sorted(
            (r for r in rows if r["temperature"] == temperature), key=lambda r: r["gamma"]
        )
        gammas = [r["gamma"] for r in some]
        ax.plot(
            gammas,
            [r["length"] for r in some],
            color=colour,
            marker="o",
            ms=4,
            label=f"temperature {temperature:g}",
        )
        if some[0]["drafter"] != "model":
            continue  # the formula knows no step in which nothing is found to draft
        independent = [sum(r["alpha"] ** i for i in range(r["gamma"] + 1)) for r in some]
        ax.plot(gammas, independent, color=colour, lw=1, ls=":")
    if rows[0]["drafter"] == "model":
        ax.plot([], [], color="black", lw=1, ls=":", label="formula, if independent")
    ax.set_xticks(sorted({r["gamma"] for r in rows}))
    # the model's lines end far below the highest of the n-grams, whose scale they share:
    # there is room over them
    place: Any = (
        {"loc": "upper left", "ncols": 2}
        if rows[0]["drafter"] == "model"
        else {"loc": "center right"}
    )
    ax.legend(fontsize=7, columnspacing=1, handlelength=1.5, **place)


def _speeds(
    ax: Axes, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], title: str
) -> None:
    ax.set_xlabel("γ, drafted tokens a step")
    ax.set_ylabel(_SPEED, fontsize=9)
    temperature = min(r["temperature"] for r in rows)
    some = sorted((r for r in rows if r["temperature"] == temperature), key=lambda r: r["gamma"])
    gammas = [r["gamma"] for r in some]
    median = [r["speedup"]["median"] for r in some]
    below = [m - r["speedup"]["low"] for m, r in zip(median, some, strict=True)]
    above = [r["speedup"]["high"] - m for m, r in zip(median, some, strict=True)]
    way = "chain" if some[0]["drafter"] == "model" else some[0]["drafter"]
    ax.axhline(1, color=FULL, lw=1)
    ax.errorbar(
        gammas, median, yerr=(below, above), color=TECHNIQUE, marker="o", ms=4, label=f"{way} (B)"
    )
    for name, colour, mark in (("tree", NEAREST, "^"), ("n-gram, tree", MORE[0], "s")):
        drawn = sorted(
            (r for r in others if (r["drafter"], r["temperature"]) == (name, temperature)),
            key=lambda r: r["gamma"],
        )
        if drawn:
            ax.plot(
                [r["gamma"] for r in drawn],
                [r["speedup"]["median"] for r in drawn],
                color=colour,
                marker=mark,
                ms=4,
                label=f"{name} (B)",
            )
    ax.plot(
        gammas,
        [r["formula"] for r in some],
        color=TECHNIQUE,
        lw=1,
        ls="--",
        label="τ t(1) / (t(γ+1) + γ c)",
    )
    ax.plot(
        gammas,
        [r["flat"] for r in some],
        color=MORE[3],
        lw=1.4,
        ls=":",
        label="t flat: memory-bound (C)",
    )
    ax.set_ylim(0, 1.65 * max(r["flat"] for r in some))  # room for the legend above the lines
    ax.set_xticks(gammas)
    ax.set_title(f"{title}, temperature {temperature:g}", fontsize=9, pad=3)
    ax.legend(
        fontsize=7,
        loc="upper center",
        ncols=2,
        columnspacing=0.6,
        handlelength=1.3,
        labelspacing=0.3,
    )


def _batches(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    ax.set(
        title="In the engine: time without drafts ÷ with them (B)", xlabel="sequences in the batch"
    )
    ax.set_ylabel(_SPEED, fontsize=9)
    sizes = [r["batch"] for r in rows]
    ax.axhline(1, color=FULL, lw=1)
    for name, colour, label in (
        ("fixed", NEAREST, "γ = 3 always"),
        ("adaptive", TECHNIQUE, "γ by measured cost and α"),
    ):
        ax.plot(
            sizes, [r[name]["median"] for r in rows], color=colour, marker="o", ms=4, label=label
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8.5)
