"""The figure of ``experiments.quantization_quality``: KL against stored bits per weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from refllm.measure.plotting import MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# method → colour and name; W8A8 rounds activations too, which the others leave alone
METHODS = {
    "rtn": (NEAREST, "round to nearest"),
    "gptq": (TECHNIQUE, "GPTQ"),
    "awq": (MORE[0], "AWQ"),
    "smoothquant": (MORE[1], "SmoothQuant (W8A8)"),
    "int8": (MORE[3], "LLM.int8() (W8A8)"),
}


@styled
def draw(values: Values) -> Figure:
    """{"rows": [{"method", "bits", "group", "kl": [mean, low, high], "bits per weight"}]} →
    KL, a panel for each bits.

    Rows that differ in the seed alone are one point: their mean, and whiskers around all of
    their intervals.
    """
    rows: Sequence[Any] = values["rows"]
    # 0, a scale a row, first
    groups = sorted({row["group"] for row in rows}, key=lambda g: (g > 0, -g))
    widths = sorted({row["bits"] for row in rows}, reverse=True)
    fig = new_figure(5.6)
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
