"""The contiguous cache: one preallocated buffer of keys and values per sequence.

The naive twin of the paged cache, and the baseline that preallocates for the longest case.
Its memory is L · B · capacity · 2 · G · D values from the first token on, used or not.

| symbol | name                    | shape               |
|--------|-------------------------|---------------------|
| K      | the keys of a layer     | [B, G, D, capacity] |
| V      | the values of a layer   | [B, G, capacity, D] |
| n_b    | new tokens of sequence b| ``counts[b]``       |
| s_b    | cached tokens           | ``lengths[b]``      |

Keys stand in columns, as the right-hand side of q Kᵀ: OpenBLAS then reads them where they
lie, which halves the time of that product at batch 32.

Ownership, written as half-open intervals: positions [0, s_b) are committed; a view may
write [s_b, s_b + n_b); ``advance`` commits them; no query sees what lies beyond.

Left out: growing, sharing, a sliding window that frees memory (masked keys are kept).
"""

from __future__ import annotations

from collections.abc import Sequence

from refllm.backend import Array, DType, asarray_like, namespace
from refllm.kv.batched_attention import all_equal, attend_batched, batched_bias, can_batch
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
        dtype: DType | None = None,
        columns: bool = True,
    ):
        """``like`` is any array of the library to live on; ``dtype`` defaults to its dtype.

        ``columns=False`` stores the keys row by row, token after token, as a pool of slots
        must: the same values in the same products, which BLAS then reads, and rounds, in
        another order.
        """
        if max_sequences < 1 or capacity < 1:
            raise ValueError(
                "ContiguousCache: needs at least one sequence of one token, "
                f"got {max_sequences} × {capacity}"
            )
        xp = namespace(like)
        heads = (config.num_hidden_layers, max_sequences, config.num_key_value_heads)
        dim = config.head_dim
        dtype = dtype or like.dtype
        # Zeros, not empty: a masked value is multiplied by a probability of 0, and 0 · NaN
        # is NaN.
        if columns:
            self.keys: Array = xp.zeros((*heads, dim, capacity), dtype=dtype)
        else:
            self.keys = xp.zeros((*heads, capacity, dim), dtype=dtype).swapaxes(-1, -2)
        self.values: Array = xp.zeros((*heads, capacity, dim), dtype=dtype)
        self.window = config.sliding_window
        self.heads = config.num_attention_heads
        self.capacity = capacity
        self.lengths = [0] * max_sequences  # committed tokens per sequence

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return int(self.keys.nbytes + self.values.nbytes)

    def positions(self, counts: Sequence[int]) -> list[int]:
        """Positions of the next ``counts[b]`` tokens of every sequence, in the order of the
        ragged batch.
        """
        return [s + i for s, n in zip(self.lengths, counts, strict=False) for i in range(n)]

    def view(self, counts: Sequence[int]) -> Attend:
        """An ``attend`` for a step in which sequence b contributes ``counts[b]`` new tokens
        (0 is allowed).

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
                    f"sequence {b}: {self.lengths[b]} cached + {n} new tokens exceed "
                    f"{self.capacity}"
                )
        busy = [b for b, n in enumerate(counts) if n]
        batched = can_batch([counts[b] for b in busy], [self.lengths[b] for b in busy], self.heads)
        # neighbours only, so that their buffers are one array
        if batched and busy[-1] - busy[0] < len(busy):
            return _BatchedView(self, slice(busy[0], busy[-1] + 1), counts[busy[0]])
        return _RaggedView(self, counts)

    def advance(self, counts: Sequence[int]) -> None:
        """Commit what the last view wrote."""
        for b, n in enumerate(counts):
            self.lengths[b] += n

    def truncate(self, sequence: int, length: int) -> None:
        """Drop the tokens of a sequence from position ``length`` on (rollback of rejected
        drafts).
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
    """Any mixture of prefill and decode: sequence by sequence, each over its own buffer."""

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
            keys = cache.keys[layer, b, :, :, : start + n]  # [G, D, s+n]
            values = cache.values[layer, b, :, : start + n]  # [G, s+n, D]
            keys[:, :, start:] = k[rows].transpose(1, 2, 0)
            values[:, start:] = v[rows].transpose(1, 0, 2)
            seen = keys.transpose(2, 0, 1), values.transpose(1, 0, 2)  # [s+n, G, D] each
            out[rows] = flash_attention(q[rows], *seen, start=start, window=cache.window)[0]
            at += n
        return out


class _BatchedView:
    """Neighbouring sequences contribute n tokens each (decode: one): they attend in one
    batch, up to the longest of them.
    """

    def __init__(self, cache: ContiguousCache, sequences: slice, count: int):
        lengths = cache.lengths[sequences]
        self.count = count
        longest = max(lengths) + count
        self.keys = cache.keys[:, sequences, :, :, :longest]  # [L, B, G, D, S]
        self.values = cache.values[:, sequences, :, :longest]  # [L, B, G, S, D]
        self.bias = batched_bias(lengths, count, cache.window, cache.keys)
        # (sequence, slot) of each new token; None for the last columns, where all sequences
        # have the same length
        self.slots: tuple[Array, Array] | None = None
        if not all_equal(lengths):
            xp = namespace(cache.keys)
            at = asarray_like(lengths, cache.keys, "int64")[:, None] + xp.arange(count)  # [B, n]
            self.slots = xp.arange(len(lengths))[:, None], at

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        n = self.count
        groups, dim = k.shape[1:]
        keys = self.keys[layer]  # [B, G, D, S]
        values = self.values[layer]  # [B, G, S, D]
        if self.slots is None and n == 1:  # nearly all steps
            keys[..., -1] = k
            values[:, :, -1] = v
            return attend_batched(q, keys, values, self.bias)
        k = k.reshape(-1, n, groups, dim)  # [B, n, G, D]
        v = v.reshape(-1, n, groups, dim)
        if self.slots is None:
            keys[..., -n:] = k.transpose(0, 2, 3, 1)
            values[:, :, -n:] = v.transpose(0, 2, 1, 3)
        else:
            sequence, slot = self.slots
            keys[sequence, :, :, slot] = k
            values[sequence, :, slot] = v
        return attend_batched(q, keys, values, self.bias)
