"""Attention of sequences that contribute equally many new tokens: two products for the whole batch.

The case of a decode step, and of a prefill of equally long prompts. All caches share this
arithmetic: they differ in where keys and values are stored, and pass them as B buffers of
one length.

| symbol | name                                              | shape                        |
|--------|---------------------------------------------------|------------------------------|
| q      | queries, n of each sequence                       | [B·n, H, D]                  |
| K      | keys in columns, the right-hand side of q Kᵀ      | [B, G, D, S]                 |
| V      | values                                            | [B, G, S, D]                 |
| R      | query heads per key/value head, H / G             |                              |
| C      | the last slots, to which a bias applies           |                              |
| bias   | 0, or ``masked_score`` where a query does not see | [B, 1, 1, n, C], or          |
|        | a slot                                            | [1, 1, 1, n, C] for all      |

Left out: sequences with different counts (``model.attention``, one after the other, in
tiles).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from refllm.backend import NUMPY, Array, DType, Namespace, asarray_like, namespace
from refllm.model.attention import masked_score
from refllm.model.weight_layout import has_small_kernels

MAX_SCORES = 2**20  # of a prefill at once; a larger one goes sequence by sequence, in tiles
QUERY_TILE = 64  # queries of a sequence at a time
LONG = 256  # slots from which on keys are read head by head with AVX-512 kernels too


def can_batch(counts: Sequence[int], lengths: Sequence[int], heads: int) -> bool:
    """Whether sequences of ``lengths`` cached tokens contribute equally many new ones, and
    few enough scores.

    >>> can_batch([1, 1], lengths=[7, 9], heads=4), can_batch([1, 2], lengths=[7, 9], heads=4)
    (True, False)
    """
    if not counts or not all_equal(counts):
        return False
    scores = len(counts) * heads * counts[0] * (max(lengths) + counts[0])
    # a decode step has one query per sequence, so its scores always fit
    return counts[0] == 1 or scores <= MAX_SCORES


def attend_batched(q: Array, keys: Array, values: Array, bias: Array | None = None) -> Array:
    """softmax(q K / √D + bias) V, [B·n, H, D]; q is overwritten. ``bias`` applies to the
    last C of the S slots.

    Many queries per sequence are computed in tiles: no query of a tile sees the keys behind
    its last one, so nearly half of the scores of a prompt are not computed.
    """
    xp = namespace(q, keys, values)
    rows, heads, dim = q.shape
    n = rows // keys.shape[0]
    slots = keys.shape[-1]
    if n <= QUERY_TILE or bias is None:
        return _attend(xp, q, keys, values, bias)
    out = xp.empty(q.shape, dtype=q.dtype)
    queries = q.reshape(-1, n, heads, dim)  # [B, n, H, D]
    outputs = out.reshape(-1, n, heads, dim)
    for first in range(0, n, QUERY_TILE):
        last = min(first + QUERY_TILE, n)
        behind = n - last  # keys that no query of this tile sees
        tile = queries[:, first:last].reshape(-1, heads, dim)  # [B·tile, H, D]
        tile_keys = keys[..., : slots - behind]
        tile_values = values[:, :, : slots - behind]
        tile_bias = bias[..., first:last, : bias.shape[-1] - behind]
        o = _attend(xp, tile, tile_keys, tile_values, tile_bias)
        outputs[:, first:last] = o.reshape(-1, last - first, heads, dim)
    return out


def _attend(xp: Namespace, q: Array, keys: Array, values: Array, bias: Array | None) -> Array:
    """One tile of ``attend_batched``."""
    batch, groups, dim, _ = keys.shape
    n = q.shape[0] // batch
    heads = q.shape[1]
    q *= 1.0 / math.sqrt(dim)
    if n == 1:  # heads that share a key head lie beside each other
        rows = q.reshape(batch, groups, -1, dim)  # [B, G, R, D]
    else:
        rows = q.reshape(batch, n, groups, -1, dim)  # [B, n, G, R, D]
        rows = rows.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, dim)  # [B, G, R·n, D]
    single = n == 1 and xp is NUMPY
    packs = single and not has_small_kernels()
    long = single and keys.shape[-1] >= LONG
    p = _multiply(xp, rows, keys, by_row=packs or long)  # [B, G, R·n, S]
    if bias is not None:
        scores = p.reshape(batch, groups, -1, n, p.shape[-1])  # a view
        scores = scores[..., -bias.shape[-1] :]
        scores += bias
    # softmax in place; the maximum is subtracted so that exp cannot overflow
    p -= p.max(axis=-1, keepdims=True)
    xp.exp(p, out=p)
    total = p.sum(axis=-1, keepdims=True)  # [B, G, R·n, 1]
    o = _multiply(xp, p, values, by_row=packs)  # [B, G, R·n, D]
    o /= total
    if n > 1:
        o = o.reshape(batch, groups, heads // groups, n, dim).transpose(0, 3, 1, 2, 4)
    return o.reshape(-1, heads, dim)  # [B·n, H, D]


def _multiply(xp: Namespace, rows: Array, matrix: Array, by_row: bool) -> Array:
    """rows[B, G, R, K] @ matrix[B, G, K, C], all R rows in one product, or one by one: a
    matrix-vector product does not pack its matrix, and reads long rows of it in order.
    """
    if by_row:
        return xp.matmul(rows[..., None, :], matrix[:, :, None])[..., 0, :]
    return xp.matmul(rows, matrix)


def batched_bias(
    lengths: Sequence[int], count: int, window: int | None, like: Array
) -> Array | None:
    """[B, 1, 1, n, C] for sequences of ``lengths`` cached tokens and ``count`` new ones:
    the bias of the last C slots.

    None where every query sees every key: a decode step at equal lengths, within the
    window. At equal lengths within the window only the n new keys are hidden from some
    queries, the same for all sequences: [1, 1, 1, n, n].
    """
    longest = max(lengths) + count
    if all_equal(lengths) and (window is None or longest <= window):
        if count == 1:
            return None
        return _triangle(namespace(like), count, like.dtype)
    xp = namespace(like)
    starts = asarray_like(lengths, like, "int64")[:, None, None, None, None]  # [B, 1, 1, 1, 1]
    at = starts + xp.arange(count)[:, None]  # [B, 1, 1, n, 1]
    j = xp.arange(longest)
    hidden = j > at  # [B, 1, 1, n, S]
    if window is not None:
        hidden = hidden | (j <= at - window)
    return _as_bias(xp, hidden, like.dtype)


@lru_cache(maxsize=16)  # a verification asks for the same ones at each step
def _triangle(xp: Namespace, count: int, dtype: DType) -> Array:
    """[1, 1, 1, n, n]: each of n new tokens sees itself and those before it. Read-only."""
    j = xp.arange(count)
    return _as_bias(xp, j > j[:, None], dtype)[None, None, None]


def _as_bias(xp: Namespace, hidden: Array, dtype: DType) -> Array:
    """``masked_score`` where hidden, else 0."""
    low = xp.asarray(masked_score(xp, dtype), dtype=dtype)
    zero = xp.asarray(0.0, dtype=dtype)
    return xp.where(hidden, low, zero)


def all_equal(values: Sequence[int]) -> bool:
    """Whether all values are the same."""
    return min(values) == max(values)
