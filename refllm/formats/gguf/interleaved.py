"""A weight in the bytes of a GGUF type, rows interleaved so that NumPy unpacks them fast.

A block holds a few bytes of scales before 16 to 128 bytes of codes, so taking the blocks of
a file apart means many short pieces. Here the blocks of 256 or more rows lie side by side, byte by
byte,

    file:         row r, block b, byte k     [M, B, size]
    interleaved:  block b, byte k, row r     [B, size, w]  for each group of w rows

so that a field of w blocks is one contiguous piece, unpacked in one operation, and the
codes become a matrix [N, w] in the order of BLAS's fastest product, x[T, N] @ codes. The
bytes are the file's, in another order: as many, and ``raw`` restores them. llama.cpp
repacks weights likewise, 4 or 8 rows at a time.

A product takes one tile of blocks at a time and combines codes and scales as
``unpacked.Unpacked.products`` says, so no weight is ever held in floats beyond a tile.

| symbol | name                                 | shape   |
|--------|--------------------------------------|---------|
| W      | weight                               | [M, N]  |
| w      | rows of a group                      |         |
| B      | blocks of a row, N / block           |         |
| x      | inputs of T tokens                   | [T, N]  |

Left out: integer products with 8-bit activations; threads (BLAS uses its own).
"""

from __future__ import annotations

from collections.abc import Iterator

from refllm.backend import Array, namespace
from refllm.formats.gguf.arithmetic import without_warnings
from refllm.formats.gguf.codec import UNPACKERS
from refllm.formats.gguf.linear import GGUFLinear
from refllm.formats.gguf.types import gguf_type, row_bytes
from refllm.formats.gguf.unpacked import Unpacked
from refllm.formats.granularity import tile_elements

__all__ = ["InterleavedLinear"]

TILE = (1 << 19, 1 << 26)  # weights unpacked at a time (host, device)
GROUP_ROWS = 256  # rows of a group at least: long enough to unpack
GROUP = 1 << 19  # elements of a group at least, so that it fills a tile


class InterleavedLinear(GGUFLinear):
    """A weight W[M, N] from the bytes uint8 [M, row_bytes] of a block type; ``dtype`` is the
    type that it comes back in. The bytes are copied.
    """

    def _arranged(self, raw: Array) -> Array:
        """The bytes of each group of rows interleaved, uint8 [M · row_bytes]."""
        xp = namespace(raw)
        self._group_rows = max(GROUP_ROWS, GROUP // max(1, self.shape[1]))  # w
        data = xp.empty(raw.size, dtype=xp.uint8)
        for start, stop, group in self._groups(data):
            rows = xp.reshape(raw[start:stop], (stop - start, *group.shape[:2]))
            group[...] = rows.transpose(1, 2, 0)  # [w, B, size] → [B, size, w]
        return data

    @property
    def raw(self) -> Array:
        """The file's bytes, uint8 [M, row_bytes], a new array."""
        xp = namespace(self._data)
        out = xp.empty((self.shape[0], row_bytes(self.type, self.shape[1])), dtype=xp.uint8)
        for start, stop, group in self._groups(self._data):
            out[start:stop] = xp.reshape(group.transpose(2, 0, 1), (stop - start, -1))
        return out

    def rows(self, index: Array) -> Array:
        """W[index] for index[T] → [T, N]; only these rows are dequantised."""
        xp = namespace(self._data, index)
        size = row_bytes(self.type, self.shape[1])
        most = self._group_rows
        start = index // most * most  # first row of the group
        width = xp.minimum(self.shape[0] - start, most)
        first = start * size + index - start  # where byte 0 of the row lies
        places = first[:, None] + width[:, None] * xp.arange(size)[None, :]
        return self._dequantized(xp.take(self._data, places))

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M], in the wider of x's dtype and ``dtype``; its rounding is
        that of ``Unpacked.products``.
        """
        xp = namespace(x, self._data)
        wide = xp.result_type(x.dtype, self.dtype)
        x = xp.astype(x, wide, copy=False)
        out = xp.zeros((x.shape[0], self.shape[0]), dtype=wide)
        for rows, columns, tile in self._unpacked():
            out[:, rows] += tile.products(x[:, columns], wide)
        return out

    def dequantize(self) -> Array:
        """W[M, N] in ``dtype``, a new array."""
        xp = namespace(self._data)
        out = xp.empty(self.shape, dtype=self.dtype)
        with without_warnings(self._data):  # a damaged file may hold scales that are infinite
            for rows, columns, tile in self._unpacked():
                values = tile.values()  # [blocks, block, w]
                out[rows, columns] = xp.reshape(values, (-1, values.shape[-1])).T
        return out

    def damaged_row(self) -> int | None:
        """The first row of the first group that holds a value that is not finite; None if
        all values are finite.
        """
        with without_warnings(self._data):
            for rows, _, tile in self._unpacked():
                if not tile.is_finite():
                    return int(rows.start)
        return None

    def _unpacked(self) -> Iterator[tuple[slice, slice, Unpacked]]:
        """Rows, columns and blocks [blocks, block, w] of each tile."""
        block = gguf_type(self.type).block
        for start, stop, group in self._groups(self._data):
            step = max(1, tile_elements(group, TILE) // (block * (stop - start)))  # blocks
            for first in range(0, group.shape[0], step):
                part = group[first : first + step]
                columns = slice(first * block, (first + part.shape[0]) * block)
                yield slice(start, stop), columns, UNPACKERS[self.type](part)

    def _groups(self, data: Array) -> Iterator[tuple[int, int, Array]]:
        """(first row, last row + 1, their bytes [B, size, w], a view of ``data``) of each group."""
        xp = namespace(data)
        size = row_bytes(self.type, self.shape[1])
        most = self._group_rows
        for start in range(0, self.shape[0], most):
            stop = min(start + most, self.shape[0])
            flat = data[start * size : stop * size]
            yield start, stop, xp.reshape(flat, (-1, gguf_type(self.type).size, stop - start))
