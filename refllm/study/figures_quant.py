"""Figures of quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure

from refllm.study.drawing import FULL, MORE, NEAREST, TECHNIQUE, Values, coloured, styled


@styled
def quantization(values: Values) -> Figure:
    """{"rows": [{"method", "bits", "group", "kl": [mean, low, high], "bits per weight"}]} → KL, a panel for each bits.

    Rows that differ in the seed alone are one point: their mean, and whiskers around all of their intervals.
    """
    rows: Sequence[Any] = values["rows"]
    colours = {"rtn": NEAREST, "gptq": TECHNIQUE, "awq": MORE[0], "smoothquant": MORE[1], "int8": MORE[3]}
    groups = sorted({row["group"] for row in rows}, key=lambda g: (g > 0, -g))  # 0, a scale a row, first
    widths = sorted({row["bits"] for row in rows}, reverse=True)
    fig = Figure(layout="constrained", figsize=(7.2, 5.6))
    panels = [fig.add_subplot(-(-len(widths) // 2), min(2, len(widths)), i + 1) for i in range(len(widths))]
    for panel, bits in zip(panels, widths, strict=True):
        inside = [row for row in rows if row["bits"] == bits]
        methods = [m for m in colours if any(row["method"] == m for row in inside)]
        for at, method in enumerate(methods):
            shift, points = 0.1 * (at - (len(methods) - 1) / 2), []  # whiskers stand beside each other
            for place, group in enumerate(groups):
                kl = [row["kl"] for row in inside if (row["method"], row["group"]) == (method, group)]
                if kl:
                    mean = sum(k[0] for k in kl) / len(kl)
                    points.append((place + shift, mean, mean - min(k[1] for k in kl), max(k[2] for k in kl) - mean))
            x, y, below, above = zip(*points, strict=True)
            panel.errorbar(x, y, yerr=(below, above), color=colours[method], marker="o", ms=4, lw=1.4, label=method)
        panel.set(
            title=f"{bits} bits: KL from full precision",
            ylabel="KL (nats per token)",
            xlabel="weights a scale; below, stored bits a weight",
        )
        size = [min(row["bits per weight"] for row in inside if row["group"] == g) for g in groups]
        names = [f"{g or 'row'}\n{b:.2f}" for g, b in zip(groups, size, strict=True)]
        panel.set_xticks(range(len(groups)), names)
        panel.set_xlim(-0.5, len(groups) - 0.5)
        panel.set_ylim(bottom=0)
    labels = {label: handle for p in panels for handle, label in zip(*p.get_legend_handles_labels(), strict=True)}
    fig.legend(labels.values(), labels.keys(), loc="outside upper left", ncols=len(labels))
    return fig


@styled
def observers(values: Values) -> Figure:
    """{"tensor", "edges", "density", "rows": [{"observer", "bits", "cut", "beyond", "error"}]} → cuts, and errors.

    A panel above for each width of codes: the tensor's density with every observer's cut; below, what that costs.
    """
    rows: Sequence[Any] = values["rows"]
    names = list(dict.fromkeys(row["observer"] for row in rows))
    colours = {name: colour for colour, name in coloured((FULL, NEAREST, MORE[0], MORE[3], TECHNIQUE, MORE[1]), names)}
    widths = list(dict.fromkeys(row["bits"] for row in rows))
    fig = Figure(layout="constrained", figsize=(7.2, 6.0))
    middle = [(a * b) ** 0.5 for a, b in pairwise(values["edges"])]
    for i, bits in enumerate(widths):
        above, below = fig.add_subplot(2, len(widths), i + 1), fig.add_subplot(2, len(widths), len(widths) + i + 1)
        inside = [row for row in rows if row["bits"] == bits]
        shown = [(x, d) for x, d in zip(middle, values["density"], strict=True) if d > 0]
        above.plot(*zip(*shown, strict=True), color="black", lw=1)
        for row in inside:
            above.axvline(row["cut"], color=colours[row["observer"]], lw=1.6)
        above.set(
            xscale="log", yscale="log", title=f"{bits} bits: where each cuts", xlabel="|x|", ylabel="density of |x|"
        )
        below.barh(range(len(inside)), [row["error"] for row in inside],
                   color=[colours[row["observer"]] for row in inside], height=0.7)  # fmt: skip
        for y, row in enumerate(inside):
            below.annotate(f"{row['error']:.2g}, clips {100 * row['beyond']:.2g} %", (row["error"], y), xytext=(4, 0),
                           textcoords="offset points", va="center", fontsize=8)  # fmt: skip
        below.set(xscale="log", xlabel="error ‖x̂ − x‖² / ‖x‖²")
        below.set_yticks(range(len(inside)), [row["observer"] for row in inside] if i == 0 else [""] * len(inside))
        least, most = (f(row["error"] for row in inside) for f in (min, max))
        below.set_xlim(0.5 * least, most * (most / least) ** 1.1)  # room for what the bars are labelled with
        below.invert_yaxis()
        below.grid(visible=False, axis="y")
    fig.suptitle(values["tensor"], x=0.01, ha="left", fontsize=10)
    return fig


@styled
def smoothquant(values: Values) -> Figure:
    """{"rows": [{"outliers", "level", "alpha", "keep", "bits per byte", "full precision"}]} → loss over α; where not.

    Loss is the increase of bits per byte over full precision, in per cent.
    """
    rows: Sequence[Any] = values["rows"]

    def loss(outliers: str, level: str, alpha: float | None, keep: Sequence[str] = ()) -> float:
        found = [r for r in rows if (r["outliers"], r["level"], r["alpha"]) == (outliers, level, alpha)
                 and list(r["keep"]) == list(keep)]  # fmt: skip
        return 100.0 * (float(found[0]["bits per byte"]) / float(found[0]["full precision"]) - 1.0)

    levels = list(dict.fromkeys(row["level"] for row in rows))
    colours = {level: colour for colour, level in coloured((TECHNIQUE, MORE[0], MORE[1]), levels)}
    fig = Figure(layout="constrained", figsize=(7.2, 6.4))
    top = fig.add_subplot(2, 1, 1)
    for level in levels:
        smooth = [r for r in rows if (r["outliers"], r["level"], list(r["keep"])) == ("norms", level, [])]
        alphas = sorted(r["alpha"] for r in smooth if r["alpha"] is not None)
        top.plot(alphas, [loss("norms", level, a) for a in alphas], color=colours[level], marker="o", ms=4,
                 label=f"{level}, smoothed")  # fmt: skip
        top.axhline(loss("norms", level, None), color=colours[level], ls="--", lw=1.2,
                    label=f"{level}, not smoothed: +{loss('norms', level, None):.3g} %")  # fmt: skip
    top.set(title=f"Outliers of {values['factor']:g}× behind the norms: 8-bit weights and activations", xlabel="α",
            ylabel="loss in bits per byte (%)", yscale="log")  # fmt: skip
    top.legend(fontsize=8, ncols=2, loc="center right", bbox_to_anchor=(1.0, 0.55))
    keep, hidden = ["o_proj", "down_proj"], ["down_proj"]
    bars = [("no outliers, not smoothed", "nothing", None, []), ("norms, smoothed", "norms", 0.5, []),
            ("norms, smoothed; o, down in floats", "norms", 0.5, keep), ("norms, not smoothed", "norms", None, []),
            ("norms, not smoothed; o, down in floats", "norms", None, keep),
            ("MLP hidden, not smoothed", "MLP hidden", None, []), ("MLP hidden, smoothed", "MLP hidden", 0.5, []),
            ("MLP hidden, smoothed; down in floats", "MLP hidden", 0.5, hidden)]  # fmt: skip
    bottom = fig.add_subplot(2, 1, 2)
    at = [loss(outliers, "O1", alpha, kept) for _, outliers, alpha, kept in bars]
    shown = [max(value, 1e-3) for value in at]  # a loss below 0 has no place on this axis; its label says it
    bottom.barh(range(len(bars)), shown, color=[TECHNIQUE if bar[2] is not None else FULL for bar in bars], height=0.7)
    for y, value in enumerate(at):
        bottom.annotate(
            f"{value:+.2g} %", (shown[y], y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    bottom.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    bottom.set(title="A step a token (O1), α = ½: where it helps, and where not", xscale="log",
               xlabel="loss in bits per byte (%)")  # fmt: skip
    bottom.set_xlim(min(shown) / 2, 5 * max(shown))
    bottom.invert_yaxis()
    bottom.grid(visible=False, axis="y")
    return fig


@styled
def salience(values: Values) -> Figure:
    """{"bits", "factor", "rows": [{"network", "by", "fraction", "seed", "kl": [mean, low, high]}]} → KL, two panels."""
    rows: Sequence[Any] = values["rows"]
    colours = {"activation": TECHNIQUE, "weight": MORE[3], "random": FULL}
    fig = Figure(layout="constrained", figsize=(7.2, 3.6))
    titles = {"as it is": "The network as it is", "planted": f"With {values['factor']:g}× outlier channels"}
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
                low, high = mean - min(k[1] for k in kl), max(k[2] for k in kl) - mean
                points.append((place + 0.08 * (at - 1), mean, low, high))
            x, y, below, above = zip(*points, strict=True)
            panel.errorbar(x, y, yerr=(below, above), color=colour, marker="o", ms=4, lw=1.4, label=f"by {by}")
        panel.set(title=title, xlabel="input channels kept in floats", ylim=(0, None))
        panel.set_xticks(range(len(fractions)), [f"{fraction:.0%}" for fraction in fractions])
        panel.set_xlim(-0.5, len(fractions) - 0.5)
        if i == 0:
            panel.set_ylabel("KL from full precision (nats per token)")
            labels = panel.get_legend_handles_labels()
    fig.legend(*labels, loc="outside upper left", ncols=4, fontsize=8.5)
    return fig
