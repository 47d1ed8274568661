"""The k-quants without offsets, Q3_K and Q6_K: 256 elements per block, in sub-blocks of 16
whose scales are quantised themselves. The stages and symbols are explained in ``kquants``.

| type | codes  | value        | weights of the search | search                  |
|------|--------|--------------|-----------------------|-------------------------|
| Q3_K | −4…3   | d·(S − 32)·q | x²                    | by sweeps; −extreme/32  |
| Q6_K | −32…31 | d·S·q        | x²                    | symmetric; −extreme/128 |

| type | bytes of a block                                     |
|------|------------------------------------------------------|
| Q3_K | high bits[32], low two bits[64], scales[12], d       |
| Q6_K | low four bits[128], high two bits[64], scales[16], d |

With an importance, Q3_K's weights are importance · sqrt(σ² + x²) and its scales are searched
too; Q6_K takes the importance alone.

Source: ggml's quantisers (ggml-quants.c) and block structures (ggml-common.h).
"""

from __future__ import annotations

from refllm.backend import Array, bitcast, namespace
from refllm.formats.gguf.arithmetic import divided, extreme, nearest, sequential_sum
from refllm.formats.gguf.bits import (
    float16_bytes,
    float16_values,
    pack_bits,
    round_to_float16,
    unpack_bits,
)
from refllm.formats.gguf.kquants import (
    block_codes,
    by_block,
    importance_weights,
    positions_first,
    requantize,
)
from refllm.formats.gguf.scale_search import TINY, fit_by_sweeps, fit_symmetric
from refllm.formats.gguf.unpacked import Unpacked

__all__ = ["QUANTIZERS", "UNPACKERS"]

# --- Q3_K ---------------------------------------------------------------------------------


def quantize_q3_k(x: Array, importance: Array | None) -> Array:
    """x[B, 256] → bytes[B, 110]."""
    xp = namespace(x, importance)
    blocks = x.shape[0]
    columns = positions_first(x, 16)  # [16, C]
    if importance is None:
        found, scales = fit_by_sweeps(columns, 4)
        s, d = _divide_by_extreme(by_block(scales, blocks), 32, 31)
        s = xp.where(d == 0, 0, s + 32)
    else:
        w = positions_first(importance_weights(x, importance, 2.0), 16)
        found, scales = fit_symmetric(columns, 4, w)
        s, d = fit_symmetric(by_block(scales, blocks), 32, by_block(sequential_sum(w), blocks))
    scale = xp.reshape((round_to_float16(d) * (s - 32.0)).T, (-1,))  # [C]
    codes = block_codes(requantize(columns, found, scale, None, -4, 3), blocks)
    high = pack_bits(codes >> 2, 1, 32)
    low = pack_bits(codes & 3, 2, 32)
    packed = pack_wide_scales(xp.astype(xp.ascontiguousarray(s.T), xp.uint8))
    return xp.concat([high, low, packed, float16_bytes(d)], axis=1)


def unpack_q3_k(data: Array) -> Unpacked:
    """bytes[..., 110, C]."""
    xp = namespace(data)
    codes = unpack_bits(data[..., 32:96, :], 2, 32)
    codes |= unpack_bits(data[..., :32, :], 1, 32) << 2
    s = xp.astype(unpack_wide_scales(data[..., 96:108, :]), xp.float32) - 32.0
    scale = float16_values(data[..., 108:110, :]) * s
    return Unpacked(bitcast(codes - 4, xp.int8), scale, None)


def pack_wide_scales(scales: Array) -> Array:
    """Q3_K's sixteen scales of six bits, [B, 16] → bytes[B, 12].

    Low halves: scale j in byte j mod 8, the first eight in the low half. The two high bits
    of scale j lie in byte 8 + j mod 4, at bit 2·(j div 4).
    """
    xp = namespace(scales)
    low = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << 4)
    return xp.concat([low, pack_bits(scales >> 4, 2, 4)], axis=1)


def unpack_wide_scales(data: Array) -> Array:
    """The inverse of ``pack_wide_scales``: bytes[..., 12, C] → scales [..., 16, C]."""
    low = unpack_bits(data[..., :8, :], 4, 8)
    return low | (unpack_bits(data[..., 8:, :], 2, 4) << 4)


# --- Q6_K ---------------------------------------------------------------------------------


def quantize_q6_k(x: Array, importance: Array | None) -> Array:
    """x[B, 256] → bytes[B, 210]; blocks whose scales are all tiny become zero bytes."""
    xp = namespace(x, importance)
    blocks = x.shape[0]
    columns = positions_first(x, 16)  # [16, C]
    w = importance
    if w is not None:
        w = positions_first(w, 16)
    found, scales = fit_symmetric(columns, 32, w)
    scales = by_block(scales, blocks)  # [16, B]
    empty = xp.max(xp.abs(_without_nan(scales)), axis=0) < TINY
    s, d = _divide_by_extreme(scales, 128, 127)
    scale = xp.reshape((round_to_float16(d) * s).T, (-1,))  # [C]
    codes = block_codes(requantize(columns, found, scale, None, -32, 31), blocks)
    low = pack_bits(codes & 15, 4, 64)
    high = pack_bits(codes >> 4, 2, 32)
    signed = bitcast(xp.ascontiguousarray(xp.astype(s.T, xp.int8)), xp.uint8)
    out = xp.concat([low, high, signed, float16_bytes(d)], axis=1)
    return out * xp.astype(~empty, xp.uint8)[:, None]


def unpack_q6_k(data: Array) -> Unpacked:
    """bytes[..., 210, C]."""
    xp = namespace(data)
    codes = unpack_bits(data[..., :128, :], 4, 64)
    codes |= unpack_bits(data[..., 128:192, :], 2, 32) << 4
    s = xp.astype(bitcast(data[..., 192:208, :], xp.int8), xp.float32)
    scale = float16_values(data[..., 208:210, :]) * s
    return Unpacked(bitcast(codes - 32, xp.int8), scale, None)


QUANTIZERS = {"Q3_K": quantize_q3_k, "Q6_K": quantize_q6_k}
UNPACKERS = {"Q3_K": unpack_q3_k, "Q6_K": unpack_q6_k}


# --- signed scales ------------------------------------------------------------------------


def _divide_by_extreme(scales: Array, levels: int, high: int) -> tuple[Array, Array]:
    """Signed scales [J, B] → codes (the one of largest size becomes −``levels``, float32
    [J, B]) and the unit d[B].
    """
    xp = namespace(scales)
    m = extreme(_without_nan(scales))
    some = m != 0
    inverse = divided(-float(levels), m, some)
    codes = xp.clip(xp.astype(nearest(inverse * scales), xp.float32), -float(levels), float(high))
    return codes, divided(1.0, inverse, some)


def _without_nan(scales: Array) -> Array:
    """Scales with 0 for NaN, which sums that overflowed leave."""
    xp = namespace(scales)
    return xp.where(xp.isnan(scales), 0.0, scales)
