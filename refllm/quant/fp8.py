"""FP8: weights and activations in 8-bit floats, with current or delayed scales.

The granularity of a weight's scales decides the granularity of its activations' scales:

| weights ("granularity") | activations     | used by                                    |
|-------------------------|-----------------|--------------------------------------------|
| "tensor"                | "tensor"        | Transformer Engine, per-tensor checkpoints |
| "channel"               | "token"         | compressed-tensors' FP8_DYNAMIC            |
| "block", 128 × 128      | "tile", 1 × 128 | DeepSeek-V3                                |
| "group"                 | "tile"          |                                            |

Scales are absmax / 448 (``formats.block_float``). *Current* scaling takes absmax from the
tensor itself, which must be read twice. *Delayed* scaling takes the largest absmax of the
last H training steps, which is known before the tensor is: one pass, and wrong whenever the
range grows. Values beyond the range then saturate.

| symbol | name                                       | shape          |
|--------|--------------------------------------------|----------------|
| W, x   | weight, activations                        | [M, N], [T, N] |
| H      | history: steps that a delayed scale covers |                |

Sources: Micikevicius et al. 2022 (FP8 formats for deep learning), §4; DeepSeek-V3 (2024),
§3.3; NVIDIA's Transformer Engine, its recipe ``DelayedScaling``.

Left out: margins of a delayed scale, static scales of activations, training
(``train.fp8``).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.formats.block_float import (
    BlockFloatLinear,
    FloatScheme,
    absmax,
    fake_quantize,
    quantize,
    scale_of,
)
from refllm.formats.fp8_linear import Fp8Linear
from refllm.formats.quantized_linear import fake_quantize as fake_integers
from refllm.formats.uniform import Scheme
from refllm.quant.layer_inputs import LayerRun
from refllm.quant.methods import Method, QuantizedProjection, QuantizeWeight

__all__ = ["ACTIVATIONS_OF", "FP8", "DelayedScale", "fp8", "integers_or_floats"]

ACTIVATIONS_OF = {"tensor": "tensor", "channel": "token", "block": "tile", "group": "tile"}


def fp8(
    weight: Array,
    scheme: Scheme,
    *,
    format: str = "e4m3",
    scale: str = "float32",
    activations: bool = True,
    name: str = "weight",
) -> Fp8Linear:
    """W[M, N] in 8-bit floats. Of ``scheme`` only the granularity and group size are used.

    ``scale`` is the dtype of the scales: "float32", or "ue8m0" for powers of two.
    ``activations`` False leaves activations in their own dtype.

    Raises
    ------
    ValueError
        naming ``name`` if W is not finite or does not fit the scheme, or for an unknown
        format, granularity or scale.

    >>> import numpy as np
    >>> made = fp8(np.array([[448.0, 1.0, 0.3]], "float32"), Scheme(8, "restricted", "tensor"))
    >>> made.dequantize().tolist()  # E4M3 has 3 bits of mantissa: 0.3125 = 1.25 · 2⁻²
    [[448.0, 1.0, 0.3125]]
    """
    check(scheme, format)
    made = quantize(
        weight, FloatScheme(format, scheme.granularity, scheme.group_size, scale), name=name
    )
    activation = ACTIVATIONS_OF[scheme.granularity] if activations else None
    return Fp8Linear(made, activation, name=f"the input of {name}")


def check(scheme: Scheme, format: str = "e4m3") -> None:
    """ValueError for a scheme or format that ``fp8`` cannot use."""
    if scheme.bits != 8 or scheme.granularity not in ACTIVATIONS_OF:
        known = ", ".join(ACTIVATIONS_OF)
        raise InputError(
            f"fp8 takes 8 bits by {known}, got {scheme.bits} bits by {scheme.granularity!r}"
        )
    if format not in ("e4m3", "e5m2"):
        raise InputError(f"fp8: format is 'e4m3' or 'e5m2', got {format!r}")
    if scheme.granularity in ("block", "group") and 128 % scheme.block[1] and scheme.block[1] % 128:
        raise InputError(
            f"fp8: scales of {scheme.block[1]} columns do not nest with tiles of 128: choose a "
            "divisor or a multiple of 128"
        )


@dataclass(frozen=True)
class FP8(Method):
    """FP8 as a method for whole models; options as in ``fp8``."""

    format: str = "e4m3"
    scale: str = "float32"
    activations: bool = True
    name: ClassVar[str] = "fp8"
    default_scheme: ClassVar[Scheme] = Scheme(8, "restricted", "block", 128)
    calibrates: ClassVar[bool] = False
    sequential: ClassVar[bool] = True

    def check(self, scheme: Scheme) -> None:
        """As the function ``check``."""
        check(scheme, self.format)

    def stage_quantizer(self, run: LayerRun, scheme: Scheme) -> QuantizeWeight:
        """Each weight is converted by itself."""

        def quantize_weight(name: str, weight: Array) -> QuantizedProjection:
            made = fp8(
                weight,
                scheme,
                format=self.format,
                scale=self.scale,
                activations=self.activations,
                name=run.tensor(name),
            )
            return QuantizedProjection(made)

        return quantize_weight


class DelayedScale:
    """The scale of a tensor that is quantised once per training step: from the largest absmax
    of the last ``history`` steps.

    It counts what that costs: ``seen`` values so far, ``saturated`` of them beyond the range.
    """

    def __init__(self, history: int = 16, format: str = "e4m3"):
        if history < 1:
            raise InputError(f"DelayedScale: a history of at least 1 step, got {history}")
        self.past: deque[float] = deque(maxlen=history)
        self.scheme = FloatScheme(format, "tensor")
        self.seen = 0
        self.saturated = 0

    def quantize(self, x: Array, *, name: str = "x") -> BlockFloatLinear:
        """x[M, N] with the scale that the previous steps give (its own in the first step); its
        absmax is then remembered.
        """
        xp = namespace(x)
        now = float(absmax(x, self.scheme, name=name))
        largest = xp.asarray(max(self.past) if self.past else now, dtype=xp.float32)
        scale = scale_of(largest, self.scheme)  # known before x is read
        self.past.append(now)
        self.seen += int(x.size)
        self.saturated += int(xp.sum(xp.abs(x) > scale * self.scheme.largest * (1 + 2.0**-20)))
        return quantize(x, self.scheme, scale=scale, name=name)


def integers_or_floats(x: Array, granularity: str = "token") -> dict[str, float]:
    """Relative error ‖x̂ − x‖² / ‖x‖² of x[T, N] in INT8, E4M3 and E5M2 with scales of one
    granularity.

    The codes of INT8 are equally spaced: it wins where a range is used evenly. The spacing of
    floats is proportional to the value: they win where few values are much larger than the
    rest.
    """
    xp = namespace(x)
    size = float(xp.sum(xp.square(x), dtype=xp.float64))
    made = {"int8": fake_integers(x, Scheme(8, "restricted", granularity))}
    made |= {fmt: fake_quantize(x, FloatScheme(fmt, granularity)) for fmt in ("e4m3", "e5m2")}
    return {
        name: float(xp.sum(xp.square(back - x), dtype=xp.float64)) / size
        for name, back in made.items()
    }
