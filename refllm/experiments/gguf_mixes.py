"""What GGUF's mixes weigh: bits per weight of each on two published shapes, counted from
the types of all tensors.

Kind A: counted, nothing is measured. Metadata are left out, as in the figures that
llama.cpp publishes for Llama-3.1-8B, which these are to the last of their four digits.

The article that the project follows has Q5_K_M at 5.5 and Q2_K at 3.4 bits. 5.5 is the
*type* Q5_K alone; the mix adds Q6_K for half of two tensors and the output. 3.4 was true of
older files, whose Q2_K stored more tensors in more bits.

    python -m refllm.experiments.gguf_mixes

Left out: what the bits cost in quality (``experiments.quantization_quality`` measures that
for other formats).
"""

from __future__ import annotations

from typing import Any

from refllm.checkpoints.gguf_names import architecture, gguf_name
from refllm.checkpoints.tensor_files import tensor_shapes
from refllm.formats.gguf.mixes import MIXES, Heads, bits_per_weight, mix
from refllm.formats.gguf.types import FIELDS, kind
from refllm.measure.records import Record, write
from refllm.model.config import ModelConfig

__all__ = ["ARTICLE", "LLAMA_2_7B", "LLAMA_31_8B", "layouts", "mix_bits", "table"]

LLAMA_2_7B = ModelConfig("llama", 32_000, 4096, 11_008, 32, 32, 32, 128)
LLAMA_31_8B = ModelConfig("llama", 128_256, 4096, 14_336, 32, 32, 8, 128)
MODELS = {"Llama-2-7B": LLAMA_2_7B, "Llama-3.1-8B": LLAMA_31_8B}
ARTICLE = {"Q2_K": 3.4, "Q5_K_M": 5.5}  # what the article says and no file of today has
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


def table() -> list[dict[str, Any]]:
    """A row for each mix: its base type's bits, those of both shapes, and the article's
    where it differs.
    """
    return [
        {"mix": name, "base": kind(MIXES[name][0]).bits_per_weight}
        | {model: mix_bits(config, name) for model, config in MODELS.items()}
        | {"article": ARTICLE.get(name)}
        for name in SHOWN
    ]


def layouts(numbers: int) -> dict[str, Any]:
    """The bytes of each format with blocks of so many numbers, for ``gguf_layouts`` (32)
    and ``gguf_kquants`` (256).
    """
    return {
        "types": [
            {
                "type": name,
                "numbers": kind(name).block,
                "bits": kind(name).bits_per_weight,
                "fields": [{"role": f.role, "size": f.size, "holds": f.holds} for f in fields],
            }
            for name, fields in FIELDS.items()
            if kind(name).block == numbers
        ]
    }


def main(folder: str = "figures/data") -> None:
    """Print the table, and write the data of the figures ``gguf_mixes``, ``gguf_layouts``
    and ``gguf_kquants``.
    """
    rows = table()
    print("mix     base type  " + "  ".join(MODELS) + "  article")
    for row in rows:
        bits = "  ".join(f"{row[model]:>{len(model)}.4f}" for model in MODELS)
        print(f"{row['mix']:<7} {row['base']:>9.4f}  {bits}  {row['article'] or ''}")
    drawn = {
        "gguf_mixes": {"rows": rows},
        "gguf_layouts": layouts(32),
        "gguf_kquants": layouts(256),
    }
    for name, values in drawn.items():
        write(
            f"{folder}/{name}.json",
            Record("python -m refllm.experiments.gguf_mixes", "A", "none", values),
        )


if __name__ == "__main__":
    main()
