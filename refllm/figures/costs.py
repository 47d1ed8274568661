"""Figures of what a step costs: operations against bytes, where its time goes, what the
cache holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refllm.measure.plotting import (
    FULL,
    MORE,
    NEAREST,
    TECHNIQUE,
    Values,
    axes,
    coloured,
    end_labels,
    styled,
)


@styled
def roofline(values: Values) -> Figure:
    """{"devices": [{name, peak_flops, peak_bandwidth}], "points": [{label, intensity,
    flops_per_second?}]}.

    A point without a measured rate stands on the first device's roof: the most that it can
    reach.
    """
    title = values.get("title", "Roofline")
    fig, ax = axes(title, "arithmetic intensity (FLOP per byte)", "rate (FLOP per second)")
    devices = values["devices"]
    points = values["points"]
    ridges = [d["peak_flops"] / d["peak_bandwidth"] for d in devices]
    shown = [p["intensity"] for p in points] + ridges
    x = np.geomspace(min(shown) / 20, max(shown) * 4, 400)  # room for the labels on the left
    for colour, (device, ridge) in coloured(
        (FULL, NEAREST, *MORE), zip(devices, ridges, strict=True)
    ):
        roof = np.minimum(device["peak_flops"], x * device["peak_bandwidth"])
        ax.plot(x, roof, color=colour, label=f"{device['name']}: ridge at {ridge:.3g} FLOP/byte")
        ax.axvline(ridge, color=colour, lw=0.8, ls=":")
    for point in points:
        _point(ax, point, devices[0], points)
    if any("flops_per_second" not in point for point in points):
        ax.plot(
            [],
            [],
            "o",
            color=TECHNIQUE,
            ms=7,
            label=f"the most that {devices[0]['name']} can reach, not measured",
        )
    if any("flops_per_second" in point for point in points):
        ax.plot([], [], "o", color=TECHNIQUE, ms=7, label="measured")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(top=4 * max(d["peak_flops"] for d in devices))
    ax.legend(loc="lower right", fontsize=8.5)
    return fig


def _point(ax: Axes, point: Values, device: Values, points: Sequence[Values]) -> None:
    """A step, named where the roof does not pass: beside or over its roof if it stands on
    it, else under it.
    """
    intensity = point["intensity"]
    slope = point["intensity"] < device["peak_flops"] / device["peak_bandwidth"]
    rate = point.get(
        "flops_per_second", min(device["peak_flops"], intensity * device["peak_bandwidth"])
    )
    ax.plot(intensity, rate, "o", color=TECHNIQUE, ms=7, zorder=3)
    text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "zorder": 4}
    if "flops_per_second" in point:
        # lower where the next point stands close by, so that their names do not meet
        close = [
            p
            for p in points
            if 1 < p["intensity"] / intensity < 8 and p.get("flops_per_second", inf) < 3 * rate
        ]
        offset, ha = ((8, -2 - 12 * len(close)), "left") if slope else ((0, -8), "center")
        text |= {"va": "top", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}
    else:
        offset, ha = ((-9, 0), "right") if slope else ((0, 8), "center")
        text |= {"va": "center" if slope else "bottom"}
    ax.annotate(point["label"], (intensity, rate), xytext=offset, ha=ha, **text)


@styled
def decode_cost(values: Values) -> Figure:
    """{"title", "unit", "rows": [{"label", "parts": {part: time}}]} → where a step's time
    goes, stacked bars.
    """
    rows: Sequence[Any] = values["rows"]
    fig, ax = axes(
        values["title"],
        f"time per step ({values['unit']})",
        "",
        figsize=(7.2, 1.6 + 0.42 * len(rows)),
    )
    names = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    left = np.zeros(len(rows))
    for colour, name in coloured((FULL, TECHNIQUE, NEAREST, *MORE), names):
        widths = np.asarray([row["parts"].get(name, 0.0) for row in rows])
        ax.barh(range(len(rows)), widths, left=left, color=colour, label=name, height=0.68)
        left += widths
    for y, total in enumerate(left):
        ax.annotate(
            f"{total:.3g}",
            (total, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    ax.set_yticks(range(len(rows)), [row["label"] for row in rows])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, 1.1 * max(left))  # room for the number behind the longest bar
    fig.legend(loc="outside upper right", ncols=len(names), fontsize=8.5)
    return fig


@styled
def kv_memory(values: Values) -> Figure:
    """{"contexts", "lines": {name: bytes at each context}, "weights": {name: bytes},
    "marked": context}.

    A line's name gives the size at the ``marked`` context.
    """
    fig, ax = axes(
        "Cache of one sequence, beside the weights", "context (tokens)", "memory (GB = 10⁹ bytes)"
    )
    contexts = values["contexts"]
    marked = values.get("marked")
    ends = []
    if marked in contexts:
        ax.set_title(f"{ax.get_title(loc='left')}; sizes at {marked:,} tokens")
    for colour, (name, sizes) in coloured(
        (FULL, TECHNIQUE, NEAREST, *MORE), values["lines"].items()
    ):
        ax.plot(contexts, [s / 1e9 for s in sizes], color=colour, marker="o", ms=4)
        if marked in contexts:
            size = f": {sizes[contexts.index(marked)] / 1e9:.3g} GB"
        else:
            size = ""
        said = re.sub("heads([:,]) ", r"heads\1\n", name + size)  # in two lines
        ends.append((contexts[-1], sizes[-1] / 1e9, said, colour))
    for name, size in values.get("weights", {}).items():
        ax.axhline(size / 1e9, color="black", lw=0.9, ls="--")
        ax.annotate(
            f"{name}: {size / 1e9:.0f} GB",
            (0.01, size / 1e9),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8.5,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:,g}")
    end_labels(ax, ends, gap=0.1)
    return fig
