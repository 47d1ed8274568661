"""AWQ on a decoder layer: which weights share a scale, where its inverse goes, and the
whole layer's search.

Source: Lin et al. 2023, §3.2 and the authors' code (llm-awq). The division x/s costs
nothing, because it is folded into whatever makes x:

| x                  | scaled columns          | divided                        | loss is measured on     |
|--------------------|-------------------------|--------------------------------|-------------------------|
| attention's input  | q_proj, k_proj, v_proj  | gain of input_layernorm        | the attention's output  |
| heads, side by side| o_proj                  | rows of v_proj, and its bias   | o_proj's output         |
| MLP's input        | gate_proj, up_proj      | gain of post_attention_layernorm | the MLP's output      |
| MLP's hidden layer | down_proj               | rows of up_proj                | down_proj's output      |

The second is possible because attention averages values: dividing a channel of every value
divides it in the average. With fewer key/value heads than query heads one row of v_proj
makes several columns of o_proj's input, which have scales of their own; so it is skipped
where the two shapes differ, as the authors do. Up in the MLP no such thing can happen:
swiglu is linear in ``up``.

All four are searched on the layer as it was, then all are folded; then the clip limits are
searched on the folded weights and the divided inputs. q_proj and k_proj are not clipped:
the softmax amplifies what an error there does.

Left out: one scale shared by the query heads of a group, which would fit grouped queries;
layers of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refllm.backend import Array, namespace
from refllm.formats.uniform import Scheme
from refllm.model.attention import Attend
from refllm.model.config import ModelConfig
from refllm.model.layers import swiglu
from refllm.model.llama import Layer, mixed_heads
from refllm.model.weights import Dense
from refllm.quant.awq import AWQScale, Inspect, clip, search_clip, search_scale

NOT_CLIPPED = ("q_proj", "k_proj")


@dataclass(frozen=True)
class ScaleGroup:
    """Weights that read the same x, and what makes that x."""

    name: str
    source: str  # a norm, whose gain is divided, or a projection, whose rows are
    targets: tuple[str, ...]  # their columns are multiplied


ATTENTION_INPUT = ScaleGroup("attention input", "input_layernorm", ("q_proj", "k_proj", "v_proj"))
HEADS = ScaleGroup("heads", "v_proj", ("o_proj",))
MLP_INPUT = ScaleGroup("MLP input", "post_attention_layernorm", ("gate_proj", "up_proj"))
MLP_HIDDEN = ScaleGroup("MLP hidden", "up_proj", ("down_proj",))


@dataclass(frozen=True, eq=False)
class AWQLayer:
    """What was chosen for one layer."""

    scales: dict[str, AWQScale]  # by name of the scale group
    limits: dict[str, Array]  # clip limits m[M, N/g] by projection; empty without clipping
    clipped: dict[str, float]  # share of the groups that were clipped, by projection
    losses: dict[str, float]  # best loss of the group that scales a projection's columns
    skipped: tuple[str, ...]  # scale groups that this layer cannot have, and why


def scale_groups(layer: Layer) -> tuple[list[ScaleGroup], list[str]]:
    """The scale groups of a Llama-like layer, and one sentence for each that it cannot
    have.
    """
    values = layer["v_proj"].shape
    out = layer["o_proj"].shape
    if values == out:
        return [ATTENTION_INPUT, HEADS, MLP_INPUT, MLP_HIDDEN], []
    # where only the head dimension is unusual (M = H·D of both) folding would be exact;
    # upstream skips that too
    shared = "" if values[0] == out[1] else ": query heads share values"
    reason = f"o_proj is not scaled, since its shape {out} is not that of v_proj, {values}{shared}"
    return [ATTENTION_INPUT, MLP_INPUT, MLP_HIDDEN], [reason]


def fold(layer: Layer, group: ScaleGroup, scale: Array) -> Layer:
    """A new layer of the same function: the targets' columns times s[N], what makes their
    input divided by it.
    """
    namespace(scale)
    folded = dict(layer)
    for name in group.targets:
        folded[name] = Dense(layer[name].dequantize() * scale)
    if group.source.endswith("norm"):
        folded[group.source] = layer[group.source] / scale
        return folded
    folded[group.source] = Dense(layer[group.source].dequantize() / scale[:, None])
    bias = group.source.removesuffix("_proj") + "_bias"
    if bias in layer:  # Qwen2's values are W h + b: both are divided
        folded[bias] = layer[bias] / scale
    return folded


def awq_layer(
    layer: Layer,
    config: ModelConfig,
    inputs: Mapping[str, Array],
    scheme: Scheme,
    *,
    rotation: Any,
    attend: Attend,
    index: int = 0,
    duo: bool = False,
    clipping: bool = True,
    ratios: Sequence[float] | None = None,
) -> tuple[Layer, AWQLayer]:
    """Scale and clip one decoder layer for ``scheme``; rounding the result to nearest
    completes AWQ.

    ``inputs`` holds x[T, N] as captured from the layer as it is, by projection; siblings
    read the same x, so one of q, k and v, one of gate and up, o and down are enough.
    ``rotation`` (``rope_table``'s pair) and ``attend`` are those of the captured tokens.
    The layer passed in stays as it is, and without ``clipping`` the result computes the
    same function.
    """
    groups, skipped = scale_groups(layer)
    scales: dict[str, AWQScale] = {}
    for group in groups:
        x = _input(inputs, group)
        inspect = _module(group, layer, config, x, rotation, attend, index)
        weights = [layer[name].dequantize() for name in group.targets]
        scales[group.name] = search_scale(
            x, weights, scheme, inspect=inspect, duo=duo, ratios=ratios
        )
    result = dict(layer)
    for group in groups:
        result = fold(result, group, scales[group.name].scale)
    limits = {}
    clipped = {}
    for group in (ATTENTION_INPUT, HEADS, MLP_INPUT, MLP_HIDDEN) if clipping else ():
        x = _input(inputs, group)
        if group.name in scales:
            x = x / scales[group.name].scale
        for name in group.targets:
            if name not in NOT_CLIPPED:
                weight = result[name].dequantize()
                limits[name] = search_clip(x, weight, scheme)
                clipped[name] = _share_clipped(weight, limits[name])
                result[name] = Dense(clip(weight, limits[name]))
    losses = {name: min(scales[group.name].losses) for group in groups for name in group.targets}
    return result, AWQLayer(scales, limits, clipped, losses, tuple(skipped))


def _input(inputs: Mapping[str, Array], group: ScaleGroup) -> Array:
    """The captured x[T, N] of a group."""
    for name in group.targets:
        if name in inputs:
            return inputs[name]
    raise ValueError(
        f"AWQ needs the inputs of one of {', '.join(group.targets)}; captured: {', '.join(inputs)}"
    )


def _module(
    group: ScaleGroup,
    layer: Layer,
    config: ModelConfig,
    x: Array,
    rotation: Any,
    attend: Attend,
    index: int,
) -> Inspect | None:
    """What the loss of a group is measured on, as a function of stand-ins for its weights;
    None is the product.
    """
    if group is not ATTENTION_INPUT and group is not MLP_INPUT:
        return None

    def run(weights: list[Array]) -> Array:
        # a dictionary of its own: the layer never holds a stand-in, so it need not be given
        # its weights back
        trial = layer | {name: Dense(w) for name, w in zip(group.targets, weights, strict=True)}
        if group is ATTENTION_INPUT:
            inner = mixed_heads(trial, config, x, rotation, attend, index)
            return layer["o_proj"].matmul(inner)
        return layer["down_proj"].matmul(
            swiglu(trial["gate_proj"].matmul(x), trial["up_proj"].matmul(x))
        )

    return run


def _share_clipped(weight: Array, limits: Array) -> float:
    """The share of groups whose largest weight lies beyond their limit."""
    xp = namespace(weight, limits)
    peak = xp.max(xp.abs(xp.reshape(weight, (*limits.shape, -1))), axis=-1)
    return float(xp.mean(xp.astype(peak > limits, xp.float64)))
