"""Granularity: which elements of an array share a scale; arrays cut into such blocks, and
into tiles that fit into a cache.

| granularity | one scale per              | shape of the scale |
|-------------|----------------------------|--------------------|
| "tensor"    | array                      | ()                 |
| "channel"   | row of a weight W[M, N]    | (M, 1)             |
| "token"     | row of activations x[T, N] | (T, 1)             |
| "group"     | g neighbours within a row  | (M, N/g)           |
| "block"     | bo × bi neighbours         | (⌈M/bo⌉, ⌈N/bi⌉)   |

This is the geometry alone. Which scale and codes a block gets is decided in ``uniform``
(integers) and ``block_float`` (small floats), which share this file.

Left out: groups that run over the end of a row (rejected; only blocks may be ragged).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from refllm.backend import Array, DType, namespace
from refllm.errors import InputError

GRANULARITIES = ("tensor", "channel", "token", "group", "block")

# Elements per tile (host, device). On a CPU the intermediate arrays of a tile stay in cache;
# a GPU needs enough work to be busy.
TILE = (1 << 17, 1 << 26)
MATMUL_TILE = (1 << 18, 1 << 26)  # weights dequantised at a time in a product


@dataclass(frozen=True)
class Granularity:
    """Which elements share a scale; ``size`` is g for "group", (bo, bi) or one size for
    "block", None otherwise.

    >>> Granularity("group", 32).scale_shape((4, 128))
    (4, 4)
    >>> Granularity("block", (128, 128)).scale_shape((300, 256))
    (3, 2)
    """

    kind: str
    size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in GRANULARITIES:
            known = ", ".join(GRANULARITIES)
            raise InputError(f"unknown granularity {self.kind!r}; choose one of {known}")
        if self.kind not in ("group", "block"):
            if self.size is not None:
                raise InputError(f"granularity {self.kind!r} takes no group_size")
            return
        sizes = self.size if isinstance(self.size, tuple) else (self.size,)
        positive = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
        wanted = "a positive integer"
        most = 1
        if self.kind == "block":
            wanted += " or a pair of them"
            most = 2
        if not positive or not 1 <= len(sizes) <= most:
            raise InputError(f"granularity {self.kind!r} takes {wanted}, got {self.size!r}")

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) that share a scale, for "group" and "block"."""
        if isinstance(self.size, tuple):
            return self.size
        assert self.size is not None, "only groups and blocks have a size"
        if self.kind == "group":
            return 1, self.size
        return self.size, self.size

    @property
    def block_rows(self) -> int:
        """Rows that a block spans: 1 unless the kind is "block"."""
        return self.block[0] if self.kind == "block" else 1

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of an array of this shape.

        Raises
        ------
        ValueError
            if the granularity does not fit the array; of groups that do not divide a row it
            names the nearest sizes that do.
        """
        if self.kind == "tensor":
            return ()
        if not shape or (self.kind == "block" and len(shape) != 2):
            raise InputError(f"granularity {self.kind!r} does not fit an array of shape {shape}")
        if self.kind in ("channel", "token"):
            return (*shape[:-1], 1)
        if self.kind == "block":
            rows, columns = self.block
            return -(-shape[0] // rows), -(-shape[1] // columns)
        g = self.block[1]
        n = shape[-1]
        if n % g:
            raise InputError(_no_divisor(n, g))
        return (*shape[:-1], n // g)

    def as_blocks(self, x: Array) -> Array:
        """x as [row blocks, rows, column blocks, columns]: elements that share a scale lie
        along axes 1 and 3.

        A view where blocks are whole. Ragged blocks are filled up with copies of their last
        row and column, which change no minimum and no maximum.
        """
        xp = namespace(x)
        if self.kind == "tensor":
            return xp.reshape(x, (1, 1, 1, x.size))  # [1, 1, 1, M·N]
        m = math.prod(x.shape[:-1])
        n = int(x.shape[-1])
        if self.kind in ("channel", "token"):
            return xp.reshape(x, (m, 1, 1, n))  # [M, 1, 1, N]
        rows, columns = self.block
        if self.kind == "group":
            return xp.reshape(x, (m, 1, n // columns, columns))  # [M, 1, N/g, g]
        down, across = self.scale_shape(tuple(x.shape))
        rows = min(rows, m)  # a block larger than the array needs no filling
        columns = min(columns, n)
        if down * rows != m:
            x = xp.concat([x] + [x[-1:, :]] * (down * rows - m), axis=0)
        if across * columns != n:
            x = xp.concat([x] + [x[:, -1:]] * (across * columns - n), axis=1)
        return xp.reshape(x, (down, rows, across, columns))  # [⌈M/bo⌉, bo, ⌈N/bi⌉, bi]

    def expand_scale(self, scale: Array, shape: tuple[int, ...]) -> Array:
        """A scale or zero point of an array of ``shape``, shaped to broadcast against its
        ``as_blocks``: [row blocks, 1, column blocks, 1].

        Raises
        ------
        ValueError
            if the scale has another shape than ``scale_shape(shape)``.
        """
        if tuple(scale.shape) != self.scale_shape(shape):
            raise InputError(
                f"scale or zero point of shape {tuple(scale.shape)}: an array of shape {shape} "
                f"takes {self.scale_shape(shape)} at granularity {self.kind!r}"
            )
        xp = namespace(scale)
        if self.kind == "block":
            return xp.reshape(scale, (scale.shape[0], 1, scale.shape[1], 1))  # [M/bo, 1, N/bi, 1]
        columns = scale.shape[-1] if self.kind == "group" else 1
        return xp.reshape(scale, (math.prod(scale.shape[:-1]), 1, columns, 1))

    def row_tiles(
        self, like: Array, shape: tuple[int, int], size: tuple[int, int] = TILE
    ) -> Iterator[tuple[int, int]]:
        """(start, stop) of the rows of each tile of a matrix of ``shape``; a tile holds whole
        row blocks and about ``size`` elements.

        ``size`` is (host, device); the library of ``like`` decides which of the two applies.
        """
        high = self.block_rows
        rows = high * max(1, tile_elements(like, size) // (high * max(1, shape[1])))
        for start in range(0, shape[0], rows):
            yield start, min(start + rows, shape[0])

    def rows_of(self, parameter: Array, start: int, stop: int) -> Array:
        """The part of a scale or zero point that belongs to rows ``start`` to ``stop``;
        ``start`` is the first row of a block.
        """
        if self.kind == "tensor":
            return parameter
        high = self.block_rows
        return parameter[start // high : -(-stop // high), :]


def from_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of ``Granularity.as_blocks``: blocks [·, ·, ·, ·] → an array of ``shape``,
    without the filling of ragged blocks.
    """
    xp = namespace(blocks)
    if blocks.size == math.prod(shape):
        return xp.reshape(blocks, shape)
    down, rows, across, columns = blocks.shape
    return xp.reshape(blocks, (down * rows, across * columns))[: shape[0], : shape[1]]


def tiled_matmul(
    x: Array, tiles: Iterable[tuple[int, int, Array]], outputs: int, dtype: DType
) -> Array:
    """x[T, N] → x Wᵀ [T, M], in the wider of x's dtype and ``dtype``, where W[M, N] arrives
    as ``tiles``: (start, stop, rows [start, stop)).

    With all of W at hand it is ``x @ W.T``; this way only one tile of W exists in floats.
    """
    xp = namespace(x)
    wide = xp.result_type(x.dtype, dtype)
    out = xp.empty((x.shape[0], outputs), dtype=wide)  # [T, M]
    x = xp.astype(x, wide, copy=False)
    for start, stop, rows in tiles:
        out[:, start:stop] = x @ xp.astype(rows, wide, copy=False).T  # [T, rows]
    return out


def tile_elements(like: Array, size: tuple[int, int] = TILE) -> int:
    """The tile size for arrays like this one, of (host, device)."""
    on_host = isinstance(like, np.ndarray)
    return size[0] if on_host else size[1]


def _no_divisor(n: int, g: int) -> str:
    """The message for groups of g that do not divide a row of n."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    below = max(d for d in divisors if d < g)
    above = min((d for d in divisors if d > g), default=n)
    near = f"{below}" if below == above else f"{below} and {above}"
    return (
        f"groups of {g} do not divide a row of {n}: the nearest sizes that do are {near}, "
        f"or pad the row with zeros to {-(-n // g) * g}"
    )
