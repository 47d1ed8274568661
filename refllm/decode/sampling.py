"""From logits to the next token: temperature, top-k, top-p, min-p, and sampling by inverse CDF.

Sources: top-k, Fan et al. 2018; top-p (nucleus), Holtzman et al. 2020, §3.1; min-p, Nguyen
et al. 2024.

The order is: penalties (``decode.penalties``) → temperature → top-k → top-p → min-p →
renormalise. transformers has the same order. vLLM applies min-p before top-k and top-p.
Since min-p compares with the largest probability, this changes only the mass of which top-p
keeps a share, and vLLM never keeps more tokens than this file does.

Every filter keeps a prefix of the tokens ranked by probability, so the three together are
one integer per row: **how many tokens stay**. Ties are ranked by token id, lowest first, so
exactly that many stay:

- top-k keeps exactly k tokens. transformers and vLLM keep every token that equals the k-th
  largest; here the count is what was asked for, and no library's way of sorting equal
  values can change the set.
- top-p keeps the smallest prefix whose mass reaches ``top_p``, so at least one token, and
  the one that crosses. transformers and vLLM define the same set, but leave ties at the cut
  to the sort.
- min-p keeps what is at least ``min_p`` times the largest probability, equality included.
- temperature 0 is one token: the argmax, of equal logits the lowest id. It is the limit of
  temperature → 0 where the largest logit is unique; where it is not, that limit would share
  the mass.

| symbol | name                                   | shape        |
|--------|----------------------------------------|--------------|
| z      | logits; -inf masks a token             | [..., V]     |
| τ      | temperature                            | 1 or [B, 1]  |
| w      | weights exp((z - max z) / τ), so max 1 | [..., V]     |
| s      | w ranked, largest first                | [..., V]     |
| n      | tokens that stay                       | [..., 1]     |
| u      | uniforms in [0, 1), drawn on the host  | [...]        |

Probabilities are float64 whatever the logits are, since they are compared, summed and
inverted from here on. Each function waits for the device once, to reject NaN and +inf.

Left out: typical, eta, top-h, mirostat, DRY and XTC sampling; beam search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from refllm.backend import NUMPY, Array, namespace, to_numpy
from refllm.decode.sampling_params import (
    Parameter,
    SamplingParams,
    ValidatedParams,
    validate_params,
)
from refllm.errors import InputError

EMPTY = 1e-300  # weights of a smaller sum count as none: a uniform cannot scale them
# Tokens per block of a long row: a cumulative sum over 10⁵ values takes as long as six sums.
STRIDE = 1024


def process_logits(
    logits: Array,
    temperature: Parameter = 1.0,
    top_k: Parameter = 0,
    top_p: Parameter = 1.0,
    min_p: Parameter = 0.0,
) -> Array:
    """The distribution that the next token is drawn from: logits[..., V] → float64
    probabilities[..., V].

    Without a filter it is softmax(z / τ). Each parameter is one value, or a list of B
    values for logits[B, V]: a batch of requests with their own settings.

    Parameters
    ----------
    temperature
        τ ≥ 0; 0 is the one-hot argmax by definition, whatever the other parameters say.
    top_k
        keep the k most probable tokens; 0 is off.
    top_p
        within (0, 1]: keep the fewest tokens whose mass, of what top-k left, reaches
        ``top_p``; 1 is off.
    min_p
        within [0, 1]: keep tokens of at least ``min_p`` times the largest probability; 0 is
        off.

    Raises
    ------
    ValueError
        for a parameter outside its range, and for a row with NaN, with +inf, or with every
        token masked.

    Examples
    --------
    >>> import numpy as np
    >>> z = np.log([0.5, 0.3, 0.1, 0.1])
    >>> process_logits(z, top_k=2).round(3).tolist()
    [0.625, 0.375, 0.0, 0.0]
    >>> process_logits(z, top_p=0.85).round(3).tolist()  # of two equal ones the first stays
    [0.556, 0.333, 0.111, 0.0]
    >>> process_logits(z, temperature=0).tolist()
    [1.0, 0.0, 0.0, 0.0]
    """
    xp = namespace(logits)
    params = validate_params(logits, temperature, top_k, top_p, min_p)
    weights = softmax_weights(logits, params.temperature)  # [..., V]
    if params.filtering:
        ranked = rank(weights)
        stays = largest(weights, ranked, support_size(ranked, params))
        weights = xp.where(stays, weights, 0.0)
    return weights / xp.sum(weights, axis=-1, keepdims=True)


def distribution(logits: Array, params: SamplingParams | Sequence[SamplingParams]) -> Array:
    """``process_logits`` with the parameters of one request, or with those of each row:
    logits[..., V] or [B, V] → float64 of the same shape.
    """
    if isinstance(params, SamplingParams):
        return process_logits(logits, params.temperature, params.top_k, params.top_p, params.min_p)
    return process_logits(
        logits,
        [one.temperature for one in params],
        [one.top_k for one in params],
        [one.top_p for one in params],
        [one.min_p for one in params],
    )


def log_probabilities(logits: Array) -> Array:
    """log softmax: z - max z - log Σ exp(z - max z); logits[..., V] → float64[..., V], -inf
    where masked.

    ValueError for a row with NaN, with +inf, or with every token masked.
    """
    xp = namespace(logits)
    z = xp.asarray(logits, dtype=xp.float64)
    shifted = z - _peak(z)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def sample(probabilities: Array, uniforms: Array | float) -> Array:
    """Draw one token per row by inverse CDF: probabilities[..., V], uniforms[...] → ids int64[...].

    Token t is drawn for u in [F(t-1), F(t)) / F(V-1), F the cumulative sum in the order of
    token ids, so its share of the uniforms is its probability. A token of probability zero
    is never drawn, at u = 0 as at the largest float below 1 and however the sum rounds.
    Rows are divided by their sum. The uniforms are drawn on the host, by
    ``rng.random(shape)``, so that every backend sees the same ones.

    ValueError for a uniform outside [0, 1), a negative or non-finite probability, or a row
    of zeros.

    >>> import numpy as np
    >>> p = np.array([0.25, 0.0, 0.75])
    >>> sample(np.stack([p, p]), np.array([0.2, 0.3])).tolist()
    [0, 2]
    """
    xp = namespace(probabilities)
    p = xp.asarray(probabilities, dtype=xp.float64)
    u = xp.asarray(uniforms, dtype=xp.float64)
    if u.shape != p.shape[:-1]:
        raise InputError(
            f"sample: probabilities {p.shape} need uniforms {p.shape[:-1]}, got {u.shape}"
        )
    # Zero where p is zero: a parallel sum rounds each entry its own way, so a dead token
    # could stand out by an ulp. After this, only live tokens exceed u · total ≥ 0, and the
    # largest entry always does.
    cdf = xp.where(p > 0, xp.cumulative_sum(p, axis=-1), 0.0)  # [..., V]
    total = xp.max(cdf, axis=-1)  # [...]
    # 1e-300: u · total < total for every u < 1 holds in float64 as long as total is a
    # normal number.
    sound = (xp.min(p, axis=-1) >= 0) & (total > 1e-300) & xp.isfinite(total) & (u >= 0) & (u < 1)
    if not bool(xp.all(sound)):
        row = int(to_numpy(sound).reshape(-1).argmin())
        raise InputError(
            f"sample: row {row} (of the flattened rows) needs probabilities that are finite, "
            "not negative and not all zero, and a uniform within [0, 1)"
        )
    # the first entry that exceeds u · total
    return xp.argmax(xp.astype(cdf > (u * total)[..., None], xp.int8), axis=-1)


def draw(weights: Array, uniform: float, otherwise: Array | None = None) -> int:
    """One token by inverse CDF, as ``sample`` draws it, of weights[V] ≥ 0 of any sum; of
    ``otherwise`` if that sum is 0.

    On the host a sum from left to right never falls, so the first edge above u · total
    belongs to a token of weight above 0; a parallel sum may round otherwise, and ``sample``
    handles that.
    """
    xp = namespace(weights)
    if xp is not NUMPY:
        if otherwise is not None and not float(xp.sum(weights)) > EMPTY:
            weights = otherwise
        return int(sample(weights, uniform))
    edges = _edges(weights)
    if not edges[-1] > EMPTY:
        if otherwise is None:
            raise InputError("draw: every token has weight 0")
        weights = otherwise
        edges = _edges(otherwise)
    goal = uniform * edges[-1]
    at = int(xp.searchsorted(edges, goal, side="right"))
    if edges.shape[0] == weights.shape[0]:
        return at
    # The same once more within the block. Where rounding puts the goal behind the block's
    # end, the last token of the block with a weight above 0 is drawn.
    inner = xp.cumulative_sum(weights[at * STRIDE : (at + 1) * STRIDE], dtype=xp.float64)
    if at > 0:
        goal -= edges[at - 1]
    found = xp.searchsorted(inner, goal, side="right")
    last = xp.searchsorted(inner, inner[-1], side="left")
    return at * STRIDE + int(min(found, last))


def _edges(weights: Array) -> Array:
    """Cumulative sums in float64: of each token, or in a long row of each block of
    ``STRIDE`` tokens.
    """
    xp = namespace(weights)
    n = weights.shape[0]
    if n < 16 * STRIDE:
        return xp.cumulative_sum(weights, dtype=xp.float64)
    whole = n - n % STRIDE
    blocks = xp.sum(weights[:whole].reshape(-1, STRIDE), axis=1, dtype=xp.float64)
    if n > whole:
        rest = xp.sum(weights[whole:], keepdims=True, dtype=xp.float64)
        blocks = xp.concat([blocks, rest])
    return xp.cumulative_sum(blocks)


def _peak(z: Array) -> Array:
    """The largest logit of each row, [..., 1]; ValueError where it is not finite.

    NaN and +inf are passed on by ``max``, and -inf comes out where all tokens are masked:
    one check finds all three.
    """
    xp = namespace(z)
    peak = xp.max(z, axis=-1, keepdims=True)
    if bool(xp.all(xp.isfinite(peak))):
        return peak
    for row, logits in enumerate(to_numpy(z).reshape(-1, z.shape[-1])):
        for kind, bad in (("NaN", logits != logits), ("+inf", logits == math.inf)):
            if bad.any():
                raise InputError(
                    f"logits: token {int(bad.argmax())} of row {row} (of the flattened rows) "
                    f"is {kind}"
                )
        if logits.max() == -math.inf:
            raise InputError(
                f"logits: every token of row {row} (of the flattened rows) is masked (-inf)"
            )
    raise AssertionError(
        "a row whose largest logit is not finite has NaN, +inf, or nothing but -inf"
    )


def softmax_weights(logits: Array, temperature: Array | float) -> Array:
    """w = exp((z - max z) / τ), float64[..., V]: the largest is exactly 1, a masked one
    exactly 0.
    """
    xp = namespace(logits)
    z = xp.asarray(logits, dtype=xp.float64)
    return xp.exp((z - _peak(z)) / temperature)


def rank(weights: Array) -> Array:
    """The weights, largest first. Values only: ``largest`` settles the order of equal ones."""
    xp = namespace(weights)
    return xp.flip(xp.sort(weights, axis=-1), axis=-1)


def first_k(ranked: Array, k: Array | float) -> Array:
    """The first k weights, and zeros after them; [..., V]."""
    xp = namespace(ranked)
    return xp.where(xp.arange(ranked.shape[-1]) < k, ranked, 0.0)


def support_size(ranked: Array, params: ValidatedParams) -> Array:
    """n, how many tokens stay: the smallest count that the three filters allow,
    int64[..., 1], at least 1.
    """
    xp = namespace(ranked)
    # mass of each prefix; the last one is what top-k left
    mass = xp.cumulative_sum(first_k(ranked, params.top_k), axis=-1)
    # the prefixes that fall short, and one more
    reaching = 1 + _count_true(mass < params.top_p * mass[..., -1:])
    # the largest weight is 1, so min_p is its own threshold
    likely = _count_true(ranked >= params.min_p)
    return xp.minimum(xp.minimum(reaching, likely), params.top_k)


def largest(weights: Array, ranked: Array, count: Array) -> Array:
    """Mask of the ``count`` largest weights of each row, of equal ones the lowest ids;
    bool[..., V].
    """
    xp = namespace(weights)
    # Equal weights at the cut are counted in the order of token ids, so the sort's order of
    # equal values does not matter.
    cut = xp.take_along_axis(ranked, count - 1, axis=-1)  # the smallest weight that stays
    above = weights > cut
    at_cut = weights == cut
    ties_kept = count - _count_true(above)
    rank_at_cut = xp.cumulative_sum(xp.astype(at_cut, xp.int64), axis=-1)
    return above | (at_cut & (rank_at_cut <= ties_kept))


def _count_true(mask: Array) -> Array:
    """How many entries of each row are True, int64[..., 1]."""
    xp = namespace(mask)
    return xp.sum(xp.astype(mask, xp.int64), axis=-1, keepdims=True)
