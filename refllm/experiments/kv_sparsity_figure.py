"""The figure of ``experiments.kv_sparsity``: KL and attention kept, by tokens held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"newest only": FULL, "at random": NEAREST, "StreamingLLM": MORE[2], "H2O": MORE[0], "TOVA": MORE[1],
            "SnapKV": TECHNIQUE, "PyramidKV": MORE[3]}  # fmt: skip


@styled
def draw(values: Values) -> Figure:
    """A record of ``experiments.kv_sparsity`` → KL by tokens held, and the attention that
    is kept, a column for each task.
    """
    fig = new_figure(6.0)
    rows: Sequence[Any] = values["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    panels = fig.subplots(2, len(tasks), sharey="row", squeeze=False)
    for column, task in enumerate(tasks):
        for name, colour in COLOURS.items():
            mine = [row for row in rows if (row["task"], row["policy"]) == (task, name)]
            held = [row["held"] for row in mine]
            style: Any = {"color": colour, "marker": "o", "ms": 4, "lw": 1.4, "label": name}
            if name == "newest only":  # beneath StreamingLLM's line, and to be seen
                style |= {"ms": 7, "mfc": "none", "zorder": 5}
            dashed = "--" if name in ("newest only", "at random") else "-"  # the controls
            means = [row["kl"][0] for row in mine]
            spread = [
                [row["kl"][0] - row["kl"][1] for row in mine],
                [row["kl"][2] - row["kl"][0] for row in mine],
            ]
            panels[0, column].errorbar(held, means, yerr=spread, ls=dashed, **style)
            ends = [row["held at the end"] for row in mine]
            panels[1, column].plot(ends, [row["mass"] for row in mine], ls=dashed, **style)
        title = task[0].upper() + task[1:]
        panels[0, column].set(
            title=f"{title}: KL", yscale="log", xlabel="tokens a head holds, mean of steps (log)"
        )
        panels[1, column].set(
            title=f"{title}: attention kept", xlabel="tokens a head holds at the end (log)"
        )
        for panel in panels[:, column]:
            panel.set_xscale("log")
            panel.set_xlim(56, 720)
            panel.set_xticks([64, 128, 256, 512], ["64", "128", "256", "512"])
            panel.minorticks_off()
    panels[0, 0].set_ylabel("KL to all tokens (nats, log)")
    panels[1, 0].set(ylabel="share of the last query's attention", ylim=(None, 1.0))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=8.5)
    return fig
