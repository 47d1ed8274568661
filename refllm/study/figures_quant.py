"""Figures of quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from refllm.study.drawing import MORE, NEAREST, TECHNIQUE, Values, styled


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
