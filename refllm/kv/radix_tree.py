"""A radix tree over token prefixes whose edges own slots of the key/value pool:
RadixAttention's prefix cache.

Source: SGLang, Zheng et al. 2024, section 3; page size, locks and eviction orders as its
implementation has them.

| symbol | name                                  | value                                                       |
|--------|---------------------------------------|-------------------------------------------------------------|
| node   | a run of tokens, the edge above it    | ``tokens[a:b]`` of every prefix that passes through         |
| slots  | where their keys and values lie       | one integer a token, opaque here                            |
| page   | ``page_size``: runs are whole pages   | children of a node differ in their first page               |
| lock   | how many handles stand at or below    | a locked node is never evicted                              |

Ownership, as half-open intervals of one request's tokens, when it inserts [0, n) after it
had matched [0, m): [0, m) belongs to the tree and is locked by the request; of [m, n),
``insert`` says how much, [m, e), the tree holds already (another request was faster): those
slots of the caller are duplicates and his to free; [e, n) is the tree's from then on, and
the tail that fills no page stays with the caller.

Splitting keeps the *lower* node: handles point at it, and everything above stays locked
through it.

Left out: the slots' arrays (``kv.paged``), host-memory tiers, eviction of a part of a leaf.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Tokens = Sequence[int]


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
    ):
        self.key = key
        self.slots = slots
        self.parent = parent
        self.children: dict[Hashable, Node] = {}
        self.locks = 0
        self.hits = 0
        self.created = now
        self.used = now
        self.priority = priority

    def __len__(self) -> int:
        return len(self.key)

    def __bool__(self) -> bool:  # a root has no tokens and is a node all the same
        return True


@dataclass(frozen=True)
class Match:
    """The longest cached prefix: its slots in order and the node that it ends in (lock that
    to keep it).
    """

    slots: list[int]
    node: Node

    def __len__(self) -> int:
        return len(self.slots)


# What is evicted first has the smallest value.
POLICIES: dict[str, Callable[[Node], Any]] = {
    "lru": lambda n: n.used,
    "lfu": lambda n: (n.hits, n.used),
    "fifo": lambda n: n.created,
    "mru": lambda n: -n.used,
    "filo": lambda n: -n.created,
    "slru": lambda n: (
        n.hits >= 2,
        n.used,
    ),  # segmented: what was found twice outlives what was not
    "priority": lambda n: (n.priority, n.used),
}


class RadixCache:
    """``match``, ``insert``, ``lock``, ``unlock``, ``evict``: linear in the tokens,
    whatever the cache holds.

    ``on_evict(slots)`` is called with the slots of every node that goes; they are free
    then.
    """

    def __init__(
        self,
        page_size: int = 1,
        policy: str = "lru",
        *,
        on_evict: Callable[[list[int]], None] | None = None,
    ) -> None:
        if page_size < 1:
            raise ValueError(f"a page holds at least one token, got {page_size}")
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
        self.page_size = page_size
        self.policy = policy
        self.on_evict = on_evict
        self.evictable = 0  # tokens in nodes without and with a lock
        self.protected = 0
        self.queried = 0  # counted, in tokens but for the splits
        self.hit = 0
        self.splits = 0
        self.evicted = 0
        self._clock = 0
        # one tree a salt: tenants never see each other's prefixes
        self._roots: dict[Hashable, Node] = {}
        self._leaves: dict[Node, None] = {}  # unlocked leaves, which ``evict`` may take

    def match(self, tokens: Tokens, *, salt: Hashable = None, record: bool = True) -> Match:
        """The longest prefix of ``tokens``, in whole pages, that the cache holds under
        ``salt``.

        A node that matches in part is split, so that the match ends at a node. The whole
        path counts as used now. ``record=False`` looks without leaving a trace in counters
        or times (a scheduler that sorts).
        """
        now = self._tick()
        node = self._root(salt)
        slots = []
        for child, common in self._walk(node, tokens):
            node = child if common == len(child) else self._split(child, common)
            if record:  # after the split: the lower part was not used
                node.used = now
                node.hits = node.hits + 1
            slots += node.slots
        if record:
            self.queried += len(tokens)
            self.hit += len(slots)
        return Match(slots, node)

    def insert(
        self, tokens: Tokens, slots: Sequence[int], *, salt: Hashable = None, priority: float = 0
    ) -> int:
        """Give the tree the whole pages of ``tokens`` with their ``slots``; returns how
        many tokens it had already.

        The slots of [0, returned) stay the caller's (see the ownership above), those of
        [returned, whole pages) go to the tree. ValueError if the lengths differ, or a slot
        stands twice.
        """
        if len(tokens) != len(slots):
            raise ValueError(f"insert: {len(tokens)} tokens need as many slots, got {len(slots)}")
        if len(set(slots)) != len(slots):
            raise ValueError(
                f"insert: a slot holds one token, but one of the {len(slots)} slots stands twice"
            )
        now = self._tick()
        node = self._root(salt)
        at = 0
        for child, common in self._walk(node, tokens):
            node = child if common == len(child) else self._split(child, common)
            node.used = now
            node.priority = max(node.priority, priority)
            at += common
        end = self._whole(tokens)
        if at < end:
            leaf = Node(tuple(tokens[at:end]), list(slots[at:end]), node, now, priority)
            node.children[self._first_page(leaf.key, 0)] = leaf
            self._leaves.pop(node, None)
            self._leaves[leaf] = None
            self.evictable += len(leaf)
        return at

    def lock(self, node: Node) -> None:
        """Keep a node and everything above it from eviction until ``unlock``; locks are
        counted.
        """
        step: Node | None = node
        while step is not None:
            if step.locks == 0:
                self.evictable -= len(step)
                self.protected += len(step)
                self._leaves.pop(step, None)
            step.locks += 1
            step = step.parent

    def unlock(self, node: Node) -> None:
        """Take one lock back. ValueError for a node that is not locked."""
        if node.locks == 0:
            raise ValueError("unlock: the node is not locked")
        step: Node | None = node
        while step is not None:
            step.locks -= 1
            if step.locks == 0:
                self.protected -= len(step)
                self.evictable += len(step)
                self._offer(step)
            step = step.parent

    def evict(self, count: int) -> int:
        """Free unlocked leaves, in the policy's order, until ``count`` tokens are free or
        none is left.

        Returns the tokens freed: whole nodes go, so it may be more. A parent that becomes a
        leaf is next in line.
        """
        rank = POLICIES[self.policy]
        order = 0
        heap: list[tuple[Any, int, Node]] = []
        for order, leaf in enumerate(self._leaves):
            heap.append((rank(leaf), order, leaf))
        heapq.heapify(heap)
        freed = 0
        while heap and freed < count:
            _, _, leaf = heapq.heappop(heap)
            parent = leaf.parent
            assert parent is not None  # a root is never offered
            del parent.children[self._first_page(leaf.key, 0)], self._leaves[leaf]
            freed += len(leaf)
            if self.on_evict is not None:
                self.on_evict(leaf.slots)
            if self._offer(parent):
                order += 1
                heapq.heappush(heap, (rank(parent), order, parent))
        self.evictable -= freed
        self.evicted += freed
        return freed

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents before children."""
        pending = list(self._roots.values())
        while pending:
            node = pending.pop()
            if node.parent is not None:
                yield node
            pending += node.children.values()

    # --- inside ---------------------------------------------------------------------------

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _root(self, salt: Hashable) -> Node:
        if salt not in self._roots:
            self._roots[salt] = Node((), [], None, self._clock)
        return self._roots[salt]

    def _whole(self, tokens: Tokens) -> int:
        return len(tokens) // self.page_size * self.page_size

    def _first_page(self, tokens: Tokens, at: int) -> Hashable:
        if self.page_size == 1:
            return tokens[at]
        return tuple(tokens[at : at + self.page_size])

    def _walk(self, node: Node, tokens: Tokens) -> Iterator[tuple[Node, int]]:
        """(child, tokens in common) down from a node; the last pair may have fewer in
        common than the child holds.
        """
        at = 0
        end = self._whole(tokens)
        while at < end and (child := node.children.get(self._first_page(tokens, at))) is not None:
            common = self._common(child.key, tokens, at, end)
            full = common == len(child)
            # the caller may split the child: what is below it is not ours to follow then
            yield child, common
            if not full:
                return
            node = child
            at = at + common

    def _common(self, key: tuple[int, ...], tokens: Tokens, at: int, end: int) -> int:
        """Tokens that ``key`` shares with tokens[at:end], in whole pages."""
        length = min(len(key), end - at)
        if key[:length] == tuple(tokens[at : at + length]):
            return length // self.page_size * self.page_size
        same = next(i for i in range(length) if key[i] != tokens[at + i])
        return same // self.page_size * self.page_size

    def _split(self, node: Node, at: int) -> Node:
        """Put a new node above ``node`` that takes its first ``at`` tokens; handles to
        ``node`` stay good.
        """
        parent = node.parent
        assert parent is not None
        upper = Node(node.key[:at], node.slots[:at], parent, node.created, node.priority)
        upper.used = node.used
        upper.hits = node.hits
        upper.locks = node.locks
        parent.children[self._first_page(upper.key, 0)] = upper
        node.key, node.slots, node.parent = node.key[at:], node.slots[at:], upper
        upper.children[self._first_page(node.key, 0)] = node
        self.splits += 1
        return upper

    def _offer(self, node: Node) -> bool:
        """List a node among those that may go, if it is an unlocked leaf and no root."""
        if node.locks or node.children or node.parent is None:
            return False
        self._leaves[node] = None
        return True

    def check(self) -> None:
        """AssertionError if the tree breaks a promise."""
        size = {True: 0, False: 0}
        leaves = set()
        for node in self.nodes():
            parent = node.parent
            assert parent is not None
            assert parent.children[self._first_page(node.key, 0)] is node, (
                "a child stands under another's name"
            )
            assert len(node.key) == len(node.slots) > 0, (
                "a node without tokens, or without their slots"
            )
            assert len(node.key) % self.page_size == 0, "a node ends within a page"
            assert parent.locks >= sum(c.locks for c in parent.children.values()), (
                "a lock below is missing above"
            )
            assert min(node.locks, node.hits) >= 0
            size[node.locks > 0] += len(node)
            if not node.children and not node.locks:
                leaves.add(node)
        assert (self.evictable, self.protected) == (size[False], size[True]), "the sizes are wrong"
        assert leaves == set(self._leaves), "the list of what may go is wrong"
        slots = [s for node in self.nodes() for s in node.slots]
        assert len(slots) == len(set(slots)), "a slot belongs to two nodes"
