"""Mixes: which storage type each tensor of a file gets when the file is Q4_K_M, Q2_K, …

A mix has a base type. The tensors on which a model's quality depends most get more bits, in
layers that were found by experiment: the first and last eighth and every third between
(``more_bits``). attn_v is small where heads are shared, and an error in it reaches all of
them; ffn_down sums over the widest input; the output matrix makes the logits.

| tensor      | Q2_K              | Q3_K_M                  | Q3_K_L | Q4_K_S    | Q4_K_M, Q5_K_M |
|-------------|-------------------|-------------------------|--------|-----------|----------------|
| attn_v      | Q3_K; Q4_K if GQA | Q4_K; Q5_K in layer 0–1 | Q5_K   | Q5_K, 0–3 | Q6_K, some     |
| ffn_down    | Q3_K              | Q4_K; Q5_K in 1/16      | Q5_K   | Q5_K, 1/8 | Q6_K, some     |
| attn_output | Q3_K              | Q4_K                    | Q5_K   |           |                |

In IQ4_NL attn_v of shared heads is Q5_K, and so is ffn_down of the first eighth without an
importance. The output matrix (or the tied embedding) is Q6_K in all mixes but Q8_0, which
keeps Q8_0.

(GQA: four or more query heads share a key/value head.) Everything else has the base type;
norms, biases and other vectors stay F32. A row that blocks of 256 do not divide falls back
to a type with blocks of 32, or to F16. (Until 2025 llama.cpp's Q2_K and Q3_K fell back to
IQ4_NL; today they fall back to Q4_0.)

A 70B (80 layers, shared heads) gets Q5_K for attn_v instead of Q3_K or Q4_K. With an
importance, Q4_0 and Q5_0 store ffn_down of the first eighth as Q4_1 and Q5_1.

Source: llama.cpp's quantiser (llama-quant.cpp), compared with it tensor by tensor.

Left out: mixture of experts, Falcon's own rules, the other lattice types, overrides by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from refllm.errors import InputError, alternatives
from refllm.formats.gguf.types import gguf_type

__all__ = ["FILE_TYPES", "MIXES", "Heads", "bits_per_weight", "mix", "mix_name"]

# mix → (base type, value of general.file_type)
MIXES = {
    "F32": ("F32", 0), "F16": ("F16", 1), "BF16": ("BF16", 32),
    "Q4_0": ("Q4_0", 2), "Q4_1": ("Q4_1", 3), "Q5_0": ("Q5_0", 8), "Q5_1": ("Q5_1", 9),
    "Q8_0": ("Q8_0", 7), "Q2_K": ("Q2_K", 10),
    "Q3_K_S": ("Q3_K", 11), "Q3_K_M": ("Q3_K", 12), "Q3_K_L": ("Q3_K", 13),
    "Q4_K_S": ("Q4_K", 14), "Q4_K_M": ("Q4_K", 15),
    "Q5_K_S": ("Q5_K", 16), "Q5_K_M": ("Q5_K", 17), "Q6_K": ("Q6_K", 18),
    "IQ4_NL": ("IQ4_NL", 25),
}  # fmt: skip
FILE_TYPES = {number: name for name, (_, number) in MIXES.items()}
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """What a mix depends on besides tensor names and shapes; ``architecture`` is GGUF's
    general.architecture.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a model of 70 billion parameters."""
        return self.layers == 80 and (self.architecture != "llama" or self.heads != self.kv_heads)


def more_bits(i: int, n: int) -> bool:
    """Whether layer i of n is one of those that are stored with more bits.

    >>> [i for i in range(16) if more_bits(i, 16)]
    [0, 1, 4, 7, 10, 13, 14, 15]
    """
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def mix_name(name: str) -> str:
    """The mix that is meant, whatever the case of its letters; another name as it is.

    >>> mix_name("q4_k_m"), mix_name("Q4")
    ('Q4_K_M', 'Q4')
    """
    return {each.casefold(): each for each in MIXES}.get(name.casefold(), name)


def mix(
    shapes: Mapping[str, Shape], name: str, heads: Heads, *, importance: bool = False
) -> dict[str, str]:
    """GGUF name → storage type, for tensors by their GGUF names (shapes as in NumPy: the
    length of a row last).

    ``importance`` says that the file is made with an importance matrix.

    Raises
    ------
    ValueError
        for an unknown mix.

    >>> shapes = {"blk.0.attn_v.weight": (64, 256), "blk.0.attn_k.weight": (64, 256)}
    >>> mix(shapes, "Q4_K_M", Heads("llama", 1, 4, 4))
    {'blk.0.attn_v.weight': 'Q6_K', 'blk.0.attn_k.weight': 'Q4_K'}
    """
    name = mix_name(name)
    if name not in MIXES:
        raise InputError(f"unknown GGUF type {name!r}; {alternatives(name, MIXES)}")
    tied = "output.weight" not in shapes
    base = MIXES[name][0]
    chosen = {}
    for tensor, shape in shapes.items():
        if len(shape) < 2 or not tensor.endswith("weight") or tensor.endswith("_norm.weight"):
            chosen[tensor] = "F32"
        elif not gguf_type(base).quantized:
            chosen[tensor] = base
        else:
            wanted = _wanted(tensor, shape[-1], name, base, heads, tied, importance)
            chosen[tensor] = _fitting(wanted, shape[-1])
    return chosen


def _wanted(
    tensor: str, columns: int, name: str, base: str, heads: Heads, tied: bool, importance: bool
) -> str:
    """The type of a matrix whose rows blocks divide."""
    if tensor == "output.weight" or (tied and tensor == "token_embd.weight"):
        return "Q8_0" if base == "Q8_0" else "Q6_K"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor)
    if found is None:
        return base
    i = int(found[1])
    part = found[2]
    if part == "attn_v":
        return _attn_v(i, name, base, heads)
    if part == "ffn_down":
        return _ffn_down(i, name, base, heads.layers, importance)
    if part == "attn_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name, base)
    return base


def _attn_v(i: int, name: str, base: str, heads: Heads) -> str:
    """The type of attn_v in layer i."""
    wanted = base
    if name == "Q2_K":
        wanted = "Q4_K" if heads.heads // heads.kv_heads >= 4 else "Q3_K"
    elif name == "Q3_K_M":
        wanted = "Q5_K" if i < 2 else "Q4_K"
    elif name == "IQ4_NL":
        wanted = "Q5_K" if heads.heads // heads.kv_heads >= 4 else base
    elif name == "Q3_K_L" or (name == "Q4_K_S" and i < 4):
        wanted = "Q5_K"
    elif name in ("Q4_K_M", "Q5_K_M") and more_bits(i, heads.layers):
        wanted = "Q6_K"
    if heads.is_70b and wanted in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return wanted


def _ffn_down(i: int, name: str, base: str, layers: int, importance: bool) -> str:
    """The type of ffn_down in layer i."""
    if name == "Q2_K":
        return "Q3_K"
    if name == "Q3_K_M":
        return "Q5_K" if i < layers // 16 else "Q4_K"
    if name == "Q3_K_L" or (name == "Q4_K_S" and i < layers // 8):
        return "Q5_K"
    if name == "IQ4_NL" and i < layers // 8 and not importance:
        return "Q5_K"
    if name in ("Q4_K_M", "Q5_K_M") and more_bits(i, layers):
        return "Q6_K"
    if name in ("Q4_0", "Q5_0") and importance and i < layers // 8:
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[name]
    return base


def _fitting(wanted: str, columns: int) -> str:
    """``wanted``, or its substitute where blocks do not divide rows."""
    if columns % gguf_type(wanted).block == 0:
        return wanted
    instead = FALLBACK.get(wanted, "F16")
    if columns % gguf_type(instead).block == 0:
        return instead
    return "F16"


def bits_per_weight(shapes: Mapping[str, Shape], types: Mapping[str, str]) -> float:
    """Bits of all tensors over all elements, including those that stay F32."""
    bits = sum(
        gguf_type(types[name]).bits_per_weight * math.prod(shape) for name, shape in shapes.items()
    )
    return bits / sum(math.prod(shape) for shape in shapes.values())
