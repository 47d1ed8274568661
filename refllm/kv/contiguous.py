"""The contiguous cache: one preallocated strip of keys and values a sequence.

The naive twin of the paged cache, and the baseline that pre-allocates for the longest case.
Memory is L · B · capacity · 2 · G · D numbers from the first token on, used or not.

| symbol | name                    | shape               |
|--------|-------------------------|---------------------|
| K      | the keys of a layer     | [B, G, D, capacity] |
| V      | the values of a layer   | [B, G, capacity, D] |
| n_b    | new tokens of sequence b| ``counts[b]``       |
| s_b    | cached tokens           | ``lengths[b]``      |

Keys stand in columns, as the right-hand side of q Kᵀ: OpenBLAS then reads them where they
lie, which halves the time of that product at batch 32.

Ownership, written as half-open intervals: positions [0, s_b) are committed; a view may
write [s_b, s_b + n_b); ``advance`` commits them; everything beyond is garbage that no query
sees.

Left out: growing, sharing, a sliding window that forgets (masked keys are kept).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refllm.backend import Array, asarray_like, namespace
from refllm.kv.batched_attention import attend_together, bias_together, even, fits_together
from refllm.model.attention import Attend, flash_attention
from refllm.model.config import ModelConfig


class ContiguousCache:
    """Keys and values of up to ``max_sequences`` sequences of up to ``capacity`` tokens."""

    def __init__(
        self,
        config: ModelConfig,
        max_sequences: int,
        capacity: int,
        *,
        like: Array,
        dtype: Any = None,
        columns: bool = True,
    ):
        """``like`` is any array of the library to live on; ``dtype`` defaults to its dtype.

        ``columns=False`` lays the keys in memory row by row, token after token, as a pool
        of slots must: the same numbers in the same products, which BLAS then reads, and
        rounds, in another order.
        """
        if max_sequences < 1 or capacity < 1:
            raise ValueError(
                f"ContiguousCache: needs room for a token, got {max_sequences} × {capacity}"
            )
        xp = namespace(like)
        heads = (config.num_hidden_layers, max_sequences, config.num_key_value_heads)
        dim = config.head_dim
        # zeros, not empty: what is masked is multiplied by a probability of 0, and 0 · NaN
        # is NaN
        across = (dim, capacity) if columns else (capacity, dim)
        keys = xp.zeros((*heads, *across), dtype=dtype or like.dtype)
        self.keys: Array = keys if columns else keys.swapaxes(-1, -2)
        self.values: Array = xp.zeros((*heads, capacity, dim), dtype=dtype or like.dtype)
        self.window = config.sliding_window
        self.heads = config.num_attention_heads
        self.capacity = capacity
        self.lengths = [0] * max_sequences  # committed tokens a sequence

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whatever is used."""
        return int(self.keys.nbytes + self.values.nbytes)

    def positions(self, counts: Sequence[int]) -> list[int]:
        """Positions of the next ``counts[b]`` tokens of every sequence, in the order of the
        ragged batch.
        """
        return [s + i for s, n in zip(self.lengths, counts, strict=False) for i in range(n)]

    def view(self, counts: Sequence[int]) -> Attend:
        """An ``attend`` for a step in which sequence b brings ``counts[b]`` new tokens (0
        is allowed).

        Raises
        ------
        ValueError
            if a sequence would outgrow the capacity; nothing has been written then.
        """
        if len(counts) > len(self.lengths):
            raise ValueError(
                f"the cache holds {len(self.lengths)} sequences, the batch has {len(counts)}"
            )
        for b, n in enumerate(counts):
            if n < 0 or self.lengths[b] + n > self.capacity:
                raise ValueError(
                    f"sequence {b}: {self.lengths[b]} cached + {n} new tokens exceed {self.capacity}"
                )
        busy = [b for b, n in enumerate(counts) if n]
        together = fits_together(
            [counts[b] for b in busy], [self.lengths[b] for b in busy], self.heads
        )
        # neighbours, so that their strips are one array
        if together and busy[-1] - busy[0] < len(busy):
            return _EvenView(self, slice(busy[0], busy[-1] + 1), counts[busy[0]])
        return _RaggedView(self, counts)

    def advance(self, counts: Sequence[int]) -> None:
        """Commit what the last view wrote."""
        for b, n in enumerate(counts):
            self.lengths[b] += n

    def truncate(self, sequence: int, length: int) -> None:
        """Forget everything of a sequence from position ``length`` on (rollback of a
        rejected draft).
        """
        if not 0 <= sequence < len(self.lengths):
            raise ValueError(
                f"the cache holds sequences 0..{len(self.lengths) - 1}, got {sequence}"
            )
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(
                f"sequence {sequence} has {self.lengths[sequence]} tokens, cannot keep {length}"
            )
        self.lengths[sequence] = length


class _RaggedView:
    """Any mixture of prefill and decode: sequence by sequence, each over its own strip."""

    def __init__(self, cache: ContiguousCache, counts: Sequence[int]):
        self.cache = cache
        self.counts = list(counts)

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        xp = namespace(q)
        cache = self.cache
        at = 0
        out = xp.empty_like(q)
        for b, n in enumerate(self.counts):
            if n == 0:
                continue
            rows = slice(at, at + n)
            start = cache.lengths[b]
            keys = cache.keys[layer, b, :, :, : start + n]
            values = cache.values[layer, b, :, : start + n]
            keys[:, :, start:] = k[rows].transpose(1, 2, 0)  # of [G, D, s+n]
            values[:, start:] = v[rows].transpose(1, 0, 2)  # of [G, s+n, D]
            seen = keys.transpose(2, 0, 1), values.transpose(1, 0, 2)
            out[rows] = flash_attention(q[rows], *seen, start=start, window=cache.window)[0]
            at += n
        return out


class _EvenView:
    """Some neighbours bring n tokens each (decode: one): they attend together, up to the
    longest strip.
    """

    def __init__(self, cache: ContiguousCache, sequences: slice, count: int):
        lengths = cache.lengths[sequences]
        self.count = count
        longest = max(lengths) + count
        self.keys = cache.keys[:, sequences, :, :, :longest]  # [L, B, G, D, S]
        self.values = cache.values[:, sequences, :, :longest]  # [L, B, G, S, D]
        self.bias = bias_together(lengths, count, cache.window, cache.keys)
        # the last columns where all stand at the same position, else a slot each
        self.slots: Any = None
        if not even(lengths):
            xp = namespace(cache.keys)
            at = asarray_like(lengths, cache.keys, "int64")[:, None] + xp.arange(count)  # [B, n]
            self.slots = xp.arange(len(lengths))[:, None], at

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        n = self.count
        groups, dim = k.shape[1:]
        keys = self.keys[layer]
        values = self.values[layer]
        if self.slots is None and n == 1:  # nearly all steps
            keys[..., -1] = k
            values[:, :, -1] = v
            return attend_together(q, keys, values, self.bias)
        k = k.reshape(-1, n, groups, dim)
        v = v.reshape(-1, n, groups, dim)
        if self.slots is None:
            keys[..., -n:] = k.transpose(0, 2, 3, 1)
            values[:, :, -n:] = v.transpose(0, 2, 1, 3)
        else:
            sequence, slot = self.slots
            keys[sequence, :, :, slot] = k
            values[sequence, :, slot] = v
        return attend_together(q, keys, values, self.bias)
