"""AWQ's searches: scales by their formula, losses that are what they say, clip limits
against the loops they are.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.formats.quantized_linear import fake_quantize
from refllm.formats.uniform import RULES, Scheme, qparams
from refllm.quant import awq
from refllm.quant.awq import channel_magnitude, clip, search_clip, search_scale
from strategies import build, seeds

FINITE = ("normal", "outlier_column", "zero", "constant", "denormal", "one_sided")
EPS = {name: float(np.finfo(name).eps) for name in ("float32", "float64")}
W4 = Scheme(4, "asymmetric", "group", 4)


@st.composite
def schemes(draw, rules=RULES):
    """By group or channel, and the number of columns: up to four groups."""
    width = draw(st.sampled_from([1, 2, 3, 8]))
    by_group = draw(st.booleans())
    granularity = ("group", width) if by_group else ("channel",)
    scheme = Scheme(draw(st.integers(2, 8)), draw(st.sampled_from(rules)), *granularity)
    return scheme, width * draw(st.integers(1, 4))


@st.composite
def problems(draw, dtypes=("float32", "float64"), rules=RULES, kinds=FINITE):
    """(x[T, N], one to three weights [M, N], scheme): fewer and more tokens than columns,
    dead channels among them.
    """
    scheme, n = draw(schemes(rules))
    dtype = draw(st.sampled_from(dtypes))
    x = build(draw(st.sampled_from(kinds)), (draw(st.integers(1, 40)), n), draw(seeds), dtype)
    x[:, sorted(draw(st.sets(st.integers(0, n - 1), max_size=n)))] = 0
    sizes = draw(st.lists(st.integers(1, 9) | st.just(67), min_size=1, max_size=3))
    return (
        x,
        [build(draw(st.sampled_from(kinds)), (m, n), draw(seeds), dtype) for m in sizes],
        scheme,
    )


def chosen(wanted):
    """An ``inspect`` that makes candidate ``wanted`` the best: the first call is the
    reference.
    """
    calls = []

    def inspect(weights):
        calls.append(weights)
        x = weights[0][:1, :1] * 0
        return x if len(calls) in (1, wanted + 2) else x + 1

    return inspect


def arrays_on(xp, x, weights):
    return xp.asarray(x), [xp.asarray(w) for w in weights]


# --- the scale ----------------------------------------------------------------------------


@pytest.mark.theorem(
    "sqrt(max s · min s) = 1 for each candidate of AWQ's scale search",
    source="Lin et al. 2023, code",
)
@given(problem=problems(), wanted=st.integers(0, 19), duo=st.booleans())
def test_bound_scales_are_centred_and_positive(xp, problem, wanted, duo):
    x, weights, scheme = problem
    found = search_scale(*arrays_on(xp, x, weights), scheme, inspect=chosen(wanted), duo=duo)
    s = to_host(found.scale).astype(np.float64)
    assert found.best == wanted
    assert s.shape == (x.shape[1],)
    assert np.all(np.isfinite(s) & (s > 0))
    # each of the two extremes is rounded by a root, a product, a quotient and a cast
    assert abs(math.sqrt(s.max() * s.min()) - 1) <= 4 * EPS[x.dtype.name]


@given(problem=problems(), wanted=st.integers(0, 19))
def test_exact_value_the_scale_is_its_formula(xp, problem, wanted):
    x, weights, scheme = problem
    found = search_scale(*arrays_on(xp, x, weights), scheme, inspect=chosen(wanted))
    assert (found.ratio, found.ratios) == (wanted / 20, tuple(i / 20 for i in range(20)))
    assert found.losses == tuple(float(i != wanted) for i in range(20))
    a = [math.fsum(abs(v) for v in column) / len(x) for column in x.T.tolist()]
    s = [max(v ** (wanted / 20), 1e-4) for v in a]
    expected = [v / math.sqrt(max(s)) / math.sqrt(min(s)) for v in s]
    # a mean of T terms to the power of r < 1, and six more roundings; a cast to x's dtype
    np.testing.assert_allclose(
        to_host(found.scale), expected, rtol=(len(x) + 8) * EPS["float64"] + EPS[x.dtype.name]
    )


@given(problem=problems(), wanted=st.integers(0, 19))
def test_exact_value_duo_scaling_is_its_formula(xp, problem, wanted):
    x, weights, scheme = problem
    found = search_scale(*arrays_on(xp, x, weights), scheme, inspect=chosen(wanted), duo=True)
    assert found.ratios == (0.0, *(i / 18 for i in range(19)))
    a = np.abs(x.astype(np.float64)).mean(axis=0)
    n = x.shape[1]
    group = scheme.group_size or x.shape[1]
    shares = [
        np.abs(w[:, j])
        / (np.abs(w[:, j // group * group :][:, :group]).max(axis=1) + w.dtype.type(1e-6))
        for j in range(n)
        for w in [np.concatenate(weights)]
    ]
    w = np.array([share.astype(np.float64).mean() for share in shares])
    r = found.ratios[wanted]
    s = np.maximum(a**r / (w ** (1 - r) + 1e-4), 1e-4) if wanted else np.ones(n)
    expected = s / np.sqrt(s.max()) / np.sqrt(s.min())
    rows = sum(len(v) for v in weights)
    np.testing.assert_allclose(
        to_host(found.scale),
        expected,
        rtol=(len(x) + rows + 16) * EPS["float64"] + 4 * EPS[x.dtype.name],
    )


@pytest.mark.theorem(
    "AWQ's best loss is at most the loss at ratio 0, which is that of round to nearest",
    source="Lin et al. 2023, section 3.2",
)
@given(problem=problems(), duo=st.booleans())
def test_bound_the_best_loss_is_at_most_that_of_round_to_nearest(xp, problem, duo):
    x, weights, scheme = problem
    x_, weights_ = arrays_on(xp, x, weights)
    found = search_scale(x_, weights_, scheme, duo=duo)

    def loss(s):
        exact, rounded = (
            np.concatenate([to_host(x_ @ w.T) for w in ws], axis=1)
            for ws in (weights_, [fake_quantize(w * s, scheme) / s for w in weights_])
        )
        return np.mean((exact - rounded).astype(np.float64) ** 2)

    assert len(found.losses) == 20
    # of a sum of squares
    assert found.losses[0] == pytest.approx(loss(xp.ones_like(found.scale)), rel=1e-12)
    assert min(found.losses) <= found.losses[0]
    # the scale returned is that candidate's
    assert min(found.losses) == pytest.approx(loss(found.scale), rel=1e-12)


@pytest.mark.theorem(
    "scaling all activations by c > 0 does not change AWQ's scales (unclamped) and "
    "multiplies its losses by c²",
    source="s = a^r / sqrt(max a^r · min a^r)",
)
@given(seed=seeds, exponent=st.integers(-6, 6), order=st.randoms(use_true_random=False))
def test_invariance_of_the_size_and_the_order_of_the_tokens(xp, seed, exponent, order):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((24, 8))
    w = rng.standard_normal((6, 8))
    rows = list(range(24))
    order.shuffle(rows)
    plain = search_scale(*arrays_on(xp, x, [w]), W4)
    other = search_scale(*arrays_on(xp, 2.0**exponent * x[rows], [w]), W4)
    # the scale differs by rounding, which moves no code, unless one lies within 1e-13 of a
    # boundary
    np.testing.assert_allclose(to_host(other.scale), to_host(plain.scale), rtol=64 * EPS["float64"])
    np.testing.assert_allclose(other.losses, np.array(plain.losses) * 4.0**exponent, rtol=1e-10)


@given(seed=seeds, wanted=st.integers(0, 19), size=st.floats(1e-2, 1e2))
def test_degenerate_equally_large_channels_need_no_scale(xp, seed, wanted, size):
    x = size * np.random.default_rng(seed).choice([-1.0, 1.0], (5, 8))
    found = search_scale(*arrays_on(xp, x, [np.ones((3, 8))]), W4, inspect=chosen(wanted))
    np.testing.assert_allclose(to_host(found.scale), 1.0, rtol=8 * EPS["float64"])


def test_degenerate_where_nothing_fires_nothing_is_scaled(xp):
    found = search_scale(
        xp.zeros((3, 8)), [xp.asarray(np.random.default_rng(0).standard_normal((5, 8)))], W4
    )
    assert (found.ratio, found.losses) == (0.0, (0.0,) * 20)
    assert np.array_equal(to_host(found.scale), np.ones(8))


def test_a_channel_that_carries_the_activations_gets_the_largest_scale_and_the_loss_falls(xp):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((200, 64))
    w = rng.standard_normal((48, 64))
    x[:, 17] *= 30
    found = search_scale(*arrays_on(xp, x, [w]), Scheme(3, "asymmetric", "group", 32))
    assert int(np.argmax(to_host(found.scale))) == 17
    assert min(found.losses) < 0.5 * found.losses[0]


@pytest.mark.theorem(
    "the rounding error of column j after AWQ is at most Δ'/(2 s_j), Δ' the quantisation "
    "scale of its scaled group",
    source="Lin et al. 2023, eq. 3",
)
@given(
    problem=problems(
        rules=("restricted", "half_integer", "asymmetric", "asymmetric_signed"), kinds=("normal",)
    )
)
def test_bound_the_error_of_a_column_shrinks_by_its_scale(xp, problem):
    x, weights, scheme = problem
    x_, weights_ = arrays_on(xp, x, weights)
    s = search_scale(x_, weights_, scheme).scale
    for w in weights_:
        delta = np.repeat(
            to_host(qparams(w * s, scheme)[0]), scheme.group_size or w.shape[1], axis=1
        )
        error = np.abs(to_host(fake_quantize(w * s, scheme) / s - w).astype(np.float64))
        # of x/s and s·q, relative to half of Δ'
        slack = 1 + (2**scheme.bits + 8) * EPS[x.dtype.name]
        assert np.all(
            error <= delta / (2 * to_host(s)) * slack + 8 * EPS[x.dtype.name] * np.abs(to_host(w))
        )


def test_the_loss_is_taken_where_inspect_looks(xp):
    rng = np.random.default_rng(5)
    x, w = arrays_on(xp, rng.standard_normal((30, 8)), [rng.standard_normal((6, 8))])
    whole = search_scale(x, w, W4, inspect=lambda ws: xp.tanh(x @ ws[0].T))
    exact, rounded = (np.tanh(to_host(x @ v.T)) for v in (w[0], fake_quantize(w[0], W4)))
    assert whole.losses[0] == pytest.approx(np.mean((exact - rounded) ** 2), rel=1e-12)


@given(fails=st.integers(1, 25), seed=seeds)
def test_nothing_to_restore_weights_stay_bit_identical_if_inspect_writes_to_them(xp, fails, seed):
    rng = np.random.default_rng(seed)
    host = [rng.standard_normal((m, 8)).astype("float32") for m in (5, 3)]
    x, weights = arrays_on(xp, rng.standard_normal((9, 8)).astype("float32"), host)
    before = [w.tobytes() for w in host]
    calls = []

    def inspect(given):
        calls.append(1)
        out = x @ given[0].T
        for w in given:
            w[...] = 7.0  # a careless module
        if len(calls) == fails:
            raise RuntimeError("the module failed")
        return out

    if fails <= 21:
        with pytest.raises(RuntimeError, match="the module failed"):
            search_scale(x, weights, W4, inspect=inspect)
    else:
        search_scale(x, weights, W4, inspect=inspect)
    assert [to_host(w).tobytes() for w in weights] == before


def test_candidates_beyond_the_dtype_lose_without_a_warning(xp):
    """1e7 in the column of the largest scale, and errors in those of the smallest, go
    beyond float32 at high ratios.
    """
    x = np.geomspace(1e-4, 1e30, 8, dtype="float32")[None, :]
    w = np.linspace(-1e7, 1e7, 16, dtype="float32").reshape(2, 8)
    found = search_scale(*arrays_on(xp, x, [w]), W4)
    assert all(map(math.isfinite, found.losses[:10]))
    assert found.losses[-1] == math.inf
    assert np.all(np.isfinite(to_host(found.scale)))


def test_activations_near_1e200_in_float64(xp):
    """The product of the largest and the smallest a^r is beyond float64; the scale is not."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1.0, 8.0, (5, 8)) * np.geomspace(1.0, 64.0, 8)
    w = rng.standard_normal((6, 8))
    plain = search_scale(*arrays_on(xp, x, [w]), W4)
    assert plain.ratio > 0
    huge = search_scale(*arrays_on(xp, x * 2.0**660, [w * 2.0**-600]), W4)
    assert np.abs(x * 2.0**660).min() > 1e198
    assert huge.ratio == plain.ratio
    np.testing.assert_allclose(to_host(huge.scale), to_host(plain.scale), rtol=64 * EPS["float64"])
    np.testing.assert_allclose(huge.losses, np.array(plain.losses) * 2.0**120, rtol=1e-10)
    # squares of the errors are beyond float64: no candidate is better than round to nearest
    beyond = search_scale(*arrays_on(xp, x * 2.0**660, [w]), W4)
    assert set(beyond.losses) == {math.inf}
    assert beyond.ratio == 0.0
    assert np.all(to_host(beyond.scale) == 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x * math.nan, w), "x: holds NaN or infinity, first at index"),
        (lambda x, w: (x, [w[0], w[0] + math.inf]), r"weights\[1\]: holds NaN"),
        (lambda x, w: (x[:0, :], w), "at least one token"),
        (lambda x, w: (x, []), "and weights"),
        (
            lambda x, w: (x, w[0]),
            r"a list of the weights that share x, got one array of .*: write \[weight\]",
        ),
        (lambda x, w: (x.astype("int32"), w), "AWQ scales floating-point weights, got x of int32"),
        (
            lambda x, w: (x[:, :4], w),
            r"weights\[0\] of shape \(3, 8\) does not take inputs of shape \(2, 4\)",
        ),
        (lambda x, w: (x[:, :6], [w[0][:, :6]]), "the nearest sizes that do are 3 and 6"),
    ],
)
def test_rejected_naming_what_is_wrong(xp, change, message):
    x, weights = change(xp.ones((2, 8)), [xp.ones((3, 8))])
    with pytest.raises(ValueError, match=message):
        search_scale(x, weights, W4)


def test_rejected_an_inspect_whose_output_is_not_finite(xp):
    with pytest.raises(ValueError, match="the output on the original weights"):
        search_scale(xp.ones((2, 8)), [xp.ones((3, 8))], W4, inspect=lambda ws: ws[0] * math.inf)


# --- the clip limits ----------------------------------------------------------------------


def naive_errors(x, w, scheme, max_tokens=512):
    """[M, N/g, 10]: what each limit costs each group, by the definition, token by token."""
    group = scheme.group_size or w.shape[1]
    seen = x[:: max(1, len(x) // max_tokens)]
    alone = Scheme(scheme.bits, scheme.rule, "channel")
    errors = np.empty((len(w), w.shape[1] // group, 10))
    for row, g, i in np.ndindex(*errors.shape):
        columns = slice(g * group, (g + 1) * group)
        part = w[row : row + 1, columns]
        m = np.abs(part).max() * (1 - i / 20)
        off = fake_quantize(np.clip(part, -m, m), alone) - part
        errors[row, g, i] = sum(float(off[0] @ token[columns]) ** 2 for token in seen)
    return errors


@given(
    problem=problems(dtypes=("float64",)),
    max_tokens=st.sampled_from([1, 7, 512]),
    piece=st.sampled_from([8, 1 << 20]),
)
def test_oracle_limits_are_those_of_the_loops(xp, problem, max_tokens, piece):
    x, weights, scheme = problem
    w = weights[0][:9]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(awq, "_PIECE", piece)
        limits = to_host(search_clip(xp.asarray(x), xp.asarray(w), scheme, max_tokens=max_tokens))
    errors = naive_errors(x, w, scheme, max_tokens)
    peak = np.abs(w).reshape(*limits.shape, -1).max(axis=-1)
    candidates = peak[..., None] * (1 - np.arange(10) / 20)
    chosen = np.argmin(np.abs(candidates - limits[..., None]), axis=-1)
    assert np.array_equal(np.take_along_axis(candidates, chosen[..., None], -1)[..., 0], limits)
    taken = np.take_along_axis(errors, chosen[..., None], -1)[..., 0]
    best = errors.min(axis=-1)
    # ‖R d‖² against ‖X d‖²: QR moves each column by n·eps of its length
    size = np.abs(x).sum() ** 2 * peak**2
    slack = 64 * x.shape[1] * EPS["float64"] * size + 1e-300
    assert np.all(taken <= best + slack)
    clear = np.sort(errors, axis=-1)[..., 1] > best + 2 * slack  # no tie within rounding
    assert np.array_equal(chosen[clear], np.argmin(errors, axis=-1)[clear])


@pytest.mark.theorem(
    "AWQ's clipping keeps |w| ≤ m with 0.55·max|w| ≤ m ≤ max|w|, and leaves groups with m = "
    "max|w| unchanged",
    source="Lin et al. 2023, code: max_shrink 0.5, 20 steps",
)
@given(problem=problems())
def test_bound_weights_stay_within_their_limits(xp, problem):
    x, weights, scheme = problem
    for w in weights:
        limits = search_clip(xp.asarray(x), xp.asarray(w), scheme)
        held = to_host(clip(xp.asarray(w), limits)).reshape(*limits.shape, -1)
        m = to_host(limits)
        grouped = w.reshape(*limits.shape, -1)
        peak = np.abs(grouped).max(axis=-1)
        assert m.shape == (len(w), w.shape[1] // (scheme.group_size or w.shape[1]))
        assert np.all(np.abs(held) <= m[..., None])
        # the product 0.55·max|w| is rounded once; a denormal one by up to its last place
        last = float(np.finfo(w.dtype).smallest_subnormal)
        assert np.all((m >= 0.55 * peak * (1 - 2 * EPS[w.dtype.name]) - last) & (m <= peak))
        inside = np.abs(grouped) <= m[..., None]
        assert np.array_equal(held[inside], grouped[inside])
        assert np.array_equal(held[m == peak], grouped[m == peak])


def test_clipping_lowers_the_error_where_a_large_weight_is_rarely_met(xp):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 32))
    w = rng.standard_normal((20, 32))
    x[:, 0] *= 0.01
    w[:, 0] = 8  # the largest of its group, and multiplied with next to nothing
    scheme = Scheme(3, "asymmetric", "channel")
    limits = search_clip(xp.asarray(x), xp.asarray(w), scheme)
    errors = [
        float(np.sum((x @ (to_host(fake_quantize(v, scheme)) - w).T) ** 2))
        for v in (xp.asarray(w), clip(xp.asarray(w), limits))
    ]
    assert np.all(to_host(limits)[:, 0] < 8)
    assert errors[1] < 0.6 * errors[0]


def test_exact_value_the_deepest_clip_is_055_of_the_largest_weight(xp):
    w = np.random.default_rng(1).standard_normal((6, 400))
    w[:, 0] = 100.0
    x = np.eye(400)[1:]  # the large weight is never met: the less of it, the finer the 399 others
    limits = search_clip(xp.asarray(x), xp.asarray(w), Scheme(8, "asymmetric", "channel"))
    assert np.array_equal(to_host(limits), np.full((6, 1), 100.0 * (1.0 - 9 / 20)))


def test_long_texts_are_thinned_evenly(xp):
    rng = np.random.default_rng(2)
    x = xp.asarray(rng.standard_normal((23, 8)))
    w = xp.asarray(rng.standard_normal((40, 8)))
    thinned, whole = (to_host(search_clip(x, w, W4, max_tokens=n)) for n in (10, 512))
    assert np.array_equal(thinned, to_host(search_clip(x[::2, :], w, W4)))
    assert not np.array_equal(thinned, whole)
    assert not np.array_equal(thinned, to_host(search_clip(x[:10, :], w, W4)))


def test_a_tie_keeps_the_wider_range(xp):
    w = np.random.default_rng(0).standard_normal((3, 8))
    # all inputs are zero: no limit costs anything
    limits = search_clip(xp.zeros((4, 8)), xp.asarray(w), W4)
    assert np.array_equal(to_host(limits), np.abs(w).reshape(3, 2, 4).max(axis=-1))


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_rejected_a_scheme_whose_ranges_are_not_parts_of_rows(xp, granularity):
    scheme = Scheme(4, "asymmetric", granularity, *((4,) if granularity == "block" else ()))
    with pytest.raises(ValueError, match="by channel or group, not by"):
        search_clip(xp.ones((2, 8)), xp.ones((3, 8)), scheme)
    with pytest.raises(ValueError, match="by channel or group, not by"):
        search_scale(xp.ones((2, 8)), [xp.ones((3, 8))], scheme, duo=True)


@given(problem=problems())
def test_exact_value_channel_magnitude_is_the_mean_of_absolute_values(xp, problem):
    x = problem[0]
    got = to_host(channel_magnitude(xp.asarray(x)))
    assert got.dtype == np.float64
    expected = [math.fsum(abs(v) for v in column) / len(x) for column in x.T.tolist()]
    np.testing.assert_allclose(got, expected, rtol=len(x) * EPS["float64"])
