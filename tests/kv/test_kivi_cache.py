"""The KIVI cache against the definition in ``kivi`` for each token, whatever the steps, the
batch and the drafts were.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fakecupy
from conftest import to_host
from kv_caches import kivis, quantized_by_loops, run_step, tiny_api_model
from networks import NETWORKS, TOKENS, full_logits, random_tensors
from refllm.decode.sampling_params import GREEDY
from refllm.decode.speculative.cascade import Cascade
from refllm.decode.speculative.control_drafters import PerfectDrafter
from refllm.decode.speculative.loop import speculate
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.kv.kivi import Kivi
from refllm.kv.kivi_attend import KiviAttend, attend_as_decoded
from refllm.kv.kivi_cache import KiviCache
from refllm.model.attention import CausalAttend
from refllm.model.config import ModelConfig
from refllm.model.llama import build, forward, logits
from strategies import seeds

L = 2
H = 4
G = 2
D = 8
CAPACITY = 150
EPS64 = float(np.finfo("float64").eps)


def config(window: int | None = None) -> ModelConfig:
    return ModelConfig("mistral", 5, 8, 8, L, H, G, D, sliding_window=window)


def random_sequences(seed: int, sequences: int, length: int = CAPACITY) -> tuple[np.ndarray, ...]:
    """q, k, v[L, B, T, heads, D]."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((L, sequences, length, heads, D)) for heads in (H, G, G))


def poisoned(
    xp, kivi: Kivi, sequences: int, window: int | None = None, dtype: str = "float64"
) -> KiviCache:
    """A cache in which everything that was not written is NaN."""
    cache = KiviCache(config(window), sequences, CAPACITY, like=xp.zeros(1, dtype=dtype), kivi=kivi)
    for array in (cache.key_scales, cache.key_residual, cache.value_scales, cache.value_residual):
        array[...] = np.nan
    return cache


def contents(cache: KiviCache) -> list[np.ndarray]:
    return [
        to_host(a)
        for layer in range(L)
        for b in range(len(cache.lengths))
        for a in cache.read(layer, b)
    ]


steps = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=6)


@pytest.mark.theorem(
    "The contents of the cache are a function of the length: neither the cut into steps nor a "
    "neighbour nor a rejected draft changes a bit",
    source="Liu et al. 2024, algorithm 1: flushes at multiples of R from position 0",
)
@given(
    seed=seeds,
    kivi=kivis,
    counts=steps,
    data=st.data(),
    dtype=st.sampled_from(["float16", "float64"]),
)
def test_invariance_of_the_cut_into_steps(xp, seed, kivi, counts, data, dtype):
    """In float16 the residual window is rounded, so tokens that skip it are rounded before
    they are quantised.
    """
    texts_of = random_sequences(seed, 2)
    cache = poisoned(xp, kivi, 2, dtype=dtype)
    for pair in counts:
        brought = [min(n, CAPACITY - s) for n, s in zip(pair, cache.lengths, strict=True)]
        kept = [data.draw(st.integers(0, n)) for n in brought]
        if sum(brought):
            run_step(xp, cache, texts_of, brought, kept)
    straight = poisoned(xp, kivi, 2, dtype=dtype)
    if sum(cache.lengths):
        run_step(xp, straight, texts_of, cache.lengths)
    assert straight.lengths == cache.lengths
    for a, b in zip(contents(cache), contents(straight), strict=True):
        assert np.array_equal(a, b)


@given(seed=seeds, kivi=kivis, length=st.integers(0, CAPACITY))
def test_exact_value_codes_are_those_of_loops_and_the_residual_window_is_unchanged(
    xp, seed, kivi, length
):
    data = random_sequences(seed, 1)
    _, k, v = data
    cache = poisoned(xp, kivi, 1)
    if length:
        run_step(xp, cache, data, [length])
    for layer in range(L):
        keys, values = (to_host(a) for a in cache.read(layer, 0))
        whole = kivi.quantized_keys(length)
        old = kivi.quantized_values(length)
        expected_k = quantized_by_loops(
            k[layer, 0, :length], kivi.key_bits, kivi.group, "channel", whole
        ).transpose(1, 2, 0)
        expected_v = quantized_by_loops(
            v[layer, 0, :length], kivi.value_bits, kivi.group, "token", old
        ).transpose(1, 0, 2)
        assert np.array_equal(keys[:, :, whole:], expected_k[:, :, whole:])
        assert np.array_equal(values[:, old:], expected_v[:, old:])
        np.testing.assert_allclose(keys, expected_k, rtol=0, atol=64 * EPS64 * 8)
        np.testing.assert_allclose(values, expected_v, rtol=0, atol=64 * EPS64 * 8)


@pytest.mark.theorem(
    "Token by token, the cache gives the output of a whole sequence that is computed at once "
    "with a boundary for each query",
    source="refllm.kv.kivi",
)
@settings(max_examples=10)
@given(
    seed=seeds,
    kivi=kivis,
    window=st.sampled_from([None, 9, 70]),
    length=st.integers(60, 110),
    late=st.integers(0, 40),
)
def test_equality_with_a_whole_sequence_computed_as_decoded(xp, seed, kivi, window, length, late):
    """Two sequences, the second ``late`` steps behind: their positions differ in every step."""
    data = random_sequences(seed, 2, length)
    cache = poisoned(xp, kivi, 2, window)
    expected = [
        [
            to_host(
                attend_as_decoded(*(xp.asarray(a[layer, b]) for a in data), kivi, window=window)
            )
            for b in (0, 1)
        ]
        for layer in range(L)
    ]
    for step in range(length):
        counts = [1, int(step >= late)]
        at = cache.lengths[:]
        outputs = run_step(xp, cache, data, counts)
        for layer in range(L):
            for b in (0, 1):
                there = expected[layer][b][at[b] : at[b] + counts[b]]
                assert (
                    np.abs(outputs[layer][b] - there).max(initial=0)
                    <= 1e3 * D * EPS64 * np.abs(data[2]).max()
                )


def test_a_prompt_in_one_step_attends_to_itself_in_full_precision(xp):
    data = random_sequences(0, 1)
    got = run_step(xp, poisoned(xp, Kivi(1, 1, 8, 32), 1), data, [CAPACITY])
    for layer in range(L):
        plain = to_host(CausalAttend([CAPACITY])(layer, *(xp.asarray(a[layer, 0]) for a in data)))
        assert np.abs(got[layer][0] - plain).max() <= 1e3 * D * EPS64 * np.abs(data[2]).max()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("capacity", [1, 31, 32, 33, 100, 128, 150])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_conservation_bytes_are_those_of_the_formula_and_of_the_free_capacity(
    xp, bits, capacity, dtype
):
    kivi = Kivi(bits, bits, 8, 32)
    cache = KiviCache(config(), 3, capacity, like=xp.zeros(1), kivi=kivi, dtype=dtype)
    item = np.dtype(dtype).itemsize
    unused = 32 - capacity % 32 if capacity >= 32 else 0  # unused columns of the residual window
    expected = kivi.nbytes(config(), capacity, full=8 * item) + L * G * D * unused * item
    assert cache.nbytes == 3 * expected


def test_a_cache_in_float16_serves_queries_in_float32(xp):
    data = tuple(a.astype("float32") for a in random_sequences(1, 1))
    kivi = Kivi(8, 8, 8, 32)
    half = KiviCache(
        config(), 1, CAPACITY, like=xp.zeros(1, dtype="float32"), kivi=kivi, dtype="float16"
    )
    whole = KiviCache(config(), 1, CAPACITY, like=xp.zeros(1, dtype="float32"), kivi=kivi)
    for counts in ([100], [1], [1]):
        a = run_step(xp, half, data, counts)
        b = run_step(xp, whole, data, counts)
    assert a[0][0].dtype == "float32"
    assert 0 < np.abs(a[1][0] - b[1][0]).max() < 0.02
    assert half.nbytes < whole.nbytes
    exact, rounded = (half.read(0, 0, dtype)[0] for dtype in ("float32", None))
    assert (exact.dtype, rounded.dtype) == ("float32", "float16")
    assert not np.array_equal(to_host(exact), to_host(rounded).astype("float32"))
    np.testing.assert_allclose(to_host(exact), to_host(rounded), rtol=0, atol=0.01)


# --- bad calls ----------------------------------------------------------------------------


def test_bad_calls_are_rejected_and_nothing_is_lost(xp):
    cache = poisoned(xp, Kivi(2, 2, 8, 32), 2)
    data = random_sequences(0, 2)
    with pytest.raises(ValueError, match="a head of 8 channels does not divide into groups of 16"):
        KiviCache(config(), 1, 5, like=xp.zeros(1), kivi=Kivi(2, 2, 16, 32))
    with pytest.raises(ValueError, match="needs at least one sequence of one token, got 0 × 5"):
        KiviCache(config(), 0, 5, like=xp.zeros(1), kivi=Kivi(2, 2, 8, 32))
    with pytest.raises(ValueError, match="run the step first"):
        cache.advance([1, 1])
    run_step(xp, cache, data, [40, 3])
    before = contents(cache)
    for counts, message in (
        ([111, 0], "sequence 0: 40 cached"),
        ([1, -1], "sequence 1"),
        ([1, 1, 1], "holds 2"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.view(counts)
    with pytest.raises(ValueError, match="the view is for 5 tokens, the step has 2"):
        cache.view([5, 0])(0, *(xp.zeros((2, heads, D)) for heads in (H, G, G)))
    cache.view([1, 1])(0, *(xp.zeros((2, heads, D)) for heads in (H, G, G)))
    with pytest.raises(ValueError, match="of 2 layers: run the step first"):
        cache.advance([1, 1])  # of one layer only
    view = cache.view([1, 1])
    for layer in range(L):
        view(layer, *(xp.zeros((2, heads, D)) for heads in (H, G, G)))
    for counts in ([2, 0], [1, 1, 0], [-1, 0]):
        with pytest.raises(ValueError, match="cannot commit"):
            cache.advance(counts)
    assert cache.lengths == [40, 3]
    for a, b in zip(contents(cache), before, strict=True):
        assert np.array_equal(a, b)
    cache.advance([1, 0])
    with pytest.raises(ValueError, match="run the step first"):
        cache.advance([0, 1])  # a step is committed once


def test_a_decode_step_moves_nothing_between_host_and_device():
    cache = poisoned(fakecupy, Kivi(2, 2, 8, 32), 2)
    data = random_sequences(0, 2)
    run_step(fakecupy, cache, data, [63, 40])
    tokens = [[fakecupy.asarray(np.ones((2, heads, D))) for heads in (H, G, G)] for _ in range(L)]
    with fakecupy.counting() as c:
        for _ in range(3):  # across a flush of keys
            view = cache.view([1, 1])
            for layer in range(L):
                view(layer, *(a.copy() for a in tokens[layer]))
            cache.advance([1, 1])
    assert (c.h2d, c.d2h, c.syncs) == (0, 0, 0)


# --- generation ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_decoding_is_the_forward_pass_with_kivi_attention(name):
    """Over whole networks: token by token through the cache, and all at once."""
    c = NETWORKS[name]
    # groups of two would be restored exactly
    kivi = Kivi(8, 8, 5, 20) if c.head_dim == 10 else Kivi(4, 4, 8, 16)
    weights = build(c, random_tensors(c, 0, "float64"))
    cache = KiviCache(c, 1, len(TOKENS), like=np.zeros(1), kivi=kivi)
    place = np.arange(len(TOKENS))
    whole = logits(
        weights,
        forward(weights, c, TOKENS, place, KiviAttend([len(TOKENS)], kivi, c.sliding_window)),
    )
    for t in range(len(TOKENS)):
        z = logits(
            weights, forward(weights, c, TOKENS[t : t + 1], place[t : t + 1], cache.view([1]))
        )
        cache.advance([1])
        assert np.abs(z[0] - whole[t]).max() <= 1e-9 * np.abs(whole).max()
    # it is lossy, so it was used
    assert np.abs(whole - full_logits(weights, c)).max() > 1e-6 * np.abs(whole).max()


COARSE = Kivi(1, 1, 4, 32)  # one bit, and a residual window that is never filled
PATIENT = Kivi(1, 1, 4, 160)
PROMPTS = [np.random.default_rng(i).integers(1, 257, n).tolist() for i, n in enumerate((70, 33, 5))]
ENDLESS = tiny_api_model(eos_token_ids=())


def by_hand(prompt: list[int], count: int, kivi: Kivi) -> list[int]:
    """The prompt in one step, then token by token."""
    c = ENDLESS.config
    w = ENDLESS.weights
    cache = KiviCache(c, 1, 160, like=np.zeros(1), kivi=kivi)
    new = list(prompt)
    for _ in range(count):
        fed = np.asarray(new[cache.lengths[0] :])
        at = np.arange(cache.lengths[0], len(new))
        z = logits(w, forward(w, c, fed, at, cache.view([len(fed)])))
        cache.advance([len(fed)])
        new.append(int(z[-1].argmax()))
    return new[len(prompt) :]


def test_generation_reads_the_cache_alone_and_in_a_batch():
    expected = [by_hand(prompt, 25, COARSE) for prompt in PROMPTS]
    assert ENDLESS.generate_batch(PROMPTS, 25, cache=COARSE) == expected
    assert [ENDLESS.generate(prompt, 25, cache=COARSE) for prompt in PROMPTS] == expected
    plain = ENDLESS.generate_batch(PROMPTS, 25)
    # 30 tokens are in the residual window
    assert [a == b for a, b in zip(plain, expected, strict=True)] == [False, False, True]
    assert "".join(ENDLESS.stream("abc" * 30, 20, cache=COARSE)) == ENDLESS.generate(
        "abc" * 30, 20, cache=COARSE
    )


def test_within_the_residual_window_the_output_is_unchanged_with_and_without_drafts():
    plain = ENDLESS.generate(PROMPTS[0], 60)
    for drafter in (None, ENDLESS, NGramDrafter(4)):
        assert ENDLESS.generate(PROMPTS[0], 60, cache=PATIENT, drafter=drafter) == plain


def test_a_step_of_drafts_reads_the_cache_at_its_beginning():
    """Chains of drafts over several flushes: each step is repeated by hand, on the same
    cache.
    """
    c = ENDLESS.config
    w = ENDLESS.weights
    prompt = PROMPTS[0]
    accepted = 0
    for drafter in (
        NGramDrafter(5),
        ModelDrafter(tiny_api_model(1, eos_token_ids=()), 3),
        PerfectDrafter(ENDLESS, 4),
    ):
        taken = list(
            speculate(w, c, prompt, 60, GREEDY, np.random.default_rng(0), drafter, policy=COARSE)
        )
        cache = KiviCache(c, 1, 160, like=np.zeros(1), kivi=COARSE)
        text = list(prompt)
        for i, step in enumerate(taken):
            fed = [text[-1], *step.drafts] if i else text
            at = np.arange(cache.lengths[0], cache.lengths[0] + len(fed))
            z = logits(w, forward(w, c, np.asarray(fed), at, cache.view([len(fed)])))
            found = z.argmax(axis=-1).tolist() if i else z[-1:].argmax(axis=-1).tolist()
            assert step.drafts[: step.accepted] == found[: step.accepted]
            assert step.token == found[step.accepted]
            assert step.accepted == len(step.drafts) or step.drafts[step.accepted] != step.token
            cache.advance([1 + step.accepted if i else len(prompt)])
            text += step.tokens
        accepted += sum(step.accepted for step in taken)
        # across a flush
        assert COARSE.quantized_keys(len(text)) >= COARSE.quantized_keys(len(prompt)) + 32
        assert ENDLESS.generate(prompt, 60, cache=COARSE, drafter=drafter) == text[len(prompt) :]
    assert accepted > 0


def test_a_long_prompt_attends_to_itself_in_full_precision_in_any_batch(monkeypatch):
    prompts = [np.random.default_rng(n).integers(1, 257, n).tolist() for n in (300, 200, 400)]
    model = tiny_api_model(eos_token_ids=(), max_position_embeddings=512)
    view = KiviCache.view
    steps = []
    monkeypatch.setattr(
        KiviCache, "view", lambda self, counts: steps.append(list(counts)) or view(self, counts)
    )
    together = model.generate_batch(prompts, 12, cache=COARSE)
    # all of them in one step, not in chunks
    assert steps == [[300, 200, 400], *[[1, 1, 1]] * 11]
    assert together == [model.generate(prompt, 12, cache=COARSE) for prompt in prompts]
    # the first token is that of the full cache
    for prompt, new in zip(prompts, together, strict=True):
        assert new[:1] == model.generate(prompt, 1)
    assert COARSE.new_cache(model.config, 1, 9, like=np.zeros(1)).key_residual.dtype == "float64"


def test_a_tree_of_drafts_is_rejected_before_anything_is_computed():
    for drafter in (TreeDrafter(ENDLESS, 3), Cascade(NGramDrafter(3), TreeDrafter(ENDLESS, 3))):
        for count in (0, 1, 8):
            with pytest.raises(
                ValueError, match="a tree of drafts is verified in a cache that keeps"
            ):
                ENDLESS.generate(PROMPTS[0], count, cache=COARSE, drafter=drafter)
