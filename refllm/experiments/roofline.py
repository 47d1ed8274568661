"""Where the steps of a Llama-3-8B shape stand on the roofline of an H200, and what their
time consists of: projected.

    python -m refllm.experiments.roofline  # writes roofline.json and decode_cost.json
    refllm figures                         # draws them

``plot_roofline`` draws steps of any model on any device.

Left out: measured rates (the tour and notebook 01 add their own), communication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from refllm.array_types import Json
from refllm.errors import InputError
from refllm.measure.device import DEVICES, DeviceSpec
from refllm.measure.memory import LLAMA_8B
from refllm.measure.plotting import (
    FULL,
    MORE,
    NEAREST,
    TECHNIQUE,
    annotate_right,
    axes,
    coloured,
    styled,
)
from refllm.measure.records import Record, Values, write
from refllm.measure.roofline import Cost, step_cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_roofline(devices: Sequence[DeviceSpec], points: Mapping[str, Cost]) -> Figure:
    """The roofline of one or more devices, with steps as points on the first one's."""
    return draw_roofline(roofline_data(devices, points))


def roofline_data(devices: Sequence[DeviceSpec], points: Mapping[str, Cost]) -> Json:
    """Values of the figure ``roofline``: each device's roof, and where each step stands on
    the first one's.

    ValueError without a device, or for a step that computes or moves nothing: a logarithmic
    axis has no place for it.
    """
    if not devices or not all(0 < c.intensity < inf for c in points.values()):
        intensities = {label: c.intensity for label, c in points.items()}
        raise InputError(
            "roofline: needs a device, and steps of finite intensity above 0, "
            f"got {len(devices)} devices and {intensities}"
        )
    return {
        "devices": [
            {
                "name": d.name,
                "peak_flops": d.peak_flops,
                "peak_bandwidth": d.peak_bandwidth,
                "source": d.source,
            }
            for d in devices
        ],
        "points": [{"label": label, "intensity": c.intensity} for label, c in points.items()],
    }


def decode_cost_data(title: str, device: DeviceSpec, steps: Mapping[str, Cost]) -> Json:
    """Values of the figure ``decode_cost``: what each step's projected time consists of, in
    milliseconds.

    Memory traffic first, by what is read; then the arithmetic that takes longer than the
    traffic; then the overhead. The parts sum to ``projected_seconds``.
    """
    rows = []
    for label, cost in steps.items():
        moving = cost.bytes / device.peak_bandwidth
        parts = {
            "weights": cost.weight_bytes / device.peak_bandwidth,
            "keys and values": (cost.kv_read_bytes + cost.kv_write_bytes) / device.peak_bandwidth,
            "arithmetic not hidden by it": max(0.0, cost.flops / device.peak_flops - moving),
            "overhead": device.overhead,
        }
        rows.append({"label": label, "parts": {k: 1e3 * v for k, v in parts.items() if v}})
    return {"title": title, "unit": "ms", "rows": rows}


# --- the figures --------------------------------------------------------------------------


@styled
def draw_roofline(values: Values) -> Figure:
    """{"devices": [{name, peak_flops, peak_bandwidth}], "points": [{label, intensity,
    flops_per_second?}]}.

    A point without a measured rate stands on the first device's roof: an upper bound.
    """
    title = values.get("title", "Roofline")
    fig, ax = axes(
        title, "arithmetic intensity (FLOP per byte, log)", "rate (FLOP per second, log)"
    )
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
        _draw_point(ax, point, devices[0], points)
    measured = ["flops_per_second" in point for point in points]
    if not all(measured):
        label = f"upper bound on {devices[0]['name']}, not measured"
        ax.plot([], [], "o", color=TECHNIQUE, ms=7, label=label)
    if any(measured):
        ax.plot([], [], "o", color=TECHNIQUE, ms=7, label="measured")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(top=4 * max(d["peak_flops"] for d in devices))
    ax.legend(loc="lower right", fontsize=8.5)
    return fig


def _draw_point(ax: Axes, point: Json, device: Json, points: Sequence[Json]) -> None:
    """A step, labelled where the roof does not pass: beside or above its roof if it stands
    on it, else below it.
    """
    intensity = point["intensity"]
    memory_bound = intensity < device["peak_flops"] / device["peak_bandwidth"]
    roof = min(device["peak_flops"], intensity * device["peak_bandwidth"])
    rate = point.get("flops_per_second", roof)
    ax.plot(intensity, rate, "o", color=TECHNIQUE, ms=7, zorder=3)
    box = None
    if "flops_per_second" not in point:
        if memory_bound:
            place = ((-9, 0), "right", "center")
        else:
            place = ((0, 8), "center", "bottom")
    else:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        if memory_bound:
            # lower where the next points stand close by, so that their labels do not meet
            close = [
                p
                for p in points
                if 1 < p["intensity"] / intensity < 8 and p.get("flops_per_second", inf) < 3 * rate
            ]
            place = ((8, -2 - 12 * len(close)), "left", "top")
        else:
            place = ((0, -8), "center", "top")
    offset, horizontal, vertical = place
    ax.annotate(
        point["label"],
        (intensity, rate),
        xytext=offset,
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=8.5,
        zorder=4,
        bbox=box,
    )


@styled
def draw_decode_cost(values: Values) -> Figure:
    """{"title", "unit", "rows": [{"label", "parts": {part: time}}]} → where the time of a step
    goes, stacked bars.
    """
    rows = values["rows"]
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
        annotate_right(ax, f"{total:.3g}", float(total), y, 4)
    ax.set_yticks(range(len(rows)), [row["label"] for row in rows])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, 1.1 * max(left))  # room for the label behind the longest bar
    fig.legend(loc="outside upper right", ncols=len(names), fontsize=8.5)
    return fig


def main(folder: str = "figures/data") -> None:
    """Write the data of the projected figures: a Llama-3-8B shape with bf16 weights and
    cache on an H200.
    """
    command = "python -m refllm.experiments.roofline"
    hardware = "H200 SXM and A100 SXM 80 GB by their data sheets, bf16"
    h200 = DEVICES["h200"]
    points = {f"decode, batch {b}": step_cost(LLAMA_8B, [(2048, 1)] * b) for b in (1, 8, 64)}
    points |= {f"prefill, {n:,} tokens": step_cost(LLAMA_8B, [(0, n)]) for n in (128, 2048)}
    values = roofline_data([h200, DEVICES["a100"]], points)
    values["title"] = "Llama-3-8B shape, bf16: decoding at 2,048 tokens of context, and prefill"
    write(f"{folder}/roofline.json", Record(command, "C", hardware, values))
    # all fit into 141 GB
    pairs = [(1, 1024), (1, 32_768), (16, 1024), (16, 32_768), (64, 1024), (64, 8192)]
    steps = {f"batch {b}, context {s:,}": step_cost(LLAMA_8B, [(s, 1)] * b) for b, s in pairs}
    steps["prefill of 2,048 tokens"] = step_cost(LLAMA_8B, [(0, 2048)])
    title = "Where a step's time goes at best: Llama-3-8B shape on an H200"
    hardware = "H200 SXM by its data sheet, bf16, no overhead"
    write(
        f"{folder}/decode_cost.json",
        Record(command, "C", hardware, decode_cost_data(title, h200, steps)),
    )


if __name__ == "__main__":
    main()
