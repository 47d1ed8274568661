"""W8A8: weight and activations are quantised, so the product is one of integers.

Source: Xiao et al. 2023 (SmoothQuant), eq. 2 and table 2; the same arithmetic with
"half_integer" activations is what compressed-tensors' "int-quantized" checkpoints mean by
W8A8.

    x̂ = s_x q_x,  ŵ = s_w q_w,   Y = s_x s_w (Q_x Q_wᵀ)

| ``activation`` | scale of x                          | in SmoothQuant's table |
|----------------|-------------------------------------|------------------------|
| "token"        | one per row, computed per call      | O1                     |
| "tensor"       | one for all rows, computed per call | O2                     |
| a float        | that value, from calibration        | O3                     |

With one scale for all rows ("tensor"), a token's codes depend on the other tokens of the
batch. With a scale from calibration, values beyond its range are clipped.

``rule`` makes the scale from a = max |x|: "restricted" is a/127 (SmoothQuant),
"half_integer" a/127.5 (readers of compressed-tensors). There is no zero point: with a
symmetric rule, a product needs only one product of integers.

| symbol | name                        | shape          |
|--------|-----------------------------|----------------|
| x, Y   | activations, their product  | [T, N], [T, M] |
| s_x    | scale of the activations    | [T, 1] or ()   |
| weight | ``QuantizedLinear`` W[M, N] |                |

Left out: activations in groups, asymmetric activations, the lower bound of SmoothQuant's
code (absmax is at least 1e-5 there; here a row of any size has a scale).
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.formats.int_matmul import scaled_matmul
from refllm.formats.quantized_linear import QuantizedLinear
from refllm.formats.uniform import Scheme, qparams, quantize_codes

__all__ = ["W8A8Linear"]


class W8A8Linear:
    """``weight`` times activations that are quantised to ``bits`` bits first; satisfies ``Linear``.

    ``name`` names the activations in messages.
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
            raise InputError(f"W8A8Linear: a static scale is finite and above 0, got {activation}")
        if not static and activation not in ("token", "tensor"):
            raise InputError(
                f"W8A8Linear: activation is 'token', 'tensor' or a static scale, got {activation!r}"
            )
        if weight.scheme.granularity == "block":
            raise InputError(
                "W8A8Linear: scales per block do not factor out of a row's sum; use 'channel'"
            )
        self.scheme = Scheme(bits, rule, "tensor" if static else str(activation))
        if not self.scheme.symmetric or not self.scheme.signed:
            raise InputError(
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
        """The weight's bytes, and four for a static scale."""
        nbytes = self.weight.nbytes
        if self.static is not None:
            nbytes += 4
        return nbytes

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self) -> Array:
        """W[M, N] in floating point, a new array."""
        return self.weight.dequantize()

    def quantize_activations(self, x: Array) -> tuple[Array, Array]:
        """x[T, N] → codes int8 [T, N] and their scale, [T, 1] or ().

        Raises
        ------
        ValueError
            naming the activations, if a value is not finite.
        """
        xp = namespace(x)
        if self.static is None:
            scale, zero = qparams(x, self.scheme, name=self.name)
        else:
            scale = xp.asarray(self.static, dtype=x.dtype)
            zero = xp.asarray(0, dtype=xp.int32)
        # a scale that was just computed covers x, which was checked then
        check = self.static is not None
        return quantize_codes(x, scale, zero, self.scheme, name=self.name, check=check), scale

    def matmul(self, x: Array) -> Array:
        """x[T, N] → [T, M], in the wider of x's dtype and float32; the sum over N is exact."""
        xp = namespace(x)
        work = xp.astype(x, xp.result_type(x.dtype, xp.float32), copy=False)
        if not x.shape[0]:
            return xp.zeros((0, self.shape[0]), dtype=x.dtype)
        codes, scale = self.quantize_activations(work)  # [T, N], [T, 1] or ()
        w = self.weight
        w_scale = xp.astype(w.scale, work.dtype)
        w_zero: Array | None = None
        if not w.scheme.symmetric or w.scheme.zero != 0:
            w_zero = w.zero_point
        sizes = (_largest_size(self.scheme), _largest_size(w.scheme))
        y = scaled_matmul(codes, scale, None, w.codes, w_scale, w_zero, sizes=sizes)
        return xp.astype(y, x.dtype, copy=False)


def _largest_size(scheme: Scheme) -> int:
    """max |q| over the codes of a scheme."""
    return max(-scheme.qmin, scheme.qmax)
