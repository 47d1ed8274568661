"""Paged memory that remembers prefixes: blocks found by a chain of hashes, or pages of a
radix tree.

Sources: vLLM's automatic prefix caching, and Zheng et al. 2024 (SGLang), section 3: one
pool for those who run and for what is cached. The caches themselves are ``kv.hash_prefix``
and ``kv.radix_tree``.

|                          | ``HashKVManager``                              | ``RadixKVManager``                                    |
|--------------------------|-----------------------------------------|----------------------------------------------|
| who owns a cached block  | nobody: it is free, and found           | the tree, one reference                      |
| what is cached           | full blocks of prompt and output        | the same; of the output once it has ended    |
| equal blocks, side by side | both stay, the first is found         | the later one is given up for the tree's     |
| evicted                  | when the pool gives the block away      | by the tree, before the pool gives any       |

A cached prefix can be found from the step after the one that computed it. (vLLM lets a
request find blocks that the same step is about to fill; here a step that fails, or a
request that is aborted in it, leaves nothing behind.)

Left out: a prefix that is shared while it is computed: see the in-batch rule of
``serve.admission``.
"""

from __future__ import annotations

from refllm.kv.block_pool import BlockPool, BlockTable, Key
from refllm.kv.hash_prefix import Hasher, PrefixCache, sha256_key
from refllm.kv.radix_tree import Node, RadixCache
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.request import Sequence


class HashKVManager(PagedKVManager):
    """PagedKVManager, with prefixes found by a chain of hashes; a free block is remembered until it
    is given away.
    """

    def __init__(self, pool: BlockPool, *, watermark: float = 0.0, hasher: Hasher = sha256_key):
        super().__init__(pool, watermark=watermark)
        self.cache = PrefixCache(pool, hasher)
        # chains, also of those that wait: a text is hashed once
        self._keys: dict[Sequence, list[Key]] = {}

    def _found(self, sequence: Sequence) -> list[int]:
        keys = self._keys.setdefault(sequence, [])
        return self.cache.match(sequence.tokens, salt=sequence.request.salt, keys=keys)

    def match(self, sequence: Sequence) -> int:
        return len(self._found(sequence)) * self.block_size

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        found = self._found(sequence)
        available = self.cache.available(found) - (0 if alone else self.spare)
        if -(-count // self.block_size) > available:
            return False
        table = BlockTable(self.pool)
        self.cache.take(table, found, len(sequence.tokens))
        table.reserve(count)
        self._tables[sequence] = table
        return True

    def commit(self, sequence: Sequence) -> None:
        table = self._tables[sequence]
        full = table.length // self.block_size
        super().commit(sequence)
        if table.length // self.block_size > full:
            self.cache.insert(table, sequence.tokens, self._keys[sequence], salt=sequence.request.salt)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        super().fork(parent, child)
        self._keys[child] = self._keys[parent][: self._tables[child].length // self.block_size]

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        super().release(sequence)
        if not preempted:
            self._keys.pop(sequence, None)


class RadixKVManager(PagedKVManager):
    """PagedKVManager, with prefixes in a radix tree whose pages are the blocks; the tree is one more
    owner of what it holds.

    A sequence locks the deepest node that it has matched or inserted. What it computed of its
    prompt is inserted step by step, what it generated when it forks or ends: the tree then
    owns it, and evicts it when blocks are needed.
    """

    def __init__(self, pool: BlockPool, *, watermark: float = 0.0, policy: str = "lru"):
        super().__init__(pool, watermark=watermark)
        self.cache = RadixCache(pool.block_size, policy, on_evict=self._evicted)
        # (locked node, tokens of the sequence down to it)
        self._nodes: dict[Sequence, tuple[Node, int]] = {}

    @property
    def allocated(self) -> int:
        return super().allocated - self.cache.evictable

    def match(self, sequence: Sequence) -> int:
        return len(self.cache.match(sequence.tokens[:-1], salt=sequence.request.salt, record=False))

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        tokens = sequence.tokens[:-1]
        b = self.block_size
        found = self.cache.match(tokens, salt=sequence.request.salt, record=False)
        # before there is room made: what was found must not be evicted for the rest
        self.cache.lock(found.node)
        if not self._make_room(-(-count // b), 0 if alone else self.spare):
            self.cache.unlock(found.node)
            return False
        found = self.cache.match(tokens, salt=sequence.request.salt)  # once more, to be recorded
        table = BlockTable(self.pool)
        table.adopt(_pages(found.slots, b))
        table.reserve(count)
        self._tables[sequence] = table
        self._nodes[sequence] = (found.node, len(found))
        return True

    def commit(self, sequence: Sequence) -> None:
        super().commit(sequence)
        if sequence.computed <= len(sequence.request.prompt):
            self._insert(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        # two sequences share a full block only through the tree, which then knows its owners
        self._insert(parent)
        super().fork(parent, child)
        self._nodes[child] = self._nodes[parent]
        self.cache.lock(self._nodes[child][0])

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        if sequence in self._tables:
            self._insert(sequence)
            self.cache.unlock(self._nodes.pop(sequence)[0])
        super().release(sequence)

    def _insert(self, sequence: Sequence) -> None:
        """Offer the tree the whole pages of [0, computed); the sequence holds the tree's
        blocks for them from then on.
        """
        table = self._tables[sequence]
        b = self.block_size
        node, known = self._nodes[sequence]
        end = table.length // b * b
        if end <= known:
            return
        request = sequence.request
        tokens = sequence.tokens[:end]
        had = self.cache.insert(
            tokens, table.slots(0, end), salt=request.salt, priority=-request.priority
        )
        found = self.cache.match(tokens, salt=request.salt, record=False)
        # [known, had) the tree had already: duplicates, given up for the tree's; [had, end)
        # are the tree's from now on
        for i in range(known // b, had // b):
            mine = table.blocks[i]
            table.blocks[i] = self.pool.fork(found.slots[i * b] // b)
            self.pool.free(mine)
        for block in table.blocks[had // b : end // b]:
            self.pool.fork(block)
        self.cache.lock(found.node)
        self.cache.unlock(node)
        self._nodes[sequence] = (found.node, end)

    def _make_room(self, blocks: int, spare: int = 0) -> bool:
        if blocks + spare > self.pool.num_free + self.cache.evictable // self.block_size:
            return False
        if blocks > self.pool.num_free:
            self.cache.evict((blocks - self.pool.num_free) * self.block_size)
        return True

    def _evicted(self, slots: list[int]) -> None:
        for block in reversed(_pages(slots, self.block_size)):
            self.pool.free(block)

    def _in_tree(self) -> list[int]:
        return [
            block for node in self.cache.nodes() for block in _pages(node.slots, self.block_size)
        ]

    def _owned(self) -> list[int]:
        return super()._owned() + self._in_tree()

    def check(self) -> None:
        super().check()
        self.cache.check()
        in_tree = self._in_tree()
        assert len(set(in_tree)) == len(in_tree), "a block stands twice in the tree"
        locked = {
            block
            for node in self.cache.nodes()
            if node.locks
            for block in _pages(node.slots, self.block_size)
        }
        assert set(super()._owned()) & set(in_tree) <= locked, (
            "the tree may evict what a sequence holds"
        )
        for sequence, (node, length) in self._nodes.items():
            assert node.locks > 0
            first = self._tables[sequence].blocks[: length // self.block_size]
            assert first == _pages(_path_slots(node), self.block_size)


def _pages(slots: list[int], page: int) -> list[int]:
    """The blocks that whole pages lie in."""
    return [slot // page for slot in slots[::page]]


def _path_slots(node: Node) -> list[int]:
    """The slots from the root down to the end of a node."""
    slots: list[int] = []
    step: Node | None = node
    while step is not None:
        slots = step.slots + slots
        step = step.parent
    return slots
