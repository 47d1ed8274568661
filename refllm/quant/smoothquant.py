"""SmoothQuant: move the difficulty of rounding activations into the weights, where it hurts
less.

Source: Xiao et al. 2023, §4 (eq. 3, 4) and the authors' ``smooth_ln_fcs_llama_like``.

Outliers of activations stay in the same few input channels for all tokens. A step belongs
to a token (or a tensor), not to a channel, since channel steps do not factor out of the sum
over N; so one large channel widens the step of all. Dividing each channel by its own s_j
and multiplying the weights' columns by it changes nothing but what is rounded:

    Y = X Wᵀ = (X diag(s)⁻¹)(W diag(s))ᵀ,     s_j = max|X_j|^α / max|W_j|^(1−α)

The division costs nothing at run time: it is folded into the gain of the norm that makes X.

| x                    | made by                   | weights, one s for all |
|----------------------|---------------------------|------------------------|
| attention's input    | input_layernorm           | q_proj, k_proj, v_proj |
| MLP's input          | post_attention_layernorm  | gate_proj, up_proj     |

o_proj and down_proj are never smoothed: no norm makes their input. Where *their* inputs
have outliers, SmoothQuant does not help.

| symbol | name                                                       | shape  |
|--------|------------------------------------------------------------|--------|
| a      | ``act_absmax``: max |x| of each channel over the text      | [N]    |
| w      | max |W| of each column, over all weights that read x       | [N]    |
| s      | migration scale, > 0                                       | [N]    |
| α      | 0: all into the activations, 1: all into the weights       |        |

``level``: O1 rounds activations with a step a token, O2 with one step for the batch, O3
with one step from calibration. The paper's table has one step for a whole weight in all
three; its code, and everyone since, has one for each row of it, which is what ``Scheme(8,
"restricted", "channel")`` says. Pass "tensor" for the table's.

Left out: llm-compressor's variant (max − min of a channel instead of a, 2w instead of w), a
search for α, rounding q, k, v for the attention's own products, the factor 1/127 for
attention probabilities.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from refllm.backend import Array, namespace
from refllm.formats.quantized_linear import quantize
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear
from refllm.model.llama import PROJECTIONS, Layer, Weights
from refllm.quant.awq_model import ATTENTION_INPUT, MLP_INPUT, fold
from refllm.quant.layer_inputs import Source, walk
from refllm.quant.observers import MinMax

__all__ = [
    "LEVELS", "SMOOTHED", "W8A8Linear", "activation_absmax", "migration_scale", "quantize_layer", "smooth_layer",
    "smoothquant", "w8a8",
]  # fmt: skip

SMOOTHED = (ATTENTION_INPUT, MLP_INPUT)
LEVELS = {"O1": "token", "O2": "tensor", "O3": "static"}
FLOOR = 1e-5  # of w and of s, as the authors clamp them

Absmax = Mapping[str, Array]  # projection → max |x| of each input channel, [N]


def migration_scale(
    act_absmax: Array, weights: Array | Sequence[Array], alpha: float = 0.5
) -> Array:
    """s[N] = a^α / w^(1−α) for act_absmax[N] and the weights [M, N] that read these
    channels, in act_absmax's dtype.

    w and s are at least 1e-5, as the authors' are. A channel that was zero throughout the
    text keeps s = 1: theirs gets 1e-5, and if it ever wakes up it is divided by that.

    Raises
    ------
    ValueError
        for α outside [0, 1], shapes that do not fit, or numbers that are not finite.
    """
    group: list[Array] = list(weights) if isinstance(weights, (list, tuple)) else [weights]
    xp = namespace(act_absmax, *group)
    if not 0 <= alpha <= 1:
        raise ValueError(f"migration_scale: alpha lies within 0..1, got {alpha}")
    if not group or any(
        w.ndim != 2 or tuple(w.shape[1:]) != tuple(act_absmax.shape) for w in group
    ):
        shapes = ", ".join(str(tuple(w.shape)) for w in group)
        raise ValueError(
            f"migration_scale: weights {shapes or 'of none'} do not read {tuple(act_absmax.shape)} channels"
        )
    if act_absmax.dtype.kind != "f":
        raise ValueError(
            f"migration_scale: absmax is of floats, got {act_absmax.dtype}: whole numbers hold no scale"
        )
    if any(w.shape[0] == 0 for w in group):
        raise ValueError("migration_scale: a weight without rows has no absmax")
    w = _column_absmax(group, act_absmax.dtype)
    if not bool(xp.all(xp.isfinite(act_absmax) & (act_absmax >= 0))) or not bool(
        xp.all(xp.isfinite(w))
    ):
        raise ValueError(
            "migration_scale: absmax of activations and weights must be finite, and not negative"
        )
    alive = act_absmax > 0
    a = xp.where(alive, act_absmax, 1.0)
    s = a**alpha / xp.maximum(w, FLOOR) ** (1.0 - alpha)
    return xp.astype(xp.where(alive, xp.maximum(s, FLOOR), 1.0), act_absmax.dtype)


def smooth_layer(
    layer: Layer, absmax: Absmax, alpha: float = 0.5
) -> tuple[Layer, dict[str, Array]]:
    """A layer of the same function with smoothed inputs, and ``absmax`` as it is after
    smoothing.

    ``absmax`` names one projection of each group at least; siblings read the same x.

    Raises
    ------
    ValueError
        if it names none, or as ``migration_scale``.
    """
    after = dict(absmax)
    for group in SMOOTHED:
        named = [name for name in group.targets if name in absmax]
        if not named:
            raise ValueError(
                f"SmoothQuant needs the absmax of one of {', '.join(group.targets)}: calibrate first"
            )
        weights = [layer[name].dequantize() for name in group.targets]
        s = migration_scale(absmax[named[0]], weights, alpha)
        layer = fold(layer, group, s)
        after |= dict.fromkeys(group.targets, absmax[named[0]] / s)
    return layer, after


def w8a8(
    weight: Array,
    level: str = "O1",
    *,
    absmax: Array | None = None,
    scheme: Scheme | None = None,
    rule: str = "restricted",
    bits: int = 8,
    scale_dtype: str | None = None,
    name: str = "weight",
) -> W8A8Linear:
    """W[M, N] rounded to nearest by ``scheme``, which rounds its inputs as ``level`` says,
    to ``bits`` by ``rule``.

    Level O3 needs the inputs' ``absmax``, [N] or one number.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; choose one of {', '.join(LEVELS)}")
    if scheme is None:
        scheme = Scheme(8, "restricted", "channel")
    else:
        scheme = scheme
    made = quantize(weight, scheme, scale_dtype=scale_dtype, name=name)
    activation: str | float = LEVELS[level]
    if activation == "static":
        if absmax is None:
            raise ValueError(
                "level O3 rounds with a step from calibration: pass the inputs' absmax"
            )
        xp = namespace(absmax)
        largest = float(xp.max(absmax))
        if largest:
            activation = largest / Scheme(bits, rule, "tensor").steps
        else:
            activation = 1.0
    return W8A8Linear(made, activation, rule, bits=bits, name=f"the input of {name}")


def quantize_layer(
    layer: Layer,
    absmax: Absmax,
    level: str = "O1",
    *,
    keep: Collection[str] = (),
    scheme: Scheme | None = None,
    rule: str = "restricted",
    bits: int = 8,
) -> Layer:
    """A layer whose projections round their inputs, but for those named in ``keep``, which
    stay in floating point.
    """
    unknown = sorted(set(keep) - set(PROJECTIONS))
    if unknown:
        raise ValueError(
            f"keep: no projection is called {', '.join(unknown)}; they are {', '.join(PROJECTIONS)}"
        )
    made = dict(layer)
    for name in PROJECTIONS:
        if name not in keep:
            made[name] = w8a8(
                layer[name].dequantize(),
                level,
                absmax=absmax.get(name),
                scheme=scheme,
                rule=rule,
                bits=bits,
                name=name,
            )
    return made


def smoothquant(
    weights: Weights,
    absmax: Sequence[Absmax],
    *,
    alpha: float | None = 0.5,
    level: str = "O1",
    keep: Collection[str] = (),
    scheme: Scheme | None = None,
    rule: str = "restricted",
    bits: int = 8,
) -> Weights:
    """A whole weight tree in W8A8: ``smooth_layer`` (not with ``alpha`` None), then
    ``quantize_layer``, layer by layer.

    ``absmax`` is that of ``activation_absmax`` on the same weights.
    """
    layers = []
    for layer, seen in zip(weights["layers"], absmax, strict=True):
        smooth, after = (layer, dict(seen)) if alpha is None else smooth_layer(layer, seen, alpha)
        layers.append(
            quantize_layer(smooth, after, level, keep=keep, scheme=scheme, rule=rule, bits=bits)
        )
    return weights | {"layers": layers}


def activation_absmax(source: Source, calibration: object) -> list[dict[str, Array]]:
    """max |x| of each input channel of every projection over the calibration text, layer by
    layer: name → [N].
    """
    found = []
    for run in walk(source, calibration):
        layer: dict[str, Array] = {}
        for names in run.stages():
            observer = MinMax(axis=-1, name=f"the input of layer {run.index}'s {names[0]}")
            for x in run.inputs():
                observer.observe(x)
            layer |= dict.fromkeys(names, observer.absmax)
        found.append(layer)
    return found


def _column_absmax(weights: Sequence[Array], dtype: object) -> Array:
    """max |W| of each column over all the weights, [N]."""
    xp = namespace(*weights)
    w = xp.max(xp.abs(weights[0]), axis=0)
    for other in weights[1:]:
        w = xp.maximum(w, xp.max(xp.abs(other), axis=0))
    return xp.astype(w, dtype, copy=False)
