"""The k-quants, decoded: bytes to the numbers that they stand for.

The order of the products is part of the format: the unit d times the sub-block's code, that
times the number's code, and then the offset, dmin times its code, taken off; each rounded
to float32. All decoders agree in every bit.

Source: ggml's dequantisers (ggml-quants.c). Layouts are explained in ``kbits``, values in
``kquants``.
"""

from __future__ import annotations

from refllm.backend import Array, bitcast, namespace
from refllm.formats.gguf.kbits import separate, split_scales4, split_scales6
from refllm.formats.gguf.legacy import halves

__all__ = ["DECODERS"]


def _values(codes: Array, step: Array, offset: Array | None) -> Array:
    """codes[B, 256] (any type) · step[B, J] − offset[B, J] → float32 [B, 256]."""
    xp = namespace(codes, step)
    blocks, parts = step.shape
    out = xp.astype(xp.reshape(codes, (blocks, parts, -1)), xp.float32) * step[:, :, None]
    if offset is not None:
        out -= offset[:, :, None]
    return xp.reshape(out, (blocks, -1))


def q2_k(data: Array) -> Array:
    """bytes[B, 84] → float32 [B, 256]."""
    xp = namespace(data)
    pairs = data[:, :16]
    head = halves(data[:, 80:84])
    step = head[:, :1] * xp.astype(pairs & 15, xp.float32)
    return _values(
        separate(data[:, 16:80], 2, 32), step, head[:, 1:] * xp.astype(pairs >> 4, xp.float32)
    )


def q3_k(data: Array) -> Array:
    """bytes[B, 110] → float32 [B, 256]."""
    xp = namespace(data)
    codes = separate(data[:, 32:96], 2, 32) | (separate(data[:, :32], 1, 32) << 2)
    step = halves(data[:, 108:110]) * (xp.astype(split_scales6(data[:, 96:108]), xp.float32) - 32.0)
    return _values(xp.astype(codes, xp.float32) - 4.0, step, None)


def q4_k(data: Array) -> Array:
    """bytes[B, 144] → float32 [B, 256]."""
    step, offset = _six_bits(data)
    return _values(separate(data[:, 16:], 4, 32), step, offset)


def q5_k(data: Array) -> Array:
    """bytes[B, 176] → float32 [B, 256]."""
    step, offset = _six_bits(data)
    return _values(
        separate(data[:, 48:], 4, 32) | (separate(data[:, 16:48], 1, 32) << 4), step, offset
    )


def q6_k(data: Array) -> Array:
    """bytes[B, 210] → float32 [B, 256]."""
    xp = namespace(data)
    codes = separate(data[:, :128], 4, 64) | (separate(data[:, 128:192], 2, 32) << 4)
    scales = bitcast(xp.ascontiguousarray(data[:, 192:208]), xp.int8)
    step = halves(data[:, 208:210]) * xp.astype(scales, xp.float32)
    return _values(xp.astype(codes, xp.float32) - 32.0, step, None)


def _six_bits(data: Array) -> tuple[Array, Array]:
    """Steps and offsets [B, 8] of Q4_K and Q5_K."""
    xp = namespace(data)
    head = halves(data[:, :4])
    s, m = split_scales4(data[:, 4:16])
    return head[:, :1] * xp.astype(s, xp.float32), head[:, 1:] * xp.astype(m, xp.float32)


DECODERS = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
