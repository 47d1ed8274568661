"""Preemption by swapping: the keys and values of a preempted sequence move to host memory,
and back when it returns.

Source: Kwon et al. 2023, section 4.5. All of a sequence moves or nothing, and the host keeps
at most as many blocks as the device has: what finds no room there is computed anew.

| preempted by | costs when it leaves      | costs when it comes back                         |
|--------------|---------------------------|--------------------------------------------------|
| recompute    | nothing                   | a prefill of its prompt and of what it has said  |
| swapping     | its blocks over the link  | its blocks over the link again                   |

To the scheduler a sequence that was swapped out is one with a cached prefix, which nobody
else can find. Here only numbers move; ``simulate.simulator`` puts a clock to them. The
engine recomputes.

Left out: sequences of one request that share blocks stay apart on the host (each moves all
of its own).
"""

from __future__ import annotations

from typing import NamedTuple

from refllm.kv.block_pool import BlockPool, BlockTable
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.request import Sequence


class SwapTraffic(NamedTuple):
    """What went over the link, in either direction, since the beginning."""

    tokens: int
    blocks: int


class SwappingKVManager(PagedKVManager):
    """PagedKVManager, and what is preempted is kept on the host, in ``host_blocks`` blocks (default:
    as many as here).
    """

    def __init__(self, pool: BlockPool, *, watermark: float = 0.0, host_blocks: int | None = None):
        super().__init__(pool, watermark=watermark)
        if host_blocks is None:
            self.host_blocks = pool.num_blocks
        else:
            self.host_blocks = host_blocks
        if self.host_blocks < 0:
            raise ValueError(f"host_blocks must be 0 or more, got {host_blocks}")
        self.host_used = 0
        self.moved = SwapTraffic(0, 0)
        self.swapped = 0  # counted: sequences that left for the host, and those it had no room for
        self.dropped = 0
        self._away: dict[Sequence, int] = {}  # tokens of each sequence on the host

    def match(self, sequence: Sequence) -> int:
        return self._away.get(sequence, 0)

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        stored = self._away.get(sequence, 0)
        table = BlockTable(self.pool)
        if table.needs(stored + count) > self.pool.num_free - (0 if alone else self.spare):
            return False
        table.reserve(stored + count)
        table.commit(stored)
        self._tables[sequence] = table
        self._forget(sequence, moved=True)
        return True

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        table = self._tables.get(sequence)
        if not preempted:
            self._forget(sequence, moved=False)
        elif table is not None and table.length:
            blocks = self._blocks(table.length)
            if self.host_used + blocks <= self.host_blocks:
                self._away[sequence] = table.length
                self.host_used += blocks
                self.swapped += 1
                self._count(table.length)
            else:
                self.dropped += 1
        super().release(sequence)

    def check(self) -> None:
        super().check()
        assert not set(self._away) & set(self._tables), "a sequence is here and away"
        assert self.host_used == sum(map(self._blocks, self._away.values())) <= self.host_blocks
        assert all(0 < length < len(sequence.tokens) for sequence, length in self._away.items())

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _forget(self, sequence: Sequence, *, moved: bool) -> None:
        """The host gives its blocks of a sequence up."""
        stored = self._away.pop(sequence, 0)
        self.host_used -= self._blocks(stored)
        if moved:
            self._count(stored)

    def _count(self, tokens: int) -> None:
        self.moved = SwapTraffic(self.moved.tokens + tokens, self.moved.blocks + self._blocks(tokens))
