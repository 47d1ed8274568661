"""GGUF reader: metadata and tensors, every value of the header validated before it is used.

Files are untrusted input. Whatever a header claims, nothing is allocated and nothing is
looped over that the file is too short to hold, so a malicious file costs one error message
and no memory.

| bytes                    | what                                                          |
|--------------------------|---------------------------------------------------------------|
| ``GGUF``, u32 version    | 3; version 2 has the same layout                              |
| u64 tensors, u64 entries | their counts                                                  |
| entries                  | key (string), u32 type, value                                 |
| tensor records           | name, u32 dimensions, u64 per dimension, u32 type, u64 offset |
| padding, tensors         | each tensor begins at the next multiple of the alignment      |

A string is a u64 length and that many bytes of UTF-8. An array is a u32 type, a u64 count,
and the elements. Everything is little-endian. Dimensions are stored innermost first, NumPy's
shape reversed. Offsets count from the first tensor.

Metadata become NumPy scalars and arrays of their own type, strings str, arrays of strings
lists.

Source: the GGUF specification; what llama.cpp's reader rejects is rejected (gaps, duplicate
names, nested arrays).

Left out: big-endian files, version 1, types without a codec here; ``parts`` opens files in
several parts.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refllm.array_types import Json
from refllm.errors import InputError
from refllm.formats.gguf.types import TYPES, GGUFType

__all__ = ["ALIGNMENT", "SCALARS", "GGUFError", "GGUFFile", "Header", "TensorRecord", "parse"]

SCALARS = {
    0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32",
    6: "float32", 7: "bool", 10: "uint64", 11: "int64", 12: "float64",
}  # fmt: skip
STRING = 8
ARRAY = 9
ALIGNMENT = 32
# Limits far beyond any model, on everything that is looped over
MOST_ENTRIES = 1 << 16
MOST_TENSORS = 1 << 17
MOST_STRINGS = 1 << 22
LONGEST_KEY = 65535
LONGEST_NAME = 63
MOST_DIMENSIONS = 4
_BY_ID = {found.id: found for found in TYPES.values()}
_FOREIGN = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
    42: "Q2_0",
}  # fmt: skip

Bytes = bytes | memoryview
Record = tuple[str, GGUFType, tuple[int, ...], int]  # name, type, shape, offset


class GGUFError(InputError):
    """The file cannot be read as GGUF; the message says where, and what to do."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor's record in the header; ``start`` is its first byte in the file."""

    name: str
    type: GGUFType
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return math.prod(self.shape) // self.type.block * self.type.size


@dataclass(frozen=True)
class Header:
    """Everything before the tensors."""

    metadata: Json
    tensors: dict[str, TensorRecord]
    alignment: int


class _Cursor:
    """A position in the file's bytes that cannot move beyond their end."""

    def __init__(self, data: Bytes, where: str):
        self.data = data
        self.where = where
        self.at = 0
        self.strings = 0

    def fail(self, what: str) -> GGUFError:
        """The error for this position."""
        position = f"byte {self.at:,} of {len(self.data):,}"
        return GGUFError(f"{self.where}: {what} ({position}): download or convert it again")

    def need(self, count: int, what: str) -> None:
        """GGUFError unless the file has ``count`` more bytes."""
        if count > len(self.data) - self.at:
            raise self.fail(f"{what} needs {count:,} bytes, which the file does not have")

    def number(self, code: str, what: str) -> int:
        """One little-endian integer with ``struct``'s format ``code``."""
        self.need(struct.calcsize("<" + code), what)
        value: int = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def string(self, what: str, longest: int | None = None) -> str:
        """A string of at most ``longest`` bytes."""
        length = self.number("Q", f"the length of {what}")
        if longest is not None and length > longest:
            raise self.fail(
                f"{what} claims to be {length:,} bytes long, at most {longest:,} are allowed"
            )
        self.need(length, what)
        raw = bytes(self.data[self.at : self.at + length])
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not valid UTF-8") from error
        self.at += length
        return text

    def numbers(self, dtype_name: str, count: int, what: str) -> np.ndarray:
        """An array of ``count`` values."""
        dtype = np.dtype("uint8" if dtype_name == "bool" else dtype_name).newbyteorder("<")
        self.need(count * dtype.itemsize, what)
        raw = np.frombuffer(self.data, dtype=dtype, count=count, offset=self.at)
        self.at += count * dtype.itemsize
        if dtype_name != "bool":
            return raw.astype(dtype_name)
        if raw.size and raw.max() > 1:
            raise self.fail(f"{what} holds a bool that is neither 0 nor 1")
        return raw.astype(bool)

    def value(self, type_id: int, what: str) -> object:
        """A metadata value of this type."""
        if type_id in SCALARS:
            return self.numbers(SCALARS[type_id], 1, what)[0]
        if type_id == STRING:
            return self.string(what)
        if type_id != ARRAY:
            raise self.fail(f"{what} has type {type_id}, which does not exist")
        inner = self.number("I", what)
        count = self.number("Q", what)
        if inner in SCALARS:
            return self.numbers(SCALARS[inner], count, what)
        if inner != STRING:
            raise self.fail(f"{what} is an array of type {inner}; arrays hold numbers or strings")
        self.need(8 * count, what)  # each string has at least a length
        self.strings += count
        if self.strings > MOST_STRINGS:
            raise self.fail(f"{what} claims {count:,} strings, more than any vocabulary has")
        return [self.string(what) for _ in range(count)]


def parse(data: Bytes, where: str = "the file") -> Header:
    """The header of a GGUF file, given all its bytes (bytes, or a memory map, of which only
    the header is read).

    Raises
    ------
    GGUFError
        for everything that contradicts the format or the file's length.
    """
    cursor = _Cursor(data, where)
    if bytes(data[:4]) != b"GGUF":
        raise GGUFError(f"{where} does not begin with 'GGUF': it is another kind of file")
    cursor.at = 4
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise GGUFError(f"{where} is a big-endian GGUF file: convert it for little-endian machines")
    if version not in (2, 3):
        raise GGUFError(f"{where} is of GGUF version {version}; versions 2 and 3 are read")
    tensors = cursor.number("Q", "the number of tensors")
    entries = cursor.number("Q", "the number of entries")
    for count, most, size, what in (
        (entries, MOST_ENTRIES, 13, "entries"),
        (tensors, MOST_TENSORS, 24, "tensors"),
    ):
        if count > most or count * size > len(data) - cursor.at:
            raise cursor.fail(f"the header claims {count:,} {what}, more than the file can hold")
    metadata = _metadata(cursor, entries)
    alignment = _alignment(cursor, metadata)
    records = [_record(cursor, f"tensor record {i}") for i in range(tensors)]
    return Header(metadata, _placed(cursor, records, alignment), alignment)


def _metadata(cursor: _Cursor, count: int) -> Json:
    """The metadata, ``count`` entries."""
    metadata: Json = {}
    for i in range(count):
        key = cursor.string(f"the key of entry {i}", LONGEST_KEY)
        if not key:
            raise cursor.fail(f"entry {i} has no key")
        if key in metadata:
            raise cursor.fail(f"the key {key[:80]!r} occurs twice")
        type_id = cursor.number("I", f"the type of {key[:80]!r}")
        metadata[key] = cursor.value(type_id, f"the value of {key[:80]!r}")
    return metadata


def _alignment(cursor: _Cursor, metadata: Mapping[str, object]) -> int:
    """The alignment of tensors: a power of two, at most 2²⁰."""
    value = metadata.get("general.alignment", np.uint32(ALIGNMENT))
    if not isinstance(value, np.uint32) or value == 0 or value & (value - 1) or value > 1 << 20:
        raise cursor.fail(
            f"general.alignment is {value!r:.40}; it must be a power of two, as a u32"
        )
    return int(value)


def _record(cursor: _Cursor, what: str) -> Record:
    """A tensor record as it is in the file."""
    name = cursor.string(f"the name in {what}", LONGEST_NAME)
    count = cursor.number("I", f"the dimensions of {name!r}")
    if not 1 <= count <= MOST_DIMENSIONS:
        raise cursor.fail(f"{name!r} has {count} dimensions; one to {MOST_DIMENSIONS} are allowed")
    shape = tuple(cursor.number("Q", f"the shape of {name!r}") for _ in range(count))[::-1]
    id_ = cursor.number("I", f"the type of {name!r}")
    offset = cursor.number("Q", f"the offset of {name!r}")
    if id_ not in _BY_ID:
        found = _FOREIGN.get(id_, f"type {id_}")
        raise cursor.fail(
            f"{name!r} is stored as {found}, which is not read; what is: {', '.join(TYPES)}"
        )
    stored = _BY_ID[id_]
    if 0 in shape or shape[-1] % stored.block:
        raise cursor.fail(
            f"{name!r} has shape {shape}, which {stored.name} cannot store: rows are whole blocks "
            f"of {stored.block}"
        )
    # Python's integers do not overflow, so this holds for any shape
    if math.prod(shape) // stored.block * stored.size > len(cursor.data):
        raise cursor.fail(f"{name!r} has shape {shape}, more than the whole file")
    return name, stored, shape, offset


def _placed(cursor: _Cursor, records: list[Record], alignment: int) -> dict[str, TensorRecord]:
    """The tensors with their positions: one after another, from the next multiple of the
    alignment on.
    """
    first = cursor.at + -cursor.at % alignment
    placed: dict[str, TensorRecord] = {}
    at = 0
    for name, stored, shape, offset in records:
        if name in placed:
            raise cursor.fail(f"the tensor {name!r} occurs twice")
        if offset != at:
            raise cursor.fail(
                f"{name!r} begins at {offset:,} after the first tensor, but the one before it "
                f"ends at {at:,}"
            )
        record = TensorRecord(name, stored, shape, first + at)
        placed[name] = record
        if record.start + record.nbytes > len(cursor.data):
            raise cursor.fail(f"{name!r} ends beyond the end of the file: it is truncated")
        at += record.nbytes + -record.nbytes % alignment
    return placed


class GGUFFile(Mapping[str, np.ndarray]):
    """A GGUF file on disk: ``file[name]`` is a tensor's bytes, uint8 [rows…, row_bytes],
    not copied.

    Opening reads only the header. A context manager; arrays taken from it keep the file
    mapped.
    """

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path))
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise GGUFError(
                    f"{self.path} has {size} bytes, fewer than the shortest GGUF file: "
                    "download it again"
                )
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = parse(memoryview(self._mapped), str(self.path))
        self._data = np.frombuffer(self._mapped, dtype=np.uint8)
        self.metadata = header.metadata
        self.tensors = header.tensors
        self.alignment = header.alignment

    @property
    def paths(self) -> list[Path]:
        """The files that it consists of."""
        return [self.path]

    def __getitem__(self, name: str) -> np.ndarray:
        record = self.tensors[name]
        width = record.shape[-1] // record.type.block * record.type.size
        raw = self._data[record.start : record.start + record.nbytes]
        return raw.reshape((*record.shape[:-1], width))

    def forget(self, name: str) -> None:
        """Give the memory of a tensor's mapped pages back, where the system can: they count as
        the process's own, and a caller that has copied them needs them no more.
        """
        record = self.tensors[name]
        if hasattr(self._mapped, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            first = -(-record.start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages within it
            last = (record.start + record.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                self._mapped.madvise(mmap.MADV_DONTNEED, first, last - first)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exception: object) -> None:
        del self._data, self._mapped
