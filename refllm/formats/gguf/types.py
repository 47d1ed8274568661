"""The storage types of GGUF files that refllm reads and writes: sizes, numbers, names.

A row of K numbers is stored as K / block blocks of ``size`` bytes each; bits a weight are 8
· size / block.

| type          | numbers a block | bytes | bits a weight | what a block holds                                    |
|---------------|-----------------|-------|---------------|-------------------------------------------------------|
| F32, F16, BF16| 1               | 4, 2  | 32, 16        | the number                                            |
| Q8_0          | 32              | 34    | 8.5           | step, 8-bit codes                                     |
| Q4_0, Q5_0    | 32              | 18, 22| 4.5, 5.5      | step, codes around 0                                  |
| Q4_1, Q5_1    | 32              | 20, 24| 5, 6          | step, offset, codes from 0                            |
| MXFP4         | 32              | 17    | 4.25          | power of two, 4-bit floats                            |
| Q2_K … Q6_K   | 256             | 84 …  | 2.625 …       | sub-blocks whose steps (and offsets) are codes, too   |

Source: the GGUF specification, and ggml's block structures (the numbers of the types are
ggml's).

Left out: the lattice and ternary types (IQ…, TQ…), integers, Q8_1 and Q8_K (activations,
never in files).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIELDS", "TYPES", "Field", "Kind", "kind", "row_bytes"]


@dataclass(frozen=True)
class Kind:
    """A storage type: ``number`` is its id in files."""

    name: str
    number: int
    block: int
    size: int

    @property
    def bits_per_weight(self) -> float:
        """8 · size / block"""
        return 8.0 * self.size / self.block

    @property
    def quantized(self) -> bool:
        """Whether numbers share a scale: files of such types carry a version of the
        quantisation.
        """
        return self.block > 1


TYPES = {
    kind.name: kind
    for kind in (
        Kind("F32", 0, 1, 4),
        Kind("F16", 1, 1, 2),
        Kind("Q4_0", 2, 32, 18),
        Kind("Q4_1", 3, 32, 20),
        Kind("Q5_0", 6, 32, 22),
        Kind("Q5_1", 7, 32, 24),
        Kind("Q8_0", 8, 32, 34),
        Kind("Q2_K", 10, 256, 84),
        Kind("Q3_K", 11, 256, 110),
        Kind("Q4_K", 12, 256, 144),
        Kind("Q5_K", 13, 256, 176),
        Kind("Q6_K", 14, 256, 210),
        Kind("BF16", 30, 1, 2),
        Kind("MXFP4", 39, 32, 17),
    )
}


@dataclass(frozen=True)
class Field:
    """Some bytes of a block: ``role`` is "step", "offset", "scales", "high bits" or
    "codes"; ``holds`` says of what.

    Numbers of a block are counted from 0, sub-blocks too; j is the byte's place in the
    field.
    """

    role: str
    size: int
    holds: str


_D = Field("step", 2, "d")
_M = Field("offset", 2, "m")
_DMIN = Field("offset", 2, "dmin")
_NIBBLES = Field("codes", 16, "low half: number j, high half: number j + 16")
_FIFTH = Field("high bits", 4, "bit i of the 32: number i")
_SIX = Field("scales", 12, "8 scales and 8 offsets of 6 bits")
_PAIRS = Field("codes", 128, "byte 32c + l: numbers 64c + l and 64c + 32 + l")
_QUARTERS = Field("codes", 64, "byte 32h + l: numbers 128h + l + 0, 32, 64, 96")
FIELDS: dict[str, tuple[Field, ...]] = {
    "Q4_0": (_D, _NIBBLES),
    "Q4_1": (_D, _M, _NIBBLES),
    "Q5_0": (_D, _FIFTH, _NIBBLES),
    "Q5_1": (_D, _M, _FIFTH, _NIBBLES),
    "Q8_0": (_D, Field("codes", 32, "number j, signed")),
    "MXFP4": (Field("step", 1, "E"), _NIBBLES),
    "Q2_K": (Field("scales", 16, "low half: scale j, high half: offset j"), _QUARTERS, _D, _DMIN),
    "Q3_K": (Field("high bits", 32, "byte l, bit t: number 32t + l"), _QUARTERS,
             Field("scales", 12, "16 scales of 6 bits"), _D),
    "Q4_K": (_D, _DMIN, _SIX, _PAIRS),
    "Q5_K": (_D, _DMIN, _SIX, Field("high bits", 32, "byte l, bit t: number 32t + l"), _PAIRS),
    "Q6_K": (Field("codes", 128, "byte 64h + l: numbers 128h + l and 128h + 64 + l"),
             Field("high bits", 64, "byte 32h + l: 128h + l + 0, 32, 64, 96"),
             Field("scales", 16, "scale j, signed"), _D),
}  # fmt: skip


def kind(name: str) -> Kind:
    """The storage type called ``name``; ValueError names those that there are."""
    if name not in TYPES:
        raise ValueError(f"unknown GGUF type {name!r}; choose one of {', '.join(TYPES)}")
    return TYPES[name]


def row_bytes(name: str, columns: int) -> int:
    """Bytes of a row of ``columns`` numbers; ValueError if blocks do not divide it."""
    found = kind(name)
    if columns % found.block:
        raise ValueError(
            f"{name} stores blocks of {found.block} numbers, which do not divide a row of {columns}"
        )
    return columns // found.block * found.size
