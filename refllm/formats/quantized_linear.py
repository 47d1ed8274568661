"""A weight in b-bit codes that multiplies: ``QuantizedLinear``.

It holds words, steps and zero points, and no float copy of the weight; ``nbytes`` counts
what it holds.

| symbol | name                                                       | shape                |
|--------|------------------------------------------------------------|----------------------|
| W      | weight                                                     | [M, N]               |
| words  | q + 2^(b−1) (signed rules) or q, packed to b bits, uint32  | [M, ⌈N·b/32⌉]        |
| s, z   | scale and zero point                                       | (), [M, 1], [M, N/g] |

Left out: integer products (``integer``), other byte layouts (``layouts``).

<<MERGED>> Uniform affine quantisation: q = clip(rint(x/s) + z), x̂ = s (q − z), and weights
that are stored that way.

Source: Jacob et al. 2018 (arXiv:1712.05877), §2.1; the rules by which s and z are chosen
are in ``scheme``. rint is round half to even, as everywhere in this field but ggml. Two
orders are in use, which differ on a tie when z is odd:

- round, then add: q = clip(rint(x/s) + z) (GPTQ, AWQ and most others);
- add, then round: q = rint(clip(x/s + z)) (compressed-tensors: "half_integer" and
  "asymmetric_signed").

``QuantizedLinear`` is a weight W[M, N] in b bits that multiplies: it holds words, steps and zero
points and no float copy of the weight, and ``nbytes`` counts what it holds. Zero points of
asymmetric rules are packed to b bits too, unless a dtype is asked for.

| symbol | name                                       | shape                       |
|--------|--------------------------------------------|-----------------------------|
| x      | activations or weight                      | any, [T, N], [M, N]         |
| q      | codes, int8 (signed rules) or uint8        | as x                        |
| s, z   | scale and zero point                       | (), [M, 1], [M, N/g], …     |

Left out: integer products (``integer``), other byte layouts (``layouts``), a step that is
itself quantised.

<<MERGED>>
A quantised weight whose groups are groups of columns in another order than their own.

GPTQ with "act-order" and dynamic groups visits columns by falling importance and gives each
g *visited* columns a scale. The words then hold the columns in the order of the visit,
which keeps groups together, and each column's group is known by its ``g_idx``: Ŵ[:, j] =
scale[:, g_idx[j]] · (q[:, j] − z[:, g_idx[j]]).

| symbol | name                                            | shape   |
|--------|-------------------------------------------------|---------|
| p      | order: column p[i] stands at place i of the words | int64[N] |
| g_idx  | group of each column, in the weight's own order | int32[N] |

Left out: groups of unequal sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from refllm.backend import Array, namespace
from refllm.formats.packing import (
    load_scale,
    load_zero,
    pack_codes,
    store_scale,
    store_zero,
    unpack_codes,
    words_per_row,
)
from refllm.formats.uniform import (
    PIECE,
    Scheme,
    dequantize_codes,
    qparams,
    quantize_codes,
    row_pieces,
    rows_of,
)

TILE = (1 << 18, 1 << 26)  # weights in floats at a time of a product (host, device)


class QuantizedLinear:
    """A weight W[M, N] in b-bit codes: a ``Linear``. Made by ``quantize`` or
    ``from_codes``.

    What it holds: ``words`` uint32 [M, ⌈N·b/32⌉], the stored scale, and the stored zero
    points (None if symmetric). ``dtype`` is the floating-point type that it comes back in.
    """

    def __init__(
        self,
        words: Array,
        scale: Array,
        zero: Array | None,
        scheme: Scheme,
        shape: tuple[int, int],
        dtype: Any,
    ):
        self._words = words
        self._scale = scale
        self._zero = zero
        self.scheme = scheme
        self.shape = shape
        self.dtype = dtype

    @classmethod
    def from_codes(
        cls,
        codes: Array,
        scale: Array,
        zero_point: Array | None,
        scheme: Scheme,
        scale_dtype: str | None = None,
        zero_dtype: str | None = None,
    ) -> QuantizedLinear:
        """Codes [M, N] that were made elsewhere (within the scheme's range), with their
        scale and zero point.

        ``scale_dtype`` rounds the scale that is stored; codes that were made with the
        unrounded one stay as they are.
        """
        xp = namespace(codes, scale, zero_point)
        if codes.ndim != 2 or tuple(scale.shape) != scheme.scale_shape(tuple(codes.shape)):
            raise ValueError(
                f"from_codes: codes {tuple(codes.shape)} and scale {tuple(scale.shape)} do not fit {scheme}"
            )
        if scale.dtype not in (xp.float32, xp.float64):
            raise TypeError(
                f"from_codes: the scale is float32 or float64 (scale_dtype narrows it), got {scale.dtype}"
            )
        if (
            codes.size
            and not scheme.qmin <= int(xp.min(codes)) <= int(xp.max(codes)) <= scheme.qmax
        ):
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
        return int(
            self._words.nbytes
            + self._scale.nbytes
            + (0 if self._zero is None else self._zero.nbytes)
        )

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
        """x[T, N] → x Wᵀ [T, M], in the wider of x's dtype and ``dtype``; at most a tile of
        W is ever in floats.
        """
        xp = namespace(x, self._words)
        dtype = xp.result_type(x.dtype, self.dtype)
        out = xp.empty((x.shape[0], self.shape[0]), dtype=dtype)
        x = xp.astype(x, dtype, copy=False)
        for start, stop, tile in self._tiles(TILE):
            out[:, start:stop] = x @ xp.astype(tile, dtype, copy=False).T
        return out

    def _tiles(self, size: tuple[int, int]) -> Iterator[tuple[int, int, Array]]:
        """(first row, last row + 1, those rows of W) in turn."""
        scale = self.scale
        zero_point = self.zero_point
        for start, stop in row_pieces(self._words, self.shape, self.scheme, size):
            codes = unpack_codes(self._words[start:stop, :], self.scheme, self.shape[1])
            s, z = (rows_of(p, self.scheme, start, stop) for p in (scale, zero_point))
            yield start, stop, dequantize_codes(codes, s, z, self.scheme)

    def __repr__(self) -> str:
        return f"QuantizedLinear({self.shape[0]}×{self.shape[1]}, {self.scheme}, {self.bits_per_weight:.3f} bits per weight)"


def quantize(
    x: Array,
    scheme: Scheme,
    *,
    scale: Array | None = None,
    zero_point: Array | None = None,
    scale_dtype: str | None = None,
    zero_dtype: str | None = None,
    name: str = "x",
) -> QuantizedLinear:
    """A matrix x[M, N] in packed codes. Scale and zero point come from its ranges unless
    they are given.

    ``scale_dtype`` ("float16", "bfloat16", …) rounds the scale before the codes are made
    and is what ``nbytes`` counts; ``zero_dtype="float16"`` holds zero points as such
    numbers (as the article counts), not in b bits.

    Raises
    ------
    ValueError
        naming ``name`` if x is no matrix, is not finite or does not fit the scheme.
    """
    xp = namespace(x)
    if x.ndim != 2:
        raise ValueError(f"{name}: what is packed is a matrix [M, N], got shape {tuple(x.shape)}")
    own = scale is None
    if scale is None:
        scale, zero = qparams(x, scheme, name=name)
        zero_point = zero if zero_point is None else zero_point
    elif zero_point is None:
        zero_point = xp.full(scale.shape, scheme.zero, dtype=xp.int32)
    stored = store_scale(scale, scale_dtype, name=f"{name}'s scale")
    scale = load_scale(stored, x.dtype)
    shape = int(x.shape[0]), int(x.shape[1])
    words = xp.empty((shape[0], words_per_row(shape[1], scheme.bits)), dtype=xp.uint32)
    # else qparams has seen all of x, and the scale covers it
    check = not own or scheme.rule == "awq"
    for start, stop in row_pieces(x, shape, scheme, PIECE):
        s, z = (rows_of(p, scheme, start, stop) for p in (scale, zero_point))
        codes = quantize_codes(x[start:stop, :], s, z, scheme, name=name, check=check)
        words[start:stop, :] = pack_codes(codes, scheme)
    return QuantizedLinear(
        words, stored, store_zero(zero_point, scheme, zero_dtype), scheme, shape, x.dtype
    )


def fake_quantize(x: Array, scheme: Scheme, *, name: str = "x") -> Array:
    """x through its codes and back, in x's dtype: ``quantize(x, scheme).dequantize()`` for
    any shape of x.
    """
    xp = namespace(x)
    scale, zero_point = qparams(x, scheme, name=name)
    outer = tuple(x.shape)
    shape = math.prod(outer[:-1]), outer[-1] if outer else 1
    x = xp.reshape(x, shape)
    scale, zero_point = (xp.reshape(p, scheme.scale_shape(shape)) for p in (scale, zero_point))
    out = xp.empty(x.shape, dtype=x.dtype)
    for start, stop in row_pieces(x, shape, scheme, PIECE):
        s, z = (rows_of(p, scheme, start, stop) for p in (scale, zero_point))
        codes = quantize_codes(x[start:stop, :], s, z, scheme, name=name, check=scheme.rule == "awq")
        out[start:stop, :] = dequantize_codes(codes, s, z, scheme)
    return xp.reshape(out, outer)


def effective_bits(
    bits: int, group_size: int, *, scale_bits: int = 16, zero_bits: int = 0
) -> float:
    """Bits a weight, its share of the group's scale and zero point included: b + (scale +
    zero)/g.
    """
    return bits + (scale_bits + zero_bits) / group_size


def column_order(g_idx: Array, groups: int, *, name: str = "weight") -> Array:
    """The order in which the columns stand group by group, int64[N]; ValueError unless all
    groups are of one size.
    """
    xp = namespace(g_idx)
    size = int(g_idx.shape[0]) // groups
    order = xp.argsort(g_idx, kind="stable")
    if not bool(xp.all(g_idx[order] == xp.arange(groups * size) // size)):
        raise ValueError(f"{name}: g_idx does not put {size} columns into each of {groups} groups")
    return order


class ActOrderLinear(QuantizedLinear):
    """A ``QuantizedLinear`` with an ``order``; None is the weight's own, and changes nothing.

    ``packed()`` holds the codes in that order; ``codes``, ``dequantize`` and ``matmul`` are
    in the weight's own, and ``nbytes`` counts 4 bytes a column for ``g_idx``.
    """

    order: Array | None = None

    @property
    def g_idx(self) -> Array | None:
        """The group of each column, int32[N]; None where column j belongs to group j // g."""
        if self.order is None:
            return None
        xp = namespace(self.order)
        return xp.astype(xp.argsort(self.order) // self.scheme.block[1], xp.int32)

    @property
    def codes(self) -> Array:
        """q[M, N] in the weight's own order, unpacked anew at each call."""
        codes = super().codes
        if self.order is None:
            return codes
        return codes[:, namespace(codes).argsort(self.order)]

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales, zero points, and of ``g_idx`` where there is one."""
        return super().nbytes + (0 if self.order is None else 4 * self.shape[1])

    def dequantize(self) -> Array:
        """W[M, N] in ``dtype``, a new array."""
        weight = super().dequantize()
        if self.order is None:
            return weight
        return weight[:, namespace(weight).argsort(self.order)]

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M]."""
        return super().matmul(x if self.order is None else x[:, self.order])
