"""AWQ on a decoder layer: which weights share a scale, what absorbs its inverse, and the
search over the whole layer.

Source: Lin et al. 2023, §3.2 and the authors' code (llm-awq). The division x/s costs
nothing, because it is folded into the weights that produce x:

| x                   | scaled columns         | divided                    | loss of          |
|---------------------|------------------------|----------------------------|------------------|
| attention's input   | q_proj, k_proj, v_proj | gain of input_layernorm    | attention output |
| heads, concatenated | o_proj                 | rows of v_proj, its bias   | o_proj output    |
| MLP's input         | gate_proj, up_proj     | gain of the MLP's norm     | MLP output       |
| MLP's hidden layer  | down_proj              | rows of up_proj            | down_proj output |

The second is possible because attention averages values: dividing a channel of every value
divides it in the average. With fewer key/value heads than query heads one row of v_proj
produces several columns of o_proj's input, each with its own scale; so it is skipped where
the two shapes differ, as the authors do. The last is always possible: swiglu is linear in
``up``.

All four scales are searched on the original layer, then all are folded; then the clip limits
are searched on the folded weights and the divided inputs. q_proj and k_proj are not clipped,
because the softmax amplifies their errors.

Left out: one scale shared by the query heads of a group, which would fit grouped queries;
layers of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.formats.uniform import Scheme
from refllm.model.attention import Attend, CausalAttend
from refllm.model.config import ModelConfig
from refllm.model.layers import swiglu
from refllm.model.llama import PROJECTIONS, Layer, mixed_heads
from refllm.model.weights import Dense, Linear
from refllm.quant.awq import AWQScale, Inspect, clip, search_clip, search_scale
from refllm.quant.layer_inputs import STAGES, Batch, LayerRun
from refllm.quant.methods import SAMPLED, Clock, Method, QuantizedProjection, ReportTensor
from refllm.quant.rtn import rtn

NOT_CLIPPED = ("q_proj", "k_proj")


@dataclass(frozen=True)
class ScaleGroup:
    """Weights that read the same x, and what produces that x."""

    name: str
    source: str  # a norm, whose gain is divided, or a projection, whose rows are divided
    targets: tuple[str, ...]  # projections whose columns are multiplied


ATTENTION_INPUT = ScaleGroup("attention input", "input_layernorm", ("q_proj", "k_proj", "v_proj"))
HEADS = ScaleGroup("heads", "v_proj", ("o_proj",))
MLP_INPUT = ScaleGroup("MLP input", "post_attention_layernorm", ("gate_proj", "up_proj"))
MLP_HIDDEN = ScaleGroup("MLP hidden", "up_proj", ("down_proj",))


@dataclass(frozen=True, eq=False)
class AWQLayer:
    """What AWQ chose for one layer."""

    scales: dict[str, AWQScale]  # by name of the scale group
    limits: dict[str, Array]  # clip limits m[M, N/g] by projection; empty without clipping
    clipped: dict[str, float]  # share of the groups that were clipped, by projection
    losses: dict[str, float]  # best loss of the scale group that contains a projection
    skipped: tuple[str, ...]  # one sentence for each scale group that this layer cannot have


def scale_groups(layer: Layer) -> tuple[list[ScaleGroup], list[str]]:
    """The scale groups of a Llama-like layer, and one sentence for each that it cannot have."""
    values = layer["v_proj"].shape
    out = layer["o_proj"].shape
    if values == out:
        return [ATTENTION_INPUT, HEADS, MLP_INPUT, MLP_HIDDEN], []
    # with an unusual head dimension only (M = H·D of both) folding would be exact; the
    # authors' code skips that case too
    shared = ": query heads share values" if values[0] != out[1] else ""
    reason = f"o_proj is not scaled, since its shape {out} is not that of v_proj, {values}{shared}"
    return [ATTENTION_INPUT, MLP_INPUT, MLP_HIDDEN], [reason]


def fold(layer: Layer, group: ScaleGroup, scale: Array) -> Layer:
    """A new layer that computes the same function: the columns of the targets multiplied by
    s[N], the source of their input divided by it.
    """
    namespace(scale)
    folded = dict(layer)
    for name in group.targets:
        folded[name] = Dense(layer[name].dequantize() * scale)
    if group.source.endswith("norm"):
        folded[group.source] = layer[group.source] / scale
        return folded
    # a source projection's outputs are the targets' inputs: its rows are divided
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
    rotation: tuple[Array, Array],
    attend: Attend,
    index: int = 0,
    duo: bool = False,
    clipping: bool = True,
    ratios: Sequence[float] | None = None,
) -> tuple[Layer, AWQLayer]:
    """Scale and clip one decoder layer for ``scheme``; rounding the result to nearest
    completes AWQ.

    ``inputs`` holds x[T, N] by projection, captured from the original layer; siblings read
    the same x, so one of q, k and v, one of gate and up, o and down are enough.
    ``rotation`` (``rope_table``'s pair) and ``attend`` belong to the captured tokens. The
    layer passed in is not changed, and without ``clipping`` the result computes the same
    function.
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
    limits: dict[str, Array] = {}
    clipped: dict[str, float] = {}
    if clipping:
        clipped = _clip_layer(result, inputs, scales, scheme, limits)
    losses = {name: min(scales[group.name].losses) for group in groups for name in group.targets}
    return result, AWQLayer(scales, limits, clipped, losses, tuple(skipped))


def _clip_layer(
    layer: Layer,
    inputs: Mapping[str, Array],
    scales: Mapping[str, AWQScale],
    scheme: Scheme,
    limits: dict[str, Array],
) -> dict[str, float]:
    """Clip the projections of a folded layer in place and write their ``limits``; returns the
    share of clipped groups by projection.
    """
    clipped = {}
    for group in (ATTENTION_INPUT, HEADS, MLP_INPUT, MLP_HIDDEN):
        x = _input(inputs, group)
        if group.name in scales:
            x = x / scales[group.name].scale
        for name in group.targets:
            if name not in NOT_CLIPPED:
                weight = layer[name].dequantize()
                limits[name] = search_clip(x, weight, scheme)
                clipped[name] = _share_clipped(weight, limits[name])
                layer[name] = Dense(clip(weight, limits[name]))
    return clipped


def _input(inputs: Mapping[str, Array], group: ScaleGroup) -> Array:
    """The captured x[T, N] of a group."""
    for name in group.targets:
        if name in inputs:
            return inputs[name]
    raise InputError(
        f"AWQ needs the inputs of one of {', '.join(group.targets)}; captured: {', '.join(inputs)}"
    )


def _module(
    group: ScaleGroup,
    layer: Layer,
    config: ModelConfig,
    x: Array,
    rotation: tuple[Array, Array],
    attend: Attend,
    index: int,
) -> Inspect | None:
    """The module whose output the loss of a group is measured on, as a function of candidate
    weights for its targets; None is the product x Wᵀ.
    """
    if group is not ATTENTION_INPUT and group is not MLP_INPUT:
        return None

    def run(weights: list[Array]) -> Array:
        # a new dictionary: the layer never holds a candidate, so there is nothing to restore
        trial = layer | {name: Dense(w) for name, w in zip(group.targets, weights, strict=True)}
        if group is ATTENTION_INPUT:
            hidden = mixed_heads(trial, config, x, rotation, attend, index)  # [T, H·D]
            last: Linear = layer["o_proj"]
        else:
            hidden = swiglu(trial["gate_proj"].matmul(x), trial["up_proj"].matmul(x))  # [T, F]
            last = layer["down_proj"]
        return last.matmul(hidden)

    return run


def _share_clipped(weight: Array, limits: Array) -> float:
    """The share of groups whose largest weight lies beyond their limit."""
    xp = namespace(weight, limits)
    peak = xp.max(xp.abs(xp.reshape(weight, (*limits.shape, -1))), axis=-1)
    return float(xp.mean(xp.astype(peak > limits, xp.float64)))


# --- as a method for whole models -----------------------------------------------------------


@dataclass(frozen=True)
class AWQ(Method):
    """AWQ as a method for whole models: scale, clip, round to nearest; options as in
    ``awq_layer``.
    """

    duo: bool = False
    clipping: bool = True
    max_tokens: int = 2048  # for the search, which runs attention and MLP twenty times each
    scale_dtype: str | None = "float16"
    name: ClassVar[str] = "awq"
    default_scheme: ClassVar[Scheme] = Scheme(4, "awq", "group", 128)
    calibrates: ClassVar[bool] = True
    sequential: ClassVar[bool] = False

    def quantize(self, run: LayerRun, scheme: Scheme, report: ReportTensor) -> Layer:
        """The scaled and clipped layer with projections rounded to nearest. Weight errors are
        relative to the scaled weights, before clipping.
        """
        clock = Clock()
        batches = _first_batches(run.batches, self.max_tokens)
        xp = namespace(batches[0].x)
        # first projection of each stage → x[T, N]
        inputs = {names[0]: xp.concat(list(run.inputs(batches)), axis=0) for names in run.stages()}
        layer, found = self._search(run, inputs, batches, scheme)
        exact = run.layer  # becomes scaled, not clipped or rounded: the same function
        for group in scale_groups(exact)[0]:
            scale = found.scales[group.name].scale
            exact = fold(exact, group, scale)
            inputs[group.targets[0]] = inputs[group.targets[0]] / scale

        def quantize_weight(name: str, weight: Array) -> QuantizedProjection:
            made = rtn(weight, scheme, scale_dtype=self.scale_dtype, name=run.tensor(name))
            return QuantizedProjection(made, found.losses.get(name))

        self.quantize_projections(
            run,
            layer,
            {name: inputs[names[0]][:SAMPLED] for names in STAGES for name in names},
            quantize_weight,
            report,
            exact=exact,
            shared_seconds=clock() / len(PROJECTIONS),
        )
        return layer

    def _search(
        self, run: LayerRun, inputs: Mapping[str, Array], batches: Sequence[Batch], scheme: Scheme
    ) -> tuple[Layer, AWQLayer]:
        """``awq_layer`` on the tokens of ``batches``."""
        xp = namespace(batches[0].x)
        lengths = [length for batch in batches for length in batch.lengths]
        cosines, sines = (
            xp.concat([batch.rotation[i] for batch in batches], axis=0) for i in (0, 1)
        )
        return awq_layer(
            run.layer,
            run.config,
            inputs,
            scheme,
            rotation=(cosines, sines),
            attend=CausalAttend(lengths, run.config.sliding_window),
            index=run.index,
            duo=self.duo,
            clipping=self.clipping,
        )


def _first_batches(batches: list[Batch], tokens: int) -> list[Batch]:
    """As many of the first batches as hold at most ``tokens`` tokens, but at least one."""
    held = list(accumulate(sum(batch.lengths) for batch in batches))
    return batches[: max(1, sum(count <= tokens for count in held))]
