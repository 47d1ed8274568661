"""Weights that know how to multiply: the ``Linear`` seam and its plain form, ``Dense``.

Every quantised form has the same face, so the network never asks what a weight is made of.

``Dense`` chooses its layout and cuts its products (``benchmarks/layout.py`` measures both).
OpenBLAS packs the operands of a product anew each time, which for a few rows costs five
times the product itself, unless both are small: with AVX-512 it reads up to 10⁶
multiply-adds where they lie. There, on the host,

- a weight is stored as blocks of 64 output columns, [M/64, N, 64], and multiplied as one
  batched matmul;
- rows are cut into groups that stay below 10⁶ with a block;
- from 128 rows on packing pays, and wide operands pay best: the blocks are laid side by
  side for the product, a copy that costs little of it, and it is as fast as that of one
  matrix;
- 1 and 3 rows are multiplied as 2 and 4: the matrix-vector kernel, and three rows, take
  twice and 1.4 times as long.

Without AVX-512 it packs whatever is a matrix. There a weight is one block of all columns,
[1, N, M], for packing many at a time costs least, and up to 3 rows go through the
matrix-vector kernel, which never packs, one by one. From there on its AVX2 kernel takes
rows in fours: 5 to 7 rows cost more than 8, so a rest is filled up.

On a GPU, or where M is no multiple of 64 (the keys of a small draft model), the weight
stays one matrix. ``Room`` lays the weights of a network side by side in memory; those that
multiply the same input are one product in ``model.weights``.

Left out: biases (the network adds them), sharding; cutting rows into groups where N is
above 3,906, for then no 4 rows and a block stay below 10⁶.

<<MERGED>>
Weights that multiply the same input, q, k and v or gate and up, as one product.

``side_by_side`` lays them out as one joint weight, of which each is a part that can still
be used by itself; ``product`` multiplies by all at once, and ``bound`` does so again and
again.

| symbol | name                     | shape    |
|--------|--------------------------|----------|
| x      | what all of them multiply| [T, N]   |
| M_i    | outputs of weight i      |          |

Left out: joint weights on a GPU, without a ``Room``, or where one of them is quantised or
its M no multiple of 64: these are multiplied one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from math import prod
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_info

from refllm.backend import Array, namespace

BLOCK = 64  # output columns a block: the widest that OpenBLAS multiplies without repacking
FEW = 3  # rows that are multiplied one by one, where each product would pack the weight
# rows that the AVX2 kernel takes at a time; 1 to 3 over are multiplied in halves, and cost
# more than 4
TILE = 4
MANY = 64  # rows from which the rest no longer shows
PREFILL = 128  # rows from which OpenBLAS had better pack, and the blocks lie side by side
WIDE = 2**20  # numbers of a weight that are laid side by side at a time
# multiply-adds of a product that OpenBLAS does not pack (sgemm_small_kernel_permit,
# SkylakeX)
SMALL = 10**6
_LINE = 64  # bytes of a cache line, and of a vector: one that straddles two lines is read twice


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


class Room:
    """One array for the blocks of many weights, in the order in which they are laid out.

    From 4 MB on NumPy asks for huge pages. In pages of 4 KB the weights of a small model,
    each below 4 MB, are more pages than a processor's table of them holds: a tenth of a
    decode step at batch 1.
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]], like: Array):
        """``shapes`` of all weights to come; those that are not stored in blocks, as on a
        GPU, take no room.
        """
        if namespace(like) is np:
            count = sum(prod(shape) for shape in shapes if in_blocks(shape))
        else:
            count = 0
        spare = np.empty(count + _LINE, dtype=like.dtype)
        first = -spare.__array_interface__["data"][0] % _LINE // spare.itemsize
        self.numbers = spare[first : first + count]
        self.used = 0

    def holds(self, weight: Any) -> bool:
        """Is it a host array of the type that is laid out here?"""
        return isinstance(weight, np.ndarray) and weight.dtype == self.numbers.dtype

    def take(self, count: int) -> Array:
        """The next ``count`` numbers."""
        self.used += count
        return self.numbers[self.used - count : self.used]


class Dense:
    """A floating-point weight W[M, N]; the array passed in is copied only if the layout
    changes.

    ``room`` gives the place of its blocks; without one, or for another dtype, they are an
    array of their own.
    """

    joint: Dense | None = None  # the weight that this one is a part of, see ``joint.side_by_side``
    first = 0  # its first output column there

    def __init__(self, weight: Array, room: Room | None = None):
        if weight.ndim != 2:
            raise ValueError(f"Dense: a weight is a matrix [M, N], got shape {tuple(weight.shape)}")
        self._shape: tuple[int, int] = (int(weight.shape[0]), int(weight.shape[1]))
        self.blocked = namespace(weight) is np and in_blocks(self._shape)
        if not self.blocked:
            self._data = weight
            return
        m, n = self._shape
        if room is not None and room.holds(weight):
            numbers = room.take(m * n)
        else:
            numbers = np.empty(m * n, dtype=weight.dtype)
        self._fill(numbers.reshape(-1, n, block_width(m)), weight)

    @classmethod
    def _of_blocks(cls, data: Array, weight: Array | None = None) -> Dense:
        """The weight whose blocks [M/w, N, w] lie at ``data``, or are to be written there."""
        dense = cls.__new__(cls)
        dense._shape = (data.shape[0] * data.shape[2], data.shape[1])
        dense.blocked = True
        dense._data = data
        if weight is not None:
            dense._fill(data, weight)
        return dense

    def _fill(self, data: Array, weight: Array) -> None:
        blocks, n, width = data.shape
        self._data = data
        data[...] = weight.reshape(blocks, width, n).transpose(0, 2, 1)

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
        rows = x.shape[0]
        if rows >= PREFILL and not self._one_block:
            return self._by_matrices(x)
        if more := self.full(rows) - rows:
            x = np.concatenate((x, x[-more:]))
        out = np.empty((rows + more, self._shape[0]), dtype=self._dtype(x))
        for left, right, result in self._cut(x, out):
            np.matmul(left, right, out=result)
        return out[:rows] if more else out

    def bind(self, x: Array, out: Array) -> Callable[[], object]:
        """A call multiplies what x[T, N] holds by then, and writes x Wᵀ to out[T, M]; on
        the host, T < 128.

        All that depends on shapes alone is done here, once. T = ``full(T)`` is fastest.
        """
        products = [
            partial(np.matmul, left, right, out=result) for left, right, result in self._cut(x, out)
        ]
        if len(products) == 1:
            return products[0]
        return lambda: [product() for product in products]

    def full(self, rows: int) -> int:
        """``rows``, or a few more where these take less time."""
        if not self.blocked:
            return rows
        if self._one_block:
            return rows + -rows % TILE if FEW < rows < MANY else rows
        return rows + 1 if rows in (1, 3) else rows

    @property
    def _one_block(self) -> bool:
        width = self._data.shape[2]
        return bool(width == self._shape[0] and (width != BLOCK or not reads_in_place()))

    def _dtype(self, x: Array) -> Any:
        if x.dtype == self._data.dtype:
            return x.dtype
        return np.result_type(x, self._data)

    def _cut(self, x: Array, out: Array) -> list[tuple[Array, Array, Array]]:
        """The products (left, right, result) that write x[T, N] Wᵀ to out[T, M], as views
        of the three.
        """
        if not self.blocked:
            return [(x, self._data.T, out)]
        rows = x.shape[0]
        columns, n = self._shape
        if self._one_block:
            one_by_one = slice(None), None
            return [
                (x[one_by_one], self._data[0], out[one_by_one])
                if rows <= FEW
                else (x, self._data[0], out)
            ]
        most = SMALL // (BLOCK * n)  # rows that OpenBLAS multiplies with a block as they lie
        groups = -(-rows // most) if most >= 4 else 1
        group = -(-rows // groups) if rows else 1  # as even as they can be
        whole = rows - rows % group
        # [groups, 1, group, N] by [M/64, N, 64], each product written straight to where it
        # belongs in out
        cut = [
            (
                x[:whole].reshape(-1, 1, group, n),
                self._data,
                out[:whole].reshape(-1, group, columns // BLOCK, BLOCK).transpose(0, 2, 1, 3),
            )
        ]
        if whole < rows:
            cut.append(
                (
                    x[whole:],
                    self._data,
                    out[whole:].reshape(-1, columns // BLOCK, BLOCK).transpose(1, 0, 2),
                )
            )
        return cut

    def _by_matrices(self, x: Array) -> Array:
        """``matmul`` of many rows: some blocks at a time are laid side by side, as a matrix
        [N, columns].
        """
        out = np.empty((x.shape[0], self._shape[0]), dtype=self._dtype(x))
        n = self._shape[1]
        at = 0
        step = max(1, WIDE // (BLOCK * n))
        for first in range(0, self._data.shape[0], step):
            matrix = self._data[first : first + step].transpose(1, 0, 2).reshape(n, -1)  # a copy
            np.matmul(x, matrix, out=out[:, at : at + matrix.shape[1]])
            at += matrix.shape[1]
        return out

    def rows(self, index: Array) -> Array:
        """W[index] for index[T] → [T, N]: the embedding lookup, also of a tied head (one
        copy serves both).
        """
        if not self.blocked:
            return self._data[index]
        width = self._data.shape[2]
        if width == self._shape[0]:  # one block: a column each
            return self._data[0].T[index]
        return self._data[index // width, :, index % width]

    def dequantize(self) -> Array:
        """W[M, N], a new array."""
        if self.blocked:
            # a copy by name: of a block as wide as it is high, reshape alone would return a
            # view
            return self._data.transpose(0, 2, 1).copy().reshape(self._shape)
        return self._data.copy()


def block_width(columns: int) -> int:
    """Output columns of a block: 64 where small products are not packed, else all."""
    return BLOCK if reads_in_place() else columns


@cache
def reads_in_place() -> bool:
    """Does this BLAS multiply small operands where they lie? OpenBLAS does on processors
    with AVX-512.
    """
    with_kernels = ("SkylakeX", "Cooperlake", "SapphireRapids")
    return any(
        pool["internal_api"] == "openblas" and pool["architecture"] in with_kernels
        for pool in threadpool_info()
    )


def as_linear(weight: Any, room: Room | None = None) -> Any:
    """A ``Dense`` of an array; what is a ``Linear`` already, such as a quantised weight of
    a file, as it is.
    """
    if hasattr(weight, "dequantize"):
        return weight
    return Dense(weight, room)


def in_blocks(shape: tuple[int, ...]) -> bool:
    """Is a weight of this shape stored in blocks on the host?"""
    return len(shape) == 2 and shape[0] % BLOCK == 0


def side_by_side(weights: Iterable[Any], room: Room | None = None) -> list[Any]:
    """A ``Dense`` each of arrays of the same N; those that find ``room`` together are also
    views of a joint weight.

    A ``Linear`` among them stays what it is.
    """
    given = list(weights)
    shapes = [(int(w.shape[0]), int(w.shape[1])) for w in given]
    if (
        room is None
        or len(given) == 1
        or not all(
            room.holds(weight) and in_blocks(shape)
            for weight, shape in zip(given, shapes, strict=True)
        )
    ):  # a GPU, a ragged M, another dtype
        return [as_linear(weight, room) for weight in given]
    m = sum(shape[0] for shape in shapes)
    n = shapes[0][1]
    width = block_width(m)
    first = 0
    parts = []
    joint = Dense._of_blocks(room.take(m * n).reshape(-1, n, width))
    for weight, (rows, _) in zip(given, shapes, strict=True):
        last = first + rows
        if width == m:
            place = joint._data[:, :, first:last]
        else:
            place = joint._data[first // width : last // width]
        part = Dense._of_blocks(place, weight)
        part.joint = joint
        part.first = first
        first = last
        parts.append(part)
    return parts


def product(x: Array, *weights: Linear) -> Array:
    """x[T, N] times each of the weights, the results side by side in a new array, [T, ΣM].

    One product where they are a joint weight, whole and in order. Where one of them was
    exchanged, for a quantised one say, they are multiplied one by one.
    """
    joint = _joint(weights)
    if joint is not None:
        return joint.matmul(x)
    return namespace(x).concat([weight.matmul(x) for weight in weights], axis=1)


def bound(x: Array, out: Array, weights: Sequence[Dense]) -> Callable[[], object]:
    """``product`` again and again: a call multiplies what x[T, N] holds by then, and writes
    to out[T, ΣM].
    """
    joint = _joint(weights)
    if joint is not None:
        return joint.bind(x, out)
    calls = []
    edge = 0
    for weight in weights:
        calls.append(weight.bind(x, out[:, edge : edge + weight.shape[0]]))
        edge += weight.shape[0]
    if len(calls) == 1:
        return calls[0]
    return lambda: [call() for call in calls]


def _joint(weights: Sequence[Any]) -> Dense | None:
    """The joint weight that these are, whole and in order."""
    joint: Dense | None = getattr(weights[0], "joint", None)
    edge = 0
    for weight in weights if joint is not None else ():
        if getattr(weight, "joint", None) is not joint or getattr(weight, "first", None) != edge:
            return None
        edge += weight.shape[0]
    if joint is not None and edge == joint.shape[0]:
        return joint
    return None
