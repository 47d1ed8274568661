"""The hash-chained prefix cache against a dictionary of prefixes, and what a weak hash
would allow.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from machines import run
from refllm.kv.block_pool import BlockPool, BlockTable, Key
from refllm.kv.hash_prefix import ROOT, PrefixCache, sha256_key

texts = st.lists(st.integers(0, 1), max_size=9)
salts = st.sampled_from([None, "tenant"])
SOME = "a\xff\ud800\udcff"


class PrefixMachine(RuleBasedStateMachine):
    """The model: for every block the prefix (with its salt) that it was filled with, until
    it is allocated again.
    """

    seen: ClassVar[Counter[str]] = Counter()

    @initialize(count=st.integers(1, 10), size=st.integers(1, 3))
    def begin(self, count: int, size: int) -> None:
        self.pool = BlockPool(count, size)
        self.cache = PrefixCache(self.pool)
        # block → (salt, all tokens up to its end)
        self.holds: dict[int, tuple[Any, tuple[int, ...]]] = {}
        self.running: list[tuple[Any, list[int], BlockTable, list[Key]]] = []

    def expected(self, tokens: list[int], salt: Any) -> int:
        """Blocks of the longest cached prefix, by brute force, one token short of the whole
        sequence.
        """
        b = self.pool.block_size
        found = 0
        while (found + 1) * b < len(tokens) and (
            salt,
            tuple(tokens[: (found + 1) * b]),
        ) in self.holds.values():
            found += 1
        return found

    def grow(self, salt: Any, tokens: list[int], table: BlockTable, keys: list[Key]) -> bool:
        """Write the rest of ``tokens`` and give keys to full blocks; False if the pool is
        too small.
        """
        count = len(tokens) - table.length
        b = self.pool.block_size
        if table.needs(count) > self.pool.num_free:
            self.seen["exhausted"] += 1
            return False
        before = set(table.blocks)
        table.reserve(count)
        for block in set(table.blocks) - before:
            self.seen["evicted"] += self.holds.pop(block, None) is not None
        table.commit(count)
        self.cache.insert(table, tokens, keys, salt=salt)
        self.holds |= {
            block: (salt, tuple(tokens[: (i + 1) * b]))
            for i, block in enumerate(table.blocks)
            if (i + 1) * b <= len(tokens)
        }
        return True

    @rule(tokens=texts, salt=salts)
    def start(self, tokens: list[int], salt: Any) -> None:
        keys: list[Key] = []
        hit = self.cache.match(tokens, salt=salt, keys=keys)
        assert len(hit) == self.expected(tokens, salt)
        assert len(hit) * self.pool.block_size <= max(0, len(tokens) - 1)
        for i, block in enumerate(hit):
            assert self.holds[block] == (salt, tuple(tokens[: (i + 1) * self.pool.block_size]))
        table = BlockTable(self.pool)
        available = self.cache.available(hit)
        self.seen["revived"] += any(self.pool.ref_count(block) == 0 for block in hit)
        self.seen["shared"] += any(self.pool.ref_count(block) > 0 for block in hit)
        self.cache.take(table, hit, len(tokens))
        assert self.pool.num_free == available
        if self.grow(salt, tokens, table, keys):
            assert table.blocks[: len(hit)] == hit
            self.running.append((salt, tokens, table, keys))
        else:
            table.free()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=texts)
    def continue_sequence(self, data: st.DataObject, more: list[int]) -> None:
        salt, tokens, table, keys = data.draw(st.sampled_from(self.running))
        if self.grow(salt, tokens + more, table, keys):
            tokens += more

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))[2].free()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        owners = Counter(block for _, _, table, _ in self.running for block in table.blocks)
        assert all(self.pool.ref_count(b) == owners[b] for b in range(self.pool.num_blocks))
        named = {
            block for block in range(self.pool.num_blocks) if self.pool.key_of(block) is not None
        }
        assert named == set(self.holds)
        # equal keys if and only if equal prefixes under equal salts
        keys = {block: self.pool.key_of(block) for block in named}
        assert len(set(keys.values())) == len(set(self.holds.values()))
        assert len({(keys[b], self.holds[b]) for b in named}) == len(set(keys.values()))

    def teardown(self) -> None:
        for _, _, table, _ in getattr(self, "running", []):
            table.free()
        if hasattr(self, "pool"):
            assert self.pool.num_free == self.pool.num_blocks


@pytest.mark.theorem(
    "Blocks with keys from a hash chain are found exactly for the prefixes, under the salt, "
    "that filled them; a hit is whole blocks and leaves a token to compute",
    source="vLLM, automatic prefix caching; Kwon et al. 2023, section 4.4",
)
def test_state_machine_the_cache_is_a_dictionary_of_prefixes():
    run(PrefixMachine, examples=60, steps=30, see={"exhausted", "evicted", "revived", "shared"})


def filled(
    pool: BlockPool, cache: PrefixCache, tokens: list[int], salt: str | None = None
) -> BlockTable:
    """A table that holds a sequence, with keys for all full blocks."""
    table = BlockTable(pool)
    table.reserve(len(tokens))
    table.commit(len(tokens))
    cache.insert(table, tokens, [], salt=salt)
    return table


def test_a_sequence_that_is_cached_completely_has_its_last_block_recomputed():
    pool = BlockPool(8, 4)
    cache = PrefixCache(pool)
    table = filled(pool, cache, [1, 2, 3, 4, 5, 6, 7, 8])
    # not even one token: a hit is in whole blocks
    assert cache.match([1, 2, 3, 4, 5, 6, 7, 8]) == table.blocks[:1]
    assert cache.match([1, 2, 3, 4, 5, 6, 7, 8, 9]) == table.blocks
    assert cache.match([]) == cache.match([1, 2, 3]) == cache.match([2, 2, 3, 4, 5]) == []


def test_taking_before_allocating_keeps_what_was_matched():
    pool = BlockPool(2, 1)
    cache = PrefixCache(pool)
    filled(pool, cache, [7]).free()
    # the block of 7 is the next to be allocated, unless it is taken
    filled(pool, cache, [8, 9]).free()
    hit = cache.match([8, 9, 5])
    assert cache.available(hit) == 0  # both blocks are free, and both were matched
    table = BlockTable(pool)
    cache.take(table, hit, 3)
    assert table.needs(1) > pool.num_free
    assert (cache.queried, cache.hit) == (3, 2)


def test_blocks_freed_first_are_evicted_first_and_of_one_sequence_the_end():
    pool = BlockPool(4, 1)
    cache = PrefixCache(pool)
    old = filled(pool, cache, [1, 2])
    new = filled(pool, cache, [3, 4])
    old.free()
    new.free()
    lengths = []
    for _ in range(4):
        pool.allocate()
        lengths.append((len(cache.match([1, 2, 0])), len(cache.match([3, 4, 0]))))
    assert lengths == [(1, 2), (0, 2), (0, 1), (0, 0)]


def test_two_sequences_that_fill_equal_blocks_keep_both_and_the_first_is_found():
    pool = BlockPool(4, 2)
    cache = PrefixCache(pool)
    first = filled(pool, cache, [1, 2])
    second = filled(pool, cache, [1, 2])
    assert first.blocks != second.blocks
    assert cache.match([1, 2, 3]) == first.blocks
    (block,) = first.blocks
    first.free()
    while cache.match([1, 2, 3]) == [block]:
        pool.allocate()
    assert cache.match([1, 2, 3]) == second.blocks


def test_tenants_do_not_see_each_other():
    pool = BlockPool(8, 1)
    cache = PrefixCache(pool)
    filled(pool, cache, [1, 2], salt="a")
    assert (
        cache.match([1, 2, 3], salt="b")
        == cache.match([1, 2, 3], salt="")
        == cache.match([1, 2, 3])
        == []
    )
    assert len(cache.match([1, 2, 3], salt="a")) == 2
    filled(pool, cache, [1, 2])
    assert cache.match([1, 2, 3], salt="") == []  # an empty salt is a salt


@given(one=st.text(SOME, max_size=3), two=st.text(SOME, max_size=3))
@example(one="\ud800", two="\ud801")
@example(one="\udcff", two="\xff")
def test_any_two_strings_are_two_salts_lone_surrogates_included(one, two):
    assert (sha256_key(ROOT, [1], one) == sha256_key(ROOT, [1], two)) == (one == two)


def test_with_a_weak_hash_a_prompt_reads_the_keys_of_another():
    """A sum of tokens ignores their order: an attacker, or chance, reads the keys of
    another prompt.
    """
    pool = BlockPool(8, 2)
    weak = PrefixCache(pool, lambda parent, tokens, salt: hash((parent, sum(tokens), salt)))
    theirs = filled(pool, weak, [5, 1])
    assert weak.match([3, 3, 9]) == theirs.blocks  # a false hit
    # no chain: position is lost
    forgetful = PrefixCache(BlockPool(8, 2), lambda parent, tokens, salt: tuple(tokens))
    theirs = filled(forgetful.pool, forgetful, [1, 1, 2, 2])
    # keys rotated for positions 2 and 3, used at 0 and 1
    assert forgetful.match([2, 2, 9]) == theirs.blocks[1:]
    for prompt in ([3, 3, 9], [2, 2, 9]):
        strong = PrefixCache(BlockPool(8, 2))
        filled(strong.pool, strong, [5, 1])
        filled(strong.pool, strong, [1, 1, 2, 2])
        assert strong.match(prompt) == []


@given(
    one=st.lists(st.integers(0, 300), max_size=6),
    two=st.lists(st.integers(0, 300), max_size=6),
    salt=salts,
    other=salts,
    size=st.integers(1, 3),
)
def test_round_trip_equal_chains_mean_equal_sequences(one, two, salt, other, size):
    cache = PrefixCache(BlockPool(1, size))
    first = cache.extend([], one, salt)
    second = cache.extend([], two, other)
    assert len(first) == len(one) // size
    for i, (a, b) in enumerate(zip(first, second, strict=False), 1):
        assert (a == b) == ((salt, one[: i * size]) == (other, two[: i * size]))
    grown: list[Key] = []
    for end in range(len(one) + 1):  # a chain that grows with its tokens is the chain of the tokens
        cache.extend(grown, one[:end], salt)
    assert grown == first


def test_a_sequence_that_is_matched_again_is_not_hashed_again():
    calls: list[Any] = []

    def counted(parent: Key, tokens: Any, salt: Any) -> Key:
        calls.append(tuple(tokens))
        return sha256_key(parent, tokens, salt)

    pool = BlockPool(8, 1)
    cache = PrefixCache(pool, counted)
    filled(pool, cache, [1, 2])
    keys: list[Key] = []
    calls.clear()
    for _ in range(3):
        cache.match([1, 2, 3, 4, 5], keys=keys)
    assert calls == [(1,), (2,), (3,)]  # up to the first that is not found, once


def test_the_salt_is_hashed_into_the_first_block_and_reaches_the_others_through_the_chain():
    hashed: list[Any] = []

    def recording_hash(parent: Key, tokens: Any, salt: Any) -> Key:
        hashed.append((parent, tuple(tokens), salt))
        return sha256_key(parent, tokens, salt)

    keys = PrefixCache(BlockPool(4, 2), recording_hash).extend([], [1, 2, 3, 4, 5], "a")
    assert hashed == [(ROOT, (1, 2), "a"), (keys[0], (3, 4), None)]


def test_bad_calls_are_rejected():
    with pytest.raises(ValueError, match="salt that is a string, got 7"):
        sha256_key(ROOT, [1], 7)
    with pytest.raises(ValueError, match="parent's 32 bytes"):
        sha256_key(0, [1], None)
