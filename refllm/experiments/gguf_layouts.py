"""Where the bits of a GGUF block lie, byte by byte.

    python -m refllm.experiments.gguf_layouts     # writes figures/data/gguf_layouts.json
    and gguf_kquants.json; `refllm figures` draws them

The fields are those that the codec itself uses (``formats.gguf.types.FIELDS``).

Left out: the order of the codes within a byte (``formats.gguf`` has it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from refllm.formats.gguf.types import FIELDS, gguf_type
from refllm.measure.plotting import MORE, NEAREST, TECHNIQUE, axes, styled
from refllm.measure.records import Record, Values, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
def draw(values: Values) -> Figure:
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


def layouts(numbers: int) -> dict[str, Any]:
    """The bytes of each format with blocks of so many numbers, for ``gguf_layouts`` (32)
    and ``gguf_kquants`` (256).
    """
    return {
        "types": [
            {
                "type": name,
                "numbers": gguf_type(name).block,
                "bits": gguf_type(name).bits_per_weight,
                "fields": [{"role": f.role, "size": f.size, "holds": f.holds} for f in fields],
            }
            for name, fields in FIELDS.items()
            if gguf_type(name).block == numbers
        ]
    }


def main(folder: str = "figures/data") -> None:
    """Write the data of the figures ``gguf_layouts`` and ``gguf_kquants``."""
    command = "python -m refllm.experiments.gguf_layouts"
    for name, block in (("gguf_layouts", 32), ("gguf_kquants", 256)):
        write(f"{folder}/{name}.json", Record(command, "A", "none", layouts(block)))


if __name__ == "__main__":
    main()
