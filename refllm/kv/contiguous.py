"""The contiguous cache: one preallocated strip of keys and values a sequence.

The naive twin of the paged cache, and the baseline that pre-allocates for the longest case. Memory is
L · B · capacity · 2 · G · D numbers from the first token on, used or not.

| symbol | name                    | shape               |
|--------|-------------------------|---------------------|
| K, V   | the strips of a layer   | [B, G, capacity, D] |
| n_b    | new tokens of sequence b| ``counts[b]``       |
| s_b    | cached tokens           | ``lengths[b]``      |

Ownership, written as half-open intervals: positions [0, s_b) are committed; a view may write
[s_b, s_b + n_b); ``advance`` commits them; everything beyond is garbage that no query sees.

Left out: growing, sharing, a sliding window that forgets (masked keys are kept).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from refllm.backend import Array, asarray_like, namespace
from refllm.model.attention import Attend, flash_attention, masked_score
from refllm.model.config import ModelConfig


class ContiguousCache:
    """Keys and values of up to ``max_sequences`` sequences of up to ``capacity`` tokens."""

    def __init__(self, config: ModelConfig, max_sequences: int, capacity: int, *, like: Array, dtype: Any = None):
        """``like`` is any array of the library to live on; ``dtype`` defaults to its dtype."""
        if max_sequences < 1 or capacity < 1:
            raise ValueError(f"ContiguousCache: needs room for a token, got {max_sequences} × {capacity}")
        xp = namespace(like)
        shape = (config.num_hidden_layers, max_sequences, config.num_key_value_heads, capacity, config.head_dim)
        # zeros, not empty: what is masked is multiplied by a probability of 0, and 0 · NaN is NaN
        self.keys: Array = xp.zeros(shape, dtype=dtype or like.dtype)
        self.values: Array = xp.zeros(shape, dtype=dtype or like.dtype)
        self.window = config.sliding_window
        self.capacity = capacity
        self.lengths = [0] * max_sequences  # committed tokens a sequence

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whatever is used."""
        return int(self.keys.nbytes + self.values.nbytes)

    def positions(self, counts: Sequence[int]) -> list[int]:
        """Positions of the next ``counts[b]`` tokens of every sequence, in the order of the ragged batch."""
        return [s + i for s, n in zip(self.lengths, counts, strict=False) for i in range(n)]

    def view(self, counts: Sequence[int]) -> Attend:
        """An ``attend`` for a step in which sequence b brings ``counts[b]`` new tokens (0 is allowed).

        Raises
        ------
        ValueError
            if a sequence would outgrow the capacity; nothing has been written then.
        """
        if len(counts) > len(self.lengths):
            raise ValueError(f"the cache holds {len(self.lengths)} sequences, the batch has {len(counts)}")
        for b, n in enumerate(counts):
            if n < 0 or self.lengths[b] + n > self.capacity:
                raise ValueError(f"sequence {b}: {self.lengths[b]} cached + {n} new tokens exceed {self.capacity}")
        if counts and all(n == 1 for n in counts):
            return _DecodeView(self, len(counts))
        return _RaggedView(self, counts)

    def advance(self, counts: Sequence[int]) -> None:
        """Commit what the last view wrote."""
        for b, n in enumerate(counts):
            self.lengths[b] += n

    def truncate(self, sequence: int, length: int) -> None:
        """Forget everything of a sequence from position ``length`` on (rollback of a rejected draft)."""
        if not 0 <= sequence < len(self.lengths):
            raise ValueError(f"the cache holds sequences 0..{len(self.lengths) - 1}, got {sequence}")
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(f"sequence {sequence} has {self.lengths[sequence]} tokens, cannot keep {length}")
        self.lengths[sequence] = length


class _RaggedView:
    """Any mixture of prefill and decode: sequence by sequence, each over its own strip."""

    def __init__(self, cache: ContiguousCache, counts: Sequence[int]):
        self.cache, self.counts = cache, list(counts)

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        xp, cache, at = namespace(q), self.cache, 0
        out = xp.empty_like(q)
        for b, n in enumerate(self.counts):
            if n == 0:
                continue
            rows, start = slice(at, at + n), cache.lengths[b]
            keys, values = (strip[layer, b, :, : start + n] for strip in (cache.keys, cache.values))  # [G, s+n, D]
            keys[:, start:] = k[rows].transpose(1, 0, 2)
            values[:, start:] = v[rows].transpose(1, 0, 2)
            seen = keys.transpose(1, 0, 2), values.transpose(1, 0, 2)
            out[rows] = flash_attention(q[rows], *seen, start=start, window=cache.window)[0]
            at += n
        return out


class _DecodeView:
    """Every sequence brings one token: one batched product over the strips up to the longest."""

    def __init__(self, cache: ContiguousCache, count: int):
        xp = namespace(cache.keys)
        lengths = cache.lengths[:count]
        self.cache, self.count, self.longest = cache, count, max(lengths) + 1
        same = min(lengths) == max(lengths)
        # one slice where all stand at the same position (no index arrays), else one slot a sequence
        self.slot: Any = lengths[0] if same else asarray_like(lengths, cache.keys, "int64")
        self.every: Any = slice(0, count) if same else xp.arange(count)
        self.bias = self._bias(xp, lengths)

    def _bias(self, xp: Any, lengths: list[int]) -> Array | None:
        """[B, 1, 1, S]: hides what lies beyond a shorter sequence's end, or before its window."""
        window = self.cache.window
        if min(lengths) == max(lengths) and (window is None or self.longest <= window):
            return None
        at = asarray_like(lengths, self.cache.keys, "int64")[:, None]
        j = xp.arange(self.longest)[None, :]
        hidden = j > at
        if window is not None:
            hidden = hidden | (j <= at - window)
        dtype = self.cache.keys.dtype
        bias = xp.where(hidden, xp.asarray(masked_score(xp, dtype), dtype=dtype), xp.asarray(0.0, dtype=dtype))
        return bias[:, None, None, :]

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        xp, cache = namespace(q), self.cache
        batch, heads, dim = q.shape
        keys, values = cache.keys[layer], cache.values[layer]
        keys[self.every, :, self.slot] = k
        values[self.every, :, self.slot] = v
        keys, values = keys[:batch, :, : self.longest], values[:batch, :, : self.longest]  # [B, G, S, D]
        q *= 1.0 / math.sqrt(dim)
        p = xp.matmul(q.reshape(batch, k.shape[1], -1, dim), keys.swapaxes(-1, -2))  # [B, G, R, S]
        if self.bias is not None:
            p += self.bias
        p -= p.max(axis=-1, keepdims=True)
        xp.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        return xp.matmul(p, values).reshape(batch, heads, dim)
