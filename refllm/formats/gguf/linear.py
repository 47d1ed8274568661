"""A weight that stays in a GGUF file's bytes and multiplies: a ``Linear``.

Rows are decoded a tile at a time, multiplied and forgotten, so that memory holds the file's
bytes and one tile. llama.cpp does it otherwise: it also rounds the *activations* to 8 bits
and sums whole numbers. So the same file gives logits that differ by what that rounding
costs; the weights are the same to the bit.

Left out: integer products with 8-bit activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from refllm.backend import Array, namespace
from refllm.formats.gguf.codec import dequantize
from refllm.formats.gguf.types import kind

__all__ = ["GGUFLinear"]

TILE = (1 << 18, 1 << 26)  # numbers decoded at a time in a product (host, device)


class GGUFLinear:
    """A weight W[M, N] as the bytes uint8 [M, row_bytes] of a GGUF type; ``dtype`` is what
    it comes back in.
    """

    def __init__(self, raw: Array, type: str, dtype: Any = "float32"):
        found = kind(type)
        if raw.ndim != 2 or raw.shape[1] % found.size:
            raise ValueError(f"GGUFLinear: {type} has no rows of {tuple(raw.shape)} bytes")
        self.raw = raw
        self.type = type
        self.dtype = np.dtype(dtype)
        self.shape = (int(raw.shape[0]), int(raw.shape[1]) // found.size * found.block)

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return int(self.raw.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        return kind(self.type).bits_per_weight

    def rows(self, index: Array) -> Array:
        """W[index] for index[T] → [T, N]: only these rows are decoded."""
        return self._decoded(self.raw[index])

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M], in the wider of x's dtype and ``dtype``."""
        xp = namespace(x, self.raw)
        dtype = xp.result_type(x.dtype, self.dtype)
        out = xp.empty((x.shape[0], self.shape[0]), dtype=dtype)
        x = xp.astype(x, dtype, copy=False)
        for start, stop in self._tiles():
            tile = self._decoded(self.raw[start:stop])
            out[:, start:stop] = x @ xp.astype(tile, dtype, copy=False).T
        return out

    def dequantize(self) -> Array:
        """W[M, N] in ``dtype``, a new array."""
        return self._decoded(self.raw)

    def _decoded(self, raw: Array) -> Array:
        return namespace(raw).astype(dequantize(raw, self.type), self.dtype, copy=False)

    def _tiles(self) -> Iterator[tuple[int, int]]:
        size = TILE[0 if namespace(self.raw) is np else 1]
        step = max(1, size // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    def __repr__(self) -> str:
        return f"GGUFLinear({self.shape[0]}×{self.shape[1]}, {self.type}, {self.bits_per_weight:.4g} bits per weight)"
