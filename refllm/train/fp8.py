"""Training with 8-bit products: all three of a projection, forward and backward, from codes
that share scales.

    Y = X Wᵀ (forward)      dX = dY W (dgrad)      dW = dYᵀ X (wgrad)

DeepSeek-V3's recipe scales in the direction of each sum: 128 neighbours of a token in X and
dY where the sum runs over channels, 128 tokens of a channel in both where it runs over
tokens, and blocks of 128 × 128 in W. Scales come from the numbers at hand ("current"), and
all three products use E4M3. The losing controls are one scale a tensor, and E5M2 for the
gradients, which has more range than scaled tiles need and half of E4M3's precision.

A product of codes with scales in blocks equals that of the dequantised matrices but for the
order of the sum (``formats.fp8_linear`` proves it), so this computes the latter, in
float32.

| symbol    | name                             | shape                  |
|-----------|----------------------------------|------------------------|
| X, W, Y   | input, weight, output            | [T, N], [M, N], [T, M] |
| dX, dW, dY| derivatives of the loss for them | as they                |

Source: DeepSeek-V3 (2024), §3.3.1 and §3.3.2.

Left out: as in the paper the output head, the embedding, norms and attention stay as they
are; 8-bit optimiser states and caches of activations.
"""

from __future__ import annotations

from refllm.backend import Array
from refllm.formats.block_float import FloatScheme, fake_quantize

__all__ = ["Fp8"]

TILE = 128


class Fp8:
    """A ``backward.Product`` whose operands are rounded to 8 bits first.

    ``scaling`` is "tile" (DeepSeek-V3's) or "tensor"; ``gradients`` the format of dY.
    """

    def __init__(self, scaling: str = "tile", gradients: str = "e4m3", *, format: str = "e4m3"):
        if scaling not in ("tile", "tensor"):
            raise ValueError(f"Fp8: scaling is 'tile' or 'tensor', got {scaling!r}")
        whole = scaling == "tensor"

        def scheme(fmt: str, *block: int) -> FloatScheme:
            if whole:
                return FloatScheme(fmt, "tensor")
            return FloatScheme(fmt, "block", (block[0], block[1]))

        self.weight = scheme(format, TILE, TILE)
        self.along = scheme(format, 1, TILE)  # of X: along channels, tokens
        self.across = scheme(format, TILE, 1)
        self.d_along = scheme(gradients, 1, TILE)  # of dY
        self.d_across = scheme(gradients, TILE, 1)

    def forward(self, x: Array, weight: Array) -> Array:
        """X Wᵀ"""
        return fake_quantize(x, self.along) @ fake_quantize(weight, self.weight).T

    def backward(self, x: Array, weight: Array, d_out: Array) -> tuple[Array, Array]:
        """dX, dW"""
        d_in = fake_quantize(d_out, self.d_along) @ fake_quantize(weight, self.weight)
        return d_in, fake_quantize(d_out, self.d_across).T @ fake_quantize(x, self.across)
