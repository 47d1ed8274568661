"""Rotations: multiply the residual stream by an orthogonal matrix, so that no channel and no
token is an outlier any more.

Sources: Ashkboos et al. 2024 (QuaRot), §3 and 4; Liu et al. 2024 (SpinQuant) without learned
rotations, its "had" form: R₁ for the residual stream, R₂ within the heads, R₃ for keys, R₄
before ``down_proj``. The invariance is Ashkboos et al. 2024 (SliceGPT), theorem 1.

RMSNorm without a gain commutes with an orthogonal R: ‖x R‖ = ‖x‖, so norm(x R) = norm(x) R. So
after the gains were folded into the weights that read the norms, the whole network can be
written in the rotated basis, and computes the same function:

| weight                   | reads or writes       | becomes                        |
|--------------------------|-----------------------|--------------------------------|
| ``embed_tokens`` E[V, N] | writes the stream     | E R₁                           |
| q, k, v, gate, up        | read it               | W diag(g) R₁                   |
| ``o_proj``               | reads heads, writes it| R₁ᵀ W (I ⊗ R₂)                 |
| ``v_proj``, per head     | writes a head         | R₂ᵀ W diag(g) R₁               |
| ``down_proj``            | reads F, writes it    | R₁ᵀ W R₄, and x R₄ at run time |
| ``lm_head``              | reads it              | W diag(g) R₁                   |
| q and k after RoPE       |                       | q R₃, k R₃ at run time         |

R₁ = diag(±1) H / √N with random signs (a randomised Hadamard matrix), R₂ = R₃ = Hᵀ / √D and R₄ =
Hᵀ / √F are the plain ones. R₁ and R₂ cost nothing at run time. R₄ and R₃ are fast transforms
(``quant.hadamard``): nothing linear stands before ``down_proj`` (SwiGLU does), and RoPE stands
between ``k_proj`` and the cache. Keys that are rotated differ from others in all products, which
cancel: (q R₃)(k R₃)ᵀ = q kᵀ.

What it costs: E is multiplied by R₁, the head by diag(g) R₁, so a tied head becomes a matrix of
its own. ``o_proj`` is not transformed across heads: QuaRot does so online where the number of
heads is a power of two.

| symbol | name                   | shape  |
|--------|------------------------|--------|
| R₁     | ``stream``             | [N, N] |
| R₂     | ``heads``              | [D, D] |
| R₃     | ``keys``               | [D, D] |
| R₄     | ``mlp``                | [F, F] |

Left out: learned rotations (SpinQuant's Cayley optimiser), permutations (DuQuant), rotations of
a model with quantised weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from refllm.backend import Array, asarray_like, namespace, to_numpy
from refllm.errors import InputError
from refllm.model.attention import Attend
from refllm.model.config import ModelConfig
from refllm.model.llama import SAME_INPUT, Layer, Weights
from refllm.model.weights import Dense, Linear, fuse
from refllm.quant.hadamard import hadamard, hadamard_transform, inverse_transform

M = TypeVar("M")
# marks a layer that is being quantised, whose ``down_proj`` reads transformed inputs
ROTATED = "down_proj reads a transform"
NORM_OF = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Rotations:
    """Which rotations a model gets. ``seed`` draws the signs of R₁.

    ``mlp`` is a transform at run time: without it the model is an ordinary checkpoint, which
    any program loads, and which ``quant.export`` writes.
    """

    stream: bool = True
    heads: bool = True
    mlp: bool = True
    seed: int = 0


class RotatedLinear:
    """Stands for a weight W[M, N] that is stored as W R, with R = Hᵀ / √N: ``matmul`` transforms
    its inputs to x R and multiplies them by ``weight``, which holds W R: (x R)(W R)ᵀ = x Wᵀ.
    """

    def __init__(self, weight: Linear):
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)"""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the weight: the transform has none."""
        return self.weight.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Those of the weight."""
        return self.weight.bits_per_weight

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M]."""
        return self.weight.matmul(hadamard_transform(x))

    def dequantize(self) -> Array:
        """W[M, N], rotated back."""
        return inverse_transform(self.weight.dequantize())


def random_hadamard(n: int, seed: int) -> np.ndarray:
    """diag(±1) H / √n [n, n] in float64 with random signs: orthogonal, and every entry of the
    same size.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], n)
    rotated: np.ndarray = signs[:, None] * hadamard(n) / n**0.5
    return rotated


def fold_norms(weights: Weights) -> Weights:
    """The same network with all gains of RMSNorm 1: each is multiplied into the columns of the
    weights that read it. A tied head becomes a weight of its own.
    """
    xp = namespace(weights["norm"])
    layers = []
    for layer in weights["layers"]:
        folded = dict(layer)
        for name, norm in NORM_OF.items():
            folded[name] = _dense(layer, name) * layer[norm][None, :]  # W diag(g)
        for norm in set(NORM_OF.values()):
            folded[norm] = xp.ones_like(layer[norm])
        layers.append(_as_layer(folded))
    head = Dense(_dense(weights, "lm_head") * weights["norm"][None, :])
    return weights | {"layers": layers, "norm": xp.ones_like(weights["norm"]), "lm_head": head}


def rotate(model: M, rotations: Rotations | None = None) -> M:
    """The same function in a rotated basis: a record of config, weights and tokenizer like
    ``model``, in its dtype; the rotation is computed in float64.

    ``model`` is not changed. Quantise the result by ``quantize_model``.

    Raises
    ------
    ValueError
        for weights that are quantised, and for widths without a Hadamard matrix
        (``hadamard.split_order``).

    >>> import numpy as np, refllm
    >>> model = refllm.load("stdlib-draft", dtype="float64")
    >>> rotated = rotate(model)
    >>> bool(np.allclose(model.logits([5, 9, 2]), rotated.logits([5, 9, 2]), atol=1e-9))
    True
    """
    chosen = Rotations() if rotations is None else rotations
    record: Any = model
    config: ModelConfig = record.config
    weights = fold_norms(record.weights)
    like = weights["norm"]
    r1 = _identity_or(chosen.stream, lambda: random_hadamard(config.hidden_size, chosen.seed))
    r2 = _identity_or(chosen.heads, lambda: hadamard(config.head_dim).T / config.head_dim**0.5)
    layers = [_rotate_layer(layer, config, r1, r2, chosen) for layer in weights["layers"]]
    embedding = to_numpy(_dense(weights, "embed_tokens")).astype(np.float64)
    head = to_numpy(_dense(weights, "lm_head")).astype(np.float64)
    made = weights | {
        "layers": layers,
        "embed_tokens": Dense(_like(_times(embedding, r1), like)),
        "lm_head": Dense(_like(_times(head, r1), like)),
    }
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    if dataclasses.is_dataclass(record):
        replace: Any = dataclasses.replace  # M is any record: no type of a dataclass
        result: M = replace(record, config=untied, weights=made)
        return result
    changed = copy.copy(model)
    vars(changed).update(config=untied, weights=made)
    return changed


def _rotate_layer(
    layer: Layer,
    config: ModelConfig,
    r1: np.ndarray | None,
    r2: np.ndarray | None,
    chosen: Rotations,
) -> Layer:
    """A layer whose gains are 1, in the rotated basis."""
    like = layer["input_layernorm"]
    d = config.head_dim
    made = dict(layer)
    for name in NORM_OF:  # read the stream
        w = to_numpy(_dense(layer, name)).astype(np.float64)
        w = _times(w, r1)
        if name == "v_proj" and r2 is not None:
            w = np.einsum("de,gdn->gen", r2, w.reshape(-1, d, w.shape[1])).reshape(w.shape)
            if config.attention_bias:
                bias = to_numpy(layer["v_bias"]).astype(np.float64).reshape(-1, d)
                made["v_bias"] = _like((bias @ r2).reshape(-1), like)
        made[name] = _like(w, like)
    o = to_numpy(_dense(layer, "o_proj")).astype(np.float64)
    if r2 is not None:
        o = (o.reshape(o.shape[0], -1, d) @ r2).reshape(o.shape)  # W (I ⊗ R₂)
    down: np.ndarray = to_numpy(_dense(layer, "down_proj")).astype(np.float64)
    if chosen.mlp:
        down = to_numpy(hadamard_transform(down))  # W R₄
    if r1 is not None:
        o = r1.T @ o  # write the stream
        down = r1.T @ down
    made["o_proj"] = _like(o, like)
    made["down_proj"] = _like(down, like)
    made = _as_layer(made)
    if chosen.mlp:
        made["down_proj"] = RotatedLinear(made["down_proj"])
    return made


def unwrap_rotated(layer: Layer) -> Layer:
    """A copy of a layer for quantising: the weight behind a ``RotatedLinear`` in its place, and
    a mark that its inputs are transformed.
    """
    made = dict(layer)
    if isinstance(made["down_proj"], RotatedLinear):
        made["down_proj"] = made["down_proj"].weight
        made[ROTATED] = True
    return made


def wrap_rotated(layer: Layer) -> Layer:
    """The layer that ``unwrap_rotated`` marked, its quantised weight behind the transform."""
    made = dict(layer)
    if made.pop(ROTATED, False):
        made["down_proj"] = RotatedLinear(made["down_proj"])
    return made


class RotatedAttend:
    """Keys and queries in a rotated basis on their way to a cache: the cache stores k R₃, whose
    channels are alike, and scores are unchanged. ``attend`` is the cache's view.
    """

    def __init__(self, attend: Attend):
        self.attend = attend

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """q[T, H, D], k[T, G, D], v[T, G, D] → [T, H, D]."""
        return self.attend(layer, hadamard_transform(q), hadamard_transform(k), v)


def _dense(weights: Weights, name: str) -> Array:
    """W[M, N] of a weight in floating point; InputError for a quantised one."""
    if not isinstance(weights[name], Dense):
        raise InputError(
            f"rotate takes weights in floating point: {name} is {type(weights[name]).__name__}; "
            'load the model with weights="float" and quantise it after the rotation'
        )
    w: Array = weights[name].dequantize()
    return w


def _as_layer(layer: Layer) -> Layer:
    """The arrays of a layer's projections as ``Dense`` weights, fused as ``build`` fuses them."""
    made = dict(layer)
    for keys in SAME_INPUT:
        arrays = [w.dequantize() if isinstance(w := layer[key], Dense) else w for key in keys]
        made |= zip(keys, fuse(arrays), strict=True)
    return made


def _identity_or(wanted: bool, make: Callable[[], np.ndarray]) -> np.ndarray | None:
    """A matrix, or None for the identity."""
    return make() if wanted else None


def _times(w: np.ndarray, r: np.ndarray | None) -> np.ndarray:
    return w if r is None else w @ r


def _like(w: np.ndarray, like: Array) -> Array:
    """A host array in the library and dtype of another one."""
    return asarray_like(w, like, str(like.dtype))
