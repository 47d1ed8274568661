"""AWQ: make the input channels that carry the activations larger before rounding, and clip
what is rarely met.

Source: Lin et al. 2023 (arXiv:2306.00978), §3 and its authors' code (llm-awq); ``duo`` as
in AutoAWQ, on the grid of llm-compressor. A product does not change if column j of W is
multiplied by s_j and x_j divided by it,

    x Wᵀ = (x/s) (W·s)ᵀ ≈ (x/s) Q(W·s)ᵀ,   where   |Q(W·s)/s − W|_j ≤ Δ'/(2 s_j),

but the rounding error of column j shrinks by s_j as long as the step Δ' of its group stays
what it was. That is so for a few channels; all of them cannot be the exception. So s is
searched for on a grid of 20, by the error of the output. The weights' own size plays no
part (unless ``duo``): what matters is how large the inputs are.

| symbol | name                                                         | shape     |
|--------|--------------------------------------------------------------|-----------|
| x      | captured inputs of the weights                               | [T, N]    |
| W      | weights that read the same x (q, k and v; gate and up)       | [M, N]    |
| a      | mean over tokens of abs(x_j)                                 | [N]       |
| s      | scale, a^r clamped and brought to sqrt(max s · min s) = 1    | [N]       |
| r      | ratio, i/20 for i = 0 … 19; r = 0 is round to nearest        |           |
| Q      | round trip through the scheme                                | [M, N]    |
| m      | clip limit of each row and group, ≥ 0.55 of its largest      | [M, N/g]  |

Nothing is changed in place: a candidate is a new array that ``inspect`` is handed, so there
is nothing to restore.

Left out: where s is folded (see ``awq_model``), the byte layouts, activations in fewer
bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refllm.backend import Array, namespace
from refllm.formats.quantized_linear import fake_quantize
from refllm.formats.uniform import Scheme, require_finite

__all__ = ["AWQScale", "channel_magnitude", "clip", "search_clip", "search_scale"]

# stand-ins for the weights → output of the module that is measured
Inspect = Callable[[list[Array]], Array]

GRID = 20  # candidates of the scale search; the first is round to nearest in every mode
FLOOR = 1e-4  # smallest a^r: a channel that never fires must not get a scale of 0
CLIP_GRID = 20  # limits 1, 0.95, …, 0.55 of a group's largest weight
CLIP_STEPS = 10
_PIECE = 1 << 20  # weights at a time in the clip search


@dataclass(frozen=True, eq=False)
class AWQScale:
    """The best scale found, and what every candidate cost."""

    scale: Array  # [N], in x's dtype
    ratio: float
    losses: tuple[float, ...]  # mean squared error of the inspected output; [0] is round to nearest
    ratios: tuple[float, ...]  # the ratio of each candidate (with ``duo``, 0 occurs twice)

    @property
    def best(self) -> int:
        """Index of the chosen candidate."""
        return self.losses.index(min(self.losses))


def search_scale(
    x: Array,
    weights: Sequence[Array],
    scheme: Scheme,
    *,
    inspect: Inspect | None = None,
    duo: bool = False,
    ratios: Sequence[float] | None = None,
) -> AWQScale:
    """Search the scale of the N input channels that ``weights`` [M_i, N] share; x[T, N] →
    ``AWQScale``.

    ``inspect(weights) -> output`` runs the module whose output the loss is taken on (the
    whole attention, the whole MLP) with these weights in place of its own; the default is
    the product itself. ``duo`` divides by the weights' magnitude as well. ``ratios``
    replaces the grid; 0 without ``duo``, which is round to nearest, always comes first. Of
    equal losses the earlier candidate wins; one whose loss is not finite never does.

    Raises
    ------
    ValueError
        if x or a weight is not finite or the shapes disagree; what ``inspect`` raises
        passes through.
    """
    xp = namespace(x, *weights)
    _check_inputs(x, weights)
    run = _product(x) if inspect is None else inspect
    # copies: an ``inspect`` that writes to its arguments harms nobody
    reference = run([xp.copy(w) for w in weights])
    require_finite(reference, "the output on the original weights")
    peak = max(float(xp.max(xp.abs(w))) for w in weights)
    found = _candidates(x, weights, scheme, duo, ratios)
    losses = []
    for _, s in found:
        loss = math.inf
        if _representable(peak, s):
            loss = _mean_square(reference, run([fake_quantize(w * s, scheme) / s for w in weights]))
        losses.append(loss)
    best = losses.index(min(losses))
    return AWQScale(
        found[best][1], found[best][0], tuple(losses), tuple(ratio for ratio, _ in found)
    )


def channel_magnitude(x: Array) -> Array:
    """a_j = mean over tokens of |x_j|, in float64: x[T, N] → [N]."""
    xp = namespace(x)
    return xp.mean(xp.abs(x), axis=0, dtype=xp.float64)


def search_clip(x: Array, weight: Array, scheme: Scheme, *, max_tokens: int = 512) -> Array:
    """Search how far each row's groups may be clipped: x[T, N], W[M, N] → limits m[M, N/g].

    For each group, m = (1 − i/20)·max|w|, i = 0 … 9, that makes Σ_t (x_t · (Q(clip(w, ±m))
    − w))² least, the sum over about ``max_tokens`` tokens (every ⌊T/max_tokens⌋-th, all if
    there are fewer); a tie keeps the wider range.

    With X = QR for the group's columns, ‖X d‖ = ‖R d‖: R has g rows at most, however many
    tokens there are.
    """
    xp = namespace(x, weight)
    _check_inputs(x, [weight])
    rows, columns = weight.shape
    groups = _groups(scheme, weight)
    features = x[:: max(1, x.shape[0] // max_tokens), :]
    # [N/g, T, g]
    features = xp.swapaxes(
        xp.reshape(features, (features.shape[0], groups, columns // groups)), 0, 1
    )
    factor = xp.swapaxes(xp.linalg.qr(features, mode="r"), 1, 2)  # [N/g, g, min(T, g)]
    step = max(1, _PIECE // columns)
    limits = [_search_piece(weight[i : i + step, :], factor, scheme) for i in range(0, rows, step)]
    return xp.concat(limits, axis=0)


def clip(weight: Array, limits: Array) -> Array:
    """W[M, N] with each group held within ±m[M, N/g]; groups with m = max|w| come back bit
    for bit.
    """
    xp = namespace(weight, limits)
    grouped = xp.reshape(weight, (*limits.shape, -1))
    bound = limits[..., None]
    return xp.reshape(xp.clip(grouped, -bound, bound), weight.shape)


# --- the scale ----------------------------------------------------------------------------


def _candidates(
    x: Array, weights: Sequence[Array], scheme: Scheme, duo: bool, ratios: Sequence[float] | None
) -> list[tuple[float, Array]]:
    """(ratio, s[N] in x's dtype), round to nearest first."""
    xp = namespace(x)
    a = channel_magnitude(x)
    pairs = [(0.0, xp.ones_like(a))]
    if duo:
        w = _weight_magnitude(weights, scheme)
        grid = [i / (GRID - 2) for i in range(GRID - 1)] if ratios is None else ratios
        pairs += [(r, _normalised(a**r / (w ** (1.0 - r) + FLOOR))) for r in grid]
    else:
        grid = [i / GRID for i in range(1, GRID)] if ratios is None else ratios
        pairs += [(r, _normalised(a**r)) for r in grid if r != 0]
    return [(r, xp.astype(s, x.dtype)) for r, s in pairs]


def _normalised(s: Array) -> Array:
    """Clamp from below, then sqrt(max s · min s) = 1, so that a typical weight keeps its
    size.
    """
    xp = namespace(s)
    s = xp.maximum(s, FLOOR)
    # the two roots apart: of equal entries s / (√s · √s) the result is 1 up to rounding,
    # and no product overflows
    return s / (xp.sqrt(xp.max(s)) * xp.sqrt(xp.min(s)))


def _weight_magnitude(weights: Sequence[Array], scheme: Scheme) -> Array:
    """Mean over all rows of |w| / (largest of its group + 1e-6): [M_i, N] → [N] in float64,
    each within [0, 1].
    """
    xp = namespace(*weights)
    total = xp.zeros(weights[0].shape[1], dtype=xp.float64)
    rows = 0
    for w in weights:
        grouped = xp.abs(xp.reshape(w, (w.shape[0], _groups(scheme, w), -1)))
        share = xp.reshape(grouped / (xp.max(grouped, axis=-1, keepdims=True) + 1e-6), w.shape)
        total += xp.sum(share, axis=0, dtype=xp.float64)
        rows += int(w.shape[0])
    return total / rows


def _product(x: Array) -> Inspect:
    """The default module: the products with x, side by side."""
    xp = namespace(x)
    return lambda weights: xp.concat([x @ w.T for w in weights], axis=1)


def _mean_square(reference: Array, output: Array) -> float:
    """mean (reference − output)², in float64; infinite where that is not a number."""
    xp = namespace(reference, output)
    difference = xp.astype(reference - output, xp.float64)
    loss = float(xp.mean(difference * difference))
    return loss if math.isfinite(loss) else math.inf


def _representable(peak: float, s: Array) -> bool:
    """Whether W·s and a rounding error of that size divided by s stay far inside the
    dtype's range.
    """
    xp = namespace(s)
    return peak * float(xp.max(s)) / float(xp.min(s)) <= float(xp.finfo(s.dtype).max) / 16


# --- the clip limits ----------------------------------------------------------------------


def _search_piece(weight: Array, factor: Array, scheme: Scheme) -> Array:
    """Limits of some rows: W[m, N], Rᵀ[N/g, g, r] → [m, N/g]."""
    xp = namespace(weight, factor)
    groups, group = factor.shape[:2]
    peak = xp.max(xp.abs(xp.reshape(weight, (-1, groups, group))), axis=-1)
    best = peak
    least = xp.full_like(peak, math.inf)
    for i in range(CLIP_STEPS):
        limit = peak * (1.0 - i / CLIP_GRID)
        delta = fake_quantize(clip(weight, limit), scheme) - weight
        moved = xp.swapaxes(xp.reshape(delta, (-1, groups, group)), 0, 1) @ factor  # [N/g, m, r]
        error = xp.sum(moved * moved, axis=-1).T
        better = error < least  # strict: of equal errors the wider range stays
        best = xp.where(better, limit, best)
        least = xp.where(better, error, least)
    return best


def _groups(scheme: Scheme, weight: Array) -> int:
    """N/g: how many ranges a row of W[M, N] has; ValueError for a scheme whose ranges are
    not parts of rows.
    """
    if scheme.granularity not in ("channel", "group"):
        raise ValueError(
            f"AWQ's clip search and duo scaling go by channel or group, not by {scheme.granularity!r}"
        )
    return int(scheme.scale_shape(tuple(weight.shape))[1])


def _check_inputs(x: Array, weights: Sequence[Array]) -> None:
    if hasattr(weights, "ndim"):
        raise ValueError(
            f"AWQ takes a list of the weights that share x, got one array of {type(weights).__name__}: write [weight]"
        )
    if x.ndim != 2 or x.shape[0] == 0 or not weights:
        raise ValueError(
            f"AWQ needs inputs x[T, N] of at least one token, and weights; got x {tuple(x.shape)}"
        )
    for i, w in enumerate(weights):
        if w.ndim != 2 or w.shape[1] != x.shape[1]:
            raise ValueError(
                f"weights[{i}] of shape {tuple(w.shape)} does not take inputs of shape {tuple(x.shape)}"
            )
        if w.dtype.kind != "f" or x.dtype.kind != "f":
            raise ValueError(
                f"AWQ scales floating-point numbers, got x of {x.dtype} and weights[{i}] of {w.dtype}"
            )
        require_finite(w, f"weights[{i}]")
    require_finite(x, "x")
