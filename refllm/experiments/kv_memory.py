"""How large the KV cache of one sequence grows, beside the weights: counted, for published shapes.

    python -m refllm.experiments.kv_memory  # writes figures/data/kv_memory.json
    refllm figures                          # draws it

Left out: activations, and blocks of a paged cache that are half full.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from refllm.array_types import Json
from refllm.measure.memory import LLAMA_8B, LLAMA_70B, kv_bytes, weight_bytes
from refllm.measure.plotting import (
    FULL,
    MORE,
    NEAREST,
    TECHNIQUE,
    axes,
    coloured,
    end_labels,
    styled,
)
from refllm.measure.records import Record, Values, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def kv_memory_data(
    contexts: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000),
) -> Json:
    """Values of the figure ``kv_memory``: the cache of one sequence by its context, fp16
    unless stated.
    """
    multi_head = replace(LLAMA_70B, num_key_value_heads=64)
    lines = {
        "70B shape, 64 KV heads": (multi_head, 16),
        "70B shape, 8 KV heads": (LLAMA_70B, 16),
        "70B shape, 8 KV heads, 4-bit cache": (LLAMA_70B, 4),
        "8B shape, 8 KV heads": (LLAMA_8B, 16),
    }
    return {
        "contexts": list(contexts),
        "marked": 100_000,
        "lines": {
            name: [kv_bytes(c, s, bits=bits) for s in contexts] for name, (c, bits) in lines.items()
        },
        "weights": {
            "70B weights, fp16": weight_bytes(LLAMA_70B),
            "70B weights, 4-bit": weight_bytes(LLAMA_70B, 4),
        },
    }


# --- the figure ---------------------------------------------------------------------------


@styled
def draw(values: Values) -> Figure:
    """{"contexts", "lines": {name: bytes at each context}, "weights": {name: bytes},
    "marked": context}.

    A line's label gives the size at the ``marked`` context.
    """
    contexts = values["contexts"]
    marked = values.get("marked")
    title = "KV cache of one sequence, beside the weights"
    if marked in contexts:
        title += f"; sizes at {marked:,} tokens"
    fig, ax = axes(title, "context (tokens, log)", "memory (GB = 10⁹ bytes, log)")
    ends = []
    for colour, (name, sizes) in coloured(
        (FULL, TECHNIQUE, NEAREST, *MORE), values["lines"].items()
    ):
        ax.plot(contexts, [s / 1e9 for s in sizes], color=colour, marker="o", ms=4)
        label = name
        if marked in contexts:
            label += f": {sizes[contexts.index(marked)] / 1e9:.3g} GB"
        label = re.sub("heads([:,]) ", r"heads\1\n", label)  # in two lines
        ends.append((contexts[-1], sizes[-1] / 1e9, label, colour))
    for name, size in values.get("weights", {}).items():
        ax.axhline(size / 1e9, color="black", lw=0.9, ls="--")
        ax.annotate(
            f"{name}: {size / 1e9:.0f} GB",
            (0.01, size / 1e9),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8.5,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:,g}")
    end_labels(ax, ends, gap=0.1)
    return fig


def main(folder: str = "figures/data") -> None:
    """Write the data of the figure ``kv_memory``."""
    write(
        f"{folder}/kv_memory.json",
        Record("python -m refllm.experiments.kv_memory", "A", "none", kv_memory_data()),
    )


if __name__ == "__main__":
    main()
