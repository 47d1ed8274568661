"""A weight that keeps the bytes of a GGUF file and multiplies: a ``Linear``.

Rows are dequantised one tile at a time, multiplied and discarded, so that memory holds the
file's bytes and one tile. llama.cpp also quantises the *activations* to 8 bits and sums
integers, so its logits of the same file differ by the error of that rounding; the weights
are the same to the bit.

Left out: integer products with 8-bit activations.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refllm.backend import Array, namespace
from refllm.formats.gguf.codec import dequantize
from refllm.formats.gguf.types import gguf_type
from refllm.formats.granularity import tile_elements

__all__ = ["GGUFLinear"]

MATMUL_TILE = (1 << 18, 1 << 26)  # elements dequantised at a time in a product (host, device)


class GGUFLinear:
    """A weight W[M, N] as the bytes uint8 [M, row_bytes] of a GGUF type; ``dtype`` is the
    type that it comes back in.
    """

    def __init__(self, raw: Array, type: str, dtype: str | np.dtype[np.generic] = "float32"):
        found = gguf_type(type)
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
        return gguf_type(self.type).bits_per_weight

    def rows(self, index: Array) -> Array:
        """W[index] for index[T] → [T, N]; only these rows are dequantised."""
        return self._dequantized(self.raw[index])

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M], in the wider of x's dtype and ``dtype``."""
        xp = namespace(x, self.raw)
        dtype = xp.result_type(x.dtype, self.dtype)
        out = xp.empty((x.shape[0], self.shape[0]), dtype=dtype)
        x = xp.astype(x, dtype, copy=False)
        for start, stop in self._tiles():
            tile = self._dequantized(self.raw[start:stop])
            out[:, start:stop] = x @ xp.astype(tile, dtype, copy=False).T
        return out

    def dequantize(self) -> Array:
        """W[M, N] in ``dtype``, a new array."""
        return self._dequantized(self.raw)

    def _dequantized(self, raw: Array) -> Array:
        """The rows with these bytes, in ``dtype``."""
        return namespace(raw).astype(dequantize(raw, self.type), self.dtype, copy=False)

    def _tiles(self) -> Iterator[tuple[int, int]]:
        """(first row, last row + 1) of each tile of a product."""
        step = max(1, tile_elements(self.raw, MATMUL_TILE) // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    def __repr__(self) -> str:
        size = f"{self.shape[0]}×{self.shape[1]}"
        return f"GGUFLinear({size}, {self.type}, {self.bits_per_weight:.4g} bits per weight)"
