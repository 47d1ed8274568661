"""Inject outlier channels into a network that has none, without changing what it computes.

Activations of small networks have no outlier channels; those of large ones have a few, some
hundred times the others, always the same (Dettmers et al. 2022, §4). What they break can
still be shown on a small network, since the scale of a channel between a norm (or up_proj)
and the weights that read it is free:

    gain_j ← p · gain_j,   W_:j ← W_:j / p      ⇒      x_j ← p · x_j,   x_j W_:j unchanged

With p a power of two nothing is rounded: every product x_j W_ij is the same value, so the
network's output is the same bit for bit, in any floating point. This is SmoothQuant's
migration run backwards, with s_j = 1/p.

| symbol | name                                                                     | shape |
|--------|--------------------------------------------------------------------------|-------|
| p      | ``factor``, a power of two                                               |       |
| s      | what ``fold`` multiplies columns with: 1/p in an outlier channel, else 1 | [N]   |

| ``inputs``                     | where the outliers are injected | smoothed by SmoothQuant |
|--------------------------------|---------------------------------|-------------------------|
| "attention input", "MLP input" | the gain of the norm            | yes                     |
| "MLP hidden"                   | the rows of up_proj             | no: no norm makes it    |

Keys have outliers of their own, between k_proj and the scores. There the queries take the
inverse factor, and both channels of a rotary pair get the same one, since the rotation
mixes them: q_j k_j does not change (``inject_key_outliers``).

Left out: the heads' output (with grouped queries its channels share rows of v_proj),
outliers in a few tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from refllm.array_types import Array
from refllm.backend import asarray_like, namespace
from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.model.llama import Layer, Weights
from refllm.model.weights import Dense
from refllm.quant.awq_model import ATTENTION_INPUT, MLP_HIDDEN, MLP_INPUT, ScaleGroup, fold

INPUTS = {group.name: group for group in (ATTENTION_INPUT, MLP_INPUT, MLP_HIDDEN)}
NORM_INPUTS = (ATTENTION_INPUT.name, MLP_INPUT.name)


def choose_channels(width: int, count: int, rng: np.random.Generator) -> list[int]:
    """Draw ``count`` of ``width`` channels, ascending.

    >>> choose_channels(8, 3, np.random.default_rng(0))
    [2, 3, 4]
    """
    if not 0 <= count <= width:
        raise InputError(f"outlier injection: cannot choose {count} of {width} channels")
    return sorted(rng.permutation(width)[:count].tolist())


def inject_outliers(
    weights: Weights,
    channels: Sequence[int],
    factor: float = 128.0,
    inputs: Collection[str] = NORM_INPUTS,
) -> Weights:
    """A weight tree of the same function whose ``inputs`` are ``factor`` times as large in
    ``channels``.

    The channels are the same in every layer, as in large networks. Tensors that do not
    change are shared with ``weights``.

    Raises
    ------
    ValueError
        for a factor that is no power of two, an input or channel that does not exist, or a
        weight so small that it loses bits when it is divided.
    """
    _check_power_of_two(factor)
    if unknown := sorted(set(inputs) - set(INPUTS)):
        raise InputError(
            f"outlier injection: no input is called {', '.join(unknown)}; "
            f"they are {', '.join(INPUTS)}"
        )
    layers = []
    for index, layer in enumerate(weights["layers"]):
        for name in inputs:
            layer = _scale_input(layer, INPUTS[name], channels, factor, index)
        layers.append(layer)
    return weights | {"layers": layers}


def inject_key_outliers(
    weights: Weights, config: ModelConfig, pairs: Sequence[int], factor: float = 8.0
) -> Weights:
    """A weight tree of the same function whose keys are ``factor`` times as large in some
    rotary ``pairs``.

    Pair i of a head of D channels is channels i and i + D/2; the same ones in every head of
    every layer.

    Raises
    ------
    ValueError
        for a factor that is no power of two, a pair that does not exist, weights so small
        or large that they lose bits, and for networks that norm their keys: there the gain
        of that norm decides how large they are.
    """
    _check_power_of_two(factor)
    half = config.head_dim // 2
    if config.qk_norm:
        raise InputError("outlier injection: keys that are normed take no factor from k_proj")
    if pairs and not 0 <= min(pairs) <= max(pairs) < half:
        raise InputError(f"outlier injection: a head has pairs 0 to {half - 1}, got {list(pairs)}")
    of_head = np.ones(config.head_dim)  # [D]
    of_head[[*pairs, *(i + half for i in pairs)]] = factor
    layers = []
    for index, layer in enumerate(weights["layers"]):
        scaled = dict(layer)
        for name, scale in (("k_proj", of_head), ("q_proj", 1.0 / of_head)):
            weight = layer[name].dequantize()  # [heads·D, N]
            heads = weight.shape[0] // config.head_dim
            rows = asarray_like(np.tile(scale, heads), weight, weight.dtype)  # [heads·D]
            scaled[name] = Dense(_scale_exactly(weight, rows[:, None], index, name, factor))
            bias = name.replace("proj", "bias")
            if bias in layer:
                scaled[bias] = _scale_exactly(layer[bias], rows, index, bias, factor)
        layers.append(scaled)
    return weights | {"layers": layers}


def _check_power_of_two(factor: float) -> None:
    """ValueError for a factor whose products would be rounded."""
    if not 0 < factor < math.inf or math.frexp(factor)[0] != 0.5:
        raise InputError(
            f"outlier injection: a factor of {factor} is no power of two, so it would round"
        )


def _scale_exactly(tensor: Array, scale: Array, index: int, name: str, factor: float) -> Array:
    """tensor · scale; ValueError, which names layer and tensor, if that loses a bit."""
    scaled = tensor * scale
    if not bool(namespace(tensor).all(scaled / scale == tensor)):
        raise InputError(
            f"outlier injection: layer {index}'s {name} has values that {factor:g} rounds"
        )
    return scaled


def _scale_input(
    layer: Layer, group: ScaleGroup, channels: Sequence[int], factor: float, index: int
) -> Layer:
    """One layer with ``factor`` folded into one of its inputs."""
    before = {name: layer[name].dequantize() for name in group.targets}
    like = before[group.targets[0]]
    xp = namespace(like)
    width = int(like.shape[1])
    if channels and not 0 <= min(channels) <= max(channels) < width:
        raise InputError(
            f"outlier injection: the {group.name} has channels 0 to {width - 1}, "
            f"got {list(channels)}"
        )
    s = np.ones(width)  # [N]
    s[list(channels)] = 1.0 / factor
    scale = asarray_like(s, like, like.dtype)
    scaled = fold(layer, group, scale)
    for name, weight in before.items():
        if not bool(xp.all(scaled[name].dequantize() / scale == weight)):
            raise InputError(
                f"outlier injection: layer {index}'s {name} has weights too small to be "
                f"divided by {factor:g}"
            )
    return scaled
