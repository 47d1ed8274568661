"""The experiment that AWQ starts from: keep 1 % of the input channels in full precision,
chosen in three ways.

Source: Lin et al. 2023, §3.1 and table 1. Channels chosen by the magnitude of their
activations remove most of the rounding error; channels chosen by the magnitude of their
weights, or at random, hardly any. Rows of mixed precision are awkward for hardware, so AWQ
scales the channels instead of keeping them.

| symbol | name                                          | shape  |
|--------|-----------------------------------------------|--------|
| x      | inputs                                        | [T, N] |
| W      | weight                                        | [M, N] |
| kept   | indices of the kept input channels, ascending | [k]    |

Left out: choosing single weights or output rows, sparse layouts of the kept weights.
"""

from __future__ import annotations

import math

import numpy as np

from refllm.backend import Array, asarray_like, namespace
from refllm.errors import InputError
from refllm.formats.quantized_linear import QuantizedLinear, quantize
from refllm.formats.uniform import Scheme
from refllm.model.weights import Linear
from refllm.quant.awq import channel_magnitude

BY = ("activation", "weight", "random")


def salient_channels(
    x: Array,
    weight: Array,
    by: str,
    *,
    fraction: float = 0.01,
    rng: np.random.Generator | None = None,
) -> Array:
    """Indices of the ⌈fraction·N⌉ most salient input channels, ascending: x[T, N], W[M, N] → [k].

    ``by`` is ``"activation"`` (mean |x_j|), ``"weight"`` (the norm of column j) or
    ``"random"`` (needs ``rng``).

    >>> import numpy as np
    >>> x = np.array([[0.1, 9.0, 0.2]])
    >>> w = np.array([[5.0, 1.0, 1.0]])
    >>> [salient_channels(x, w, by, fraction=1 / 3).tolist() for by in ("activation", "weight")]
    [[1], [0]]
    """
    xp = namespace(x, weight)
    columns = int(weight.shape[1])
    if not 0 <= fraction <= 1:
        raise InputError(f"salient_channels: fraction {fraction} is not within 0..1")
    if by == "activation":
        size = channel_magnitude(x)
    elif by == "weight":
        size = xp.sum(xp.astype(weight, xp.float64) ** 2, axis=0)
    elif by == "random" and rng is not None:
        size = asarray_like(rng.permutation(columns), weight, "float64")
    else:
        raise InputError(
            f"salient_channels: choose by one of {', '.join(BY)} (random needs rng), not {by!r}"
        )
    count = math.ceil(fraction * columns)
    return xp.sort(xp.argsort(-size, kind="stable")[:count])


class Protected:
    """A quantised weight with some input channels kept in full precision: a ``Linear``.

    The scales are those of the whole matrix, so that only the kept columns differ from
    rounding to nearest, and a smaller error is due to them alone.
    """

    def __init__(self, weight: Array, scheme: Scheme, kept: Array):
        self.quantized: QuantizedLinear = quantize(weight, scheme)
        self.kept = kept
        self.columns = weight[:, kept]

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)"""
        return self.quantized.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales, the kept columns in their own dtype, and their indices."""
        return int(self.quantized.nbytes + self.columns.nbytes + self.kept.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    def matmul(self, x: Array) -> Array:
        """x[T, N] → [T, M]: the kept channels of x are multiplied in full precision, the others
        by the quantised weight.
        """
        rest = x.copy()  # [T, N], without the kept channels
        rest[:, self.kept] = 0.0
        return self.quantized.matmul(rest) + x[:, self.kept] @ self.columns.T

    def dequantize(self) -> Array:
        """W[M, N], the kept columns exact."""
        weight = self.quantized.dequantize()
        weight[:, self.kept] = self.columns
        return weight


def output_error(x: Array, weight: Array, approximation: Linear) -> float:
    """‖x Wᵀ − x Ŵᵀ‖² / ‖x Wᵀ‖² for x[T, N], W[M, N]; 0 where both are zero."""
    xp = namespace(x, weight)
    exact = xp.astype(x @ weight.T, xp.float64)  # [T, M]
    error = float(xp.sum((exact - approximation.matmul(x)) ** 2))
    size = float(xp.sum(exact**2))
    if size:
        return error / size
    if error == 0:
        return 0.0
    return math.inf


def experiment(
    x: Array, weight: Array, scheme: Scheme, *, fraction: float = 0.01, rng: np.random.Generator
) -> dict[str, float]:
    """Output error with nothing kept (``"none"``), and with a fraction of the channels kept,
    chosen by each of ``BY``.
    """
    errors = {"none": output_error(x, weight, quantize(weight, scheme))}
    for by in BY:
        kept = salient_channels(x, weight, by, fraction=fraction, rng=rng)
        errors[by] = output_error(x, weight, Protected(weight, scheme, kept))
    return errors
