"""What GGUF's mixes weigh: bits per weight of each on two published shapes, counted from
the types of all tensors.

Counted, nothing is measured. Metadata are left out, as in the figures that llama.cpp
publishes for Llama-3.1-8B, which these match to the last of their four digits.

Lu 2025 ("Transformer Notes (VII): Deployment Optimization", §1.9) has Q5_K_M at 5.5 and Q2_K
at 3.4 bits. 5.5 is the *type* Q5_K alone; the mix adds Q6_K for half of two tensors and the
output. 3.4 was true of older files, whose Q2_K stored more tensors in more bits.

    python -m refllm.experiments.gguf_mixes

Left out: what the bits cost in quality (``experiments.quantization_quality`` measures that
for other formats).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refllm.array_types import Json
from refllm.checkpoints.gguf_names import architecture, gguf_name
from refllm.checkpoints.tensor_files import tensor_shapes
from refllm.formats.gguf.mixes import MIXES, Heads, bits_per_weight, mix
from refllm.formats.gguf.types import gguf_type
from refllm.measure.plotting import MORE, NEAREST, TECHNIQUE, axes, coloured, styled
from refllm.measure.records import Record, Values, write
from refllm.model.config import ModelConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LLAMA_2_7B = ModelConfig("llama", 32_000, 4096, 11_008, 32, 32, 32, 128)
LLAMA_31_8B = ModelConfig("llama", 128_256, 4096, 14_336, 32, 32, 8, 128)
MODELS = {"Llama-2-7B": LLAMA_2_7B, "Llama-3.1-8B": LLAMA_31_8B}
LU_2025 = {"Q2_K": 3.4, "Q5_K_M": 5.5}  # stated there, but no current file has them
SHOWN = (
    "Q2_K",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_0",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_0",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
)


def mix_bits(config: ModelConfig, name: str) -> float:
    """Bits per weight of a network's tensors in a mix."""
    shapes = {gguf_name(tensor): shape for tensor, shape in tensor_shapes(config)}
    heads = Heads(
        architecture(config),
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    return bits_per_weight(shapes, mix(shapes, name, heads))


def table() -> list[Json]:
    """A row for each mix: bits of its base type, of both shapes, and under "article" those of
    Lu 2025 where they differ.
    """
    return [
        {"mix": name, "base": gguf_type(MIXES[name][0]).bits_per_weight}
        | {model: mix_bits(config, name) for model, config in MODELS.items()}
        | {"article": LU_2025.get(name)}
        for name in SHOWN
    ]


# --- the figure ---------------------------------------------------------------------------


@styled
def draw(values: Values) -> Figure:
    """{"rows": [{"mix", "base", model: bits, …, "article"}]} → bits per weight of each mix,
    a bar for each model.
    """
    rows = values["rows"]
    models = [key for key in rows[0] if key not in ("mix", "base", "article")]
    fig, ax = axes(
        "Most mixes store more bits than the type that they are named after",
        "bits per weight, all tensors counted",
        "mix",
        figsize=(7.2, 5.4),
    )
    for i, (colour, model) in enumerate(coloured((TECHNIQUE, MORE[2]), models)):
        places = [row + 0.38 * (i - (len(models) - 1) / 2) for row in range(len(rows))]
        ax.barh(places, [r[model] for r in rows], height=0.36, color=colour, label=model)
        ink = ("white", "black")[i % 2]  # readable on the dark bar and on the light one
        for place, r in zip(places, rows, strict=True):
            _write_inside(ax, f"{r[model]:.3f}", place, ink)
    for row, r in enumerate(rows):
        # black is visible on both bars; an edge would hide how little some bars exceed it
        label = "" if row else "its base type alone"
        ax.plot([r["base"]] * 2, [row - 0.42, row + 0.42], color="black", lw=1.4, label=label)
    stated = [(r["article"], row) for row, r in enumerate(rows) if r["article"]]
    if stated:
        x, y = zip(*stated, strict=True)
        ax.plot(x, y, "D", color=NEAREST, ms=6, label="stated by Lu 2025, where files differ")
    ax.set_yticks(range(len(rows)), [r["mix"] for r in rows])
    ax.set_xlim(0, 1.1 * max(r[m] for r in rows for m in models))
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.legend(loc="upper right", fontsize=8.5)
    return fig


def _write_inside(ax: Axes, text: str, y: float, colour: str) -> None:
    """Write at the left end of a bar."""
    ax.annotate(
        text,
        (0, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=colour,
    )


def main(folder: str = "figures/data") -> None:
    """Print the table, and write the data of the figure ``gguf_mixes``."""
    rows = table()
    print("mix     base type  " + "  ".join(MODELS) + "  Lu 2025")
    for row in rows:
        bits = "  ".join(f"{row[model]:>{len(model)}.4f}" for model in MODELS)
        print(f"{row['mix']:<7} {row['base']:>9.4f}  {bits}  {row['article'] or ''}")
    record = Record("python -m refllm.experiments.gguf_mixes", "A", "none", {"rows": rows})
    write(f"{folder}/gguf_mixes.json", record)


if __name__ == "__main__":
    main()
