"""What a run of the scheduler looked like, as plain values that a figure draws: batch,
blocks, radix tree.

| record    | one row per | columns                                                              |
|-----------|-------------|----------------------------------------------------------------------|
| occupancy | step        | time, running and waiting sequences, slots used and allocated,       |
|           |             | tokens read (prefill) and written (decode), preemptions              |
| blocks    | step        | for every block who holds it: a request, or FREE, SHARED by several, |
|           |             | CACHED by the tree alone                                             |
| tree      | node        | tokens, locks, hits, children                                        |

Block tables need every single plan: trace a simulation without jumps
(``Simulator(…, jumps=False)``).

Left out: what the steps computed (``Engine.on_plan`` receives the plans).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypedDict

from refllm.errors import InputError
from refllm.kv.radix_node import Node
from refllm.kv.radix_tree import RadixCache
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.prefix_caching import RadixKVManager
from refllm.simulate.totals import ExecutedStep

FREE = -1
SHARED = -2
CACHED = -3
COLUMNS = ("time", "running", "waiting", "used", "allocated", "read", "written", "preempted")


class TreeNode(TypedDict):
    """A node of a radix tree, as JSON has it."""

    tokens: int
    locks: int
    hits: int
    used: int
    children: list[TreeNode]


class Trace:
    """Records every step of a simulation (``on_step=Trace(scheduler)``), and the block tables
    of the first ``blocks`` steps.
    """

    def __init__(self, scheduler: BaseScheduler, *, blocks: int = 0):
        self.scheduler = scheduler
        self.limit = blocks
        self.steps: dict[str, list[float]] = {name: [] for name in COLUMNS}
        self.times: list[float] = []
        # [step][block] → FREE, SHARED, CACHED or the number of a request
        self.owners: list[list[int]] = []
        self.numbers: dict[Hashable, int] = {}  # of requests, in the order of their first step

    def __call__(self, executed: ExecutedStep) -> None:
        """Record a step or a jump."""
        plan = executed.plan
        # A sampled item writes its new tokens and reads all others; in a jump all are new.
        row = (
            executed.end,
            len(plan.items),
            plan.waiting,
            executed.used,
            executed.allocated,
            sum(item.count - item.samples for item in plan.items),
            sum(item.samples for item in plan.items),
            len(plan.preempted),
        )
        for name, value in zip(COLUMNS, row, strict=True):
            self.steps[name].append(value)
        if len(self.owners) < self.limit:
            self.times.append(executed.end)
            self.owners.append(self._owners_after(executed))

    def occupancy(self) -> dict[str, int | list[float]]:
        """The columns, and the number of slots."""
        return {"slots": self.scheduler.memory.slots, **self.steps}

    def blocks(self) -> dict[str, object]:
        """Who held which block after which step."""
        requests = [str(name) for name in self.numbers]
        return {"times": self.times, "owners": self.owners, "requests": requests}

    def _owners_after(self, executed: ExecutedStep) -> list[int]:
        """The owner of each block; ValueError if memory is not in blocks."""
        memory = self.scheduler.memory
        if not isinstance(memory, PagedKVManager):
            raise InputError(
                "only paged memory has blocks to trace: choose another policy, or trace no blocks"
            )
        owners = [FREE] * memory.pool.num_blocks
        if isinstance(memory, RadixKVManager):
            for node in memory.cache.nodes():
                for slot in node.slots[:: memory.block_size]:
                    owners[slot // memory.block_size] = CACHED
        tables = {item.key: item.blocks for item in executed.plan.items}
        for sequence in self.scheduler.running:
            if sequence.key not in tables:
                tables[sequence.key] = memory.blocks(sequence)
        for (request, _), blocks in tables.items():
            number = self.numbers.setdefault(request, len(self.numbers))
            for block in blocks:
                owners[block] = number if owners[block] in (FREE, CACHED) else SHARED
        return owners


def tree(cache: RadixCache) -> list[TreeNode]:
    """The nodes below the roots, each with its children."""
    below_roots = []
    for node in cache.nodes():
        if node.parent is not None and node.parent.parent is None:
            below_roots.append(_tree_node(node))
    return below_roots


def _tree_node(node: Node) -> TreeNode:
    """One node with all nodes below it."""
    return {
        "tokens": len(node),
        "locks": node.locks,
        "hits": node.hits,
        "used": node.used,
        "children": [_tree_node(child) for child in node.children.values()],
    }
