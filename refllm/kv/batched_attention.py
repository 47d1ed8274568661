"""Sequences that bring equally many tokens attend together: two products for the whole
batch.

What a decode step does, and a prefill of equally long prompts. It is the arithmetic that
all caches share: they differ in where keys and values lie, and hand them over as B strips
of one length.

| symbol | name                                         | shape        |
|--------|----------------------------------------------|--------------|
| q      | queries, n of each sequence                  | [B·n, H, D]  |
| K      | keys in columns, the right-hand side of q Kᵀ | [B, G, D, S] |
| V      | values                                       | [B, G, S, D] |
| C      | the last slots, those that a bias is for     |              |
| bias   | 0, or ``masked_score`` for what a query does not see | [B, 1, 1, n, C], or one for all |

Left out: sequences of different counts (``model.attention``, one after the other, in
tiles).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from refllm.backend import Array, asarray_like, namespace
from refllm.model.attention import masked_score
from refllm.model.weights import has_small_kernels

SCORES = 2**20  # of a prefill at once; a larger one goes sequence by sequence, in tiles
QUERIES = 64  # of a sequence at a time


def fits_together(counts: Sequence[int], lengths: Sequence[int], heads: int) -> bool:
    """Do sequences of ``lengths`` cached tokens bring equally many new ones, and few enough
    scores?
    """
    if not counts or not even(counts):
        return False
    return counts[0] == 1 or len(counts) * heads * counts[0] * (max(lengths) + counts[0]) <= SCORES


def attend_together(q: Array, keys: Array, values: Array, bias: Array | None = None) -> Array:
    """softmax(q K / √D + bias) V, [B·n, H, D]; q is overwritten. ``bias`` is that of the
    last C of the S slots.

    Many queries of a sequence are taken some at a time: of the keys behind the last of them
    none is seen, and nearly half of the scores of a prompt are not computed.
    """
    xp = namespace(q, keys, values)
    rows, heads, dim = q.shape
    n = rows // keys.shape[0]
    slots = keys.shape[-1]
    if n <= QUERIES or bias is None:
        return _attend(xp, q, keys, values, bias)
    out = xp.empty(q.shape, dtype=q.dtype)
    asking = q.reshape(-1, n, heads, dim)
    found = out.reshape(-1, n, heads, dim)
    for first in range(0, n, QUERIES):
        last = min(first + QUERIES, n)
        behind = n - last  # keys that nobody in this tile sees
        tile = asking[:, first:last].reshape(-1, heads, dim)
        some = bias[..., first:last, : bias.shape[-1] - behind]
        o = _attend(xp, tile, keys[..., : slots - behind], values[:, :, : slots - behind], some)
        found[:, first:last] = o.reshape(-1, last - first, heads, dim)
    return out


def _attend(xp: Any, q: Array, keys: Array, values: Array, bias: Array | None) -> Array:
    batch, groups, dim, _ = keys.shape
    n = q.shape[0] // batch
    heads = q.shape[1]
    q *= 1.0 / math.sqrt(dim)
    if n == 1:  # heads that share a key head lie beside each other
        rows = q.reshape(batch, groups, -1, dim)  # [B, G, R, D]
    else:
        shape = (batch, groups, heads // groups, n, dim)
        rows = (
            q.reshape(batch, n, groups, -1, dim)
            .transpose(0, 2, 3, 1, 4)
            .reshape(batch, groups, -1, dim)
        )
    # a head at a time: a matrix-vector product packs nothing
    if n == 1 and xp is np and not has_small_kernels():
        rows = rows[..., None, :]
        keys = keys[:, :, None]
        values = values[:, :, None]
    p = xp.matmul(rows, keys)  # [B, G, R·n, S], or [B, G, R, 1, S]
    if bias is not None:
        apart = p.reshape(batch, groups, -1, n, p.shape[-1])[..., -bias.shape[-1] :]
        apart += bias
    p -= p.max(axis=-1, keepdims=True)
    xp.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    o = xp.matmul(p, values)
    if n > 1:
        o = o.reshape(shape).transpose(0, 3, 1, 2, 4)
    return o.reshape(-1, heads, dim)


def bias_together(
    lengths: Sequence[int], count: int, window: int | None, like: Array
) -> Array | None:
    """[B, 1, 1, n, C] for sequences of ``lengths`` cached tokens and ``count`` new ones: of
    the last C slots.

    None where every query sees every key: a decode step at equal lengths, within the
    window. At equal lengths within the window only the n new keys are hidden from some, the
    same for all: [1, 1, 1, n, n].
    """
    longest = max(lengths) + count
    if even(lengths) and (window is None or longest <= window):
        if count == 1:
            return None
        return _triangle(namespace(like), count, like.dtype)
    xp = namespace(like)
    at = asarray_like(lengths, like, "int64")[:, None, None, None, None] + xp.arange(count)[:, None]
    j = xp.arange(longest)
    hidden = j > at
    if window is not None:
        hidden = hidden | (j <= at - window)
    return _masked(xp, hidden, like.dtype)


@lru_cache(maxsize=16)  # a verification asks for the same ones at each step
def _triangle(xp: Any, count: int, dtype: Any) -> Array:
    """[1, 1, 1, n, n]: of n new tokens each sees itself and those before it. To be read
    only.
    """
    j = xp.arange(count)
    return _masked(xp, j > j[:, None], dtype)[None, None, None]


def _masked(xp: Any, hidden: Array, dtype: Any) -> Array:
    low, zero = (xp.asarray(v, dtype=dtype) for v in (masked_score(xp, dtype), 0.0))
    return xp.where(hidden, low, zero)


def even(numbers: Sequence[int]) -> bool:
    """Are all numbers the same?"""
    return min(numbers) == max(numbers)
