"""A weight whose inputs are quantised too: both sides of the product are integers.

Source: Xiao et al. 2023 (SmoothQuant), eq. 2 and table 2; the same arithmetic with
"half_integer" activations is what compressed-tensors' "int-quantized" checkpoints mean by
W8A8.

    x̂ = s_x q_x,  ŵ = s_w q_w,   Y = s_x s_w (Q_x Q_wᵀ)

| ``activation`` | step of x             | in SmoothQuant's table |
|----------------|-----------------------|------------------------|
| "token"        | of each row, now      | O1                     |
| "tensor"       | of all rows, now      | O2                     |
| a number       | that, from calibration| O3                     |

With one step for all rows ("tensor"), what a token becomes depends on the other tokens of
the batch. With a step from calibration, numbers beyond its range are clipped.

``rule`` makes the step from a = max |x|: "restricted" is a/127 (SmoothQuant),
"half_integer" a/127.5 (readers of compressed-tensors). No zero point: a symmetric grid
spends one product of integers on a product.

| symbol | name                       | shape          |
|--------|----------------------------|----------------|
| x, Y   | activations, their product | [T, N], [T, M] |
| s_x    | step of the activations    | [T, 1] or ()   |
| weight | ``QuantizedLinear`` W[M, N]      |                |

Left out: activations in groups, asymmetric activations, the step's floor of SmoothQuant's
code (absmax is at least 1e-5 there; here a row of any size has a step).
"""

from __future__ import annotations

from refllm.array_types import Array
from refllm.backend import namespace
from refllm.formats.int_matmul import scaled_matmul
from refllm.formats.quantized_linear import QuantizedLinear
from refllm.formats.uniform import Scheme, qparams, quantize_codes

__all__ = ["W8A8Linear"]


class W8A8Linear:
    """``weight`` times activations that are rounded to ``bits`` bits first; satisfies
    ``Linear``.

    ``name`` is the activations', for messages.
    """

    def __init__(
        self,
        weight: QuantizedLinear,
        activation: str | float = "token",
        rule: str = "half_integer",
        *,
        bits: int = 8,
        name: str = "activations",
    ):
        static = not isinstance(activation, str)
        if static and not 0 < float(activation) < float("inf"):
            raise ValueError(f"W8A8Linear: a static step is finite and above 0, got {activation}")
        if not static and activation not in ("token", "tensor"):
            raise ValueError(
                f"W8A8Linear: activation is 'token', 'tensor' or a static step, got {activation!r}"
            )
        if weight.scheme.granularity == "block":
            raise ValueError(
                "W8A8Linear: the steps of blocks do not factor out of a row's sum; use 'channel'"
            )
        self.scheme = Scheme(bits, rule, "tensor" if static else str(activation))
        if not self.scheme.symmetric or not self.scheme.signed:
            raise ValueError(
                f"W8A8Linear: activations take a signed rule without zero point, not {rule!r}"
            )
        self.weight = weight
        self.name = name
        self.static = float(activation) if static else None

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)"""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """The weight's bytes, and four of a static step."""
        return self.weight.nbytes + (0 if self.static is None else 4)

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self) -> Array:
        """W[M, N] in floating point, a new array."""
        return self.weight.dequantize()

    def quantize_activations(self, x: Array) -> tuple[Array, Array]:
        """x[T, N] → codes int8 [T, N] and their step, [T, 1] or ().

        Raises
        ------
        ValueError
            naming the activations, if a number is not finite.
        """
        xp = namespace(x)
        if self.static is None:
            scale, zero = qparams(x, self.scheme, name=self.name)
        else:
            scale = xp.asarray(self.static, dtype=x.dtype)
            zero = xp.asarray(0, dtype=xp.int32)
        # the range that a step was just made of is finite and covered
        return quantize_codes(
            x, scale, zero, self.scheme, name=self.name, check=self.static is not None
        ), scale

    def matmul(self, x: Array) -> Array:
        """x[T, N] → [T, M], in the wider of x's dtype and float32; the sum over N is exact."""
        xp = namespace(x)
        work = xp.astype(x, xp.result_type(x.dtype, xp.float32), copy=False)
        if not x.shape[0]:
            return xp.zeros((0, self.shape[0]), dtype=x.dtype)
        codes, step = self.quantize_activations(work)
        w = self.weight
        if w.scheme.symmetric and w.scheme.zero == 0:
            zero = None
        else:
            zero = w.zero_point
        sizes = tuple(max(-s.qmin, s.qmax) for s in (self.scheme, w.scheme))
        y = scaled_matmul(
            codes,
            step,
            None,
            w.codes,
            xp.astype(w.scale, work.dtype),
            zero,
            sizes=(sizes[0], sizes[1]),
        )
        return xp.astype(y, x.dtype, copy=False)
