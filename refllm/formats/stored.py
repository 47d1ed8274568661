"""What the byte layouts of other programs can hold, and which tensors they store a weight as.

| layout          | bits       | rules      | groups      | activations | who reads it                                |
|-----------------|------------|------------|-------------|-------------|---------------------------------------------|
| int-quantized   | 8          | symmetric  | row         | 8 bits      | compressed-tensors: transformers, vLLM      |
| pack-quantized  | 1 to 8     | symmetric  | any, or row | as they are | the same; vLLM at 4 and 8 bits only         |
| naive-quantized | 8          | symmetric  | any, or row | as they are | compressed-tensors: transformers            |
| gptq_v2         | 2, 3, 4, 8 | all        | any, or row | as they are | GPTQModel, newer vLLM                       |
| gptq            | 2, 3, 4, 8 | symmetric  | any, or row | as they are | GPTQModel, AutoGPTQ, vLLM                   |
| awq             | 4          | all        | any, or row | as they are | GPTQModel, AutoAWQ, vLLM                    |
| float-quantized | 8, E4M3    |            | row, block  | 8 bits      | compressed-tensors: transformers, vLLM      |
| fp8             | 8, E4M3    |            | block       | 8 bits      | DeepSeek-V3's: transformers, vLLM           |

In the last two, weights are 8-bit floats, and blocks are square: b × b weights share a scale. A row goes with a scale a
token of the activations, a block with 1 × b tiles; float-quantized may leave activations as they are.

What a foreign file may hold besides (asymmetric compressed-tensors weights, ``g_idx``) is read, see ``layouts``.

Left out: blocks of integers, scales in E8M0, weights of different schemes in one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from refllm.formats.packing import words_per_row
from refllm.formats.scheme import Scheme

__all__ = ["FLOAT", "FLOAT8", "LAYOUTS", "Spec", "Stored", "stored_as", "tensor_specs"]

FLOATS = ("float-quantized", "fp8")
LAYOUTS = ("pack-quantized", "int-quantized", "naive-quantized", "gptq_v2", "gptq", "awq", *FLOATS)
FLOAT = "float"  # in a spec: the floating-point type that the checkpoint is stored in
FLOAT8 = "float8_e4m3fn"
GPTQ_BITS = (2, 3, 4, 8)

Spec = tuple[str, tuple[int, ...]]  # dtype's name, shape


@dataclass(frozen=True)
class Stored:
    """How a weight is stored: what a reader must know besides the tensors.

    ``group_size`` None is one scale a row; ``reordered`` says that groups need not be of neighbouring columns.
    """

    layout: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    reordered: bool = False
    plain_inputs: bool = False  # float-quantized: activations as they are

    def __str__(self) -> str:
        share = "a scale a row" if self.group_size is None else f"groups of {self.group_size}"
        share = f"blocks of {self.group_size} × {self.group_size}" if self.floats and self.group_size else share
        return f"{self.layout}, {self.bits} bits, {share}" + (", activations in 8 bits" if self.activations else "")

    @property
    def activations(self) -> bool:
        """Whether the inputs are quantised too, 8 bits, a scale a token."""
        return self.layout == "int-quantized" or (self.floats and not self.plain_inputs)

    @property
    def floats(self) -> bool:
        """Whether codes are 8-bit floats."""
        return self.layout in FLOATS

    @property
    def transposed(self) -> bool:
        """GPTQ's and AWQ's tensors run from inputs to outputs."""
        return self.layout in ("gptq_v2", "gptq", "awq")

    def groups(self, columns: int) -> int:
        """G"""
        return 1 if self.group_size is None else columns // self.group_size


def stored_as(scheme: Scheme, layout: str, *, activations: bool = False, reordered: bool = False) -> Stored:
    """How weights of ``scheme`` are stored in ``layout``.

    ``activations`` says that their inputs are quantised too, 8 bits a token; ``reordered`` that columns are grouped in
    another order than their own (GPTQ's act-order without static groups).

    Raises
    ------
    ValueError
        if the layout cannot hold them; the sentence says which layouts can.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    reordered = reordered and scheme.granularity == "group"
    reason = _obstacle(scheme, layout, activations, reordered)
    if reason is not None:
        can = [other for other in LAYOUTS if _obstacle(scheme, other, activations, reordered) is None]
        instead = f"; what can: {', '.join(can)}" if can else "; no layout can"
        raise ValueError(f"{layout} cannot hold {reason}{instead}")
    group = scheme.group_size if isinstance(scheme.group_size, int) else None
    return Stored(layout, scheme.bits, group, scheme.symmetric, reordered)


def _obstacle(scheme: Scheme, layout: str, activations: bool, reordered: bool) -> str | None:
    """What the layout has no place for; None if it holds all of it."""
    if layout in FLOATS:
        return "whole numbers, only 8-bit floats"
    if scheme.granularity not in ("tensor", "channel", "group"):
        return f"a scale for each {scheme.granularity}"
    if reordered and layout not in ("gptq", "gptq_v2"):
        return "groups of columns in another order (act-order without static groups: there is no g_idx)"
    if activations != (layout == "int-quantized"):
        return "quantised activations" if activations else "weights whose activations are not quantised"
    if layout == "awq":
        return None if scheme.bits == 4 else f"{scheme.bits}-bit weights, only 4-bit ones"
    if layout in ("gptq", "gptq_v2"):
        if scheme.bits not in GPTQ_BITS:
            return f"{scheme.bits}-bit weights, only those of 2, 3, 4 or 8 bits"
        return "asymmetric weights (a zero point of 0 is lost)" if layout == "gptq" and not scheme.symmetric else None
    if not scheme.symmetric:  # the library has a place for them, but transformers 5.23 fails to load it
        return "asymmetric weights (its readers fail on them)"
    if layout == "pack-quantized":
        return None
    if scheme.bits != 8:
        return f"{scheme.bits}-bit weights, only 8-bit ones"
    return "groups" if scheme.granularity == "group" and activations else None


def tensor_specs(stored: Stored, shape: tuple[int, int], name: str = "weight") -> dict[str, Spec]:
    """Suffix → (dtype, shape) of the tensors of a weight W[M, N]; a dtype of ``"float"`` is the checkpoint's.

    Raises
    ------
    ValueError
        naming ``name`` if the layout has no place for a weight of this shape.
    """
    (m, n), b = shape, stored.bits
    if stored.floats:
        size = stored.group_size
        if size is not None and n % size and stored.layout != "fp8" and stored.activations:
            raise ValueError(f"{name}: the readers of {stored.layout} cut activations into whole tiles of {size}, "
                             f"which do not divide its {n} columns; fp8 takes any shape")  # fmt: skip
        steps = (m, 1) if size is None else (-(-m // size), -(-n // size))
        scale = "weight_scale_inv" if stored.layout == "fp8" else "weight_scale"  # a multiplier, despite the name
        return {"weight": (FLOAT8, (m, n)), scale: (FLOAT, steps)}
    g = stored.groups(n)
    if stored.group_size is not None and n % stored.group_size:
        raise ValueError(f"{name}: groups of {stored.group_size} do not divide its {n} columns")
    if stored.layout == "pack-quantized":
        specs: dict[str, Spec] = {
            "weight_packed": ("int32", (m, words_per_row(n, b))), "weight_scale": (FLOAT, (m, g)),
            "weight_shape": ("int64", (2,)),
        }  # fmt: skip
        return specs if stored.symmetric else specs | {"weight_zero_point": ("int32", (words_per_row(m, b), g))}
    if not stored.transposed:
        specs = {"weight": ("int8", (m, n)), "weight_scale": (FLOAT, (m, g))}
        return specs if stored.symmetric else specs | {"weight_zero_point": ("int8", (m, g))}
    unit = 8 if stored.layout == "awq" else 32 if b == 3 else 32 // b
    if m % unit or (stored.layout != "awq" and n % unit):
        raise ValueError(f"{name}: {stored.layout} packs {unit} codes of {b} bits at once, which does not divide "
                         f"{m} × {n}; pack-quantized takes any shape")  # fmt: skip
    small: dict[str, Spec] = {"qzeros": ("int32", (g, m * b // 32)), "scales": (FLOAT, (g, m))}
    if stored.layout == "awq":
        return {"qweight": ("int32", (n, m // 8)), **small}
    return {"qweight": ("int32", (n * b // 32, m)), **small, "g_idx": ("int32", (n,))}
