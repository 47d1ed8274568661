"""``quantize`` and ``dequantize``: rows of numbers to the bytes of a GGUF tensor, and back.

Rows are worked on in pieces that stay in a processor's cache; a piece's blocks are encoded
side by side.

| symbol     | name                                          | shape                |
|------------|-----------------------------------------------|----------------------|
| x          | weight, float32 (narrower floats are widened) | [R, K]               |
| importance | weight of each column's error, ≥ 0            | [K]                  |
| raw        | the bytes, uint8                              | [R, row_bytes]       |

Left out: types of ``kinds``' omissions.
"""

from __future__ import annotations

import numpy as np

from refllm.backend import Array, namespace
from refllm.formats.gguf import kquants, kvalues, legacy, plain
from refllm.formats.gguf.arithmetic import quietly
from refllm.formats.gguf.types import kind, row_bytes
from refllm.formats.uniform import require_finite

__all__ = ["dequantize", "quantize"]

# numbers at a time (host, device): a search's few arrays stay near a processor
PIECE = (1 << 18, 1 << 24)
DECODERS = plain.DECODERS | legacy.DECODERS | kvalues.DECODERS


def quantize(
    x: Array, type: str, importance: Array | None = None, *, overflow: str = "inf"
) -> Array:
    """x[R, K] → uint8 [R, row_bytes]; bytes equal llama.cpp's on x86-64.

    ``importance`` [K] weighs the errors of each column (Q8_0, MXFP4 and plain floats take
    no notice of it). A step beyond float16's 65,504 becomes infinity, as in llama.cpp, and
    no reader can use the block; ``overflow="raise"`` refuses it.

    Raises
    ------
    ValueError
        for an unknown type, a row that blocks do not divide, and numbers that are NaN or
        infinite, naming the place.
    """
    xp = namespace(x, importance)
    if overflow not in ("inf", "raise"):
        raise ValueError(f"quantize: overflow is 'inf' or 'raise', not {overflow!r}")
    if x.ndim != 2 or np.dtype(x.dtype).kind != "f":
        raise ValueError(f"quantize: x is a float matrix [R, K], got {x.dtype} {tuple(x.shape)}")
    rows = int(x.shape[0])
    columns = int(x.shape[1])
    width = row_bytes(type, columns)
    with quietly(x):
        # what overflows here is refused as infinite
        x = xp.astype(x, xp.float32) if x.dtype == xp.float64 else x
    require_finite(x, "quantize: x")
    if importance is not None:
        importance = _checked(importance, columns)
    out = xp.empty((rows, width), dtype=xp.uint8)
    if not out.size:
        return out
    step = max(1, PIECE[0 if xp is np else 1] // columns)
    if xp is np:
        # glibc gives freed memory back beyond twice the largest block that was ever freed,
        # and pages taken anew cost more than the arithmetic on them. A block that is never
        # touched costs nothing and raises that limit.
        xp.empty(64 * PIECE[0], dtype=xp.uint8)
    with quietly(x):
        for start in range(0, rows, step):
            piece = xp.ascontiguousarray(xp.astype(x[start : start + step], xp.float32))
            out[start : start + step] = xp.reshape(_encoded(piece, type, importance), (-1, width))
    if overflow == "raise":
        _refuse_overflow(out, x, type)
    return out


def _encoded(x: Array, type: str, importance: Array | None) -> Array:
    """float32 x[R, K] → bytes [R·K/block, size]."""
    xp = namespace(x, importance)
    blocks = xp.reshape(x, (-1, kind(type).block))
    if type in plain.ENCODERS:
        return plain.ENCODERS[type](blocks)
    if type in kquants.ENCODERS:
        if importance is None:
            weights = None
        else:
            weights = xp.broadcast_to(importance, x.shape)
        return kquants.ENCODERS[type](
            blocks, None if weights is None else xp.reshape(weights, blocks.shape)
        )
    encode, bits = legacy.ENCODERS[type]
    if importance is None:
        weights = None
    else:
        weights = xp.reshape(legacy.weighted(x, importance), blocks.shape)
    return encode(blocks, bits, weights)


def dequantize(raw: Array, type: str) -> Array:
    """uint8 raw[R, row_bytes] → float32 [R, K]; ValueError for what no row of the type can
    be.
    """
    xp = namespace(raw)
    found = kind(type)
    if raw.ndim != 2 or raw.dtype != xp.uint8 or raw.shape[1] % found.size:
        raise ValueError(
            f"dequantize: raw {type} is uint8 [R, a multiple of {found.size}], "
            f"got {raw.dtype} {tuple(raw.shape)}"
        )
    rows = int(raw.shape[0])
    columns = int(raw.shape[1]) // found.size * found.block
    out = xp.empty((rows, columns), dtype=xp.float32)
    step = max(1, PIECE[0 if xp is np else 1] // max(1, columns))
    with quietly(raw):  # a damaged file may hold steps that are infinite or NaN
        for start in range(0, rows if columns else 0, step):
            piece = xp.reshape(xp.ascontiguousarray(raw[start : start + step]), (-1, found.size))
            out[start : start + step] = xp.reshape(DECODERS[type](piece), (-1, columns))
    return out


def _checked(importance: Array, columns: int) -> Array:
    """The importance as float32 [K]; ValueError for another shape and for what is no
    weight.
    """
    xp = namespace(importance)
    if tuple(importance.shape) != (columns,):
        raise ValueError(
            f"quantize: importance has one number a column, [{columns}], got {tuple(importance.shape)}"
        )
    require_finite(importance, "quantize: importance")
    if not bool(xp.all(importance >= 0)):
        raise ValueError("quantize: importance is negative somewhere; it weighs squared errors")
    return xp.ascontiguousarray(xp.astype(importance, xp.float32))


def _refuse_overflow(out: Array, x: Array, type: str) -> None:
    """ValueError naming the first block whose decoded numbers are not finite."""
    xp = namespace(out)
    good = xp.isfinite(dequantize(out, type))
    if bool(xp.all(good)):
        return
    row, column = divmod(int(xp.argmin(xp.reshape(good, (-1,)))), int(x.shape[1]))
    most = float(xp.max(xp.abs(x[row])))
    raise ValueError(
        f"quantize: {type} cannot hold row {row} near column {column}: its step, of numbers up to "
        f"{most:.3g}, is beyond float16's 65504; choose BF16 or F32"
    )
