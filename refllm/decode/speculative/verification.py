"""Speculative decoding's acceptance rules: accept or reject drafted tokens so that the
output distribution stays the target's.

Sources: token-wise, Leviathan et al. 2023, algorithm 1, and Chen et al. 2023, algorithm 2
(the same rule); block verification, Sun et al. 2024, algorithm 2; typical acceptance, Cai
et al. 2024 (Medusa), section 2.3.1.

| symbol | name                                                                | shape      |
|--------|---------------------------------------------------------------------|------------|
| γ      | number of drafted tokens                                            | len(draft) |
| p      | target: row i is the distribution at the position of draft i; the   | [γ+1, V]   |
|        | last row is that of the bonus token after all drafts                |            |
| q      | draft: row i is the distribution that draft i was *really* sampled  | [γ, V]     |
|        | from                                                                |            |
| x      | the drafted tokens                                                  | [γ]        |
| a      | how many are accepted; then one more token is emitted: a + 1 in all | 0..γ       |

Both are distributions after every logits processor (penalties on the prefix *with* the
drafts before row i, temperature, top-k, top-p): p is what plain decoding would sample from,
q what the drafter did sample from, and their processors need not be the same. ``q = None``
says that the drafts were not sampled at all (n-gram, argmax): row i is one-hot at x_i.

An acceptance rule is right if the accepted prefix of x and the token after it, continued by
p, are distributed as p; the tests check this by enumerating all outcomes. The uniforms come
from ``rng``: a caller with uniforms of its own passes any object whose ``random()`` returns
them.

Left out: verification on the device without waiting for it (here one transfer decides, one
fetches the token).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from refllm.backend import Array, namespace, to_numpy
from refllm.decode.sampling import EMPTY, draw
from refllm.errors import InputError

# How far the sum of a row may be from 1: the rounding of a float32 softmax over 10⁵ tokens,
# with a margin.
TOLERANCE = 1e-5


def verify(
    p: Array, q: Array | None, draft: Sequence[int] | Array, rng: np.random.Generator
) -> tuple[int, int]:
    """Token-wise rule: accept x_i with probability min(1, p_i(x_i) / q_i(x_i)) until the
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

    Examples
    --------
    Where p = q every draft is accepted, and the bonus token comes from the last row of p.

    >>> p = np.array([[0.5, 0.5], [0.0, 1.0]])
    >>> verify(p, p[:1], [0], np.random.default_rng(0))
    (1, 1)
    """
    accepted = 0
    for target, drafted in _draft_probabilities(p, q, draft, rng):
        # a new uniform for each draft: a shared one would correlate them
        if not rng.random() < target / drafted:
            break
        accepted += 1
    return accepted, _next_token(p, q, draft, accepted, 1.0, rng)


def verify_block(
    p: Array, q: Array | None, draft: Sequence[int] | Array, rng: np.random.Generator
) -> tuple[int, int]:
    """Block rule: verify prefixes jointly, from the longest down; the same arguments and
    result as ``verify``.

    P_i = min(1, P_{i−1} p_i(x_i) / q_i(x_i)): a lucky token pays for an unlucky one later.
    A prefix of i < γ tokens is kept with probability h_i = S_i / (S_i + 1 − P_i), where
    S_i = Σ max(P_i p_{i+1} − q_{i+1}, 0); all γ with h_γ = P_γ. The longest that is kept
    counts, and the token comes from the residual of P_i p_{i+1}. It accepts at least as many
    as ``verify`` in expectation, whatever p and q are.
    """
    probabilities = _draft_probabilities(p, q, draft, rng)
    reach = [1.0]  # P_0 … P_γ
    for target, drafted in probabilities:
        reach.append(min(1.0, reach[-1] * target / drafted))
    accepted = 0
    for i in range(len(probabilities), 0, -1):  # the longest prefix first
        keep = reach[i]  # h_γ
        if i < len(probabilities):
            surplus = float(namespace(p).sum(_surplus(p, q, draft, i, reach[i])))  # S_i
            total = surplus + 1.0 - reach[i]
            # total = 0 where p = q: then the longer prefix was kept for certain
            keep = surplus / total if total > 0 else 1.0
        if rng.random() < keep:
            accepted = i
            break
    return accepted, _next_token(p, q, draft, accepted, reach[accepted], rng)


def verify_greedy(best: Sequence[int] | Array, draft: Sequence[int] | Array) -> tuple[int, int]:
    """Temperature 0: best[γ+1], the target's argmax at each position → (accepted, token),
    as plain greedy decoding emits them.

    The token-wise rule for one-hot p, where nothing is random and no distribution is
    needed.

    >>> verify_greedy(best=[7, 8, 9], draft=[7, 5])
    (1, 8)
    """
    targets = _token_ids(best)
    drafts = _token_ids(draft)
    if len(targets) != len(drafts) + 1:
        raise InputError(f"{len(drafts)} drafts need {len(drafts) + 1} targets, got {len(targets)}")
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

    It asks whether a draft is plausible, not how often it should occur, so likely tokens
    occur too often.
    """
    xp = namespace(p)
    accepted = 0
    for i, (target, _) in enumerate(_draft_probabilities(p, None, draft, rng)):
        row = p[i, ...]  # [V]
        entropy = -float(xp.sum(row * xp.log(xp.where(row > 0, row, xp.ones_like(row)))))
        if not target > min(epsilon, delta * math.exp(-entropy)):
            break
        accepted += 1
    return accepted, draw(p[accepted, ...], rng.random())


def residual(p: Array, q: Array, scale: float = 1.0) -> Array:
    """max(scale · p − q, 0), not normalised; p[V], q[V] → [V]. Its sum is 1 − Σ min(p, q)
    for scale 1.

    The guard: where nothing is left (p = q) the result is p. A draft is then rejected only
    through rounding, and p is the limit of the residuals' distributions.

    >>> residual(np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])).tolist()
    [0.25, 0.0, 0.0]
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
    left = p[i, ...]
    if q is not None:
        if scale != 1.0:
            left = left * scale
        left = left - q[i, ...]
        return xp.maximum(left, xp.zeros_like(left[:1]))
    left = left * scale  # a new array, also for scale 1
    left[_token_ids(draft)[i]] = 0.0
    return left


def _next_token(
    p: Array,
    q: Array | None,
    draft: Sequence[int] | Array,
    accepted: int,
    scale: float,
    rng: np.random.Generator,
) -> int:
    """The token after the accepted drafts: from the residual, or the bonus after all of them."""
    if accepted == p.shape[0] - 1:
        return draw(p[accepted, ...], rng.random())
    return draw(_surplus(p, q, draft, accepted, scale), rng.random(), otherwise=p[accepted, ...])


def _draft_probabilities(
    p: Array, q: Array | None, draft: Sequence[int] | Array, rng: np.random.Generator
) -> list[tuple[float, float]]:
    """(p_i(x_i), q_i(x_i)) for each draft as Python floats, after everything was checked;
    one transfer in all.
    """
    if not hasattr(rng, "random"):
        raise TypeError(f"rng is a generator, numpy.random.default_rng(seed), got {rng!r}")
    xp = namespace(p, q)
    x = _token_ids(draft)
    count = len(x)
    _check_shapes(p, q, x)
    at = xp.arange(count), xp.asarray(x, dtype=xp.int64)
    # everything that is checked or compared on the host, in one transfer
    facts = [xp.sum(p, axis=-1), xp.min(p, axis=-1), p[at]]  # [γ+1], [γ+1], [γ]
    if q is not None:
        facts += [xp.sum(q, axis=-1), xp.min(q, axis=-1), q[at]]  # [γ] each
    host: list[float] = to_numpy(xp.concat(facts)).tolist()
    end = 3 * count + 2
    _check_sums("p", host[: count + 1], host[count + 1 : 2 * count + 2])
    targets = host[2 * count + 2 : end]
    if q is None:
        return [(a, 1.0) for a in targets]
    _check_sums("q", host[end : end + count], host[end + count : end + 2 * count])
    drafted = host[end + 2 * count :]
    if drafted and min(drafted) <= 0:
        i = drafted.index(min(drafted))
        raise InputError(
            f"draft {i} is token {x[i]}, to which q gives probability 0: it was not sampled "
            "from this q"
        )
    return list(zip(targets, drafted, strict=True))


def _check_shapes(p: Array, q: Array | None, drafts: Sequence[int]) -> None:
    """ValueError if p or q does not fit the drafts, or a draft lies outside the vocabulary."""
    count = len(drafts)
    vocab = p.shape[-1] if p.ndim else 0
    if p.shape != (count + 1, vocab) or vocab == 0:
        raise InputError(f"{count} drafts need p of shape ({count + 1}, V), got {tuple(p.shape)}")
    if q is not None and q.shape != (count, vocab):
        raise InputError(
            f"{count} drafts and p{tuple(p.shape)} need q of shape ({count}, {vocab}), "
            f"got {tuple(q.shape)}"
        )
    wrong = next((i for i, t in enumerate(drafts) if not 0 <= t < vocab), None)
    if wrong is not None:
        raise InputError(
            f"draft {wrong} is token {drafts[wrong]}, outside the vocabulary of {vocab}"
        )


def check_rows(name: str, rows: Array) -> None:
    """ValueError if a row of rows[..., V] is no distribution."""
    xp = namespace(rows)
    facts = to_numpy(xp.concat([xp.sum(rows, axis=-1), xp.min(rows, axis=-1)])).tolist()
    _check_sums(name, facts[: rows.shape[0]], facts[rows.shape[0] :])


def _check_sums(name: str, sums: Sequence[float], smallest: Sequence[float]) -> None:
    """ValueError if a row is no distribution; NaN fails both comparisons."""
    for i, (total, low) in enumerate(zip(sums, smallest, strict=True)):
        if not low >= 0:
            kind = "negative" if low < 0 else "NaN"
            raise InputError(f"row {i} of {name} has a probability that is {kind}: {low}")
        if not abs(total - 1.0) <= TOLERANCE:
            raise InputError(
                f"row {i} of {name} sums to {total}, not to 1 within {TOLERANCE}: "
                "normalise it first"
            )


def _token_ids(ids: Sequence[int] | Array) -> list[int]:
    """Token ids as a list of Python ints; ValueError for other values."""
    if not hasattr(ids, "shape"):
        values = list(ids)
        if not all(isinstance(t, (int, np.integer)) and not isinstance(t, bool) for t in values):
            raise InputError(f"drafts are token ids, got {values}")
        return [int(t) for t in values]
    host = to_numpy(ids)
    if host.ndim != 1 or host.dtype.kind not in "iu":
        raise InputError(
            f"drafts are a 1-D array of token ids, got {host.dtype} of shape {host.shape}"
        )
    found: list[int] = host.tolist()
    return found
