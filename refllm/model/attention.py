"""Causal grouped-query attention in three ways: naive, online softmax (flash), and merged
from partitions.

Sources: Vaswani et al. 2017, eq. 1; grouped-query attention, Ainslie et al. 2023; online
softmax, Milakov & Gimelshein 2018, algorithm 3; FlashAttention-2, Dao 2023, algorithm 1 (one
division, at the end); merging by log-sum-exp, FlashInfer, Ye et al. 2025, §2.2.

| symbol | name                                         | shape     |
|--------|----------------------------------------------|-----------|
| q      | queries of T new tokens                      | [T, H, D] |
| k, v   | keys and values of S tokens, new ones included | [S, G, D] |
| o      | output                                       | [T, H, D] |
| lse    | log Σ exp of a query's scores (natural log)  | [T, H]    |
| m, l   | running maximum and sum of the online form   | [G, R·T]  |
| R      | query heads per key/value head               | H/G       |

Query t stands at position ``start + t`` and sees key j (at position ``first_key + j``)
where ``position − window < j's position ≤ position``. A query that sees no key gives o = 0
and lse = −∞, the identity of ``merge``.

Left out: padding (batches are ragged), dropout, soft-capping, attention sinks.
"""

from __future__ import annotations

import math
from typing import Protocol

from refllm.backend import Array, DType, Namespace, namespace
from refllm.errors import InputError

# a masked score: finite, so that NaN cannot arise from −∞ − (−∞); see ``masked_score``
NEGATIVE = -1e30


class Attend(Protocol):
    """The interface between the network and its KV cache: store the new keys and values,
    return what the queries read.

    ``attend(layer, q[T, H, D], k[T, G, D], v[T, G, D]) -> [T, H, D]``. The callee may
    overwrite the arguments, which are valid until it returns: it must copy what it keeps,
    because a captured step reuses their memory. The result is valid until the next call.
    """

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """q[T, H, D], k[T, G, D], v[T, G, D] → [T, H, D]."""
        ...


def attention(
    q: Array, k: Array, v: Array, *, start: int, window: int | None = None, first_key: int = 0
) -> tuple[Array, Array]:
    """The naive form: softmax(q kᵀ / √D) v with all scores at once; returns o[T, H, D] and
    lse[T, H].

    >>> import numpy as np
    >>> q, k = np.zeros((2, 1, 1)), np.zeros((2, 1, 1))  # equal scores: the mean of the past
    >>> o, lse = attention(q, k, np.array([4.0, 8.0]).reshape(2, 1, 1), start=0)
    >>> o.ravel().tolist()
    [4.0, 6.0]
    """
    xp = namespace(q, k, v)
    count = q.shape[0]
    groups = k.shape[1]
    grouped = _group_queries(q, groups)  # [G, R·T, D], scaled by 1/√D
    if k.shape[0] == 0:
        return xp.zeros_like(q), xp.full(q.shape[:2], -math.inf, dtype=q.dtype)
    scores = grouped @ _keys_last(k)  # [G, R·T, S]
    bias = causal_bias(xp, count, k.shape[0], start - first_key, window, q.dtype)
    if bias is not None:
        rows = xp.reshape(scores, (groups, -1, count, k.shape[0]))  # [G, R, T, S], a view
        rows += bias
    lowest = masked_score(xp, q.dtype)
    # no −∞ − (−∞) where all scores are −∞
    top = xp.maximum(xp.max(scores, axis=-1, keepdims=True), lowest)  # [G, R·T, 1]
    scores -= top
    p = xp.exp(scores)
    # ≥ 1 where a key is seen: the maximum contributes exp(0)
    total = xp.sum(p, axis=-1, keepdims=True)  # [G, R·T, 1]
    blind = top <= 0.5 * lowest  # sees no key; false for NaN, which must show in the output
    safe = xp.where(blind, xp.ones_like(total), total)
    o = xp.where(blind, xp.zeros_like(grouped), (p @ _heads_first(v)) / safe)  # [G, R·T, D]
    lse = xp.where(blind, xp.full_like(top, -math.inf), top + xp.log(safe))
    return _ungroup(o, count), _ungroup(lse, count)[..., 0]  # [T, H, D], [T, H]


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    start: int,
    window: int | None = None,
    first_key: int = 0,
    tile_q: int = 128,
    tile_k: int = 512,
) -> tuple[Array, Array]:
    """``attention`` in tiles: never more than tile_q × tile_k scores per head at a time.

    For each tile of keys, with its scores s::

        m' = max(m, max s)
        l' = l·e^(m−m') + Σ e^(s−m')
        o' = o·e^(m−m') + Σ e^(s−m') v

    Tiles that the causal mask or the window hides completely are skipped, which halves the
    work of a prefill.
    """
    xp = namespace(q, k, v)
    outputs = []
    sums = []
    for t in range(0, q.shape[0], tile_q):
        queries = q[t : min(t + tile_q, q.shape[0]), ...]  # [tile, H, D]
        first = start + t  # positions of this tile: first to last
        last = start + t + queries.shape[0] - 1
        low = 0  # the tile's queries see keys within [low, high)
        if window is not None:
            low = max(0, first - window + 1 - first_key)
        high = min(k.shape[0], last + 1 - first_key)
        o, lse = _flash_rows(
            queries, k, v, range(low, max(low, high), tile_k), high, first, window, first_key
        )
        outputs.append(o)
        sums.append(lse)
    if not outputs:
        return xp.zeros_like(q), xp.zeros(q.shape[:2], dtype=q.dtype)
    return xp.concat(outputs, axis=0), xp.concat(sums, axis=0)  # [T, H, D], [T, H]


def _flash_rows(
    queries: Array,
    k: Array,
    v: Array,
    tiles: range,
    high: int,
    first: int,
    window: int | None,
    first_key: int,
) -> tuple[Array, Array]:
    """One tile of queries over its tiles of keys [low, high): the loop of
    FlashAttention-2's algorithm 1.
    """
    xp = namespace(queries)
    count = queries.shape[0]
    groups = k.shape[1]
    grouped = _group_queries(queries, groups)  # [G, R·T, D]
    lowest = masked_score(xp, queries.dtype)
    m = xp.full((*grouped.shape[:2], 1), lowest, dtype=queries.dtype)  # [G, R·T, 1]
    l = xp.zeros_like(m)  # noqa: E741 (the paper's symbol)
    o = xp.zeros_like(grouped)
    for s in tiles:
        keys = slice(s, min(s + tiles.step, high))
        scores = grouped @ _keys_last(k[keys, ...])  # [G, R·T, tile]
        bias = causal_bias(
            xp, count, scores.shape[-1], first - first_key - s, window, queries.dtype
        )
        if bias is not None:
            rows = xp.reshape(scores, (groups, -1, count, scores.shape[-1]))
            rows += bias
        new_m = xp.maximum(m, xp.max(scores, axis=-1, keepdims=True))
        scores -= new_m
        p = xp.exp(scores)
        shrink = xp.exp(m - new_m)  # rescales what was summed under the old maximum
        l = l * shrink + xp.sum(p, axis=-1, keepdims=True)  # noqa: E741
        o = o * shrink + p @ _heads_first(v[keys, ...])  # [G, R·T, D]
        m = new_m
    # a completely masked row has m = lowest and a meaningless sum; a NaN must show
    blind = m <= 0.5 * lowest
    safe = xp.where(blind, xp.ones_like(l), l)
    o = xp.where(blind, xp.zeros_like(o), o / safe)
    lse = xp.where(blind, xp.full_like(m, -math.inf), m + xp.log(safe))
    return _ungroup(o, count), _ungroup(lse, count)[..., 0]


def merge(o_a: Array, lse_a: Array, o_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Merge attention over two disjoint sets of keys: o[T, H, D], lse[T, H] each → the same
    of their union.

    lse = log(e^a + e^b), o = e^(a−lse) o_a + e^(b−lse) o_b. Commutative, associative up to
    rounding, with identity (0, −∞).

    >>> import numpy as np
    >>> one, equal = np.ones((1, 1, 1)), np.zeros((1, 1))  # equal masses: the mean
    >>> merge(2 * one, equal, 4 * one, equal)[0].item()
    3.0
    """
    xp = namespace(o_a, lse_a, o_b, lse_b)
    top = xp.maximum(lse_a, lse_b)
    anchor = xp.where(top == -math.inf, xp.zeros_like(top), top)  # both empty: avoid −∞ − (−∞)
    a = xp.exp(lse_a - anchor)
    b = xp.exp(lse_b - anchor)
    total = a + b
    safe = xp.where(total > 0, total, xp.ones_like(total))
    o = (a / safe)[..., None] * o_a + (b / safe)[..., None] * o_b  # [T, H, D]
    lse = xp.where(total > 0, anchor + xp.log(safe), xp.full_like(top, -math.inf))
    return o, lse


def causal_bias(
    xp: Namespace, count: int, keys: int, offset: int, window: int | None, dtype: DType
) -> Array | None:
    """[T, S] of 0 (seen) and −10³⁰ (hidden): query t sees key j iff offset+t−window < j ≤ offset+t.

    None if every query sees every key (decoding, a tile below the diagonal).
    """
    hides_future = keys - 1 > offset
    hides_past = window is not None and offset + count - 1 - window >= 0
    if not hides_future and not hides_past:
        return None
    j = xp.arange(keys)[None, :]  # [1, S]
    t = xp.arange(count)[:, None] + offset  # [T, 1]
    hidden = j > t  # [T, S]
    if window is not None:
        hidden = hidden | (j <= t - window)
    lowest = xp.asarray(masked_score(xp, dtype), dtype=dtype)
    return xp.where(hidden, lowest, xp.asarray(0.0, dtype=dtype))


def masked_score(xp: Namespace, dtype: DType) -> float:
    """The score of a hidden key: far below every real score, and finite in ``dtype``
    (float16 ends at −65,504).
    """
    return max(NEGATIVE, 0.9 * float(xp.finfo(dtype).min))


class CausalAttend:
    """The plain ``attend`` without a cache: each sequence of the ragged batch sees its own past.

    The ``lengths[b]`` tokens of each sequence b are concatenated, T = Σ lengths; positions
    start at 0. ValueError if a batch has another number of tokens.
    """

    def __init__(self, lengths: list[int], window: int | None = None):
        self.lengths = lengths
        self.window = window

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """q[T, H, D], k[T, G, D], v[T, G, D] → [T, H, D]."""
        outputs = []
        start = 0
        for length in self.lengths:
            rows = slice(start, start + length)
            o, _ = flash_attention(
                q[rows, ...], k[rows, ...], v[rows, ...], start=0, window=self.window
            )
            outputs.append(o)  # [length, H, D]
            start += length
        if start != q.shape[0]:
            raise InputError(
                f"CausalAttend: lengths sum to {start}, the batch has {q.shape[0]} tokens"
            )
        if len(outputs) == 1:
            return outputs[0]
        return namespace(q).concat(outputs, axis=0)


def _group_queries(q: Array, groups: int) -> Array:
    """[T, H, D] → [G, R·T, D], scaled by 1/√D: queries that share a key head are stacked."""
    xp = namespace(q)
    count, heads, dim = q.shape
    grouped = xp.reshape(q, (count, groups, heads // groups, dim))  # [T, G, R, D]
    grouped = xp.permute_dims(grouped, (1, 2, 0, 3))  # [G, R, T, D]
    return xp.reshape(grouped * (1.0 / math.sqrt(dim)), (groups, -1, dim))  # [G, R·T, D]


def _ungroup(x: Array, count: int) -> Array:
    """[G, R·T, D] → [T, H, D], the inverse of ``_group_queries`` except for the scale."""
    xp = namespace(x)
    groups, _, dim = x.shape
    split = xp.reshape(x, (groups, -1, count, dim))  # [G, R, T, D]
    return xp.reshape(xp.permute_dims(split, (2, 0, 1, 3)), (count, -1, dim))  # [T, H, D]


def _keys_last(k: Array) -> Array:
    """[S, G, D] → [G, D, S], the right operand of q kᵀ, as a view."""
    return namespace(k).permute_dims(k, (1, 2, 0))


def _heads_first(x: Array) -> Array:
    """[S, G, D] → [G, S, D], as a view: BLAS takes any stride between rows."""
    return namespace(x).permute_dims(x, (1, 0, 2))
