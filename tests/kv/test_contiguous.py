"""The contiguous cache against a dictionary of every key and value that was appended."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import fakecupy
from conftest import to_host
from refllm.decode.speculative.tree import Tree
from refllm.kv.contiguous import ContiguousCache
from refllm.model.config import ModelConfig
from strategies import seeds

EPS = float(np.finfo(np.float64).eps)
L = 2
H = 4
G = 2
D = 3
CAPACITY = 9


def network(
    window: int | None = None, *, layers: int = L, groups: int = G, dim: int = 2 * D
) -> ModelConfig:
    return ModelConfig("mistral", 5, 8, 8, layers, 2 * groups, groups, dim, sliding_window=window)


def tokens(rng: np.random.Generator, count: int, dim: int = 2 * D, groups: int = G):
    """Queries, keys and values of ``count`` tokens."""
    return [rng.standard_normal((count, heads, dim)) for heads in (2 * groups, groups, groups)]


def looked_up(
    q: np.ndarray, pairs: dict[int, tuple], position: int, window: int | None
) -> np.ndarray:
    """One query [H, D] over the dictionary's (key, value) at the positions that it sees."""
    seen = [j for j in sorted(pairs) if position - (window or math.inf) < j <= position]
    # [S, H, D]
    k, v = (np.repeat(np.stack([pairs[j][i] for j in seen]), 2, axis=1) for i in (0, 1))
    scores = np.einsum("hd,shd->hs", q, k) / math.sqrt(q.shape[-1])
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hs,shd->hd", p / p.sum(axis=1, keepdims=True), v)


class Machine(RuleBasedStateMachine):
    """Append, roll back and overflow in any order; ``self.model[layer][b][position] = (key,
    value)``.
    """

    xp = np

    @initialize(
        sequences=st.integers(1, 3),
        window=st.one_of(st.none(), st.integers(1, 4)),
        seed=seeds,
        columns=st.booleans(),
    )
    def start(self, sequences, window, seed, columns):
        self.rng = np.random.default_rng(seed)
        self.window = window
        self.capacity = CAPACITY
        self.cache = ContiguousCache(
            network(window),
            sequences,
            CAPACITY,
            like=self.xp.zeros(1, dtype="float64"),
            columns=columns,
        )
        self.model = [[{} for _ in range(sequences)] for _ in range(L)]

    def lengths(self) -> list[int]:
        return [len(pairs) for pairs in self.model[0]]

    def step(self, counts: list[int]) -> None:
        positions = self.cache.positions(counts)
        owners = [b for b, n in enumerate(counts) for _ in range(n)]
        assert positions == [self.lengths()[b] + i for b, n in enumerate(counts) for i in range(n)]
        attend = self.cache.view(counts)
        for layer in range(L):
            q, k, v = tokens(self.rng, sum(counts))
            out = to_host(attend(layer, *(self.xp.asarray(x.copy()) for x in (q, k, v))))
            for t, (b, position) in enumerate(zip(owners, positions, strict=True)):
                self.model[layer][b][position] = (k[t], v[t])
            for t, (b, position) in enumerate(zip(owners, positions, strict=True)):
                expected = looked_up(q[t], self.model[layer][b], position, self.window)
                # scores here are below 64, so their error, and that of a weight, is below
                # 64·(D+4)·eps
                np.testing.assert_allclose(
                    out[t], expected, rtol=0, atol=64 * (2 * D + 4) * EPS * 8
                )
        self.cache.advance(counts)

    @rule(data=st.data())
    def append(self, data):
        self.step([data.draw(st.integers(0, min(4, self.capacity - n))) for n in self.lengths()])

    @precondition(lambda self: min(self.lengths()) < self.capacity)
    @rule()
    def decode(self):
        """One token for each of the first sequences with free capacity: the batched path."""
        full = [n == self.capacity for n in self.lengths()]
        self.step([1] * (full.index(True) if True in full else len(full)))

    @precondition(lambda self: min(self.lengths()) < self.capacity)
    @rule(data=st.data())
    def prefill(self, data):
        """The same number of tokens for some neighbours: the batched path, whatever their
        lengths.
        """
        room = [self.capacity - n for n in self.lengths()]
        first = data.draw(st.sampled_from([b for b, n in enumerate(room) if n]))
        count = data.draw(st.integers(1, min(4, room[first])))
        end = next((b for b in range(first, len(room)) if room[b] < count), len(room))
        last = data.draw(st.integers(first + 1, end))
        self.step([count if first <= b < last else 0 for b in range(len(room))])

    @rule(more=st.integers(-2, 3))
    def grow(self, more):
        """Room for more tokens; a smaller capacity changes nothing."""
        self.cache.grow(self.capacity + more)
        self.capacity = max(self.capacity, self.capacity + more)
        assert self.cache.capacity == self.capacity
        assert self.cache.values.shape[-2] == self.cache.keys.shape[-1] == self.capacity

    @rule(data=st.data())
    def roll_back(self, data):
        b = data.draw(st.integers(0, len(self.lengths()) - 1))
        keep = data.draw(st.integers(0, self.lengths()[b]))
        self.cache.truncate(b, keep)
        for layer in self.model:
            layer[b] = {j: pair for j, pair in layer[b].items() if j < keep}

    @rule(data=st.data())
    def reject(self, data):
        """Too many tokens, too many sequences, a length beyond the end: an error, and
        nothing has changed.
        """
        lengths = self.lengths()
        before = to_host(self.cache.keys).copy(), to_host(self.cache.values).copy()
        b = data.draw(st.integers(0, len(lengths) - 1))
        counts = [0] * len(lengths)
        counts[b] = data.draw(st.sampled_from([self.capacity - lengths[b] + 1, -1]))
        for bad in (counts, [0] * (len(lengths) + 1)):
            with pytest.raises(ValueError, match="sequence"):
                self.cache.view(bad)
        for length in (lengths[b] + 1, -1):
            with pytest.raises(ValueError, match="cannot keep"):
                self.cache.truncate(b, length)
        for old, new in zip(before, (self.cache.keys, self.cache.values), strict=True):
            np.testing.assert_array_equal(to_host(new), old)

    @invariant()
    def holds_what_was_appended(self):
        if not hasattr(self, "model"):
            return
        assert self.cache.lengths == self.lengths()
        buffers = to_host(self.cache.keys).swapaxes(-1, -2), to_host(self.cache.values)
        for layer, sequences in enumerate(self.model):
            for b, pairs in enumerate(sequences):
                for j, pair in pairs.items():
                    assert all(
                        (buffer[layer, b, :, j] == x).all()
                        for buffer, x in zip(buffers, pair, strict=True)
                    )


@pytest.mark.theorem(
    "after any sequence of appends, rollbacks and rejected steps the cache answers as a "
    "dictionary from (layer, sequence, position) to (key, value) does",
    source="state machine; specification of the attend seam",
)
def test_cache_is_a_dictionary(xp):
    machine = type("Machine", (Machine,), {"xp": xp})
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=12))


@pytest.mark.theorem(
    "truncate and append again = never having appended, bit for bit",
    source="rollback of a rejected draft",
)
@given(st.data())
def test_rollback_leaves_no_trace(xp, data):
    window = data.draw(st.one_of(st.none(), st.integers(1, 4)))
    prompt, rejected, kept, after = (data.draw(st.integers(low, 4)) for low in (1, 1, 0, 1))
    kept = min(kept, rejected)
    rng = np.random.default_rng(data.draw(seeds))
    steps = [tokens(rng, n) for n in (prompt, rejected, after, 1)]

    def play(with_rejected: bool):
        cache = ContiguousCache(network(window), 1, 16, like=xp.zeros(1, dtype="float64"))

        def push(step, count: int | None = None):
            mine = [xp.asarray(x[:count].copy()) for x in step]
            counts = [len(step[0][:count])]
            attend = cache.view(counts)
            outs = [to_host(attend(layer, *(x.copy() for x in mine))) for layer in range(L)]
            cache.advance(counts)
            return outs

        push(steps[0])
        if with_rejected:
            push(steps[1])
            cache.truncate(0, prompt + kept)
        else:
            push(steps[1], kept)
        return [push(step) for step in steps[2:]], cache.lengths

    after_rollback, lengths = play(True)
    straight, same_lengths = play(False)
    np.testing.assert_equal(after_rollback, straight)
    assert lengths == same_lengths


@pytest.mark.theorem(
    "bytes allocated = 2 · L · G · D · bytes per value, per token, exactly",
    source="serving arithmetic",
)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from(["float16", "float32", "float64"]),
)
def test_bytes_are_the_formula(xp, layers, groups, half_dim, sequences, capacity, dtype):
    config = network(layers=layers, groups=groups, dim=2 * half_dim)
    cache = ContiguousCache(config, sequences, capacity, like=xp.zeros(1), dtype=dtype)
    per_token = 2 * layers * groups * 2 * half_dim * np.dtype(dtype).itemsize
    assert cache.nbytes == per_token * sequences * capacity
    assert cache.keys.nbytes + cache.values.nbytes == cache.nbytes


@pytest.mark.parametrize("counts", [[1, 1], [3, 2]], ids=["decode", "ragged"])
def test_keys_may_be_stored_narrower_than_they_are_computed(xp, counts):
    """float16 buffers under float32 queries: the result is that of the rounded keys and
    values.
    """
    rng = np.random.default_rng(0)
    like = xp.zeros(1, dtype="float32")
    cache = ContiguousCache(network(window=2), 2, CAPACITY, like=like, dtype="float16")
    exact = ContiguousCache(network(window=2), 2, CAPACITY, like=xp.zeros(1, dtype="float64"))
    for step in ([2, 3], counts):
        q, k, v = tokens(rng, sum(step))
        q = q.astype("float32")
        k = k.astype("float16")
        v = v.astype("float16")
        narrow = cache.view(step)(0, *(xp.asarray(x.astype("float32")) for x in (q, k, v)))
        wide = exact.view(step)(0, *(xp.asarray(x.astype("float64")) for x in (q, k, v)))
        eps = float(np.finfo("float32").eps)
        np.testing.assert_allclose(
            to_host(narrow), to_host(wide), rtol=0, atol=64 * (2 * D + 4) * eps * 8
        )
        cache.advance(step)
        exact.advance(step)


@pytest.mark.parametrize("lengths", [[3, 3], [1, 3]], ids=["same length", "ragged"])
def test_decoding_never_waits_and_moves_positions_once_per_step(lengths):
    """On a device: no copy to the host and no wait; positions are moved once per step, not
    once per layer.
    """
    rng = np.random.default_rng(0)
    cache = ContiguousCache(network(), 2, CAPACITY, like=fakecupy.zeros(1, dtype="float64"))
    fill = [fakecupy.asarray(x) for x in tokens(rng, sum(lengths))]
    cache.view(lengths)(0, *fill)
    cache.advance(lengths)
    step = [fakecupy.asarray(x) for x in tokens(rng, 2)]
    with fakecupy.counting() as counted:
        attend = cache.view([1, 1])
        to_device = counted.h2d
        for layer in range(L):
            attend(layer, *(x.copy() for x in step))
    assert counted.d2h == counted.syncs == 0
    assert counted.h2d == to_device
    # the slots, the bias and its two constants
    assert to_device <= (0 if lengths[0] == lengths[1] else 4)


TREES = {
    "root alone": [],
    "chain": [-1, 0, 1],
    "fork": [-1, -1, 0, 1, 1],
    "two levels": [-1, -1, 1, 0, 3],
}


@pytest.mark.parametrize("window", [None, 2, 3])
@pytest.mark.parametrize(("before", "scale"), [(0, 1), (4, 1), (4, 1000)])
@pytest.mark.parametrize("name", TREES)
def test_a_row_of_a_tree_sees_its_ancestors_alone_and_the_accepted_path_stays(
    xp, name, before, scale, window
):
    """Against a dictionary of the keys and values on each node's path; then the path to each
    node is committed, and the next token reads it.
    """
    tree = Tree(TREES[name])
    rows = len(tree) + 1
    rng = np.random.default_rng(rows + before)
    like = xp.zeros(1, dtype="float64")
    cached, drafted, after = ([tokens(rng, count) for _ in range(L)] for count in (before, rows, 1))

    for q, _, _ in (*cached, *drafted, *after):
        q *= scale  # exp of a score of 1,000 would overflow
    atol = 100 * EPS * scale

    def moved(arrays):
        return [xp.asarray(array.copy()) for array in arrays]

    for node in range(-1, len(tree)):
        path = tree.ancestors(node)
        cache = ContiguousCache(network(window), 2, before + rows + 1, like=like)
        if before:
            attend = cache.view([0, before])
            for layer in range(L):
                attend(layer, *moved(cached[layer]))
            cache.advance([0, before])
        attend = cache.view_tree(1, tree)
        for layer in range(L):
            q, k, v = drafted[layer]
            out = to_host(attend(layer, *moved(drafted[layer])))
            assert out.shape == q.shape
            old = {j: (cached[layer][1][j], cached[layer][2][j]) for j in range(before)}
            pairs = {**old, before: (k[0], v[0])}
            pairs |= {before + 1 + i: (k[a + 1], v[a + 1]) for i, a in enumerate(path)}
            expected = looked_up(q[node + 1], pairs, before + len(path), window)
            np.testing.assert_allclose(out[node + 1], expected, rtol=0, atol=atol)
        cache.advance_path(1, path)
        assert cache.lengths == [0, before + 1 + len(path)]
        assert cache.positions([0, 1]) == [before + 1 + len(path)]
        attend = cache.view([0, 1])
        for layer in range(L):
            q, k, v = after[layer]
            out = to_host(attend(layer, *moved(after[layer])))
            pairs = {j: (cached[layer][1][j], cached[layer][2][j]) for j in range(before)}
            for i, row in enumerate([0, *(a + 1 for a in path)]):
                pairs[before + i] = (drafted[layer][1][row], drafted[layer][2][row])
            pairs[before + 1 + len(path)] = (k[0], v[0])
            expected = looked_up(q[0], pairs, before + 1 + len(path), window)
            np.testing.assert_allclose(out[0], expected, rtol=0, atol=atol)


def test_a_tree_may_fill_the_cache_exactly_and_no_more():
    cache = ContiguousCache(network(), 1, 3, like=np.zeros(1))
    cache.view_tree(0, Tree([-1, -1]))
    with pytest.raises(ValueError, match="0 cached \\+ 4 tokens of a tree exceed 3"):
        cache.view_tree(0, Tree([-1, -1, -1]))
    assert cache.lengths == [0]


@pytest.mark.parametrize(("sequences", "capacity"), [(0, 4), (2, 0)])
def test_a_cache_without_capacity_is_rejected(sequences, capacity):
    with pytest.raises(ValueError, match="at least one sequence of one token"):
        ContiguousCache(network(), sequences, capacity, like=np.zeros(1))


@pytest.mark.parametrize("sequence", [-1, 2])
def test_an_unknown_sequence_is_not_truncated(sequence):
    """In Python, -1 would be the last sequence."""
    cache = ContiguousCache(network(None), 2, 4, like=np.zeros(1))
    cache.advance([1, 1])
    with pytest.raises(ValueError, match=r"sequences 0\.\.1, got"):
        cache.truncate(sequence, 0)
    assert cache.lengths == [1, 1]
