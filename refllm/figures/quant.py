"""Figures of quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from refllm.measure.plotting import (
    FULL,
    MORE,
    NEAREST,
    TECHNIQUE,
    Values,
    coloured,
    end_labels,
    styled,
)

# method → colour and name; W8A8 rounds activations too, which the others leave alone
METHODS = {
    "rtn": (NEAREST, "round to nearest"),
    "gptq": (TECHNIQUE, "GPTQ"),
    "awq": (MORE[0], "AWQ"),
    "smoothquant": (MORE[1], "SmoothQuant (W8A8)"),
    "int8": (MORE[3], "LLM.int8() (W8A8)"),
}
# activations are rounded so
LEVELS = {"O1": "a step a token", "O2": "a step a batch", "O3": "a step from calibration"}


@styled
def quantization(values: Values) -> Figure:
    """{"rows": [{"method", "bits", "group", "kl": [mean, low, high], "bits per weight"}]} →
    KL, a panel for each bits.

    Rows that differ in the seed alone are one point: their mean, and whiskers around all of
    their intervals.
    """
    rows: Sequence[Any] = values["rows"]
    # 0, a scale a row, first
    groups = sorted({row["group"] for row in rows}, key=lambda g: (g > 0, -g))
    widths = sorted({row["bits"] for row in rows}, reverse=True)
    fig = Figure(layout="constrained", figsize=(7.2, 5.6))
    panels = [
        fig.add_subplot(-(-len(widths) // 2), min(2, len(widths)), i + 1)
        for i in range(len(widths))
    ]
    for panel, bits in zip(panels, widths, strict=True):
        inside = [row for row in rows if row["bits"] == bits]
        means = [mean for method in METHODS for mean in _errors(panel, inside, method, groups)]
        far = max(means) > 10 * min(means)  # then the smallest would be one line on the floor
        panel.set(
            title=f"{bits} bits: KL from full precision",
            ylabel="KL (nats per token, log)" if far else "KL (nats per token)",
            xlabel="weights a scale, stored bits a weight",
        )
        size = [min(row["bits per weight"] for row in inside if row["group"] == g) for g in groups]
        names = [f"{g or 'row'}\n{b:.2f}" for g, b in zip(groups, size, strict=True)]
        panel.set_xticks(range(len(groups)), names)
        panel.set_xlim(-0.5, len(groups) - 0.5)
        if far:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(lambda v, _: f"{v:.4f}")
        else:
            panel.set_ylim(bottom=0)
    labels = {
        label: handle
        for p in panels
        for handle, label in zip(*p.get_legend_handles_labels(), strict=True)
    }
    fig.legend(
        labels.values(),
        labels.keys(),
        loc="outside upper left",
        ncols=len(labels),
        fontsize=9,
        columnspacing=1.2,
    )
    return fig


def _errors(panel: Axes, rows: Sequence[Any], method: str, groups: Sequence[int]) -> list[float]:
    """A method's line in one panel, if it has any rows there; returns its means."""
    methods = [m for m in METHODS if any(row["method"] == m for row in rows)]
    if method not in methods:
        return []
    colour, label = METHODS[method]
    # whiskers stand beside each other
    shift = 0.1 * (methods.index(method) - (len(methods) - 1) / 2)
    points = []
    for place, group in enumerate(groups):
        kl = [row["kl"] for row in rows if (row["method"], row["group"]) == (method, group)]
        if kl:
            mean = sum(k[0] for k in kl) / len(kl)
            points.append(
                (place + shift, mean, mean - min(k[1] for k in kl), max(k[2] for k in kl) - mean)
            )
    x, y, below, above = zip(*points, strict=True)
    panel.errorbar(x, y, yerr=(below, above), color=colour, marker="o", ms=4, lw=1.4, label=label)
    return list(y)


@styled
def observers(values: Values) -> Figure:
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
    fig = Figure(layout="constrained", figsize=(7.2, 6.2))
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


@styled
def smoothquant(values: Values) -> Figure:
    """{"rows": [{"outliers", "level", "alpha", "keep", "kl", "bits per byte", "full
    precision"}]}.

    Above, KL over α; below, where it helps and where not. KL tells networks apart whose
    bits per byte differ by less than chance; those stand beside it, in per cent.
    """
    fig = Figure(layout="constrained", figsize=(7.2, 6.2))
    # apart, so that the long names below do not make the upper plot narrow
    parts: Any = fig.subfigures(2, 1)
    _over_alpha(parts[0].subplots(), values)
    _where_it_helps(parts[1].subplots(), values["rows"])
    return fig


def _over_alpha(ax: Axes, values: Values) -> None:
    """KL over α for each level, and without smoothing dashed."""
    rows = values["rows"]
    ends = []
    for at, (colour, level) in enumerate(
        coloured((TECHNIQUE, MORE[0], MORE[1]), _distinct(rows, "level"))
    ):
        smooth = [
            r for r in rows if (r["outliers"], r["level"], list(r["keep"])) == ("norms", level, [])
        ]
        curve = sorted((r["alpha"], r["kl"][0]) for r in smooth if r["alpha"] is not None)
        ax.plot(*zip(*curve, strict=True), color=colour, marker="o", ms=4)
        ends.append((*curve[-1], f"{level}, smoothed:\n{LEVELS[level]}", colour))
        plain = _network(rows, "norms", level, None)
        # dashes in turn: where two levels are as bad as each other, both are seen
        ax.axhline(plain["kl"][0], color=colour, ls=(6 * at, (5, 7)), lw=1.6)
        ends.append((1, plain["kl"][0], f"{level}, not smoothed:\n{_loss(plain)}", colour))
    ax.set(
        title=f"W8A8, outliers of {values['factor']:g}× behind the norms", xlabel="α", yscale="log"
    )
    ax.set_ylabel("KL (nats per token)")
    end_labels(ax, ends, gap=0.13, fontsize=8)


def _where_it_helps(ax: Axes, rows: Sequence[Any]) -> None:
    """KL of what is planted, smoothed and kept in floating point, a dot each."""
    keep = ["o_proj", "down_proj"]
    cases = [
        ("no outliers, not smoothed", "nothing", None, []),
        ("norms, not smoothed", "norms", None, []),
        ("norms, not smoothed, o and down kept", "norms", None, keep),
        ("norms, smoothed", "norms", 0.5, []),
        ("norms, smoothed, o and down kept", "norms", 0.5, keep),
        ("MLP hidden, not smoothed", "MLP hidden", None, []),
        ("MLP hidden, smoothed", "MLP hidden", 0.5, []),
        ("MLP hidden, smoothed, down kept", "MLP hidden", 0.5, ["down_proj"]),
    ]
    found = [_network(rows, outliers, "O1", alpha, kept) for _, outliers, alpha, kept in cases]
    length = [max(r["kl"][0], 1e-9) for r in found]
    for y, r in enumerate(found):
        _dot(ax, length[y], y, FULL if r["alpha"] is None else TECHNIQUE, _loss(r))
    ax.set_yticks(range(len(cases)), [case[0] for case in cases], fontsize=9)
    ax.set(title="O1: where it helps, and where not", xscale="log", xlabel="KL (nats per token)")
    ax.set_xlim(min(length) / 2, 60 * max(length))
    ax.set_ylim(len(cases) - 0.5, -0.5)


def _network(
    rows: Sequence[Any], outliers: str, level: str, alpha: float | None, keep: Sequence[str] = ()
) -> Any:
    wanted = (outliers, level, alpha, list(keep))
    return next(
        r for r in rows if (r["outliers"], r["level"], r["alpha"], list(r["keep"])) == wanted
    )


def _loss(row: Any) -> str:
    """By how much the bits per byte rise, in two significant digits."""
    percent = float(f"{100 * (row['bits per byte'] / row['full precision'] - 1):.2g}")
    return f"{np.format_float_positional(percent, trim='-', sign=True)} % bits per byte".replace(
        "-", "−"
    )


def _distinct(rows: Sequence[Any], key: str) -> list[Any]:
    """The values of a column, in the order in which they occur."""
    return list(dict.fromkeys(row[key] for row in rows))


@styled
def salience(values: Values) -> Figure:
    """{"bits", "factor", "rows": [{"network", "by", "fraction", "seed", "kl": [mean, low,
    high]}]} → KL, two panels.
    """
    rows: Sequence[Any] = values["rows"]
    colours = {"activation": TECHNIQUE, "weight": MORE[3], "random": FULL}
    fig = Figure(layout="constrained", figsize=(7.2, 3.6))
    titles = {
        "as it is": "The network as it is",
        "planted": f"With {values['factor']:g}× outlier channels",
    }
    for i, (network, title) in enumerate(titles.items()):
        panel = fig.add_subplot(1, 2, i + 1)
        inside = [row for row in rows if row["network"] == network]
        fractions = sorted({row["fraction"] for row in inside if row["by"]})
        nearest = next(row["kl"][0] for row in inside if row["by"] is None)
        panel.axhline(nearest, color=NEAREST, label="none kept: round to nearest")
        for at, (by, colour) in enumerate(colours.items()):
            points = []
            for place, fraction in enumerate(fractions):
                kl = [row["kl"] for row in inside if (row["by"], row["fraction"]) == (by, fraction)]
                mean = sum(k[0] for k in kl) / len(kl)
                low = mean - min(k[1] for k in kl)
                high = max(k[2] for k in kl) - mean
                points.append((place + 0.08 * (at - 1), mean, low, high))
            x, y, below, above = zip(*points, strict=True)
            panel.errorbar(
                x,
                y,
                yerr=(below, above),
                color=colour,
                marker="o",
                ms=4,
                lw=1.4,
                label="at random" if by == "random" else f"by {by}",
            )
        panel.set(
            title=title,
            xlabel=f"input channels kept; others in {values['bits']} bits",
            ylim=(0, None),
        )
        panel.set_ylabel(
            "KL from full precision (nats per token)" if i == 0 else "KL (nats per token)"
        )
        panel.set_xticks(range(len(fractions)), [f"{fraction:.0%}" for fraction in fractions])
        panel.set_xlim(-0.5, len(fractions) - 0.5)
        if i == 0:
            labels = panel.get_legend_handles_labels()
    fig.legend(*labels, loc="outside upper left", ncols=4, fontsize=8.5)
    return fig
