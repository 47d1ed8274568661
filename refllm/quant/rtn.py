"""Round to nearest: the baseline of all methods.

Every weight takes the nearest point of its grid, s·(q − z), whatever the inputs of the layer
are. With ``mse`` the range of each scale is searched first
(``column_quantizer.weight_qparams``).

Left out: ranges from anything but the weights themselves (AWQ's clip search uses the inputs
too).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from refllm.backend import Array
from refllm.formats.quantized_linear import QuantizedLinear, quantize
from refllm.formats.uniform import Scheme
from refllm.quant.column_quantizer import weight_qparams
from refllm.quant.layer_inputs import LayerRun
from refllm.quant.methods import Method, QuantizedProjection, QuantizeWeight

__all__ = ["RTN", "rtn"]


def rtn(
    weight: Array,
    scheme: Scheme,
    *,
    mse: bool = False,
    scale_dtype: str | None = None,
    zero_dtype: str | None = None,
    name: str = "weight",
) -> QuantizedLinear:
    """W[M, N] rounded to nearest. ``mse`` searches the range of each scale, which takes about
    a hundred times as long.

    ``scale_dtype``, ``zero_dtype`` and errors are those of
    ``refllm.formats.quantized_linear.quantize``.

    >>> import numpy as np
    >>> made = rtn(np.array([[0.1, -0.7, 0.34]]), Scheme(4, "restricted", "channel"))
    >>> made.codes.tolist(), made.dequantize().round(2).tolist()
    ([[1, -7, 3]], [[0.1, -0.7, 0.3]])
    """
    if not mse:
        return quantize(weight, scheme, scale_dtype=scale_dtype, zero_dtype=zero_dtype, name=name)
    scale, zero_point = weight_qparams(weight, scheme, mse=True, name=name)
    return quantize(
        weight,
        scheme,
        scale=scale,
        zero_point=zero_point,
        scale_dtype=scale_dtype,
        zero_dtype=zero_dtype,
        name=name,
    )


@dataclass(frozen=True)
class RTN(Method):
    """Round to nearest as a method for whole models."""

    scale_dtype: str | None = "float16"
    name: ClassVar[str] = "rtn"
    default_scheme: ClassVar[Scheme] = Scheme(4, "half_integer", "group", 128)
    calibrates: ClassVar[bool] = False
    sequential: ClassVar[bool] = True

    def stage_quantizer(self, run: LayerRun, scheme: Scheme) -> QuantizeWeight:
        """Each weight is rounded by itself."""

        def quantize_weight(name: str, weight: Array) -> QuantizedProjection:
            made = rtn(weight, scheme, scale_dtype=self.scale_dtype, name=run.tensor(name))
            return QuantizedProjection(made)

        return quantize_weight
