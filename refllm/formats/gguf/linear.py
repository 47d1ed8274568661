"""A weight that keeps the bytes of a GGUF file and multiplies: a ``Linear``.

Rows are dequantised one tile at a time, multiplied and discarded, so that memory holds the
file's bytes and one tile. This is the definition, and what a GPU computes; on the host
``interleaved`` holds the same bytes in an order that NumPy unpacks five times faster. llama.cpp
also quantises the *activations* to 8 bits and sums integers, so its logits of the same file
differ by the error of that rounding; the weights are the same to the bit.

Left out: integer products with 8-bit activations.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refllm.backend import Array, DType, namespace
from refllm.errors import InputError
from refllm.formats.gguf.codec import dequantize
from refllm.formats.gguf.types import gguf_type
from refllm.formats.granularity import MATMUL_TILE, tile_elements, tiled_matmul

__all__ = ["GGUFLinear"]


class GGUFLinear:
    """A weight W[M, N] as the bytes uint8 [M, row_bytes] of a GGUF type; ``dtype`` is the
    type that it comes back in.
    """

    def __init__(self, raw: Array, type: str, dtype: DType = "float32"):
        found = gguf_type(type)
        if raw.ndim != 2 or raw.shape[1] % found.size:
            raise InputError(
                f"GGUFLinear: raw {type} is uint8 [R, a multiple of {found.size}], "
                f"got {tuple(raw.shape)}"
            )
        self.type = type
        self.dtype = np.dtype(dtype)
        self.shape = (int(raw.shape[0]), int(raw.shape[1]) // found.size * found.block)
        self._data = self._arranged(raw)

    def _arranged(self, raw: Array) -> Array:
        """The bytes as they are held."""
        return raw

    @property
    def raw(self) -> Array:
        """The file's bytes, uint8 [M, row_bytes]."""
        return self._data

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return int(self._data.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        return gguf_type(self.type).bits_per_weight

    def rows(self, index: Array) -> Array:
        """W[index] for index[T] → [T, N]; only these rows are dequantised."""
        return self._dequantized(self.raw[index])

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M], in the wider of x's dtype and ``dtype``."""
        namespace(x, self.raw)  # both on one device
        return tiled_matmul(x, self._tiles(), self.shape[0], self.dtype)

    def dequantize(self) -> Array:
        """W[M, N] in ``dtype``, a new array."""
        return self._dequantized(self.raw)

    def _dequantized(self, raw: Array) -> Array:
        """The rows with these bytes, in ``dtype``."""
        return namespace(raw).astype(dequantize(raw, self.type), self.dtype, copy=False)

    def _tiles(self) -> Iterator[tuple[int, int, Array]]:
        """(first row, last row + 1, those rows of W) of each tile of a product."""
        step = max(1, tile_elements(self.raw, MATMUL_TILE) // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield start, stop, self._dequantized(self.raw[start:stop])

    def __repr__(self) -> str:
        name = type(self).__name__
        size = f"{self.shape[0]}×{self.shape[1]}"
        return f"{name}({size}, {self.type}, {self.bits_per_weight:.4g} bits per weight)"
