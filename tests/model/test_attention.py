"""Attention in three forms against the definition, one key and one query at a time."""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from conftest import to_host
from refllm.model.attention import (
    NEGATIVE,
    CausalAttend,
    attention,
    causal_bias,
    flash_attention,
    masked_score,
    merge,
)
from strategies import partitions, seeds

EPS = float(np.finfo(np.float64).eps)
windows = st.one_of(st.none(), st.integers(1, 7))


@st.composite
def problems(draw, *, max_queries: int = 6, max_keys: int = 14):
    """Host q[T, H, D], k[S, G, D], v[S, G, D] in float64; the scale makes some softmaxes
    one-hot.
    """
    groups = draw(st.integers(1, 3))
    repeats = draw(st.integers(1, 3))
    dim = draw(st.integers(1, 5))
    count = draw(st.integers(1, max_queries))
    keys = draw(st.integers(0, max_keys))
    rng = np.random.default_rng(draw(seeds))
    q = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4])) * rng.standard_normal(
        (count, groups * repeats, dim)
    )
    return q, rng.standard_normal((keys, groups, dim)), rng.standard_normal((keys, groups, dim))


def on(xp, *arrays):
    return tuple(xp.asarray(a) for a in arrays)


def definition(q, k, v, visible):
    """softmax(q kᵀ/√D) v over the keys j with ``visible(t, j)``, in loops; no key gives (0,
    −∞).
    """
    count, heads, dim = q.shape
    groups = k.shape[1]
    o = np.zeros_like(q)
    lse = np.full((count, heads), -math.inf)
    for t in range(count):
        for h in range(heads):
            g = h // (heads // groups)
            seen = [j for j in range(len(k)) if visible(t, j)]
            scores = [float(q[t, h] @ k[j, g]) / math.sqrt(dim) for j in seen]
            if scores:
                top = max(scores)
                p = [math.exp(s - top) for s in scores]
                o[t, h] = sum(a * v[j, g] for a, j in zip(p, seen, strict=True)) / math.fsum(p)
                lse[t, h] = top + math.log(math.fsum(p))
    return o, lse


def bounds(q, k, v, eps: float = EPS) -> tuple[float, float]:
    """(atol of o, atol of lse) for two computations of the same attention that round
    differently.

    A score is a sum of D products and errs by (D+2)·eps·|q|·|k|/√D; subtracting the maximum
    adds as much again; exp turns that into a relative error of p. The sums over S keys add
    S·eps each, and o is a mean of v, so the relative error of the weights bounds it by
    max|v|. The factor 2 is for the two computations, a second one for the rescalings of
    tiles and merges.
    """
    dim = q.shape[-1]
    keys = max(len(k), 1)
    size = (
        float(np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()) / math.sqrt(dim)
        if len(k)
        else 0.0
    )
    score = 2 * (dim + 4) * eps * size
    largest = float(np.abs(v).max()) if len(v) else 0.0
    return 4 * largest * (2 * score + (2 * keys + 8) * eps), 4 * (score + (keys + 8) * eps)


def assert_same(ours, theirs, q, k, v, eps: float = EPS):
    (o, lse), (o_ref, lse_ref) = (
        tuple(np.asarray(to_host(x), np.float64) for x in pair) for pair in (ours, theirs)
    )
    atol_o, atol_lse = bounds(q, k, v, eps)
    np.testing.assert_allclose(o, o_ref, rtol=0, atol=atol_o)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(lse_ref))
    finite = ~np.isneginf(lse_ref)
    np.testing.assert_allclose(lse[finite], lse_ref[finite], rtol=0, atol=atol_lse)


@pytest.mark.theorem(
    "attention with start, window and first_key is softmax(q kᵀ/√D) v over the keys at "
    "positions in "
    "(position − window, position], head h reading key head h // (H/G)",
    source="Vaswani et al. 2017, eq. 1; Ainslie et al. 2023",
)
@given(problems(), st.integers(0, 16), windows, st.integers(0, 4))
def test_naive_form_is_the_definition(pure_xp, problem, start, window, first_key):
    q, k, v = problem

    def visible(t, j):
        return start + t - (window or math.inf) < first_key + j <= start + t

    ours = attention(*on(pure_xp, q, k, v), start=start, window=window, first_key=first_key)
    assert_same(ours, definition(q, k, v, visible), q, k, v)


@pytest.mark.theorem(
    "online softmax = softmax, for any tile sizes; skipping hidden tiles = masking them",
    source="Milakov & Gimelshein 2018, alg. 3; FlashAttention-2, alg. 1",
)
@given(
    problems(),
    st.integers(0, 16),
    windows,
    st.integers(0, 4),
    st.integers(1, 7),
    st.integers(1, 15),
)
def test_flash_equals_naive_for_any_tiles(
    pure_xp, problem, start, window, first_key, tile_q, tile_k
):
    q, k, v = problem
    at = {"start": start, "window": window, "first_key": first_key}
    naive = attention(*on(pure_xp, q, k, v), **at)
    flash = flash_attention(*on(pure_xp, q, k, v), **at, tile_q=tile_q, tile_k=tile_k)
    assert_same(flash, naive, q, k, v)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("window", [None, 3])
def test_narrow_types_keep_their_dtype_and_the_identity_of_hidden_rows(xp, dtype, window):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(dtype) for s in ((9, 4, 8), (12, 2, 8), (12, 2, 8)))
    exact = attention(*(x.astype("float64") for x in (q, k, v)), start=3, window=window)
    for form in (attention, flash_attention):
        tiles = {"tile_q": 4, "tile_k": 2} if form is flash_attention else {}
        o, lse = form(*on(xp, q, k, v), start=3, window=window, **tiles)
        assert o.dtype == lse.dtype == np.dtype(dtype)
        assert_same(
            (o, lse),
            exact,
            q.astype("float64"),
            k.astype("float64"),
            v.astype("float64"),
            float(np.finfo(dtype).eps),
        )
        o, lse = form(*on(xp, q, k, v), start=3, first_key=100, **tiles)
        assert not to_host(o).any()
        assert np.isneginf(to_host(lse)).all()
        assert math.isfinite(masked_score(xp, o.dtype))


@pytest.mark.parametrize("size", [1.0, 1e3, 6e3])
@pytest.mark.parametrize("sign", [1, -1])
def test_hidden_rows_of_float16_stay_hidden_beside_large_scores(xp, size, sign):
    """float16 ends at 65,504: a masked score is −58,950 plus the score, and no score that fits
    beside it may make a hidden key visible.
    """
    q, k, v = (np.ones((3, 1, 1)), np.full((5, 1, 1), sign * size), np.ones((5, 1, 1)))
    q, k, v = (xp.asarray(x.astype("float16")) for x in (q, k, v))
    for form in (attention, flash_attention):
        tiles = {"tile_k": 2, "tile_q": 2} if form is flash_attention else {}
        o, lse = form(q, k, v, start=0, first_key=1, **tiles)
        assert to_host(o)[:, 0, 0].tolist() == [0, 1, 1]  # the first query comes before every key
        assert np.isneginf(to_host(lse)[:, 0]).tolist() == [True, False, False]


# --- merging ------------------------------------------------------------------------------


@pytest.mark.theorem(
    "merging attention over any partition of the keys into intervals, empty ones too, in "
    "any order, is "
    "attention over all of them",
    source="FlashInfer, Ye et al. 2025, §2.2",
)
@given(st.data())
def test_merge_of_any_partition_in_any_order_is_the_whole(pure_xp, data):
    q, k, v = data.draw(problems())
    start = data.draw(st.integers(0, 16))
    window = data.draw(windows)
    edges = np.cumsum([0, *data.draw(partitions(len(k), empty=True))]).tolist()
    order = data.draw(st.permutations(list(pairwise(edges))))
    qx, kx, vx = on(pure_xp, q, k, v)
    form = data.draw(st.sampled_from([attention, flash_attention]))
    parts = [
        form(qx, kx[a:b, ...], vx[a:b, ...], start=start, window=window, first_key=a)
        for a, b in order
    ]
    whole = attention(qx, kx, vx, start=start, window=window)
    joined = reduce(lambda a, b: merge(*a, *b), parts) if parts else whole
    assert_same(joined, whole, q, k, v)


@pytest.mark.theorem(
    "where all keys are visible their order does not matter, and any partition into subsets "
    "merges to the whole",
    source="softmax is symmetric in its terms",
)
@given(st.data())
def test_keys_are_a_set(pure_xp, data):
    q, k, v = data.draw(problems())
    everywhere = len(k)  # every query comes after every key
    part = np.array(
        data.draw(st.lists(st.integers(0, 3), min_size=len(k), max_size=len(k))), dtype=np.int64
    )
    shuffled = np.array(data.draw(st.permutations(range(len(k)))), dtype=np.int64)
    whole = attention(*on(pure_xp, q, k, v), start=everywhere)
    state = (
        pure_xp.zeros_like(whole[0]),
        pure_xp.full(whole[1].shape, -math.inf, dtype=whole[1].dtype),
    )
    for number in range(4):
        mine = [j for j in shuffled.tolist() if part[j] == number]
        state = merge(*state, *attention(*on(pure_xp, q, k[mine], v[mine]), start=everywhere))
    assert_same(state, whole, q, k, v)


@st.composite
def partial_states(draw, parts: int):
    """``parts`` pairs o[T, H, D], lse[T, H], where some rows are the identity (0, −∞)."""
    rng = np.random.default_rng(draw(seeds))
    scale = draw(st.sampled_from([1.0, 100.0, 1e5]))
    states = []
    for _ in range(parts):
        o = rng.standard_normal((3, 2, 4))
        lse = scale * rng.standard_normal((3, 2))
        empty = rng.random((3, 2)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
        o[empty] = 0.0
        lse[empty] = -math.inf
        states.append((o, lse))
    return states


@pytest.mark.theorem(
    "merge is commutative, bit for bit, and (0, −∞) is its identity, bit for bit",
    source="FlashInfer §2.2",
)
@given(partial_states(2))
def test_merge_is_commutative_and_has_an_identity(pure_xp, states):
    a, b = (on(pure_xp, *s) for s in states)
    for left, right in zip(merge(*a, *b), merge(*b, *a), strict=True):
        np.testing.assert_array_equal(to_host(left), to_host(right))
    nothing = pure_xp.zeros_like(a[0]), pure_xp.full(a[1].shape, -math.inf, dtype=a[1].dtype)
    for joined in (merge(*a, *nothing), merge(*nothing, *a)):
        for got, want in zip(joined, a, strict=True):
            np.testing.assert_array_equal(to_host(got), to_host(want))


@pytest.mark.theorem("merge is associative up to rounding", source="FlashInfer §2.2")
@given(partial_states(3))
def test_merge_is_associative(pure_xp, states):
    a, b, c = (on(pure_xp, *s) for s in states)
    left = merge(*merge(*a, *b), *c)
    right = merge(*a, *merge(*b, *c))
    lse = to_host(left[1])
    expected = to_host(right[1])
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected))
    finite = ~np.isneginf(expected)
    # lse is rounded to eps·|lse| twice on each side, and e^lse carries that on as a
    # relative error of a weight
    error = 8 * EPS * (1.0 + np.abs(expected[finite]).max(initial=0.0))
    np.testing.assert_allclose(lse[finite], expected[finite], rtol=0, atol=error)
    largest = max(np.abs(s[0]).max() for s in states)
    np.testing.assert_allclose(
        to_host(left[0]), to_host(right[0]), rtol=0, atol=2 * largest * error
    )


# --- what changes nothing -----------------------------------------------------------------


@pytest.mark.theorem(
    "adding one vector u to every key shifts a query's scores by q·u/√D: o stays and lse "
    "moves by as much",
    source="softmax(s + c) = softmax(s)",
)
@given(problems(), st.integers(0, 16), windows, seeds, st.sampled_from([0.1, 1.0, 100.0]))
def test_scores_may_be_shifted(pure_xp, problem, start, window, seed, size):
    q, k, v = problem
    u = size * np.random.default_rng(seed).standard_normal(k.shape[1:])
    moved = k + u
    repeats = q.shape[1] // k.shape[1]
    shift = np.einsum("thd,hd->th", q, np.repeat(u, repeats, axis=0)) / math.sqrt(q.shape[-1])
    o, lse = (
        to_host(x)
        for x in flash_attention(*on(pure_xp, q, k, v), start=start, window=window, tile_k=3)
    )
    after = flash_attention(*on(pure_xp, q, moved, v), start=start, window=window, tile_k=3)
    # k + u was rounded by eps·|k + u|: one more error of the kind that `bounds` allows for,
    # in D products
    assert_same(
        after, (o, lse + shift), q, np.concatenate([k, moved, np.broadcast_to(u, k.shape)]), v
    )


@pytest.mark.theorem(
    "grouped-query attention = multi-head attention with repeated key heads",
    source="Ainslie et al. 2023",
)
@given(problems(), st.integers(0, 16), windows)
def test_grouped_queries_are_repeated_heads(pure_xp, problem, start, window):
    q, k, v = problem
    repeats = q.shape[1] // k.shape[1]
    many = (np.repeat(x, repeats, axis=1) for x in (k, v))
    grouped = flash_attention(*on(pure_xp, q, k, v), start=start, window=window)
    assert_same(
        flash_attention(*on(pure_xp, q, *many), start=start, window=window), grouped, q, k, v
    )


@pytest.mark.theorem("a key whose score is −∞ changes nothing", source="e^−∞ = 0")
@given(problems(max_keys=8), st.data())
def test_a_key_of_score_minus_infinity_changes_nothing(pure_xp, problem, data):
    q, k, v = problem
    # an extra coordinate of the queries is 1: a key that has −∞ there and one that has 0
    # there score −∞ and q·k
    scale = math.sqrt((q.shape[-1] + 1) / q.shape[-1])  # 1/√D is now 1/√(D+1)
    wide_q = np.concatenate([q * scale, np.ones((*q.shape[:2], 1))], axis=-1)
    widen = [np.concatenate([x, np.zeros((*x.shape[:2], 1))], axis=-1) for x in (k, v)]
    where = data.draw(st.lists(st.integers(0, len(k)), min_size=1, max_size=3))
    dead = np.zeros((1, *widen[0].shape[1:]))
    dead[..., -1] = -math.inf
    keys = np.insert(widen[0], where, dead, axis=0)
    values = np.insert(widen[1], where, 7.0, axis=0)
    for form in (attention, flash_attention):
        tiles = {"tile_k": 2} if form is flash_attention else {}
        o, lse = form(*on(pure_xp, wide_q, keys, values), start=len(keys), **tiles)
        plain = attention(*on(pure_xp, q, k, v), start=len(k))
        assert_same((to_host(o)[..., :-1], lse), plain, q, k, v)


@pytest.mark.theorem(
    "a query that sees no key gives o = 0 and lse = −∞, without a NaN on the way",
    source="identity of merge",
)
@given(problems(), st.integers(0, 5), st.integers(1, 3), st.integers(1, 4))
def test_queries_that_see_no_key_give_zero(pure_xp, problem, start, window, tile_k):
    q, k, v = problem
    beyond = {"start": start, "first_key": start + len(q)}  # every key lies in the future
    # every key lies before the window
    forgotten = {"start": start + len(k) + window, "window": window}
    for at in (beyond, forgotten):
        for o, lse in (
            attention(*on(pure_xp, q, k, v), **at),
            flash_attention(*on(pure_xp, q, k, v), **at, tile_k=tile_k),
        ):
            assert not to_host(o).any()
            assert np.isneginf(to_host(lse)).all()


@given(problems(), st.data())
def test_a_nan_in_a_key_shows_in_every_query_that_sees_it(pure_xp, problem, data):
    q, k, v = problem
    assume(len(k) > 0)
    k = k.copy()
    k[data.draw(st.integers(0, len(k) - 1))] = np.nan
    for form in (attention, flash_attention):
        o, lse = form(*on(pure_xp, q, k, v), start=len(k))  # every query sees every key
        assert np.isnan(to_host(o)).all()
        assert np.isnan(to_host(lse)).all()


@given(st.integers(1, 6), st.integers(1, 8), st.integers(-3, 9), windows)
def test_causal_bias_is_the_rule_and_none_where_it_hides_nothing(
    pure_xp, count, keys, offset, window
):
    bias = causal_bias(pure_xp, count, keys, offset, window, pure_xp.float64)
    visible = [
        [offset + t - (window or math.inf) < j <= offset + t for j in range(keys)]
        for t in range(count)
    ]
    if bias is None:
        assert all(map(all, visible))
    else:
        np.testing.assert_array_equal(to_host(bias), np.where(visible, 0.0, NEGATIVE))
        assert not all(map(all, visible))


# --- the plain attend ---------------------------------------------------------------------


@pytest.mark.theorem(
    "a sequence's output does not depend on its neighbours in the ragged batch",
    source="ARCHITECTURE.md: the attend seam",
)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), windows, seeds)
def test_ragged_batch_is_its_sequences_one_by_one(pure_xp, lengths, window, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((sum(lengths), heads, 3)) for heads in (4, 2, 2))
    together = to_host(CausalAttend(lengths, window)(0, *on(pure_xp, q, k, v)))
    for a, b in pairwise(np.cumsum([0, *lengths]).tolist()):
        alone = definition(q[a:b], k[a:b], v[a:b], lambda t, j: t - (window or math.inf) < j <= t)[
            0
        ]
        np.testing.assert_allclose(together[a:b], alone, rtol=0, atol=bounds(q, k, v)[0])


@pytest.mark.parametrize("lengths", [[2], [4, 2]])
def test_lengths_that_do_not_fit_the_batch_are_rejected(lengths):
    x = np.ones((5, 2, 4))
    with pytest.raises(ValueError, match="lengths"):
        CausalAttend(lengths)(0, x, x, x)


def test_long_prefill_in_default_tiles_equals_naive():
    """More queries and keys than one default tile holds, so that the loops over tiles run."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((700, heads, 4)) for heads in (2, 1, 1))
    for window in (None, 130):
        assert_same(
            flash_attention(q, k, v, start=0, window=window),
            attention(q, k, v, start=0, window=window),
            q,
            k,
            v,
        )
