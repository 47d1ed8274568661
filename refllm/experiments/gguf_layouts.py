"""Where the bits of a GGUF block lie, byte by byte.

    python -m refllm.experiments.gguf_layouts  # writes gguf_layouts.json and gguf_kquants.json
    refllm figures                             # draws them

The fields are those that the codec itself uses (``formats.gguf.types.FIELDS``), drawn under
the names that llama.cpp gives them in ggml-common.h:

| name    | holds                                                 |
|---------|-------------------------------------------------------|
| d       | the scale, or the scale of the scales, float16        |
| m, dmin | the offset, or the scale of the offsets, float16      |
| e       | exponent of a power of two, the scale                 |
| scales  | scales of the sub-blocks, and offsets where there are |
| qh      | high bits of the codes (hmask in Q3_K)                |
| qs      | the codes (ql in Q6_K: their low bits)                |

Left out: the order of the codes within a byte beyond what the labels say (``formats.gguf``
has it).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from refllm.array_types import Json
from refllm.formats.gguf.types import FIELDS, gguf_type
from refllm.measure.plotting import MORE, NEAREST, TECHNIQUE, axes, styled
from refllm.measure.records import Record, Values, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def layouts(block: int) -> Json:
    """The bytes of each format with blocks of ``block`` elements, for ``gguf_layouts`` (32)
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
            if gguf_type(name).block == block
        ]
    }


# --- the figure ---------------------------------------------------------------------------

# role in the record → colour, what the legend says
ROLES = {
    "step": (NEAREST, "scale"),
    "offset": (MORE[3], "offset"),
    "scales": (MORE[0], "scales of sub-blocks"),
    "high bits": (MORE[2], "high bits"),
    "codes": (TECHNIQUE, "codes"),
}
NAMES = {"high bits": "qh", "codes": "qs", "scales": "scales"}
NAMES_OF = {("Q3_K", "high bits"): "hmask", ("Q6_K", "codes"): "ql"}


@styled
def draw(values: Values) -> Figure:
    """{"types": [{"type", "numbers", "bits", "fields": [{"role", "size", "holds"}]}]} →
    every byte of every block.
    """
    types = values["types"]
    roles = {field["role"] for t in types for field in t["fields"]}
    title = f"The bytes of a block of {types[0]['numbers']} weights"
    if "scales" in roles:
        title += ": its scales are quantised, too"
    fig, ax = axes(title, "byte of the block", "type, bits per weight", figsize=(7.2, 6.1))
    for row, t in enumerate(types):
        _draw_block(ax, row, t)
    ax.set_yticks(range(len(types)), [f"{t['type']}\n{t['bits']:g} bits" for t in types])
    width = max(_size(t) for t in types)
    ax.set(xlim=(0, 1.13 * width), ylim=(len(types) - 0.1, -0.45))
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    handles = [
        ax.barh(0, 0, color=colour, label=label)
        for role, (colour, label) in ROLES.items()
        if role in roles
    ]
    fig.legend(handles=handles, loc="outside upper left", ncols=len(ROLES), fontsize=9)
    return fig


def _draw_block(ax: Axes, row: int, t: Json) -> None:
    """One strip of bytes; under it, what each field holds, by llama.cpp's name for it."""
    begin = 0
    lines = []
    size = _size(t)
    for field in t["fields"]:
        colour, _ = ROLES[field["role"]]
        for byte in range(begin, begin + field["size"]):  # a cell each
            ax.barh(
                row,
                1,
                left=byte,
                height=0.3,
                color=colour,
                edgecolor="white",
                linewidth=0.9 if size < 50 else 0.25,
            )
        lines.append(_describe(t["type"], field, begin))
        begin += field["size"]
    ax.annotate(
        f"{size} bytes",
        (size, row),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )
    # the fields of one value, d, m and e, share a line
    short = [line for line in lines if ":" not in line]
    text = ["    ".join(short), *(line for line in lines if ":" in line)]
    ax.annotate(
        "\n".join(text), (0, row + 0.18), va="top", fontsize=7, color="#333333", linespacing=1.1
    )


def _describe(type: str, field: Json, begin: int) -> str:
    """A field's name, its bytes and what they hold, with i for the letter that looks like 1."""
    role = field["role"]
    last = begin + field["size"] - 1
    place = f"byte {begin}" if field["size"] == 1 else f"bytes {begin}–{last}"
    if role in ("step", "offset"):
        return f"{field['holds'].lower()} {place}"
    name = NAMES_OF.get((type, role), NAMES[role])
    holds = re.sub(r"\bl\b", "i", field["holds"])
    holds = holds.replace("number", "weight").replace("half", "nibble")
    return f"{name} {place}: {holds}"


def _size(t: Json) -> int:
    """Bytes of a block."""
    return sum(field["size"] for field in t["fields"])


def main(folder: str = "figures/data") -> None:
    """Write the data of the figures ``gguf_layouts`` and ``gguf_kquants``."""
    command = "python -m refllm.experiments.gguf_layouts"
    for name, block in (("gguf_layouts", 32), ("gguf_kquants", 256)):
        write(f"{folder}/{name}.json", Record(command, "A", "none", layouts(block)))


if __name__ == "__main__":
    main()
