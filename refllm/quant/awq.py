"""AWQ: enlarge the input channels that carry large activations before rounding, and clip rare
large weights.

Source: Lin et al. 2023 (arXiv:2306.00978), §3 and its authors' code (llm-awq); ``duo`` as
in AutoAWQ, on the grid of llm-compressor. A product does not change if column j of W is
multiplied by s_j and x_j divided by it,

    x Wᵀ = (x/s) (W·s)ᵀ ≈ (x/s) Q(W·s)ᵀ,   where   |Q(W·s)/s − W|_j ≤ Δ'/(2 s_j),

but the rounding error of column j shrinks by s_j as long as the quantisation scale Δ' of its
group does not grow. That holds if a few channels are enlarged; it cannot hold for all. So s
is searched on a grid of 20 candidates, by the error of the output. The magnitude of the
weights plays no part (unless ``duo``): what matters is how large the inputs are.

| symbol | name                                                         | shape     |
|--------|--------------------------------------------------------------|-----------|
| x      | captured inputs of the weights                               | [T, N]    |
| W      | weights that read the same x (q, k and v; gate and up)       | [M, N]    |
| a      | mean over tokens of abs(x_j)                                 | [N]       |
| s      | AWQ scale, a^r clamped and normalised to √(max s · min s) = 1| [N]       |
| r      | ratio, i/20 for i = 0 … 19; r = 0 is round to nearest        |           |
| Q      | round trip through the scheme                                | [M, N]    |
| m      | clip limit of each row and group, ≥ 0.55 of its largest      | [M, N/g]  |

Nothing is changed in place: a candidate is a new array that is passed to ``inspect``, so
there is nothing to restore.

Left out: where s is folded (see ``awq_model``), the byte layouts, activations in fewer
bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.formats.quantized_linear import fake_quantize
from refllm.formats.uniform import Scheme, require_finite

__all__ = ["AWQScale", "channel_magnitude", "clip", "search_clip", "search_scale"]

# candidate weights → output of the module that is measured
Inspect = Callable[[list[Array]], Array]

GRID = 20  # candidates of the scale search; the first is round to nearest in every mode
FLOOR = 1e-4  # least a^r: a channel that is always zero must not get a scale of 0
CLIP_GRID = 20  # limits 1, 0.95, …, 0.55 of a group's largest weight
CLIP_STEPS = 10
_PIECE = 1 << 20  # weights per piece of the clip search  # mutate: equivalent (speed alone)


@dataclass(frozen=True, eq=False)
class AWQScale:
    """The best scale found, and the loss of every candidate."""

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
    """Search the scale of the N input channels that ``weights`` [M_i, N] share, on inputs x[T, N].

    ``inspect(weights) -> output`` runs the module whose output the loss is measured on (the
    whole attention, the whole MLP) with these weights in place of its own; the default is
    the product itself. ``duo`` also divides by the weights' magnitude. ``ratios`` replaces
    the grid; ratio 0 without ``duo``, which is round to nearest, always comes first. Of
    equal losses the earlier candidate wins; a candidate whose loss is not finite never wins.

    Raises
    ------
    ValueError
        if x or a weight is not finite or the shapes disagree. Errors of ``inspect`` are not
        caught.

    >>> import numpy as np
    >>> x = np.array([[0.1, 10.0]])  # the second channel carries the activations
    >>> w = np.array([[1.0, 0.45]])  # without a scale 0.45 is rounded to 0
    >>> found = search_scale(x, [w], Scheme(2, "restricted", "channel"), ratios=[0, 0.25, 0.5])
    >>> found.ratio, [round(loss, 2) for loss in found.losses]
    (0.25, [20.25, 0.0, 0.01])
    """
    xp = namespace(x, *weights)
    _check_inputs(x, weights)
    run = _product(x) if inspect is None else inspect
    # copies: an ``inspect`` that writes to its arguments does no harm
    reference = run([xp.copy(w) for w in weights])
    require_finite(reference, "the output on the original weights")
    peak = max(float(xp.max(xp.abs(w))) for w in weights)
    candidates = _candidates(x, weights, scheme, duo, ratios)
    losses = []
    for _, s in candidates:
        loss = math.inf
        if _representable(peak, s):
            rounded = [fake_quantize(w * s, scheme) / s for w in weights]  # Q(W·s)/s, [M_i, N]
            loss = _mean_square(reference, run(rounded))
        losses.append(loss)
    ratio, scale = candidates[losses.index(min(losses))]
    return AWQScale(scale, ratio, tuple(losses), tuple(r for r, _ in candidates))


def channel_magnitude(x: Array) -> Array:
    """a_j = mean over tokens of |x_j|, in float64: x[T, N] → [N].

    >>> import numpy as np
    >>> channel_magnitude(np.array([[1.0, -2.0], [-3.0, 0.0]])).tolist()
    [2.0, 1.0]
    """
    xp = namespace(x)
    return xp.mean(xp.abs(x), axis=0, dtype=xp.float64)


def search_clip(x: Array, weight: Array, scheme: Scheme, *, max_tokens: int = 512) -> Array:
    """Search the best clip limit of each group: x[T, N], W[M, N] → limits m[M, N/g].

    For each group the limit m = (1 − i/20)·max|w|, i = 0 … 9, with the least
    Σ_t (x_t · (Q(clip(w, ±m)) − w))². The sum runs over about ``max_tokens`` tokens (every
    ⌊T/max_tokens⌋-th, or all if there are fewer); a tie keeps the wider range.

    With X = QR for the group's columns, ‖X d‖ = ‖R d‖: R has at most g rows, however many
    tokens there are.
    """
    xp = namespace(x, weight)
    _check_inputs(x, [weight])
    rows, columns = weight.shape
    groups = _groups(scheme, weight)
    features = x[:: max(1, x.shape[0] // max_tokens), :]
    features = xp.reshape(features, (features.shape[0], groups, columns // groups))
    features = xp.swapaxes(features, 0, 1)  # [N/g, T, g]
    factor = xp.swapaxes(xp.linalg.qr(features, mode="r"), 1, 2)  # [N/g, g, min(T, g)]
    piece = max(1, _PIECE // columns)
    limits = [
        _search_piece(weight[i : i + piece, :], factor, scheme) for i in range(0, rows, piece)
    ]
    return xp.concat(limits, axis=0)


def clip(weight: Array, limits: Array) -> Array:
    """W[M, N] with each group clipped to ±m[M, N/g]; groups with m = max|w| are unchanged bit
    for bit.

    >>> import numpy as np
    >>> clip(np.array([[1.0, -4.0, 0.5, 2.0]]), np.array([[3.0, 2.0]])).tolist()
    [[1.0, -3.0, 0.5, 2.0]]
    """
    xp = namespace(weight, limits)
    grouped = xp.reshape(weight, (*limits.shape, -1))  # [M, N/g, g]
    bound = limits[..., None]
    return xp.reshape(xp.clip(grouped, -bound, bound), weight.shape)


# --- the scale ----------------------------------------------------------------------------


def _candidates(
    x: Array, weights: Sequence[Array], scheme: Scheme, duo: bool, ratios: Sequence[float] | None
) -> list[tuple[float, Array]]:
    """(ratio, s[N] in x's dtype), round to nearest first."""
    xp = namespace(x)
    a = channel_magnitude(x)  # [N]
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
    """Clamp from below, then normalise to √(max s · min s) = 1, so that a typical weight keeps
    its magnitude.
    """
    xp = namespace(s)
    s = xp.maximum(s, FLOOR)
    # two roots instead of one of the product: no product overflows, and equal entries s give
    # s / (√s · √s), 1 up to rounding
    return s / (xp.sqrt(xp.max(s)) * xp.sqrt(xp.min(s)))


def _weight_magnitude(weights: Sequence[Array], scheme: Scheme) -> Array:
    """Mean over all rows of |w| / (largest of its group + 1e-6): [M_i, N] → [N] in float64,
    each within [0, 1].
    """
    xp = namespace(*weights)
    total = xp.zeros(weights[0].shape[1], dtype=xp.float64)
    rows = 0
    for w in weights:
        grouped = xp.abs(xp.reshape(w, (w.shape[0], _groups(scheme, w), -1)))  # [M, N/g, g]
        share = xp.reshape(grouped / (xp.max(grouped, axis=-1, keepdims=True) + 1e-6), w.shape)
        total += xp.sum(share, axis=0, dtype=xp.float64)
        rows += int(w.shape[0])
    return total / rows


def _product(x: Array) -> Inspect:
    """The default module: the products with x, side by side."""
    xp = namespace(x)
    return lambda weights: xp.concat([x @ w.T for w in weights], axis=1)


def _mean_square(reference: Array, output: Array) -> float:
    """mean (reference − output)² in float64; infinity if the sum is not finite."""
    xp = namespace(reference, output)
    difference = xp.astype(reference - output, xp.float64)
    largest = float(xp.max(xp.abs(difference)))
    # a product of Python's floats: NumPy's would warn of the overflow
    if not math.isfinite(largest * largest * difference.size):
        return math.inf
    return float(xp.mean(difference * difference))


def _representable(peak: float, s: Array) -> bool:
    """Whether W·s, and a rounding error of that magnitude divided by s, stay far inside the
    range of the dtype.
    """
    xp = namespace(s)
    return peak * float(xp.max(s)) / float(xp.min(s)) <= float(xp.finfo(s.dtype).max) / 16


# --- the clip limits ----------------------------------------------------------------------


def _search_piece(weight: Array, factor: Array, scheme: Scheme) -> Array:
    """Clip limits of some rows: W[m, N], Rᵀ[N/g, g, r] → [m, N/g]."""
    xp = namespace(weight, factor)
    groups, group = factor.shape[:2]
    peak = xp.max(xp.abs(xp.reshape(weight, (-1, groups, group))), axis=-1)  # [m, N/g]
    best = peak
    least = xp.full_like(peak, math.inf)
    for i in range(CLIP_STEPS):
        limit = peak * (1.0 - i / CLIP_GRID)
        delta = fake_quantize(clip(weight, limit), scheme) - weight  # Q(clip(w)) − w, [m, N]
        moved = xp.swapaxes(xp.reshape(delta, (-1, groups, group)), 0, 1) @ factor  # [N/g, m, r]
        error = xp.sum(moved * moved, axis=-1).T  # ‖R δ‖², [m, N/g]
        better = error < least  # [m, N/g]; strict: of equal errors the wider range stays
        best = xp.where(better, limit, best)
        least = xp.where(better, error, least)
    return best


def _groups(scheme: Scheme, weight: Array) -> int:
    """N/g: the number of ranges in a row of W[M, N]; ValueError for a scheme whose ranges are
    not parts of rows.
    """
    if scheme.granularity not in ("channel", "group"):
        raise InputError(
            "AWQ's clip search and duo scaling go by channel or group, not by "
            f"{scheme.granularity!r}"
        )
    return int(scheme.scale_shape(tuple(weight.shape))[1])


def _check_inputs(x: Array, weights: Sequence[Array]) -> None:
    """ValueError unless x[T, N] and the weights [M_i, N] are finite floats that fit."""
    if hasattr(weights, "ndim"):
        raise InputError(
            "AWQ takes a list of the weights that share x, got one array of "
            f"{type(weights).__name__}: write [weight]"
        )
    if x.ndim != 2 or x.shape[0] == 0 or not weights:
        raise InputError(
            f"AWQ needs inputs x[T, N] of at least one token, and weights; got x {tuple(x.shape)}"
        )
    for i, w in enumerate(weights):
        if w.ndim != 2 or w.shape[1] != x.shape[1]:
            raise InputError(
                f"weights[{i}] of shape {tuple(w.shape)} does not take inputs of shape "
                f"{tuple(x.shape)}"
            )
        if w.dtype.kind != "f" or x.dtype.kind != "f":
            raise InputError(
                f"AWQ scales floating-point weights, got x of {x.dtype} and weights[{i}] of "
                f"{w.dtype}"
            )
        require_finite(w, f"weights[{i}]")
    require_finite(x, "x")
