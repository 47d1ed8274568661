"""The cache that evicts tokens, against a dictionary per head, and against attention that
is masked to the kept tokens.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import to_host
from kv_caches import run_step, tiny_api_model
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.kv.sparse import (
    SparsePolicy,
    at_random,
    h2o,
    pool_votes,
    pyramidkv,
    recent_only,
    snapkv,
    streaming,
    tova,
)
from refllm.kv.sparse_cache import SparseCache
from refllm.model.attention import CausalAttend
from refllm.model.config import ModelConfig
from refllm.model.llama import forward, logits
from strategies import seeds

L = 2
H = 4
G = 2
D = 8
EPS = float(np.finfo("float64").eps)
POLICIES = {
    "recent": recent_only(12),
    "streaming": streaming(12, 3),
    "h2o": h2o(12),
    "h2o, all heavy": h2o(12, 0),
    "tova": tova(12),
    "snapkv": snapkv(12, window=5, kernel=3),
    "snapkv, max": snapkv(12, window=4, pool="max"),
    "pyramidkv": pyramidkv(12, window=4, beta=3.0),
    "a pyramid at every step": SparsePolicy(12, "mass", newest=2, beta=3.0),
    "random": at_random(12),
}


def config(window: int | None = None) -> ModelConfig:
    return ModelConfig("mistral", 5, 8, 8, L, H, G, D, sliding_window=window)


def random_sequences(seed: int, sequences: int, length: int) -> tuple[np.ndarray, ...]:
    """q, k, v[L, B, T, heads, D]; keys of a few tokens are large, so that attention is far
    from uniform.
    """
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((L, sequences, length, heads, D)) for heads in (H, G, G))
    return q, k * (1 + 2 * (rng.random((L, sequences, length, 1, 1)) < 0.2)), v


def new_cache(
    xp, policy: SparsePolicy, sequences: int = 1, window: int | None = None
) -> SparseCache:
    return SparseCache(
        config(window), sequences, like=xp.zeros(1), policy=policy, rng=np.random.default_rng(5)
    )


def places(cache: SparseCache) -> list[list[np.ndarray]]:
    return [[to_host(kept.positions) for kept in layer] for layer in cache.layers]


def rows_of(
    q: np.ndarray, k: np.ndarray, seen: list[int], t: int, window: int | None
) -> np.ndarray:
    """Attention of one query head [D] at t over the keys at ``seen``; zero where the window
    has passed.
    """
    visible = np.array([t - (window or math.inf) < j <= t for j in seen])
    scores = np.where(visible, k[seen] @ q / math.sqrt(D), -np.inf)
    p = np.exp(scores - scores.max())
    return p / p.sum()


class Simulated:
    """One sequence in one layer, head by head in Python: the kept tokens, and the attention
    to each.
    """

    def __init__(self, policy: SparsePolicy, layer: int, window: int | None, drawn: dict):
        self.policy = policy
        self.layer = layer
        self.length = 0  # tokens read
        self.window = window
        self.drawn = drawn
        self.kept: list[list[int]] = [[] for _ in range(G)]
        self.mass: list[dict[int, float]] = [{} for _ in range(G)]
        self.last: list[dict[int, float]] = [{} for _ in range(G)]
        self.prompt_done = False

    def step(self, q, k, v, start: int, n: int, committed: int) -> np.ndarray:
        out = np.zeros((n, H, D))
        reads = []
        for i in range(n):
            t = start + i
            for h in range(H):
                g = h // (H // G)
                seen = self.kept[g] + list(range(start, t + 1))
                p = rows_of(q[t, h], k[:, g], seen, t, self.window)
                out[i, h] = p @ v[seen, g]
                reads.append((i, g, dict(zip(seen, p / (H // G), strict=True))))
        self.length += committed
        for g in range(G):
            self.kept[g] += range(start, start + committed)
            for j in self.kept[g]:
                self.mass[g].setdefault(j, 0.0)
            self.last[g] = dict.fromkeys(self.kept[g], 0.0)
        for i, g, read in reads:
            if i < committed:
                for j, p in read.items():
                    self.mass[g][j] += p
                    if i == committed - 1:
                        self.last[g][j] += p
        if self.prompt_done and self.policy.every_step and committed:
            self.evict([self.scores(g) for g in range(G)])
        return out

    def scores(self, g: int) -> dict[int, float]:
        kind = self.policy.score
        if kind == "last":
            return {j: sum(self.last[i][j] for i in range(G)) / G for j in self.kept[g]}
        return {"mass": self.mass[g], "random": self.drawn.get(g, {})}.get(
            kind, dict.fromkeys(self.kept[g], 0.0)
        )

    def finish_prompt(self, q, k, length: int) -> None:
        scores = [self.scores(g) for g in range(G)]
        if self.policy.score == "votes":
            w = min(self.policy.window, length)
            for g in range(G):
                votes = np.zeros(length)
                for t in range(length - w, length):
                    for h in range(g * H // G, (g + 1) * H // G):
                        votes[: t + 1] += rows_of(
                            q[t, h], k[:, g], list(range(t + 1)), t, self.window
                        ) / (H // G)
                near = pool_votes(votes[None, : length - w], self.policy.kernel, self.policy.pool)[
                    0
                ]
                scores[g] = dict(enumerate([*near, *[0.0] * w]))
        self.evict(scores)
        self.prompt_done = True

    def evict(self, scores: list[dict[int, float]]) -> None:
        budget = self.policy.budgets(L, self.length)[self.layer]
        for g in range(G):
            kept = self.kept[g]
            if self.window is not None:  # tokens that the next query cannot see are evicted first
                next_one = max(kept) + 1
                scores[g] = {
                    j: -math.inf if j <= next_one - self.window else s for j, s in scores[g].items()
                }
            must = [
                j
                for i, j in enumerate(kept)
                if i < self.policy.first or i >= len(kept) - self.policy.newest
            ]
            rest = sorted((j for j in kept if j not in must), key=lambda j: (-scores[g][j], j))
            self.kept[g] = sorted((must + rest)[:budget])


@pytest.mark.theorem(
    "A cache that evicts tokens keeps and returns what its policy says, head by head, over any "
    "steps, with any drafts rejected",
    source="the papers that refllm.kv.sparse names",
)
@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=6)
@given(
    seed=seeds,
    window=st.sampled_from([None, 9]),
    prompt=st.lists(st.tuples(st.integers(1, 14), st.integers(0, 2)), min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), max_size=12),
)
def test_equality_with_a_simulation_head_by_head(xp, name, seed, window, prompt, steps):
    policy = POLICIES[name]
    prompt = [(n, max(1, n - rejected)) for n, rejected in prompt]
    cache = new_cache(xp, policy, 1, window)
    length = sum(n for n, _ in prompt) + 3 * len(steps)
    data = random_sequences(seed, 1, length)
    q, k, v = data
    draws = np.random.default_rng(5)
    drawn: list[dict] = [{g: {} for g in range(G)} for _ in range(L)]
    model = [Simulated(policy, layer, window, drawn[layer]) for layer in range(L)]
    for phase, n, kept in [("prompt", n, m) for n, m in prompt] + [
        ("decode", n, min(n, m)) for n, m in steps
    ]:
        if phase == "decode" and not model[0].prompt_done:
            cache.finish_prompt()
            for layer, one in enumerate(model):
                one.finish_prompt(q[layer, 0], k[layer, 0], cache.lengths[0])
        start = cache.lengths[0]
        if policy.score == "random" and kept:
            for layer in range(L):
                for g, row in enumerate(draws.random((G, kept))):
                    drawn[layer][g] |= dict(
                        zip(range(start, start + kept), row.tolist(), strict=True)
                    )
        outputs = run_step(xp, cache, data, [n], [kept])
        for layer, one in enumerate(model):
            expected = one.step(q[layer, 0], k[layer, 0], v[layer, 0], start, n, kept)
            assert np.abs(outputs[layer][0] - expected).max() <= 1e3 * D * EPS * np.abs(v).max()
            assert to_host(cache.layers[layer][0].positions).tolist() == one.kept
    for layer in range(L):
        stored = cache.layers[layer][0]
        for g in range(G):
            assert np.array_equal(
                to_host(stored.keys)[g], k[layer, 0, places(cache)[layer][0][g], g]
            )
            assert np.array_equal(
                to_host(stored.values)[g], v[layer, 0, places(cache)[layer][0][g], g]
            )


@pytest.mark.theorem(
    "A budget that holds everything is plain attention", source="nothing is dropped"
)
@pytest.mark.parametrize(
    "make",
    [
        h2o,
        tova,
        recent_only,
        lambda b: streaming(b, 2),
        lambda b: snapkv(b, window=4),
        lambda b: pyramidkv(b, window=4, beta=6.0),
        at_random,
    ],
)
@given(seed=seeds, prompt=st.integers(1, 20), window=st.sampled_from([None, 6]))
def test_equality_with_plain_attention_within_the_budget(xp, make, seed, prompt, window):
    data = random_sequences(seed, 1, 30)
    cache = new_cache(xp, make(30), 1, window)
    got = run_step(xp, cache, data, [prompt])
    cache.finish_prompt()
    for _ in range(30 - prompt):
        got = [
            [np.concatenate([a[0], b[0]])]
            for a, b in zip(got, run_step(xp, cache, data, [1]), strict=True)
        ]
    for layer in range(L):
        plain = to_host(CausalAttend([30], window)(layer, *(xp.asarray(a[layer, 0]) for a in data)))
        assert np.abs(got[layer][0] - plain).max() <= 1e3 * D * EPS * np.abs(data[2]).max()
    assert cache.dropped == 0


@pytest.mark.theorem(
    "‖o − o_S‖ ≤ 2 ε max ‖v‖, ε the attention to evicted tokens",
    source="total variation: o − o_S = Σ (a_j − a_j/(1 − ε) 1[j ∈ S]) v_j",
)
@pytest.mark.parametrize("name", ["recent", "h2o", "tova", "snapkv", "random"])
@given(seed=seeds)
def test_bound_of_the_error_by_the_evicted_attention(xp, name, seed):
    data = random_sequences(seed, 1, 31)
    q, k, v = data
    cache = new_cache(xp, POLICIES[name])
    run_step(xp, cache, data, [30])
    cache.finish_prompt()
    held = [[set(row) for row in layer[0].tolist()] for layer in places(cache)]
    outputs = run_step(xp, cache, data, [1])
    for layer in range(L):
        for h in range(H):
            g = h // (H // G)
            p = rows_of(q[layer, 0, 30, h], k[layer, 0, :, g], list(range(31)), 30, None)
            lost = sum(p[j] for j in range(30) if j not in held[layer][g])
            error = np.linalg.norm(p @ v[layer, 0, :, g] - outputs[layer][0][0, h])
            assert (
                error <= 2 * lost * np.linalg.norm(v[layer, 0, :, g], axis=1).max() + 1e3 * D * EPS
            )


@pytest.mark.parametrize("name", POLICIES)
@given(seed=seeds)
@settings(max_examples=5)
def test_invariants_of_the_kept_tokens_at_every_step(xp, name, seed):
    """Sorted, within the budget, the first and the newest included; evicted tokens never
    come back.
    """
    policy = POLICIES[name]
    data = random_sequences(seed, 2, 40)
    cache = new_cache(xp, policy, 2)
    run_step(xp, cache, data, [25, 7])
    cache.finish_prompt()
    before = places(cache)
    lengths = cache.lengths[:]
    for _ in range(12):
        run_step(xp, cache, data, [1, 1])
        for layer in range(L):
            for b in range(2):
                read = cache.lengths[b] if policy.every_step else lengths[b]
                budget = policy.budgets(L, read)[layer]
                now = places(cache)[layer][b]
                old = before[layer][b]
                length = cache.lengths[b]
                assert np.all(np.diff(now, axis=1) > 0)
                for g in range(G):
                    assert set(now[g]) <= {*old[g], length - 1}
                    assert set(range(min(policy.first, length))) <= set(now[g])
                    assert (
                        set(range(max(0, length - policy.newest), length)) <= set(now[g])
                        or not policy.every_step
                    )
                if policy.every_step:
                    assert now.shape[1] == min(length, budget)
                else:
                    assert now.shape[1] == min(lengths[b], budget) + length - lengths[b]
                if policy.shared:
                    assert np.array_equal(now, np.broadcast_to(now[0], now.shape))
        before = places(cache)
    held = sum(layer[b].size for layer in before for b in range(2))
    assert cache.nbytes == held * (2 * D + 1) * 8 + held * 8
    assert cache.dropped == (2 * sum(cache.lengths) * L * G - 2 * held) // (2 * G)


@pytest.mark.theorem(
    "SnapKV's selection does not depend on how the prompt was cut into steps",
    source="only its last w queries vote",
)
@pytest.mark.parametrize("name", ["snapkv", "snapkv, max", "pyramidkv", "h2o", "streaming"])
@given(seed=seeds, cuts=st.sets(st.integers(1, 29), max_size=4))
def test_invariance_of_chunks_of_the_prompt(xp, name, seed, cuts):
    data = random_sequences(seed, 1, 30)
    whole = new_cache(xp, POLICIES[name])
    parts = new_cache(xp, POLICIES[name])
    run_step(xp, whole, data, [30])
    ends = sorted({*cuts, 30})
    for a, b in zip([0, *ends], ends, strict=False):
        run_step(xp, parts, data, [b - a])
    whole.finish_prompt()
    parts.finish_prompt()
    for a, b in zip(places(whole), places(parts), strict=True):
        assert np.array_equal(a[0], b[0])


def test_bad_calls_are_rejected(xp):
    with pytest.raises(ValueError, match="needs at least one sequence"):
        SparseCache(config(), 0, like=xp.zeros(1), policy=h2o(8))
    with pytest.raises(ValueError, match="evicts at random needs rng="):
        SparseCache(config(), 1, like=xp.zeros(1), policy=at_random(8))
    cache = new_cache(xp, h2o(8), 2)
    data = random_sequences(0, 2, 9)
    cache.view([1, 1])(0, *(xp.zeros((2, heads, D)) for heads in (H, G, G)))
    with pytest.raises(ValueError, match="of 2 layers: run the step first"):
        cache.advance([1, 1])  # of one layer only
    broken = cache.view([1, 1])
    broken(0, *(xp.zeros((2, heads, D)) for heads in (H, G, G)))
    broken.new[1] = [broken.new[0][0]]  # as if the second sequence had failed
    with pytest.raises(ValueError, match="of 2 layers: run the step first"):
        cache.advance([1, 1])
    with pytest.raises(ValueError, match="the view is for 2 tokens, the step has 3"):
        cache.view([1, 1])(0, *(xp.zeros((3, heads, D)) for heads in (H, G, G)))
    cache = new_cache(xp, h2o(8), 2)
    for step in (
        lambda: cache.advance([1, 1]),
        lambda: cache.view([1, 1, 1]),
        lambda: cache.view([1, -1]),
    ):
        with pytest.raises(
            ValueError, match=r"run the step first|holds 2 sequences|0 tokens or more"
        ):
            step()
    run_step(xp, cache, data, [5, 2])
    view = cache.view([1, 1])
    for layer in range(L):
        view(layer, *(xp.zeros((2, heads, D)) for heads in (H, G, G)))
    for counts in ([2, 0], [1, 1, 0], [-1, 0]):
        with pytest.raises(ValueError, match="cannot commit"):
            cache.advance(counts)
    assert cache.lengths == [5, 2]
    cache.finish_prompt()
    late = new_cache(xp, h2o(8), 2)
    run_step(xp, late, data, [5, 0])
    late.finish_prompt()
    assert late.prompt_done == [True, False]  # the second has no prompt yet


def test_one_set_for_all_heads_is_chosen_by_the_mean_of_all(xp):
    """The second key head attends to what the first does not: both count."""
    cache = new_cache(xp, tova(2))
    q = np.zeros((4, H, D))
    k = np.zeros((4, G, D))
    v = np.zeros((4, G, D))
    q[3] = 1.0
    k[0, 0] = (
        1.0  # head 0 attends to token 0 most, and to the others equally; head 1 to tokens 2 and 1
    )
    k[1, 1] = 8.5
    k[2, 1] = 9.0
    for layer, view in enumerate([cache.view([4])] * L):
        view(layer, *(xp.asarray(a) for a in (q, k, v)))
    cache.advance([4])
    cache.finish_prompt()
    assert places(cache)[0][0].tolist() == [[0, 2]] * 2  # means: about 0.42, 0.12, 0.43 and 0.03


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sums_of_attention_are_no_narrower_than_float32(xp, dtype):
    cache = SparseCache(config(), 1, like=xp.zeros(1, dtype=dtype), policy=h2o(5000))
    one = [xp.zeros((50, heads, D), dtype=dtype) for heads in (H, G, G)]
    view = cache.view([50])
    for layer in range(L):
        view(layer, *one)
    cache.advance([50])
    scores = cache.layers[0][0].scores
    assert scores.dtype == "float32"
    exact = np.cumsum(1 / np.arange(50, 0, -1))[::-1]  # token j: Σ_{t ≥ j} 1/(t + 1)
    np.testing.assert_allclose(to_host(scores)[0], exact, rtol=2e-3 if dtype == "float16" else 1e-6)


@pytest.mark.parametrize("name", ["tova", "h2o", "snapkv"])
def test_the_counted_bytes_are_all_that_is_held(name):
    """A view of a step's weights or queries would keep all of them in memory."""
    data = random_sequences(0, 1, 80)
    cache = new_cache(np, POLICIES[name])
    for n in (40, 30, 1):
        run_step(np, cache, data, [n])
    for layer in cache.layers:
        for array in (layer[0].scores, layer[0].last_queries):
            assert array is None or array.base is None or array.base.size <= array.size
    cache.finish_prompt()
    assert all(layer[0].last_queries is None for layer in cache.layers)


def test_a_step_that_is_computed_again_counts_once(xp):
    """After an error half-way the same view may go through all layers again."""
    data = random_sequences(0, 1, 20)
    garbage = random_sequences(1, 1, 20)
    once, twice = (new_cache(xp, h2o(6)) for _ in range(2))
    for step, n in enumerate((15, 1, 1)):
        start = once.lengths[0]
        view = twice.view([n])
        for some in (garbage, data):
            for layer in range(L):
                view(layer, *(xp.asarray(a[layer, 0, start : start + n].copy()) for a in some))
        twice.advance([n])
        run_step(xp, once, data, [n])
        if not step:
            once.finish_prompt()
            twice.finish_prompt()
    for a, b in zip(places(once), places(twice), strict=True):
        assert np.array_equal(a[0], b[0])
    for a, b in zip(once.layers, twice.layers, strict=True):
        assert np.array_equal(to_host(a[0].keys), to_host(b[0].keys))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_scores_stay_finite(xp, scale, dtype):
    """exp of a score of 1,000 overflows; relative to the largest one it does not."""
    q, k, v = (array.astype(dtype) for array in random_sequences(3, 1, 20))
    q = q * np.asarray(scale, dtype=dtype)
    policy = h2o(30)  # keeps everything
    cache = SparseCache(config(), 1, like=xp.zeros(1, dtype=dtype), policy=policy)
    outputs = [run_step(xp, cache, (q, k, v), [n])[0][0] for n in (13, 1, 6)]
    attend = CausalAttend([20])
    expected = attend(0, q[0, 0].astype("float64"), k[0, 0], v[0, 0])
    top = np.abs(q).max() * np.abs(k).max() * D
    atol = 50 * float(np.finfo(dtype).eps) * top * np.abs(v).max()
    np.testing.assert_allclose(np.concatenate(outputs), expected, rtol=0, atol=min(atol, 0.05))
    # a query's weights sum to 1 over the keys, in every head
    total = to_host(cache.layers[0][0].scores).sum(axis=1)
    np.testing.assert_allclose(total, 20, rtol=100 * float(np.finfo(dtype).eps))


# --- generation ---------------------------------------------------------------------------


ENDLESS = tiny_api_model(eos_token_ids=())
PROMPTS = [np.random.default_rng(i).integers(1, 257, n).tolist() for i, n in enumerate((70, 33, 5))]


def by_hand(prompt: list[int], count: int, policy: SparsePolicy) -> tuple[list[int], SparseCache]:
    """The prompt in one step, then token by token."""
    c = ENDLESS.config
    w = ENDLESS.weights
    cache = SparseCache(c, 1, like=np.zeros(1), policy=policy)
    new = list(prompt)
    for _ in range(count):
        fed = np.asarray(new[cache.lengths[0] :])
        at = np.arange(cache.lengths[0], len(new))
        z = logits(w, forward(w, c, fed, at, cache.view([len(fed)])))
        cache.advance([len(fed)])
        cache.finish_prompt()
        new.append(int(z[-1].argmax()))
    return new[len(prompt) :], cache


@pytest.mark.parametrize(
    "policy", [h2o(12), tova(12), streaming(12), snapkv(20, window=8), recent_only(12)]
)
def test_generation_reads_the_kept_tokens_alone_and_in_a_batch(policy):
    expected, caches = zip(*(by_hand(prompt, 25, policy) for prompt in PROMPTS), strict=True)
    assert ENDLESS.generate_batch(PROMPTS, 25, cache=policy) == list(expected)
    assert [ENDLESS.generate(prompt, 25, cache=policy) for prompt in PROMPTS] == list(expected)
    assert expected[0] != ENDLESS.generate(PROMPTS[0], 25)
    for prompt, cache in zip(PROMPTS, caches, strict=True):
        layers = ENDLESS.config.num_hidden_layers
        held = sum(layer[0].positions.shape[1] for layer in cache.layers)
        assert policy.tokens_held(len(prompt), 24, layers) == held


def test_within_the_budget_the_output_is_unchanged_with_and_without_drafts():
    plain = ENDLESS.generate(PROMPTS[0], 40)
    for policy in (h2o(120), snapkv(120), at_random(120)):
        for drafter in (None, ENDLESS, NGramDrafter(4)):
            assert ENDLESS.generate(PROMPTS[0], 40, cache=policy, drafter=drafter) == plain
    with pytest.raises(
        ValueError, match="a tree of drafts is verified in a cache that keeps everything"
    ):
        ENDLESS.generate(PROMPTS[0], 8, cache=h2o(12), drafter=TreeDrafter(ENDLESS, 3))
    for wrong in ("h2o", h2o, 256, SparsePolicy):
        for count in (0, 8):
            with pytest.raises(
                ValueError, match=r"a cache policy is a Kivi\(...\) or one of refllm.kv.sparse"
            ):
                ENDLESS.generate(PROMPTS[0], count, cache=wrong)
            with pytest.raises(ValueError, match="a cache policy is"):
                ENDLESS.generate(PROMPTS[0], count, cache=wrong, drafter=NGramDrafter(4))
    drawn = [ENDLESS.generate(PROMPTS[0], 40, cache=at_random(12), rng=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
