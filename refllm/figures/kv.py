"""Figures of caches that keep less: quantised, and sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, Values, styled

POLICIES = {"newest only": FULL, "at random": NEAREST, "StreamingLLM": MORE[2], "H2O": MORE[0], "TOVA": MORE[1],
            "SnapKV": TECHNIQUE, "PyramidKV": MORE[3]}  # fmt: skip
COLOURS = {"KIVI": TECHNIQUE, "keys by token": NEAREST, "values by channel": MORE[0]}


@styled
def kv_quantization(values: Values) -> Figure:
    """A record of ``experiments.kv_quantization`` → KL by bits in both networks; by
    position and R; bytes by length.
    """
    fig = Figure(layout="constrained", figsize=(7.2, 6.2))
    panels = fig.subplots(2, 2)
    rows: Sequence[Any] = values["rows"]
    most = max(row["kl"][2] for row in rows)
    for panel, network, title in (
        (panels[0, 0], "as it is", "Keys as they are"),
        (panels[0, 1], "planted", f"Keys with channels {values['factor']:g}× as large"),
    ):
        _choices(
            panel, [row for row in rows if row["network"] == network and row["residual"] == 128]
        )
        panel.set(title=title, ylim=(1e-6, 2 * most))
    panels[0, 0].legend(fontsize=8)
    _by_position(panels[1, 0], rows, values["length"])
    _memory(panels[1, 1], values)
    return fig


def _choices(panel: Axes, rows: Sequence[Any]) -> None:
    for at, (name, colour) in enumerate(COLOURS.items()):
        mine = sorted((row for row in rows if row["choice"] == name), key=lambda row: row["bits"])
        means = [row["kl"][0] for row in mine]
        spread = [
            [mean - row["kl"][1] for mean, row in zip(means, mine, strict=True)],
            [row["kl"][2] - mean for mean, row in zip(means, mine, strict=True)],
        ]
        # side by side: equal ones would hide each other
        places = [row["bits"] + 0.12 * (at - 1) for row in mine]
        panel.errorbar(
            places, means, yerr=spread, color=colour, marker="o", ms=4, lw=1.4, label=name
        )
    panel.set(
        xlabel="bits a code (points side by side)", ylabel="KL (nats per token, log)", yscale="log"
    )
    panel.set_xticks([2, 3, 4, 8])


def _by_position(panel: Axes, rows: Sequence[Any], length: int) -> None:
    mine = sorted(
        (
            row
            for row in rows
            if (row["network"], row["choice"], row["bits"]) == ("as it is", "KIVI", 2)
        ),
        key=lambda row: row["residual"],
    )
    for row, colour in zip(mine, (MORE[3], NEAREST, TECHNIQUE, MORE[0], MORE[1]), strict=False):
        parts = row["kl by position"]
        places = [length * (i + 0.5) / len(parts) for i in range(len(parts))]
        panel.plot(
            places, parts, color=colour, marker="o", ms=3, lw=1.4, label=f"{row['residual']}"
        )
    panel.set(
        title="2 bits: the newest tokens wait",
        xlabel="position in the text (tokens)",
        ylabel="KL (nats per token)",
        ylim=(0, None),
    )
    panel.legend(
        title="R, tokens that wait", fontsize=8, title_fontsize=8, ncols=2, loc="upper left"
    )
    panel.set_ylim(top=1.6 * panel.get_ylim()[1])  # room for the legend above the lines


def _memory(panel: Axes, values: Values) -> None:
    for (name, shares), colour in zip(values["memory"].items(), (MORE[0], TECHNIQUE), strict=False):
        panel.plot(
            values["lengths"],
            [100 * share for share in shares],
            color=colour,
            marker="o",
            ms=3,
            lw=1.4,
        )
        panel.annotate(
            f"{name}: {100 * shares[-1]:.0f} %",
            (values["lengths"][-1], 100 * shares[-1]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=colour,
        )
    panel.axhline(100, color=FULL, lw=1.4, ls="--")
    panel.set(
        title="Bytes of a cache, R = 128",
        xlabel="tokens (log)",
        ylabel="share of float16's (%)",
        xscale="log",
        ylim=(0, 110),
    )
    panel.set_xticks([100, 1000, 10000], ["100", "1,000", "10,000"])


@styled
def kv_sparsity(values: Values) -> Figure:
    """A record of ``experiments.kv_sparsity`` → KL by tokens held, and the attention that
    is kept, a column for each task.
    """
    fig = Figure(layout="constrained", figsize=(7.2, 6.0))
    rows: Sequence[Any] = values["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    panels = fig.subplots(2, len(tasks), sharey="row", squeeze=False)
    for column, task in enumerate(tasks):
        for name, colour in POLICIES.items():
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
