"""GGUF writer: version 3, one tensor in memory at a time, byte for byte what the ``gguf``
package writes.

Metadata values carry their types: str, bool, NumPy scalars and arrays, lists of str. A plain
int or float is rejected, because the file needs a width. The format is described in
``reader``.

Left out: other alignments than 32, files in several parts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from refllm.atomic import replacing
from refllm.errors import InputError
from refllm.formats.gguf.reader import (
    ALIGNMENT,
    ARRAY,
    LONGEST_NAME,
    MOST_DIMENSIONS,
    SCALARS,
    STRING,
)
from refllm.formats.gguf.types import gguf_type, row_bytes

__all__ = ["Plan", "header_bytes", "plan_bytes", "write"]

Plan = Mapping[str, tuple[str, tuple[int, ...]]]  # name → type's name and shape
_IDS = {name: number for number, name in SCALARS.items()}


def write(
    path: str | Path, metadata: Mapping[str, object], plan: Plan, read: Callable[[str], np.ndarray]
) -> None:
    """Write the tensors of ``plan``, in its order; ``read`` returns the bytes of one and is
    called once per tensor.

    The file is written under a temporary name beside ``path`` and renamed when it is
    complete and on disk.

    Raises
    ------
    ValueError
        for metadata without a type, and for a tensor that its type or the format cannot
        hold.
    """
    target = Path(path)
    header = header_bytes(metadata, plan)
    with replacing(target) as partial, partial.open("wb") as out:
        out.write(header)
        for name in plan:
            size = plan_bytes(plan, name)
            tensor = np.ascontiguousarray(read(name))
            if (tensor.dtype, tensor.nbytes) != (np.dtype("uint8"), size):
                raise AssertionError(
                    f"{name}: {tensor.dtype} of {tensor.nbytes} bytes, not the {size} of the plan"
                )
            out.write(tensor.data)
            out.write(b"\0" * (-size % ALIGNMENT))


def plan_bytes(plan: Plan, name: str) -> int:
    """Bytes of a planned tensor."""
    type, shape = plan[name]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows * row_bytes(type, shape[-1])


def header_bytes(metadata: Mapping[str, object], plan: Plan) -> bytes:
    """Everything before the tensors, padded to the alignment."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(plan), len(metadata))]
    parts += [_string(key) + _value(key, value) for key, value in metadata.items()]
    at = 0
    for name, (type, shape) in plan.items():
        if (
            len(name.encode()) > LONGEST_NAME
            or not 1 <= len(shape) <= MOST_DIMENSIONS
            or 0 in shape
        ):
            raise InputError(f"write: GGUF cannot hold {name!r} of shape {shape}")
        record = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], gguf_type(type).id, at)
        parts.append(_string(name) + record)
        size = plan_bytes(plan, name)
        at += size + -size % ALIGNMENT
    header = b"".join(parts)
    return header + b"\0" * (-len(header) % ALIGNMENT)


def _string(text: str) -> bytes:
    """A string with its length before it."""
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: object) -> bytes:
    """Type and value of an entry."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        head = struct.pack("<IIQ", ARRAY, STRING, len(value))
        return head + b"".join(map(_string, value))
    if isinstance(value, bool):
        value = np.bool_(value)
    if isinstance(value, (np.generic, np.ndarray)) and value.dtype.name in _IDS and value.ndim <= 1:
        number = _IDS[value.dtype.name]
        if value.ndim == 0:
            head = struct.pack("<I", number)
        else:
            head = struct.pack("<IIQ", ARRAY, number, value.size)
        return head + value.astype(value.dtype.newbyteorder("<")).tobytes()
    raise InputError(
        f"write: the value of {key!r} has no GGUF type: pass str, bool, a NumPy scalar or array, "
        f"or a list of str, not {type(value).__name__}"
    )
