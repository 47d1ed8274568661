"""Uniform affine quantisation: q = clip(rint(x/s) + z), x̂ = s (q − z), and weights that are stored that way.

Source: Jacob et al. 2018 (arXiv:1712.05877), §2.1; the rules by which s and z are chosen are in ``scheme``. rint is
round half to even, as everywhere in this field but ggml. Two orders are in use, which differ on a tie when z is odd:

- round, then add: q = clip(rint(x/s) + z) (GPTQ, AWQ and most others);
- add, then round: q = rint(clip(x/s + z)) (compressed-tensors: "half_integer" and "asymmetric_signed").

``Quantized`` is a weight W[M, N] in b bits that multiplies: it holds words, steps and zero points and no float copy
of the weight, and ``nbytes`` counts what it holds. Zero points of asymmetric rules are packed to b bits too, unless
a dtype is asked for.

| symbol | name                                       | shape                       |
|--------|--------------------------------------------|-----------------------------|
| x      | activations or weight                      | any, [T, N], [M, N]         |
| q      | codes, int8 (signed rules) or uint8        | as x                        |
| s, z   | scale and zero point                       | (), [M, 1], [M, N/g], …     |
| words  | codes + 2^(b−1) (signed) or codes, packed  | [M, ⌈N·b/32⌉] uint32        |

Left out: integer products (``integer``), other byte layouts (``layouts``), a step that is itself quantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from refllm.backend import Array, namespace
from refllm.formats.packing import words_per_row
from refllm.formats.ranges import qparams, range_to_qparams, ranges, reachable, refuse_non_finite
from refllm.formats.scheme import GRANULARITIES, RULES, Scheme, as_blocks, from_blocks, steps_as_blocks
from refllm.formats.storage import load_scale, load_zero, pack_codes, store_scale, store_zero, unpack_codes

__all__ = [
    "GRANULARITIES",
    "RULES",
    "Quantized",
    "Scheme",
    "decode",
    "effective_bits",
    "encode",
    "fake_quantize",
    "qparams",
    "quantize",
    "range_to_qparams",
    "ranges",
]

_ADD_FIRST = ("half_integer", "asymmetric_signed")
# Numbers at a time. On a CPU all steps of a piece run within its cache; on a GPU a piece should fill the device.
_PIECE_HOST, _PIECE_DEVICE = 1 << 17, 1 << 26
_TILE_HOST, _TILE_DEVICE = 1 << 18, 1 << 26


def encode(x: Array, scale: Array, zero_point: Array, scheme: Scheme, *, name: str = "x", check: bool = True) -> Array:
    """Codes of x, int8 or uint8, shaped like x. The quotient is clipped before it becomes an integer.

    ``check=False`` is for a caller that knows x to be finite and within the range that the scale was made for.

    Raises
    ------
    ValueError
        naming ``name`` if x holds NaN or infinity, or scale or zero point has not the scheme's shape.
    """
    xp = namespace(x, scale, zero_point)
    if check and x.size:
        refuse_non_finite(x, name)
    shape = tuple(x.shape)
    s = steps_as_blocks(xp.astype(scale, x.dtype, copy=False), scheme, shape)
    z = steps_as_blocks(zero_point, scheme, shape)
    blocks = as_blocks(x, scheme)
    if check and x.size and float(xp.max(xp.abs(x))) > float(xp.min(s)) * 0.5 * float(xp.finfo(x.dtype).max):
        blocks = reachable(blocks, s)
    return from_blocks(_codes(blocks, s, z, scheme), shape)


def _codes(blocks: Array, s: Array, z: Array, scheme: Scheme) -> Array:
    """``encode`` of x, s and z as blocks."""
    xp = namespace(blocks, s, z)
    add = scheme.zero != 0 or not scheme.symmetric
    t = blocks / s
    if add and scheme.rule in _ADD_FIRST:
        t += xp.astype(z, t.dtype)
    if scheme.rule not in _ADD_FIRST:
        t = xp.round(t)
        if add:
            t += xp.astype(z, t.dtype)
    t = xp.clip(t, float(scheme.qmin), float(scheme.qmax))
    if scheme.rule in _ADD_FIRST:
        t = xp.round(t)
    return xp.astype(t, xp.int8 if scheme.signed else xp.uint8)


def decode(codes: Array, scale: Array, zero_point: Array, scheme: Scheme) -> Array:
    """x̂ = s (q − z) in the scale's dtype, shaped like the codes."""
    xp = namespace(codes, scale, zero_point)
    shape = tuple(codes.shape)
    s, z = steps_as_blocks(scale, scheme, shape), steps_as_blocks(zero_point, scheme, shape)
    blocks = xp.astype(as_blocks(codes, scheme), scale.dtype)
    if scheme.zero != 0 or not scheme.symmetric:
        blocks -= xp.astype(z, scale.dtype)
    blocks *= s
    return from_blocks(blocks, shape)


def fake_quantize(x: Array, scheme: Scheme, *, name: str = "x") -> Array:
    """x through its codes and back, in x's dtype: ``quantize(x, scheme).dequantize()`` for any shape of x."""
    scale, zero_point = qparams(x, scheme, name=name)
    return decode(encode(x, scale, zero_point, scheme, name=name), scale, zero_point, scheme)


def effective_bits(bits: int, group_size: int, *, scale_bits: int = 16, zero_bits: int = 0) -> float:
    """Bits a weight, its share of the group's scale and zero point included: b + (scale + zero)/g."""
    return bits + (scale_bits + zero_bits) / group_size


def quantize(
    x: Array,
    scheme: Scheme,
    *,
    scale: Array | None = None,
    zero_point: Array | None = None,
    scale_dtype: str | None = None,
    zero_dtype: str | None = None,
    name: str = "x",
) -> Quantized:
    """A matrix x[M, N] in packed codes. Scale and zero point come from its ranges unless they are given.

    ``scale_dtype`` ("float16", "bfloat16", …) rounds the scale before the codes are made and is what ``nbytes``
    counts; ``zero_dtype="float16"`` holds zero points as such numbers (as the article counts), not in b bits.

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
    rows, columns = int(x.shape[0]), int(x.shape[1])
    words = xp.empty((rows, words_per_row(columns, scheme.bits)), dtype=xp.uint32)
    check = not own or scheme.rule == "awq"  # else qparams has seen all of x, and the scale covers it
    for start, stop in _row_pieces(x, scheme, _PIECE_HOST, _PIECE_DEVICE):
        s, z = (_rows_of(p, scheme, start, stop) for p in (scale, zero_point))
        codes = encode(x[start:stop, :], s, z, scheme, name=name, check=check)
        words[start:stop, :] = pack_codes(codes, scheme)
    return Quantized(words, stored, store_zero(zero_point, scheme, zero_dtype), scheme, (rows, columns), x.dtype)


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
        for start, stop, tile in self._tiles(_PIECE_HOST, _PIECE_DEVICE):
            out[start:stop, :] = tile
        return out

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M], in the wider of x's dtype and ``dtype``; at most a tile of W is ever in floats."""
        xp = namespace(x, self._words)
        dtype = xp.result_type(x.dtype, self.dtype)
        out = xp.empty((x.shape[0], self.shape[0]), dtype=dtype)
        x = xp.astype(x, dtype, copy=False)
        for start, stop, tile in self._tiles(_TILE_HOST, _TILE_DEVICE):
            out[:, start:stop] = x @ xp.astype(tile, dtype, copy=False).T
        return out

    def _tiles(self, host: int, device: int) -> Iterator[tuple[int, int, Array]]:
        """(first row, last row + 1, those rows of W) in turn."""
        scale, zero_point = self.scale, self.zero_point
        for start, stop in _row_pieces(self._words, self.scheme, host, device, self.shape[1]):
            codes = unpack_codes(self._words[start:stop, :], self.scheme, self.shape[1])
            s, z = (_rows_of(p, self.scheme, start, stop) for p in (scale, zero_point))
            yield start, stop, decode(codes, s, z, self.scheme)

    def __repr__(self) -> str:
        return f"Quantized({self.shape[0]}×{self.shape[1]}, {self.scheme}, {self.bits_per_weight:.3f} bits per weight)"


# --- pieces --------------------------------------------------------------------------------------------------------


def _row_pieces(
    x: Array, scheme: Scheme, host: int, device: int, columns: int | None = None
) -> Iterator[tuple[int, int]]:
    """(first row, last row + 1) of pieces of about ``host`` or ``device`` numbers, whole row blocks each."""
    high = scheme.block[0] if scheme.granularity == "block" else 1
    wanted = host if namespace(x) is np else device
    step = high * max(1, wanted // (high * max(1, columns or int(x.shape[1]))))
    for start in range(0, int(x.shape[0]), step):
        yield start, min(start + step, int(x.shape[0]))


def _rows_of(parameter: Array, scheme: Scheme, start: int, stop: int) -> Array:
    """The scale or zero point of rows ``start`` to ``stop``."""
    if scheme.granularity == "tensor":
        return parameter
    high = scheme.block[0] if scheme.granularity == "block" else 1
    return parameter[start // high : -(-stop // high), :]
