"""Figures of how models were trained, from the records in their own directories; nothing is
computed again.

| figure           | from                                  | shows                                 |
|------------------|---------------------------------------|---------------------------------------|
| training_curve   | curve.json, and the plan in card.json | loss by tokens read, and where phases |
|                  |                                       | end                                   |
| bits_by_position | ``by context`` in card.json           | what more context gains               |

Left out: models without a record (checkpoints trained elsewhere have none).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refllm.array_types import Json
from refllm.checkpoints.sources import BUNDLED, bundled
from refllm.checkpoints.tensor_files import read_json
from refllm.measure.plotting import FULL, SERIES, axes, coloured, styled
from refllm.measure.records import Record, Values, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def has_record(directory: Path) -> bool:
    """Whether the directory holds what the figures are drawn from."""
    return (directory / "curve.json").is_file() and (directory / "card.json").is_file()


def curve_values(directories: Sequence[Path]) -> Json:
    """Values of the figure ``training_curve``; the phases marked are those of the first
    directory's last run.
    """
    runs = {
        d.resolve().name: json.loads((d / "curve.json").read_text("utf-8")) for d in directories
    }
    phases = [
        p
        for p in read_json(directories[0] / "card.json")["training"]["plan"]["phases"]
        if p["steps"]
    ]
    end = next(iter(runs.values()))[-1]["tokens"]
    marks: list[list[int | str]] = []
    for phase in reversed(phases):
        marks.insert(0, [end, f"{phase['batch']} × {phase['length']} tokens"])
        end -= phase["steps"] * phase["batch"] * phase["length"]
    if end > 0:
        marks.insert(0, [end, "earlier runs"])
    return {"runs": runs, "phases": marks}


def position_values(directories: Sequence[Path]) -> Json:
    """Values of the figure ``bits_by_position``."""
    lines = {}
    for directory in directories:
        bins = read_json(directory / "card.json")["measured"]["by context"]
        lines[directory.resolve().name] = [
            [b["from"], b["to"], b["tokens"], b["nats per token"], b["bits per byte"]] for b in bins
        ]
    return {"lines": lines}


def hardware(directories: Sequence[Path]) -> str:
    """Where the models were trained, as their cards record it."""
    made = [read_json(d / "card.json")["made with"] for d in directories]
    return "; ".join(dict.fromkeys(f"CPU, Python {m['python']}, NumPy {m['numpy']}" for m in made))


# --- the figures --------------------------------------------------------------------------


@styled
def draw_curve(values: Values) -> Figure:
    """{"runs": {name: [record of curve.json, …]}, "phases": [[tokens, label], …],
    "bytes_per_token"} → loss by tokens.

    With ``bytes_per_token`` of the held-out text a second scale gives bits per byte.
    """
    runs = values["runs"]
    fig, ax = axes(
        "Training: loss on held-out modules, and of the batch (thin)",
        "tokens read (millions)",
        "loss (nats per token)",
    )
    for colour, (name, curve) in coloured(SERIES, runs.items()):
        tokens = [1e-6 * r["tokens"] for r in curve]
        ax.plot(tokens, [r["loss"] for r in curve], color=colour, lw=0.8, alpha=0.45)
        held = [(1e-6 * r["tokens"], r["held_out"]) for r in curve if "held_out" in r]
        if held:
            label = f"{name}: {held[-1][1]:.2f} nats per token at the end"
            ax.plot(*zip(*held, strict=True), color=colour, label=label)
    phases = values.get("phases", [])
    end = 1e-6 * max(r["tokens"] for curve in runs.values() for r in curve)
    ax.set_xlim(0, 1.05 * end)
    _draw_phases(ax, phases, end)
    if size := values.get("bytes_per_token"):
        factor = 1 / (np.log(2) * size)
        right = ax.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        right.set_ylabel("bits per byte")
        right.spines["right"].set_visible(True)
    # the legend stands below the names of the phases, and to the left of the last ones' lines
    late = [1e-6 * tokens / ax.get_xlim()[1] for tokens, _ in phases if 1e-6 * tokens > 0.8 * end]
    ax.legend(
        loc="upper right",
        bbox_to_anchor=(min(late, default=1), 0.96 - 0.06 * len(phases)),
        fontsize=9,
    )
    return fig


def _draw_phases(ax: Axes, phases: Sequence[tuple[int, str]], end: float) -> None:
    """A line where each phase ends, and its name to the left; a phase too narrow for that
    gets an arrow.
    """
    begin = 0.0
    wide = 0.0
    for i, (tokens, label) in enumerate(phases):
        stop = 1e-6 * tokens
        height = 0.96 - 0.06 * i
        arrow = None
        if stop - begin > 0.1 * end:
            wide = stop
        else:  # the name stands before the end of the last wide phase, where no line crosses it
            arrow = {"arrowstyle": "->", "color": FULL, "lw": 0.8, "shrinkA": 1, "shrinkB": 0}
        ax.axvline(stop, color=FULL, lw=0.8, ls=":")
        ax.annotate(
            label,
            ((begin + stop) / 2, height),
            (wide - 0.005 * end, height),
            ("data", "axes fraction"),
            arrowprops=arrow,
            ha="right",
            va="center",
            fontsize=8,
            color=FULL,
        )
        begin = stop


@styled
def draw_positions(values: Values) -> Figure:
    """{"lines": {name: [bin of ``perplexity.bits_by_position`` as [low, high, tokens, nats,
    bits], …]}}.
    """
    fig, ax = axes(
        "More context, fewer bits", "tokens of context (log)", "bits per byte of held-out text"
    )
    ticks: set[int] = set()
    for colour, (name, bins) in coloured(SERIES, values["lines"].items()):
        # a bin from 5 to 8 is drawn above 8: "up to 8 tokens of context"
        ends = [b[1] for b in bins]
        ax.plot(ends, [b[4] for b in bins], color=colour, marker="o", ms=4, label=name)
        ticks |= set(ends)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(ticks), [str(t) if t == 1 else f"≤{t}" for t in sorted(ticks)])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.legend()
    return fig


def main(folder: str = "figures/data") -> None:
    """Write the data of both figures for the bundled models that have a record."""
    directories = [BUNDLED / name for name in bundled() if has_record(BUNDLED / name)]
    if not directories:
        raise FileNotFoundError(f"no model in {BUNDLED} has a record")
    command = "python -m refllm.experiments.training_curves"
    where = hardware(directories)
    write(f"{folder}/training_curve.json", Record(command, "B", where, curve_values(directories)))
    # counted: bits of given weights on given text, no clock
    write(
        f"{folder}/bits_by_position.json", Record(command, "A", where, position_values(directories))
    )


if __name__ == "__main__":
    main()
