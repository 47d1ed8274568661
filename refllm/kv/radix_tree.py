"""A radix tree over token prefixes whose edges own slots of the key/value pool:
RadixAttention's prefix cache.

Source: SGLang, Zheng et al. 2024, section 3; page size, locks and eviction orders as its
implementation has them.

| term  | meaning                                 | value                                   |
|-------|-----------------------------------------|-----------------------------------------|
| node  | some consecutive tokens, the edge above | ``tokens[a:b]`` of every prefix through |
|       | it                                      | it                                      |
| slots | indices of their keys and values in the | one integer per token, opaque here      |
|       | pool                                    |                                         |
| page  | ``page_size``: nodes hold whole pages   | children differ in their first page     |
| lock  | number of handles at or below the node  | a locked node is never evicted          |

Ownership, as half-open intervals of one request's tokens, when it inserts [0, n) after it
had matched [0, m): [0, m) belongs to the tree and is locked by the request; of [m, n), the
tree may hold a part [m, e) already (another request was faster), and ``insert`` returns e:
the caller's slots of that part are duplicates, which the caller frees; [e, n) belongs to
the tree from then on, and the tail that fills no page stays with the caller.

Splitting keeps the *lower* node: handles point at it, and everything above stays locked
through it.

Left out: the slots' arrays (``kv.paged``), host-memory tiers, eviction of a part of a leaf.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence

from refllm.errors import InputError, alternatives
from refllm.kv.radix_node import POLICIES, Match, Node, Rank

Tokens = Sequence[int]


class RadixCache:
    """``match``, ``insert``, ``lock``, ``unlock``, ``evict``: linear in the tokens,
    whatever the cache holds.

    ``on_evict(slots)`` is called with the slots of every evicted node; they are free then.

    >>> cache = RadixCache()
    >>> cache.insert([5, 6, 7, 8], slots=[0, 1, 2, 3])
    0
    >>> cache.insert([5, 6, 9], slots=[4, 5, 6])  # splits; slots 4 and 5 stay the caller's
    2
    >>> cache.match([5, 6, 9, 9]).slots
    [0, 1, 6]
    """

    def __init__(
        self,
        page_size: int = 1,
        policy: str = "lru",
        *,
        on_evict: Callable[[list[int]], None] | None = None,
    ) -> None:
        if page_size < 1:
            raise InputError(f"a page holds at least one token, got {page_size}")
        if policy not in POLICIES:
            raise InputError(f"unknown policy {policy!r}; {alternatives(policy, POLICIES)}")
        self.page_size = page_size
        self.policy = policy
        self.on_evict = on_evict
        self.evictable = 0  # tokens in nodes without a lock
        self.protected = 0  # tokens in nodes with a lock
        # counters of tokens; of splits, their number
        self.queried = 0
        self.hit = 0
        self.splits = 0
        self.evicted = 0
        self._clock = 0
        # One tree per salt: tenants never see each other's prefixes. An empty tree is kept only
        # while it is locked; where there is none, a match ends at ``_no_tree``.
        self._roots: dict[Hashable, Node] = {}
        self._no_tree = Node((), [], None, 0)
        self._leaves: dict[Node, None] = {}  # unlocked leaves, which ``evict`` may take

    def match(self, tokens: Tokens, *, salt: Hashable = None, record: bool = True) -> Match:
        """The longest prefix of ``tokens``, in whole pages, that the cache holds under ``salt``.

        A node that matches in part is split, so that the match ends at a node. The whole
        path counts as used now. ``record=False`` changes no counters and no times (for a
        scheduler that sorts by hits).
        """
        now = self._tick()
        node = self._roots.get(salt, self._no_tree)
        slots = []
        for child, common in self._walk(node, tokens):
            node = child if common == len(child) else self._split(child, common)
            # after the split, since the lower part was not used
            if record:
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
        """Insert the whole pages of ``tokens`` with their ``slots``; returns how many
        tokens the tree had already.

        The slots of [0, returned) stay the caller's (see the ownership above), those of
        [returned, whole pages) go to the tree. ValueError if the lengths differ, or a slot
        occurs twice.
        """
        if len(tokens) != len(slots):
            raise InputError(f"insert: {len(tokens)} tokens need as many slots, got {len(slots)}")
        if len(set(slots)) != len(slots):
            raise InputError(
                f"insert: a slot holds one token, but one of the {len(slots)} slots occurs twice"
            )
        now = self._tick()
        node = self._roots.get(salt) or Node((), [], None, now, salt=salt)
        at = 0
        for child, common in self._walk(node, tokens):
            node = child if common == len(child) else self._split(child, common)
            node.used = now
            node.priority = max(node.priority, priority)
            at += common
        end = self._whole(tokens)
        if at < end:  # the rest becomes a new leaf
            if node.parent is None:
                self._roots[salt] = node
            leaf = Node(tuple(tokens[at:end]), list(slots[at:end]), node, now, priority)
            node.children[self._first_page(leaf.key, 0)] = leaf
            self._leaves.pop(node, None)  # no leaf any more
            self._leaves[leaf] = None
            self.evictable += len(leaf)
        return at

    def lock(self, node: Node) -> None:
        """Keep a node and everything above it from eviction until ``unlock``; locks are counted."""
        above: Node | None = node
        while above is not None:
            if above.locks == 0:
                self.evictable -= len(above)
                self.protected += len(above)
                self._leaves.pop(above, None)
            above.locks += 1
            above = above.parent

    def unlock(self, node: Node) -> None:
        """Release one lock. ValueError for a node that is not locked."""
        if node.locks == 0:
            raise InputError("unlock: the node is not locked")
        above: Node | None = node
        while above is not None:
            above.locks -= 1
            if above.locks == 0:
                self.protected -= len(above)
                self.evictable += len(above)
                self._offer(above)
                self._drop_empty(above)
            above = above.parent

    def evict(self, count: int) -> int:
        """Free unlocked leaves, in the policy's order, until ``count`` tokens are free or
        no such leaf is left.

        Returns the tokens freed: whole nodes are evicted, so it may be more. A parent that
        becomes a leaf is a candidate in turn.
        """
        rank = POLICIES[self.policy]
        order = 0
        heap: list[tuple[Rank, int, Node]] = []
        # ``order`` breaks ties, so that nodes are never compared
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
            # a parent without children is a leaf now, and may follow in this very call
            if self._offer(parent):
                order += 1
                heapq.heappush(heap, (rank(parent), order, parent))
            else:
                self._drop_empty(parent)
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
        """Advance the clock of uses."""
        self._clock += 1
        return self._clock

    def _whole(self, tokens: Tokens) -> int:
        """How many tokens fill whole pages."""
        return len(tokens) // self.page_size * self.page_size

    def _first_page(self, tokens: Tokens, at: int) -> Hashable:
        """The key of a child in its parent: the page at tokens[at:]."""
        if self.page_size == 1:
            return tokens[at]
        return tuple(tokens[at : at + self.page_size])

    def _walk(self, node: Node, tokens: Tokens) -> Iterator[tuple[Node, int]]:
        """(child, tokens in common) down from a node; the last pair may share fewer tokens
        than the child holds.
        """
        at = 0
        end = self._whole(tokens)
        while at < end and (child := node.children.get(self._first_page(tokens, at))) is not None:
            common = self._common(child.key, tokens, at, end)
            full = common == len(child)
            # The caller may split a child that matched in part, so the walk ends there.
            yield child, common
            if not full:
                return
            node = child
            at = at + common

    def _common(self, key: tuple[int, ...], tokens: Tokens, at: int, end: int) -> int:
        """Tokens that ``key`` shares with tokens[at:end], in whole pages."""
        length = min(len(key), end - at)
        # equal in most calls: one comparison in C, before the search in Python
        if key[:length] == tuple(tokens[at : at + length]):
            return length // self.page_size * self.page_size
        same = next(i for i in range(length) if key[i] != tokens[at + i])
        return same // self.page_size * self.page_size

    def _split(self, node: Node, at: int) -> Node:
        """Put a new node above ``node`` that takes its first ``at`` tokens; handles to
        ``node`` stay valid.
        """
        parent = node.parent
        assert parent is not None
        upper = Node(node.key[:at], node.slots[:at], parent, node.created, node.priority)
        upper.used = node.used
        upper.hits = node.hits
        upper.locks = node.locks  # every handle of the lower node holds the upper one, too
        parent.children[self._first_page(upper.key, 0)] = upper
        node.key = node.key[at:]
        node.slots = node.slots[at:]
        node.parent = upper
        upper.children[self._first_page(node.key, 0)] = node
        self.splits += 1
        return upper

    def _offer(self, node: Node) -> bool:
        """Make a node a candidate for eviction if it is an unlocked leaf and no root."""
        if node.locks or node.children or node.parent is None:
            return False
        self._leaves[node] = None
        return True

    def _drop_empty(self, node: Node) -> None:
        """Forget a tree if ``node`` is its root, holds no token any more and is not locked."""
        empty = node.parent is None and not node.children and not node.locks
        if empty and self._roots.get(node.salt) is node:
            del self._roots[node.salt]

    def check(self) -> None:
        """AssertionError if an invariant of the tree is broken."""
        size = {True: 0, False: 0}
        leaves = set()
        for node in self.nodes():
            parent = node.parent
            assert parent is not None
            first = self._first_page(node.key, 0)
            assert parent.children[first] is node, "a child has another child's key"
            assert len(node.key) == len(node.slots) > 0, "a node lacks tokens or slots"
            assert len(node.key) % self.page_size == 0, "a node ends within a page"
            below = sum(child.locks for child in parent.children.values())
            assert parent.locks >= below, "a lock below is missing above"
            assert min(node.locks, node.hits) >= 0
            size[node.locks > 0] += len(node)
            if not node.children and not node.locks:
                leaves.add(node)
        assert all(root.children or root.locks for root in self._roots.values()), (
            "an empty tree is kept"
        )
        assert (self.evictable, self.protected) == (size[False], size[True]), "the sizes are wrong"
        assert leaves == set(self._leaves), "the candidates for eviction are wrong"
        slots = [s for node in self.nodes() for s in node.slots]
        assert len(slots) == len(set(slots)), "a slot belongs to two nodes"
