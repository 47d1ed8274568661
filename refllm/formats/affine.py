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

Left out: integer products (``integer``), other byte layouts (``layouts``), a step that is itself quantised.
"""

from __future__ import annotations

import math

from refllm.backend import Array, namespace
from refllm.formats.codes import PIECE, decode, encode, row_pieces, rows_of
from refllm.formats.packing import words_per_row
from refllm.formats.quantized import Quantized
from refllm.formats.ranges import qparams, range_to_qparams, ranges
from refllm.formats.scheme import GRANULARITIES, RULES, Scheme
from refllm.formats.storage import load_scale, pack_codes, store_scale, store_zero

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
    shape = int(x.shape[0]), int(x.shape[1])
    words = xp.empty((shape[0], words_per_row(shape[1], scheme.bits)), dtype=xp.uint32)
    check = not own or scheme.rule == "awq"  # else qparams has seen all of x, and the scale covers it
    for start, stop in row_pieces(x, shape, scheme, PIECE):
        s, z = (rows_of(p, scheme, start, stop) for p in (scale, zero_point))
        codes = encode(x[start:stop, :], s, z, scheme, name=name, check=check)
        words[start:stop, :] = pack_codes(codes, scheme)
    return Quantized(words, stored, store_zero(zero_point, scheme, zero_dtype), scheme, shape, x.dtype)


def fake_quantize(x: Array, scheme: Scheme, *, name: str = "x") -> Array:
    """x through its codes and back, in x's dtype: ``quantize(x, scheme).dequantize()`` for any shape of x."""
    xp = namespace(x)
    scale, zero_point = qparams(x, scheme, name=name)
    outer = tuple(x.shape)
    shape = math.prod(outer[:-1]), outer[-1] if outer else 1
    x = xp.reshape(x, shape)
    scale, zero_point = (xp.reshape(p, scheme.scale_shape(shape)) for p in (scale, zero_point))
    out = xp.empty(x.shape, dtype=x.dtype)
    for start, stop in row_pieces(x, shape, scheme, PIECE):
        s, z = (rows_of(p, scheme, start, stop) for p in (scale, zero_point))
        codes = encode(x[start:stop, :], s, z, scheme, name=name, check=scheme.rule == "awq")
        out[start:stop, :] = decode(codes, s, z, scheme)
    return xp.reshape(out, outer)


def effective_bits(bits: int, group_size: int, *, scale_bits: int = 16, zero_bits: int = 0) -> float:
    """Bits a weight, its share of the group's scale and zero point included: b + (scale + zero)/g."""
    return bits + (scale_bits + zero_bits) / group_size
