"""The interface by which the scheduler asks for KV-cache memory, and ``PagedKVManager``, which
answers with blocks.

Source: Kwon et al. 2023, sections 4.2 to 4.5 (blocks, copy on write, preemption). The
blocks themselves are ``kv.block_pool``.

| class                 | where tokens lie                | prefixes kept      | can run out  |
|-----------------------|---------------------------------|--------------------|--------------|
| ``PagedKVManager``    | blocks, taken when needed       | none               | at any step  |
| ``HashKVManager``     | the same                        | by hash of a block | at any step  |
| ``RadixKVManager``    | the same                        | in a radix tree    | at any step  |
| ``SwappingKVManager`` | the same; preempted on the host | none               | at any step  |
| ``ReservedKVManager`` | a contiguous range per request  | none               | at admission |
| ``PaddedKVManager``   | a row of a padded batch         | none               | at admission |

The first is here; the others are in ``prefix_caching``, ``swapping`` and
``baselines.reservations``.

The life of a sequence: ``match`` (how much of it is cached), ``admit`` (take that, and room
for its first tokens), then in each step ``reserve``, the step itself and ``commit``;
``fork`` for a second continuation; ``release`` when it finishes or is preempted.

Ownership of a sequence's tokens: [0, computed) are written and verified, and ``commit`` may
offer them to a prefix cache; [computed, computed + count) are reserved for the current step
and belong to the sequence alone.

Left out: a second pool, and the arrays (``kv.paged``).
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from refllm.errors import InputError
from refllm.kv.block_pool import BlockPool, BlockTable
from refllm.serve.request import Request, Sequence

Copies = list[tuple[int, int]]


class KVManager(Protocol):
    """The interface between scheduling and memory. ``admit`` and ``reserve`` may fail, and
    change nothing then.
    """

    block_size: int  # tokens per block; 0: a sequence lies in one contiguous range
    can_fork: bool

    def rejection_reason(self, request: Request) -> str | None:
        """Why a request can never be served, even alone; None if it can."""

    def match(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that are cached, fewer than it has; changes nothing."""

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        """Take what ``match`` found and room for ``count`` ≥ 0 tokens after it; ``alone``
        lifts the watermark.
        """

    def reserve(self, sequence: Sequence, count: int) -> Copies | None:
        """Room for ``count`` tokens after ``computed``: the blocks to copy before they are
        written, or None if there is no room.
        """

    def commit(self, sequence: Sequence) -> None:
        """The sequence's tokens [0, computed) are written and verified; free what was
        reserved beyond them.
        """

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a second sequence share the parent's tokens [0, computed)."""

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        """Free everything that the sequence holds, if it holds anything."""

    def blocks(self, sequence: Sequence) -> tuple[int, ...]:
        """The block table, as plans state it."""

    def hold(self, copies: Copies) -> None:
        """Keep the blocks that these copies read as they are until ``unhold``, even if their
        owners release them.
        """

    def unhold(self, copies: Copies) -> None:
        """These copies have been made, or given up."""

    def forget_prefixes(self) -> None:
        """Forget every cached prefix; called while no sequence has memory."""

    @property
    def allocated(self) -> int:
        """Slots that sequences hold, used or not."""

    @property
    def slots(self) -> int:
        """All slots."""

    def check(self) -> None:
        """AssertionError if an invariant is broken."""


class PagedKVManager:
    """Blocks from a pool, as many as the tokens need; prefixes are not kept.

    ``watermark`` is the share of the pool that stays free when a sequence is admitted beside
    others.

    >>> memory = PagedKVManager(BlockPool(num_blocks=4, block_size=2))
    >>> sequence = Sequence(Request([5, 9, 2], max_tokens=8), index=0, order=0)
    >>> memory.admit(sequence, 3, alone=True), memory.allocated, memory.slots
    (True, 4, 8)
    """

    can_fork = True

    def __init__(self, pool: BlockPool, *, watermark: float = 0.0, window: int | None = None):
        """``window`` is the sliding window of the model's layers, behind which blocks are freed.

        ValueError unless ``watermark`` is within [0, 1).
        """
        if not 0 <= watermark < 1:
            raise InputError(f"watermark is a share of the pool within [0, 1), got {watermark}")
        self.pool = pool
        self.block_size = pool.block_size
        self.watermark_blocks = int(watermark * pool.num_blocks)
        self.window = window
        self._tables: dict[Sequence, BlockTable] = {}

    @property
    def slots(self) -> int:
        """All slots of the pool."""
        return self.pool.num_blocks * self.block_size

    @property
    def allocated(self) -> int:
        """Slots in blocks that are in use."""
        return self.pool.num_used * self.block_size

    def rejection_reason(self, request: Request) -> str | None:
        """A request must fit into the empty pool."""
        blocks = -(-request.max_cached_tokens // self.block_size)
        if request.beam:
            # beams advance in the same steps, so all must fit at once, sharing or not
            blocks *= request.n
        slots = blocks * self.block_size
        if slots <= self.slots:
            return None
        return (
            f"needs {slots} slots with {request.max_cached_tokens} tokens to keep, "
            f"and the pool has {self.slots}"
        )

    def match(self, sequence: Sequence) -> int:
        """Nothing is cached."""
        return 0

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        """Take blocks for the first ``count`` tokens."""
        table = BlockTable(self.pool)
        if table.needs(count) > self.pool.num_free - self._headroom(alone):
            return False
        table.reserve(count)
        self._tables[sequence] = table
        return True

    def reserve(self, sequence: Sequence, count: int) -> Copies | None:
        """Take the blocks that ``count`` more tokens need; a shared last block is copied."""
        table = self._tables[sequence]
        b = self.block_size
        start = table.length
        # the common case first, and fast: the last block has room and no other owner
        if (  # mutate: equivalent (a table answers the same, but slower)
            start % b
            and start + count <= len(table.blocks) * b
            and self.pool.ref_count(table.blocks[start // b]) == 1
        ):
            return []
        if not self._make_room(table.needs(count)):
            return None
        return table.reserve(count)

    def commit(self, sequence: Sequence) -> None:
        """Note what was written; free the blocks that only rejected drafts needed."""
        table = self._tables[sequence]
        b = self.block_size
        full = table.length // b
        table.commit(sequence.computed - table.length)
        if len(table.blocks) * b - table.length >= b:
            table.truncate(table.length)
        if table.length // b > full:
            self._enter_full_blocks(sequence, table)
        if self.window is not None and table.length >= self.window:
            # the next token, at position ``length``, sees itself and ``window - 1`` before it
            table.drop_before(table.length - self.window + 1)

    def _enter_full_blocks(self, sequence: Sequence, table: BlockTable) -> None:
        """Blocks have become full; a prefix cache remembers them here, before those behind
        the window are freed: they can be found until they are evicted.
        """

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child holds one more reference to each of the parent's blocks."""
        self._tables[child] = self._tables[parent].fork()

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        """Give up a reference to each block that the sequence holds."""
        table = self._tables.pop(sequence, None)
        if table is not None:
            table.free()

    def blocks(self, sequence: Sequence) -> tuple[int, ...]:
        """The sequence's block table."""
        return tuple(self._tables[sequence].blocks)

    def hold(self, copies: Copies) -> None:
        """Keep the sources of copies from being reallocated before they are read."""
        for source, _ in copies:
            self.pool.hold(source)

    def unhold(self, copies: Copies) -> None:
        """The sources of these copies may be reallocated."""
        for source, _ in copies:
            self.pool.unhold(source)

    def forget_prefixes(self) -> None:
        """Nothing is cached."""

    def _headroom(self, alone: bool) -> int:
        """Blocks that must stay free at an admission."""
        return 0 if alone else self.watermark_blocks

    def _make_room(self, blocks: int) -> bool:
        """Whether that many blocks are free; a prefix cache evicts here."""
        return blocks <= self.pool.num_free

    def _owned(self) -> list[int]:
        """Every reference to a block, one by one."""
        tables = self._tables.values()
        return [block for table in tables for block in table.blocks[table.dropped :]]

    def check(self) -> None:
        """Every reference is counted, every table agrees with its sequence."""
        self.pool.check()
        owners = Counter(self._owned())
        for block in range(self.pool.num_blocks):
            assert self.pool.ref_count(block) == owners[block], (
                "an owner is not counted, or a block has leaked"
            )
        for sequence, table in self._tables.items():
            table.check()
            assert table.length == sequence.computed, f"{sequence} and its table disagree"
