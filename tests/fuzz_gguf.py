"""Mutated GGUF files against the reader: each must be read or end in one ``GGUFError``,
within a second.

A mutation takes a small valid file and changes a few bytes, sets a field to an extreme value
(0, 2³¹, 2⁶⁴ − 1 …), truncates it, duplicates a part or swaps parts. Nearly all keep the
magic. Of a file that can still be read, all tensors are dequantised.

    python tests/fuzz_gguf.py --files 100000
"""

from __future__ import annotations

import argparse
import collections
import random
import struct
import time
from typing import Any

import numpy as np

from refllm.formats.gguf.codec import dequantize, quantize
from refllm.formats.gguf.reader import GGUFError, parse
from refllm.formats.gguf.writer import header_bytes

EXTREME_VALUES = (
    *(0, 1, 2, 7, 8, 31, 32, 63, 64, 255, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 256, 2**64 - 1),
)


def seed_file() -> bytes:
    """A valid file with every kind of metadata and several types of tensor."""
    x = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    tensors = {
        f"blk.{i}.{t}": (t, quantize(x, t))
        for i, t in enumerate(("F32", "F16", "Q4_0", "Q4_K", "Q6_K", "MXFP4"))
    }
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.alignment": np.uint32(32),
        "x.flag": True,
        "x.u8": np.uint8(3),
        "x.f64": np.float64(0.5),
        "tokenizer.ggml.tokens": ["a", "b", "cd", ""],
        "x.ids": np.arange(4, dtype=np.int32),
    }
    data = header_bytes(metadata, {name: (t, (2, 256)) for name, (t, _) in tensors.items()})
    for _, raw in tensors.values():
        data += raw.tobytes() + b"\0" * (-raw.nbytes % 32)
    return data


def mutated(data: bytes, header: int, draw: random.Random) -> bytes:
    """A changed copy; most changes hit the header, where the sizes are."""
    out = bytearray(data)
    first = 0 if draw.random() < 0.1 else 4
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        end = max(first + 1, min(len(out), header if draw.random() < 0.95 else len(out)))
        at = draw.randrange(first, end)
        change = draw.randrange(7)
        if change <= 1:
            out[at] = draw.randrange(256)
        elif change == 2:
            out[at] ^= 1 << draw.randrange(8)
        elif change == 3:
            out[at : at + 8] = struct.pack("<Q", draw.choice(EXTREME_VALUES))
        elif change == 4:
            out[at : at + 4] = struct.pack("<I", draw.choice(EXTREME_VALUES) & 0xFFFFFFFF)
        elif change == 5:
            other = draw.randrange(first, end)
            length = draw.randrange(1, 64)
            out[at : at + length] = out[other : other + length]  # duplicates, shifts or swaps
        else:
            del out[at if draw.random() < 0.5 else max(at, len(out) - draw.randrange(1, 200)) :]
            if len(out) <= first:
                break
    return bytes(out)


def run(files: int, seed: int) -> collections.Counter[str]:
    """Outcomes of ``files`` mutated files, counted, and the seconds of the slowest."""
    data = seed_file()
    header = min(record.start for record in parse(data).tensors.values())
    draw = random.Random(seed)
    seen = collections.Counter({"files": files})
    slowest = 0.0
    for _ in range(files):
        bad = mutated(data, header, draw)
        seen["past the magic"] += bad[:4] == b"GGUF"
        began = time.process_time()
        try:
            found = parse(bad)
            for record in found.tensors.values():
                raw = np.frombuffer(bad, np.uint8, record.nbytes, record.start)
                width = record.shape[-1] // record.type.block * record.type.size
                dequantize(raw.reshape(-1, width), record.type.name)
            seen["read"] += 1
        except GGUFError as error:
            seen["rejected"] += 1
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from error
        slowest = max(slowest, time.process_time() - began)
    seen["slowest"] = slowest  # type: ignore[assignment]
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    seen = run(chosen.files, chosen.seed)
    print(
        ", ".join(f"{name} {count:,}" for name, count in seen.items() if name != "slowest"),
        end="; ",
    )
    print(f"slowest {1000 * seen['slowest']:.0f} ms")


if __name__ == "__main__":
    main()
