"""Outliers planted in a network that has none, without changing what it computes.

Activations of small networks have no outlier channels; those of large ones have a few, some
hundred times the others, always the same (Dettmers et al. 2022, §4). What they break can be
shown on a small network all the same, since a channel between a norm (or up_proj) and the
weights that read it may be measured in any unit:

    gain_j ← p · gain_j,   W_:j ← W_:j / p      ⇒      x_j ← p · x_j,   x_j W_:j as before

With p a power of two nothing is rounded: every product x_j W_ij is the same number, so the
network's output is the same bit for bit, in any floating point. This is SmoothQuant's
migration run backwards, with s_j = 1/p.

| symbol | name                                                        | shape |
|--------|-------------------------------------------------------------|-------|
| p      | ``factor``, a power of two                                  |       |
| s      | what ``fold`` multiplies columns with: 1/p where planted, 1 | [N]   |

| ``inputs``                     | gets its outliers in | smoothed by SmoothQuant |
|--------------------------------|----------------------|-------------------------|
| "attention input", "MLP input" | the gain of the norm | yes                     |
| "MLP hidden"                   | the rows of up_proj  | no: no norm makes it    |

Keys have outliers of their own, between k_proj and the scores. There the queries take the
opposite factor, and both channels of a rotary pair get the same one, since the rotation
mixes them: q_j k_j stays what it was (``plant_keys``).

Left out: the heads' output (with grouped queries its channels share rows of v_proj),
outliers in a few tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from refllm.backend import asarray_like, namespace
from refllm.model.config import ModelConfig
from refllm.model.llama import Layer, Weights
from refllm.model.weights import Dense
from refllm.quant.awq_model import ATTENTION_INPUT, MLP_HIDDEN, MLP_INPUT, ScaleGroup, fold

__all__ = ["NORMS", "PLACES", "choose", "plant", "plant_keys"]

PLACES = {group.name: group for group in (ATTENTION_INPUT, MLP_INPUT, MLP_HIDDEN)}
NORMS = (ATTENTION_INPUT.name, MLP_INPUT.name)


def choose(width: int, count: int, rng: np.random.Generator) -> list[int]:
    """``count`` of ``width`` channels, ascending."""
    if not 0 <= count <= width:
        raise ValueError(f"planting: {count} channels of {width} cannot be outliers")
    return sorted(rng.permutation(width)[:count].tolist())


def plant(
    weights: Weights,
    channels: Sequence[int],
    factor: float = 128.0,
    inputs: Collection[str] = NORMS,
) -> Weights:
    """A weight tree of the same function whose ``inputs`` are ``factor`` times as large in
    some ``channels``.

    The same channels in every layer, as in large networks. Only what is changed is new.

    Raises
    ------
    ValueError
        for a factor that is no power of two, an input or channel that does not exist, or a
        weight so small that it loses bits when it is divided.
    """
    _check_power(factor)
    if unknown := sorted(set(inputs) - set(PLACES)):
        raise ValueError(
            f"planting: no input is called {', '.join(unknown)}; they are {', '.join(PLACES)}"
        )
    layers = []
    for index, layer in enumerate(weights["layers"]):
        for name in inputs:
            layer = _plant(layer, PLACES[name], channels, factor, index)
        layers.append(layer)
    return weights | {"layers": layers}


def plant_keys(
    weights: Weights, config: ModelConfig, pairs: Sequence[int], factor: float = 8.0
) -> Weights:
    """A weight tree of the same function whose keys are ``factor`` times as large in some
    rotary ``pairs``.

    Pair i of a head of D channels is channels i and i + D/2; the same ones in every head of
    every layer.

    Raises
    ------
    ValueError
        for a factor that is no power of two, a pair that does not exist, numbers so small
        or large that they lose bits, and for networks that norm their keys: there the gain
        of that norm says how large they are.
    """
    _check_power(factor)
    half = config.head_dim // 2
    if config.qk_norm:
        raise ValueError("planting: keys that are normed take no factor from k_proj")
    if pairs and not 0 <= min(pairs) <= max(pairs) < half:
        raise ValueError(f"planting: a head has pairs 0 to {half - 1}, got {list(pairs)}")
    of_head = np.ones(config.head_dim)
    of_head[[*pairs, *(i + half for i in pairs)]] = factor
    layers = []
    for index, layer in enumerate(weights["layers"]):
        planted = dict(layer)
        for name, scale in (("k_proj", of_head), ("q_proj", 1.0 / of_head)):
            weight = layer[name].dequantize()
            rows = asarray_like(
                np.tile(scale, weight.shape[0] // config.head_dim), weight, weight.dtype
            )
            parts = {name: (weight, rows[:, None])}
            bias = name.replace("proj", "bias")
            if bias in layer:
                parts[bias] = layer[bias], rows
            for part, (numbers, by) in parts.items():
                grown = numbers * by
                if not bool(namespace(weight).all(grown / by == numbers)):
                    raise ValueError(
                        f"planting: layer {index}'s {part} has numbers that {factor:g} rounds"
                    )
                planted[part] = Dense(grown) if part == name else grown
        layers.append(planted)
    return weights | {"layers": layers}


def _check_power(factor: float) -> None:
    if not 0 < factor < math.inf or math.frexp(factor)[0] != 0.5:
        raise ValueError(f"planting: a factor of {factor} is no power of two, so it would round")


def _plant(
    layer: Layer, group: ScaleGroup, channels: Sequence[int], factor: float, index: int
) -> Layer:
    before = {name: layer[name].dequantize() for name in group.targets}
    like = before[group.targets[0]]
    xp = namespace(like)
    width = int(like.shape[1])
    if channels and not 0 <= min(channels) <= max(channels) < width:
        raise ValueError(
            f"planting: the {group.name} has channels 0 to {width - 1}, got {list(channels)}"
        )
    s = np.ones(width)
    s[list(channels)] = 1.0 / factor
    scale = asarray_like(s, like, like.dtype)
    planted = fold(layer, group, scale)
    for name, weight in before.items():
        if not bool(xp.all(planted[name].dequantize() / scale == weight)):
            raise ValueError(
                f"planting: layer {index}'s {name} has weights too small to be divided by "
                f"{factor:g}"
            )
    return planted
