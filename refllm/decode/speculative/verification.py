"""Speculative decoding: the laws that accept or reject drafted tokens, and leave the
target's distribution as it is.

Sources: token-wise, Leviathan et al. 2023, algorithm 1, and Chen et al. 2023, algorithm 2
(the same rule); block verification, Sun et al. 2024, algorithm 2; typical acceptance, Cai
et al. 2024 (Medusa), section 2.3.1.

| symbol | name                                                                             | shape     |
|--------|----------------------------------------------------------------------------------|-----------|
| γ      | drafted tokens                                                                   | len(draft)|
| p      | target: row i is the distribution of the token in the place of draft i; the last |           |
|        | row is that of the bonus token after all drafts                                  | [γ+1, V]  |
| q      | draft: row i is the distribution that draft i was *really* sampled from          | [γ, V]    |
| x      | the drafted tokens                                                               | [γ]       |
| a      | how many are accepted; then one more token is emitted: a + 1 in all              | 0..γ      |

Both are distributions after every warp (penalties on the prefix *with* the drafts before
row i, temperature, top-k, top-p): p is what plain decoding would sample from, q what the
drafter did sample from, and they need not be warped alike. ``q = None`` says that the
drafts were not sampled at all (n-gram, argmax): row i is one-hot at x_i.

A law is right if a prefix of x and the token after it, continued by p, have the law of p:
proved by enumeration.

Left out: verification on the device without waiting for it (here one transfer decides, one
fetches the token).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from refllm.backend import Array, namespace, to_numpy
from refllm.decode.sampling import sample
from refllm.decode.speculative.acceptance import (
    acceptance_stats,
    best_gamma,
    expected_length,
    speedup,
)

__all__ = [
    "acceptance_stats", "best_gamma", "expected_length", "residual", "speedup", "verify", "verify_block",
    "verify_greedy", "verify_typical",
]  # fmt: skip

EMPTY = 1e-300  # a residual of less weight is none: what is below cannot be scaled by a uniform
# tokens a block of a long row: a cumulative sum over 10⁵ takes as long as six plain ones
STRIDE = 1024
# of Σ = 1 in each row: what a softmax in float32 over 10⁵ tokens keeps with room to spare
TOLERANCE = 1e-5


def verify(
    p: Array, q: Array | None, draft: Sequence[int] | Array, rng: np.random.Generator
) -> tuple[int, int]:
    """Token-wise law: accept x_i with probability min(1, p_i(x_i) / q_i(x_i)) until the
    first rejection.

    p[γ+1, V], q[γ, V], draft[γ] → (accepted, token). After a rejection at i the token comes
    from the residual norm(max(p_i − q_i, 0)), after γ acceptances it is the bonus from
    p_{γ+1}. P(accept) = Σ min(p, q) = 1 − TV.

    Raises
    ------
    ValueError
        for shapes that do not fit, rows that are no distributions (Σ within 1e-5 of 1), ids
        outside the vocabulary, and a draft that q gave no probability: then it was not
        sampled from q, and nothing here would be exact.
    """
    accepted = 0
    chances = _chances(p, q, draft, rng)
    for target, drafted in chances:
        # a uniform of its own for each: one for all correlates them
        if not rng.random() < target / drafted:
            break
        accepted += 1
    return accepted, _follow(p, q, draft, accepted, 1.0, rng)


def verify_block(
    p: Array, q: Array | None, draft: Sequence[int] | Array, rng: np.random.Generator
) -> tuple[int, int]:
    """Block law: judge prefixes jointly, from the longest down; the same arguments and
    result as ``verify``.

    P_i = min(1, P_{i−1} p_i(x_i) / q_i(x_i)): a lucky token pays for an unlucky one later.
    A prefix of i < γ tokens is kept with probability h_i = S_i / (S_i + 1 − P_i), S_i = Σ
    max(P_i p_{i+1} − q_{i+1}, 0); all γ with h_γ = P_γ. The longest that is kept counts,
    and the token comes from the residual of P_i p_{i+1}. It accepts at least as many as
    ``verify`` in expectation, whatever p and q are.
    """
    chances = _chances(p, q, draft, rng)
    reach = [1.0]
    for target, drafted in chances:
        reach.append(min(1.0, reach[-1] * target / drafted))
    accepted = 0
    for i in range(len(chances), 0, -1):
        keep = reach[i]
        if i < len(chances):
            surplus = float(namespace(p).sum(_surplus(p, q, draft, i, reach[i])))
            missing = surplus + 1.0 - reach[i]
            # p = q: the longer prefix was kept for certain
            keep = surplus / missing if missing > 0 else 1.0
        if rng.random() < keep:
            accepted = i
            break
    return accepted, _follow(p, q, draft, accepted, reach[accepted], rng)


def verify_greedy(best: Sequence[int] | Array, draft: Sequence[int] | Array) -> tuple[int, int]:
    """Temperature 0: best[γ+1], the target's argmax in each place → (accepted, token), as
    plain greedy emits them.

    The token-wise law for one-hot p, where nothing is random and no distribution is needed.
    """
    targets = _host(best)
    drafts = _host(draft)
    if len(targets) != len(drafts) + 1:
        raise ValueError(f"{len(drafts)} drafts need {len(drafts) + 1} targets, got {len(targets)}")
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == targets[accepted]:
        accepted += 1
    return accepted, targets[accepted]


def verify_typical(
    p: Array,
    draft: Sequence[int] | Array,
    rng: np.random.Generator,
    epsilon: float = 0.09,
    delta: float = 0.3,
) -> tuple[int, int]:
    """Medusa's typical acceptance: x_i stays if p_i(x_i) > min(ε, δ e^{−H(p_i)}).
    **Lossy**: the control of the tests.

    It asks whether a draft is plausible, not how often it should occur: likely tokens come
    too often.
    """
    xp = namespace(p)
    accepted = 0
    for i, (target, _) in enumerate(_chances(p, None, draft, rng)):
        row = p[i, ...]
        entropy = -float(xp.sum(row * xp.log(xp.where(row > 0, row, xp.ones_like(row)))))
        if not target > min(epsilon, delta * math.exp(-entropy)):
            break
        accepted += 1
    return accepted, draw(p[accepted, ...], rng.random())


def residual(p: Array, q: Array, scale: float = 1.0) -> Array:
    """max(scale · p − q, 0), not normalised; p[V], q[V] → [V]. Its sum is 1 − Σ min(p, q)
    for scale 1.

    The guard: where nothing is left (p = q) the answer is p. A draft is then never rejected
    but for rounding, and p is the limit's law.
    """
    xp = namespace(p, q)
    left = p * scale if scale != 1.0 else p
    left = xp.maximum(left - q, xp.zeros_like(left))
    return left if float(xp.sum(left)) > EMPTY else p


def _surplus(
    p: Array, q: Array | None, draft: Sequence[int] | Array, i: int, scale: float
) -> Array:
    """max(scale · p_{i+1} − q_{i+1}, 0), a new [V], without the guard; for a one-hot q all
    of p but the draft.
    """
    xp = namespace(p)
    if q is not None:
        left = (p[i, ...] * scale if scale != 1.0 else p[i, ...]) - q[i, ...]
        return xp.maximum(left, xp.zeros_like(left[:1]))
    left = p[i, ...] * scale
    left[_host(draft)[i]] = 0.0
    return left


def _follow(
    p: Array,
    q: Array | None,
    draft: Sequence[int] | Array,
    accepted: int,
    scale: float,
    rng: np.random.Generator,
) -> int:
    """The token after the accepted drafts: from what the drafts left over, or the bonus
    after all of them.
    """
    if accepted == p.shape[0] - 1:
        return draw(p[accepted, ...], rng.random())
    return draw(_surplus(p, q, draft, accepted, scale), rng.random(), otherwise=p[accepted, ...])


def draw(weights: Array, uniform: float, otherwise: Array | None = None) -> int:
    """A token by inverse CDF, as ``sampling.sample`` draws it: weights[V] ≥ 0 of any sum;
    of ``otherwise`` if it is 0.

    On the host a sum from left to right never falls, so the first edge above u · total
    belongs to a token of weight above 0; a parallel sum may round otherwise, and ``sample``
    sees to that.
    """
    xp = namespace(weights)
    if xp is not np:
        empty = otherwise is not None and not float(xp.sum(weights)) > EMPTY
        return int(sample(otherwise if empty else weights, uniform))
    edges = _edges(weights)
    if not edges[-1] > EMPTY:
        if otherwise is None:
            raise ValueError("draw: every token has weight 0")
        weights = otherwise
        edges = _edges(otherwise)
    goal = uniform * edges[-1]
    at = int(xp.searchsorted(edges, goal, side="right"))
    if edges.shape[0] == weights.shape[0]:
        return at
    # the same once more within the block; where rounding puts the goal behind its end, the
    # block's last live token
    inner = xp.cumulative_sum(weights[at * STRIDE : (at + 1) * STRIDE], dtype=xp.float64)
    goal -= edges[at - 1] if at else 0.0
    inside = min(
        xp.searchsorted(inner, goal, side="right"), xp.searchsorted(inner, inner[-1], side="left")
    )
    return at * STRIDE + int(inside)


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
    rest = xp.sum(weights[whole:], keepdims=True, dtype=xp.float64)
    return xp.cumulative_sum(xp.concat([blocks, rest]) if n > whole else blocks)


def _chances(
    p: Array, q: Array | None, draft: Sequence[int] | Array, rng: np.random.Generator
) -> list[tuple[float, float]]:
    """(p_i(x_i), q_i(x_i)) for each draft as Python floats, after everything was checked;
    one transfer in all.
    """
    if not hasattr(rng, "random"):
        raise TypeError(f"rng is a generator, numpy.random.default_rng(seed), got {rng!r}")
    xp = namespace(p, q)
    x = _host(draft)
    count = len(x)
    vocab = p.shape[-1] if p.ndim else 0
    if p.shape != (count + 1, vocab) or vocab == 0:
        raise ValueError(f"{count} drafts need p of shape ({count + 1}, V), got {tuple(p.shape)}")
    if q is not None and q.shape != (count, vocab):
        raise ValueError(
            f"{count} drafts and p{tuple(p.shape)} need q of shape ({count}, {vocab}), got {tuple(q.shape)}"
        )
    wrong = next((i for i, t in enumerate(x) if not 0 <= t < vocab), None)
    if wrong is not None:
        raise ValueError(f"draft {wrong} is token {x[wrong]}, outside the vocabulary of {vocab}")
    at = xp.arange(count), xp.asarray(x, dtype=xp.int64)
    facts = [xp.sum(p, axis=-1), xp.min(p, axis=-1), p[at]]
    if q is not None:
        facts += [xp.sum(q, axis=-1), xp.min(q, axis=-1), q[at]]
    told: list[float] = to_numpy(xp.concat(facts)).tolist()
    end = 3 * count + 2
    _check_rows("p", told[: count + 1], told[count + 1 : 2 * count + 2])
    targets = told[2 * count + 2 : end]
    if q is None:
        return [(a, 1.0) for a in targets]
    _check_rows("q", told[end : end + count], told[end + count : end + 2 * count])
    drafted = told[end + 2 * count :]
    if drafted and min(drafted) <= 0:
        i = drafted.index(min(drafted))
        raise ValueError(
            f"draft {i} is token {x[i]}, to which q gives probability 0: it was not sampled from this q"
        )
    return list(zip(targets, drafted, strict=True))


def check_rows(name: str, rows: Array) -> None:
    """ValueError if a row of rows[..., V] is no distribution."""
    xp = namespace(rows)
    facts = to_numpy(xp.concat([xp.sum(rows, axis=-1), xp.min(rows, axis=-1)])).tolist()
    _check_rows(name, facts[: rows.shape[0]], facts[rows.shape[0] :])


def _check_rows(name: str, sums: Sequence[float], least: Sequence[float]) -> None:
    """ValueError if a row is no distribution; NaN fails both comparisons."""
    for i, (total, low) in enumerate(zip(sums, least, strict=True)):
        if not low >= 0:
            raise ValueError(
                f"row {i} of {name} has a probability that is {'negative' if low < 0 else 'NaN'}: {low}"
            )
        if not abs(total - 1.0) <= TOLERANCE:
            raise ValueError(
                f"row {i} of {name} sums to {total}, not to 1 within {TOLERANCE}: normalise it first"
            )


def _host(ids: Sequence[int] | Array) -> list[int]:
    """Token ids as a list of Python ints; ValueError for what are none."""
    if not hasattr(ids, "shape"):
        values = list(ids)
        if not all(isinstance(t, (int, np.integer)) and not isinstance(t, bool) for t in values):
            raise ValueError(f"drafts are token ids, got {values}")
        return [int(t) for t in values]
    host = to_numpy(ids)
    if host.ndim != 1 or host.dtype.kind not in "iu":
        raise ValueError(
            f"drafts are a 1-D array of token ids, got {host.dtype} of shape {host.shape}"
        )
    found: list[int] = host.tolist()
    return found
