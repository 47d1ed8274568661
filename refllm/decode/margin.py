"""How far the logits of a row may move before its sampled token changes.

Two backends round differently, so their logits differ slightly. ``margin`` bounds from
below the change that a draw with a fixed uniform survives: where two backends' logits
differ by less, they must draw the same token, and a test may demand it.

If no logit moves by more than δ, a ratio of weights, or of sums of weights, moves by at
most the factor exp(±2δ/τ). Three kinds of ratio decide which token is drawn, and the one
nearest to its threshold sets the margin:

- the last token that stays against the first that does not;
- the odds of each prefix against the odds of ``top_p``, and each weight against ``min_p``;
- the odds of each edge of the CDF against those of u.

Left out: penalties (they act before, on the logits).
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.decode.sampling import first_k, largest, rank, softmax_weights, support_size
from refllm.decode.sampling_params import Parameter, validate_params

_FAR = 700.0  # exp(-700) is negligible beside 1: `margin` looks no farther


def margin(
    logits: Array,
    uniforms: Array | float,
    temperature: Parameter = 1.0,
    top_k: Parameter = 0,
    top_p: Parameter = 1.0,
    min_p: Parameter = 0.0,
) -> Array:
    """How far every logit may move, each in its own direction, before
    ``sample(process_logits(...), u)`` can change; logits[..., V], uniforms[...] → [...].

    In the unit of the logits. At temperature 0 it is half the gap between the two largest
    logits, and the uniform does not matter.

    >>> import numpy as np
    >>> round(float(margin(np.array([1.0, 3.0, 2.5]), 0.5, temperature=0)), 6)
    0.25
    """
    xp = namespace(logits)
    params = validate_params(logits, temperature, top_k, top_p, min_p)
    weights = softmax_weights(logits, params.temperature)  # [..., V]
    ranked = rank(weights)
    count = support_size(ranked, params)  # [..., 1]
    V = ranked.shape[-1]
    last_in = xp.take_along_axis(ranked, count - 1, axis=-1)
    first_out = xp.take_along_axis(ranked, xp.minimum(count, V - 1), axis=-1)
    kept = xp.where(largest(weights, ranked, count), weights, 0.0)
    # the smallest log-ratio to a threshold, in units of 2δ/τ
    slack = _log_gap(last_in, xp.where(count < V, first_out, 0.0))
    for gaps in (
        _log_gap(ranked, params.min_p * ranked[..., :1]),
        _odds_gap(first_k(ranked, params.top_k), params.top_p),
        _odds_gap(kept, xp.asarray(uniforms, dtype=xp.float64)[..., None]),
    ):
        slack = xp.minimum(slack, xp.min(gaps, axis=-1, keepdims=True))
    return (0.5 * params.temperature * slack)[..., 0]


def _log_gap(a: Array, b: Array) -> Array:
    """|log(a / b)|, at most 700; 700 too where a or b is not above 0, as there is no ratio
    to compare.
    """
    xp = namespace(a, b)
    both = (a > 0) & (b > 0)
    gap = xp.abs(xp.log(xp.where(both, a, 1.0)) - xp.log(xp.where(both, b, 1.0)))
    return xp.where(both, xp.minimum(gap, _FAR), _FAR)


def _odds_gap(weights: Array, share: Array | float) -> Array:
    """How far the odds of each prefix of ``weights`` lie from those of ``share``, as |log|;
    [..., V].

    The weights after a prefix are summed by themselves: total - before would lose them
    beside a large one.
    """
    xp = namespace(weights)
    before = xp.cumulative_sum(weights, axis=-1)
    onward = xp.flip(xp.cumulative_sum(xp.flip(weights, axis=-1), axis=-1), axis=-1)
    after = xp.concat([onward[..., 1:], xp.zeros_like(onward[..., :1])], axis=-1)
    return _log_gap(before * (1 - share), after * share)
