"""The figure of ``experiments.kv_sparsity``: KL and attention kept, by tokens held; a column
of panels for each policy, beside the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from refllm.array_types import Json
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTROL = "newest only"
COLOURS = {
    CONTROL: FULL,
    "at random": NEAREST,
    "StreamingLLM": MORE[2],
    "H2O": MORE[0],
    "TOVA": MORE[1],
    "SnapKV": TECHNIQUE,
    "PyramidKV": MORE[3],
}
# task in the record → what the figure calls it
TASKS = {"as it comes": "ordinary code", "a far copy": "copy from far back"}


@styled
def draw(values: Values) -> Figure:
    """A record of ``experiments.kv_sparsity`` → for each policy KL by tokens held in both
    tasks, and the attention that is kept in the second.
    """
    rows = values["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    policies = [name for name in COLOURS if name != CONTROL]
    fig = new_figure(5.6)
    panels = fig.subplots(len(tasks) + 1, len(policies), sharex=True, sharey="row")
    for column, policy in enumerate(policies):
        for panel, task in zip(panels[:-1, column], tasks, strict=True):
            for name in (CONTROL, policy):
                _draw_kl(panel, _select(rows, task, name), name)
        for name in (CONTROL, policy):
            _draw_mass(panels[-1, column], _select(rows, tasks[-1], name), name)
        panels[0, column].set_title(policy, fontsize=9.5, pad=5)
    for panel, task in zip(panels[:-1, 0], tasks, strict=True):
        panel.set_ylabel(f"{TASKS[task]}\nKL (nats per token, log)", fontsize=8.5)
    panels[-1, 0].set_ylabel(f"{TASKS[tasks[-1]]}\nshare of attention kept", fontsize=8.5)
    for panel in panels[:-1].flat:
        panel.set_ylim(0.009, 1.1)  # one range for both tasks
        panel.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    for panel in panels[-1]:
        panel.set_xlim(52, 800)
        panel.set_xticks([64, 128, 256, 512], ["64", "", "256", ""], fontsize=8.5)
        panel.minorticks_off()
        panel.set_xlabel("tokens held (log)", fontsize=8)
    panels[-1, 0].set_ylim(top=1.0)
    lines = panels[0, 0].get_lines()
    fig.legend(
        [lines[0]],
        ["control: the newest tokens only; coloured: the policy of the column"],
        loc="outside upper left",
        fontsize=8.5,
        title="On ordinary code no policy beats the newest tokens; for a far copy several do",
        title_fontsize=11.5,
        alignment="left",
        borderaxespad=0.2,
    )
    return fig


def _select(rows: Sequence[Json], task: str, policy: str) -> list[Json]:
    """The rows of one line."""
    return [row for row in rows if (row["task"], row["policy"]) == (task, policy)]


def _draw_kl(ax: Axes, rows: Sequence[Json], name: str) -> None:
    """KL to all tokens, with its interval, by the mean number of tokens held."""
    means = [row["kl"][0] for row in rows]
    below = [row["kl"][0] - row["kl"][1] for row in rows]
    above = [row["kl"][2] - row["kl"][0] for row in rows]
    ax.errorbar(
        [row["held"] for row in rows],
        means,
        yerr=(below, above),
        color=COLOURS[name],
        ls="--" if name == CONTROL else "-",
        marker="o",
        ms=3.5,
        lw=1.4,
    )
    ax.set(xscale="log", yscale="log")


def _draw_mass(ax: Axes, rows: Sequence[Json], name: str) -> None:
    """The share of the last query's attention that falls on what is held at the end."""
    ax.plot(
        [row["held at the end"] for row in rows],
        [row["mass"] for row in rows],
        color=COLOURS[name],
        ls="--" if name == CONTROL else "-",
        marker="o",
        ms=3.5,
        lw=1.4,
    )
    ax.set_xscale("log")
