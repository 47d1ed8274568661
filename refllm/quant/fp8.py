"""FP8 as a method: weights and activations in 8-bit floats, and scales from the past
instead of the present.

What shares a scale decides which activations go with a weight:

| weights ("granularity") | activations         | who                                             |
|-------------------------|---------------------|-------------------------------------------------|
| "tensor"                | "tensor"            | Transformer Engine, per-tensor checkpoints      |
| "channel"               | "token"             | compressed-tensors' FP8_DYNAMIC                 |
| "block", 128 × 128      | "tile", 1 × 128     | DeepSeek-V3                                     |
| "group"                 | "tile"              |                                                 |

Scales are absmax / 448 (``formats.block_float``). *Current* scaling takes absmax from the
tensor itself, which must be read twice. *Delayed* scaling takes the largest of the last H
steps, which is known before the tensor is: one pass, and wrong whenever the range grows.
What is then beyond it saturates.

| symbol | name                                         | shape          |
|--------|----------------------------------------------|----------------|
| W, x   | weight, activations                          | [M, N], [T, N] |
| H      | steps that a delayed scale looks back        |                |

Sources: Micikevicius et al. 2022 (FP8 formats for deep learning), §4; DeepSeek-V3 (2024),
§3.3; NVIDIA's Transformer Engine, its recipe ``DelayedScaling``.

Left out: margins of a delayed scale, static scales of activations, training
(``train.fp8``).
"""

from __future__ import annotations

from collections import deque
from typing import Any

from refllm.backend import Array, namespace
from refllm.formats.block_float import (
    MXFP4,
    MXFP8,
    NVFP4,
    BlockFloatLinear,
    FloatScheme,
    absmax,
    fake_quantize,
    quantize,
    scale_of,
)
from refllm.formats.fp8_linear import Accumulator, Fp8Linear, scaled_matmul
from refllm.formats.quantized_linear import fake_quantize as fake_integers
from refllm.formats.uniform import Scheme

__all__ = [
    "ACTIVATIONS_OF", "MXFP4", "MXFP8", "NVFP4", "Accumulator", "DelayedScale", "FloatScheme", "Fp8Linear", "BlockFloatLinear",
    "fp8", "integers_or_floats", "quantize", "scale_of", "scaled_matmul",
]  # fmt: skip

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
    """W[M, N] in 8-bit floats that share scales as ``scheme`` says; its rule and its grid
    of integers play no part.

    Raises
    ------
    ValueError
        naming ``name`` if W is not finite or does not fit, or for what is no 8-bit float,
        granularity or scale.
    """
    check(scheme, format)
    made = quantize(
        weight, FloatScheme(format, scheme.granularity, scheme.group_size, scale), name=name
    )
    activation = ACTIVATIONS_OF[scheme.granularity] if activations else None
    return Fp8Linear(made, activation, name=f"the input of {name}")


def check(scheme: Scheme, format: str = "e4m3") -> None:
    """ValueError for what ``fp8`` does not take."""
    if scheme.bits != 8 or scheme.granularity not in ACTIVATIONS_OF:
        known = ", ".join(ACTIVATIONS_OF)
        raise ValueError(
            f"fp8 takes 8 bits by {known}, got {scheme.bits} bits by {scheme.granularity!r}"
        )
    if format not in ("e4m3", "e5m2"):
        raise ValueError(f"fp8: format is 'e4m3' or 'e5m2', got {format!r}")
    if scheme.granularity in ("block", "group") and 128 % scheme.block[1] and scheme.block[1] % 128:
        raise ValueError(
            f"fp8: scales of {scheme.block[1]} columns do not nest with tiles of 128: choose a divisor "
            "or a multiple of 128"
        )


class DelayedScale:
    """The scale of a tensor that is seen once a step: from the largest absmax of the last
    ``history`` steps.

    It counts what that costs: ``seen`` numbers so far, ``saturated`` of them beyond the
    range.
    """

    def __init__(self, history: int = 16, format: str = "e4m3"):
        if history < 1:
            raise ValueError(f"DelayedScale: a history of at least 1 step, got {history}")
        self.past: deque[float] = deque(maxlen=history)
        self.scheme = FloatScheme(format, "tensor")
        self.seen = 0
        self.saturated = 0

    def quantize(self, x: Array, *, name: str = "x") -> BlockFloatLinear:
        """x[M, N] with the scale that the steps before give (its own in the first), then
        remember its range.
        """
        xp = namespace(x)
        now = float(absmax(x, self.scheme, name=name))
        largest = xp.asarray(max(self.past) if self.past else now, dtype=xp.float32)
        scale = scale_of(largest, self.scheme)
        self.past.append(now)
        self.seen += int(x.size)
        self.saturated += int(xp.sum(xp.abs(x) > scale * self.scheme.largest * (1 + 2.0**-20)))
        return quantize(x, self.scheme, scale=scale, name=name)


def integers_or_floats(x: Array, granularity: str = "token") -> dict[str, float]:
    """Relative error ‖x̂ − x‖² / ‖x‖² of x[T, N] in INT8, E4M3 and E5M2 with scales of one
    granularity.

    INT8 has equal steps: it wins where a range is used evenly. Floats have steps in
    proportion to the number: they win where few numbers are much larger than the rest.
    """
    xp = namespace(x)
    size = float(xp.sum(xp.square(x), dtype=xp.float64))
    made: dict[str, Any] = {"int8": fake_integers(x, Scheme(8, "restricted", granularity))}
    made |= {fmt: fake_quantize(x, FloatScheme(fmt, granularity)) for fmt in ("e4m3", "e5m2")}
    return {
        name: float(xp.sum(xp.square(back - x), dtype=xp.float64)) / size
        for name, back in made.items()
    }
