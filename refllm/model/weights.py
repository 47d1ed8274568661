"""Weights that know how to multiply: the ``Linear`` interface and its plain form, ``Dense``.

Every quantised form has the same interface, so the network never asks how a weight is
stored.

| symbol | name                                          | shape      |
|--------|-----------------------------------------------|------------|
| W      | weight, output × input                        | [M, N]     |
| x      | inputs of T tokens                            | [T, N]     |
| ΣM     | outputs of weights that multiply the same x   |            |

How a ``Dense`` weight lies in memory, so that OpenBLAS multiplies a few rows by it fast, is
decided in ``weight_layout``.

Left out: biases (the network adds them), sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol, TypeAlias, cast

from refllm.backend import NUMPY, Array, DType, namespace
from refllm.errors import InputError
from refllm.model.weight_layout import Blocks, WeightArena, has_blocks, layout_for, to_blocks


class Linear(Protocol):
    """A weight W[M, N] (output × input) in any storage format."""

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


Weight: TypeAlias = Array | Linear


class Dense:
    """A floating-point weight W[M, N]: ``matmul(x)`` is ``x @ W.T``.

    >>> import numpy as np
    >>> weight = Dense(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))  # [3, 2]
    >>> weight.matmul(np.array([[1.0, 1.0]])).tolist()
    [[3.0, 7.0, 11.0]]

    The array is kept as it is, and copied only where it is stored in blocks
    (``weight_layout``): into ``arena``, or into an array of its own if there is no arena or it
    holds another dtype. ValueError if ``weight`` is not a matrix.
    """

    fused: Dense | None = None  # the fused weight that this one is a part of, see ``fuse``
    fused_start = 0  # its first output column there

    def __init__(self, weight: Array, arena: WeightArena | None = None):
        if weight.ndim != 2:
            raise InputError(f"Dense: a weight is a matrix [M, N], got shape {tuple(weight.shape)}")
        self._shape: tuple[int, int] = (int(weight.shape[0]), int(weight.shape[1]))
        self._blocks = to_blocks(weight, arena)  # None: the weight stays one matrix
        self._data = weight if self._blocks is None else self._blocks.data

    @classmethod
    def from_blocks(cls, blocks: Blocks) -> Dense:
        """A weight that is stored in blocks already; they are not copied."""
        dense = cls.__new__(cls)
        dense._shape = blocks.shape
        dense._blocks = blocks
        dense._data = blocks.data
        return dense

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)"""
        return self._shape

    @property
    def dtype(self) -> DType:
        """The floating-point type of the weight."""
        return self._data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array; blocks need no more than the matrix."""
        return int(self._data.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """Bits per value of the dtype."""
        return 8.0 * self.nbytes / (self._shape[0] * self._shape[1])

    @property
    def blocked(self) -> bool:
        """Whether the weight is stored in blocks."""
        return self._blocks is not None

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M]."""
        if self._blocks is None:
            return x @ self._data.T
        return self._blocks.matmul(x)

    def rows(self, index: Array) -> Array:
        """W[index] for index[T] → [T, N]: the embedding lookup, also of a tied head (one
        copy serves both).
        """
        if self._blocks is None:
            return self._data[index]
        return self._blocks.rows(index)

    def dequantize(self) -> Array:
        """W[M, N], a new array."""
        if self._blocks is None:
            return self._data.copy()
        return self._blocks.to_matrix()

    def bind(self, x: Array, out: Array) -> Callable[[], object]:
        """A call that multiplies the current contents of x[T, N] and writes x Wᵀ to out[T, M].

        What depends on shapes alone is computed here, once. On the host only;
        T = ``padded_rows(T)`` is fastest.
        """
        if self._blocks is None:
            return partial(NUMPY.matmul, x, self._data.T, out=out)
        return self._blocks.bind(x, out)

    def padded_rows(self, rows: int) -> int:
        """``rows``, or a few more where the padded product takes less time."""
        if self._blocks is None:
            return rows
        return self._blocks.padded_rows(rows)


def as_linear(weight: Weight, arena: WeightArena | None = None) -> Linear:
    """A ``Dense`` of an array; a ``Linear``, such as a quantised weight of a file, is
    returned as it is.
    """
    if hasattr(weight, "dequantize"):
        return cast(Linear, weight)
    return Dense(weight, arena)


def fused_matmul(x: Array, *weights: Linear) -> Array:
    """Multiply x[T, N] by several weights: the results side by side in a new array [T, ΣM].

    Simple version: ``xp.concat([w.matmul(x) for w in weights], axis=1)``. One product where
    the weights are the parts of one fused weight, complete and in order; if one of them has
    been replaced, by a quantised one say, they are multiplied one by one.
    """
    fused = _fused(weights)
    if fused is not None:
        return fused.matmul(x)
    return namespace(x).concat([weight.matmul(x) for weight in weights], axis=1)


def fuse(weights: Iterable[Weight], arena: WeightArena | None = None) -> list[Linear]:
    """Lay weights that multiply the same input (q, k and v, or gate and up) out as one.

    Arrays [M_i, N] → a ``Dense`` each, which can still be used alone; ``fused_matmul`` then
    multiplies by all of them at once. They are not fused but returned one by one on a GPU,
    without an arena, or where one of them is a ``Linear`` already (it is returned as it
    is), has M that is no multiple of 64, or has another dtype than the arena.
    """
    given = list(weights)
    arrays = []
    if arena is not None:
        arrays = [w for w in given if arena.accepts(w) and has_blocks(w.shape)]
    if arena is None or len(given) == 1 or len(arrays) < len(given):
        return [as_linear(weight, arena) for weight in given]
    m = sum(len(weight) for weight in arrays)  # ΣM
    n = arrays[0].shape[1]
    layout = layout_for(m)
    width = layout.width(m)
    data = arena.allocate(m * n).reshape(-1, n, width)  # [ΣM/w, N, w]
    fused = Dense.from_blocks(layout(data))
    first = 0
    parts: list[Linear] = []
    for weight in arrays:
        last = first + len(weight)
        if width == m:  # one block of all columns: a part is a range of them
            place = data[:, :, first:last]
        else:
            place = data[first // width : last // width]
        part = Dense.from_blocks(layout(place).fill(weight))
        part.fused = fused
        part.fused_start = first
        first = last
        parts.append(part)
    return parts


def bind_fused(x: Array, out: Array, weights: Sequence[Dense]) -> Callable[[], object]:
    """``fused_matmul`` for repeated use: a call multiplies the current contents of x[T, N]
    and writes to out[T, ΣM].
    """
    fused = _fused(weights)
    if fused is not None:
        return fused.bind(x, out)
    calls = []
    start = 0
    for weight in weights:
        stop = start + weight.shape[0]
        calls.append(weight.bind(x, out[:, start:stop]))
        start = stop
    if len(calls) == 1:
        return calls[0]
    return lambda: [call() for call in calls]


def _fused(weights: Sequence[Linear]) -> Dense | None:
    """The fused weight that has exactly these parts, in this order; None if there is none."""
    first = weights[0]
    fused = first.fused if isinstance(first, Dense) else None
    if fused is None:
        return None
    stop = 0
    for weight in weights:
        if not isinstance(weight, Dense) or weight.fused is not fused:
            return None
        if weight.fused_start != stop:
            return None
        stop += weight.shape[0]
    return fused if stop == fused.shape[0] else None
