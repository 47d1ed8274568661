"""The k-quants with offsets, Q2_K, Q4_K and Q5_K: 256 elements per block, in sub-blocks
whose scales and offsets are quantised themselves. (Q3_K and Q6_K: ``kquants_symmetric``.)

| type | codes | value          | sub-block | weights w of the search | it minimises   | d       |
|------|-------|----------------|-----------|-------------------------|----------------|---------|
| Q2_K | 0…3   | d·S·q − dmin·M | 16        | abs(x)                  | Σ w abs(error) | max/15  |
| Q4_K | 0…15  | d·S·q − dmin·M | 32        | abs(x) + rms of the 32  | Σ w error²     | max/63  |
| Q5_K | 0…31  | d·S·q − dmin·M | 32        | abs(x) + rms of the 32  | Σ w error²     | max/63  |

d is the largest scale of the block over the largest code of a scale, dmin the same of the
offsets.

| type | bytes of a block                                                    |
|------|---------------------------------------------------------------------|
| Q2_K | scales[16] (low half: scale, high half: offset), codes[64], d, dmin |
| Q4_K | d, dmin, scales[12], codes[128]                                     |
| Q5_K | d, dmin, scales[12], high bits[32], low four bits[128]              |

With an importance (one weight per column, usually the mean square of the activations that
it multiplies) the weights are importance · sqrt(σ² + x²), σ² a mean square of the block,
and the sub-blocks' scales and offsets are searched too, each with the summed weight of its
sub-block.

Quantisation has three stages: find the scale of each sub-block; quantise the scales, which
moves them; quantise the 256 elements again with the scales as stored. Where a stored scale
is 0 the third stage cannot divide, and the codes of the search stay in the bytes; no reader
sees them.

The order of the products in dequantisation is part of the format: the unit d times the
sub-block's code, that times the element's code, minus the offset, dmin times its code; each
rounded to float32. All readers agree in every bit.

| symbol | name                                        | shape                            |
|--------|---------------------------------------------|----------------------------------|
| x      | elements, position in the sub-block first   | [S, C], C = B · (256/S)          |
| q      | codes, float32 until they are packed        | [S, C]                           |
| S, M   | codes of scales and offsets, uint8          | [B, 256/S]                       |
| d, dmin| float16                                     | [B]                              |

Source: ggml's quantisers (ggml-quants.c) and block structures (ggml-common.h). Bytes equal
its x86-64 build's; builds that fuse multiply and add differ.

Left out: the searches (``scale_search``).
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.formats.gguf.arithmetic import divided, nearest, sequential_sum
from refllm.formats.gguf.bits import (
    float16_bytes,
    float16_values,
    pack_bits,
    round_to_float16,
    unpack_bits,
)
from refllm.formats.gguf.scale_search import IMPORTANT, Grid, fit_asymmetric, fit_positive
from refllm.formats.gguf.unpacked import Unpacked

__all__ = ["QUANTIZERS", "UNPACKERS"]

BLOCK = 256

# --- Q2_K ---------------------------------------------------------------------------------


def quantize_q2_k(x: Array, importance: Array | None) -> Array:
    """x[B, 256] → bytes[B, 84]."""
    xp = namespace(x, importance)
    codes, s, m, d, dmin = _fit_with_offsets(
        x, importance, size=16, levels=3, top=15, grid=Grid(-0.5, 0.1, 15), factor=1.0
    )
    tail = [float16_bytes(d), float16_bytes(dmin)]
    return xp.concat([s | (m << 4), pack_bits(codes, 2, 32), *tail], axis=1)


def unpack_q2_k(data: Array) -> Unpacked:
    """bytes[..., 84, C]."""
    xp = namespace(data)
    pairs = data[..., :16, :]
    d, dmin = _units(data[..., 80:84, :])
    scale = d * xp.astype(pairs & 15, xp.float32)
    offset = -dmin * xp.astype(pairs >> 4, xp.float32)
    return Unpacked(unpack_bits(data[..., 16:80, :], 2, 32), scale, offset)


# --- Q4_K ---------------------------------------------------------------------------------


def quantize_q4_k(x: Array, importance: Array | None) -> Array:
    """x[B, 256] → bytes[B, 144]."""
    xp = namespace(x, importance)
    codes, s, m, d, dmin = _fit_with_offsets(
        x, importance, size=32, levels=15, top=63, grid=Grid(-1.0, 0.1, 20), factor=2.0
    )
    head = [float16_bytes(d), float16_bytes(dmin), pack_six_bits(s, m)]
    return xp.concat([*head, pack_bits(codes, 4, 32)], axis=1)


def unpack_q4_k(data: Array) -> Unpacked:
    """bytes[..., 144, C]."""
    return Unpacked(unpack_bits(data[..., 16:, :], 4, 32), *_scales_and_offsets(data))


def pack_six_bits(scales: Array, offsets: Array) -> Array:
    """Q4_K's and Q5_K's eight scales and eight offsets of six bits, [B, 8] each → bytes[B, 12].

    The first four of each lie in the low bits of bytes 0–3 and 4–7; of the last four the
    low halves share bytes 8–11, and their two high bits fill up bytes 0–3 and 4–7.
    """
    xp = namespace(scales, offsets)
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = offsets[:, :4] | ((offsets[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((offsets[:, 4:] & 15) << 4)
    return xp.concat([first, second, third], axis=1)


def unpack_six_bits(data: Array) -> tuple[Array, Array]:
    """The inverse of ``pack_six_bits``: bytes[..., 12, C] → scales and offsets [..., 8, C]."""
    xp = namespace(data)
    first = data[..., :4, :]
    second = data[..., 4:8, :]
    third = data[..., 8:, :]
    scales = xp.concat([first & 63, (third & 15) | ((first >> 6) << 4)], axis=-2)
    return scales, xp.concat([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=-2)


def _scales_and_offsets(data: Array) -> tuple[Array, Array]:
    """d·S and −dmin·M of Q4_K and Q5_K, float32 [..., 8, C]."""
    xp = namespace(data)
    d, dmin = _units(data[..., :4, :])
    s, m = unpack_six_bits(data[..., 4:16, :])
    return d * xp.astype(s, xp.float32), -dmin * xp.astype(m, xp.float32)


# --- Q5_K ---------------------------------------------------------------------------------


def quantize_q5_k(x: Array, importance: Array | None) -> Array:
    """x[B, 256] → bytes[B, 176]."""
    xp = namespace(x, importance)
    codes, s, m, d, dmin = _fit_with_offsets(
        x, importance, size=32, levels=31, top=63, grid=Grid(-0.5, 0.1, 15), factor=2.0
    )
    head = [float16_bytes(d), float16_bytes(dmin), pack_six_bits(s, m)]
    high = pack_bits(codes >> 4, 1, 32)
    return xp.concat([*head, high, pack_bits(codes & 15, 4, 32)], axis=1)


def unpack_q5_k(data: Array) -> Unpacked:
    """bytes[..., 176, C]."""
    codes = unpack_bits(data[..., 48:, :], 4, 32)
    codes |= unpack_bits(data[..., 16:48, :], 1, 32) << 4
    return Unpacked(codes, *_scales_and_offsets(data))


QUANTIZERS = {"Q2_K": quantize_q2_k, "Q4_K": quantize_q4_k, "Q5_K": quantize_q5_k}
UNPACKERS = {"Q2_K": unpack_q2_k, "Q4_K": unpack_q4_k, "Q5_K": unpack_q5_k}


# --- scales with offsets ------------------------------------------------------------------


def _fit_with_offsets(
    x: Array,
    importance: Array | None,
    *,
    size: int,
    levels: int,
    top: int,
    grid: Grid,
    factor: float,
) -> tuple[Array, Array, Array, Array, Array]:
    """x[B, 256] → codes[B, 256], S and M [B, 256/size], d and dmin [B].

    ``levels`` is the largest code of an element, ``top`` of a scale or offset.
    """
    xp = namespace(x, importance)
    blocks = x.shape[0]
    columns = positions_first(x, size)  # [S, C]
    if importance is None:
        w = xp.abs(columns)
        if size == 32:
            w = xp.sqrt(sequential_sum(columns * columns) / float(size)) + w
        found, scales, offsets = fit_asymmetric(columns, w, levels, grid, mad=size == 16)
        s, d = _divide_by_largest(xp.reshape(scales, (blocks, -1)), top)
        m, dmin = _divide_by_largest(xp.reshape(offsets, (blocks, -1)), top)
        if top == 63:
            s = xp.minimum(s, 63)
            m = xp.minimum(m, 63)
        else:
            pair = s | (m << 4)  # the two nibbles of a byte
            s = pair & 15
            m = pair >> 4
    else:
        w = positions_first(importance_weights(x, importance, factor), size)
        found, scales, offsets = fit_asymmetric(columns, w, levels, IMPORTANT)
        sums = by_block(sequential_sum(w), blocks)  # [256/size, B]
        codes, d = fit_positive(by_block(scales, blocks), top, sums)
        s = xp.astype(codes.T, xp.uint8)
        codes, dmin = fit_positive(by_block(offsets, blocks), top, sums)
        m = xp.astype(codes.T, xp.uint8)
    scale = xp.reshape(round_to_float16(d)[:, None] * xp.astype(s, xp.float32), (-1,))  # [C]
    offset = xp.reshape(round_to_float16(dmin)[:, None] * xp.astype(m, xp.float32), (-1,))
    codes = block_codes(requantize(columns, found, scale, offset, 0, levels), blocks)
    return codes, s, m, d, dmin


def _divide_by_largest(x: Array, levels: int) -> tuple[Array, Array]:
    """Scales x[B, J] ≥ 0 → their codes (the largest becomes ``levels``) and the unit d[B]."""
    xp = namespace(x)
    # without NaN, which overflow may have left
    top = xp.max(xp.where(x > 0, x, 0.0), axis=1)
    inverse = divided(float(levels), top, top > 0)
    codes = nearest(inverse[:, None] * x) & 255  # modulo 256, as C stores it in a byte
    return xp.astype(codes, xp.uint8), top / float(levels)


def _units(data: Array) -> tuple[Array, Array]:
    """d and dmin, float32 [..., 1, C] each, from bytes[..., 4, C]."""
    head = float16_values(data)
    return head[..., :1, :], head[..., 1:, :]


# --- shared by all k-quants ---------------------------------------------------------------


def positions_first(x: Array, size: int) -> Array:
    """x[B, 256] → [S, C]: position i of all sub-blocks of ``size`` in row i."""
    xp = namespace(x)
    return xp.ascontiguousarray(xp.reshape(x, (-1, size)).T)


def by_block(x: Array, blocks: int) -> Array:
    """One value per sub-block, [C] → [J, B]: sub-blocks first, to be searched like positions."""
    xp = namespace(x)
    return xp.ascontiguousarray(xp.reshape(x, (blocks, -1)).T)


def block_codes(codes: Array, blocks: int) -> Array:
    """Codes [S, C] → uint8 [B, 256], in the order of the elements."""
    xp = namespace(codes)
    return xp.reshape(xp.ascontiguousarray(xp.astype(codes, xp.uint8).T), (blocks, BLOCK))


def importance_weights(x: Array, importance: Array, factor: float) -> Array:
    """x[B, 256] → importance · sqrt(σ² + x²), [B, 256], with σ² = factor · mean x² of each
    block.
    """
    xp = namespace(x, importance)
    squares = x * x
    total = sequential_sum(xp.ascontiguousarray(squares.T))
    variance = factor * total / float(BLOCK)
    return importance * xp.sqrt(variance[:, None] + squares)


def requantize(
    x: Array, codes: Array, scale: Array, offset: Array | None, low: int, high: int
) -> Array:
    """The third stage: codes of x[S, C] for stored scales and offsets [C], counted from 0;
    where a scale is 0, the codes of the search, ``codes``.
    """
    xp = namespace(x, codes, scale)
    some = scale != 0
    t = x
    if offset is not None:
        t = t + offset
    t = xp.astype(nearest(t / xp.where(some, scale, 1.0)), xp.float32)
    return xp.where(some, xp.clip(t, float(low), float(high)) - float(low), codes)
