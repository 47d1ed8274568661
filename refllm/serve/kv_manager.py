"""What the scheduler knows of memory: may a sequence have room for so many more tokens? Here
answered with blocks.

Source: Kwon et al. 2023, sections 4.2 to 4.5 (blocks, copy on write, preemption). The
blocks are ``kv.block_pool``.

| class (file)                       | where tokens lie                 | prefixes                   | runs out     |
|------------------------------------|----------------------------------|----------------------------|--------------|
| ``PagedKVManager`` (here)                   | blocks, taken as they are needed | forgotten                  | at any step  |
| ``HashKVManager`` (``serve.prefix_caching``)    | the same                         | full blocks, by their hash | at any step  |
| ``RadixKVManager`` (``serve.prefix_caching``)     | the same                         | pages of a radix tree      | at any step  |
| ``ReservedKVManager`` (``.reservations``)   | one run for all it may ever need | forgotten                  | at admission |
| ``PaddedKVManager`` (``.reservations``)  | a row of a padded static batch   | forgotten                  | at admission |

The life of a sequence: ``match`` (what is cached of it, without a trace), ``admit`` (take
that and room for the first tokens), then each step ``reserve``, the step itself,
``commit``; ``fork`` for a second continuation; ``release`` at the end, or when it is
preempted and starts over.

Ownership of a sequence's tokens: [0, computed) are written and verified, and may be offered
to a prefix cache by ``commit``; [computed, computed + count) were reserved for the step
under way and are nobody else's business.

Left out: a second pool, memory beyond this one (``simulate.simulator`` has swapping), the
arrays (``kv.paged``).
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from refllm.kv.block_pool import BlockPool, BlockTable
from refllm.serve.request import Request, Sequence

Copies = list[tuple[int, int]]


class KVManager(Protocol):
    """The seam between scheduling and memory. ``admit`` and ``reserve`` can be refused, and
    change nothing then.
    """

    block_size: int  # tokens a block; 0: a sequence lies in one contiguous run
    shares: bool  # whether ``fork`` works

    def refuses(self, request: Request) -> str | None:
        """Why a request can never be served, however long it waits; None if it can."""

    def match(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that are cached, fewer than it has; leaves no trace."""

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        """Take what ``match`` found and room for ``count`` ≥ 0 tokens after it; ``alone``
        may use every last block.
        """

    def reserve(self, sequence: Sequence, count: int) -> Copies | None:
        """Room for ``count`` tokens after ``computed``: what to copy before they are
        written; None if there is none.
        """

    def commit(self, sequence: Sequence) -> None:
        """The sequence's tokens [0, computed) are written and verified; what was reserved
        beyond is given back.
        """

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """A second sequence with the parent's tokens [0, computed)."""

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        """Give back everything that the sequence holds, if it holds anything."""

    def blocks(self, sequence: Sequence) -> tuple[int, ...]:
        """Where it lies, as plans state it."""

    @property
    def allocated(self) -> int:
        """Slots that sequences hold, used or not."""

    @property
    def slots(self) -> int:
        """Slots that there are."""

    def check(self) -> None:
        """AssertionError if the books do not balance."""


class PagedKVManager:
    """Blocks from a pool, as many as the tokens need, and no memory of prefixes.

    ``watermark`` is the share of the pool that stays free when a sequence is admitted beside
    others.
    """

    shares = True

    def __init__(self, pool: BlockPool, *, watermark: float = 0.0):
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark is a share of the pool within [0, 1), got {watermark}")
        self.pool = pool
        self.block_size = pool.block_size
        self.spare = int(watermark * pool.num_blocks)
        self._tables: dict[Sequence, BlockTable] = {}

    @property
    def slots(self) -> int:
        return self.pool.num_blocks * self.block_size

    @property
    def allocated(self) -> int:
        return self.pool.num_used * self.block_size

    def refuses(self, request: Request) -> str | None:
        # beams advance in step, so they must fit beside each other, whatever they come to
        # share
        tokens = (
            -(-request.longest // self.block_size)
            * self.block_size
            * (request.n if request.beam else 1)
        )
        if tokens <= self.slots:
            return None
        return f"needs {tokens} slots with {request.longest} tokens to keep, and the pool has {self.slots}"

    def match(self, sequence: Sequence) -> int:
        return 0

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        table = BlockTable(self.pool)
        if table.needs(count) > self.pool.num_free - (0 if alone else self.spare):
            return False
        table.reserve(count)
        self._tables[sequence] = table
        return True

    def reserve(self, sequence: Sequence, count: int) -> Copies | None:
        table = self._tables[sequence]
        b = self.block_size
        start = table.length
        # the common case first, and fast: the last block has room and no other owner
        if (
            start % b
            and start + count <= len(table.blocks) * b
            and self.pool.ref_count(table.blocks[start // b]) == 1
        ):
            return []
        if not self._make_room(table.needs(count)):
            return None
        return table.reserve(count)

    def commit(self, sequence: Sequence) -> None:
        table = self._tables[sequence]
        table.commit(sequence.computed - table.length)
        if len(table.blocks) * self.block_size - table.length >= self.block_size:
            table.truncate(table.length)  # room for drafts that were rejected

    def fork(self, parent: Sequence, child: Sequence) -> None:
        self._tables[child] = self._tables[parent].fork()

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        table = self._tables.pop(sequence, None)
        if table is not None:
            table.free()

    def blocks(self, sequence: Sequence) -> tuple[int, ...]:
        return tuple(self._tables[sequence].blocks)

    def _make_room(self, blocks: int) -> bool:
        return blocks <= self.pool.num_free

    def _owned(self) -> list[int]:
        """Every reference to a block, one by one."""
        return [block for table in self._tables.values() for block in table.blocks]

    def check(self) -> None:
        self.pool.check()
        owners = Counter(self._owned())
        for block in range(self.pool.num_blocks):
            assert self.pool.ref_count(block) == owners[block], (
                "an owner is not counted, or a block has leaked"
            )
        for sequence, table in self._tables.items():
            table.check()
            assert table.length == sequence.computed, f"{sequence} and its table disagree"
