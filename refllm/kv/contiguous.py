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

A tree of drafts is computed in one step too: its rows lie in slots [s_b, s_b + m + 1), row 0
being the last token. A row sees what is committed, its ancestors and itself; then
``advance_path`` moves the accepted rows together.

Left out: sharing, a sliding window that frees memory (masked keys are kept).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from refllm.backend import Array, DType, Namespace, asarray_like, namespace
from refllm.errors import InputError
from refllm.kv.batched_attention import all_equal, attend_batched, batched_bias, can_batch
from refllm.kv.interface import CacheUsage, TokenTree
from refllm.model.attention import Attend, flash_attention, masked_score
from refllm.model.config import ModelConfig


class ContiguousPolicy:
    """The policy that keeps every token in full precision."""

    trees: ClassVar[bool] = True

    def new_cache(
        self,
        config: ModelConfig,
        sequences: int,
        capacity: int,
        *,
        like: Array,
        rng: np.random.Generator | None = None,
    ) -> ContiguousCache:
        """See ``CachePolicy.new_cache``; ``rng`` is not used."""
        return ContiguousCache(config, sequences, capacity, like=like)

    def usage(self, config: ModelConfig, prompt: int, new: int) -> CacheUsage:
        """See ``CachePolicy.usage``."""
        return CacheUsage(None, f"all {prompt + new} tokens in full precision")


class ContiguousCache:
    """Keys and values of up to ``max_sequences`` sequences of up to ``capacity`` tokens."""

    chunked_prefill: ClassVar[bool | None] = None

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
            raise InputError(
                "ContiguousCache: needs at least one sequence of one token, "
                f"got {max_sequences} × {capacity}"
            )
        self.columns = columns
        heads = (config.num_hidden_layers, max_sequences, config.num_key_value_heads)
        shape = (*heads, capacity, config.head_dim)
        self.keys, self.values = self._zeros(namespace(like), shape, dtype or like.dtype)
        self.window = config.sliding_window
        self.heads = config.num_attention_heads
        self.capacity = capacity
        self.lengths = [0] * max_sequences  # committed tokens per sequence

    def _zeros(self, xp: Namespace, shape: tuple[int, ...], dtype: DType) -> tuple[Array, Array]:
        """Empty keys and values; ``shape`` is that of the values."""
        # Zeros, not empty: a masked value is multiplied by a probability of 0, and 0 · NaN
        # is NaN.
        values = xp.zeros(shape, dtype=dtype)
        if self.columns:
            *heads, capacity, dim = shape
            return xp.zeros((*heads, dim, capacity), dtype=dtype), values
        return xp.zeros(shape, dtype=dtype).swapaxes(-1, -2), values

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens per sequence, at the cost of a copy of what is
        committed; nothing is done if there is room. Views made before are of the old buffers.
        """
        if capacity <= self.capacity:
            return
        used = max(self.lengths)
        shape = (*self.values.shape[:-2], capacity, self.values.shape[-1])
        keys, values = self._zeros(namespace(self.values), shape, self.values.dtype)
        keys[..., :used] = self.keys[..., :used]
        values[..., :used, :] = self.values[..., :used, :]
        self.keys, self.values = keys, values
        self.capacity = capacity

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
            raise InputError(
                f"the cache holds {len(self.lengths)} sequences, the batch has {len(counts)}"
            )
        for b, n in enumerate(counts):
            if n < 0 or self.lengths[b] + n > self.capacity:
                raise InputError(
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

    def finish_prompt(self) -> None:
        """Nothing is dropped after the prompt."""

    def view_tree(self, sequence: int, tree: TokenTree) -> Attend:
        """An ``attend`` for a step of one sequence with a tree of m drafts: m + 1 tokens;
        then ``advance_path``, not ``advance``.

        ValueError if the tree exceeds the capacity.
        """
        return _TreeView(self, sequence, tree)

    def advance_path(self, sequence: int, path: Sequence[int]) -> None:
        """Keep row 0 and the accepted path of the last ``view_tree``: one gather, and the
        sequence is longer.

        Slots [0, start) stay, and so does row 0 in slot start; node ``path[i]`` moves from
        start + 1 + path[i] to start + 1 + i, which is never to the right, since parents come
        before their children.
        """
        start = self.lengths[sequence]
        if list(path) != list(range(len(path))):  # a chain lies where it should
            source = asarray_like([start + 1 + node for node in path], self.keys, "int64")
            target = slice(start + 1, start + 1 + len(path))
            # indexing with an array copies, so source and target may overlap
            self.keys[:, sequence, :, :, target] = self.keys[:, sequence][:, :, :, source]
            self.values[:, sequence, :, target] = self.values[:, sequence][:, :, source]
        self.lengths[sequence] = start + 1 + len(path)

    def truncate(self, sequence: int, length: int) -> None:
        """Drop the tokens of a sequence from position ``length`` on (rollback of rejected
        drafts).
        """
        if not 0 <= sequence < len(self.lengths):
            raise InputError(
                f"the cache holds sequences 0..{len(self.lengths) - 1}, got {sequence}"
            )
        if not 0 <= length <= self.lengths[sequence]:
            raise InputError(
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


class _TreeView:
    """One sequence computes a tree of drafts: a row sees every cached token, its ancestors
    and itself.
    """

    def __init__(self, cache: ContiguousCache, sequence: int, tree: TokenTree):
        self.cache = cache
        self.sequence = sequence
        self.start = cache.lengths[sequence]
        self.end = self.start + len(tree) + 1
        if self.end > cache.capacity:
            raise InputError(
                f"{self.start} cached + {len(tree) + 1} tokens of a tree exceed {cache.capacity}"
            )
        like = cache.keys
        xp = namespace(like)
        self.first = self.start  # all rows see every cached slot before this one
        sees = asarray_like(tree.mask(), like, "bool")  # [m+1, m+1]
        if cache.window is not None:  # distances are those of positions, not of rows
            at = asarray_like(tree.positions(self.start), like, "int64")
            since = at[:, None] - cache.window  # [m+1, 1]
            self.first = 0
            sees_cached = xp.arange(self.start)[None, :] > since
            sees = xp.concat([sees_cached, sees & (at[None, :] > since)], axis=1)
        low = xp.asarray(masked_score(xp, like.dtype), dtype=like.dtype)
        zero = xp.asarray(0.0, dtype=like.dtype)
        self.bias = xp.where(sees, zero, low)  # [m+1, S − first]

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Store the rows' keys and values, and attend to all that each row sees."""
        xp = namespace(q)
        cache = self.cache
        count, heads, dim = q.shape
        keys = cache.keys[layer, self.sequence, :, :, : self.end]  # [G, D, S]
        values = cache.values[layer, self.sequence, :, : self.end]  # [G, S, D]
        keys[:, :, self.start :] = k.transpose(1, 2, 0)
        values[:, self.start :] = v.transpose(1, 0, 2)
        groups = keys.shape[0]
        q = q * (1.0 / math.sqrt(dim))
        rows = q.reshape(count, groups, heads // groups, dim).transpose(
            1, 2, 0, 3
        )  # [G, R, m+1, D]
        p = xp.matmul(rows, keys[:, None])  # [G, R, m+1, S]
        p[..., self.first :] += self.bias
        p -= p.max(axis=-1, keepdims=True)
        xp.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        o = xp.matmul(p, values[:, None])  # [G, R, m+1, D]
        return o.transpose(2, 0, 1, 3).reshape(count, heads, dim)
