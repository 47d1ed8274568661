"""Nodes of the radix tree, and the orders in which they are evicted.

The eviction orders are those of SGLang's implementation; ``kv.radix_tree`` is the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass


class Node:
    """One edge of the tree. ``locks`` counts the handles at or below it."""

    __slots__ = (
        "children",
        "created",
        "hits",
        "key",
        "locks",
        "parent",
        "priority",
        "salt",
        "slots",
        "used",
    )

    def __init__(
        self,
        key: tuple[int, ...],
        slots: list[int],
        parent: Node | None,
        now: int,
        priority: float = 0,
        salt: Hashable = None,
    ):
        """``salt`` is that of a root; only roots have no parent."""
        self.key = key
        self.slots = slots
        self.parent = parent
        self.children: dict[Hashable, Node] = {}
        self.locks = 0
        self.hits = 0
        self.created = now
        self.used = now
        self.priority = priority
        self.salt = salt

    def __len__(self) -> int:
        return len(self.key)

    def __bool__(self) -> bool:  # a root has length 0, and must not be falsy
        return True


@dataclass(frozen=True)
class Match:
    """The longest cached prefix: its slots in order, and the node in which it ends (lock
    the node to keep the prefix).
    """

    slots: list[int]
    node: Node

    def __len__(self) -> int:
        return len(self.slots)


# The node with the smallest value is evicted first.
Rank = float | tuple[float, float]
POLICIES: dict[str, Callable[[Node], Rank]] = {
    "lru": lambda n: n.used,
    "lfu": lambda n: (n.hits, n.used),
    "fifo": lambda n: n.created,
    "mru": lambda n: -n.used,
    "filo": lambda n: -n.created,
    "slru": lambda n: (n.hits >= 2, n.used),  # segmented: nodes that were found twice last longer
    "priority": lambda n: (n.priority, n.used),
}
