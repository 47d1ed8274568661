"""The layers of a Llama-like decoder as functions of arrays: RMSNorm, RoPE, SwiGLU.

Sources: RMSNorm, Zhang & Sennrich 2019, eq. 4; RoPE, Su et al. 2021, eq. 34 (half-split
pairing, as the checkpoints of the four families use it; ``rope`` computes the frequencies);
SwiGLU, Shazeer 2020, eq. 6.

| symbol | name        | shape                                    |
|--------|-------------|------------------------------------------|
| x      | residual    | [T, N]                                   |
| q, k   | heads       | [T, H, D], [T, G, D]                     |
| θ_i    | frequency   | [D/2], θ^(-2i/D)                         |

Left out: ALiBi, learned positions, partial rotary, dropout.
"""

from __future__ import annotations

from refllm.backend import Array, DType, namespace
from refllm.model.rope import RopeScaling


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """y = x / sqrt(mean(x²) + ε) · g over the last axis; x[..., N], gain[N] → [..., N].

    ``rms_norm(c·x) = rms_norm(x)`` for c > 0, up to ε. A row of zeros gives zeros, because
    ε > 0.

    >>> import numpy as np
    >>> rms_norm(np.array([[3.0, 3.0, -3.0], [0.0, 0.0, 0.0]]), np.ones(3), 1e-9).round(3).tolist()
    [[1.0, 1.0, -1.0], [0.0, 0.0, 0.0]]
    """
    xp = namespace(x, gain)
    size = xp.einsum("...n,...n->...", x, x)[..., None]  # Σ x², [..., 1]
    size *= 1.0 / x.shape[-1]
    size += eps
    y = x / xp.sqrt(size, out=size)  # [..., N]
    y *= gain
    return y


def rope_table(
    frequencies: Array, positions: Array, dtype: DType, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """cos[T, 1, 1, D/2] and signed sin[T, 1, 2, D/2] of position · θ_i, from
    frequencies[D/2] (float64, ``rope.rope_frequencies``) and positions[T].

    Both are multiplied by the attention factor of ``scaling``: q and k are rotated with them,
    so scores grow by its square. (Its frequencies are those that were passed.)

    The sine is (−sin, sin), one sign for each half of a head, so that it can be multiplied
    with all heads of a token. Angles are computed in float64: at position 100,000 a float32
    angle is off by 0.004 radians.
    """
    xp = namespace(frequencies, positions)
    positions = xp.astype(positions, xp.float64)
    angles = positions[:, None, None, None] * frequencies  # [T, 1, 1, D/2]
    cos = xp.cos(angles)
    sin = xp.sin(angles)
    if scaling is not None and scaling.attention_factor != 1.0:
        cos *= scaling.attention_factor
        sin *= scaling.attention_factor
    signed = xp.concat([-sin, sin], axis=2)  # [T, 1, 2, D/2]
    return xp.astype(cos, dtype), xp.astype(signed, dtype)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate each pair (x_i, x_{i+D/2}) by its angle: x[T, H, D] and the two arrays of
    ``rope_table`` → [T, H, D].

    The score of a rotated query and key depends on the difference of their positions only.
    The inverse rotation, which is also the backward pass, is ``apply_rope(x, cos, -sin)``.

    >>> import numpy as np
    >>> cos, sin = rope_table(np.array([np.pi / 2]), np.array([0, 1, 2]), "float64")
    >>> x = np.array([1.0, 0.0]).reshape(1, 1, 2).repeat(3, axis=0)  # (1, 0) three times
    >>> [[int(v) for v in pair] for pair in apply_rope(x, cos, sin)[:, 0].round()]
    [[1, 0], [0, 1], [-1, 0]]
    """
    xp = namespace(x, cos, sin)
    tokens, heads, dim = x.shape
    pairs = x.reshape(tokens, heads, 2, dim // 2)  # [T, H, 2, D/2]: first and second half
    out = xp.multiply(pairs, cos)
    out += pairs[:, :, ::-1] * sin  # x₁ cos − x₂ sin, x₂ cos + x₁ sin
    return out.reshape(tokens, heads, dim)  # [T, H, D]


def sigmoid(x: Array) -> Array:
    """σ(x) = ½ (1 + tanh(x/2)), elementwise, in the form that never overflows."""
    xp = namespace(x)
    out = xp.multiply(x, 0.5)
    xp.tanh(out, out=out)
    out += 1.0
    out *= 0.5
    return out


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) · up, elementwise; [T, F], [T, F] → [T, F].

    Simple version: ``gate / (1 + exp(-gate)) * up``. Computed as silu(x) = h (1 + tanh h)
    with h = x/2, which never overflows.
    """
    xp = namespace(gate, up)
    half = xp.multiply(gate, 0.5)
    out = xp.tanh(half)
    out += 1.0
    out *= half
    out *= up
    return out
