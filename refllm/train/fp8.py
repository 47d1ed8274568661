"""Training with 8-bit matrix products: all three products of a projection, forward and
backward, have operands in FP8 with shared scales.

    Y = X Wᵀ (forward)      dX = dY W (dgrad)      dW = dYᵀ X (wgrad)

DeepSeek-V3 shares scales along the direction of each sum: 128 neighbouring channels of a
token in X and dY where the sum runs over channels, 128 tokens of a channel in both where it
runs over tokens, and blocks of 128 × 128 in W. Scales come from the current values, and all
three products use E4M3. Two alternatives that do worse are here to compare with: one scale
per tensor, and E5M2 for the gradients, which has more range than scaled tiles need and half
of E4M3's precision.

A product of block-scaled codes equals that of the dequantised matrices except for the order
of the sum (``formats.fp8_linear``), so this computes the latter, in float32.

| symbol    | name                             | shape                  |
|-----------|----------------------------------|------------------------|
| X, W, Y   | input, weight, output            | [T, N], [M, N], [T, M] |
| dX, dW, dY| derivatives of the loss for them | as X, W, Y             |

Source: DeepSeek-V3 (2024), §3.3.1 and §3.3.2.

Left out: the output head, the embedding, norms and attention stay in float32, as in the
paper; 8-bit optimizer states and cached activations.
"""

from __future__ import annotations

from refllm.backend import Array
from refllm.errors import InputError
from refllm.formats.block_float import FloatScheme, fake_quantize

__all__ = ["Fp8"]

TILE = 128  # elements that share a scale


class Fp8:
    """A ``backward.Product`` whose operands are rounded to 8 bits first.

    ``scaling`` is "tile" (DeepSeek-V3's) or "tensor"; ``format`` is the format of X and W,
    ``gradients`` that of dY. ValueError for another scaling.
    """

    def __init__(self, scaling: str = "tile", gradients: str = "e4m3", *, format: str = "e4m3"):
        if scaling not in ("tile", "tensor"):
            raise InputError(f"Fp8: scaling is 'tile' or 'tensor', got {scaling!r}")

        def scheme(fmt: str, tokens: int, channels: int) -> FloatScheme:
            """Scales of ``tokens`` × ``channels`` elements, or of the whole tensor."""
            if scaling == "tensor":
                return FloatScheme(fmt, "tensor")
            return FloatScheme(fmt, "block", (tokens, channels))

        self.weight = scheme(format, TILE, TILE)
        self.x_by_channels = scheme(format, 1, TILE)  # where the sum runs over channels
        self.x_by_tokens = scheme(format, TILE, 1)  # where it runs over tokens
        self.dy_by_channels = scheme(gradients, 1, TILE)
        self.dy_by_tokens = scheme(gradients, TILE, 1)

    def forward(self, x: Array, weight: Array) -> Array:
        """x[T, N], weight[M, N] → X Wᵀ [T, M]."""
        return fake_quantize(x, self.x_by_channels) @ fake_quantize(weight, self.weight).T

    def backward(self, x: Array, weight: Array, d_out: Array) -> tuple[Array, Array]:
        """dY[T, M] → dX[T, N], dW[M, N]."""
        d_in = fake_quantize(d_out, self.dy_by_channels) @ fake_quantize(weight, self.weight)
        d_weight = fake_quantize(d_out, self.dy_by_tokens).T @ fake_quantize(x, self.x_by_tokens)
        return d_in, d_weight
