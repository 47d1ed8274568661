"""Weights that know how to multiply: the ``Linear`` seam and its plain form, ``Dense``.

Every quantised form has the same face, so the network never asks what a weight is made of.

``Dense`` chooses its layout. A product of 2 to 32 rows with a weight stored as one matrix makes OpenBLAS
repack the whole weight, which costs five times the product itself; stored as blocks of 64 output columns,
[M/64, N, 64], and multiplied as one batched matmul, it does not (``benchmarks/layout.py`` measures it). The
blocks cost nothing at 1 row and a few per cent above 64 rows. On a GPU, or where M is no multiple of 64,
the weight stays one matrix.

Left out: biases (the network adds them), sharding.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from refllm.backend import Array, namespace

BLOCK = 64  # output columns a block: the widest that OpenBLAS multiplies without repacking


class Linear(Protocol):
    """A weight W[M, N] (out × in) in any storage form."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)"""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales and zero points included."""
        ...

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        ...

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M]"""
        ...

    def dequantize(self) -> Array:
        """W[M, N] in floating point, a new array."""
        ...


class Dense:
    """A floating-point weight W[M, N]; the array passed in is copied only if the layout changes."""

    def __init__(self, weight: Array):
        if weight.ndim != 2:
            raise ValueError(f"Dense: a weight is a matrix [M, N], got shape {tuple(weight.shape)}")
        self._shape: tuple[int, int] = (int(weight.shape[0]), int(weight.shape[1]))
        m, n = self._shape
        self.blocked = namespace(weight) is np and m % BLOCK == 0
        if self.blocked:
            self._data = np.ascontiguousarray(weight.reshape(m // BLOCK, BLOCK, n).transpose(0, 2, 1))
        else:
            self._data = weight

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> Any:
        return self._data.dtype

    @property
    def nbytes(self) -> int:
        return int(self._data.nbytes)

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.nbytes / (self._shape[0] * self._shape[1])

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M]."""
        if not self.blocked:
            return x @ self._data.T
        rows, columns = x.shape[0], self._shape[0]
        out = np.empty((rows, columns), dtype=np.result_type(x, self._data))
        # [M/64, T, 64], written straight into the columns of out[T, M] where they belong
        np.matmul(x, self._data, out=out.reshape(rows, columns // BLOCK, BLOCK).transpose(1, 0, 2))
        return out

    def rows(self, index: Array) -> Array:
        """W[index] for index[T] → [T, N]: the embedding lookup, also of a tied head (one copy serves both)."""
        if self.blocked:
            return self._data[index // BLOCK, :, index % BLOCK]
        return self._data[index]

    def dequantize(self) -> Array:
        """W[M, N], a new array."""
        if self.blocked:
            # a copy by name: of a single block, reshape alone would return a view
            return self._data.transpose(0, 2, 1).copy().reshape(self._shape)
        return self._data.copy()
