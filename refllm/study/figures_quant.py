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
            xlabel="weights a scale, stored bits a weight",
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
    names = _distinct(rows, "observer")
    colours = {name: colour for colour, name in coloured((FULL, NEAREST, MORE[0], MORE[3], TECHNIQUE, MORE[1]), names)}
    widths = _distinct(rows, "bits")
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
        below.set(xscale="log", xlabel="error ‖x̂ − x‖² / ‖x‖²", title=f"{bits} bits: what that costs")
        below.set_yticks(range(len(inside)), [row["observer"] for row in inside] if i == 0 else [""] * len(inside))
        least, most = (f(row["error"] for row in inside) for f in (min, max))
        below.set_xlim(0.5 * least, most * (most / least) ** 1.1)  # room for what the bars are labelled with
        below.invert_yaxis()
        below.grid(visible=False, axis="y")
    fig.suptitle(values["tensor"], x=0.01, ha="left", fontsize=10)
    return fig


@styled
def smoothquant(values: Values) -> Figure:
    """{"rows": [{"outliers", "level", "alpha", "keep", "kl", "bits per byte", "full precision"}]}.

    Above, KL over α; below, where it helps and where not. KL tells networks apart whose bits per byte differ by less
    than chance; those stand beside it, in per cent.
    """
    rows: Sequence[Any] = values["rows"]

    def row(outliers: str, level: str, alpha: float | None, keep: Sequence[str] = ()) -> Any:
        wanted = (outliers, level, alpha, list(keep))
        return next(r for r in rows if (r["outliers"], r["level"], r["alpha"], list(r["keep"])) == wanted)

    def loss(r: Any) -> str:
        return f"{100 * (r['bits per byte'] / r['full precision'] - 1):+.3g} %"

    colours = {level: colour for colour, level in coloured((TECHNIQUE, MORE[0], MORE[1]), _distinct(rows, "level"))}
    fig = Figure(layout="constrained", figsize=(7.2, 6.2))
    top, bottom = fig.add_subplot(2, 1, 1), fig.add_subplot(2, 1, 2)
    for level, colour in colours.items():
        smooth = [r for r in rows if (r["outliers"], r["level"], list(r["keep"])) == ("norms", level, [])]
        curve = sorted((r["alpha"], r["kl"][0]) for r in smooth if r["alpha"] is not None)
        top.plot(*zip(*curve, strict=True), color=colour, marker="o", ms=4, label=f"{level}, smoothed")
        plain = row("norms", level, None)
        top.axhline(plain["kl"][0], color=colour, ls="--", lw=1.2, label=f"{level}, not: {loss(plain)}")
    top.set(title=f"W8A8, outliers of {values['factor']:g}× behind the norms", xlabel="α", yscale="log")
    top.set_ylabel("KL (nats per token)")
    fig.legend(loc="outside upper left", ncols=3, fontsize=8.5)
    keep = ["o_proj", "down_proj"]
    bars = [("no outliers, not smoothed", "nothing", None, []), ("norms, not smoothed", "norms", None, []),
            ("norms, not smoothed, o and down kept", "norms", None, keep), ("norms, smoothed", "norms", 0.5, []),
            ("norms, smoothed, o and down kept", "norms", 0.5, keep),
            ("MLP hidden, not smoothed", "MLP hidden", None, []), ("MLP hidden, smoothed", "MLP hidden", 0.5, []),
            ("MLP hidden, smoothed, down kept", "MLP hidden", 0.5, ["down_proj"])]  # fmt: skip
    found = [row(outliers, "O1", alpha, kept) for _, outliers, alpha, kept in bars]
    length = [max(r["kl"][0], 1e-9) for r in found]
    bottom.barh(range(len(bars)), length, color=[FULL if bar[2] is None else TECHNIQUE for bar in bars], height=0.7)
    for y, r in enumerate(found):
        bottom.annotate(loss(r), (length[y], y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    bottom.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    bottom.set(title="O1: where it helps, and where not", xscale="log")
    bottom.set_xlabel("KL (nats per token); beside it, bits per byte")
    bottom.set_xlim(min(length) / 2, 6 * max(length))
    bottom.invert_yaxis()
    bottom.grid(visible=False, axis="y")
    return fig


def _distinct(rows: Sequence[Any], key: str) -> list[Any]:
    """The values of a column, in the order in which they occur."""
    return list(dict.fromkeys(row[key] for row in rows))


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
        panel.set(title=title, xlabel=f"input channels kept; others in {values['bits']} bits", ylim=(0, None))
        panel.set_ylabel("KL from full precision (nats per token)" if i == 0 else "KL (nats per token)")
        panel.set_xticks(range(len(fractions)), [f"{fraction:.0%}" for fraction in fractions])
        panel.set_xlim(-0.5, len(fractions) - 0.5)
        if i == 0:
            labels = panel.get_legend_handles_labels()
    fig.legend(*labels, loc="outside upper left", ncols=4, fontsize=8.5)
    return fig
