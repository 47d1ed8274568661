"""``quantize`` and ``dequantize``: rows of floats to the bytes of a GGUF tensor, and back.

Rows are processed in tiles that fit into a processor's cache; the blocks of a tile are
quantised side by side.

| symbol     | name                                          | shape          |
|------------|-----------------------------------------------|----------------|
| x          | weight, float32 (narrower floats are widened) | [R, K]         |
| importance | weight of each column's error, ≥ 0            | [K]            |
| raw        | the bytes, uint8                              | [R, row_bytes] |

Left out: the types that ``types`` leaves out.
"""

from __future__ import annotations

import numpy as np

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.formats.gguf import kquants, kquants_symmetric, legacy, nonlinear, plain
from refllm.formats.gguf.arithmetic import without_warnings
from refllm.formats.gguf.types import gguf_type, row_bytes
from refllm.formats.granularity import tile_elements
from refllm.formats.uniform import require_finite

__all__ = ["dequantize", "quantize"]

# Elements per tile (host, device): the few arrays of a search stay in cache
TILE = (1 << 18, 1 << 24)
# these take the importance as it is
SEARCHED = kquants.QUANTIZERS | kquants_symmetric.QUANTIZERS | nonlinear.QUANTIZERS
# bytes [..., size, C] → Unpacked: positions in a block on the last axis but one
UNPACKERS = (
    plain.UNPACKERS
    | legacy.UNPACKERS
    | nonlinear.UNPACKERS
    | kquants.UNPACKERS
    | kquants_symmetric.UNPACKERS
)


def quantize(
    x: Array, type: str, importance: Array | None = None, *, overflow: str = "inf"
) -> Array:
    """x[R, K] → uint8 [R, row_bytes]; bytes equal llama.cpp's on x86-64.

    ``importance`` [K], llama.cpp's imatrix, weighs the errors of each column (Q8_0, MXFP4
    and plain floats ignore it). A scale beyond float16's 65,504 becomes infinity, as in
    llama.cpp, and no reader can use the block; ``overflow="raise"`` rejects it.

    Raises
    ------
    ValueError
        for an unknown type, a row that blocks do not divide, and values that are NaN or
        infinite, naming the index.

    >>> import numpy as np
    >>> x = np.linspace(-1, 1, 256, dtype="float32")[None]
    >>> raw = quantize(x, "Q4_K")
    >>> raw.shape, round(float(np.abs(dequantize(raw, "Q4_K") - x).max()), 2)
    ((1, 144), 0.03)
    """
    xp = namespace(x, importance)
    if overflow not in ("inf", "raise"):
        raise InputError(f"quantize: overflow is 'inf' or 'raise', not {overflow!r}")
    if x.ndim != 2 or np.dtype(x.dtype).kind != "f":
        raise InputError(f"quantize: x is a float matrix [R, K], got {x.dtype} {tuple(x.shape)}")
    rows = int(x.shape[0])
    columns = int(x.shape[1])
    width = row_bytes(type, columns)
    with without_warnings(x):
        if x.dtype == xp.float64:  # what overflows here is rejected as infinite below
            x = xp.astype(x, xp.float32)
    require_finite(x, "quantize: x")
    if importance is not None:
        importance = _checked(importance, columns)
    out = xp.empty((rows, width), dtype=xp.uint8)
    if not out.size:
        return out
    step = max(1, tile_elements(x, TILE) // columns)
    _keep_freed_memory(x)
    with without_warnings(x):
        for start in range(0, rows, step):
            tile = xp.ascontiguousarray(xp.astype(x[start : start + step], xp.float32))
            blocks = _quantize_tile(tile, type, importance)
            out[start : start + step] = xp.reshape(blocks, (-1, width))
    if overflow == "raise":
        _reject_overflow(out, x, type)
    return out


def _keep_freed_memory(like: Array) -> None:
    """Make glibc keep the memory of freed arrays, because fresh pages cost more than the
    arithmetic on them.

    It returns freed memory to the system above twice the largest block that was ever freed.
    A block that is never touched costs nothing and raises that limit.
    """
    if isinstance(like, np.ndarray):
        xp = namespace(like)
        xp.empty(64 * TILE[0], dtype=xp.uint8)


def _quantize_tile(x: Array, type: str, importance: Array | None) -> Array:
    """float32 x[R, K] → bytes [R·K/block, size]."""
    xp = namespace(x, importance)
    blocks = xp.reshape(x, (-1, gguf_type(type).block))  # [R·K/block, block]
    if type in plain.QUANTIZERS:
        return plain.QUANTIZERS[type](blocks)
    weights = None
    if type in SEARCHED:
        if importance is not None:
            weights = xp.reshape(xp.broadcast_to(importance, x.shape), blocks.shape)
        return SEARCHED[type](blocks, weights)
    if importance is not None:
        weights = xp.reshape(legacy.importance_weights(x, importance), blocks.shape)
    return legacy.QUANTIZERS[type](blocks, weights)


def dequantize(raw: Array, type: str) -> Array:
    """uint8 raw[R, row_bytes] → float32 [R, K].

    Raises
    ------
    ValueError
        if the bytes of a row are not a multiple of the type's block size.
    """
    xp = namespace(raw)
    found = gguf_type(type)
    if raw.ndim != 2 or raw.dtype != xp.uint8 or raw.shape[1] % found.size:
        raise InputError(
            f"dequantize: raw {type} is uint8 [R, a multiple of {found.size}], "
            f"got {raw.dtype} {tuple(raw.shape)}"
        )
    rows = int(raw.shape[0])
    columns = int(raw.shape[1]) // found.size * found.block
    out = xp.empty((rows, columns), dtype=xp.float32)
    step = max(1, tile_elements(raw, TILE) // max(1, columns))
    with without_warnings(raw):  # a damaged file may hold scales that are infinite or NaN
        for start in range(0, rows if columns else 0, step):
            tile = xp.ascontiguousarray(raw[start : start + step])
            if type in plain.FLOATS:
                values = plain.FLOATS[type](xp.reshape(tile, (-1, found.size)))
            else:
                values = UNPACKERS[type](xp.reshape(tile, (-1, found.size, 1))).values()
            out[start : start + step] = xp.reshape(values, (-1, columns))
    return out


def _checked(importance: Array, columns: int) -> Array:
    """The importance as float32 [K]; ValueError for another shape and for values that are
    negative or not finite.
    """
    xp = namespace(importance)
    if tuple(importance.shape) != (columns,):
        raise InputError(
            f"quantize: importance has one value per column, [{columns}], "
            f"got {tuple(importance.shape)}"
        )
    require_finite(importance, "quantize: importance")
    if not bool(xp.all(importance >= 0)):
        raise InputError("quantize: importance is negative somewhere; it weighs squared errors")
    return xp.ascontiguousarray(xp.astype(importance, xp.float32))


def _reject_overflow(out: Array, x: Array, type: str) -> None:
    """ValueError naming the first block whose dequantised values are not finite."""
    xp = namespace(out)
    good = xp.isfinite(dequantize(out, type))
    if bool(xp.all(good)):
        return
    row, column = divmod(int(xp.argmin(xp.reshape(good, (-1,)))), int(x.shape[1]))
    most = float(xp.max(xp.abs(x[row])))
    if not gguf_type(type).quantized:  # F16 or BF16
        largest, wider = ("65504", "BF16 or F32") if type == "F16" else ("3.39e38", "F32")
        raise InputError(
            f"quantize: {type} cannot hold row {row}, column {column}: "
            f"{float(x[row, column]):.6g} is beyond its largest value, {largest}; choose {wider}"
        )
    raise InputError(
        f"quantize: {type} cannot hold row {row} near column {column}: its scale, for values up "
        f"to {most:.3g}, is beyond float16's 65504; choose BF16 or F32"
    )
