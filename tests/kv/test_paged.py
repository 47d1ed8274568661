"""The paged cache against the contiguous one: the same values, whatever the owners and the
order of the blocks.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from networks import NETWORKS, TOKENS, full_logits
from refllm.backend import asarray_like
from refllm.kv import paged
from refllm.kv.block_pool import OutOfBlocks
from refllm.kv.contiguous import ContiguousCache
from refllm.kv.paged import PagedKVCache, split_attention
from refllm.model.attention import attention
from refllm.model.config import ModelConfig
from refllm.model.llama import build, forward, logits
from strategies import partitions, seeds

EPS = float(np.finfo("float64").eps)
L = 2
G = 2
D = 4


def network(window: int | None = None) -> ModelConfig:
    return ModelConfig("mistral", 5, 8, 8, L, 2 * G, G, D, sliding_window=window)


def new_tokens(rng: np.random.Generator, count: int, dtype: str = "float64") -> list[np.ndarray]:
    return [rng.standard_normal((count, heads, D)).astype(dtype) for heads in (2 * G, G, G)]


@pytest.mark.theorem(
    "Attention through block tables = attention over contiguous buffers, bit for bit where both"
    " compute the same products",
    source="Kwon et al. 2023, section 4.1",
)
@given(
    steps=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=6),
    block=st.integers(1, 4),
    window=st.one_of(st.none(), st.integers(1, 5)),
    seed=seeds,
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_oracle_paged_is_contiguous(xp, steps, block, window, seed, dtype):
    """The contiguous buffers hold their keys in rows, as the pool does: BLAS sums over a
    transposed operand in another order. Under a window the pool reads the window alone, and
    blocks behind it are freed here, so that reading one would give NaN.
    """
    rng = np.random.default_rng(seed)
    like = xp.zeros(1, dtype=dtype)
    config = network(window)
    buffers = ContiguousCache(config, 3, 30, like=like, columns=False)
    paged = PagedKVCache(config, 90, block, like=like, poison=True)
    # physical blocks in any order: some are allocated first and freed in another order
    taken = [paged.pool.allocate() for _ in range(20)]
    for i in rng.permutation(20):
        paged.pool.free(taken[i])
    tables = [paged.table() for _ in range(3)]
    for counts in steps:
        for table, count in zip(tables, counts, strict=True):
            paged.reserve(table, count)
        one = buffers.view(counts)
        other = paged.view(tables, counts)
        assert paged.positions(tables, counts) == buffers.positions(counts)
        for layer in range(L):
            new = new_tokens(rng, sum(counts), dtype)
            a, b = (
                to_host(attend(layer, *(xp.asarray(t.copy()) for t in new)))
                for attend in (one, other)
            )
            if same_products(counts) and window is None:
                assert np.array_equal(a, b)
            else:
                np.testing.assert_allclose(a, b, rtol=0, atol=100 * float(np.finfo(dtype).eps))
        buffers.advance(counts)
        paged.advance(tables, counts)
        assert [t.length for t in tables] == buffers.lengths
        if window is not None:
            for table in tables:
                table.drop_before(table.length - window + 1)
                table.check()


def same_products(counts: list[int]) -> bool:
    """Whether both caches compute the same products.

    Neighbours with equally many tokens are one batch in both caches; others attend one by
    one, unless a block table lets sequences of one token be a batch across a gap, or beside
    a prefill, which contiguous buffers do not.
    """
    busy = [i for i, n in enumerate(counts) if n]
    sizes = {counts[i] for i in busy}
    neighbours = not busy or busy[-1] - busy[0] < len(busy)
    return neighbours if len(sizes) <= 1 else 1 not in sizes


@pytest.mark.theorem(
    "After a fork both sequences read what they wrote themselves: a shared block is copied "
    "before it is written",
    source="Kwon et al. 2023, section 4.4",
)
@given(
    prompt=st.integers(1, 9),
    tails=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    block=st.integers(1, 4),
    seed=seeds,
)
def test_invariance_siblings_are_independent(xp, prompt, tails, block, seed):
    rng = np.random.default_rng(seed)
    like = xp.zeros(1, dtype=xp.float64)
    config = network()
    start = [new_tokens(rng, prompt) for _ in range(L)]
    more = [[[new_tokens(rng, 1) for _ in range(L)] for _ in range(n)] for n in tails]

    def write(cache, table, new):
        count = len(new[0][0])
        cache.reserve(table, count)
        attend = cache.view([table], [count])
        out = [
            to_host(attend(layer, *(xp.asarray(t.copy()) for t in new[layer])))
            for layer in range(L)
        ]
        cache.advance([table], [count])
        return out

    alone = []
    for tail in more:
        cache = PagedKVCache(config, 40, block, like=like)
        table = cache.table()
        write(cache, table, start)
        alone.append([write(cache, table, new) for new in tail])
    cache = PagedKVCache(config, 40, block, like=like, poison=True)
    parent = cache.table()
    write(cache, parent, start)
    both = [parent, parent.fork()]
    shared = [[], []]
    for step in range(max(tails)):
        for i in (0, 1):
            if step < tails[i]:
                shared[i].append(write(cache, both[i], more[i][step]))
    for mine, single in zip(shared, alone, strict=True):
        assert all(
            np.array_equal(a, b)
            for x, y in zip(mine, single, strict=True)
            for a, b in zip(x, y, strict=True)
        )
    assert cache.copied == (
        1 if prompt % block else 0
    )  # the second writer is the only owner of the block
    for table in both:
        table.free()
    cache.pool.check()
    assert cache.pool.num_free == 40


@given(
    chunks=partitions(len(TOKENS)), block=st.integers(1, 7), name=st.sampled_from(sorted(NETWORKS))
)
def test_invariance_chunked_prefill_through_pages_gives_the_full_forward(chunks, block, name):
    config = NETWORKS[name]
    weights = build(config, random_tensors(config))
    cache = PagedKVCache(config, 50, block, like=np.zeros(1), poison=True)
    table = cache.table()
    out = []
    for count in chunks:
        at = table.length
        cache.reserve(table, count)
        positions = np.array(cache.positions([table], [count]))
        hidden = forward(
            weights, config, TOKENS[at : at + count], positions, cache.view([table], [count])
        )
        cache.advance([table], [count])
        out.append(logits(weights, hidden))
    whole = full_logits(weights, config)
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(
        np.concatenate(out), whole, rtol=0, atol=2e4 * EPS * np.abs(whole).max()
    )


def random_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    from refllm.checkpoints.tensor_files import tensor_shapes

    rng = np.random.default_rng(3)
    return {
        n: rng.standard_normal(s) * (0.3 if len(s) == 2 else 1.0) for n, s in tensor_shapes(config)
    }


@pytest.mark.theorem(
    "Attention over any partition of the slots, merged by log-sum-exp, = attention over all of "
    "them",
    source="Dao et al. 2023, Flash-Decoding",
)
@given(
    count=st.integers(1, 4),
    past=st.integers(0, 12),
    parts=st.integers(1, 20),
    seed=seeds,
    window=st.one_of(st.none(), st.integers(1, 6)),
)
def test_invariance_split_keys_are_one_pass(xp, count, past, parts, seed, window):
    rng = np.random.default_rng(seed)
    total = past + count
    slots = rng.permutation(40)[:total]
    q, _, _ = new_tokens(rng, count)
    keys, values = (rng.standard_normal((40, G, D)) for _ in "kv")
    q, keys, values, where = (xp.asarray(a) for a in (q, keys, values, slots))
    o, lse = split_attention(q, keys, values, where, start=past, window=window, parts=parts)
    seen = xp.take(keys, where, axis=0), xp.take(values, where, axis=0)
    whole, sums = attention(q, *seen, start=past, window=window)
    np.testing.assert_allclose(to_host(o), to_host(whole), rtol=0, atol=64 * total * EPS)
    np.testing.assert_allclose(to_host(lse), to_host(sums), rtol=0, atol=64 * total * EPS)


def test_a_full_pool_raises_and_keeps_its_contents():
    cache = PagedKVCache(network(), 2, 2, like=np.zeros(1))
    table = cache.table()
    cache.reserve(table, 3)
    cache.advance([table], [3])
    with pytest.raises(OutOfBlocks, match="1 blocks are needed for 2 tokens, 0 are free"):
        cache.reserve(table, 2)
    assert (table.length, table.capacity) == (3, 4)


def test_a_block_that_is_shared_is_not_written():
    cache = PagedKVCache(network(), 4, 4, like=np.zeros(1))
    table = cache.table()
    cache.reserve(table, 2)
    cache.advance([table], [2])
    other = table.fork()
    with pytest.raises(ValueError, match="shared and would be written"):
        cache.view([other], [1])
    with pytest.raises(ValueError, match="same slot"):
        cache.view([table, other], [1, 1])


def test_a_batch_moves_as_many_block_ids_as_its_longest_sequence_has(monkeypatch):
    """A decode step of a long and a short sequence, with blocks reserved ahead: 1 + width
    integers per sequence reach the device, not one per slot.
    """
    cache = PagedKVCache(network(), 40, 4, like=np.zeros(1))
    tables = [cache.table() for _ in range(2)]
    for table, length in zip(tables, (9, 3), strict=True):
        cache.reserve(table, length)
        cache.advance([table], [length])
        cache.reserve(table, 30)
    moved = []
    monkeypatch.setattr(
        paged,
        "asarray_like",
        lambda values, *rest: moved.append(np.shape(values)) or asarray_like(values, *rest),
    )
    cache.view(tables, [1, 1])
    assert moved == [(2,), (2, 1 + 3)]  # slots to write; lengths and blocks of 10 tokens


@pytest.mark.parametrize("slot", [-1, 16])
def test_a_slot_outside_the_pool_is_rejected(slot):
    """A table of another pool: −1 would be the last slot."""
    cache = PagedKVCache(network(), 4, 4, like=np.zeros(1))
    table = SimpleNamespace(length=0, slots=lambda a, b: [slot])
    with pytest.raises(ValueError, match="outside the 16 slots of the pool"):
        cache.view([table], [1])


def test_the_pools_bytes_are_two_values_per_slot_head_dimension_and_layer():
    cache = PagedKVCache(network(), 3, 4, like=np.zeros(1, dtype="float32"))
    assert cache.nbytes == 2 * L * 3 * 4 * G * D * 4
    assert cache.block_nbytes == cache.nbytes // 3


def test_unreachable_blocks_are_poisoned_and_remembered_ones_are_not():
    cache = PagedKVCache(network(), 2, 1, like=np.zeros(1), poison=True)
    table = cache.table()
    cache.reserve(table, 2)
    cache.view([table], [2])(0, *new_tokens(np.random.default_rng(0), 2))
    cache.advance([table], [2])
    first, second = table.blocks
    cache.pool.remember(first, "prefix")
    table.free()
    for buffer in (cache.keys, cache.values):
        assert np.isfinite(buffer[0, first]).all()
        assert np.isnan(buffer[:, second]).all()
