"""The figure of ``experiments.fp8_training``: loss of 8-bit training against float32's, and
where one scale per tensor leaves the range of E4M3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refllm.array_types import Json
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = "#e4e4e4"
# method in the record → what the axis says, colour
METHODS = {
    "tile": ("tiles", TECHNIQUE),
    "tensor": ("one scale per tensor", NEAREST),
    "E5M2 gradients": ("tiles, E5M2 gradients", MORE[0]),
    "nudged": ("float32, first weights\nmoved by 10⁻⁶", FULL),
}


@styled
def draw(values: Values) -> Figure:
    """``experiments.fp8_training.values`` and what is measured without training → a panel
    for each start, and one of outliers.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    fig = new_figure(6.2)
    against = values["against float32"]
    grid = fig.add_gridspec(2, len(against), height_ratios=(1.4, 1))
    panels: list[Axes] = []
    for column, start in enumerate(against):
        share = panels[0] if panels else None
        panels.append(fig.add_subplot(grid[0, column], sharex=share))
        _draw_start(panels[-1], start, values)
    labels = [_label(name, values["gradient error"]) for name in METHODS]
    panels[0].set_yticks(range(len(METHODS)), labels, fontsize=9)
    _draw_outliers(fig.add_subplot(grid[1, :]), values)
    dot = Line2D([], [], color=FULL, marker="o", ms=8, lw=0, alpha=0.8)
    fig.legend(
        [Patch(color=BAND), dot],
        ["within 0.25 %, DeepSeek-V3's bound", "one seed of the first weights"],
        loc="outside upper left",
        ncols=2,
        fontsize=8.5,
    )
    return fig


def _label(name: str, errors: Json) -> str:
    """A method's name, with the error of one gradient where it was measured."""
    text, _ = METHODS[name]
    if name in errors:
        return f"{text}\n(gradient error {100 * errors[name]:.1f} %)"
    return text


def _draw_start(ax: Axes, start: str, values: Values) -> None:
    """A row of dots for each method: how far its loss lies from float32's."""
    runs = values["against float32"][start]
    ax.axvspan(-0.25, 0.25, color=BAND)
    ax.axvline(0, color=FULL, lw=1)
    for row, (name, (_, colour)) in enumerate(METHODS.items()):
        points = [100 * off for off in runs.get(name, {}).values()]
        ax.plot(points, [row] * len(points), "o", ms=8, color=colour, alpha=0.8)
        for point in points:
            ax.annotate(
                f"{round(point, 2) + 0.0:+.2f} %".replace("-", "−"),
                (point, row),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.7},
            )
    ax.set_yticks(range(len(METHODS)), [""] * len(METHODS))
    ax.set_ylim(len(METHODS) - 0.4, -0.7)
    ax.margins(x=0.13)
    title = f"{values['steps']} steps from {start}"
    if spread := values["spread of seeds"].get(start):
        title += f"\n(seeds of float32: {100 * spread:.2g} % apart)"
    ax.set_title(title, fontsize=10.5)
    ax.set_xlabel("mean loss against float32's (%)")


def _draw_outliers(ax: Axes, values: Values) -> None:
    """By how much the loss of held-out text rises with injected outlier channels."""
    factors = [2.0**power for power in values["powers"]]
    for (name, row), colour in zip(values["planted"].items(), (TECHNIQUE, NEAREST), strict=True):
        label = METHODS[name][0]
        ax.plot(factors, [100 * rise for rise in row], marker="o", ms=4, color=colour, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("symlog", linthresh=1, linscale=0.6)
    ax.set_ylim(min(-0.5, 100 * min(map(min, values["planted"].values()))), 200)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    ax.set(
        title="With large outlier channels one scale per tensor fails",
        xlabel="two outlier channels (times as large, log)",
        ylabel="loss above float32's (%)",
    )
    ax.legend(loc="upper left")
