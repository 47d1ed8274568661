"""A prefix cache by hashing: a full block of tokens is named by a chain of hashes, and
found by its name.

Sources: vLLM's automatic prefix caching (its block pool and its design notes): chained
keys, a salt in the first block, full blocks only, one token always left to compute. The
blocks are ``kv.block_pool``.

| symbol | name                                        | value                                                  |
|--------|---------------------------------------------|--------------------------------------------------------|
| b      | ``block_size``                              |                                                        |
| k_i    | key of the full block i of a text           | H(k_{i−1}, tokens[i·b : (i+1)·b], salt if i = 0)       |
| k_{−1} | parent of the first block                   | a constant                                             |
| hit    | leading blocks that are found, in tokens    | a multiple of b, at most the text's length − 1         |

Equal keys are taken for equal prefixes, so H must be one that nobody can make collide:
sha256. The salt is hashed into the first block and reaches the others through the chain:
tenants with different salts share nothing.

Ownership: the cache owns no block. It names blocks that a table owns (``insert``); a named
block whose last owner has gone is free *and* found, until the pool gives it to somebody
else: that is the eviction, least recently freed first, and of one text the end first, since
tables free their blocks in reverse.

A text of 2·b tokens that is cached whole still has its last block computed anew: the hit is
in whole blocks, and one token must be computed to have logits.

Left out: other extras than a salt (adapters, images); one copy of equal blocks that two
sequences compute side by side (tables are append-only: both stay, the first is found); a
random root key (sha256 does not need one).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from hashlib import sha256

from refllm.kv.block_pool import BlockPool, BlockTable, Key

# (parent's key, the block's tokens, salt or None) → key
Hasher = Callable[[Key, Sequence[int], Hashable], Key]

ROOT = sha256(b"refllm.kv.hash_prefix").digest()


def sha256_key(parent: Key, tokens: Sequence[int], salt: Hashable) -> Key:
    """The default H: 32 bytes of sha256 over the parent, 8 bytes a token, and the salt (a
    string) if there is one.

    The parent always has 32 bytes and a salt at least one, its mark: no two different
    inputs spell the same bytes.
    """
    if not isinstance(parent, bytes) or not (salt is None or isinstance(salt, str)):
        raise ValueError(
            f"sha256_key: needs the parent's 32 bytes and a salt that is a string, got {salt!r}"
        )
    text = parent + array("q", tokens).tobytes()
    return sha256(text if salt is None else text + b"\1" + salt.encode()).digest()


class PrefixCache:
    """``match``, ``take``, ``insert`` over a pool: linear in the text's blocks, whatever
    the pool holds.
    """

    def __init__(self, pool: BlockPool, hasher: Hasher = sha256_key):
        self.pool = pool
        self.hasher = hasher
        self.queried = 0  # tokens asked for and found, counted where a hit is taken
        self.hit = 0

    def extend(self, keys: list[Key], tokens: Sequence[int], salt: Hashable = None) -> list[Key]:
        """Append the keys of the full blocks of ``tokens`` that ``keys``, the chain so far,
        does not have yet.
        """
        b = self.pool.block_size
        for i in range(len(keys), len(tokens) // b):
            keys.append(self._next(keys, tokens, salt, i))
        return keys

    def match(
        self, tokens: Sequence[int], *, salt: Hashable = None, keys: list[Key] | None = None
    ) -> list[int]:
        """The blocks of the longest cached prefix, at most len(tokens) − 1 tokens of it;
        leaves no trace.

        ``keys`` is the chain of the same text if the caller keeps it: it is extended as far
        as the walk goes, so a text that is matched again is not hashed again.
        """
        chain = [] if keys is None else keys
        found: list[int] = []
        for i in range(max(0, len(tokens) - 1) // self.pool.block_size):
            if i == len(chain):
                chain.append(self._next(chain, tokens, salt, i))
            block = self.pool.find(chain[i])
            if block is None:
                break
            found.append(block)
        return found

    def available(self, blocks: Sequence[int]) -> int:
        """How many blocks the pool could give *after* ``blocks``, a match, were taken:
        those of it count as taken.
        """
        return self.pool.num_free - sum(self.pool.ref_count(block) == 0 for block in blocks)

    def take(self, table: BlockTable, blocks: list[int], length: int) -> None:
        """Begin a table with a match of a text of ``length`` tokens; before anything is
        allocated for it.

        An allocation first could be given the very blocks that were matched.
        """
        table.adopt(blocks)
        self.queried += length
        self.hit += table.length

    def insert(
        self, table: BlockTable, tokens: Sequence[int], keys: list[Key], *, salt: Hashable = None
    ) -> None:
        """Name the full blocks of ``table``, which holds ``tokens[:table.length]``;
        ``keys`` is that text's chain.

        Only what is written and verified may be in the table by now: a block that is named
        is found at once.
        """
        full = table.length // self.pool.block_size
        if not full or (len(keys) >= full and self.pool.key_of(table.blocks[full - 1]) is not None):
            return  # nothing has become full since
        new = full
        # blocks are named in order: [0, new) are
        while new and self.pool.key_of(table.blocks[new - 1]) is None:
            new -= 1
        self.extend(keys, tokens[: full * self.pool.block_size], salt)
        for i in range(new, full):
            self.pool.remember(table.blocks[i], keys[i])

    def _next(self, keys: list[Key], tokens: Sequence[int], salt: Hashable, i: int) -> Key:
        b = self.pool.block_size
        return self.hasher(
            keys[i - 1] if i else ROOT, tokens[i * b : (i + 1) * b], None if i else salt
        )
