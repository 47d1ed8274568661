"""FP8 products: codes are multiplied, partial sums are promoted to float32 before the
narrow accumulator loses them, scales are applied last.

    Y[t, m] = Σ_k  s_x[t, k] · s_w[m, k] · ( Σ_{i in slice k} q_x[t, i] · q_w[m, i] )

A slice is a run of columns that share a scale, 128 in DeepSeek-V3. The inner sum is what a
tensor core computes; at its end the partial sum is *promoted*: multiplied by its scales and
added to a float32 sum in ordinary registers.

Why promotion is more than a way to apply scales: Hopper's tensor cores keep about 14 bits
when they add products of 8-bit floats. Each addition truncates what is below 2^−13 of the
sum so far, always towards zero. Over K = 4096 these errors add up to about 2 % of a sum;
over 128 they cannot. ``Accumulator`` simulates it:

| field   | meaning                                                                         |
|---------|---------------------------------------------------------------------------------|
| bits    | significant bits that a sum keeps (24: float32)                                 |
| every   | products that are added exactly before the sum is truncated: 16 to 32           |
| promote | products after which the sum moves to float32 and restarts at zero; None: never |

| symbol   | name                         | shape                      |
|----------|------------------------------|----------------------------|
| q_x, s_x | codes, scales of activations | [T, N], [T, ⌈N/128⌉]       |
| q_w, s_w | codes, scales of the weight  | [M, N], [⌈M/128⌉, ⌈N/128⌉] |
| Y        | product                      | [T, M]                     |

Sources: DeepSeek-V3 (2024), §3.3.2 and figure 7; its ``fp8_gemm`` for the order of
operations.

Left out: how the hardware aligns products before it adds them (the sum of ``every`` of them
is exact here).
"""

from __future__ import annotations

from dataclasses import dataclass

from refllm.backend import Array, bitcast, namespace
from refllm.errors import InputError
from refllm.formats import minifloat
from refllm.formats.block_float import BlockFloatLinear, FloatScheme, quantize
from refllm.formats.granularity import MATMUL_TILE

__all__ = ["ACTIVATIONS", "Accumulator", "Fp8Linear", "scaled_matmul", "truncate"]

TILE = 128
# the granularity at which activations share a scale
ACTIVATIONS: dict[str, tuple[str, tuple[int, int] | None]] = {
    "tensor": ("tensor", None),
    "token": ("token", None),
    "tile": ("block", (1, TILE)),
}


@dataclass(frozen=True)
class Accumulator:
    """A simulated tensor core accumulator; see the module's docstring.

    >>> Accumulator(bits=14, every=32, promote=128).promote
    128
    """

    bits: int = 14
    every: int = 32
    promote: int | None = TILE

    def __post_init__(self) -> None:
        promote = 1 if self.promote is None else self.promote
        if not 1 <= self.bits <= 24 or self.every < 1 or promote < 1:
            raise InputError(
                f"Accumulator: 1 to 24 bits, every and promote of at least 1, got {self}"
            )

    def product(self, x: Array, w: Array) -> Array:
        """x[T, K], w[M, K] float32 → x wᵀ [T, M] float32."""
        xp = namespace(x, w)
        k = int(x.shape[1])
        total = xp.zeros((x.shape[0], w.shape[0]), dtype=xp.float32)
        length = self.promote or max(1, k)
        for first in range(0, k, length):
            last = min(first + length, k)
            partial = xp.zeros_like(total)  # the narrow accumulator
            for i in range(first, last, self.every):
                at = slice(i, min(i + self.every, last))
                partial = truncate(partial + x[:, at] @ w[:, at].T, self.bits)
            total += partial  # promotion to float32
        return total


def truncate(x: Array, bits: int) -> Array:
    """float32 values truncated towards zero to ``bits`` significant bits.

    >>> import numpy as np
    >>> truncate(np.array([1.9375, -5.5], dtype="float32"), 3).tolist()
    [1.75, -5.0]
    """
    xp = namespace(x)
    return bitcast(bitcast(x, xp.int32) & (-1 << (24 - bits)), xp.float32)


def scaled_matmul(
    x: BlockFloatLinear, w: BlockFloatLinear, accumulator: Accumulator | None = None
) -> Array:
    """Codes x[T, N] times codes w[M, N] → Y[T, M] float32, slice by slice as in the formula
    of the module.

    ``accumulator`` None adds within a slice in float32.

    Raises
    ------
    ValueError
        if rows differ in length, or the slices of the two do not nest.
    """
    xp = namespace(x.codes, w.codes)
    rows, n = x.shape
    outputs, k = w.shape
    if n != k:
        raise InputError(f"scaled_matmul: rows of {n} and of {k} codes do not fit")
    widths = _scale_width(x), _scale_width(w)
    width = min(widths)
    if max(widths) % width and max(widths) < n:
        raise InputError(
            f"scaled_matmul: scales of {widths[0]} and of {widths[1]} columns do not nest"
        )
    out = xp.zeros((rows, outputs), dtype=xp.float32)
    x_scale = x.scale
    w_scale = w.scale
    x_codes = x.codes
    w_codes = w.codes
    for top, bottom in w.scheme.geometry.row_tiles(w_codes, w.shape, MATMUL_TILE):
        for first in range(0, n, width):
            at = slice(first, min(first + width, n))
            left = minifloat.dequantize(x_codes[:, at], x.scheme.format)  # [T, width]
            right = minifloat.dequantize(w_codes[top:bottom, at], w.scheme.format)
            if accumulator is None:
                part = left @ right.T
            else:
                part = accumulator.product(left, right)
            part *= _scale_at(x_scale, x, first, 0, rows)  # [T, 1]
            part *= _scale_at(w_scale, w, first, top, bottom).T  # [1, rows of the tile]
            out[:, top:bottom] += part
    return out


def _scale_width(x: BlockFloatLinear) -> int:
    """Columns that share a scale."""
    geometry = x.scheme.geometry
    if geometry.kind in ("group", "block"):
        return geometry.block[1]
    return max(1, x.shape[1])


def _scale_at(scale: Array, x: BlockFloatLinear, column: int, start: int, stop: int) -> Array:
    """The scale of rows ``start`` to ``stop`` at this column, [rows, 1] or [1, 1]."""
    xp = namespace(scale)
    if scale.ndim == 0:
        return xp.reshape(scale, (1, 1))
    found = scale[:, column // _scale_width(x) :][:, :1]
    high = x.scheme.geometry.block_rows
    if high > 1:
        return xp.repeat(found, high, axis=0)[start:stop, :]
    return found[start:stop, :]


class Fp8Linear:
    """A weight in 8-bit floats times activations that are quantised to 8-bit floats first;
    satisfies ``Linear``.

    ``activation`` says which activations share a scale, which is computed in each call:
    "tile" (1 × 128, with weights in blocks of 128 × 128), "token" or "tensor"; None leaves
    x in floating point. ``name`` names the activations in messages.
    """

    def __init__(
        self,
        weight: BlockFloatLinear,
        activation: str | None = "tile",
        *,
        accumulator: Accumulator | None = None,
        name: str = "activations",
    ):
        if activation is not None and activation not in ACTIVATIONS:
            raise InputError(
                f"Fp8Linear: activation is None or one of {', '.join(ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        self.weight = weight
        self.activation = activation
        self.accumulator = accumulator
        self.name = name

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)"""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.weight.nbytes

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        return self.weight.bits_per_weight

    def dequantize(self) -> Array:
        """W[M, N] in floating point, a new array."""
        return self.weight.dequantize()

    def quantize_activations(self, x: Array) -> BlockFloatLinear:
        """x[T, N] in E4M3 with the scales of ``activation``; ValueError naming them if a
        value is not finite.
        """
        assert self.activation is not None, "x stays in floating point"
        granularity, size = ACTIVATIONS[self.activation]
        xp = namespace(x)
        scheme = FloatScheme("e4m3", granularity, size)
        return quantize(xp.astype(x, xp.float32, copy=False), scheme, name=self.name)

    def matmul(self, x: Array) -> Array:
        """x[T, N] → [T, M], in x's dtype (at least float32 if x is not quantised)."""
        xp = namespace(x)
        if self.activation is None:
            return self.weight.matmul(x)
        if not x.shape[0]:
            return xp.zeros((0, self.shape[0]), dtype=x.dtype)
        y = scaled_matmul(self.quantize_activations(x), self.weight, self.accumulator)
        return xp.astype(y, x.dtype, copy=False)
