"""What a run of the scheduler looked like, as plain numbers that a figure draws: batch,
blocks, radix tree.

| record      | rows                                                                                          |
|-------------|-----------------------------------------------------------------------------------------------|
| occupancy   | a step: time, sequences that run and wait, slots used and allocated, tokens read and written   |
| blocks      | a step: for every block of the pool who holds it; FREE, SHARED by several, CACHED by the tree |
| tree        | a node: tokens, locks, hits, and its children                                                 |

Blocks need the plans themselves: trace a simulation without jumps (``Simulator(…,
jumps=False)``).

Left out: what the steps computed (``Engine.on_plan`` has the plans).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from refllm.kv.radix_tree import Node, RadixCache
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.prefix_caching import RadixKVManager
from refllm.simulate.simulator import ExecutedStep

FREE = -1
SHARED = -2
CACHED = -3
COLUMNS = ("time", "running", "waiting", "used", "allocated", "read", "written", "preempted")


class Trace:
    """Hears of every step of a simulation (``on_step=Trace(scheduler)``); ``blocks`` steps
    keep their block table.
    """

    def __init__(self, scheduler: BaseScheduler, *, blocks: int = 0):
        self.scheduler = scheduler
        self.limit = blocks
        self.steps: dict[str, list[float]] = {name: [] for name in COLUMNS}
        self.times: list[float] = []
        # [step][block] → number of a request, in the order of their first step
        self.owners: list[list[int]] = []
        self.numbers: dict[Hashable, int] = {}

    def __call__(self, taken: ExecutedStep) -> None:
        plan = taken.plan
        written = sum(item.samples for item in plan.items)
        # an item that samples reads what is not its own new token; in a jump everything is
        # written
        read = sum(item.count - item.samples for item in plan.items)
        row = (
            taken.end,
            len(plan.items),
            plan.waiting,
            taken.used,
            taken.allocated,
            read,
            written,
            len(plan.preempted),
        )
        for name, value in zip(COLUMNS, row, strict=True):
            self.steps[name].append(value)
        if len(self.owners) < self.limit:
            self.times.append(taken.end)
            self.owners.append(self._holders(taken))

    def occupancy(self) -> dict[str, Any]:
        """The columns, and how many slots there are."""
        return {"slots": self.scheduler.memory.slots, **self.steps}

    def blocks(self) -> dict[str, Any]:
        """Who held which block after which step."""
        return {
            "times": self.times,
            "owners": self.owners,
            "requests": [str(name) for name in self.numbers],
        }

    def _holders(self, taken: ExecutedStep) -> list[int]:
        memory = self.scheduler.memory
        if not isinstance(memory, PagedKVManager):
            raise ValueError(
                "only paged memory has blocks to trace: choose another policy, or trace no blocks"
            )
        held = [FREE] * memory.pool.num_blocks
        if isinstance(memory, RadixKVManager):
            for node in memory.cache.nodes():
                for slot in node.slots[:: memory.block_size]:
                    held[slot // memory.block_size] = CACHED
        tables = {item.name: item.blocks for item in taken.plan.items}
        tables |= {b.key: memory.blocks(b) for b in self.scheduler.running if b.key not in tables}
        for name, blocks in tables.items():
            number = self.numbers.setdefault(name[0], len(self.numbers))
            for block in blocks:
                held[block] = number if held[block] in (FREE, CACHED) else SHARED
        return held


def tree(cache: RadixCache) -> list[dict[str, Any]]:
    """The nodes below the roots, each with its children: {"tokens", "locks", "hits",
    "used", "children"}.
    """
    tops = [
        node for node in cache.nodes() if node.parent is not None and node.parent.parent is None
    ]
    return [_node(node) for node in tops]


def _node(node: Node) -> dict[str, Any]:
    children = [_node(child) for child in node.children.values()]
    return {
        "tokens": len(node),
        "locks": node.locks,
        "hits": node.hits,
        "used": node.used,
        "children": children,
    }
