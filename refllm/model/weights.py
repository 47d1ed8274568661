"""Weights that know how to multiply: the ``Linear`` interface and its plain form, ``Dense``.

Every quantised form has the same interface, so the network never asks how a weight is
stored.

| symbol | name                                          | shape      |
|--------|-----------------------------------------------|------------|
| W      | weight, output × input                        | [M, N]     |
| x      | inputs of T tokens                            | [T, N]     |
| ΣM     | outputs of weights that multiply the same x   |            |

Read ``Linear``, ``Dense`` and ``fused_matmul``; the rest of the file arranges the same
values so that OpenBLAS multiplies them faster, and changes no result beyond rounding.

Left out: biases (the network adds them), sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from math import prod
from typing import Protocol, TypeAlias, TypeGuard, cast

import numpy as np
from threadpoolctl import threadpool_info

from refllm.backend import NUMPY, Array, DType, namespace
from refllm.errors import InputError


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

    The array is kept as it is, and copied only where it is stored in blocks (see ``Blocks``
    below): into ``arena``, or into an array of its own if there is no arena or it holds
    another dtype. ValueError if ``weight`` is not a matrix.
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

        What depends on shapes alone is computed here, once. On the host only, for fewer
        than 128 rows; T = ``padded_rows(T)`` is fastest.
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


# --- Layout for OpenBLAS: skip on first reading ---------------------------------------------
#
# OpenBLAS copies ("packs") the operands of every product, which for a few rows costs five
# times the product itself, unless both are small: with AVX-512 it has kernels that read up
# to 10⁶ multiply-adds without packing (``benchmarks/layout.py`` measures both layouts).
# There, on the host,
#
# - a weight is stored as blocks of 64 output columns, [M/64, N, 64], and multiplied as one
#   batched matmul;
# - rows are split into groups small enough that a group and a block stay below 10⁶;
# - from 128 rows on packing pays, and pays best for wide operands: blocks are copied side
#   by side for the product, which costs little and is as fast as one matrix;
# - 1 and 3 rows are padded to 2 and 4: the matrix-vector kernel takes twice as long, and
#   three rows 1.4 times.
#
# Without AVX-512 every matrix is packed. There a weight is one block of all columns,
# [1, N, M], since packing much at once costs least, and up to 3 rows go one by one through
# the matrix-vector kernel, which never packs. From there on the AVX2 kernel takes rows in
# fours: 5 to 7 rows cost more than 8, so they are padded.
#
# On a GPU, or where M is no multiple of 64 (the keys of a small draft model), the weight
# stays one matrix. Left out: groups of rows where N is above 3,906, for then not even
# 4 rows and a block stay below 10⁶.

BLOCK = 64  # output columns per block: the widest that OpenBLAS multiplies without packing
MATVEC_ROWS = 3  # up to so many rows are multiplied one by one, where products are packed
KERNEL_ROWS = 4  # rows that the AVX2 kernel takes at a time; it halves a rest of 1 to 3
PADDED_BELOW = 64  # from so many rows on, padding the last few gains nothing measurable
# from so many rows on packing pays, and blocks are laid side by side
PACKED_FROM = 128  # mutate: equivalent (speed alone)
PACKED_SIZE = 2**20  # elements of a weight that are laid side by side at a time
# multiply-adds of the largest product that OpenBLAS does not pack
# (sgemm_small_kernel_permit for SkylakeX)
SMALL_PRODUCT = 10**6  # mutate: equivalent (speed alone)
_CACHE_LINE = 64  # bytes, also of a vector: one that straddles two lines is read twice

Product = tuple[Array, Array, Array]  # left, right, result


class Blocks:
    """W[M, N] as blocks of w output columns: data[M/w, N, w], on the host."""

    def __init__(self, data: Array):
        count, n, width = data.shape
        self.data = data
        self.shape = (count * width, n)  # (M, N)
        # one block holds all columns, and its products are packed
        self._single = count == 1 and (width != BLOCK or not has_small_kernels())

    def fill(self, weight: Array) -> Blocks:
        """Copy W[M, N] into the blocks; returns them."""
        count, n, width = self.data.shape
        self.data[...] = weight.reshape(count, width, n).transpose(0, 2, 1)  # [M/w, N, w]
        return self

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M]."""
        rows = x.shape[0]
        if rows >= PACKED_FROM and not self._single:  # mutate: equivalent (speed alone)
            return self._matmul_packed(x)
        more = self.padded_rows(rows) - rows
        if more:
            x = NUMPY.concat((x, x[-more:]))  # any row will do: the result is cut off
        out: Array = NUMPY.empty(
            (rows + more, self.shape[0]), dtype=NUMPY.result_type(x, self.data)
        )
        for left, right, result in self._split(x, out):
            NUMPY.matmul(left, right, out=result)
        return out[:rows] if more else out

    def bind(self, x: Array, out: Array) -> Callable[[], object]:
        """``Dense.bind``: a call writes the product of what x holds then to ``out``."""
        products = [
            partial(NUMPY.matmul, left, right, out=result)
            for left, right, result in self._split(x, out)
        ]
        if len(products) == 1:
            return products[0]
        return lambda: [product() for product in products]

    def padded_rows(self, rows: int) -> int:
        """``Dense.padded_rows``: the number of rows, at least ``rows``, that is fastest."""
        if self._single:
            if MATVEC_ROWS < rows < PADDED_BELOW:
                return rows + -rows % KERNEL_ROWS
            return rows
        return rows + 1 if rows in (1, 3) else rows

    def _split(self, x: Array, out: Array) -> list[Product]:
        """The products (left, right, result) that write x[T, N] Wᵀ to out[T, M], as views."""
        if self._single:
            if x.shape[0] <= MATVEC_ROWS:
                return [(x[:, None], self.data[0], out[:, None])]  # T times [1, N] @ [N, M]
            return [(x, self.data[0], out)]
        rows = x.shape[0]
        m, n = self.shape
        most = SMALL_PRODUCT // (BLOCK * n)  # rows that are multiplied without packing
        groups = -(-rows // most) if most >= 4 else 1  # mutate: equivalent (speed alone)
        group = -(-rows // groups) if rows else 1  # rows of a group, as even as they can be
        full = rows - rows % group
        # [groups, 1, group, N] @ [M/64, N, 64], each product written to its place in out
        left = x[:full].reshape(-1, 1, group, n)
        result = out[:full].reshape(-1, group, m // BLOCK, BLOCK).transpose(0, 2, 1, 3)
        products = [(left, self.data, result)]
        if full < rows:  # the last, smaller group: [rest, N] @ [M/64, N, 64]
            rest = out[full:].reshape(-1, m // BLOCK, BLOCK).transpose(1, 0, 2)
            products.append((x[full:], self.data, rest))
        return products

    def _matmul_packed(self, x: Array) -> Array:
        """``matmul`` of many rows: some blocks at a time are laid side by side, as a matrix
        [N, columns].
        """
        out: Array = NUMPY.empty((x.shape[0], self.shape[0]), dtype=NUMPY.result_type(x, self.data))
        n = self.shape[1]
        start = 0
        count = max(1, PACKED_SIZE // (BLOCK * n))
        for first in range(0, self.data.shape[0], count):
            blocks = self.data[first : first + count]
            matrix = blocks.transpose(1, 0, 2).reshape(n, -1)  # [N, columns], a copy
            stop = start + matrix.shape[1]
            NUMPY.matmul(x, matrix, out=out[:, start:stop])
            start = stop
        return out

    def rows(self, index: Array) -> Array:
        """W[index] for index[T] → [T, N]."""
        width = self.data.shape[2]
        if width == self.shape[0]:  # a single block, which is Wᵀ
            return self.data[0].T[index]
        return self.data[index // width, :, index % width]

    def to_matrix(self) -> Array:
        """W[M, N], a new array."""
        # an explicit copy: of a block as wide as it is high, reshape alone returns a view
        return self.data.transpose(0, 2, 1).copy().reshape(self.shape)


class WeightArena:
    """One array for the blocks of many weights, in the order in which they are laid out.

    From 4 MB on NumPy asks for huge pages. In pages of 4 KB the weights of a small model,
    each below 4 MB, are more pages than a processor's table of them (its TLB) holds, which
    costs a tenth of a decode step at batch size 1.
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]], like: Array):
        """Reserve memory for weights of ``shapes``; those that are not stored in blocks, as
        on a GPU, need none here.
        """
        size = 0
        if namespace(like) is NUMPY:
            size = sum(prod(shape) for shape in shapes if is_blocked_shape(shape))
        spare = np.empty(size + _CACHE_LINE, dtype=like.dtype)
        first = -spare.__array_interface__["data"][0] % _CACHE_LINE // spare.itemsize
        self.buffer = spare[first : first + size]  # starts at a cache line
        self.used = 0

    def accepts(self, weight: object) -> TypeGuard[np.ndarray]:
        """Whether a weight is a host array of the dtype that is laid out here."""
        return isinstance(weight, np.ndarray) and weight.dtype == self.buffer.dtype

    def allocate(self, size: int) -> Array:
        """The next ``size`` elements, [used, used + size)."""
        self.used += size
        return self.buffer[self.used - size : self.used]


def to_blocks(weight: Array, arena: WeightArena | None = None) -> Blocks | None:
    """W[M, N] in blocks, in ``arena`` if it accepts the weight; None if a weight of this
    shape or library stays a matrix.
    """
    m, n = weight.shape
    if namespace(weight) is not NUMPY or not is_blocked_shape((m, n)):
        return None
    if arena is not None and arena.accepts(weight):
        memory = arena.allocate(m * n)
    else:
        memory = np.empty(m * n, dtype=weight.dtype)
    return Blocks(memory.reshape(-1, n, block_width(m))).fill(weight)


def is_blocked_shape(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is stored in blocks on the host."""
    return len(shape) == 2 and shape[0] % BLOCK == 0


def block_width(columns: int) -> int:
    """Output columns of a block: 64 where small products are not packed, else all."""
    return BLOCK if has_small_kernels() else columns


@cache
def has_small_kernels() -> bool:
    """Whether this BLAS multiplies small operands without packing: OpenBLAS does on
    processors with AVX-512.
    """
    with_kernels = ("SkylakeX", "Cooperlake", "SapphireRapids")
    return any(
        pool["internal_api"] == "openblas" and pool["architecture"] in with_kernels
        for pool in threadpool_info()
    )


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
        arrays = [w for w in given if arena.accepts(w) and is_blocked_shape(w.shape)]
    if arena is None or len(given) == 1 or len(arrays) < len(given):
        return [as_linear(weight, arena) for weight in given]
    m = sum(len(weight) for weight in arrays)  # ΣM
    n = arrays[0].shape[1]
    width = block_width(m)
    data = arena.allocate(m * n).reshape(-1, n, width)  # [ΣM/w, N, w]
    fused = Dense.from_blocks(Blocks(data))
    first = 0
    parts: list[Linear] = []
    for weight in arrays:
        last = first + len(weight)
        if width == m:  # one block of all columns: a part is a range of them
            place = data[:, :, first:last]
        else:
            place = data[first // width : last // width]
        part = Dense.from_blocks(Blocks(place).fill(weight))
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
