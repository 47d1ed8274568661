"""Blocks of key/value memory: a reference-counted pool, and the table that maps a sequence onto it.

Sources: PagedAttention, Kwon et al. 2023, sections 4.2 to 4.5 (tables, sharing, copy on
write); the free list that remembers contents, vLLM's automatic prefix caching.

| symbol | name                                | value                                        |
|--------|-------------------------------------|----------------------------------------------|
| b      | ``block_size``, tokens per block    |                                              |
| p      | position of a token in its sequence | in block ``table[p // b]`` at offset p % b   |
| slot   | index of a token in the whole pool  | ``table[p // b] · b + p % b``                |

A block is *owned* (one reference per table that has it) or *free*. A free block may still be
*remembered* under a key: its contents are valid until it is allocated again, and ``fork``
takes it back. Free blocks are allocated in the order in which they became free, so remembered
contents are evicted least recently used first. A block that a copy has still to read is
*held*: it does not become free with its last owner, but when the hold ends.

Everything here is Python integers: it can be tested, traced and drawn without a model.
``kv.paged`` holds the arrays.

Left out: swapping (``serve`` moves whole sequences), more than one pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from refllm.errors import InputError

Key = Hashable

NO_BLOCK = -1  # in a table, where a block was freed behind a sliding window


class OutOfBlocks(RuntimeError):
    """The pool has too few free blocks; nothing was changed. Free some, or wait until a
    sequence ends.
    """


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` tokens with reference counts; every operation
    is O(1).

    A freed block that is remembered can be found and taken back:

    >>> pool = BlockPool(2, block_size=4)
    >>> block = pool.allocate()
    >>> pool.remember(block, "key")
    >>> pool.free(block)
    >>> pool.num_free, pool.fork(pool.find("key")) == block, pool.num_free
    (2, True, 1)
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, on_vacant: Callable[[int], None] | None = None
    ):
        """``on_vacant(id)`` is called when a block's contents can no longer be read: it has
        no owner and no key.
        """
        sizes = (num_blocks, block_size)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise InputError(
                "BlockPool: needs a block of at least one token, "
                f"got {num_blocks!r} of {block_size!r}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_vacant = on_vacant
        self._references = [0] * num_blocks
        self._holds: dict[int, int] = {}  # block → copies that have still to read it
        # in the order of allocation
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._key_of: dict[int, Key] = {}
        # blocks with equal contents, of which ``find`` returns the first
        self._holders: dict[Key, dict[int, None]] = {}
        # counters of the cost: allocations, free blocks taken back, keys evicted, and the
        # most blocks in use
        self.allocated = 0
        self.revived = 0
        self.forgotten = 0
        self.peak = 0

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` could return, remembered ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one owner."""
        return self.num_blocks - len(self._free)

    def ref_count(self, block: int) -> int:
        """How many tables own the block."""
        return self._references[self._checked(block)]

    def shared(self, blocks: Sequence[int]) -> list[int]:
        """Those of ``blocks`` that several tables own."""
        return [block for block in blocks if self._references[block] > 1]

    def allocate(self) -> int:
        """Take the block that has been free the longest, and forget its key. OutOfBlocks if
        no block is free.
        """
        if not self._free:
            raise OutOfBlocks(f"all {self.num_blocks} blocks are in use")
        block, _ = self._free.popitem(last=False)
        self._forget(block)  # its contents are about to be overwritten
        self._references[block] = 1
        self.allocated += 1
        self.peak = max(self.peak, self.num_used)
        return block

    def fork(self, block: int) -> int:
        """Add an owner; a free block that is remembered is taken back. ValueError for a
        free block that is not.
        """
        if self._references[self._checked(block)] == 0:
            if block not in self._key_of:
                raise InputError(f"block {block} is free and holds nothing: allocate it first")
            # O(1): an OrderedDict, where a deque would be searched; a held one is not in it
            self._free.pop(block, None)
            self.revived += 1
            self.peak = max(self.peak, self.num_used)
        self._references[block] += 1
        return block

    def free(self, block: int) -> None:
        """Remove an owner; a block without owners is free.

        A remembered block is last in line to be allocated, one without a key first, as its
        contents are of no further use. ValueError for a block without an owner.
        """
        if self._references[self._checked(block)] == 0:
            raise InputError(f"block {block} is free already")
        self._references[block] -= 1
        if self._references[block] == 0 and block not in self._holds:
            self._make_free(block)

    def _make_free(self, block: int) -> None:
        """Put a block that has lost its last owner into the queue of free blocks."""
        self._free[block] = None  # last in the queue
        if block not in self._key_of:
            self._free.move_to_end(block, last=False)
            self._vacant(block)

    # --- contents that outlive their owners -----------------------------------------------

    def hold(self, block: int) -> None:
        """Keep the contents of an owned block until ``unhold``, whatever becomes of its
        owners: a copy has still to read it. Holds are counted.
        """
        if self._references[self._checked(block)] == 0:
            raise InputError(f"block {block} is free: there is nothing to hold")
        self._holds[block] = self._holds.get(block, 0) + 1

    def unhold(self, block: int) -> None:
        """End a hold; a block that has lost all owners meanwhile becomes free."""
        if self._checked(block) not in self._holds:
            raise InputError(f"block {block} is not held")
        self._holds[block] -= 1
        if self._holds[block] == 0:
            del self._holds[block]
            if self._references[block] == 0 and block not in self._free:
                self._make_free(block)

    def remember(self, block: int, key: Key) -> None:
        """Record the key of an owned block's contents, so that ``find(key)`` returns it;
        several blocks may have one key.
        """
        if self._references[self._checked(block)] == 0:
            raise InputError(f"block {block} is free: what it holds may be overwritten")
        if block in self._key_of:
            raise InputError(f"block {block} is remembered already")
        self._key_of[block] = key
        self._holders.setdefault(key, {})[block] = None

    def find(self, key: Key) -> int | None:
        """The first of the blocks remembered under a key, owned or free; None if there is none."""
        return next(iter(self._holders.get(key, ())), None)

    def forget_all(self) -> None:
        """Drop every key: nothing that is cached is found any more."""
        for block in list(self._key_of):
            self._forget(block)

    def key_of(self, block: int) -> Key | None:
        """The key that a block is remembered under; None if it has none."""
        return self._key_of.get(self._checked(block))

    def _forget(self, block: int) -> None:
        """Drop the key of a block, if it has one."""
        if block not in self._key_of:
            return
        key = self._key_of.pop(block)
        del self._holders[key][block]
        if not self._holders[key]:
            del self._holders[key]
        self.forgotten += 1
        if self._references[block] == 0:
            self._vacant(block)

    def _vacant(self, block: int) -> None:
        """Report that a block's contents can no longer be read."""
        if self.on_vacant is not None:
            self.on_vacant(block)

    def _checked(self, block: int) -> int:
        """The block's id; ValueError if the pool does not have it."""
        if not 0 <= block < self.num_blocks:  # −1 would be the last block
            raise InputError(f"the pool has blocks 0..{self.num_blocks - 1}, got {block}")
        return block

    def check(self) -> None:
        """AssertionError if an invariant is broken: every block is free, owned or held, every
        key has its block.
        """
        owned = {b for b, count in enumerate(self._references) if count > 0}
        assert min(self._references) >= 0, "a reference count is negative"
        assert owned.isdisjoint(self._free), "a block is both owned and free"
        assert not set(self._holds) & set(self._free), "a block is both held and free"
        assert len(owned | set(self._holds)) + len(self._free) == self.num_blocks, "a block is lost"
        assert {b: key for key, blocks in self._holders.items() for b in blocks} == self._key_of, (
            "keys disagree"
        )
        assert all(self._holders.values()), "a key without a block"


class BlockTable:
    """The blocks of one sequence, in order: positions [0, length) lie in them, and positions
    [length, capacity) can be written.

    A block before the last is full and never written again, so sharing it is safe; the last
    one, if it is partly filled and shared, is copied before the first write (``reserve``
    returns which blocks to copy). Under a sliding window ``drop_before`` frees the blocks that
    no query will see again; the others keep their places.

    >>> table = BlockTable(BlockPool(4, block_size=2))
    >>> table.reserve(3)
    []
    >>> table.commit(3)
    >>> child = table.fork()  # shares both blocks; the second one is only half full
    >>> child.reserve(1)  # copy block 1 to block 2 before position 3 is written
    [(1, 2)]
    >>> table.blocks, child.blocks, child.slots(0, 4)
    ([0, 1], [0, 2], [0, 1, 4, 5])
    """

    def __init__(self, pool: BlockPool):
        self.pool = pool
        self.blocks: list[int] = []  # the first ``dropped`` are ``NO_BLOCK``
        self.length = 0
        self.dropped = 0

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.pool.block_size

    @property
    def capacity(self) -> int:
        """Tokens that fit into the blocks held."""
        return len(self.blocks) * self.pool.block_size

    def _copies(self, count: int) -> bool:
        """Whether writing ``count`` tokens begins within a block that other tables own."""
        if count == 0 or self.length % self.pool.block_size == 0:
            return False
        return self.pool.ref_count(self.blocks[self.length // self.pool.block_size]) > 1

    def needs(self, count: int) -> int:
        """How many free blocks ``reserve(count)`` would take."""
        whole = -(-(self.length + count) // self.pool.block_size)
        return max(0, whole - len(self.blocks)) + self._copies(count)

    def reserve(self, count: int) -> list[tuple[int, int]]:
        """Make positions [length, length + count) writable. Returns (from, to) of blocks
        whose contents to copy.

        The copies must be made, in all layers, before anything is written. OutOfBlocks if
        the pool is too small at the moment; nothing has changed then.
        """
        if count < 0:
            raise InputError(f"reserve: count must be 0 or more, got {count}")
        # checked before anything changes, so that a failed call has no effect
        if (needed := self.needs(count)) > self.pool.num_free:
            raise OutOfBlocks(
                f"{needed} blocks are needed for {count} tokens, {self.pool.num_free} are free"
            )
        copies = []
        if self._copies(count):
            at = self.length // self.pool.block_size
            fresh = self.pool.allocate()  # copy on write
            copies.append((self.blocks[at], fresh))
            self.pool.free(self.blocks[at])  # it has another owner: never the last reference
            self.blocks[at] = fresh
        while self.capacity < self.length + count:
            self.blocks.append(self.pool.allocate())
        return copies

    def adopt(self, blocks: list[int]) -> None:
        """Begin an empty table with full blocks that another table filled (a prefix-cache hit)."""
        if self.blocks:
            raise InputError("only an empty table can begin with the blocks of another")
        self.blocks = [self.pool.fork(block) for block in blocks]
        self.length = self.capacity

    def commit(self, count: int) -> None:
        """Count ``count`` tokens as written at the end."""
        if not 0 <= count <= self.capacity - self.length:
            raise InputError(
                f"{count} tokens were not reserved: {self.length} of {self.capacity} are used"
            )
        self.length += count

    def truncate(self, length: int) -> None:
        """Drop the tokens from position ``length`` on, and free the blocks that become
        empty, the last one first.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"the sequence has {self.length} tokens, cannot keep {length}")
        self.length = length
        # the last block first, so that of a remembered prefix the end is evicted first
        while len(self.blocks) > -(-length // self.pool.block_size):
            block = self.blocks.pop()
            if block != NO_BLOCK:
                self.pool.free(block)
        self.dropped = min(self.dropped, len(self.blocks))

    def drop_before(self, position: int) -> None:
        """Free the blocks in which every token stands before ``position``: they are never read
        again.

        >>> table = BlockTable(BlockPool(4, block_size=2))
        >>> table.reserve(5), table.commit(5), table.drop_before(3)
        ([], None, None)
        >>> table.blocks, table.pool.num_free
        ([-1, 1, 2], 2)
        """
        last = min(position, self.length) // self.pool.block_size
        for at in range(self.dropped, last):
            self.pool.free(self.blocks[at])
            self.blocks[at] = NO_BLOCK
        self.dropped = max(self.dropped, last)

    def fork(self) -> BlockTable:
        """A second sequence with the same tokens: every block gets one more owner, nothing
        is copied.
        """
        child = BlockTable(self.pool)
        # blocks that were reserved and not written stay with the parent
        used = -(-self.length // self.pool.block_size)
        held = self.blocks[self.dropped : used]
        child.blocks = [NO_BLOCK] * self.dropped + [self.pool.fork(block) for block in held]
        child.length = self.length
        child.dropped = self.dropped
        return child

    def free(self) -> None:
        """Free all blocks, the last one first, so that the end of a remembered prefix is
        evicted before its beginning.
        """
        self.truncate(0)

    def slot(self, position: int) -> int:
        """The slot of a position in the pool."""
        if not 0 <= position < self.capacity:
            raise InputError(f"position {position} is not within the {self.capacity} reserved")
        b = self.pool.block_size
        if position // b < self.dropped:
            raise InputError(f"position {position} is behind the window: its block was dropped")
        return self.blocks[position // b] * b + position % b

    def slots(self, start: int, stop: int) -> list[int]:
        """The slots of positions [start, stop), in order."""
        return [self.slot(p) for p in range(start, stop)]

    def check(self) -> None:
        """AssertionError if an invariant of the table is broken."""
        assert 0 <= self.length <= self.capacity
        assert self.blocks[: self.dropped] == [NO_BLOCK] * self.dropped
        held = self.blocks[self.dropped :]
        assert len(set(held)) == len(held), "a table holds a block twice"
        assert all(self.pool.ref_count(b) > 0 for b in held), "a table holds a free block"
