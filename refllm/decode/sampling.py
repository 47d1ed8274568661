"""From logits to the next token: temperature, top-k, top-p, min-p, penalties, and sampling
by inverse CDF.

Sources: top-k, Fan et al. 2018; top-p (nucleus), Holtzman et al. 2020, §3.1; min-p, Nguyen
et al. 2024; the repetition penalty, Keskar et al. 2019 (CTRL), §4.1.

The order is: penalties → temperature → top-k → top-p → min-p → renormalise. transformers
has the same order. vLLM applies min-p before top-k and top-p; since min-p compares with the
largest probability, only the mass that top-p takes its share of differs, and vLLM never
keeps more tokens than this file does.

Every filter keeps a prefix of the tokens ranked by probability, so the three together are
one number a row: **how many tokens stay**. Ties are ranked by token id, lowest first, so
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

Probabilities are float64 whatever the logits are: they are compared, summed and inverted
from here on. All but the penalties wait for the device once, to refuse what is not a
number.

Left out: typical, eta, top-h, mirostat, DRY and XTC sampling; beam search.
"""

from __future__ import annotations

import math

from refllm.backend import Array, namespace, to_numpy
from refllm.decode.sampling_params import (
    Parameter,
    SamplingParams,
    ValidatedParams,
    column,
    validate_params,
)

_FAR = 700.0  # exp(-700) is nothing beside 1: `margin` looks no farther


def process_logits(
    logits: Array,
    temperature: Parameter = 1.0,
    top_k: Parameter = 0,
    top_p: Parameter = 1.0,
    min_p: Parameter = 0.0,
) -> Array:
    """The distribution that the next token is drawn from: logits[..., V] → float64
    probabilities[..., V].

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

    Each is a number, or a list of B numbers for logits[B, V]: a batch of requests with
    their own settings.

    Raises
    ------
    ValueError
        for a parameter outside its range, and for a row with NaN, with +inf, or with every
        token masked.
    """
    xp = namespace(logits)
    params = validate_params(logits, temperature, top_k, top_p, min_p)
    weights = _weights(logits, params.temperature)
    if params.filtering:
        ranked = _ranked(weights)
        weights = xp.where(_largest(weights, ranked, _count(ranked, params)), weights, 0.0)
    return weights / xp.sum(weights, axis=-1, keepdims=True)


def distribution(logits: Array, params: SamplingParams) -> Array:
    """``process_logits`` with the parameters of one request: logits[..., V] → float64[..., V]."""
    return process_logits(
        logits, params.temperature, params.top_k, params.top_p, params.min_p
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


def apply_repetition_penalty(logits: Array, seen: Array, penalty: Parameter) -> Array:
    """Make tokens that were seen less likely (``penalty`` above 1); logits[..., V], in
    their own dtype.

    ``seen`` is a boolean mask of the logits' shape: prompt and output, as transformers and
    vLLM count. A seen token pays once, however often it came. The paper divides every seen
    logit by θ, which *raises* a negative one; as its successors do, negative logits are
    multiplied instead. This is not invariant to a shift of the logits: what counts as zero
    is an accident of training.

    ValueError if a penalty is not a finite number above 0.
    """
    xp = namespace(logits, seen)
    theta = column("repetition_penalty", penalty, logits)
    return xp.where(seen, xp.where(logits > 0, logits / theta, logits * theta), logits)


def apply_count_penalties(
    logits: Array, counts: Array, presence: Parameter = 0.0, frequency: Parameter = 0.0
) -> Array:
    """z - frequency · count - presence · [count > 0], the two penalties of OpenAI's
    interface; [..., V].

    ``counts`` holds how often each token came in the *output* (the prompt does not count),
    integers of the logits' shape. Unlike the repetition penalty these do not care where
    zero is.

    ValueError if a penalty is not finite.
    """
    xp = namespace(logits, counts)
    alpha = column("presence", presence, logits)
    beta = column("frequency", frequency, logits)
    return (
        logits
        - beta * xp.astype(counts, logits.dtype)
        - alpha * xp.astype(counts > 0, logits.dtype)
    )


def best(logits: Array) -> list[int]:
    """logits[R, V] → the argmax of each row, on the host; −1 where there is no largest one:
    NaN, +inf or only −inf.
    """
    xp = namespace(logits)
    ids = xp.argmax(logits, axis=-1)  # calls a NaN the largest
    sound = xp.isfinite(logits[xp.arange(logits.shape[0]), ids])
    found: list[int] = to_numpy(xp.where(sound, ids, -1)).tolist()  # one copy for both
    return found


def sample(probabilities: Array, uniforms: Array | float) -> Array:
    """Draw one token a row by inverse CDF: probabilities[..., V], uniforms[...] → ids
    int64[...].

    Token t is drawn for u in [F(t-1), F(t)) / F(V-1), F the cumulative sum in the order of
    token ids, so its share of the uniforms is its probability. A token of probability zero
    is never drawn, at u = 0 as at the largest float below 1 and however the sum rounds.
    Rows are divided by their sum. The uniforms are drawn on the host, by
    ``rng.random(shape)``, so that every backend sees the same ones.

    ValueError for a uniform outside [0, 1), a negative or non-finite probability, or a row
    of zeros.
    """
    xp = namespace(probabilities)
    p = xp.asarray(probabilities, dtype=xp.float64)
    u = xp.asarray(uniforms, dtype=xp.float64)
    if u.shape != p.shape[:-1]:
        raise ValueError(
            f"sample: probabilities {p.shape} need uniforms {p.shape[:-1]}, got {u.shape}"
        )
    # Zero where p is zero: a parallel sum rounds each entry its own way, so a dead token
    # could stand out by an ulp. After this, only live tokens exceed u · total ≥ 0, and the
    # largest entry always does.
    cdf = xp.where(p > 0, xp.cumulative_sum(p, axis=-1), 0.0)
    total = xp.max(cdf, axis=-1)
    # 1e-300: u · total < total for every u < 1 holds in float64 as long as total is a
    # normal number
    sound = (xp.min(p, axis=-1) >= 0) & (total > 1e-300) & xp.isfinite(total) & (u >= 0) & (u < 1)
    if not bool(xp.all(sound)):
        row = int(to_numpy(sound).reshape(-1).argmin())
        raise ValueError(
            f"sample: row {row} (of the flattened rows) needs probabilities that are finite, not negative and "
            "not all zero, and a uniform within [0, 1)"
        )
    # the first that exceeds
    return xp.argmax(xp.astype(cdf > (u * total)[..., None], xp.int8), axis=-1)


def margin(
    logits: Array,
    uniforms: Array | float,
    temperature: Parameter = 1.0,
    top_k: Parameter = 0,
    top_p: Parameter = 1.0,
    min_p: Parameter = 0.0,
) -> Array:
    """How far every logit may move, each its own way, before ``sample(process_logits(...), u)`` can
    change; [...].

    In the unit of the logits. Two backends whose logits differ by less than this draw the
    same token. At temperature 0 it is half the gap between the two largest logits, and the
    uniform does not matter.

    If no logit moves by more than δ, a ratio of weights, or of sums of weights, moves by at
    most the factor exp(±2δ/τ). Three kinds of ratio decide, and the nearest to its
    threshold sets the margin: the last token that stays against the first that does not;
    the odds of each prefix against the odds of ``top_p`` (and each weight against
    ``min_p``); the odds of each edge of the CDF against those of u.
    """
    xp = namespace(logits)
    params = validate_params(logits, temperature, top_k, top_p, min_p)
    weights = _weights(logits, params.temperature)
    ranked = _ranked(weights)
    count = _count(ranked, params)
    V = ranked.shape[-1]
    last_in = xp.take_along_axis(ranked, count - 1, axis=-1)
    first_out = xp.take_along_axis(ranked, xp.minimum(count, V - 1), axis=-1)
    kept = xp.where(_largest(weights, ranked, count), weights, 0.0)
    slack = _log_gap(last_in, xp.where(count < V, first_out, 0.0))
    for gaps in (
        _log_gap(ranked, params.min_p * ranked[..., :1]),
        _odds_gap(_first(ranked, params.top_k), params.top_p),
        _odds_gap(kept, xp.asarray(uniforms, dtype=xp.float64)[..., None]),
    ):
        slack = xp.minimum(slack, xp.min(gaps, axis=-1, keepdims=True))
    return (0.5 * params.temperature * slack)[..., 0]


def _peak(z: Array) -> Array:
    """The largest logit of each row, [..., 1]: finite in every row that can be sampled, and
    only there.

    NaN and +inf are passed on by ``max``, and -inf comes out where all are masked: one look
    finds all three.
    """
    xp = namespace(z)
    peak = xp.max(z, axis=-1, keepdims=True)
    if bool(xp.all(xp.isfinite(peak))):
        return peak
    for row, logits in enumerate(to_numpy(z).reshape(-1, z.shape[-1])):
        for kind, bad in (("NaN", logits != logits), ("+inf", logits == math.inf)):
            if bad.any():
                raise ValueError(
                    f"logits: token {int(bad.argmax())} of row {row} (of the flattened rows) is {kind}"
                )
        if logits.max() == -math.inf:
            raise ValueError(
                f"logits: every token of row {row} (of the flattened rows) is masked (-inf)"
            )
    raise AssertionError(
        "a row whose largest logit is not finite has NaN, +inf, or nothing but -inf"
    )


def _weights(logits: Array, temperature: Array) -> Array:
    """w = exp((z - max z) / τ), float64[..., V]; the largest is exactly 1, a masked one
    exactly 0.
    """
    xp = namespace(logits)
    z = xp.asarray(logits, dtype=xp.float64)
    return xp.exp((z - _peak(z)) / temperature)


def _ranked(weights: Array) -> Array:
    """The weights, largest first. Values only: the order of equal ones is settled in
    ``_largest``.
    """
    xp = namespace(weights)
    return xp.flip(xp.sort(weights, axis=-1), axis=-1)


def _first(ranked: Array, k: Array) -> Array:
    """The first k weights, and zeros after them; [..., V]."""
    xp = namespace(ranked)
    return xp.where(xp.arange(ranked.shape[-1]) < k, ranked, 0.0)


def _count(ranked: Array, params: ValidatedParams) -> Array:
    """n, how many tokens stay: the smallest of what the three filters allow, int64[..., 1],
    at least 1.
    """
    xp = namespace(ranked)
    # of each prefix; the last is what top-k left
    mass = xp.cumulative_sum(_first(ranked, params.top_k), axis=-1)
    # the prefixes that fall short, and one more
    reaching = 1 + _count_true(mass < params.top_p * mass[..., -1:])
    # the largest weight is 1, so min_p is its own threshold
    likely = _count_true(ranked >= params.min_p)
    return xp.minimum(xp.minimum(reaching, likely), params.top_k)


def _largest(weights: Array, ranked: Array, count: Array) -> Array:
    """Mask of the ``count`` largest weights of each row, of equal ones the lowest ids;
    bool[..., V].
    """
    xp = namespace(weights)
    cut = xp.take_along_axis(ranked, count - 1, axis=-1)  # the smallest weight that stays
    above = weights > cut
    at_cut = weights == cut
    room = count - _count_true(above)
    return above | (at_cut & (xp.cumulative_sum(xp.astype(at_cut, xp.int64), axis=-1) <= room))


def _count_true(mask: Array) -> Array:
    xp = namespace(mask)
    return xp.sum(xp.astype(mask, xp.int64), axis=-1, keepdims=True)


def _log_gap(a: Array, b: Array) -> Array:
    """
    |log(a / b)|, at most 700; 700 too where either is not above 0: no ratio of two weights to compare.
    """
    xp = namespace(a, b)
    both = (a > 0) & (b > 0)
    gap = xp.abs(xp.log(xp.where(both, a, 1.0)) - xp.log(xp.where(both, b, 1.0)))
    return xp.where(both, xp.minimum(gap, _FAR), _FAR)


def _odds_gap(weights: Array, share: Array) -> Array:
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
