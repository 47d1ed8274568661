"""What each observer does to a heavy-tailed tensor: where it cuts, and what that does to
the error of rounding.

    python -m refllm.experiments.observer_ranges          # writes
    figures/data/observers.json; `refllm figures` draws it

The tensor is drawn from Student's t distribution with 3 degrees of freedom, whose tail
falls as x⁻⁴ (activations of large networks are like that), in batches of which the first
has a fifth of the others' size: a moving average hardly gets beyond it. Every observer sees
the same batches in the same order.

| symbol | name                                                                |
|--------|---------------------------------------------------------------------|
| cut    | the largest magnitude that the observer's range keeps               |
| beyond | share of the numbers that are clipped                               |
| error  | ‖x̂ − x‖² / ‖x‖² of the whole tensor, rounded with the range's step |

Left out: ranges by channel; what the error does to a network (``quality``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refllm.formats.uniform import Scheme, dequantize_codes, quantize_codes
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, coloured, new_figure, styled
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
    """Every observer by the name that the figure gives it, for codes of so many bits."""
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
    """``BATCHES`` batches of ``SIZE`` numbers, the first of them smaller in size."""
    rng = np.random.default_rng(seed)
    parts = [rng.standard_t(FREEDOM, SIZE).astype(np.float32) for _ in range(BATCHES)]
    return [np.float32(FIRST) * parts[0], *parts[1:]]


def observed(parts: Sequence[np.ndarray], bits: int) -> list[dict[str, Any]]:
    """A row for each observer: what it cuts, and what its range does to all of the tensor."""
    x = np.concatenate(parts)
    scheme = Scheme(bits, "half_integer", "tensor")
    rows = []
    for name, make in observers(bits).items():
        observer = make()
        # the search has no mean to take: it sees the whole
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


def values(seed: int = 0) -> dict[str, Any]:
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


# --- the figure ----------------------------------------------------------------------


@styled
def draw(values: Values) -> Figure:
    """{"tensor", "edges", "density", "rows": [{"observer", "bits", "cut", "beyond",
    "error"}]} → cuts, and errors.

    A panel above for each width of codes: the tensor's density with every observer's cut;
    below, what that costs.
    """
    rows: Sequence[Any] = values["rows"]
    names = _distinct(rows, "observer")
    colours = {
        name: colour
        for colour, name in coloured((FULL, NEAREST, MORE[0], MORE[3], TECHNIQUE, MORE[1]), names)
    }
    widths = _distinct(rows, "bits")
    from matplotlib.lines import Line2D

    fig = new_figure(6.2)
    middle = [(a * b) ** 0.5 for a, b in pairwise(values["edges"])]
    shown = [(x, d) for x, d in zip(middle, values["density"], strict=True) if d > 0]
    for i, bits in enumerate(widths):
        above = fig.add_subplot(2, len(widths), i + 1)
        below = fig.add_subplot(2, len(widths), len(widths) + i + 1)
        inside = [row for row in rows if row["bits"] == bits]
        above.plot(*zip(*shown, strict=True), color="black", lw=1)
        for row in inside:
            above.axvline(row["cut"], color=colours[row["observer"]], lw=1.6)
        above.set(
            xscale="log",
            yscale="log",
            title=f"{bits} bits: where each cuts",
            xlabel="|x|",
            ylabel="density of |x|",
        )
        for y, row in enumerate(inside):
            said = f"{row['error']:.2g}, clips {100 * row['beyond']:.2g} %"
            _dot(below, row["error"], y, colours[row["observer"]], said)
        below.set(
            xscale="log", xlabel="error ‖x̂ − x‖² / ‖x‖²", title=f"{bits} bits: what that costs"
        )
        below.set_yticks(
            range(len(inside)),
            [row["observer"] for row in inside] if i == 0 else [""] * len(inside),
        )
        least, most = (f(row["error"] for row in inside) for f in (min, max))
        # room for what the dots are labelled with
        below.set_xlim(0.7 * least, most * (most / least) ** 1.1)
        below.set_ylim(len(inside) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=colour, marker="o", ms=6, lw=1.6) for colour in colours.values()
    ]
    fig.legend(
        [Line2D([], [], color="black", lw=1), *handles],
        ["density", *colours],
        loc="outside upper left",
        ncols=len(colours) + 1,
        fontsize=8,
        handlelength=1.3,
        columnspacing=1.2,
        title_fontsize=9.5,
        title=f"{values['tensor']}; a line is a cut, a dot its error",
        alignment="left",
    )
    return fig


def _dot(ax: Axes, x: float, y: float, colour: str, said: str) -> None:
    """A value on a logarithmic axis: a dot, since a bar's length would depend on where the
    axis begins.
    """
    ax.plot(x, y, "o", color=colour, ms=7)
    ax.annotate(
        said,
        (x, y),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )


def _distinct(rows: Sequence[Any], key: str) -> list[Any]:
    """The values of a column, in the order in which they occur."""
    return list(dict.fromkeys(row[key] for row in rows))


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
