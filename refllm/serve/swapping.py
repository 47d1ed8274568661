"""Preemption by swapping: the keys and values of a preempted sequence move to host memory,
and back when it is admitted again.

Source: Kwon et al. 2023, section 4.5. A sequence moves as a whole or not at all, and the
host keeps at most as many blocks as the device has; a sequence that finds no room there is
recomputed.

| preempted by | cost when it leaves      | cost when it returns                   |
|--------------|--------------------------|----------------------------------------|
| recompute    | none                     | a prefill of its prompt and its output |
| swapping     | its blocks over the link | its blocks over the link again         |

To the scheduler a sequence that was swapped out is one with a cached prefix that no other
sequence can find. Only counts move here, and ``simulate.simulator`` charges time for them;
the engine recomputes.

Left out: sharing on the host: sequences of one request that share blocks each move all of
their own.
"""

from __future__ import annotations

from typing import NamedTuple

from refllm.errors import InputError
from refllm.kv.block_pool import BlockPool, BlockTable
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.request import Sequence


class SwapTraffic(NamedTuple):
    """What has gone over the link so far, in both directions together."""

    tokens: int
    blocks: int


class SwappingKVManager(PagedKVManager):
    """Paged; preempted sequences are kept in ``host_blocks`` blocks on the host (default: as
    many as the pool has).
    """

    def __init__(self, pool: BlockPool, *, watermark: float = 0.0, host_blocks: int | None = None):
        """ValueError for a negative ``host_blocks``."""
        super().__init__(pool, watermark=watermark)
        self.host_blocks = pool.num_blocks if host_blocks is None else host_blocks
        if self.host_blocks < 0:
            raise InputError(f"host_blocks must be 0 or more, got {host_blocks}")
        self.host_used = 0
        self.moved = SwapTraffic(0, 0)
        self.swapped = 0  # preempted sequences that moved to the host
        self.dropped = 0  # and those for which it had no room
        self._on_host: dict[Sequence, int] = {}  # tokens of each sequence there

    def match(self, sequence: Sequence) -> int:
        """Tokens that can be swapped in."""
        return self._on_host.get(sequence, 0)

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        """Take blocks for what is on the host and for the next ``count`` tokens."""
        stored = self._on_host.get(sequence, 0)
        table = BlockTable(self.pool)
        if table.needs(stored + count) > self.pool.num_free - self._headroom(alone):
            return False
        table.reserve(stored + count)
        table.commit(stored)
        self._tables[sequence] = table
        self._leave_host(sequence)
        self._count(stored)
        return True

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        """Swap a preempted sequence out if the host has room for all of it."""
        table = self._tables.get(sequence)
        if not preempted:
            self._leave_host(sequence)
        elif table is not None and table.length:
            blocks = self._num_blocks(table.length)
            if self.host_used + blocks <= self.host_blocks:
                self._on_host[sequence] = table.length
                self.host_used += blocks
                self.swapped += 1
                self._count(table.length)
            else:
                self.dropped += 1
        super().release(sequence)

    def forget_prefixes(self) -> None:
        """Drop what is on the host: it is recomputed."""
        for sequence in list(self._on_host):
            self._leave_host(sequence)

    def check(self) -> None:
        """A sequence is on one side of the link only, and the host is not overfull."""
        super().check()
        assert not set(self._on_host) & set(self._tables), "on the host and on the device"
        used = sum(map(self._num_blocks, self._on_host.values()))
        assert self.host_used == used <= self.host_blocks
        for sequence, length in self._on_host.items():
            assert 0 < length < len(sequence.tokens)

    def _num_blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _leave_host(self, sequence: Sequence) -> None:
        """Free a sequence's blocks on the host."""
        self.host_used -= self._num_blocks(self._on_host.pop(sequence, 0))

    def _count(self, tokens: int) -> None:
        """Add to the traffic."""
        moved = self.moved
        self.moved = SwapTraffic(moved.tokens + tokens, moved.blocks + self._num_blocks(tokens))
