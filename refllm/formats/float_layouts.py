"""Weights in 8-bit floats as other programs store them: compressed-tensors'
float-quantized, and DeepSeek-V3's fp8.

| layout          | tensors of a weight W[M, N]                                            |
|-----------------|------------------------------------------------------------------------|
| float-quantized | weight E4M3 [M, N], weight_scale [M, 1], or [⌈M/b⌉, ⌈N/b⌉] in blocks   |
| fp8             | weight E4M3 [M, N], weight_scale_inv [⌈M/b⌉, ⌈N/b⌉] (yet a multiplier) |

Blocks are square: b × b weights share a scale. Rows go with one activation scale per token,
blocks with 1 × b tiles of the activations; float-quantized may leave activations in floating
point. Scales are written in float32, so that a weight is stored exactly; scales of any
floating-point type are read.

Blocks at the edges may be ragged. transformers 5, when it dequantises fp8 on a CPU, then
divides the rows evenly among the scales and gets different weights.

Sources: the compressed-tensors library; DeepSeek-V3's README_WEIGHTS; transformers'
FineGrainedFP8Config.

Left out: one scale per tensor, E5M2, static scales of activations.
"""

from __future__ import annotations

from collections.abc import Mapping

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.formats.block_float import BlockFloatLinear, FloatScheme
from refllm.formats.fp8_linear import Fp8Linear
from refllm.formats.layouts import FLOAT_LAYOUTS, WeightLayout

__all__ = ["from_tensors", "layout_for", "to_tensor"]

SCALES = ("weight_scale", "weight_scale_inv")


def layout_for(weight: Fp8Linear, layout: str | None = None) -> WeightLayout:
    """The layout of that name for a weight; None is compressed-tensors' float-quantized.

    Raises
    ------
    ValueError
        if the layout cannot hold it; the message says what it can hold.
    """
    scheme = weight.weight.scheme
    activation = weight.activation
    layout = layout or "float-quantized"
    if layout not in FLOAT_LAYOUTS:
        able = ", ".join(FLOAT_LAYOUTS)
        raise InputError(f"{layout} cannot hold 8-bit floats; what can: {able}")
    size = (0, 0)
    wanted = "token"
    able = "square blocks"
    held = False
    if scheme.granularity == "block":
        size = scheme.geometry.block
        wanted = "tile"
        held = size[0] == size[1]
    if layout != "fp8":
        able = "square blocks or by channel"
        held = held or scheme.granularity == "channel"
    if scheme.format != "e4m3" or not held:
        raise InputError(
            f"{layout} holds e4m3 in {able}, not {scheme.format} by {scheme.granularity}"
        )
    if activation != wanted and (activation is not None or layout == "fp8"):
        raise InputError(f"{layout} goes with activations by {wanted}, not {activation}")
    if activation == "tile" and size[0] != 128:
        raise InputError(
            f"{layout}: tiles of {size[0]} columns of the activations are left out, only 128"
        )
    return WeightLayout(layout, 8, size[0] or None, weight_only=activation is None)


def to_tensor(weight: Fp8Linear, suffix: str) -> Array:
    """One tensor of a weight: codes as uint8, scales as float32."""
    xp = namespace(weight.weight.codes)
    inner = weight.weight
    if suffix == "weight":
        return inner.codes
    return xp.ascontiguousarray(inner.scale)


def from_tensors(
    tensors: Mapping[str, Array],
    layout: WeightLayout,
    shape: tuple[int, int],
    *,
    dtype: str = "float32",
    name: str = "weight",
) -> Fp8Linear:
    """A weight W[M, N] from its tensors by suffix; ``dtype`` is the type that it comes back in.

    Raises
    ------
    ValueError
        naming ``name`` if a code is NaN, or a scale is negative or not finite.
    """
    codes = tensors["weight"]
    xp = namespace(codes)
    scale = next(tensors[key] for key in SCALES if key in tensors)
    if not bool(xp.all((scale >= 0) & xp.isfinite(scale))):
        raise InputError(f"{name}: a scale is negative or not finite: the file is damaged")
    if codes.size and bool(xp.any((codes & 0x7F) == 0x7F)):
        raise InputError(f"{name}: a code is NaN: the file is damaged")
    size = layout.group_size
    if size is None:
        scheme = FloatScheme("e4m3", "channel")
    else:
        scheme = FloatScheme("e4m3", "block", size)
    made = BlockFloatLinear(codes, xp.astype(scale, xp.float32), scheme, shape)
    made.dtype = dtype
    if layout.weight_only:
        activation = None
    elif size is None:
        activation = "token"
    else:
        activation = "tile"
    return Fp8Linear(made, activation, name=f"the input of {name}")
