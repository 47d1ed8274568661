"""The storage types of GGUF files that refllm reads and writes: sizes, ids, names.

A row of K elements is stored as K / block blocks of ``size`` bytes each, which are
8 · size / block bits per weight.

| type           | elements per block | bytes  | bits per weight | what a block holds           |
|----------------|--------------------|--------|-----------------|------------------------------|
| F32, F16, BF16 | 1                  | 4, 2   | 32, 16          | the value                    |
| Q8_0           | 32                 | 34     | 8.5             | scale, 8-bit codes           |
| Q4_0, Q5_0     | 32                 | 18, 22 | 4.5, 5.5        | scale, codes around 0        |
| Q4_1, Q5_1     | 32                 | 20, 24 | 5, 6            | scale, offset, codes from 0  |
| IQ4_NL         | 32                 | 18     | 4.5             | scale, codes of 16 values    |
| MXFP4          | 32                 | 17     | 4.25            | power of two, 4-bit floats   |
| Q2_K … Q6_K    | 256                | 84 …   | 2.625 …         | sub-blocks, quantised scales |

Source: the GGUF specification, and ggml's block structures (the ids are ggml's).

Left out: the other lattice and the ternary types (IQ…, TQ…), integers, Q8_1 and Q8_K (activations,
never in files).
"""

from __future__ import annotations

from dataclasses import dataclass

from refllm.errors import InputError, alternatives

__all__ = ["FIELDS", "TYPES", "Field", "GGUFType", "gguf_type", "row_bytes"]


@dataclass(frozen=True)
class GGUFType:
    """A storage type: ``block`` elements take ``size`` bytes; ``id`` is its number in files.

    >>> TYPES["Q4_K"].bits_per_weight
    4.5
    """

    name: str
    id: int
    block: int
    size: int

    @property
    def bits_per_weight(self) -> float:
        """8 · size / block"""
        return 8.0 * self.size / self.block

    @property
    def quantized(self) -> bool:
        """Whether elements share a scale; files with such types carry a quantisation version."""
        return self.block > 1


TYPES = {
    found.name: found
    for found in (
        GGUFType("F32", 0, 1, 4),
        GGUFType("F16", 1, 1, 2),
        GGUFType("Q4_0", 2, 32, 18),
        GGUFType("Q4_1", 3, 32, 20),
        GGUFType("Q5_0", 6, 32, 22),
        GGUFType("Q5_1", 7, 32, 24),
        GGUFType("Q8_0", 8, 32, 34),
        GGUFType("Q2_K", 10, 256, 84),
        GGUFType("Q3_K", 11, 256, 110),
        GGUFType("Q4_K", 12, 256, 144),
        GGUFType("Q5_K", 13, 256, 176),
        GGUFType("Q6_K", 14, 256, 210),
        GGUFType("IQ4_NL", 20, 32, 18),
        GGUFType("BF16", 30, 1, 2),
        GGUFType("MXFP4", 39, 32, 17),
    )
}


@dataclass(frozen=True)
class Field:
    """Some bytes of a block: ``role`` is "step" (its scale), "offset", "scales", "high bits"
    or "codes"; ``holds`` says which.

    The "numbers" in ``holds`` are the elements of a block, counted from 0 like sub-blocks; j
    is the index of the byte within the field. (Both strings are stored in figure data.)
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
    "IQ4_NL": (_D, _NIBBLES),
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


def gguf_type(name: str) -> GGUFType:
    """The storage type called ``name``; ValueError lists the known ones."""
    if name not in TYPES:
        raise InputError(f"unknown GGUF type {name!r}; {alternatives(name, TYPES)}")
    return TYPES[name]


def row_bytes(name: str, columns: int) -> int:
    """Bytes of a row of ``columns`` elements; ValueError if blocks do not divide it.

    >>> row_bytes("Q4_K", 512)
    288
    """
    found = gguf_type(name)
    if columns % found.block:
        raise InputError(
            f"{name} stores blocks of {found.block} elements, which do not divide a row of "
            f"{columns}"
        )
    return columns // found.block * found.size
