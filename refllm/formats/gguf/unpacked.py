"""Blocks taken apart: every block format is codes times a scale, plus an offset.

    w[i] = scale[j] · code[i] + offset[j]        element i in sub-block j = ⌊i / S⌋

A format's ``unpack`` returns the three; what they are for is here: ``Unpacked.values`` makes
the weights, and ``Unpacked.products`` multiplies without making them where that takes fewer
operations. The order of rounding is part of the format: scale · code is rounded to float32,
then the sum with the offset.

| symbol  | name                                                        | shape         |
|---------|-------------------------------------------------------------|---------------|
| codes   | integers, uint8 or int8                                     | [..., n, C]   |
| scale   | float32                                                     | [..., J, C]   |
| offset  | float32, or None                                            | [..., J, C]   |
| n, S, J | elements of a block, of a sub-block; J = n / S sub-blocks   |               |
| C       | blocks side by side: of the rows that are interleaved       |               |
| x       | inputs of T tokens                                          | [T, N]        |

Left out: formats whose blocks are more than that (the lattices of IQ1 to IQ3).
"""

from __future__ import annotations

from typing import NamedTuple

from refllm.backend import Array, DType, namespace

__all__ = ["Unpacked"]

# Up to so many rows of x, sums of a sub-block are scaled instead of its weights.
FEW_ROWS = 16  # mutate: equivalent (speed alone)


class Unpacked(NamedTuple):
    """The parts of blocks; see the module's docstring."""

    codes: Array
    scale: Array
    offset: Array | None

    def values(self) -> Array:
        """The weights, float32 [..., n, C]."""
        xp = namespace(self.codes, self.scale)
        *lead, n, c = self.codes.shape
        parts = self.scale.shape[-2]
        out = xp.astype(xp.reshape(self.codes, (*lead, parts, n // parts, c)), xp.float32)
        out *= self.scale[..., None, :]
        if self.offset is not None:
            out += self.offset[..., None, :]
        return xp.reshape(out, (*lead, n, c))

    def is_finite(self) -> bool:
        """Whether all weights are finite."""
        xp = namespace(self.scale)
        parts = (self.scale,) if self.offset is None else (self.scale, self.offset)
        if not all(bool(xp.all(xp.isfinite(part))) for part in parts):
            return False
        if not bool(xp.any(xp.abs(self.scale) > 2.0**100)):  # |code| < 2^8: nothing overflows
            return True
        return bool(xp.all(xp.isfinite(self.values())))

    def products(self, x: Array, dtype: DType) -> Array:
        """x[T, B·n] times the weights of blocks [B, n, C] → [T, C] in ``dtype``.

        The offset of a sub-block multiplies the sum of its inputs, instead of being added to
        each weight, and with few rows of x its scale multiplies the inner sum, one product
        for S weights:

            Σ_i x_i (s_j q_i + m_j)  =  Σ_j s_j (Σ_{i in j} x_i q_i)  +  Σ_j m_j (Σ_{i in j} x_i)

        Rounding in float32: at most (S + B·J + 4) u · Σ_i |x_i| (|s_j q_i| + |m_j|) from the
        exact product with ``values``, u = 2⁻²⁴: S roundings of an inner sum and B·J + 2 of
        the outer ones, two of ``values`` itself. In wider types the weights are ``values``.
        """
        xp = namespace(x, self.codes)
        rows = x.shape[0]
        blocks, n, c = self.codes.shape
        if dtype != xp.float32:
            return x @ xp.astype(xp.reshape(self.values(), (-1, c)), dtype)
        parts = blocks * self.scale.shape[1]  # B·J
        split = xp.reshape(x, (rows, parts, blocks * n // parts))  # [T, B·J, S]
        codes = xp.reshape(self.codes, (parts, blocks * n // parts, c))  # [B·J, S, C]
        codes = xp.astype(codes, xp.float32)
        scale = xp.reshape(self.scale, (parts, 1, c))
        if rows <= FEW_ROWS:
            inner = split.transpose(1, 0, 2) @ codes  # [B·J, T, C]
            inner *= scale
            out = xp.sum(inner, axis=0)
        else:
            codes *= scale
            out = x @ xp.reshape(codes, (-1, c))
        if self.offset is not None:
            out += xp.sum(split, axis=-1) @ xp.reshape(self.offset, (parts, c))
        return out
