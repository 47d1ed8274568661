"""Numbers to codes and back, given their steps; and a matrix in pieces of rows.

The formulas and the two orders of rounding are explained in ``affine``, what shares a step in ``scheme``.

| symbol | name                                       | shape                   |
|--------|--------------------------------------------|-------------------------|
| x      | activations or weight                      | any, [T, N], [M, N]     |
| q      | codes, int8 (signed rules) or uint8        | as x                    |
| s, z   | scale and zero point                       | (), [M, 1], [M, N/g], … |

Left out: where steps come from (``ranges``), storage (``storage``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from refllm.backend import Array, namespace
from refllm.formats.ranges import reachable, refuse_non_finite
from refllm.formats.scheme import Scheme, as_blocks, from_blocks, steps_as_blocks

__all__ = ["PIECE", "decode", "encode", "row_pieces", "rows_of"]

# Numbers at a time (host, device). On a CPU all steps of a piece run within its cache; a GPU wants to be filled.
PIECE = (1 << 17, 1 << 26)
_ADD_FIRST = ("half_integer", "asymmetric_signed")


def encode(x: Array, scale: Array, zero_point: Array, scheme: Scheme, *, name: str = "x", check: bool = True) -> Array:
    """Codes of x, int8 or uint8, shaped like x. The quotient is clipped before it becomes an integer.

    ``check=False`` is for a caller that knows x to be finite and within the range that the scale was made for.

    Raises
    ------
    ValueError
        naming ``name`` if x holds NaN or infinity, or scale or zero point has not the scheme's shape.
    """
    xp = namespace(x, scale, zero_point)
    if check:
        refuse_non_finite(x, name)
        if scale.size and not 0.0 < float(xp.min(scale)) <= float(xp.max(scale)) < math.inf:  # NaN fails it too
            raise ValueError(f"{name}: a scale is a finite number above 0")
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


# --- pieces --------------------------------------------------------------------------------------------------------


def row_pieces(like: Array, shape: tuple[int, int], scheme: Scheme, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(first row, last row + 1) of pieces of a matrix, whole row blocks each, of about ``size`` numbers.

    ``size`` is (on the host, on a device); ``like`` tells which of them is meant.
    """
    high = scheme.block[0] if scheme.granularity == "block" else 1
    wanted = size[0] if namespace(like) is np else size[1]
    step = high * max(1, wanted // (high * max(1, shape[1])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def rows_of(parameter: Array, scheme: Scheme, start: int, stop: int) -> Array:
    """The scale or zero point of rows ``start`` to ``stop``."""
    if scheme.granularity == "tensor":
        return parameter
    high = scheme.block[0] if scheme.granularity == "block" else 1
    return parameter[start // high : -(-stop // high), :]
