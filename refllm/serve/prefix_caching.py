"""Paged memory that keeps prefixes: blocks found by a chain of hashes, or pages of a radix tree.

Sources: vLLM's automatic prefix caching, and Zheng et al. 2024 (SGLang), section 3: one
pool for running sequences and for what is cached. The caches themselves are
``kv.hash_prefix`` and ``kv.radix_tree``.

|                         | ``HashKVManager``                | ``RadixKVManager``              |
|-------------------------|----------------------------------|---------------------------------|
| who owns a cached block | no sequence: it counts as free   | the tree, with one reference    |
| what is cached          | full blocks of prompt and output | the same; outputs when finished |
| duplicates of a block   | both stay, the first is found    | the later one is freed          |
| evicted                 | when the pool hands it out       | by the tree, least recent first |
| behind a sliding window | freed, and found until evicted   | kept: the tree holds prefixes   |

A cached prefix can be found from the step after the one that computed it. (vLLM lets a
request find blocks that the same step is about to fill. Here a step that fails, or a
request that is aborted in it, leaves nothing behind.)

Left out: a prefix that is shared while it is computed: see the in-batch rule of
``serve.admission``.
"""

from __future__ import annotations

from refllm.kv.block_pool import BlockPool, BlockTable, Key
from refllm.kv.hash_prefix import Hasher, PrefixCache, sha256_key
from refllm.kv.radix_node import Node
from refllm.kv.radix_tree import RadixCache
from refllm.serve.isolation import RequestFailure
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.request import Sequence


class HashKVManager(PagedKVManager):
    """Paged, with prefixes found by a chain of hashes; a free block stays findable until it
    is handed out again.

    >>> from refllm.serve.request import Request
    >>> memory = HashKVManager(BlockPool(num_blocks=8, block_size=2))
    >>> first = Sequence(Request([1, 2, 3, 4, 5], request_id="first"), index=0, order=0)
    >>> memory.admit(first, 5, alone=True)
    True
    >>> first.computed = 5
    >>> memory.commit(first)
    >>> memory.match(Sequence(Request([1, 2, 3, 4, 9], request_id="second"), index=0, order=1))
    4
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        watermark: float = 0.0,
        window: int | None = None,
        hasher: Hasher = sha256_key,
    ):
        """``hasher`` makes the key of a block; see ``kv.hash_prefix``."""
        super().__init__(pool, watermark=watermark, window=window)
        self.cache = PrefixCache(pool, hasher)
        # hash chains, also of waiting sequences: a prompt is hashed once
        self._keys: dict[Sequence, list[Key]] = {}

    def _find(self, sequence: Sequence) -> list[int]:
        """The cached blocks of the longest prefix. RequestFailure if the hasher raises."""
        keys = self._keys.setdefault(sequence, [])
        findable = readable_length(sequence)
        if not findable:
            return []
        request = sequence.request
        try:
            tokens = sequence.tokens[: findable + 1]  # the last token of them is never found
            return self.cache.match(tokens, salt=request.salt, keys=keys)
        except Exception as error:
            raise RequestFailure(request.request_id, "prefix", error) from error

    def match(self, sequence: Sequence) -> int:
        """Tokens in the blocks that would be found."""
        return len(self._find(sequence)) * self.block_size

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        """Take the cached blocks, and free ones for the next ``count`` tokens."""
        found = self._find(sequence)
        available = self.cache.available(found) - self._headroom(alone)
        if -(-count // self.block_size) > available:
            return False
        table = BlockTable(self.pool)
        self.cache.take(table, found, len(sequence.tokens))
        table.reserve(count)
        self._tables[sequence] = table
        return True

    def _enter_full_blocks(self, sequence: Sequence, table: BlockTable) -> None:
        """RequestFailure if the hasher raises: the tokens are committed then, and no block is
        entered.
        """
        keys = self._keys[sequence]
        request = sequence.request
        try:
            self.cache.extend(keys, sequence.tokens[: table.length], request.salt)
        except Exception as error:
            raise RequestFailure(request.request_id, "prefix", error) from error
        self.cache.insert(table, sequence.tokens, keys, salt=request.salt)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child starts with the hashes of the full blocks that it shares."""
        super().fork(parent, child)
        full = self._tables[child].length // self.block_size
        self._keys[child] = self._keys[parent][:full]

    def forget_prefixes(self) -> None:
        """Drop the key of every block."""
        self.pool.forget_all()

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        """A preempted sequence keeps its hashes: it will look for its blocks again."""
        super().release(sequence)
        if not preempted:
            self._keys.pop(sequence, None)


class RadixKVManager(PagedKVManager):
    """Paged, with prefixes in a radix tree whose pages are the blocks; the tree is one more
    owner of the blocks that it holds.

    A sequence locks the deepest node that it has matched or inserted. Its prompt is inserted
    step by step, its output when it forks or finishes. From then on the tree owns them, and
    evicts them when blocks are needed.
    """

    def __init__(self, pool: BlockPool, *, watermark: float = 0.0, policy: str = "lru"):
        """``policy`` is the tree's order of eviction; see ``kv.radix_tree.POLICIES``."""
        super().__init__(pool, watermark=watermark)
        self.cache = RadixCache(pool.block_size, policy, on_evict=self._evicted)
        # (locked node, tokens of the sequence down to it)
        self._nodes: dict[Sequence, tuple[Node, int]] = {}

    @property
    def allocated(self) -> int:
        """Slots that sequences hold, without those that the tree may evict."""
        return super().allocated - self.cache.evictable

    def match(self, sequence: Sequence) -> int:
        """Tokens that the tree holds, the last one never: its logits must be computed."""
        found = self.cache.match(_findable(sequence), salt=sequence.request.salt, record=False)
        return len(found)

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        """Take the tree's blocks, and free ones for the next ``count`` tokens."""
        tokens = _findable(sequence)
        b = self.block_size
        found = self.cache.match(tokens, salt=sequence.request.salt, record=False)
        # locked first: what was found must not be evicted to make room
        self.cache.lock(found.node)
        if not self._make_room(-(-count // b), self._headroom(alone)):
            self.cache.unlock(found.node)
            return False
        # again, to be recorded; making room may have evicted a tree of which nothing was found,
        # so what is locked is the first match
        self.cache.match(tokens, salt=sequence.request.salt)
        table = BlockTable(self.pool)
        table.adopt(_pages(found.slots, b))
        table.reserve(count)
        self._tables[sequence] = table
        self._nodes[sequence] = (found.node, len(found))
        return True

    def commit(self, sequence: Sequence) -> None:
        """Insert what was computed of the prompt."""
        super().commit(sequence)
        if sequence.computed <= len(sequence.request.prompt):
            self._insert(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Two sequences share a full block only through the tree, which then counts both."""
        self._insert(parent)
        super().fork(parent, child)
        self._nodes[child] = self._nodes[parent]
        self.cache.lock(self._nodes[child][0])

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        """Leave everything that was computed in the tree, unlocked."""
        if sequence in self._tables:
            self._insert(sequence)
            self.cache.unlock(self._nodes.pop(sequence)[0])
        super().release(sequence)

    def forget_prefixes(self) -> None:
        """Evict the whole tree."""
        self.cache.evict(self.cache.evictable)

    def _insert(self, sequence: Sequence) -> None:
        """Insert the whole pages of [0, computed) into the tree; from then on the sequence
        holds the tree's blocks for them.
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
        # The tree had [known, had) already: these duplicates are freed, the tree's blocks
        # take their place. [had, end) were new to the tree, which now owns them, too.
        for i in range(known // b, had // b):
            duplicate = table.blocks[i]
            table.blocks[i] = self.pool.fork(found.slots[i * b] // b)
            self.pool.free(duplicate)
        for block in table.blocks[had // b : end // b]:
            self.pool.fork(block)
        self.cache.lock(found.node)
        self.cache.unlock(node)
        self._nodes[sequence] = (found.node, end)

    def _make_room(self, blocks: int, headroom: int = 0) -> bool:
        """Evict cached pages if free blocks are too few; False if even that does not help."""
        if blocks + headroom > self.pool.num_free + self.cache.evictable // self.block_size:
            return False
        if blocks > self.pool.num_free:
            self.cache.evict((blocks - self.pool.num_free) * self.block_size)
        return True

    def _evicted(self, slots: list[int]) -> None:
        """The tree gives up its reference to each of these blocks."""
        for block in reversed(_pages(slots, self.block_size)):
            self.pool.free(block)

    def _in_tree(self) -> list[int]:
        """The blocks of all nodes."""
        b = self.block_size
        return [block for node in self.cache.nodes() for block in _pages(node.slots, b)]

    def _owned(self) -> list[int]:
        """References of sequences and of the tree."""
        return super()._owned() + self._in_tree()

    def check(self) -> None:
        """The tree owns each of its blocks once, and what sequences hold of it is locked."""
        super().check()
        self.cache.check()
        b = self.block_size
        in_tree = self._in_tree()
        assert len(set(in_tree)) == len(in_tree), "a block stands twice in the tree"
        locked_nodes = [node for node in self.cache.nodes() if node.locks]
        locked = {block for node in locked_nodes for block in _pages(node.slots, b)}
        assert set(super()._owned()) & set(in_tree) <= locked, (
            "the tree may evict what a sequence holds"
        )
        for sequence, (node, length) in self._nodes.items():
            assert node.locks > 0
            first = self._tables[sequence].blocks[: length // b]
            assert first == _pages(_path_slots(node), b)


def readable_length(sequence: Sequence) -> int:
    """How many tokens a sequence may take from a cache: never the last one, which gives logits.

    The log-probability of a prompt token needs the logits of the token before it, so of a
    prompt with ``prompt_logprobs`` only what lies before that may be taken: without a
    ``prompt_logprobs_start`` nothing, as in vLLM.
    """
    output = sequence.request.output
    most = len(sequence.tokens) - 1
    if output.prompt_logprobs is None:
        return most
    return min(most, max(0, output.prompt_logprobs_start - 1))


def _findable(sequence: Sequence) -> list[int]:
    """The tokens that may be taken from the tree."""
    return sequence.tokens[: readable_length(sequence)]


def _pages(slots: list[int], page: int) -> list[int]:
    """The blocks that whole pages lie in."""
    return [slot // page for slot in slots[::page]]


def _path_slots(node: Node) -> list[int]:
    """The slots from the root to the end of a node."""
    slots: list[int] = []
    above: Node | None = node
    while above is not None:
        slots = above.slots + slots
        above = above.parent
    return slots
