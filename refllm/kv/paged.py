"""The paged cache: keys and values in blocks that any sequence may own, read through block
tables.

Source: PagedAttention, Kwon et al. 2023, sections 4.1 and 4.3; split keys, its kernel's
second version and Flash-Decoding. The tables and the pool are ``kv.block_pool``; here are
the arrays, and the ``attend`` that reads them.

| symbol | name                                        | shape                     |
|--------|---------------------------------------------|---------------------------|
| K, V   | the pool of a layer, slot by slot           | [num_blocks · b, G, D]    |
| b      | ``block_size``                              |                           |
| n_i    | new tokens of sequence i                    | ``counts[i]``             |
| slot   | where position p of a sequence lies         | ``table.slot(p)``         |

A step is: ``reserve`` (allocates, and copies what would be written while shared), ``view``
(an ``attend`` that writes positions [length, length + n) and reads [0, length + n) of each
table), the forward pass, ``advance``.

A gather copies what it reads, which a kernel of its own does not: on a CPU a paged step is
therefore somewhat slower than a contiguous one of the same batch. What paging buys is the
batch.

Left out: freeing blocks that a sliding window has passed; quantised blocks (``kv.kivi``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from refllm.backend import Array, asarray_like, namespace
from refllm.kv.batched_attention import attend_together, bias_together, fits_together
from refllm.kv.block_pool import BlockPool, BlockTable
from refllm.model.attention import Attend, attention, flash_attention, merge
from refllm.model.config import ModelConfig


class Table(Protocol):
    """What a view reads of a sequence: ``BlockTable`` has it, and so has an item of a plan
    that says where it lies.
    """

    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def block_size(self) -> int: ...
    @property
    def length(self) -> int: ...
    def slots(self, start: int, stop: int) -> list[int]: ...


class PagedKVCache:
    """``num_blocks`` blocks of ``block_size`` tokens for all layers of one network.

    ``poison`` fills a block with NaN as soon as nobody can read it any more: one wrong slot
    then reaches the logits as NaN instead of as a plausible number.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int = 16,
        *,
        like: Array,
        dtype: Any = None,
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
        empty = math.nan if poison else 0.0
        self.keys: Array = xp.full(shape, empty, dtype=dtype or like.dtype)
        self.values: Array = xp.full(shape, empty, dtype=dtype or like.dtype)
        self.window = config.sliding_window
        self.heads = config.num_attention_heads
        self.copied = 0  # blocks copied before a write

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool, whatever is used."""
        return int(self.keys.nbytes + self.values.nbytes)

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.nbytes // self.pool.num_blocks

    def table(self) -> BlockTable:
        """A new, empty sequence."""
        return BlockTable(self.pool)

    def reserve(self, table: BlockTable, count: int) -> None:
        """Make room for ``count`` more tokens of a sequence. OutOfBlocks if there is none;
        nothing has changed then.
        """
        self.copy(table.reserve(count))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to) in all layers, as ``BlockTable.reserve`` asks before a
        shared one is written.
        """
        b = self.pool.block_size
        for source, target in pairs:
            for strip in (self.keys, self.values):
                strip[:, target * b : (target + 1) * b] = strip[:, source * b : (source + 1) * b]
        self.copied += len(pairs)

    def positions(self, tables: Sequence[Table], counts: Sequence[int]) -> list[int]:
        """Positions of the next ``counts[i]`` tokens of every sequence, in the order of the
        ragged batch.
        """
        return [
            p for t, n in zip(tables, counts, strict=True) for p in range(t.length, t.length + n)
        ]

    def view(self, tables: Sequence[Table], counts: Sequence[int]) -> Attend:
        """An ``attend`` for a step in which sequence i brings ``counts[i]`` ≥ 0 tokens,
        reserved before.

        Raises
        ------
        ValueError
            if a token has no slot, or two have the same (a block that is shared and was not
            copied).
        """
        slots: list[int] = []
        for table, n in zip(tables, counts, strict=True):
            slots += table.slots(table.length, table.length + n)
        # duplicate indices in an assignment are undefined on a GPU
        if len(set(slots)) != len(slots):
            raise ValueError(
                "two tokens of the step have the same slot: reserve each sequence before the view"
            )
        b = self.pool.block_size
        most = self.pool.num_blocks * self.pool.block_size
        if slots and (min(slots) < 0 or max(slots) >= most):  # −1 would be the last slot
            raise ValueError(
                f"a token lies outside the {most} slots of the pool: {min(slots)}..{max(slots)}"
            )
        if shared := self.pool.shared([slot // b for slot in slots]):
            written = (
                t.blocks
                for t, n in zip(tables, counts, strict=True)
                if any(slot // b == shared[0] for slot in t.slots(t.length, t.length + n))
            )
            raise ValueError(
                f"a block of {next(written)} is shared and would be written: reserve it first"
            )
        return _View(self, tables, counts, slots)

    def advance(self, tables: Sequence[BlockTable], counts: Sequence[int]) -> None:
        """Commit what the last view wrote."""
        for table, count in zip(tables, counts, strict=True):
            table.commit(count)

    def _poison(self, block: int) -> None:
        rows = slice(block * self.pool.block_size, (block + 1) * self.pool.block_size)
        self.keys[:, rows] = math.nan
        self.values[:, rows] = math.nan


class _View:
    """Writes the step's keys and values, then reads: those that bring one token together,
    the others one by one.

    Where all bring equally many, they attend together, as in a contiguous cache.
    """

    def __init__(
        self, cache: PagedKVCache, tables: Sequence[Table], counts: Sequence[int], write: list[int]
    ):
        self.cache = cache
        like = cache.keys
        self.write = asarray_like(write, like, "int64")
        starts = []
        at = 0
        for n in counts:
            starts.append(at)
            at += n
        busy = [i for i, n in enumerate(counts) if n]
        all_together = fits_together(
            [counts[i] for i in busy], [tables[i].length for i in busy], cache.heads
        )
        joined = busy if all_together else [i for i in busy if counts[i] == 1]
        alone = [] if all_together else [i for i in busy if counts[i] != 1]
        self.apart = [
            (
                slice(starts[i], starts[i] + counts[i]),
                tables[i].length,
                asarray_like(tables[i].slots(0, tables[i].length + counts[i]), like, "int64"),
            )
            for i in alone
        ]
        self.joined: Any = None  # the rows that attend together
        if joined:
            if all_together:
                self.joined = slice(0, at)
            else:
                self.joined = asarray_like([starts[i] for i in joined], like, "int64")
            self.slots, self.bias = self._gathered([tables[i] for i in joined], counts[joined[0]])

    def _gathered(self, tables: list[Table], count: int) -> tuple[Array, Array | None]:
        """Slots [B, S] of B sequences that bring ``count`` tokens each, and the bias that
        hides the padding.

        A shorter sequence is padded with a slot of its own: what is hidden is multiplied by
        0, and 0 · NaN is NaN.
        """
        lengths = [t.length for t in tables]
        longest = max(lengths) + count
        bias = bias_together(lengths, count, self.cache.window, self.cache.keys)
        xp = namespace(self.cache.keys)
        b = self.cache.pool.block_size
        if any(t.block_size != b for t in tables):  # runs of slots, in the baselines before paging
            rows = [t.slots(0, n + count) for t, n in zip(tables, lengths, strict=True)]
            rows = [row + [row[0]] * (longest - len(row)) for row in rows]
            return asarray_like(rows, self.cache.keys, "int64"), bias
        # blocks; as a list of slots this would be B · S Python numbers a step
        wide = -(-longest // b)
        host = [
            (n + count, *t.blocks[:wide], *([t.blocks[0]] * (wide - len(t.blocks))))
            for t, n in zip(tables, lengths, strict=True)
        ]
        placed = asarray_like(host, self.cache.keys, "int64")  # one transfer for both
        slots = xp.reshape(placed[:, 1:, None] * b + xp.arange(b), (len(tables), -1))[:, :longest]
        return xp.where(xp.arange(longest) < placed[:, :1], slots, slots[:, :1]), bias

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        xp = namespace(q)
        cache = self.cache
        keys = cache.keys[layer]
        values = cache.values[layer]
        keys[self.write] = k
        values[self.write] = v
        if self.joined is not None and not self.apart:
            return self._together(q, keys, values)
        out = xp.empty_like(q)
        if self.joined is not None:
            out[self.joined] = self._together(q[self.joined], keys, values)
        for rows, start, slots in self.apart:
            seen = xp.take(keys, slots, axis=0), xp.take(values, slots, axis=0)
            out[rows] = flash_attention(q[rows], *seen, start=start, window=cache.window)[0]
        return out

    def _together(self, q: Array, keys: Array, values: Array) -> Array:
        """Gather the strips of the sequences, [B, S, G, D], and read them as columns and
        rows, without a copy.
        """
        xp = namespace(q)
        k = xp.take(keys, self.slots, axis=0)
        v = xp.take(values, self.slots, axis=0)
        return attend_together(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), self.bias)


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

    Each part needs nothing of the others, so a GPU computes them side by side where one
    sequence would leave it idle; returns o[T, H, D] and lse[T, H] as ``attention`` does.
    Equal to one pass for every size of the parts.
    """
    xp = namespace(q, keys, values, slots)
    o = xp.zeros_like(q)
    lse = xp.full(q.shape[:2], -math.inf, dtype=q.dtype)
    for first in range(0, int(slots.shape[0]), parts):
        part = slots[first : first + parts]
        seen = xp.take(keys, part, axis=0), xp.take(values, part, axis=0)
        o, lse = merge(o, lse, *attention(q, *seen, start=start, window=window, first_key=first))
    return o, lse
