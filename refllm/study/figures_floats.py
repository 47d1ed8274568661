"""Figures of small floating-point formats."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from refllm.study.drawing import FULL, MORE, NEAREST, TECHNIQUE, Values, axes, styled


@styled
def float_formats(values: Values) -> Figure:
    """{"data": {kind: {format: error}}, "lengths", "accumulator": {name: errors}, "growths", "delayed"} → 3 panels."""
    fig = Figure(layout="constrained", figsize=(7.2, 6.2))
    grid = fig.add_gridspec(2, 2)
    top, left, right = (fig.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    kinds = values["data"]
    colours = {"int8": NEAREST, "e4m3": TECHNIQUE, "e5m2": MORE[0]}
    for at, (name, colour) in enumerate(colours.items()):
        places = np.arange(len(kinds)) + 0.26 * (at - 1)
        heights = [100 * errors[name] for errors in kinds.values()]
        bars = top.bar(places, heights, 0.24, color=colour, label=name.upper())
        top.bar_label(bars, fmt="%.2g", fontsize=8)
    top.set_xticks(range(len(kinds)), list(kinds))
    top.set(title="INT8 wins on even ranges, E4M3 where few numbers are large", ylabel="error (% of ‖x‖)")
    top.grid(False, axis="x")
    top.legend(loc="upper left", ncols=3)
    for colour, (name, errors) in zip((NEAREST, TECHNIQUE, FULL), values["accumulator"].items(), strict=True):
        left.plot(values["lengths"], errors, marker="o", ms=3.5, color=colour, label=name)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_ylim(top=2)
    left.set(title="Sums of K products", xlabel="K", ylabel="relative error (rms)")
    left.legend(loc="upper left", fontsize=8)
    growth = [100 * (g - 1) for g in values["growths"]]
    right.plot(growth, [100 * share for share in values["delayed"]], marker="o", ms=3.5, color=NEAREST, label="delayed")
    right.plot(growth, [0.0] * len(growth), color=TECHNIQUE, label="current")
    right.set(title="Delayed scaling saturates", xlabel="growth of the range (% a step)", ylabel="saturated (%)")
    right.legend(loc="upper left")
    return fig


@styled
def fp8_training(values: Values) -> Figure:
    """``study.fp8_training.values`` → how far each run's mean loss is from float32 of the same seed."""
    fig, ax = axes(
        f"Training in 8 bits: mean loss of the last {values['last']} of {values['steps']} steps",
        "difference to float32 of the same seed (%)", "",
    )  # fmt: skip
    against: Any = values["against float32"]
    spread = 100 * values["spread of seeds"]
    ax.axvspan(-0.25, 0.25, color="#e4e4e4", label="DeepSeek-V3's bound: ±0.25 %")
    names = list(against)
    for place, (name, colour) in enumerate(zip(names, (TECHNIQUE, NEAREST, *MORE), strict=False)):
        points = [100 * off for off in against[name].values()]
        ax.plot(points, [place] * len(points), "o", ms=8, color=colour)
        ax.annotate(f"gradient off by {100 * values['gradient error'][name]:.1f} %", (points[0], place), xytext=(0, 10),
                    textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    ax.axvline(0, color=FULL, lw=1)
    ax.plot([], [], " ", label=f"seeds of float32 differ by up to {spread:.2g} %")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.8)
    ax.legend(loc="lower right")
    return fig
