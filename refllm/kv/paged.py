"""The paged cache: keys and values in blocks that any sequence may own, read through block tables.

Sources: PagedAttention, Kwon et al. 2023, sections 4.1 and 4.3; for ``split_attention``
version 2 of its kernel, and Flash-Decoding. The tables and the pool are in
``kv.block_pool``; here are the arrays, and the ``attend`` that reads them.

| symbol | name                                     | shape                     |
|--------|------------------------------------------|---------------------------|
| K, V   | the pool of a layer, slot by slot        | [num_blocks · b, G, D]    |
| b      | ``block_size``                           |                           |
| n_i    | new tokens of sequence i                 | ``counts[i]``             |
| slot   | index in the pool of position p          | ``table.slot(p)``         |

A step is: ``reserve`` (allocates blocks, and copies shared ones that would be written),
``view`` (an ``attend`` that writes positions [length, length + n) and reads [0, length + n)
of each table), the forward pass, ``advance``.

Reading gathers, and so copies, keys and values, which a dedicated kernel does not: on a CPU
a paged step is therefore somewhat slower than a contiguous one of the same batch. Paging
saves memory, and so allows larger batches.

Left out: when blocks behind a sliding window are freed (``serve.kv_manager``); quantised blocks
(``kv.kivi``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from refllm.backend import Array, DType, asarray_like, namespace
from refllm.errors import InputError
from refllm.kv.batched_attention import attend_batched, batched_bias, can_batch
from refllm.kv.block_pool import BlockPool, BlockTable
from refllm.model.attention import Attend, attention, flash_attention, merge
from refllm.model.config import ModelConfig


class Table(Protocol):
    """What a view reads of a sequence: a ``BlockTable``, or a scheduled sequence of a plan
    with its blocks.
    """

    @property
    def blocks(self) -> Sequence[int]:
        """The blocks of the sequence, in order."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    def length(self) -> int:
        """Cached tokens."""

    def slots(self, start: int, stop: int) -> list[int]:
        """The slots of positions [start, stop), in order."""


class PagedKVCache:
    """``num_blocks`` blocks of ``block_size`` tokens for all layers of one network.

    ``poison`` fills a block with NaN as soon as its contents can no longer be read: one
    wrong slot then reaches the logits as NaN instead of as a plausible value.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int = 16,
        *,
        like: Array,
        dtype: DType | None = None,
        poison: bool = False,
    ):
        """``like`` is any array of the library to live on; ``dtype`` defaults to its dtype."""
        self.pool = BlockPool(num_blocks, block_size, on_vacant=self._poison if poison else None)
        xp = namespace(like)
        shape = (
            config.num_hidden_layers,
            num_blocks * block_size,
            config.num_key_value_heads,
            config.head_dim,
        )
        # 0, not uninitialised: a masked value is multiplied by 0, and 0 · NaN is NaN
        empty = math.nan if poison else 0.0
        self.keys: Array = xp.full(shape, empty, dtype=dtype or like.dtype)
        self.values: Array = xp.full(shape, empty, dtype=dtype or like.dtype)
        self.window = config.sliding_window
        self.heads = config.num_attention_heads
        self.copied = 0  # blocks copied before a write; a measure of what sharing costs

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool, used or not."""
        return int(self.keys.nbytes + self.values.nbytes)

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.nbytes // self.pool.num_blocks

    def table(self) -> BlockTable:
        """A new, empty sequence."""
        return BlockTable(self.pool)

    def reserve(self, table: BlockTable, count: int) -> None:
        """Allocate blocks for ``count`` more tokens of a sequence. OutOfBlocks if the pool
        is too small; nothing has changed then.
        """
        self.copy(table.reserve(count))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to) in all layers, which ``BlockTable.reserve`` requests before
        a shared block is written.
        """
        b = self.pool.block_size
        for source, target in pairs:
            read = slice(source * b, (source + 1) * b)
            write = slice(target * b, (target + 1) * b)
            self.keys[:, write] = self.keys[:, read]
            self.values[:, write] = self.values[:, read]
        self.copied += len(pairs)

    def positions(self, tables: Sequence[Table], counts: Sequence[int]) -> list[int]:
        """Positions of the next ``counts[i]`` tokens of every sequence, in the order of the
        ragged batch.
        """
        return [
            p for t, n in zip(tables, counts, strict=True) for p in range(t.length, t.length + n)
        ]

    def view(self, tables: Sequence[Table], counts: Sequence[int]) -> Attend:
        """An ``attend`` for a step in which sequence i contributes ``counts[i]`` ≥ 0
        tokens, reserved before.

        Raises
        ------
        ValueError
            if a token has no slot, or two have the same (a block that is shared and was not
            copied).
        """
        slots: list[int] = []
        for table, n in zip(tables, counts, strict=True):
            slots += table.slots(table.length, table.length + n)
        self._check_slots(tables, counts, slots)
        return _View(self, tables, counts, slots)

    def _check_slots(
        self, tables: Sequence[Table], counts: Sequence[int], slots: list[int]
    ) -> None:
        """ValueError if the step would write a slot twice, one outside the pool, or one of
        a shared block.
        """
        # duplicate indices in an assignment are undefined on a GPU
        if len(set(slots)) != len(slots):
            raise InputError(
                "two tokens of the step have the same slot: reserve each sequence before the view"
            )
        b = self.pool.block_size
        most = self.pool.num_blocks * b
        if slots and (min(slots) < 0 or max(slots) >= most):  # −1 would be the last slot
            raise InputError(
                f"a token lies outside the {most} slots of the pool: {min(slots)}..{max(slots)}"
            )
        if shared := self.pool.shared([slot // b for slot in slots]):
            written = (
                t.blocks
                for t, n in zip(tables, counts, strict=True)
                if any(slot // b == shared[0] for slot in t.slots(t.length, t.length + n))
            )
            raise InputError(
                f"a block of {next(written)} is shared and would be written: reserve it first"
            )

    def advance(self, tables: Sequence[BlockTable], counts: Sequence[int]) -> None:
        """Commit what the last view wrote."""
        for table, count in zip(tables, counts, strict=True):
            table.commit(count)

    def _poison(self, block: int) -> None:
        """Fill a block with NaN in all layers."""
        rows = slice(block * self.pool.block_size, (block + 1) * self.pool.block_size)
        self.keys[:, rows] = math.nan
        self.values[:, rows] = math.nan


class _View:
    """Writes the step's keys and values, then reads: the sequences with one new token in
    one batch, the others one by one.

    Where all sequences contribute equally many tokens, they are one batch, as in a
    contiguous cache.
    """

    def __init__(
        self, cache: PagedKVCache, tables: Sequence[Table], counts: Sequence[int], write: list[int]
    ):
        self.cache = cache
        like = cache.keys
        self.write = asarray_like(write, like, "int64")  # [T], slots of the new tokens
        starts = [0, *accumulate(counts)]  # the first row of each sequence
        busy = [i for i, n in enumerate(counts) if n]
        firsts = [self._first(table) for table in tables]
        lengths = [tables[i].length - firsts[i] for i in busy]  # that are read
        all_batched = can_batch([counts[i] for i in busy], lengths, cache.heads)
        batch = [i for i in busy if all_batched or counts[i] == 1]
        self.one_by_one = [  # (rows of the step, cached tokens, slots [S]) of each sequence
            (
                slice(starts[i], starts[i + 1]),
                tables[i].length - firsts[i],
                asarray_like(
                    tables[i].slots(firsts[i], tables[i].length + counts[i]), like, "int64"
                ),
            )
            for i in busy
            if not (all_batched or counts[i] == 1)
        ]
        self.all_batched = all_batched
        self.rows: Array | None = None  # of the batch, beside sequences that are not in it
        if batch:
            if not all_batched:
                self.rows = asarray_like([starts[i] for i in batch], like, "int64")
            self.slots, self.bias = self._gather(
                [tables[i] for i in batch], [firsts[i] for i in batch], counts[batch[0]]
            )

    def _first(self, table: Table) -> int:
        """The first position that is read: under a sliding window the beginning of the block
        in which the window of the first new token begins. Earlier blocks may be freed.

        Attention sees differences of positions alone, so what is read may count from here.
        """
        window = self.cache.window
        b = self.cache.pool.block_size
        if window is None or table.block_size != b:
            return 0
        return max(0, table.length - window + 1) // b * b

    def _gather(
        self, tables: list[Table], firsts: list[int], count: int
    ) -> tuple[Array, Array | None]:
        """Slots [B, S] of B sequences with ``count`` new tokens each, from position
        ``firsts[i]`` on, and the bias that hides the padding.

        A shorter sequence is padded with its own first slot: a hidden value is multiplied
        by 0, and 0 · NaN of another block would be NaN.
        """
        like = self.cache.keys
        lengths = [t.length - first for t, first in zip(tables, firsts, strict=True)]
        longest = max(lengths) + count
        bias = batched_bias(lengths, count, self.cache.window, like)
        xp = namespace(like)
        b = self.cache.pool.block_size
        if any(t.block_size != b for t in tables):  # slot ranges of the baselines without paging
            rows = [t.slots(0, n + count) for t, n in zip(tables, lengths, strict=True)]
            rows = [row + [row[0]] * (longest - len(row)) for row in rows]
            return asarray_like(rows, like, "int64"), bias
        # Blocks are moved, not slots: those would be B · S Python integers per step.
        width = -(-longest // b)
        host = []
        for table, first, n in zip(tables, firsts, lengths, strict=True):
            blocks = table.blocks[first // b : first // b + width]
            host.append((n + count, *blocks, *([blocks[0]] * (width - len(blocks)))))
        moved = asarray_like(host, like, "int64")  # [B, 1 + width], one transfer for both
        slots = moved[:, 1:, None] * b + xp.arange(b)  # [B, width, b]
        slots = xp.reshape(slots, (len(tables), -1))[:, :longest]  # [B, S]
        return xp.where(xp.arange(longest) < moved[:, :1], slots, slots[:, :1]), bias

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        xp = namespace(q)
        cache = self.cache
        keys = cache.keys[layer]  # [slots, G, D]
        values = cache.values[layer]
        keys[self.write] = k
        values[self.write] = v
        if self.all_batched:
            return self._attend_batch(q, keys, values)
        out = xp.empty_like(q)
        if self.rows is not None:
            out[self.rows] = self._attend_batch(q[self.rows], keys, values)
        for rows, start, slots in self.one_by_one:
            seen = xp.take(keys, slots, axis=0), xp.take(values, slots, axis=0)  # [S, G, D]
            out[rows] = flash_attention(q[rows], *seen, start=start, window=cache.window)[0]
        return out

    def _attend_batch(self, q: Array, keys: Array, values: Array) -> Array:
        """Gather the batch's keys and values, and attend to transposed views of them: only the
        gathering copies.
        """
        xp = namespace(q)
        k = xp.take(keys, self.slots, axis=0).transpose(0, 2, 3, 1)  # [B, G, D, S]
        v = xp.take(values, self.slots, axis=0).transpose(0, 2, 1, 3)  # [B, G, S, D]
        return attend_batched(q, k, v, self.bias)


def split_attention(
    q: Array,
    keys: Array,
    values: Array,
    slots: Array,
    *,
    start: int,
    window: int | None = None,
    parts: int = 512,
) -> tuple[Array, Array]:
    """Attention of q[T, H, D] over ``slots`` of a pool [slots, G, D], ``parts`` tokens at a
    time, merged by lse.

    The parts are independent, so a GPU computes them in parallel where one sequence would
    leave it idle; returns o[T, H, D] and lse[T, H] as ``attention`` does. Equal to one pass
    for every size of the parts.
    """
    xp = namespace(q, keys, values, slots)
    o = xp.zeros_like(q)
    lse = xp.full(q.shape[:2], -math.inf, dtype=q.dtype)  # with o = 0 the identity of merge
    for first in range(0, int(slots.shape[0]), parts):
        part = slots[first : first + parts]
        seen = xp.take(keys, part, axis=0), xp.take(values, part, axis=0)
        o, lse = merge(o, lse, *attention(q, *seen, start=start, window=window, first_key=first))
    return o, lse
