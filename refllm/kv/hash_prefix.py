"""A prefix cache by hashing: a full block of tokens is identified by a chain of hashes, and
found by its hash.

Sources: vLLM's automatic prefix caching (its block pool and its design notes): chained
keys, a salt in the first block, full blocks only, one token always left to compute. The
blocks are ``kv.block_pool``.

| symbol | name                                     | value                                   |
|--------|------------------------------------------|-----------------------------------------|
| b      | ``block_size``                           |                                         |
| k_i    | key of the full block i of a sequence    | H(k_{i−1}, tokens[i·b : (i+1)·b], salt  |
|        |                                          | if i = 0)                               |
| k_{−1} | parent of the first block                | a constant                              |
| hit    | leading blocks that are found, in tokens | a multiple of b, at most the length − 1 |

Equal keys are taken for equal prefixes, so H must be collision resistant: sha256. The salt
is hashed into the first block and reaches the others through the chain: tenants with
different salts share nothing.

Ownership: the cache owns no block. It gives keys to blocks that a table owns (``insert``);
a block with a key whose last owner has gone is free *and* found, until the pool allocates
it again. That is the eviction: least recently freed first, and of one sequence the end
first, since tables free their blocks in reverse.

A sequence of 2·b tokens that is cached completely still has its last block recomputed: the
hit is in whole blocks, and one token must be computed to have logits.

Left out: other extras than a salt (adapters, images); deduplicating equal blocks that two
sequences compute side by side (tables are append-only: both stay, the first is found); a
random root key (sha256 does not need one).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from hashlib import sha256

from refllm.errors import InputError
from refllm.kv.block_pool import BlockPool, BlockTable, Key

# (parent's key, the block's tokens, salt or None) → key
Hasher = Callable[[Key, Sequence[int], Hashable], Key]

ROOT = sha256(b"refllm.kv.hash_prefix").digest()


def sha256_key(parent: Key, tokens: Sequence[int], salt: Hashable) -> Key:
    """The default H: 32 bytes of sha256 over the parent, 8 bytes per token, and the salt (a
    string) if there is one.

    The parent always has 32 bytes, and a salt is marked by at least one byte, so different
    inputs never give the same bytes. ValueError for another parent or salt.
    """
    if not isinstance(parent, bytes) or not (salt is None or isinstance(salt, str)):
        raise InputError(
            f"sha256_key: needs the parent's 32 bytes and a salt that is a string, got {salt!r}"
        )
    message = parent + array("q", tokens).tobytes()
    if salt is not None:
        # "surrogatepass": a lone surrogate is a string, too, and UTF-8 alone cannot encode it
        message += b"\1" + salt.encode("utf-8", "surrogatepass")
    return sha256(message).digest()


class PrefixCache:
    """``match``, ``take``, ``insert`` over a pool: linear in the sequence's blocks,
    whatever the pool holds.

    >>> pool = BlockPool(8, block_size=2)
    >>> cache, table = PrefixCache(pool), BlockTable(pool)
    >>> table.reserve(4), table.commit(4)
    ([], None)
    >>> cache.insert(table, [5, 6, 7, 8], keys=[])
    >>> cache.match([5, 6, 7, 8, 9]), cache.match([5, 6, 1, 1, 1]), cache.match([5, 6])
    ([0, 1], [0], [])
    """

    def __init__(self, pool: BlockPool, hasher: Hasher = sha256_key):
        self.pool = pool
        self.hasher = hasher
        self.queried = 0  # tokens asked for and found, counted where a hit is taken
        self.hit = 0

    def extend(self, keys: list[Key], tokens: Sequence[int], salt: Hashable = None) -> list[Key]:
        """Append the keys of the full blocks of ``tokens`` that ``keys``, the chain so far,
        lacks.
        """
        b = self.pool.block_size
        for i in range(len(keys), len(tokens) // b):
            keys.append(self._next_key(keys, tokens, salt, i))
        return keys

    def match(
        self, tokens: Sequence[int], *, salt: Hashable = None, keys: list[Key] | None = None
    ) -> list[int]:
        """The blocks of the longest cached prefix, at most len(tokens) − 1 tokens of it;
        changes nothing in the pool.

        ``keys`` is the chain of the same sequence if the caller keeps it: it is extended as
        far as the search goes, so a sequence that is matched again is not hashed again.
        """
        chain = [] if keys is None else keys
        found: list[int] = []
        # one token is always left to compute, for its logits
        for i in range(max(0, len(tokens) - 1) // self.pool.block_size):
            if i == len(chain):
                chain.append(self._next_key(chain, tokens, salt, i))
            block = self.pool.find(chain[i])
            if block is None:
                break  # a longer prefix cannot be cached: its keys contain this one
            found.append(block)
        return found

    def available(self, blocks: Sequence[int]) -> int:
        """How many blocks the pool could allocate *after* ``blocks``, a match, were taken:
        its free ones are not counted.
        """
        # free blocks of the match would be taken back, not allocated
        return self.pool.num_free - sum(self.pool.ref_count(block) == 0 for block in blocks)

    def take(self, table: BlockTable, blocks: list[int], length: int) -> None:
        """Begin a table with the match of a sequence of ``length`` tokens, before anything
        is allocated for it.

        An allocation that came first could evict the very blocks that were matched.
        """
        table.adopt(blocks)
        self.queried += length
        self.hit += table.length

    def insert(
        self, table: BlockTable, tokens: Sequence[int], keys: list[Key], *, salt: Hashable = None
    ) -> None:
        """Give keys to the full blocks of ``table``, which holds ``tokens[:table.length]``;
        ``keys`` is that sequence's chain.

        All tokens of the table must be computed and verified: a block with a key is found
        at once.
        """
        full = table.length // self.pool.block_size
        if full <= table.dropped:
            return
        if len(keys) >= full and self.pool.key_of(table.blocks[full - 1]) is not None:
            return  # no block has become full since
        new = full
        # keys are given in order, so the blocks [0, new) have theirs
        while new > table.dropped and self.pool.key_of(table.blocks[new - 1]) is None:
            new -= 1
        self.extend(keys, tokens[: full * self.pool.block_size], salt)
        for i in range(new, full):
            self.pool.remember(table.blocks[i], keys[i])

    def _next_key(self, keys: list[Key], tokens: Sequence[int], salt: Hashable, i: int) -> Key:
        """k_i, with the chain up to k_{i−1} in ``keys``."""
        b = self.pool.block_size
        block = tokens[i * b : (i + 1) * b]
        if i == 0:
            return self.hasher(ROOT, block, salt)
        return self.hasher(keys[i - 1], block, None)
