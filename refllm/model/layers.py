"""The layers of a Llama-like decoder as functions of arrays: RMSNorm, RoPE, attention,
SwiGLU.

Sources: RMSNorm, Zhang & Sennrich 2019, eq. 4; RoPE, Su et al. 2021, eq. 34 (half-split
pairing, as the checkpoints of the four families use it) and Llama 3.1's frequency scaling;
grouped-query attention, Ainslie et al. 2023; SwiGLU, Shazeer 2020, eq. 6.

| symbol | name        | shape                                                        |
|--------|-------------|--------------------------------------------------------------|
| x      | residual    | [T, N]                                                       |
| q      | queries     | [T, H, D]                                                    |
| k, v   | keys/values | [S, G, D]: head h of H reads head h // (H/G) of G            |
| θ_i    | frequency   | [D/2], θ^(-2i/D)                                             |

Left out: ALiBi, learned positions, partial rotary, dropout, soft-capping.
"""

from __future__ import annotations

import math
from typing import Any

from refllm.backend import Array, namespace
from refllm.model.config import RopeScaling


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """y = x / sqrt(mean(x²) + ε) · g over the last axis; x[..., N], gain[N] → [..., N].

    ``rms_norm(c·x) = rms_norm(x)`` for c > 0, up to ε. A zero row gives a zero row, because
    ε > 0.
    """
    xp = namespace(x, gain)
    size = xp.einsum("...n,...n->...", x, x)[..., None]
    size *= 1.0 / x.shape[-1]
    size += eps
    y = x / xp.sqrt(size, out=size)
    y *= gain
    return y


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> list[float]:
    """The D/2 angular frequencies, radians per position, as Python floats (float64).

    Llama 3's scaling: wavelengths above ``original/low_freq_factor`` are slowed by
    ``factor``, those below ``original/high_freq_factor`` are kept, and the band between is
    interpolated.
    """
    frequencies = [theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return frequencies
    return [_llama3(f, scaling) for f in frequencies]


def _llama3(frequency: float, s: RopeScaling) -> float:
    # turns within the old context
    turns = s.original_max_position_embeddings * frequency / (2 * math.pi)
    if turns < s.low_freq_factor:
        return frequency / s.factor
    if turns > s.high_freq_factor:
        return frequency
    smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - smooth) * frequency / s.factor + smooth * frequency


def rope_table(frequencies: Array, positions: Array, dtype: Any) -> tuple[Array, Array]:
    """cos and signed sin of position · θ_i: frequencies[D/2] float64, positions[T] → [T, 1,
    1, D/2], [T, 1, 2, D/2].

    The sine is (−sin, sin), one sign for each half of a head, ready to be multiplied with
    all heads of a token. Angles are taken in float64: at position 100,000 a float32 angle
    is off by 0.004 radians.
    """
    xp = namespace(frequencies, positions)
    angles = xp.astype(positions, xp.float64)[:, None, None, None] * frequencies
    sin = xp.sin(angles)
    return xp.astype(xp.cos(angles), dtype), xp.astype(xp.concat([-sin, sin], axis=2), dtype)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate each pair (x_i, x_{i+D/2}) by its angle: x[T, H, D] and the two of
    ``rope_table`` → [T, H, D].

    The score of a rotated query and key depends on the difference of their positions only.
    The inverse rotation, which is also the backward pass, is ``apply_rope(x, cos, -sin)``.
    """
    xp = namespace(x, cos, sin)
    tokens, heads, dim = x.shape
    pairs = x.reshape(tokens, heads, 2, dim // 2)  # first and second half
    out = xp.multiply(pairs, cos)
    out += pairs[:, :, ::-1] * sin  # x₁ cos − x₂ sin, x₂ cos + x₁ sin
    return out.reshape(tokens, heads, dim)


def sigmoid(x: Array) -> Array:
    """σ(x) = ½ (1 + tanh(x/2)), the form that never overflows."""
    xp = namespace(x)
    out = xp.multiply(x, 0.5)
    xp.tanh(out, out=out)
    out += 1.0
    out *= 0.5
    return out


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) · up, elementwise; [T, F] → [T, F]. silu(x) = x σ(x) = h (1 + tanh h) with
    h = x/2.
    """
    xp = namespace(gate, up)
    half = xp.multiply(gate, 0.5)
    out = xp.tanh(half)
    out += 1.0
    out *= half
    out *= up
    return out
