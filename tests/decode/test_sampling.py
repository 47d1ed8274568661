"""Sampling: the filters against brute force and transformers, the probabilities of the draw
by exact interval edges.

The cut of a filter is a comparison of floats. Where a test compares two ways to compute the
same cut, it draws cases whose distance from the threshold is far above the rounding of
either way, or whose arithmetic is exact.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import fakecupy
from conftest import oracle, to_host
from refllm.decode.margin import margin
from refllm.decode.penalties import apply_count_penalties, apply_repetition_penalty
from refllm.decode.sampling import draw, log_probabilities, process_logits, sample
from strategies import arrays, build, seeds

EPS = float(np.finfo(np.float64).eps)
LARGEST_UNIFORM = 1 - 2**-53

temperatures = st.sampled_from([0.3, 0.7, 1.0, 1.8])
top_ks = st.integers(0, 12)
top_ps = st.sampled_from([1e-9, 0.1, 0.5, 0.8, 0.95, 0.999, 1.0])
min_ps = st.sampled_from([0.0, 0.01, 0.2, 0.6, 1.0])
settings_ = st.fixed_dictionaries(
    {"temperature": temperatures, "top_k": top_ks, "top_p": top_ps, "min_p": min_ps}
)


@st.composite
def logits(draw: st.DrawFn, rows: int = 1, masked: bool = True) -> np.ndarray:
    """float32 [rows, V] with ties more often than not, and masked tokens (never all of a
    row).
    """
    z = draw(
        arrays(
            rows,
            st.integers(1, 12),
            kinds=("normal", "outlier_column", "zero", "constant", "one_sided"),
        )
    )
    if draw(st.booleans()):
        z = np.round(2 * z) / 2  # few different values: ties
    if masked and draw(st.booleans()):
        rng = np.random.default_rng(draw(seeds))
        dead = rng.random(z.shape) < 0.4
        dead[np.arange(rows), rng.integers(z.shape[1], size=rows)] = False
        z = np.where(dead, np.float32(-np.inf), z)
    return z


def brute_force(
    z: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> list[float]:
    """The definition, in Python floats over sorted lists; one row."""
    row = [float(x) for x in z]
    if temperature == 0:
        return [float(i == row.index(max(row))) for i in range(len(row))]
    weight = [math.exp((x - max(row)) / temperature) for x in row]
    # of equal ones the lowest id first
    ranked = sorted(range(len(row)), key=lambda i: (-weight[i], i))
    if top_k:
        ranked = ranked[:top_k]
    if top_p < 1:
        total = math.fsum(weight[i] for i in ranked)
        mass = 0.0
        nucleus = []
        for i in ranked:
            nucleus.append(i)
            mass += weight[i]
            if mass >= top_p * total:
                break
            # nearer than rounding can bring it, except where every weight is 1 and sums are
            # exact
            assume(all(weight[j] == 1 for j in ranked) or abs(mass / total - top_p) > 1e-12)
        assume(all(weight[j] == 1 for j in ranked) or abs(mass / total - top_p) > 1e-12)
        ranked = nucleus
    ranked = [i for i in ranked if weight[i] >= min_p * max(weight)]
    total = math.fsum(weight[i] for i in ranked)
    return [weight[i] / total if i in ranked else 0.0 for i in range(len(row))]


# --- the filters --------------------------------------------------------------------------


@pytest.mark.theorem(
    "process_logits is temperature, then the k largest, then the smallest prefix of mass ≥ "
    "top_p, then ≥ min_p · max, renormalised; of equal tokens the lowest id stays",
    source="Holtzman et al. 2020, §3.1; Fan et al. 2018; Nguyen et al. 2024",
)
@given(z=logits(rows=3), params=settings_ | st.fixed_dictionaries({"temperature": st.just(0.0)}))
@example(
    z=np.zeros((1, 4), np.float32), params={"temperature": 1.0, "top_p": 0.5}
)  # two of four reach a half exactly
def test_filters_equal_brute_force_over_sorted_lists(pure_xp, z, params):
    params = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **params}
    p = to_host(process_logits(pure_xp.asarray(z), **params))
    expected = [brute_force(row, **params) for row in z]
    assert (p > 0).tolist() == [[x > 0 for x in row] for row in expected]
    # each weight is off by the rounding of (z - max)/τ, at most |log w| ≤ 745 half-ulps,
    # and a few of its own
    np.testing.assert_allclose(p, expected, rtol=1000 * EPS, atol=0)


@pytest.mark.theorem(
    "process_logits is a distribution: no entry negative, sum 1 within V·eps, zero where masked",
    source="definition",
)
@given(z=arrays(4, st.integers(1, 40)), params=settings_)
def test_process_logits_is_a_distribution_for_logits_of_every_kind(pure_xp, z, params):
    p = to_host(process_logits(pure_xp.asarray(z), **params))
    assert p.dtype == np.float64
    assert (p >= 0).all()
    assert (abs(p.sum(axis=-1) - 1) <= z.shape[1] * EPS).all()


@pytest.mark.theorem(
    "top_k keeps exactly min(k, V) tokens however many are equal; top_p keeps the fewest that "
    "reach it",
    source="definition; transformers and vLLM keep all that equal the k-th",
)
@given(z=logits(masked=False), k=st.integers(1, 14), top_p=top_ps)
def test_the_counts_that_stay_are_exact(pure_xp, z, k, top_p):
    x = pure_xp.asarray(z)
    V = z.shape[1]
    assert (to_host(process_logits(x, top_k=k)) > 0).sum() == min(k, V)
    full = to_host(process_logits(x))[0]
    kept = to_host(process_logits(x, top_p=top_p))[0] > 0
    if top_p == 1:
        assert kept.all()
        return
    assert full[kept].sum() >= top_p - V * EPS
    assert full[kept].sum() - full[kept].min() < top_p + V * EPS  # one fewer falls short
    assert not (~kept).any() or full[kept].min() >= full[~kept].max()


@pytest.mark.theorem(
    "the support grows with top_k and top_p and shrinks with min_p: the sets are nested",
    source="prefixes of one order",
)
@given(z=logits(), params=settings_, more=st.integers(1, 5), share=st.floats(0, 1))
def test_supports_are_nested(pure_xp, z, params, more, share):
    x = pure_xp.asarray(z)

    def support(**change):
        return to_host(process_logits(x, **{**params, **change})) > 0

    small = support()
    for wider in (
        support(top_k=params["top_k"] + more if params["top_k"] else 0),
        support(top_p=params["top_p"] + share * (1 - params["top_p"])),
        support(min_p=params["min_p"] * share),
    ):
        assert (small <= wider).all()


@pytest.mark.theorem(
    "min-p before top-k and top-p, vLLM's order, never keeps a token that this order drops",
    source="vLLM's v1 sampler",
)
@given(z=logits(), params=settings_)
def test_vllms_order_keeps_a_subset(pure_xp, z, params):
    x = pure_xp.asarray(z)
    first = process_logits(x, params["temperature"], min_p=params["min_p"])
    brute_force(z[0], **params)  # passes over cases at a cut of top-p
    log_first = np.where(to_host(first) > 0, z, -np.inf)
    theirs = to_host(
        process_logits(
            pure_xp.asarray(log_first), params["temperature"], params["top_k"], params["top_p"]
        )
    )
    assert ((theirs > 0) <= (to_host(process_logits(x, **params)) > 0)).all()


@pytest.mark.theorem(
    "temperature 0 is the one-hot argmax, of equal logits the lowest id, whatever the filters; "
    "it is the limit of temperature → 0 where the largest is unique",
    source="definition",
)
@given(z=logits(rows=2), params=settings_)
def test_temperature_0_is_the_argmax_and_the_limit(pure_xp, z, params):
    x = pure_xp.asarray(z)
    greedy = to_host(process_logits(x, **{**params, "temperature": 0}))
    assert (greedy == np.eye(z.shape[1])[z.argmax(axis=-1)]).all()
    for row, one_hot in zip(z, greedy, strict=True):
        if (row == row.max()).sum() == 1:
            # float32 logits differ by 1e-8 or more here: exp(-1e4) is 0
            for cold in (1e-12, 5e-324):
                assert (to_host(process_logits(pure_xp.asarray(row), cold)) == one_hot).all()


@pytest.mark.theorem(
    "process_logits(z + c) = process_logits(z)", source="softmax is invariant to a shift"
)
@given(z=logits(), params=settings_, c=st.integers(-1000, 1000))
def test_a_shift_of_all_logits_changes_nothing(pure_xp, z, params, c):
    z = np.round(z.astype(np.float64) * 8) / 8  # eighths: adding c is exact, so equality is too
    assert (
        to_host(process_logits(pure_xp.asarray(z), **params))
        == to_host(process_logits(pure_xp.asarray(z + c), **params))
    ).all()


@pytest.mark.theorem(
    "process_logits(P z) = P process_logits(z) for a permutation P of tokens without ties",
    source="definition",
)
@given(z=logits(), params=settings_, seed=seeds)
def test_renaming_the_tokens_renames_the_probabilities(pure_xp, z, params, seed):
    live = z[np.isfinite(z)]
    assume(len(np.unique(live)) == len(live))
    order = np.random.default_rng(seed).permutation(z.shape[1])
    p = to_host(process_logits(pure_xp.asarray(z), **params))
    q = to_host(process_logits(pure_xp.asarray(z[:, order]), **params))
    assert ((p > 0)[:, order] == (q > 0)).all()
    # the normaliser is summed in another order
    np.testing.assert_allclose(p[:, order], q, rtol=z.shape[1] * EPS)


@given(
    z=logits(rows=3),
    each_params=st.lists(settings_, min_size=3, max_size=3),
    greedy=st.integers(0, 2),
)
def test_a_batch_with_its_own_parameters_equals_its_rows_alone(pure_xp, z, each_params, greedy):
    each_params[greedy]["temperature"] = 0.0
    x = pure_xp.asarray(z)
    together = {name: [params[name] for params in each_params] for name in each_params[0]}
    u = pure_xp.asarray(np.array([0.1, 0.5, 0.9]))
    alone = [
        to_host(process_logits(pure_xp.asarray(row), **params))
        for row, params in zip(z, each_params, strict=True)
    ]
    assert (to_host(process_logits(x, **together)) == np.stack(alone)).all()
    apart = [margin(pure_xp.asarray(z[i]), (0.1, 0.5, 0.9)[i], **each_params[i]) for i in range(3)]
    assert to_host(margin(x, u, **together)).tolist() == [float(m) for m in apart]
    arrays_ = {name: np.array(values) for name, values in together.items()}
    assert (to_host(process_logits(x, **arrays_)) == np.stack(alone)).all()
    for name in together:  # one parameter a row, the others shared
        shared = {**each_params[0], name: together[name]}
        rows = [
            to_host(
                process_logits(pure_xp.asarray(z[i]), **{**each_params[0], name: together[name][i]})
            )
            for i in range(3)
        ]
        assert (to_host(process_logits(x, **shared)) == np.stack(rows)).all()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([0.0, math.nan, 1.0], "token 1 of row 1 .* is NaN"),
        ([math.nan, math.inf, 1.0], "token 0 of row 1 .* is NaN"),
        ([0.0, 2.0, math.inf], r"token 2 of row 1 .* is \+inf"),
        ([-math.inf] * 3, "every token of row 1 .* is masked"),
    ],
)
def test_bad_logits_are_rejected_with_their_position(pure_xp, row, says):
    x = pure_xp.asarray(np.array([[1.0, 2.0, -math.inf], row], dtype=np.float32))
    u = pure_xp.asarray(np.zeros(2))
    for function in (
        process_logits,
        lambda x: process_logits(x, 0),
        lambda x: margin(x, u),
        log_probabilities,
    ):
        with pytest.raises(ValueError, match=says):
            function(x)


@pytest.mark.parametrize(
    "params",
    [
        *({"temperature": t} for t in (-0.1, math.nan, math.inf)),
        *({"top_k": k} for k in (-1, 1.5, math.inf, math.nan)),
        *({"top_p": p} for p in (0, 1.01, -0.5, math.nan)),
        *({"min_p": m} for m in (-0.1, 1.1, math.nan)),
        {"temperature": [1.0, -1.0]},
        {"top_k": [1, 2, 3]},
    ],
)
def test_parameters_outside_their_range_are_rejected_by_name(params):
    with pytest.raises(ValueError, match=next(iter(params))):
        process_logits(np.zeros((2, 4)), **params)


def test_a_list_of_parameters_needs_rows_and_a_row_needs_tokens():
    for shape, rows in (((4,), 1), ((4,), 4), ((2, 4), 1), ((2, 3, 4), 2)):
        with pytest.raises(ValueError, match="needs logits"):
            process_logits(np.zeros(shape), temperature=[1.0] * rows)
    for shape in ((), (0,), (2, 0)):
        with pytest.raises(ValueError, match="no tokens"):
            process_logits(np.zeros(shape))
    assert process_logits(np.zeros((0, 4)), top_k=2).shape == (0, 4)  # no rows is allowed


# --- log-probabilities and penalties ------------------------------------------------------


@pytest.mark.theorem(
    "exp(log_probabilities) = process_logits at temperature 1, and sums to 1", source="definition"
)
@given(z=logits(rows=2))
def test_log_probabilities_are_the_logarithm_of_process_logits(pure_xp, z):
    lp = to_host(log_probabilities(pure_xp.asarray(z)))
    # |lp| ≤ 745 for what is not rounded to zero: exp turns half an ulp of it into 745/2 · eps
    np.testing.assert_allclose(
        np.exp(lp), to_host(process_logits(pure_xp.asarray(z))), rtol=1000 * EPS, atol=1e-300
    )
    assert (lp[np.isneginf(z)] == -np.inf).all()
    assert (lp <= 0).all()


@pytest.mark.theorem(
    "a repetition penalty θ ≥ 1 never raises a logit, leaves unseen ones alone, counts once, "
    "and is undone by 1/θ",
    source="Keskar et al. 2019, §4.1, with the sign rule of transformers",
)
@given(
    z=arrays(2, 6, kinds=("normal", "zero", "one_sided", "outlier_column")),
    seed=seeds,
    power=st.integers(0, 3),
)
def test_the_repetition_penalty_lowers_what_was_seen_and_only_that(pure_xp, z, seed, power):
    theta = 2.0**power  # division and product are exact
    seen = np.random.default_rng(seed).random(z.shape) < 0.5
    x = pure_xp.asarray(z)
    mask = pure_xp.asarray(seen)
    y = apply_repetition_penalty(x, mask, theta)
    assert y.dtype == x.dtype
    expected = [
        [v if not s else v / theta if v > 0 else v * theta for v, s in zip(*r, strict=True)]
        for r in zip(z, seen, strict=True)
    ]
    assert to_host(y).tolist() == expected
    assert (to_host(y) <= z).all()
    assert (to_host(apply_repetition_penalty(y, mask, 1 / theta)) == z).all()
    each = to_host(apply_repetition_penalty(x, mask, [1.0, theta]))
    assert (each[0] == z[0]).all()
    assert each[1].tolist() == expected[1]


@given(z=arrays(2, 5, kinds=("normal",), dtype="float64"), seed=seeds)
def test_count_penalties_are_openais_formula(pure_xp, z, seed):
    counts = np.random.default_rng(seed).integers(0, 4, z.shape)
    y = to_host(
        apply_count_penalties(pure_xp.asarray(z), pure_xp.asarray(counts), 0.5, [0.25, -0.125])
    )
    expected = z - np.array([[0.25], [-0.125]]) * counts - 0.5 * (counts > 0)
    assert (y == expected).all()  # both are z minus exact numbers, in the same order


@pytest.mark.parametrize("penalty", [0.0, -1.0, math.nan, math.inf])
def test_bad_penalties_are_rejected(penalty):
    z = np.zeros((1, 3))
    with pytest.raises(ValueError, match="repetition_penalty"):
        apply_repetition_penalty(z, z > 0, penalty)
    if not math.isfinite(penalty):
        with pytest.raises(ValueError, match="presence"):
            apply_count_penalties(z, z.astype(int), presence=penalty)


# --- the draw -----------------------------------------------------------------------------


@pytest.mark.theorem(
    "the set of u with sample(p, u) = t is the interval [F(t-1), F(t)): its measure is p(t), "
    "exactly",
    source="inverse transform; enumeration in sixty-fourths, where every sum is exact",
)
@given(cuts=st.lists(st.integers(0, 64), min_size=0, max_size=6))
def test_each_token_has_its_probability_of_the_uniforms(pure_xp, cuts):
    edges = [0, *sorted(cuts), 64]
    p = [Fraction(b - a, 64) for a, b in itertools.pairwise(edges)]
    row = np.array([float(x) for x in p])
    # ascending uniforms: each edge and the float just below it, so that every interval's
    # ends are seen
    u = sorted({x for e in range(64) for x in (e / 64, math.nextafter((e + 1) / 64, 0))})
    ids = to_host(sample(pure_xp.asarray(np.tile(row, (len(u), 1))), pure_xp.asarray(np.array(u))))
    assert ids.dtype == np.int64
    assert (np.diff(ids) >= 0).all()  # one interval for each token, in the order of ids
    for a, b, t in zip(u[::2], u[1::2], ids[::2], strict=True):
        assert ids[u.index(b)] == t  # [e, e+1) / 64 is one token's from its first float to its last
        assert edges[t] <= 64 * a < edges[t + 1]
    counts = np.bincount(ids[::2], minlength=len(p))
    assert [Fraction(int(c), 64) for c in counts] == p


@pytest.mark.theorem(
    "the edges of the intervals are the cumulative sums within V·eps for any float probabilities",
    source="each of V additions rounds by eps/2 of at most 1",
)
@given(z=logits(), params=settings_)
def test_the_edges_of_the_intervals_are_the_cumulative_sums(pure_xp, z, params):
    p = process_logits(pure_xp.asarray(z[0]), **params)
    exact = [Fraction(float(x)) for x in to_host(p)]
    total = sum(exact)
    for t in range(len(exact) - 1):
        edge = sum(exact[: t + 1]) / total
        slack = 2 * len(exact) * EPS
        low = float(edge) - slack
        high = float(edge) + slack
        if low >= 0:
            assert int(sample(p, low)) <= t
        if high < 1:
            assert int(sample(p, high)) > t


@pytest.mark.theorem(
    "no token of probability zero is drawn, at u = 0, at the largest float below 1, however the"
    " sum rounds",
    source="u · total < total in float64 for u ≤ 1 - 2^-53",
)
@given(
    n=st.integers(1, 30),
    seed=seeds,
    scale=st.sampled_from([1e-12, 1.0, 7.0]),
    u=st.floats(0, LARGEST_UNIFORM),
)
def test_a_token_of_probability_zero_is_never_drawn(pure_xp, n, seed, scale, u):
    rng = np.random.default_rng(seed)
    p = scale * rng.random(n) ** 8 * (rng.random(n) < 0.4)
    p[rng.integers(n)] = scale
    for uniform in (0.0, LARGEST_UNIFORM, u):
        assert p[int(sample(pure_xp.asarray(p), uniform))] > 0


@given(seed=seeds)
def test_a_token_of_probability_zero_is_not_drawn_by_a_parallel_sum_either(seed):
    rng = np.random.default_rng(seed)
    p = rng.random(20) * (rng.random(20) < 0.5)
    p[3] = 1.0

    # each entry summed in an order of its own: dead tokens stand out by an ulp or two
    def parallel(x, axis):
        return np.array([math.fsum(x[: i + 1]) for i in range(len(x))]) * (
            1 + EPS * rng.integers(-2, 3, len(x))
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "cumulative_sum", parallel)
        for u in [
            0.0,
            LARGEST_UNIFORM,
            *rng.random(20),
            *(np.cumsum(p) / p.sum()).clip(0, LARGEST_UNIFORM),
        ]:
            assert p[int(sample(p, u))] > 0


def test_bad_distributions_and_uniforms_are_rejected(pure_xp):
    good = [0.5, 0.5]
    for bad in ([-0.5, 1.5], [math.nan, 1.0], [0.5, math.nan], [math.inf, 1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="row 1"):
            sample(pure_xp.asarray(np.array([good, bad])), pure_xp.asarray(np.array([0.5, 0.5])))
    for u in (1.0, -1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match="row 0"):
            sample(pure_xp.asarray(np.array(good)), u)
    with pytest.raises(ValueError, match="need uniforms"):
        sample(pure_xp.asarray(np.array([good, good])), 0.5)


def test_a_draw_waits_for_the_device_twice_and_moves_nothing():
    z = fakecupy.asarray(build("normal", (4, 50), 0))
    u = fakecupy.asarray(np.full(4, 0.5))
    with fakecupy.counting() as cost:
        sample(process_logits(z, 0.8, 40, 0.95, 0.05), u)
        assert (cost.syncs, cost.h2d) == (2, 0)  # one check of the logits, one of the probabilities


@given(seed=seeds, vocab=st.integers(1, 30), zeros=st.booleans())
def test_draw_is_sample(seed, vocab, zeros):
    """The fast inverse CDF of the host gives what ``sample`` gives, for weights of any sum."""
    rng = np.random.default_rng(seed)
    w = rng.random(vocab) * (rng.random(vocab) < 0.5 if zeros else 1)
    assume(w.sum() > 0)
    for u in (0.0, float(rng.random()), 1 - 2**-53):
        assert draw(w, u) == int(sample(w, u))
        assert w[draw(w, u)] > 0
        assert draw(np.zeros(vocab), u, otherwise=w) == int(sample(w, u))
    with pytest.raises(ValueError, match="weight 0"):
        draw(np.zeros(vocab), 0.5)


@pytest.mark.theorem(
    "A draw in two levels, blocks and then tokens, is the draw in one: token t for u within its"
    " share of the mass",
    source="the same intervals, cut in two steps",
)
@given(
    seed=seeds,
    vocab=st.integers(16 * 1024, 20_000),
    gaps=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_draw_from_a_long_row(seed, vocab, gaps, dtype):
    rng = np.random.default_rng(seed)
    w = rng.random(vocab)
    if gaps:
        w *= rng.random(vocab) < 0.001
        w[rng.integers(vocab, size=3)] = 1.0
    w = w.astype(dtype)
    edges = np.concatenate(([0.0], np.cumsum(w, dtype=np.float64)))
    for u in (0.0, 1 - 2**-53, *rng.random(20)):
        token = draw(w, float(u))
        assert w[token] > 0
        # sums of up to 20,000 float64 in two orders: within n·eps of each other
        slack = vocab * EPS * edges[-1]
        assert edges[token] - slack <= u * edges[-1] <= edges[token + 1] + slack


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("zeros", [1, 24, 1023])
def test_a_long_row_draws_no_token_of_weight_0_behind_a_block(zeros, dtype):
    """Blocks that end in zeros, and whose sum is larger than their running sum: just below an
    edge, the goal lies behind the block's last token.
    """
    vocab = 20 * 1024 + 7
    w = np.zeros(vocab, dtype=dtype)
    for block in (0, 3, 4, 19):
        at = block * 1024
        w[at + 5 : at + 1024 - zeros] = np.finfo(np.float64).eps / 2.1  # too small to add to 1
        w[at] = 1.0
    sums = [w[i : i + 1024].sum(dtype=np.float64) for i in range(0, vocab, 1024)]
    edges = np.cumsum(sums)
    for edge in edges / edges[-1]:
        for u in (np.nextafter(edge, 0), edge, np.nextafter(edge, 1)):
            if u < 1:
                token = draw(w, float(u))
                assert w[token] > 0
                # in the block that the edge ends or begins
                share = np.searchsorted(edges, u * edges[-1], side="right")
                assert token // 1024 == share


# --- the margin ---------------------------------------------------------------------------


def draw_token(xp, z, u, params):
    return int(sample(process_logits(xp.asarray(z), **params), u))


@pytest.mark.theorem(
    "if every logit moves by less than margin(z, u), the sampled token is the same, filters and"
    " all",
    source="ratios of (sums of) weights move by at most exp(±2δ/τ)",
)
@given(z=logits(), params=settings_, u=st.integers(0, 999), greedy=st.booleans(), seed=seeds)
# exp(-108) is lost beside 1: the mass after the first token has to be summed by itself
@example(
    np.array([[0.3, 0.8, 33.0]]),
    {"temperature": 0.3, "top_k": 0, "top_p": 0.5, "min_p": 0.0},
    0,
    False,
    0,
)
# the threshold of one filter is nearer than any other: top-p lets the second token in,
# min-p throws it out
@example(
    np.array([[0.0, -1.0]]),
    {"temperature": 1.0, "top_k": 0, "top_p": 0.7, "min_p": 0.0},
    900,
    False,
    0,
)
@example(
    np.array([[0.0, -1.2, -5.0]]),
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.2},
    900,
    False,
    0,
)
# top-p's share is of what top-k leaves, not of everything
@example(
    np.array([[0.0, -1.0, -1.0, -1.0]]),
    {"temperature": 1.0, "top_k": 2, "top_p": 0.7, "min_p": 0.0},
    900,
    False,
    0,
)
def test_within_the_margin_the_token_is_the_same(pure_xp, z, params, u, greedy, seed):
    params = {**params, "temperature": 0.0 if greedy else params["temperature"]}
    z = z[0].astype(np.float64)
    u = u / 1000
    delta = float(margin(pure_xp.asarray(z), u, **params))
    assert delta >= 0
    assume(delta > 1e-6)  # far above the rounding of the sums
    token = draw_token(pure_xp, z, u, params)
    rng = np.random.default_rng(seed)
    signs = [np.sign(rng.standard_normal(z.shape)) for _ in range(20)]
    # the worst that can happen: all mass moves to one side of some token, in id order or in
    # rank
    rank = np.argsort(np.argsort(-z))
    signs += [
        np.where(o <= i, s, -s)
        for o in (np.arange(len(z)), rank)
        for i in range(len(z))
        for s in (1.0, -1.0)
    ]
    moved = pure_xp.asarray(z + 0.999 * delta * np.stack(signs))
    assert (
        to_host(sample(process_logits(moved, **params), pure_xp.asarray(np.full(len(signs), u))))
        == token
    ).all()


@pytest.mark.theorem(
    "the margin is tight without filters and at temperature 0: logits that move by a little "
    "more change the token",
    source="move all before the edge up, all after it down",
)
@given(z=logits(masked=False), u=st.integers(1, 999), temperature=temperatures | st.just(0.0))
def test_beyond_the_margin_the_token_changes(pure_xp, z, u, temperature):
    z = z[0].astype(np.float64)
    u = u / 1000
    params = {"temperature": temperature}
    assume(len(z) > 1)
    delta = float(margin(pure_xp.asarray(z), u, **params))
    assume(delta < 300 * (temperature or 1))
    token = draw_token(pure_xp, z, u, params)
    if temperature == 0:
        pushes = [np.where(np.arange(len(z)) == token, -1.0, 1.0)]
    else:
        pushes = [
            np.where(np.arange(len(z)) <= t, s, -s) for t in (token - 1, token) for s in (1.0, -1.0)
        ]
    moved = [draw_token(pure_xp, z + (1.001 * delta + 1e-9) * push, u, params) for push in pushes]
    assert any(t != token for t in moved)


@given(seed=seeds)
def test_two_backends_agree_wherever_the_margin_exceeds_their_difference(pure_xp, seed):
    # another backend's float32 logits, as another order of summation leaves them
    rng = np.random.default_rng(seed)
    z = 4 * rng.standard_normal((64, 256))
    u = pure_xp.asarray(rng.random(64))
    other = z + rng.uniform(-2e-5, 2e-5, z.shape)
    params = {"temperature": 0.8, "top_k": 100, "top_p": 0.9, "min_p": 0.01}
    safe = to_host(margin(pure_xp.asarray(z), u, **params)) > 2e-5
    a, b = (to_host(sample(process_logits(pure_xp.asarray(x), **params), u)) for x in (z, other))
    assert (a == b)[safe].all()
    assert safe.mean() > 0.9  # and the claim is about nearly all of them


# --- reference implementations ------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.theorem(
    "process_logits = softmax after transformers' logits warpers in its order, without ties",
    source="transformers 5",
)
@given(seed=seeds, params=settings_)
def test_process_logits_equals_transformers(pure_xp, seed, params):
    torch = oracle("torch")
    processors = oracle("transformers.generation.logits_process")
    z = 3 * np.random.default_rng(seed).standard_normal((4, 50))
    chain = [processors.TemperatureLogitsWarper(params["temperature"])]
    if params["top_k"]:
        chain.append(processors.TopKLogitsWarper(params["top_k"]))
    if params["top_p"] < 1:
        chain.append(processors.TopPLogitsWarper(params["top_p"]))
    if params["min_p"]:
        chain.append(processors.MinPLogitsWarper(params["min_p"]))
    theirs = torch.tensor(z)
    for warper in chain:
        theirs = warper(None, theirs)
    expected = torch.softmax(theirs, dim=-1).numpy()
    p = to_host(process_logits(pure_xp.asarray(z), **params))
    assert ((p > 0) == (expected > 0)).all()
    np.testing.assert_allclose(p, expected, rtol=1e-13)


@pytest.mark.oracle
def test_of_equal_tokens_transformers_keeps_all_and_process_logits_the_first_k():
    torch = oracle("torch")
    processors = oracle("transformers.generation.logits_process")
    z = np.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    theirs = processors.TopKLogitsWarper(2)(None, torch.tensor(z)).numpy()
    assert np.isfinite(theirs).tolist() == [[False, True, True, True, True, False]]
    assert (process_logits(z, top_k=2) > 0).tolist() == [[False, True, True, False, False, False]]


@pytest.mark.oracle
@given(seed=seeds, penalty=st.sampled_from([0.7, 1.0, 1.3]))
def test_the_repetition_penalty_equals_transformers(pure_xp, seed, penalty):
    torch = oracle("torch")
    processors = oracle("transformers.generation.logits_process")
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((3, 20)).astype("float32")  # with repeats
    ids = rng.integers(0, 20, (3, 15))
    theirs = processors.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor(ids), torch.tensor(z)
    ).numpy()
    seen = np.zeros(z.shape, dtype=bool)
    seen[np.arange(3)[:, None], ids] = True
    ours = to_host(apply_repetition_penalty(pure_xp.asarray(z), pure_xp.asarray(seen), penalty))
    assert (ours == theirs).all()
