"""Writing safetensors: tensors of any stored type, one in memory at a time, in one file or in shards.

The format is described in ``shards``. Each tensor is written where its type may be mapped: the widest types come
first, as the format's own library does it, so that none begins at an odd place.

Left out: types that a checkpoint has not (booleans, 8-bit floats but E4M3).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refllm.checkpoints.tensor_files import FLOATS, INDEX, INTEGERS, SINGLE, Shape, host_dtype

__all__ = ["Plan", "flush", "write_file", "write_tensors", "write_text"]

_CODES = {name: code for code, name in (FLOATS | INTEGERS).items()}

Plan = Mapping[str, tuple[str, Shape]]  # name → dtype's name ("float16", "bfloat16", "int32" …) and shape
Read = Callable[[str], np.ndarray]  # the tensor of a name, of the planned type and shape


def write_tensors(directory: Path, plan: Plan, read: Read, limit: int | None = None) -> None:
    """Write ``model.safetensors``, or shards of at most ``limit`` bytes (or one tensor) and their index."""
    runs = _share_out({name: _size(*plan[name]) for name in plan}, limit)
    count = len(runs)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for file, names in zip(files, runs, strict=True):
        write_file(directory / file, {name: plan[name] for name in names}, read)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, runs, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(_size(*entry) for entry in plan.values())}, "weight_map": weight_map}
        write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def write_file(path: Path, plan: Plan, read: Read) -> None:
    """Write one file and wait until it is on the disk; each tensor is asked for, written and dropped."""
    names = sorted(plan, key=lambda name: -host_dtype(plan[name][0]).itemsize)  # stable: the plan's order otherwise
    with path.open("wb") as out:
        out.write(_header({name: plan[name] for name in names}))
        for name in names:
            dtype, shape = plan[name]
            tensor = np.ascontiguousarray(read(name))
            if (tensor.dtype, tensor.shape) != (host_dtype(dtype), shape):
                raise AssertionError(f"{name}: {tensor.dtype} {tensor.shape} is not the {dtype} {shape} of the plan")
            out.write(tensor.reshape(-1).view("uint8").data)  # bfloat16 has no buffer protocol, its bytes have
        _settle(out)


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, on the disk when this returns."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        _settle(file)


def flush(directory: Path) -> None:
    """Wait until a directory's entries are on the disk (POSIX; elsewhere a rename is durable by itself)."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(dtype: str, shape: Shape) -> int:
    return int(host_dtype(dtype).itemsize) * math.prod(shape)


def _share_out(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Names in order, cut into runs of at most ``limit`` bytes, or of one name that is larger alone."""
    if limit is None:
        return [list(sizes)]
    runs: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if runs[-1] and used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(name)
        used += size
    return runs


def _header(entries: Plan) -> bytes:
    """The length and the JSON with which a safetensors file begins; tensors follow without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that lacks it
    at = 0
    for name, (dtype, shape) in entries.items():
        end = at + _size(dtype, shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of eight, so that it can be mapped as it is
    return struct.pack("<Q", len(text)) + text


def _settle(file: Any) -> None:
    """Wait until a file is on the disk: a rename may reach it before the data does."""
    file.flush()
    os.fsync(file.fileno())
