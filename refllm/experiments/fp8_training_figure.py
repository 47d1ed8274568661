"""The figure of ``experiments.fp8_training``: loss of 8-bit training against float32's, and
where one scale per tensor leaves the range of E4M3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = "#e4e4e4"


WAYS = {
    "tile": ("tiles", TECHNIQUE),
    "tensor": ("one scale a tensor", NEAREST),
    "E5M2 gradients": ("tiles, E5M2 gradients", MORE[0]),
    "nudged": ("float32,\nbegun 10⁻⁶ away", FULL),
}


@styled
def draw(values: Values) -> Figure:
    """``experiments.fp8_training.values`` and what is measured without training → a panel a
    start, and one of outliers.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    fig = new_figure(6.2)
    grid = fig.add_gridspec(2, 2, height_ratios=(1.4, 1))
    against = values["against float32"]
    panels = grid[0, :].subgridspec(1, len(values["against float32"]))
    first = None
    for at, start in enumerate(against):
        first = fig.add_subplot(panels[at], sharex=first)
        ax = first
        _starts(ax, against[start], values["gradient error"], named=at == 0)
        if spread := values["spread of seeds"].get(start):
            said = f"float32's seeds:\n{100 * spread:.2g} % apart"
            ax.annotate(
                said,
                (1, 0.02),
                xycoords="axes fraction",
                ha="right",
                va="bottom",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        ax.set(
            title=f"{values['steps']} steps from {start}", xlabel="mean loss against float32's (%)"
        )
    _outliers(fig.add_subplot(grid[1, :]), values)
    dot = Line2D([], [], color=FULL, marker="o", ms=8, lw=0, alpha=0.8)
    fig.legend(
        [Patch(color=BAND), dot],
        ["DeepSeek-V3: within 0.25 %", "a dot is a seed"],
        loc="outside upper left",
        ncols=2,
        fontsize=8.5,
    )
    return fig


def _starts(ax: Axes, runs: Values, errors: Values, *, named: bool) -> None:
    """A row of dots each way of training, above it how far each lies from float32."""
    said = {
        name: f"{text}\n(gradient off {100 * errors[name]:.1f} %)" if name in errors else text
        for name, (text, _) in WAYS.items()
    }
    ax.axvspan(-0.25, 0.25, color=BAND)
    for place, (name, (_, colour)) in enumerate(WAYS.items()):
        # leaves out where the numbers stand
        ax.vlines(0, place - 0.15, place + 0.45, color=FULL, lw=1)
        points = [100 * off for off in runs.get(name, {}).values()]
        ax.plot(points, [place] * len(points), "o", ms=8, color=colour, alpha=0.8)
        for point in points:
            ax.annotate(
                f"{round(point, 2) + 0.0:+.2f} %".replace("-", "−"),
                (point, place),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    ax.set_yticks(range(len(WAYS)), list(said.values()) if named else [""] * len(WAYS), fontsize=9)
    ax.set_ylim(len(WAYS) - 0.4, -0.7)
    ax.margins(x=0.13)


def _outliers(ax: Axes, values: Values) -> None:
    """What the loss of one reading rises by."""
    factors = [2.0**power for power in values["powers"]]
    for (name, row), colour in zip(values["planted"].items(), (TECHNIQUE, NEAREST), strict=True):
        label = {"tile": "tiles", "tensor": "one scale a tensor"}[name]
        ax.plot(factors, [100 * rise for rise in row], marker="o", ms=4, color=colour, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("symlog", linthresh=1, linscale=0.6)
    ax.set_ylim(min(-0.5, 100 * min(map(min, values["planted"].values()))), 200)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    ax.set(
        title="Two channels made larger: one scale a tensor leaves the range",
        xlabel="planted channels (times as large)",
        ylabel="loss above float32's (%)",
    )
    ax.legend(loc="upper left")
