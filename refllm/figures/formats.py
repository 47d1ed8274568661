"""Figures of the number formats: where the bits of a block lie, and what the mixes of GGUF
weigh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refllm.measure.plotting import MORE, NEAREST, TECHNIQUE, Values, axes, coloured, styled

ROLES = {
    "step": NEAREST,
    "offset": MORE[3],
    "scales": MORE[0],
    "high bits": MORE[2],
    "codes": TECHNIQUE,
}
NOTES = {
    "d": "d: the step, float16",
    "m": "m: what is added to step × code, float16",
    "E": "E: the step is 2 to the power E − 127",
    "dmin": "dmin: the step of the offsets, which are subtracted, float16",
}


@styled
def gguf_layouts(values: Values) -> Figure:
    """{"types": [{"type", "numbers", "bits", "fields": [{"role", "size", "holds"}]}]} →
    every byte of every block.
    """
    types: Sequence[Any] = values["types"]
    title = f"Blocks of {types[0]['numbers']} numbers, byte by byte"
    fig, ax = axes(title, "byte of the block", "type, bits a weight", figsize=(7.2, 6.1))
    _blocks(ax, types)
    present = {field["role"] for t in types for field in t["fields"]}
    handles = [
        ax.barh(0, 0, color=colour, label=role) for role, colour in ROLES.items() if role in present
    ]
    held = {field["holds"] for t in types for field in t["fields"]}
    if "scales" in present:
        notes = {**NOTES, "d": "d: the step of the scales, float16"}
    else:
        notes = NOTES
    fig.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(ROLES),
        alignment="left",
        title_fontsize=8,
        title="     ".join(note for name, note in notes.items() if name in held),
    )
    return fig


def _blocks(panel: Axes, types: Sequence[Any]) -> None:
    """One strip of bytes a type; under it, what each field's bytes hold."""
    width = max(sum(f["size"] for f in t["fields"]) for t in types)
    for row, t in enumerate(types):
        at = 0
        said = []
        for field in t["fields"]:
            size = field["size"]
            for byte in range(at, at + size):  # a cell each: the layout byte by byte
                panel.barh(
                    row,
                    1,
                    left=byte,
                    height=0.3,
                    color=ROLES[field["role"]],
                    edgecolor="white",
                    linewidth=0.9 if width < 100 else 0.25,
                )
            if field["role"] not in ("step", "offset"):
                said.append(f"{field['role']} {at}–{at + size - 1}: {field['holds']}")
            else:
                said.append(
                    f"{field['holds']} {at}"
                    if size == 1
                    else f"{field['holds']} {at}–{at + size - 1}"
                )
            at += size
        panel.annotate(
            f"{at} bytes",
            (at, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        head = [s for s in said if ":" not in s]
        lines = ["   ".join(head), *(s for s in said if ":" in s)]
        panel.annotate(
            "\n".join(lines),
            (0, row + 0.18),
            va="top",
            fontsize=7,
            color="#333333",
            linespacing=1.1,
        )
    panel.set_yticks(range(len(types)), [f"{t['type']}\n{t['bits']:g} bits" for t in types])
    panel.set(xlim=(0, 1.13 * width), ylim=(len(types) - 0.1, -0.45))
    panel.grid(visible=False)
    panel.spines["left"].set_visible(False)


@styled
def gguf_mixes(values: Values) -> Figure:
    """{"rows": [{"mix", "base", model: bits, …, "article"}]} → bits per weight of each mix,
    a bar a model.
    """
    rows: Sequence[Any] = values["rows"]
    models = [key for key in rows[0] if key not in ("mix", "base", "article")]
    fig, ax = axes(
        "What GGUF's mixes weigh", "bits per weight, all tensors counted", "mix", figsize=(7.2, 5.4)
    )
    for i, (colour, model) in enumerate(coloured((TECHNIQUE, MORE[2]), models)):
        ink = ("white", "black")[i % 2]  # readable on the dark bar and on the light one
        places = [row + 0.38 * (i - (len(models) - 1) / 2) for row in range(len(rows))]
        ax.barh(places, [r[model] for r in rows], height=0.36, color=colour, label=model)
        for place, r in zip(places, rows, strict=True):
            ax.annotate(
                f"{r[model]:.3f}",
                (0, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=ink,
            )
    for row, r in enumerate(rows):
        # black, which is seen on both bars; an edge would hide how little some bars reach
        # beyond
        ax.plot(
            [r["base"]] * 2,
            [row - 0.42, row + 0.42],
            color="black",
            lw=1.4,
            label="" if row else "its base type alone",
        )
    stated = [(row, r["article"]) for row, r in enumerate(rows) if r["article"]]
    ax.plot(
        [bits for _, bits in stated],
        [row for row, _ in stated],
        "D",
        color=NEAREST,
        ms=6,
        label="the article's figure, where files differ",
    )
    ax.set_yticks(range(len(rows)), [r["mix"] for r in rows])
    ax.set_xlim(0, 1.1 * max(r[m] for r in rows for m in models))
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.legend(loc="upper right", fontsize=8.5)
    return fig
