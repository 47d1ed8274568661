"""SmoothQuant: move the difficulty of quantising activations into the weights, which tolerate
it better.

Source: Xiao et al. 2023, §4 (eq. 3, 4) and the authors' ``smooth_ln_fcs_llama_like``.

Outliers of activations stay in the same few input channels for all tokens. A scale belongs
to a token (or a tensor), not to a channel, since scales of channels do not factor out of the
sum over N; so one large channel makes the scale of all channels coarse. Dividing each channel
by its own s_j and multiplying the weights' columns by it changes only what is rounded:

    Y = X Wᵀ = (X diag(s)⁻¹)(W diag(s))ᵀ,     s_j = max|X_j|^α / max|W_j|^(1−α)

The division costs nothing at run time: it is folded into the gain of the norm that produces X.

| x                 | produced by              | weights, one s for all |
|-------------------|--------------------------|------------------------|
| attention's input | input_layernorm          | q_proj, k_proj, v_proj |
| MLP's input       | post_attention_layernorm | gate_proj, up_proj     |

o_proj and down_proj are never smoothed, because no norm produces their input. Where *their*
inputs have outliers, SmoothQuant does not help.

| symbol | name                                                    | shape |
|--------|---------------------------------------------------------|-------|
| a      | ``act_absmax``: max |x| of each channel over the tokens | [N]   |
| w      | max |W| of each column, over all weights that read x    | [N]   |
| s      | migration scale, > 0                                    | [N]   |
| α      | 0: all into the activations, 1: all into the weights    |       |

``level``: O1 quantises activations with one scale per token, O2 with one scale for the batch,
O3 with one scale from calibration. The paper's table has one scale per weight in all three;
its code, and every implementation since, has one per row:
``Scheme(8, "restricted", "channel")``. Pass "tensor" for the table's.

Left out: llm-compressor's variant (max − min of a channel instead of a, 2w instead of w), a
search for α, quantising q, k, v for the attention's own products, the factor 1/127 for
attention probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from refllm.backend import Array, DType, namespace
from refllm.errors import InputError, alternatives
from refllm.formats.quantized_linear import quantize
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear
from refllm.model.llama import PROJECTIONS, Layer
from refllm.quant.awq_model import ATTENTION_INPUT, MLP_INPUT, fold
from refllm.quant.layer_inputs import Calibration, LayerRun, LayerSource, walk
from refllm.quant.methods import Clock, Method, QuantizedProjection, ReportTensor, sample_inputs
from refllm.quant.observers import MinMax

__all__ = ["LEVELS", "SMOOTHED", "SmoothQuant", "W8A8Linear", "activation_absmax",
           "input_absmax", "migration_scale", "smooth_layer", "w8a8"]  # fmt: skip

SMOOTHED = (ATTENTION_INPUT, MLP_INPUT)
LEVELS = {"O1": "token", "O2": "tensor", "O3": "static"}
FLOOR = 1e-5  # least w and s, as the authors clamp them

Absmax = Mapping[str, Array]  # projection → max |x| of each input channel, [N]


def migration_scale(
    act_absmax: Array, weights: Array | Sequence[Array], alpha: float = 0.5
) -> Array:
    """s[N] = a^α / w^(1−α) for act_absmax[N] and the weights [M, N] that read these
    channels, in act_absmax's dtype.

    w and s are at least 1e-5, as in the authors' code. A channel that is zero in all tokens
    keeps s = 1. (In their code it gets 1e-5: if it is ever non-zero it is divided by that.)

    Raises
    ------
    ValueError
        for α outside [0, 1], shapes that do not fit, or values that are not finite.

    >>> import numpy as np
    >>> absmax = np.array([1.0, 100.0])
    >>> migration_scale(absmax, np.array([[1.0, 1.0], [-0.5, 0.25]])).tolist()
    [1.0, 10.0]
    """
    group: list[Array] = list(weights) if isinstance(weights, Sequence) else [weights]
    xp = namespace(act_absmax, *group)
    if not 0 <= alpha <= 1:
        raise InputError(f"migration_scale: alpha lies within 0..1, got {alpha}")
    if not group or any(
        w.ndim != 2 or tuple(w.shape[1:]) != tuple(act_absmax.shape) for w in group
    ):
        shapes = ", ".join(str(tuple(w.shape)) for w in group)
        raise InputError(
            f"migration_scale: weights {shapes or 'of none'} do not read "
            f"{tuple(act_absmax.shape)} channels"
        )
    if act_absmax.dtype.kind != "f":
        raise InputError(
            f"migration_scale: absmax is of floats, got {act_absmax.dtype}: integers hold no scale"
        )
    if any(w.shape[0] == 0 for w in group):
        raise InputError("migration_scale: a weight without rows has no absmax")
    w = _column_absmax(group, act_absmax.dtype)  # [N]
    valid = xp.isfinite(act_absmax) & (act_absmax >= 0) & xp.isfinite(w)
    if not bool(xp.all(valid)):
        raise InputError(
            "migration_scale: absmax of activations and weights must be finite, and not negative"
        )
    alive = act_absmax > 0
    a = xp.where(alive, act_absmax, 1.0)
    s = a**alpha / xp.maximum(w, FLOOR) ** (1.0 - alpha)  # eq. 4, [N]
    return xp.astype(xp.where(alive, xp.maximum(s, FLOOR), 1.0), act_absmax.dtype)


def smooth_layer(
    layer: Layer, absmax: Absmax, alpha: float = 0.5
) -> tuple[Layer, dict[str, Array]]:
    """A layer that computes the same function with smoothed inputs, and ``absmax`` after smoothing.

    ``absmax`` names at least one projection of each group; siblings read the same x.

    Raises
    ------
    ValueError
        if it names none, or as ``migration_scale``.
    """
    after = dict(absmax)
    for group in SMOOTHED:
        named = [name for name in group.targets if name in absmax]
        if not named:
            raise InputError(
                f"SmoothQuant needs the absmax of one of {', '.join(group.targets)}: "
                "calibrate first"
            )
        weights = [layer[name].dequantize() for name in group.targets]
        s = migration_scale(absmax[named[0]], weights, alpha)
        layer = fold(layer, group, s)  # columns of W times s, the norm's gain divided by it
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
    """W[M, N] rounded to nearest by ``scheme``; its inputs are quantised as ``level`` says,
    to ``bits`` bits by ``rule``.

    Level O3 needs the inputs' ``absmax``, [N] or ().
    """
    if level not in LEVELS:
        raise InputError(f"unknown level {level!r}; {alternatives(level, LEVELS)}")
    if scheme is None:
        scheme = Scheme(8, "restricted", "channel")
    made = quantize(weight, scheme, scale_dtype=scale_dtype, name=name)
    activation: str | float = LEVELS[level]
    if activation == "static":
        if absmax is None:
            raise InputError(
                "level O3 quantises with a scale from calibration: pass the inputs' absmax"
            )
        xp = namespace(absmax)
        largest = float(xp.max(absmax))
        activation = 1.0  # if all inputs were zero, any scale will do
        if largest:
            activation = largest / Scheme(bits, rule, "tensor").steps
    return W8A8Linear(made, activation, rule, bits=bits, name=f"the input of {name}")


def input_absmax(run: LayerRun, names: Sequence[str]) -> dict[str, Array]:
    """max |x| of each input channel over the calibration tokens, for the projections ``names``
    of the run's current stage: name → [N].
    """
    observer = MinMax(axis=-1, name=f"the input of {run.tensor(names[0])}")
    for x in run.inputs():
        observer.observe(x)
    return dict.fromkeys(names, observer.absmax)


def activation_absmax(source: LayerSource, calibration: Calibration) -> list[dict[str, Array]]:
    """``input_absmax`` of all projections of a model in floating point, one dict per layer."""
    found = []
    for run in walk(source, calibration):
        layer: dict[str, Array] = {}
        for names in run.stages():
            layer |= input_absmax(run, names)
        found.append(layer)
    return found


def _column_absmax(weights: Sequence[Array], dtype: DType) -> Array:
    """max |W| of each column over all the weights, [N]."""
    xp = namespace(*weights)
    w = xp.max(xp.abs(weights[0]), axis=0)
    for other in weights[1:]:
        w = xp.maximum(w, xp.max(xp.abs(other), axis=0))
    return xp.astype(w, dtype, copy=False)


# --- as a method for whole models -----------------------------------------------------------


@dataclass(frozen=True)
class SmoothQuant(Method):
    """SmoothQuant as a method for whole models: ``smooth_layer``, then ``w8a8``.

    ``alpha`` None does not smooth; ``keep`` names projections that stay in floating point,
    ``per_token`` those whose inputs get one scale per token at any level: ``down_proj`` has
    spikes of single tokens, which no scale from calibration fits. ``activation_bits`` are those
    of the inputs.
    """

    alpha: float | None = 0.5
    level: str = "O1"
    keep: tuple[str, ...] = ()
    rule: str = "restricted"  # of the activations
    scale_dtype: str | None = None
    per_token: tuple[str, ...] = ()
    activation_bits: int = 8
    name: ClassVar[str] = "smoothquant"
    default_scheme: ClassVar[Scheme] = Scheme(8, "restricted", "channel")
    calibrates: ClassVar[bool] = True
    sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field, named in (("keep", self.keep), ("per_token", self.per_token)):
            if unknown := sorted(set(named) - set(PROJECTIONS)):
                raise InputError(
                    f"{field}: no projection is called {', '.join(unknown)}; they are "
                    f"{', '.join(PROJECTIONS)}"
                )
        if self.level not in LEVELS:
            raise InputError(f"unknown level {self.level!r}; {alternatives(self.level, LEVELS)}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InputError(
                "smoothquant: alpha lies within 0..1, or is None to smooth nothing, "
                f"got {self.alpha}"
            )

    def quantize(self, run: LayerRun, scheme: Scheme, report: ReportTensor) -> Layer:
        """The smoothed layer in W8A8. Errors are relative to the smoothed weights."""
        clock = Clock()
        absmax: dict[str, Array] = {}
        samples: dict[str, Array | None] = {}
        for names in run.stages():
            absmax |= input_absmax(run, names)
            samples |= dict.fromkeys(names, sample_inputs(run))
        layer = run.layer
        after = absmax
        if self.alpha is not None:
            layer, after = smooth_layer(layer, absmax, self.alpha)
        layer = dict(layer)

        def quantize_weight(name: str, weight: Array) -> QuantizedProjection:
            if name in self.keep:
                return QuantizedProjection(layer[name], note="kept in floating point")
            made = w8a8(
                weight,
                "O1" if name in self.per_token else self.level,
                bits=self.activation_bits,
                absmax=after[name],
                scheme=scheme,
                rule=self.rule,
                scale_dtype=self.scale_dtype,
                name=run.tensor(name),
            )
            return QuantizedProjection(made)

        smoothed = {name: _smoothed(samples[name], absmax[name], after[name]) for name in samples}
        shared = clock() / len(PROJECTIONS)
        self.quantize_projections(
            run, layer, smoothed, quantize_weight, report, shared_seconds=shared
        )
        return layer


def _smoothed(x: Array | None, absmax: Array, after: Array) -> Array | None:
    """x[T, N] / s (None stays None): 1/s is the absmax after over the absmax before smoothing."""
    if x is None:
        return None
    xp = namespace(x)
    return x * (after / xp.where(absmax > 0, absmax, 1.0))
