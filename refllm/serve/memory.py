"""What the scheduler knows of memory: may a branch have room for so many more tokens? Five answers to one question.

Sources: Kwon et al. 2023, sections 4.2 to 4.5 (blocks, copy on write, preemption) and 6.1 (the baselines); Zheng et
al. 2024, section 3 (one pool for running sequences and cached prefixes). The blocks, tree and runs are ``kv``'s.

| class        | where tokens lie                  | prefixes                               | runs out     |
|--------------|-----------------------------------|----------------------------------------|--------------|
| ``Paged``    | blocks, taken as they are needed  | forgotten                              | at any step  |
| ``Hashed``   | the same                          | full blocks, found by a chain of hashes| at any step  |
| ``Radix``    | the same                          | pages (= blocks) in a radix tree       | at any step  |
| ``Reserved`` | one run for all it may ever need  | forgotten                              | at admission |
| ``Rectangle``| a row of a padded static batch    | forgotten                              | at admission |

The life of a branch: ``match`` (what is cached of it, without a trace), ``admit`` (take that and room for the first
tokens), then each step ``reserve``, the step itself, ``commit``; ``fork`` for a second continuation; ``release`` at
the end, or when it is preempted and starts over.

Ownership of a branch's tokens: [0, computed) are written and verified, and may be offered to a prefix cache by
``commit``; [computed, computed + count) were reserved for the step under way and are nobody else's business.

A cached prefix can be found from the step after the one that computed it. (vLLM lets a request find blocks that
the same step is about to fill; here a step that fails, or a request that is aborted in it, leaves nothing behind.)

Left out: a second pool, memory beyond this one (``serve.simulate`` has swapping), the arrays (``kv.paged``).
"""

from __future__ import annotations

from typing import Protocol

from refllm.kv.blocks import BlockPool, BlockTable, Key
from refllm.kv.prefix import Hasher, PrefixCache, sha256_key
from refllm.kv.radix import Node, RadixCache
from refllm.serve.request import Branch, Request

Copies = list[tuple[int, int]]


class Memory(Protocol):
    """The seam between scheduling and memory. Only ``admit`` and ``reserve`` can be refused; they change nothing then."""

    block_size: int  # tokens a block; 0: a branch lies in one contiguous run
    shares: bool  # whether ``fork`` works

    def refuses(self, request: Request) -> str | None:
        """Why a request can never be served, however long it waits; None if it can."""

    def match(self, branch: Branch) -> int:
        """Tokens of a waiting branch that are cached, fewer than it has; leaves no trace."""

    def admit(self, branch: Branch, count: int, *, alone: bool) -> bool:
        """Take what ``match`` found and room for ``count`` tokens after it; ``alone`` may use every last block."""

    def reserve(self, branch: Branch, count: int) -> Copies | None:
        """Room for ``count`` tokens from ``computed`` on; what to copy before they are written, None if there is none."""

    def commit(self, branch: Branch) -> None:
        """The branch's tokens [0, computed) are written and verified; what was reserved beyond is given back."""

    def fork(self, parent: Branch, child: Branch) -> None:
        """A second branch with the parent's tokens [0, computed)."""

    def release(self, branch: Branch, *, preempted: bool = False) -> None:
        """Give back everything that the branch holds, if it holds anything."""

    def blocks(self, branch: Branch) -> tuple[int, ...]:
        """Where it lies, as plans state it."""

    @property
    def allocated(self) -> int:
        """Slots that branches hold, used or not."""

    @property
    def slots(self) -> int:
        """Slots that there are."""

    def check(self) -> None:
        """AssertionError if the books do not balance."""


class Paged:
    """Blocks from a pool, as many as the tokens need, and no memory of prefixes.

    ``watermark`` is the share of the pool that stays free when a branch is admitted beside others.
    """

    shares = True

    def __init__(self, pool: BlockPool, *, watermark: float = 0.0):
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark is a share of the pool within [0, 1), got {watermark}")
        self.pool, self.block_size = pool, pool.block_size
        self.spare = int(watermark * pool.num_blocks)
        self._tables: dict[Branch, BlockTable] = {}

    @property
    def slots(self) -> int:
        return self.pool.num_blocks * self.block_size

    @property
    def allocated(self) -> int:
        return self.pool.num_used * self.block_size

    def refuses(self, request: Request) -> str | None:
        # branches that must advance in step must fit beside each other, whatever they come to share
        tokens = -(-request.longest // self.block_size) * self.block_size * (request.n if request.together else 1)
        if tokens <= self.slots:
            return None
        return f"needs {tokens} slots with {request.longest} tokens to keep, and the pool has {self.slots}"

    def match(self, branch: Branch) -> int:
        return 0

    def admit(self, branch: Branch, count: int, *, alone: bool) -> bool:
        table = BlockTable(self.pool)
        if table.needs(count) > self.pool.num_free - (0 if alone else self.spare):
            return False
        table.reserve(count)
        self._tables[branch] = table
        return True

    def reserve(self, branch: Branch, count: int) -> Copies | None:
        table, b = self._tables[branch], self.block_size
        start = table.length
        # the common case first, and fast: the last block has room and no other owner
        if start % b and start + count <= len(table.blocks) * b and self.pool.ref_count(table.blocks[start // b]) == 1:
            return []
        if not self._make_room(table.needs(count)):
            return None
        return table.reserve(count)

    def commit(self, branch: Branch) -> None:
        table = self._tables[branch]
        table.commit(branch.computed - table.length)
        if len(table.blocks) * self.block_size - table.length >= self.block_size:
            table.truncate(table.length)  # room for drafts that were rejected

    def fork(self, parent: Branch, child: Branch) -> None:
        self._tables[child] = self._tables[parent].fork()

    def release(self, branch: Branch, *, preempted: bool = False) -> None:
        table = self._tables.pop(branch, None)
        if table is not None:
            table.free()

    def blocks(self, branch: Branch) -> tuple[int, ...]:
        return tuple(self._tables[branch].blocks)

    def table(self, branch: Branch) -> BlockTable:
        """The table itself, for the cache whose pool this is."""
        return self._tables[branch]

    def _make_room(self, blocks: int) -> bool:
        return blocks <= self.pool.num_free

    def check(self) -> None:
        self.pool.check()
        for branch, table in self._tables.items():
            table.check()
            assert table.length == branch.computed, f"{branch} and its table disagree"


class Hashed(Paged):
    """Paged, with prefixes found by a chain of hashes; a free block is remembered until it is given away."""

    def __init__(self, pool: BlockPool, *, watermark: float = 0.0, hasher: Hasher = sha256_key):
        super().__init__(pool, watermark=watermark)
        self.cache = PrefixCache(pool, hasher)
        self._keys: dict[Branch, list[Key]] = {}  # chains, also of those that wait: a text is hashed once

    def _found(self, branch: Branch) -> list[int]:
        keys = self._keys.setdefault(branch, [])
        return self.cache.match(branch.tokens, salt=branch.request.salt, keys=keys)

    def match(self, branch: Branch) -> int:
        return len(self._found(branch)) * self.block_size

    def admit(self, branch: Branch, count: int, *, alone: bool) -> bool:
        found = self._found(branch)
        available = self.cache.available(found) - (0 if alone else self.spare)
        if -(-count // self.block_size) > available:
            return False
        table = BlockTable(self.pool)
        self.cache.take(table, found, len(branch.tokens))
        table.reserve(count)
        self._tables[branch] = table
        return True

    def commit(self, branch: Branch) -> None:
        super().commit(branch)
        self.cache.insert(self._tables[branch], branch.tokens, self._keys[branch], salt=branch.request.salt)

    def fork(self, parent: Branch, child: Branch) -> None:
        super().fork(parent, child)
        self._keys[child] = self._keys[parent][: self._tables[child].length // self.block_size]

    def release(self, branch: Branch, *, preempted: bool = False) -> None:
        super().release(branch)
        if not preempted:
            self._keys.pop(branch, None)


class Radix(Paged):
    """Paged, with prefixes in a radix tree whose pages are the blocks; the tree is one more owner of what it holds.

    A branch locks the deepest node that it has matched or inserted. What it computed of its prompt is inserted
    step by step, what it generated when it ends: the tree then owns it, and evicts it when blocks are needed.
    """

    def __init__(self, pool: BlockPool, *, watermark: float = 0.0, policy: str = "lru"):
        super().__init__(pool, watermark=watermark)
        self.cache = RadixCache(pool.block_size, policy, on_evict=self._evicted)
        self._nodes: dict[Branch, tuple[Node, int]] = {}  # (locked node, tokens of the branch down to it)

    @property
    def allocated(self) -> int:
        return super().allocated - self.cache.evictable

    def match(self, branch: Branch) -> int:
        return len(self.cache.match(branch.tokens[:-1], salt=branch.request.salt, record=False))

    def admit(self, branch: Branch, count: int, *, alone: bool) -> bool:
        tokens, b = branch.tokens[:-1], self.block_size
        found = self.cache.match(tokens, salt=branch.request.salt, record=False)
        self.cache.lock(found.node)  # before there is room made: what was found must not be evicted for the rest
        if not self._make_room(-(-count // b), 0 if alone else self.spare):
            self.cache.unlock(found.node)
            return False
        found = self.cache.match(tokens, salt=branch.request.salt)  # once more, to be recorded
        table = BlockTable(self.pool)
        table.adopt([slot // b for slot in found.slots[::b]])
        table.reserve(count)
        self._tables[branch], self._nodes[branch] = table, (found.node, len(found))
        return True

    def commit(self, branch: Branch) -> None:
        super().commit(branch)
        if branch.computed <= len(branch.request.prompt):
            self._insert(branch)

    def fork(self, parent: Branch, child: Branch) -> None:
        super().fork(parent, child)
        self._nodes[child] = self._nodes[parent]
        self.cache.lock(self._nodes[child][0])

    def release(self, branch: Branch, *, preempted: bool = False) -> None:
        if branch in self._tables:
            self._insert(branch)
            self.cache.unlock(self._nodes.pop(branch)[0])
        super().release(branch)

    def _insert(self, branch: Branch) -> None:
        """Offer the tree the whole pages of [0, computed); the branch holds the tree's blocks for them from then on."""
        table, b = self._tables[branch], self.block_size
        node, known = self._nodes[branch]
        end = table.length // b * b
        if end <= known:
            return
        request = branch.request
        tokens = branch.tokens[:end]
        had = self.cache.insert(tokens, table.slots(0, end), salt=request.salt, priority=-request.priority)
        found = self.cache.match(tokens, salt=request.salt, record=False)
        # [known, had) the tree had already: duplicates, given up for the tree's; [had, end) are the tree's from now on
        for i in range(known // b, had // b):
            mine, table.blocks[i] = table.blocks[i], self.pool.fork(found.slots[i * b] // b)
            self.pool.free(mine)
        for block in table.blocks[had // b : end // b]:
            self.pool.fork(block)
        self.cache.lock(found.node)
        self.cache.unlock(node)
        self._nodes[branch] = (found.node, end)

    def _make_room(self, blocks: int, spare: int = 0) -> bool:
        if blocks + spare > self.pool.num_free + self.cache.evictable // self.block_size:
            return False
        if blocks > self.pool.num_free:
            self.cache.evict((blocks - self.pool.num_free) * self.block_size)
        return True

    def _evicted(self, slots: list[int]) -> None:
        for slot in slots[:: self.block_size]:
            self.pool.free(slot // self.block_size)

    def check(self) -> None:
        super().check()
        self.cache.check()
        in_tree = [slot // self.block_size for node in self.cache.nodes() for slot in node.slots[:: self.block_size]]
        assert len(set(in_tree)) == len(in_tree), "a block stands twice in the tree"
        assert all(self.pool.ref_count(block) > 0 for block in in_tree), "the tree holds a free block"
        for branch, (node, length) in self._nodes.items():
            assert node.locks > 0
            held = self._tables[branch].blocks[: length // self.block_size]
            assert held == [slot // self.block_size for slot in path_slots(node)[:: self.block_size]]


def path_slots(node: Node) -> list[int]:
    """The slots from the root down to the end of a node."""
    slots: list[int] = []
    step: Node | None = node
    while step is not None:
        slots, step = step.slots + slots, step.parent
    return slots
