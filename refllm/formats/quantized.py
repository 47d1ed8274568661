"""A weight in b-bit codes that multiplies: ``Quantized``.

It holds words, steps and zero points, and no float copy of the weight; ``nbytes`` counts what it holds.

| symbol | name                                                       | shape                |
|--------|------------------------------------------------------------|----------------------|
| W      | weight                                                     | [M, N]               |
| words  | q + 2^(b−1) (signed rules) or q, packed to b bits, uint32  | [M, ⌈N·b/32⌉]        |
| s, z   | scale and zero point                                       | (), [M, 1], [M, N/g] |

Left out: integer products (``integer``), other byte layouts (``layouts``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from refllm.backend import Array, namespace
from refllm.formats.codes import PIECE, decode, row_pieces, rows_of
from refllm.formats.scheme import Scheme
from refllm.formats.storage import load_scale, load_zero, pack_codes, store_scale, store_zero, unpack_codes

__all__ = ["Quantized"]

TILE = (1 << 18, 1 << 26)  # weights in floats at a time of a product (host, device)


class Quantized:
    """A weight W[M, N] in b-bit codes: a ``Linear``. Made by ``quantize`` or ``from_codes``.

    What it holds: ``words`` uint32 [M, ⌈N·b/32⌉], the stored scale, and the stored zero points (None if symmetric).
    ``dtype`` is the floating-point type that it comes back in.
    """

    def __init__(
        self, words: Array, scale: Array, zero: Array | None, scheme: Scheme, shape: tuple[int, int], dtype: Any
    ):
        self._words, self._scale, self._zero = words, scale, zero
        self.scheme, self.shape, self.dtype = scheme, shape, dtype

    @classmethod
    def from_codes(
        cls,
        codes: Array,
        scale: Array,
        zero_point: Array | None,
        scheme: Scheme,
        scale_dtype: str | None = None,
        zero_dtype: str | None = None,
    ) -> Quantized:
        """Codes [M, N] that were made elsewhere (within the scheme's range), with their scale and zero point.

        ``scale_dtype`` rounds the scale that is stored; codes that were made with the unrounded one stay as they are.
        """
        xp = namespace(codes, scale, zero_point)
        if codes.ndim != 2 or tuple(scale.shape) != scheme.scale_shape(tuple(codes.shape)):
            raise ValueError(
                f"from_codes: codes {tuple(codes.shape)} and scale {tuple(scale.shape)} do not fit {scheme}"
            )
        if scale.dtype not in (xp.float32, xp.float64):
            raise TypeError(f"from_codes: the scale is float32 or float64 (scale_dtype narrows it), got {scale.dtype}")
        if codes.size and not scheme.qmin <= int(xp.min(codes)) <= int(xp.max(codes)) <= scheme.qmax:
            raise ValueError(f"from_codes: codes lie in {scheme.qmin}..{scheme.qmax}")
        if zero_point is None:
            zero_point = xp.full(scale.shape, scheme.zero, dtype=xp.int32)
        words = pack_codes(xp.astype(codes, xp.int8 if scheme.signed else xp.uint8), scheme)
        zero = store_zero(zero_point, scheme, zero_dtype)
        shape = (int(codes.shape[0]), int(codes.shape[1]))
        return cls(words, store_scale(scale, scale_dtype), zero, scheme, shape, scale.dtype)

    # what it holds
    def packed(self) -> Array:
        """The words [M, ⌈N·b/32⌉] uint32, not a copy."""
        return self._words

    @property
    def nbytes(self) -> int:
        """Bytes of words, scale and zero points as they are held."""
        return int(self._words.nbytes + self._scale.nbytes + (0 if self._zero is None else self._zero.nbytes))

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    # what it stands for
    @property
    def codes(self) -> Array:
        """q[M, N], unpacked anew at each call."""
        return unpack_codes(self._words, self.scheme, self.shape[1])

    @property
    def scale(self) -> Array:
        """s in ``dtype``, shaped by the granularity."""
        return load_scale(self._scale, self.dtype)

    @property
    def zero_point(self) -> Array:
        """z int32, shaped like the scale; one number throughout for symmetric rules."""
        return load_zero(self._zero, self._scale, self.scheme)

    def dequantize(self) -> Array:
        """W[M, N] in ``dtype``, a new array."""
        xp = namespace(self._words)
        out = xp.empty(self.shape, dtype=self.dtype)
        for start, stop, tile in self._tiles(PIECE):
            out[start:stop, :] = tile
        return out

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M], in the wider of x's dtype and ``dtype``; at most a tile of W is ever in floats."""
        xp = namespace(x, self._words)
        dtype = xp.result_type(x.dtype, self.dtype)
        out = xp.empty((x.shape[0], self.shape[0]), dtype=dtype)
        x = xp.astype(x, dtype, copy=False)
        for start, stop, tile in self._tiles(TILE):
            out[:, start:stop] = x @ xp.astype(tile, dtype, copy=False).T
        return out

    def _tiles(self, size: tuple[int, int]) -> Iterator[tuple[int, int, Array]]:
        """(first row, last row + 1, those rows of W) in turn."""
        scale, zero_point = self.scale, self.zero_point
        for start, stop in row_pieces(self._words, self.shape, self.scheme, size):
            codes = unpack_codes(self._words[start:stop, :], self.scheme, self.shape[1])
            s, z = (rows_of(p, self.scheme, start, stop) for p in (scale, zero_point))
            yield start, stop, decode(codes, s, z, self.scheme)

    def __repr__(self) -> str:
        return f"Quantized({self.shape[0]}×{self.shape[1]}, {self.scheme}, {self.bits_per_weight:.3f} bits per weight)"
