"""How a weight lies in memory so that OpenBLAS multiplies few rows by it fast: skip on first
reading. A layout holds the values of the matrix, once, and changes no result beyond rounding.

A decode step multiplies 1 to 16 rows by every weight of the model. Reading the weights takes
most of the time, and OpenBLAS makes it worse in two ways. It copies ("packs") the operands of
a matrix product, which for a few rows costs several times the product itself. And it walks
through a wide matrix in pieces of columns, which defeats the processor's prefetching unless a
piece is long or the matrix narrow. Which layout avoids that depends on the kernels that
OpenBLAS has chosen for this processor, and on its threads:

| kernels           | threads | weight               | layout        | data          |
|-------------------|---------|----------------------|---------------|---------------|
| AVX-512           | any     | any                  | ``Blocks``    | [M/64, N, 64] |
| AVX2              | one     | M ≤ 1,024            | ``Tiles``     | [M/32, N, 32] |
| AVX2              | one     | M > 1,024            | ``OneBlock``  | [1, N, M]     |
| AVX2              | more    | any                  | ``OneBlock``  | [1, N, M]     |
| another BLAS      | any     | any                  | ``OneBlock``  | [1, N, M]     |
| any, or a GPU     | any     | M no multiple of 64  | the matrix    | [M, N]        |

``benchmarks/layout.py`` measures them against the plain matrix. The table is fixed rather than
measured at start-up, because layouts round differently: a model gives the same bits in every
run on one machine. What rounds how:

- ``Blocks``: a row of the result has the same bits whatever rows are multiplied with it, up to
  127 rows (``PACKED_FROM`` − 1), and on any number of threads: OpenBLAS leaves such small
  products to one thread, so the blocks of a large weight are divided among ``helper_threads``.
- ``Tiles``, ``OneBlock``: the same for up to ``MATVEC_ROWS`` rows (6 and 3), which go one by
  one through the matrix-vector kernel.
- Otherwise results are equal within rounding: N·ε·Σ|x w| bounds the difference in any order of
  summation.

| symbol | name                                 | shape         |
|--------|--------------------------------------|---------------|
| W      | weight, output × input               | [M, N]        |
| w      | output columns of a block            |               |
| x      | inputs of T tokens                   | [T, N]        |

Left out: layouts for other libraries than OpenBLAS, groups of rows where N is above 3,906 (not
even 4 rows and a block of 64 columns stay below 10⁶ multiply-adds).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from math import prod
from typing import ClassVar, TypeGuard, cast

import numpy as np
from threadpoolctl import LibController, ThreadpoolController

from refllm.backend import NUMPY, Array, namespace
from refllm.model.helper_threads import Call, helper_threads
from refllm.openblas import is_zen4, read_cpuinfo

COLUMNS = 64  # a weight whose M is no multiple of this stays a matrix
AVX512_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")  # OpenBLAS's names of its families
AVX2_KERNELS = ("Haswell", "Zen")
# multiply-adds of the largest product that OpenBLAS does not pack
# (sgemm_small_kernel_permit for SkylakeX)
SMALL_PRODUCT = 10**6  # mutate: equivalent (speed alone)
# most output columns of a weight in tiles
NARROW = 1024  # mutate: equivalent (a multiple of 64 decides)
KERNEL_ROWS = 4  # rows that the AVX2 kernel takes at a time; it halves a rest of 1 to 3
# from so many rows on, padding the last few gains nothing measurable
PADDED_BELOW = 64  # mutate: equivalent (speed alone)
_CACHE_LINE = 64  # bytes, also of a vector: one that straddles two lines is read twice


class Blocks:
    """W[M, N] as blocks of w output columns: data[M/w, N, w], on the host. This class is the
    layout for AVX-512 kernels, w = 64; the others derive from it.

    AVX-512 kernels read up to 10⁶ multiply-adds without packing: a block and a group of rows.
    One row is padded to 2 and three to 4, since a product of 1 row goes through the
    matrix-vector kernel, which takes twice as long.
    """

    WIDTH: ClassVar[int] = 64  # the widest block that is multiplied without packing
    # From so many rows on packing pays, and pays best for wide operands: blocks are copied side
    # by side for the product, which costs little and is as fast as one matrix.
    PACKED_FROM: ClassVar[int] = 128  # mutate: equivalent (speed alone)
    PACKED_SIZE: ClassVar[int] = 2**20  # elements of a weight that are laid side by side at a time
    # elements × rows from which on helper threads save more than they cost; up to 4 rows take
    # as long as one, which reads the weight from memory
    DIVIDED_FROM: ClassVar[int] = 2**21

    def __init__(self, data: Array):
        count, n, width = data.shape
        self.data = data
        self.shape = (count * width, n)  # (M, N)

    @classmethod
    def width(cls, columns: int) -> int:
        """w for a weight of M = ``columns``."""
        return cls.WIDTH

    def fill(self, weight: Array) -> Blocks:
        """Copy W[M, N] into the blocks; returns them."""
        count, n, width = self.data.shape
        self.data[...] = weight.reshape(count, width, n).transpose(0, 2, 1)  # [M/w, N, w]
        return self

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M]."""
        rows = x.shape[0]
        more = self.padded_rows(rows) - rows
        if more:
            x = NUMPY.concat((x, x[-more:]))  # any row will do: the result is cut off
        out: Array = NUMPY.empty(
            (rows + more, self.shape[0]), dtype=NUMPY.result_type(x, self.data)
        )
        self.bind(x, out)()
        return out[:rows] if more else out

    def bind(self, x: Array, out: Array) -> Call:
        """``Dense.bind``: a call writes the product of what x[T, N] holds then to out[T, M]."""
        if x.shape[0] >= self.PACKED_FROM and self.packing_pays():
            return partial(self._multiply_side_by_side, x, out)
        shares = self.shares(x.shape[0])
        if len(shares) == 1:
            return _in_order(self.products(x, out))
        width = self.data.shape[2]
        calls = []
        for first, last in shares:
            columns = out[:, first * width : last * width]
            calls.append(_in_order(type(self)(self.data[first:last]).products(x, columns)))
        return partial(helper_threads(len(shares) - 1).run, calls)

    def packing_pays(self) -> bool:
        """Whether many rows are multiplied faster from packed operands: not on one thread of a
        Zen 4, where a prefill is 1.1 times as fast without packing.
        """
        return blas_threads() > 1 or not runs_on_zen4()

    def shares(self, rows: int) -> list[tuple[int, int]]:
        """Ranges of blocks [first, last) that threads multiply at the same time."""
        count = self.data.shape[0]
        threads = 1
        if self.DIVIDED_FROM <= self.data.size * max(rows, 4):
            threads = min(blas_threads(), count)
        ends = [count * i // threads for i in range(threads + 1)]
        return list(itertools.pairwise(ends))

    def padded_rows(self, rows: int) -> int:
        """``Dense.padded_rows``: the number of rows, at least ``rows``, that is fastest."""
        return rows + 1 if rows in (1, 3) else rows

    def products(self, x: Array, out: Array) -> list[Call]:
        """The array calls that write x[T, N] Wᵀ to out[T, M], for few rows."""
        rows = x.shape[0]
        count, n, width = self.data.shape
        most = SMALL_PRODUCT // (width * n)  # rows that are multiplied without packing
        groups = -(-rows // most) if most >= 4 else 1  # mutate: equivalent (speed alone)
        group = -(-rows // groups) if rows else 1  # rows of a group, as even as they can be
        full = rows - rows % group
        # [groups, 1, group, N] @ [M/w, N, w], each product written to its place in out
        left = x[:full].reshape(-1, 1, group, n)
        result = out[:full].reshape(-1, group, count, width).transpose(0, 2, 1, 3)
        calls: list[Call] = [partial(NUMPY.matmul, left, self.data, out=result)]
        if full < rows:  # the last, smaller group
            calls.append(self._multiply_blocks(x[full:], out[full:]))
        return calls

    def _multiply_blocks(self, x: Array, out: Array) -> Call:
        """One product per block, of all rows: [T, N] @ [M/w, N, w] → [M/w, T, w], a view."""
        count, _, width = self.data.shape
        result = out.reshape(-1, count, width).transpose(1, 0, 2)
        return partial(NUMPY.matmul, x, self.data, out=result)

    def _multiply_side_by_side(self, x: Array, out: Array) -> None:
        """The product of many rows: some blocks at a time are copied side by side, as a
        matrix [N, columns].
        """
        count, n, width = self.data.shape
        step = max(1, self.PACKED_SIZE // (width * n))  # blocks at a time
        scratch = NUMPY.empty((n, min(step, count), width), dtype=self.data.dtype)
        for first in range(0, count, step):
            blocks = self.data[first : first + step]
            matrix = scratch.reshape(-1)[: blocks.size].reshape(n, -1, width)
            matrix[...] = blocks.transpose(1, 0, 2)
            columns = slice(first * width, first * width + blocks.shape[0] * width)
            NUMPY.matmul(x, matrix.reshape(n, -1), out=out[:, columns])

    def rows(self, index: Array) -> Array:
        """W[index] for index[T] → [T, N]."""
        width = self.data.shape[2]
        return self.data[index // width, :, index % width]

    def to_matrix(self) -> Array:
        """W[M, N], a new array."""
        # an explicit copy: of a block as wide as it is high, reshape alone returns a view
        return self.data.transpose(0, 2, 1).copy().reshape(self.shape)


class Tiles(Blocks):
    """The layout of a narrow weight for AVX2 kernels and one thread: blocks of 32 columns.

    The matrix-vector kernel takes 8 inputs at a time, which with 32 columns are one piece of
    1 KB: it reads memory in order, from the first value of the weight to the last. For several
    rows the tiles are the outer loop and the rows the inner one, so that a tile is read from
    memory by the first row, and from the second cache by the others.
    """

    WIDTH: ClassVar[int] = 32
    MATVEC_ROWS: ClassVar[int] = 6  # up to so many rows are multiplied one by one
    PACKED_FROM: ClassVar[int] = 96  # mutate: equivalent (speed alone)
    DIVIDED_FROM: ClassVar[int] = 2**62  # never: with more threads there are no tiles
    PACKED_SIZE: ClassVar[int] = 2**17

    def packing_pays(self) -> bool:
        """Always: these kernels pack anyway."""
        return True

    def padded_rows(self, rows: int) -> int:
        """``Dense.padded_rows``."""
        return _padded_to_kernel(rows, self.MATVEC_ROWS)

    def products(self, x: Array, out: Array) -> list[Call]:
        """``Blocks.products``."""
        rows = x.shape[0]
        if rows > self.MATVEC_ROWS:
            return [self._multiply_blocks(x, out)]
        count, _, width = self.data.shape
        result = out.reshape(rows, 1, count, width).transpose(2, 0, 1, 3)  # [M/w, T, 1, w]
        # [1, T, 1, N] @ [M/w, 1, N, w]. Without order="C" NumPy would choose the loops by the
        # strides of the result, and make the rows the outer one.
        matmul = cast("Callable[..., Array]", NUMPY.matmul)  # CuPy's has no order
        return [partial(matmul, x[None, :, None], self.data[:, None], out=result, order="C")]


class OneBlock(Blocks):
    """The layout of a wide weight for AVX2 kernels, and the default: Wᵀ, one block of all
    columns.

    Packing much at once costs least; up to 3 rows go one by one through the matrix-vector
    kernel, which never packs, and which OpenBLAS divides among its threads. More rows are
    padded to fours: 5 to 7 rows cost more than 8.
    """

    MATVEC_ROWS: ClassVar[int] = 3  # up to so many rows are multiplied one by one
    PACKED_FROM: ClassVar[int] = 2**62  # never: the block is one matrix
    DIVIDED_FROM: ClassVar[int] = 2**62  # never: OpenBLAS divides it

    @classmethod
    def width(cls, columns: int) -> int:
        """All columns."""
        return columns

    def padded_rows(self, rows: int) -> int:
        """``Dense.padded_rows``."""
        return _padded_to_kernel(rows, self.MATVEC_ROWS)

    def products(self, x: Array, out: Array) -> list[Call]:
        """``Blocks.products``."""
        matrix = self.data[0]  # [N, M]
        if x.shape[0] <= self.MATVEC_ROWS:
            # T times [1, N] @ [N, M]
            return [partial(NUMPY.matmul, x[:, None], matrix, out=out[:, None])]
        return [partial(NUMPY.matmul, x, matrix, out=out)]

    def rows(self, index: Array) -> Array:
        """``Blocks.rows``."""
        return self.data[0].T[index]


def _in_order(calls: Sequence[Call]) -> Call:
    """One call that makes all of them."""
    if len(calls) == 1:
        return calls[0]
    return lambda: [call() for call in calls]


def _padded_to_kernel(rows: int, matvec_rows: int) -> int:
    """Rows with padding for the AVX2 kernel, unless they are multiplied one by one."""
    if matvec_rows < rows < PADDED_BELOW:
        # OpenBLAS divides them between two threads, each of which takes them in fours
        return rows + -rows % (KERNEL_ROWS * min(blas_threads(), 2))
    return rows


# --- which layout -----------------------------------------------------------------------------


def layout_for(columns: int) -> type[Blocks]:
    """The layout of a weight of M = ``columns`` on this processor, by the table above."""
    if has_small_kernels():
        return Blocks
    if columns <= NARROW and has_avx2_kernels() and blas_threads() == 1:
        return Tiles
    return OneBlock


def has_blocks(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is stored in blocks on the host."""
    return len(shape) == 2 and shape[0] % COLUMNS == 0


def to_blocks(weight: Array, arena: WeightArena | None = None) -> Blocks | None:
    """W[M, N] in blocks, in ``arena`` if it accepts the weight; None if a weight of this
    shape or library stays a matrix.
    """
    m, n = weight.shape
    if namespace(weight) is not NUMPY or not has_blocks((m, n)):
        return None
    if arena is not None and arena.accepts(weight):
        memory = arena.allocate(m * n)
    else:
        memory = np.empty(m * n, dtype=weight.dtype)
    layout = layout_for(m)
    return layout(memory.reshape(-1, n, layout.width(m))).fill(weight)


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
            size = sum(prod(shape) for shape in shapes if has_blocks(shape))
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


def has_small_kernels() -> bool:
    """Whether this BLAS multiplies small operands without packing: OpenBLAS does on
    processors with AVX-512.
    """
    return kernel_family() in AVX512_KERNELS


def has_avx2_kernels() -> bool:
    """Whether this is OpenBLAS with the kernels for which ``Tiles`` were measured."""
    return kernel_family() in AVX2_KERNELS


@cache
def kernel_family() -> str:
    """OpenBLAS's name for the kernels that it has chosen ("SkylakeX", "Haswell"); empty for
    another BLAS.
    """
    names = [pool.architecture for pool in _pools() if pool.internal_api == "openblas"]
    return str(names[0]) if names else ""


@cache
def runs_on_zen4() -> bool:
    """Whether this is an AMD processor of the generation Zen 4."""
    return is_zen4(read_cpuinfo())


def blas_threads() -> int:
    """The threads that BLAS uses at present."""
    return max((int(pool.num_threads) for pool in _pools()), default=1)


@cache
def _pools() -> list[LibController]:
    """NumPy's BLAS, as ``threadpoolctl`` controls it."""
    pools: list[LibController] = ThreadpoolController().select(user_api="blas").lib_controllers
    return pools
