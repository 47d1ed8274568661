"""What each observer does to a heavy-tailed tensor: where it clips, and what that does to the
error of rounding.

    python -m refllm.experiments.observer_ranges  # writes figures/data/observers.json
    refllm figures                                # draws it

The tensor is drawn from Student's t distribution with 3 degrees of freedom, whose tail
falls as x⁻⁴ (activations of large networks are like that), in batches of which the first
has a fifth of the others' size: a moving average hardly moves away from it. Every observer
sees the same batches in the same order.

| symbol | name                                                                 |
|--------|----------------------------------------------------------------------|
| cut    | the largest magnitude that the observer's range keeps                |
| beyond | share of the elements that are clipped                               |
| error  | ‖x̂ − x‖² / ‖x‖² of the whole tensor, rounded with the range's scale |

Left out: ranges per channel; what the error does to a network (``quantization_quality``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refllm.array_types import Json
from refllm.formats.uniform import Scheme, dequantize_codes, quantize_codes
from refllm.measure.plotting import (
    FULL,
    MORE,
    NEAREST,
    TECHNIQUE,
    annotate_right,
    coloured,
    new_figure,
    styled,
)
from refllm.measure.records import Record, Values, write
from refllm.quant.methods import relative_error
from refllm.quant.observers import MSE, Entropy, MinMax, MovingAverage, Observer, Percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCHES = 8
SIZE = 1 << 14
FIRST = 0.2
FREEDOM = 3
BITS = (8, 4)
BINS = 60


def observers(bits: int) -> dict[str, Callable[[], Observer]]:
    """Every observer, by the name that the figure gives it, for codes of ``bits`` bits."""
    scheme = Scheme(bits, "half_integer", "tensor")
    return {
        "min-max": MinMax,
        "moving average": MovingAverage,
        "percentile 99.99": lambda: Percentile(99.99),
        "percentile 99.9": lambda: Percentile(99.9),
        "MSE": lambda: MSE(
            scheme, averaging=1.0, grid=200, max_shrink=0.995, norm=2.0, patience=None
        ),
        "entropy": lambda: Entropy(bits, start=max(16, 1 << (bits - 1))),
    }


def batches(seed: int = 0) -> list[np.ndarray]:
    """``BATCHES`` batches of ``SIZE`` elements, the first of them smaller in magnitude."""
    rng = np.random.default_rng(seed)
    parts = [rng.standard_t(FREEDOM, SIZE).astype(np.float32) for _ in range(BATCHES)]
    return [np.float32(FIRST) * parts[0], *parts[1:]]


def observed(parts: Sequence[np.ndarray], bits: int) -> list[Json]:
    """A row for each observer: where it clips, and the error of the whole tensor."""
    x = np.concatenate(parts)
    scheme = Scheme(bits, "half_integer", "tensor")
    rows = []
    for name, make in observers(bits).items():
        observer = make()
        # the MSE search does not average over batches: it sees the whole tensor at once
        for part in parts if name != "MSE" else [x]:
            observer.observe(part)
        scale, zero = observer.qparams(scheme)
        back = dequantize_codes(quantize_codes(x, scale, zero, scheme), scale, zero, scheme)
        cut = float(observer.absmax)
        rows.append(
            {
                "observer": name,
                "bits": bits,
                "cut": cut,
                "beyond": float(np.mean(np.abs(x) > cut)),
                "error": relative_error(x, back),
            }
        )
    return rows


def values(seed: int = 0) -> Json:
    """What the record holds: the histogram of |x| on logarithmic bins, and the rows."""
    parts = batches(seed)
    size = np.abs(np.concatenate(parts))
    edges = np.geomspace(0.01, float(size.max()), BINS + 1)
    counts, _ = np.histogram(size, edges)
    return {
        "tensor": f"Student's t, {FREEDOM} degrees of freedom, {size.size:,} numbers",
        "edges": edges.tolist(),
        "density": (counts / size.size / np.diff(edges)).tolist(),
        "rows": [row for bits in BITS for row in observed(parts, bits)],
    }


# --- the figure ---------------------------------------------------------------------------

COLOURS = (FULL, NEAREST, MORE[0], MORE[3], TECHNIQUE, MORE[1])


@styled
def draw(values: Values) -> Figure:
    """{"tensor", "edges", "density", "rows": [{"observer", "bits", "cut", "beyond",
    "error"}]} → a column for each bit width.

    Above, the tensor's density with the place where each observer clips; below, the error.
    """
    rows = values["rows"]
    names = list(dict.fromkeys(row["observer"] for row in rows))
    colours = {name: colour for colour, name in coloured(COLOURS, names)}
    widths = list(dict.fromkeys(row["bits"] for row in rows))
    fig = new_figure(6.2)
    panels = fig.subplots(2, len(widths), squeeze=False)
    for (above, below), bits in zip(panels.T, widths, strict=True):
        inside = [row for row in rows if row["bits"] == bits]
        _draw_cuts(above, inside, values, colours)
        _draw_errors(below, inside, colours)
        above.set_title(f"{bits} bits: where observers clip")
        best = min(inside, key=lambda row: row["error"])["observer"]
        below.set_title(f"{bits} bits: {best} has the least error")
    panels[1, 0].set_yticks(range(len(names)), names)
    return fig


def _draw_cuts(ax: Axes, rows: Sequence[Json], values: Values, colours: Mapping[str, str]) -> None:
    """The density, and a labelled line where each observer clips."""
    middles = [(a * b) ** 0.5 for a, b in pairwise(values["edges"])]
    shown = [(x, d) for x, d in zip(middles, values["density"], strict=True) if d > 0]
    ax.plot(*zip(*shown, strict=True), color="black", lw=1)
    ax.set(xscale="log", yscale="log", xlabel="|x| (log)", ylabel="density of |x| (log)")
    # labels on the left of their lines, one below the other, where the density is flat
    for place, row in enumerate(sorted(rows, key=lambda row: row["cut"], reverse=True)):
        colour = colours[row["observer"]]
        height = 0.64 - 0.1 * place
        ax.axvline(row["cut"], color=colour, lw=1.6)
        ax.annotate(
            row["observer"],
            (row["cut"], height),
            (0.03, height),
            ("data", "axes fraction"),
            "axes fraction",
            fontsize=8,
            va="center",
            color="black",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 1.2, "shrinkA": 1, "shrinkB": 0},
        )


def _draw_errors(ax: Axes, rows: Sequence[Json], colours: Mapping[str, str]) -> None:
    """A dot for each observer's error, since a bar's length would depend on where the
    logarithmic axis begins.
    """
    for y, row in enumerate(rows):
        ax.plot(row["error"], y, "o", color=colours[row["observer"]], ms=7)
        label = f"{row['error']:.2g}, clips {100 * row['beyond']:.2g} %"
        annotate_right(ax, label, row["error"], y, 8)
    ax.set(xscale="log", xlabel="error ‖x̂ − x‖² / ‖x‖² (log)")
    ax.set_yticks(range(len(rows)), [""] * len(rows))
    least = min(row["error"] for row in rows)
    most = max(row["error"] for row in rows)
    ax.set_xlim(0.7 * least, most * (most / least) ** 1.3)  # room for the labels
    ax.set_ylim(len(rows) - 0.5, -0.5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Show the tensor to every observer and write the record that the figure is drawn from."""
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.observer_ranges", description=main.__doc__
    )
    parser.add_argument("--output", type=Path, default=Path("figures/data/observers.json"))
    chosen = parser.parse_args(arguments)
    write(
        chosen.output, Record("python -m refllm.experiments.observer_ranges", "A", "none", values())
    )


if __name__ == "__main__":
    main()
