"""The searches, block beside block, against the same searches in loops over one block; sums
in order; bits in place.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import to_host
from gguf_data import special
from refllm.formats.gguf import bits, kquants, kquants_symmetric
from refllm.formats.gguf.arithmetic import extreme, least, nearest, sequential_sum, without_warnings
from refllm.formats.gguf.scale_search import (
    IMPORTANT,
    Grid,
    fit_asymmetric,
    fit_by_sweeps,
    fit_positive,
    fit_symmetric,
)
from strategies import build, seeds

F = np.float32
KINDS = (
    "normal",
    "one_sided",
    "zero",
    "constant",
    "ties",
    "sparse",
    "lone",
    "sign_runs",
    "signed_zeros",
    "equal_pairs",
)


@st.composite
def columns(draw, size):
    """float32 [size, 1 … 12] and weights of the same shape, contiguous."""
    kind = draw(st.sampled_from(KINDS))
    count = draw(st.integers(1, 12))
    seed = draw(seeds)
    made = build if kind in ("normal", "one_sided", "zero", "constant") else special
    x = np.ascontiguousarray(made(kind, (count, size), seed).T)
    return x, np.random.default_rng(seed).uniform(0, 2, x.shape).astype(F)


# --- naive twins, one block at a time, in float32 scalars ---------------------------------


def total(terms):
    out = F(0)
    for term in terms:
        out = F(out + term)
    return out


def clipped(values, low, high):
    return [F(min(max(np.rint(v), low), high)) for v in values]


def naive_symmetric(x, n, w):
    m = F(0)
    for v in x:
        m = v if abs(v) > abs(m) else m
    if abs(m) < F(1e-15):
        return [F(0)] * len(x), F(0)
    best = None
    for i in (0, *range(-9, 0), *range(1, 10)):
        inverse = -F(n + F(F(0.1) * F(i))) / m
        codes = clipped(x * inverse, -n, n - 1)
        sx = total((wi * xi) * c for wi, xi, c in zip(w, x, codes, strict=True))
        sl = total((wi * c) * c for wi, c in zip(w, codes, strict=True))
        if best is None or (sl > 0 and F(sx * sx) > F(best[2] * sl)):
            scale = F(sx / sl) if sl else F(0)
            best = ([c + n for c in codes], scale, F(scale * sx))
    return best[0], best[1]


def naive_asymmetric(x, w, levels, grid, mad):
    hi = x[0]
    lo = hi
    for v in x[1:]:
        lo = v if v < lo else lo
        hi = v if v > hi else hi
    lo = F(0) if lo > 0 else lo
    if hi <= lo:
        return [F(0)] * len(x), F(0), -lo
    sw = total(w)
    sx = total(w * x)

    def error(codes, s, m):
        parts = [F(F(F(s * c) + m) - xi) for c, xi in zip(codes, x, strict=True)]
        return total(wi * (abs(p) if mad else F(p * p)) for wi, p in zip(w, parts, strict=True))

    inverse = F(levels) / F(hi - lo)
    codes = clipped(inverse * (x - lo), 0, levels)
    scale = F(1) / inverse
    best = error(codes, scale, lo)
    kept = codes
    for i in range(grid.tries + 1):
        inverse = F(F(F(grid.first) + F(F(grid.step) * F(i))) + F(levels)) / F(hi - lo)
        codes = clipped(inverse * (x - lo), 0, levels)
        sl = total(wi * c for wi, c in zip(w, codes, strict=True))
        sll = total((wi * c) * c for wi, c in zip(w, codes, strict=True))
        sxl = total((wi * c) * xi for wi, c, xi in zip(w, codes, x, strict=True))
        d = F(F(sw * sll) - F(sl * sl))
        if d <= 0:
            continue
        s = F(F(F(sw * sxl) - F(sx * sl)) / d)
        m = F(F(F(sll * sx) - F(sl * sxl)) / d)
        if m > 0:
            s = F(sxl / sll)
            m = F(0)
        e = error(codes, s, m)
        if e < best:
            best = e
            kept = codes
            scale = s
            lo = m
    return kept, scale, -lo


def naive_sweep(x, w, codes, sx, sl, low, high, strict):
    for _ in range(5):
        changed = False
        for i, xi in enumerate(x):
            a = F(sx - F(F(w[i] * xi) * codes[i]))
            b = F(sl - F(F(w[i] * codes[i]) * codes[i]))
            if a > 0 and (b > 0 or not strict):
                new = F(min(max(np.rint(F(F(xi * b) / a)), low), high))
                if new != codes[i]:
                    a = F(a + F(F(w[i] * xi) * new))
                    b = F(b + F(F(w[i] * new) * new))
                    if (b > 0 or strict) and F(F(a * a) * sl) > F(F(sx * sx) * b):
                        codes[i] = new
                        sx = a
                        sl = b
                        changed = True
        if not changed:
            break
    return codes, (F(sx / sl) if sl > 0 else F(0))


def naive_swept(x, n):
    m = F(0)
    for v in x:
        m = v if abs(v) > abs(m) else m
    if abs(m) < F(1e-15):
        return [F(0)] * len(x), F(0)
    w = x * x
    codes = clipped(x * (F(-n) / m), -n, n - 1)
    sx = total((wi * xi) * c for wi, xi, c in zip(w, x, codes, strict=True))
    sl = total((wi * c) * c for wi, c in zip(w, codes, strict=True))
    codes, scale = naive_sweep(x, w, codes, sx, sl, -n, n - 1, strict=False)
    return [c + n for c in codes], scale


def naive_positive(x, n, w):
    m = max(F(0), max(x))
    if m < F(1e-15):
        return [F(0)] * len(x), F(0)
    best = None
    inverse = None
    for i in (0, -4, -3, -2, -1, 1, 2, 3, 4):
        tried = F(F(F(0.1) * F(i)) + F(n)) / m
        parts = [F(xi - F((F(1) / tried) * F(min(np.rint(tried * xi), n)))) for xi in x]
        e = total((wi * p) * p for wi, p in zip(w, parts, strict=True))
        if best is None or e < best:
            best = e
            inverse = tried
    codes = [F(min(np.rint(inverse * xi), n)) for xi in x]
    sx = total((wi * xi) * c for wi, xi, c in zip(w, x, codes, strict=True))
    sl = total((wi * c) * c for wi, c in zip(w, codes, strict=True))
    return naive_sweep(x, w, codes, sx, sl, -(2**22), n, strict=True)


def compare(found, expected):
    """Codes and scales of all blocks against those of the loops, to the bit."""
    for part, (ours, theirs) in enumerate(zip(found, zip(*expected, strict=True), strict=True)):
        theirs = np.array(theirs, dtype=F)
        np.testing.assert_array_equal(to_host(ours), theirs.T if part == 0 else theirs)


# --- the searches -------------------------------------------------------------------------


@settings(max_examples=15)
@given(columns(16), st.sampled_from([4, 8, 16, 32]), st.booleans())
def test_symmetric_is_the_loop(xp, drawn, n, weighted):
    x, w = drawn
    with without_warnings(x):
        found = fit_symmetric(xp.asarray(x), n, xp.asarray(w) if weighted else None)
        compare(
            found,
            [
                naive_symmetric(c, n, v if weighted else c * c)
                for c, v in zip(x.T, w.T, strict=True)
            ],
        )


@settings(max_examples=15)
@given(
    columns(16),
    st.sampled_from(
        [(3, Grid(-0.5, 0.1, 15), True), (15, Grid(-1.0, 0.1, 20), False), (31, IMPORTANT, False)]
    ),
)
def test_asymmetric_is_the_loop(xp, drawn, variant):
    x, w = drawn
    levels, grid, mad = variant
    with without_warnings(x):
        found = fit_asymmetric(xp.asarray(x), xp.asarray(w), levels, grid, mad=mad)
        compare(
            found,
            [naive_asymmetric(c, v, levels, grid, mad) for c, v in zip(x.T, w.T, strict=True)],
        )


@settings(max_examples=15)
@given(columns(16))
def test_swept_is_the_loop(xp, drawn):
    x, _ = drawn
    with without_warnings(x):
        compare(fit_by_sweeps(xp.asarray(x), 4), [naive_swept(c, 4) for c in x.T])


@settings(max_examples=15)
@given(columns(8), st.sampled_from([15, 63]))
def test_positive_is_the_loop(xp, drawn, n):
    x = np.abs(drawn[0])
    w = drawn[1]
    with without_warnings(x):
        found = fit_positive(xp.asarray(x), n, xp.asarray(w))
        compare(found, [naive_positive(c, n, v) for c, v in zip(x.T, w.T, strict=True)])


@pytest.mark.theorem(
    "Σ w (s·(L − n) − x)² = Σwx² − (Σwxl)²/Σwl² for the best s of codes L: larger is better",
    source="weighted least squares",
)
@given(columns(16), st.sampled_from([4, 32]))
def test_symmetric_is_no_worse_than_the_largest_value_divided(drawn, n):
    x, w = (a.astype(np.float64) for a in drawn)
    with without_warnings(x):
        codes, scale = (a.astype(np.float64) for a in fit_symmetric(drawn[0], n, drawn[1]))
    found = (w * (scale * (codes - n) - x) ** 2).sum(axis=0)
    m = extreme(x)
    step = np.where(m == 0, 1, m) / -n
    plain = (w * (step * np.clip(np.rint(x / step), -n, n - 1) - x) ** 2).sum(axis=0)
    assert (
        np.where(np.abs(m) < 1e-15, 0, found) <= plain + 64 * 2.0**-24 * (w * x * x).sum(axis=0)
    ).all()


def test_swept_never_refines_a_positive_extreme():
    """The quirk: the scale is negative then, and so is Σwxl; with a negative extreme many
    blocks are refined.
    """
    x = build("normal", (16, 2000), 0)
    plain = np.clip(np.rint(x * (F(-4) / extreme(x))), -4, 3) + 4
    changed = (fit_by_sweeps(x, 4)[0] != plain).any(axis=0)
    assert not changed[extreme(x) > 0].any()
    assert changed[extreme(x) < 0].mean() > 0.2


def test_no_sixth_sweep_is_made():
    """One block in 200,000 would change once more; this is one."""
    x = np.random.default_rng(9).standard_normal((16, 20000)).astype(F)[:, [19316]]
    compare(fit_by_sweeps(x, 4), [naive_swept(x[:, 0], 4)])


@pytest.mark.parametrize("sign", [1, -1])
def test_blocks_are_zero_below_the_threshold_and_not_at_it(sign):
    edge = F(1e-15)
    below = np.nextafter(edge, F(0))
    x = np.zeros((16, 2), dtype=F)
    x[3] = [sign * edge, sign * below]
    x[7] = x[3] / 2
    w = np.full((16, 2), 1e20, dtype=F)
    with without_warnings(x):
        found = fit_symmetric(x, 8, w)
        compare(found, [naive_symmetric(c, 8, v) for c, v in zip(x.T, w.T, strict=True)])
        assert (found[1] != 0).tolist() == [True, False]
        compare(fit_by_sweeps(x, 4), [naive_swept(c, 4) for c in x.T])
        found = fit_positive(np.abs(x), 15, w)
        compare(found, [naive_positive(c, 15, v) for c, v in zip(np.abs(x).T, w.T, strict=True)])
        assert (found[1] != 0).tolist() == [True, False]


def test_all_five_sweeps_are_made():
    """A code that only the fifth sweep changes is one in 10,000: these blocks have one."""
    rng = np.random.default_rng(0)
    x = np.ascontiguousarray(rng.standard_normal((16, 30000)).astype(F))
    w = np.random.default_rng(3).uniform(0, 1, x.shape).astype(F)
    late = x[:, [4650, 5455]]
    later = [4839, 7365, 22794, 27064]
    compare(fit_by_sweeps(late, 4), [naive_swept(c, 4) for c in late.T])
    few = np.abs(x[:, later])
    weights = w[:, later]
    with without_warnings(x):
        compare(
            fit_positive(few, 63, weights),
            [naive_positive(c, 63, v) for c, v in zip(few.T, weights.T, strict=True)],
        )


# --- sums, rounding, extremes -------------------------------------------------------------


@pytest.mark.theorem(
    "The sums are ((0 + t₀) + t₁) + … in float32, for any number of columns",
    source="the format",
)
@given(
    st.sampled_from([1, 2, 7, 16, 32, 256]),
    st.integers(1, 40) | st.sampled_from([1000, 4097, 9001]),
    seeds,
)
def test_sums_are_in_order(xp, rows, count, seed):
    rng = np.random.default_rng(seed)
    terms = (rng.standard_normal((rows, count)) * 10.0 ** rng.uniform(-4, 4, (rows, count))).astype(
        F
    )
    expected = np.zeros(count, dtype=F)
    for row in terms:
        expected = expected + row
    np.testing.assert_array_equal(to_host(sequential_sum(xp.asarray(terms))), expected)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_sums_of_views_are_in_order(count):
    """NumPy adds pairwise where the summed axis is the fast one, however many columns."""
    rng = np.random.default_rng(0)
    terms = (rng.standard_normal((256, count)) * 10.0 ** rng.uniform(-4, 4, (256, 1))).astype(F)
    expected = total_of_rows(terms)
    wide = np.repeat(terms, 2, axis=1)
    for view in (np.asfortranarray(terms), wide[:, ::2], terms[::-1][::-1]):
        np.testing.assert_array_equal(sequential_sum(view), expected)


def total_of_rows(terms):
    out = np.zeros(terms.shape[1], dtype=F)
    for row in terms:
        out = out + row
    return out


def test_sums_of_minus_zero_are_plus_zero(xp):
    for count in (1, 20):
        assert not np.signbit(
            to_host(sequential_sum(xp.asarray(np.full((3, count), -0.0, F))))
        ).any()


@given(
    st.lists(
        st.floats(-4194303, 4194303, width=32) | st.integers(-99, 99).map(lambda i: i / 2),
        min_size=1,
    )
)
def test_nearest_is_rint(xp, values):
    x = np.array(values, dtype=F)
    np.testing.assert_array_equal(to_host(nearest(xp.asarray(x))), np.rint(x).astype(np.int32))


def test_nearest_of_nan_and_infinity(xp):
    x = np.array([np.nan, -np.nan, np.inf, -np.inf], dtype=F)
    assert to_host(nearest(xp.asarray(x))).tolist() == [0, 0, -(2**22), -(2**22)]


def test_the_first_of_equal_extremes_counts(xp):
    x = np.array([[0.5, -0.0, 0.0], [-1.0, 0.0, -0.0], [1.0, 0.0, 0.0], [-1.0, -0.0, 0.0]], dtype=F)
    largest = to_host(extreme(xp.asarray(x)))
    smallest = to_host(least(xp.asarray(x)))
    assert largest.tolist() == [-1.0, 0.0, 0.0]
    assert smallest.tolist() == [-1.0, 0.0, 0.0]
    assert np.signbit(smallest).tolist() == [True, True, False]
    assert np.signbit(largest).tolist() == [True, False, False]


# --- bits ---------------------------------------------------------------------------------


@given(st.sampled_from([(1, 32), (2, 32), (2, 4), (4, 16), (4, 32), (4, 64), (1, 1)]), seeds)
def test_codes_come_back(xp, layout, seed):
    width, run = layout
    codes = (
        np.random.default_rng(seed)
        .integers(0, 1 << width, (3, 8 * run // width * 2))
        .astype(np.uint8)
    )
    data = bits.pack_bits(xp.asarray(codes), width, run)
    assert data.shape == (3, codes.shape[1] * width // 8)
    np.testing.assert_array_equal(
        to_host(bits.unpack_bits(data[:, :, None], width, run))[..., 0], codes
    )
    # code i of a run lies in byte i mod run, at bit (i div run)·bits
    i = int(np.random.default_rng(seed).integers(codes.shape[1]))
    part, place = divmod(i, 8 * run // width)
    byte = int(to_host(data)[0, part * run + place % run])
    assert (byte >> (place // run * width)) & ((1 << width) - 1) == codes[0, i]


@given(seeds)
def test_six_bit_scales_come_back(xp, seed):
    rng = np.random.default_rng(seed)
    s, m = (rng.integers(0, 64, (5, 8)).astype(np.uint8) for _ in range(2))
    packed = kquants.pack_six_bits(xp.asarray(s), xp.asarray(m))
    back = kquants.unpack_six_bits(packed[:, :, None])
    np.testing.assert_array_equal(np.stack([to_host(b)[..., 0] for b in back]), np.stack([s, m]))
    wide = rng.integers(0, 64, (5, 16)).astype(np.uint8)
    np.testing.assert_array_equal(
        to_host(
            kquants_symmetric.unpack_wide_scales(
                kquants_symmetric.pack_wide_scales(xp.asarray(wide))[:, :, None]
            )
        )[..., 0],
        wide,
    )
