"""``QuantizedLinear``: a weight W[M, N] stored in b-bit codes, which multiplies.

    Ŵ = s (Q − z),   y = x Ŵᵀ

It holds packed codes, scales and zero points, and no float copy of the weight: a product
dequantises one tile at a time. ``nbytes`` counts what is held. How s, z and Q are chosen is
in ``uniform``.

``ActOrderLinear`` is one whose groups are not of neighbouring columns. GPTQ with act-order
("desc_act") visits columns in order of decreasing importance and gives each g *visited*
columns a scale. The words then hold the columns in the order of the visit, which keeps
groups contiguous, and ``g_idx`` names the group of each column:
Ŵ[:, j] = s[:, g_idx[j]] (q[:, j] − z[:, g_idx[j]]).

| symbol | name                                                      | shape                |
|--------|-----------------------------------------------------------|----------------------|
| W      | weight                                                    | [M, N]               |
| words  | q + 2^(b−1) (signed rules) or q, packed to b bits, uint32 | [M, ⌈N·b/32⌉]        |
| s, z   | scale and zero point                                      | (), [M, 1], [M, N/g] |
| order  | column order[i] of W is the i-th that the words hold      | int64[N]             |
| g_idx  | group of each column, in the weight's own order           | int32[N]             |

Left out: integer products (``int_matmul``), other byte layouts (``layouts``), scales that
are themselves quantised (``gguf``), groups of unequal sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from refllm.backend import Array, DType, namespace
from refllm.errors import InputError
from refllm.formats.granularity import MATMUL_TILE, TILE, tiled_matmul
from refllm.formats.packing import (
    load_scale,
    load_zero,
    pack_codes,
    store_scale,
    store_zero,
    unpack_codes,
    words_per_row,
)
from refllm.formats.uniform import Scheme, dequantize_codes, qparams, quantize_codes


class QuantizedLinear:
    """A weight W[M, N] in b-bit codes: a ``Linear``. Made by ``quantize`` or ``from_codes``.

    It holds ``words`` uint32 [M, ⌈N·b/32⌉], the stored scale, and the stored zero points
    (None if symmetric). ``dtype`` is the floating-point type that the weight comes back in.
    """

    def __init__(
        self,
        words: Array,
        scale: Array,
        zero: Array | None,
        scheme: Scheme,
        shape: tuple[int, int],
        dtype: DType,
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

        Raises
        ------
        ValueError
            if codes and scale do not fit the scheme, or a code lies outside its range.
        TypeError
            if the scale is neither float32 nor float64.
        """
        xp = namespace(codes, scale, zero_point)
        if codes.ndim != 2 or tuple(scale.shape) != scheme.scale_shape(tuple(codes.shape)):
            raise InputError(
                f"from_codes: codes {tuple(codes.shape)} and scale {tuple(scale.shape)} "
                f"do not fit {scheme}"
            )
        if scale.dtype not in (xp.float32, xp.float64):
            raise TypeError(
                "from_codes: the scale is float32 or float64 (scale_dtype narrows it), "
                f"got {scale.dtype}"
            )
        if codes.size:
            low = int(xp.min(codes))
            high = int(xp.max(codes))
            if not scheme.qmin <= low <= high <= scheme.qmax:
                raise InputError(f"from_codes: codes lie in {scheme.qmin}..{scheme.qmax}")
        if zero_point is None:
            zero_point = xp.full(scale.shape, scheme.zero, dtype=xp.int32)
        words = pack_codes(xp.astype(codes, getattr(xp, scheme.code_dtype)), scheme)
        zero = store_zero(zero_point, scheme, zero_dtype)
        shape = (int(codes.shape[0]), int(codes.shape[1]))
        return cls(words, store_scale(scale, scale_dtype), zero, scheme, shape, scale.dtype)

    # --- what is stored ---

    def packed(self) -> Array:
        """The words [M, ⌈N·b/32⌉] uint32, not a copy."""
        return self._words

    @property
    def nbytes(self) -> int:
        """Bytes of words, scale and zero points as they are stored."""
        held = [self._words, self._scale]
        if self._zero is not None:
            held.append(self._zero)
        return sum(int(array.nbytes) for array in held)

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    # --- the values that it represents ---

    @property
    def codes(self) -> Array:
        """q[M, N], unpacked at each call."""
        return unpack_codes(self._words, self.scheme, self.shape[1])

    @property
    def scale(self) -> Array:
        """s in ``dtype``, shaped by the granularity."""
        return load_scale(self._scale, self.dtype)

    @property
    def zero_point(self) -> Array:
        """z int32, shaped like the scale; the same value everywhere for symmetric rules."""
        return load_zero(self._zero, self._scale, self.scheme)

    def dequantize(self) -> Array:
        """W[M, N] in ``dtype``, a new array."""
        xp = namespace(self._words)
        out = xp.empty(self.shape, dtype=self.dtype)
        for start, stop, tile in self._tiles(TILE):
            out[start:stop, :] = tile
        return out

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M], in the wider of x's dtype and ``dtype``: the values of
        ``x @ weight.dequantize().T``, with at most one tile of W in floats.
        """
        namespace(x, self._words)  # both on one device
        return tiled_matmul(x, self._tiles(MATMUL_TILE), self.shape[0], self.dtype)

    def _tiles(self, size: tuple[int, int]) -> Iterator[tuple[int, int, Array]]:
        """(start, stop, rows [start, stop) of W) in turn."""
        scale = self.scale
        zero_point = self.zero_point
        geometry = self.scheme.geometry
        for start, stop in geometry.row_tiles(self._words, self.shape, size):
            codes = unpack_codes(
                self._words[start:stop, :], self.scheme, self.shape[1]
            )  # [rows, N]
            s = geometry.rows_of(scale, start, stop)
            z = geometry.rows_of(zero_point, start, stop)
            yield start, stop, dequantize_codes(codes, s, z, self.scheme)

    def __repr__(self) -> str:
        size = f"{self.shape[0]}×{self.shape[1]}"
        bits = f"{self.bits_per_weight:.3f} bits per weight"
        return f"{type(self).__name__}({size}, {self.scheme}, {bits})"


class ActOrderLinear(QuantizedLinear):
    """A ``QuantizedLinear`` whose words hold the columns in ``order`` (act-order); None is
    the weight's own order.

    ``packed()`` holds the codes in that order; ``codes``, ``dequantize`` and ``matmul`` use
    the weight's own, and ``nbytes`` counts 4 bytes per column for ``g_idx``.
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
        """q[M, N] in the weight's own order, unpacked at each call."""
        codes = super().codes
        if self.order is None:
            return codes
        return codes[:, namespace(codes).argsort(self.order)]

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales, zero points, and of ``g_idx`` where there is one."""
        nbytes = super().nbytes
        if self.order is not None:
            nbytes += 4 * self.shape[1]
        return nbytes

    def dequantize(self) -> Array:
        """W[M, N] in ``dtype``, a new array."""
        weight = super().dequantize()
        if self.order is None:
            return weight
        return weight[:, namespace(weight).argsort(self.order)]

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M]: x's columns are brought into the order of the words."""
        if self.order is not None:
            x = x[:, self.order]
        return super().matmul(x)


def column_order(g_idx: Array, groups: int, *, name: str = "weight") -> Array:
    """The order in which columns stand group by group, int64[N].

    Raises
    ------
    ValueError
        naming ``name`` unless all groups are of one size.

    >>> import numpy as np
    >>> column_order(np.array([1, 0, 1, 0]), 2).tolist()
    [1, 3, 0, 2]
    """
    xp = namespace(g_idx)
    size = int(g_idx.shape[0]) // groups
    order = xp.argsort(g_idx, kind="stable")
    if not bool(xp.all(g_idx[order] == xp.arange(groups * size) // size)):
        raise InputError(f"{name}: g_idx does not put {size} columns into each of {groups} groups")
    return order


# --- from floats --------------------------------------------------------------------------


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
    and is what ``nbytes`` counts; ``zero_dtype="float16"`` stores zero points in
    16 bits (as papers often count them), not in b bits.

    Raises
    ------
    ValueError
        naming ``name`` if x is not a matrix, is not finite or does not fit the scheme.

    >>> import numpy as np
    >>> weight = quantize(np.eye(2, 32, dtype="float32"), Scheme(4, "restricted", "channel"))
    >>> weight.packed().shape, weight.nbytes  # 8 codes per word, and two float32 scales
    ((2, 4), 40)
    """
    xp = namespace(x)
    if x.ndim != 2:
        raise InputError(f"{name}: what is packed is a matrix [M, N], got shape {tuple(x.shape)}")
    given = scale is not None
    if scale is None:
        scale, zero = qparams(x, scheme, name=name)
    else:
        zero = xp.full(scale.shape, scheme.zero, dtype=xp.int32)
    if zero_point is not None:
        zero = zero_point
    stored = store_scale(scale, scale_dtype, name=f"{name}'s scale")
    scale = load_scale(stored, x.dtype)
    m, n = (int(size) for size in x.shape)
    words = xp.empty((m, words_per_row(n, scheme.bits)), dtype=xp.uint32)
    # otherwise qparams has checked all of x, and the scale covers it
    check = given or scheme.rule == "awq"
    geometry = scheme.geometry
    for start, stop in geometry.row_tiles(x, (m, n), TILE):
        s = geometry.rows_of(scale, start, stop)
        z = geometry.rows_of(zero, start, stop)
        codes = quantize_codes(x[start:stop, :], s, z, scheme, name=name, check=check)
        words[start:stop, :] = pack_codes(codes, scheme)
    stored_zero = store_zero(zero, scheme, zero_dtype)
    return QuantizedLinear(words, stored, stored_zero, scheme, (m, n), x.dtype)


def fake_quantize(x: Array, scheme: Scheme, *, name: str = "x") -> Array:
    """x quantised and dequantised, in x's dtype: ``quantize(x, scheme).dequantize()`` for
    any shape of x.
    """
    xp = namespace(x)
    scale, zero_point = qparams(x, scheme, name=name)
    outer = tuple(x.shape)
    shape = math.prod(outer[:-1]), outer[-1] if outer else 1
    x = xp.reshape(x, shape)  # [M, N]
    geometry = scheme.geometry
    scale = xp.reshape(scale, geometry.scale_shape(shape))
    zero_point = xp.reshape(zero_point, geometry.scale_shape(shape))
    out = xp.empty(x.shape, dtype=x.dtype)
    check = scheme.rule == "awq"
    for start, stop in geometry.row_tiles(x, shape, TILE):
        s = geometry.rows_of(scale, start, stop)
        z = geometry.rows_of(zero_point, start, stop)
        codes = quantize_codes(x[start:stop, :], s, z, scheme, name=name, check=check)
        out[start:stop, :] = dequantize_codes(codes, s, z, scheme)
    return xp.reshape(out, outer)


def effective_bits(
    bits: int, group_size: int, *, scale_bits: int = 16, zero_bits: int = 0
) -> float:
    """Bits per weight including its share of the group's scale and zero point:
    ``bits + (scale_bits + zero_bits) / group_size``.

    >>> effective_bits(4, 128, zero_bits=4)
    4.15625
    """
    return bits + (scale_bits + zero_bits) / group_size
