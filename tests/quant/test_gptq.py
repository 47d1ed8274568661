"""GPTQ: what its loss is, what it equals, what does not change it; and the same codes as
llm-compressor.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from test_hessian import inputs, positive

from conftest import to_host
from golden.make_gptq import CASES, FILE
from golden.make_gptq import inputs as golden_inputs
from refllm.formats.uniform import RULES, Scheme
from refllm.quant.column_quantizer import weight_qparams
from refllm.quant.gptq import gptq
from refllm.quant.hessian import damped, factor, hessian
from refllm.quant.rtn import rtn
from strategies import KINDS, arrays, seeds
from ties import settled

EPS32, EPS64 = (float(np.finfo(dtype).eps) for dtype in ("float32", "float64"))
M = 5
N = 24
SHAPES = [
    *(("tensor", None), ("channel", None), ("group", 4), ("group", 8), ("group", 24)),
    *(("block", (2, 6)), ("block", 7)),
]
# the largest floats overflow in s·(q − z), or in e
MODEST = [kind for kind in KINDS if kind != "extreme"]
schemes = st.builds(
    lambda bits, rule, shape: Scheme(bits, rule, *shape),
    st.integers(2, 8),
    st.sampled_from(RULES),
    st.sampled_from(SHAPES),
)
options = st.fixed_dictionaries({"act_order": st.booleans(), "static_groups": st.booleans()})


def problem(seed, *, dead=False, tokens=60):
    """W[M, N] and H[N, N] in float64."""
    x = inputs(seed, tokens, N)
    if dead:
        x[:, [seed % N, (seed + 5) % N]] = 0
    return np.random.default_rng(seed).standard_normal((M, N)), 2 * x.T @ x / tokens


def loss_of(w, q, h):
    e = w - q
    return 0.5 * np.einsum("mi,ij,mj->", e, h, e)


def close(a, b, h):
    """Losses equal up to rounding: N operations, each amplified by at most the condition of H."""
    return abs(a - b) <= 64 * N * EPS64 * np.linalg.cond(h) * max(a, b)


# --- the loss -----------------------------------------------------------------------------


@pytest.mark.theorem(
    "Σ ½ e² = ½ tr(E H Eᵀ) for the damped H and the dead columns of W at zero: the loss "
    "needs no product with H",
    source="Frantar et al. 2022, section 3; expand E U⁻¹ U⁻ᵀ Eᵀ",
)
@given(
    seed=seeds,
    scheme=schemes,
    options=options,
    damp=st.sampled_from([0.001, 0.01, 0.3]),
    dead=st.booleans(),
)
def test_conservation_the_loss_is_the_quadratic_form(xp, seed, scheme, options, damp, dead):
    w, h = problem(seed, dead=dead)
    q = gptq(xp.asarray(w), xp.asarray(h), scheme, damp=damp, block_size=16, **options)
    exact = damped(h, damp)
    alive = w * ~to_host(q.dead)
    assert q.damp == damp
    assert to_host(q.dead).sum() == 2 * dead
    assert close(q.loss, loss_of(alive, to_host(q.dequantize()), exact), exact)


def test_the_loss_is_that_of_what_is_stored_also_with_rounded_scales(xp):
    w, h = problem(1)
    for options in ({}, {"act_order": True}, {"static_groups": True}):
        q = gptq(
            xp.asarray(w),
            xp.asarray(h),
            Scheme(3, "asymmetric", "group", 8),
            scale_dtype="float16",
            zero_dtype="float16",
            **options,
        )
        scale = to_host(q.scale)
        assert np.array_equal(scale, scale.astype("float16").astype("float64"))
        assert close(q.loss, loss_of(w, to_host(q.dequantize()), damped(h, 0.01)), damped(h, 0.01))
    bits = M * 4 * -(-N * 3 // 32)
    parameters = M * 3 * (2 + 2)
    assert q.nbytes == bits + parameters


# --- what it equals -----------------------------------------------------------------------


@pytest.mark.theorem(
    "For H = c·I GPTQ is round to nearest, bit for bit",
    source="U is diagonal: no error is passed on",
)
@given(
    w=arrays(M, N, kinds=MODEST),
    scheme=schemes,
    options=options,
    c=st.sampled_from([2.0**-9, 1.0, 3.7]),
    mse=st.booleans(),
)
def test_equality_with_a_hessian_of_one_size_it_is_round_to_nearest(xp, w, scheme, options, c, mse):
    assume(not (mse and scheme.granularity == "tensor"))
    w = xp.asarray(w)
    got = gptq(w, xp.asarray(c * np.eye(N, dtype="float32")), scheme, mse=mse, **options)
    nearest = rtn(w, scheme, mse=mse)
    assert np.array_equal(to_host(got.codes), to_host(nearest.codes))
    assert np.array_equal(to_host(got.dequantize()), to_host(nearest.dequantize()))


def babai(target, basis):
    """Babai's nearest plane by Gram–Schmidt: integer coefficients of a lattice point near
    ``target``.
    """
    n = len(basis)
    orthogonal = basis.copy()
    for i in range(n):
        for j in range(i):
            orthogonal[i] -= (
                (basis[i] @ orthogonal[j]) / (orthogonal[j] @ orthogonal[j]) * orthogonal[j]
            )
    coefficients = np.zeros(n)
    left = target.copy()
    for i in reversed(range(n)):
        coefficients[i] = np.rint(left @ orthogonal[i] / (orthogonal[i] @ orthogonal[i]))
        left = left - coefficients[i] * basis[i]
    return coefficients


def unclipped(seed, n, bits=8):
    """W and a scheme of one scale that a last row makes so large that nothing in the others
    is clipped.
    """
    w = np.random.default_rng(seed).uniform(-1, 1, (4, n))
    w[-1] = 40.0
    return w, Scheme(bits, "restricted", "tensor")


@pytest.mark.theorem(
    "Without clipping, GPTQ is Babai's nearest plane on the lattice of H's square root, "
    "coordinates reversed",
    source="Chen et al. 2025 (arXiv:2507.18553)",
)
@given(seed=seeds, n=st.integers(1, 10), block=st.sampled_from([1, 3, 128]))
def test_equality_it_is_babai_s_nearest_plane(xp, seed, n, block):
    w, scheme = unclipped(seed, n)
    h = positive(seed, n)
    q = gptq(xp.asarray(w), xp.asarray(h), scheme, damp=0.0, block_size=block)
    codes = to_host(q.codes).astype(float)
    s = float(to_host(q.scale))
    assert np.abs(codes[:-1]).max() < 127
    values, vectors = np.linalg.eigh(h)
    # any square root spans the same lattice, up to a rotation
    root = (vectors * np.sqrt(values)) @ vectors.T
    for row in range(len(w) - 1):
        nearest = babai(w[row] @ root, s * root[::-1])[::-1]
        assert np.array_equal(codes[row], nearest)


@pytest.mark.theorem(
    "Without clipping, (w − q) H (w − q)ᵀ ≤ s²/4 · Σ 1/U_ii² for each row",
    source="Chen et al. 2025: each e_i U_ii is a rounding error, at most s/2",
)
@given(seed=seeds, n=st.integers(1, 16), act_order=st.booleans())
def test_bound_of_the_error_without_clipping(xp, seed, n, act_order):
    w, scheme = unclipped(seed, n)
    h = positive(seed, n)
    f = factor(xp.asarray(h), 0.0, act_order)
    q = gptq(xp.asarray(w), f, scheme, act_order=act_order)
    s = float(to_host(q.scale))
    e = (w - to_host(q.dequantize()))[:-1]
    assert np.abs(to_host(q.codes)[:-1]).max() < 127
    bound = s * s / 4 * np.sum(np.diag(to_host(f.upper)) ** -2.0)
    assert np.einsum("mi,ij,mj->m", e, h, e).max() <= bound * (
        1 + 64 * n * EPS64 * np.linalg.cond(h)
    )


# --- what does not change it --------------------------------------------------------------


@pytest.mark.theorem(
    "The block size changes nothing: a dynamic group's columns are brought up to date "
    "before its scale is found",
    source="lazy batch updates are linear, Frantar et al. 2022, section 3.3",
)
@given(
    seed=seeds,
    scheme=schemes,
    options=options,
    block=st.sampled_from([1, 2, 3, 5, 7, 8, 10, 16, 23]),
)
def test_invariance_of_the_block_size(xp, seed, scheme, options, block):
    w, h = (xp.asarray(a) for a in problem(seed))
    whole = gptq(w, h, scheme, **options)
    blocks = gptq(w, h, scheme, block_size=block, **options)
    same = settled(whole, to_host(w), to_host(h), act_order=options["act_order"])
    assert np.array_equal(
        same, settled(blocks, to_host(w), to_host(h), act_order=options["act_order"])
    )
    assert np.array_equal(to_host(whole.codes)[same], to_host(blocks.codes)[same])
    if same.all():
        np.testing.assert_allclose(to_host(blocks.scale), to_host(whole.scale), rtol=1e4 * EPS64)


@pytest.mark.theorem(
    "Act-order is the plain order on permuted columns, and does not see in which order the "
    "columns came",
    source="W ← W P, H ← Pᵀ H P",
)
@given(seed=seeds, rule=st.sampled_from(RULES), shape=st.sampled_from(SHAPES[:5]))
def test_equivariance_of_act_order(xp, seed, rule, shape):
    scheme = Scheme(3, rule, *shape)
    w, h = problem(seed)
    q = gptq(xp.asarray(w), xp.asarray(h), scheme, act_order=True)
    p = np.argsort(-np.diag(h), kind="stable")
    plain = gptq(xp.asarray(w[:, p]), xp.asarray(h[np.ix_(p, p)]), scheme)
    same = settled(q, w, h, act_order=True)
    assert np.array_equal(to_host(q.codes)[:, p][same[:, p]], to_host(plain.codes)[same[:, p]])
    if same.all():
        np.testing.assert_allclose(
            to_host(q.dequantize())[:, p], to_host(plain.dequantize()), rtol=1e4 * EPS64
        )

    mixed = np.random.default_rng(seed).permutation(N)  # diagonals differ: the visit is the same
    again = gptq(
        xp.asarray(w[:, mixed]), xp.asarray(h[np.ix_(mixed, mixed)]), scheme, act_order=True
    )
    assert np.array_equal(
        to_host(again.codes)[same[:, mixed]], to_host(q.codes)[:, mixed][same[:, mixed]]
    )
    if q.g_idx is not None:
        assert np.array_equal(to_host(again.g_idx), to_host(q.g_idx)[mixed])


@pytest.mark.theorem(
    "A positive factor of H changes no code", source="e and U scale alike; only the loss has a unit"
)
@given(seed=seeds, scheme=schemes, options=options, exponent=st.integers(-20, 20))
def test_invariance_of_the_unit_of_the_hessian(xp, seed, scheme, options, exponent):
    w, h = problem(seed)
    plain = gptq(xp.asarray(w), xp.asarray(h), scheme, **options)
    # its root is exact too
    scaled = gptq(xp.asarray(w), xp.asarray(4.0**exponent * h), scheme, **options)
    assert np.array_equal(to_host(plain.packed()), to_host(scaled.packed()))
    assert scaled.loss == 4.0**exponent * plain.loss


@given(seed=seeds, rule=st.sampled_from(RULES), shape=st.sampled_from(SHAPES[1:5]), options=options)
def test_invariance_rows_do_not_see_each_other_and_share_a_factor(xp, seed, rule, shape, options):
    """Several weights that read the same input: one factor, or one stack of rows."""
    scheme = Scheme(3, rule, *shape)
    w, h = problem(seed)
    v, _ = problem(seed + 1)
    f = factor(xp.asarray(h), 0.01, options["act_order"])
    alone = [gptq(xp.asarray(a), f, scheme, **options) for a in (w, v)]
    both = np.concatenate([w, v])
    stacked = gptq(xp.asarray(both), xp.asarray(h), scheme, **options)
    same = settled(stacked, both, h, act_order=options["act_order"])
    codes = np.concatenate([to_host(q.codes) for q in alone])
    assert np.array_equal(codes[same], to_host(stacked.codes)[same])
    if same.all():
        assert abs(sum(q.loss for q in alone) - stacked.loss) <= 1e4 * EPS64 * stacked.loss


def test_weight_and_hessian_stay_as_they_are(xp):
    for shape in ((M, N), (1, N)):  # the columns of a single row need no copy to lie in rows
        w, h = problem(3)
        w = w[: shape[0]]
        moved = xp.asarray(w.copy()), xp.asarray(h.copy())
        for options in (
            {},
            {"act_order": True},
            {"upstream_quirks": True},
            {"upstream_quirks": True, "mse": True},
        ):
            for scheme in (Scheme(3, "asymmetric", "group", 4), Scheme(3, "asymmetric", "channel")):
                gptq(*moved, scheme, **options)
        assert np.array_equal(to_host(moved[0]), w)
        assert np.array_equal(to_host(moved[1]), h)


# --- the quirks of the published code -----------------------------------------------------


def published(w, h, scheme, *, block, act_order=False, static=False, damp=0.01):
    """The published order of operations, written down plainly; codes and their values in the
    order of the visit, Σ, and that order.
    """
    grid = Scheme(scheme.bits, scheme.rule, "channel")
    g = scheme.group_size or w.shape[1]
    m, n = w.shape
    w = w.copy()
    h = h.copy()
    s, z = weight_qparams(w, grid, one_sided=True)
    dead = np.diag(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    fixed = (
        [weight_qparams(w[:, i : i + g], grid, one_sided=True) for i in range(0, n, g)]
        if static
        else None
    )
    p = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(n)
    w = w[:, p]
    h = h[np.ix_(p, p)]
    h[np.arange(n), np.arange(n)] += damp * np.mean(np.diag(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    codes = np.zeros((m, n))
    back = np.zeros((m, n))
    loss = 0.0
    for i1 in range(0, n, block):
        i2 = min(i1 + block, n)
        w1 = w[:, i1:i2].copy()
        errors = np.zeros((m, i2 - i1))
        for i in range(i2 - i1):
            c = i1 + i
            if scheme.group_size and static:
                s, z = fixed[p[c] // g]
            elif scheme.group_size and c % g == 0:
                s, z = weight_qparams(np.ascontiguousarray(w[:, c : c + g]), grid, one_sided=True)
            codes[:, c] = np.clip(np.rint(w1[:, i] / s[:, 0]) + z[:, 0], scheme.qmin, scheme.qmax)
            back[:, c] = s[:, 0] * (codes[:, c] - z[:, 0])
            error = w1[:, i] - back[:, c]
            errors[:, i] = error / u[c, c]
            loss += 0.5 * np.sum(errors[:, i] ** 2)
            w1[:, i:] -= np.outer(errors[:, i], u[c, c:i2])
        w[:, i2:] -= errors @ u[i1:i2, i2:]
    return codes, back, loss, p


@pytest.mark.theorem(
    "With its quirks named, GPTQ is the published code's order of operations",
    source="Frantar et al. 2022, their code",
)
@given(
    seed=seeds,
    rule=st.sampled_from(["half_integer_unsigned", "asymmetric"]),
    group=st.sampled_from([None, 2, 4, 6, 8, 12, 24]),
    block=st.sampled_from([3, 4, 8, 9, 12, 16, 24]),
    options=options,
    kind=st.sampled_from(["normal", "one-sided", "dead"]),
)
@example(
    seed=25,
    rule="half_integer_unsigned",
    group=2,
    block=8,
    options={"act_order": False, "static_groups": False},
    kind="dead",
)
def test_equality_with_the_published_order_of_operations(
    xp, seed, rule, group, block, options, kind
):
    w, h = problem(seed, dead=kind == "dead")
    w = np.abs(w) if kind == "one-sided" else w
    # there dead columns, with a diagonal of 1, stand anywhere
    assume(not (options["act_order"] and kind == "dead"))
    scheme = Scheme(3, rule, "group" if group else "channel", group)
    got = gptq(
        xp.asarray(w), xp.asarray(h), scheme, block_size=block, upstream_quirks=True, **options
    )
    codes, back, loss, order = published(
        w, h, scheme, block=block, act_order=options["act_order"], static=options["static_groups"]
    )
    same = settled(got, w, h, act_order=options["act_order"])[:, order]
    assert np.array_equal(to_host(got.codes)[:, order][same], codes[same])
    # from a tie on each has a loss of its own: that of its codes
    exact = damped(h, 0.01)
    alive = w * ~to_host(got.dead)
    assert close(got.loss, loss_of(alive, to_host(got.dequantize()), exact), exact)
    visited = exact[np.ix_(order, order)]
    assert close(loss, loss_of(alive[:, order], back, visited), visited)
    if same.all():
        assert close(got.loss, loss, damped(h, 0.01))


def test_the_quirks_make_a_difference_that_the_clean_form_does_not_have(xp):
    """Stale scales make the block size part of the method; half of the scale makes one-sided
    groups clip.
    """
    w, h = problem(7)
    scheme = Scheme(3, "asymmetric", "group", 4)
    w = xp.asarray(w)
    h = xp.asarray(h)
    stale = [gptq(w, h, scheme, block_size=b, upstream_quirks=True) for b in (4, 8, 24)]
    clean = [gptq(w, h, scheme, block_size=b) for b in (4, 8, 24)]
    assert (
        len({q.packed().tobytes() if xp is np else to_host(q.packed()).tobytes() for q in clean})
        == 1
    )
    assert len({to_host(q.packed()).tobytes() for q in stale}) == 3
    # a block a group: nothing is stale
    assert np.array_equal(to_host(stale[0].codes), to_host(clean[0].codes))

    positive_only = Scheme(4, "half_integer_unsigned", "channel")
    u = np.abs(np.random.default_rng(0).standard_normal((2, N)))
    eye = xp.asarray(np.eye(N))
    half, full = (
        gptq(xp.asarray(u), eye, positive_only, upstream_quirks=flag) for flag in (True, False)
    )
    assert np.array_equal(to_host(half.scale), 0.5 * to_host(full.scale))
    kept = to_host(half.dequantize()).max(axis=1) / u.max(axis=1)
    assert np.abs(kept - 7 / 15).max() <= 4 * EPS64  # 0.467 of the range
    assert half.loss > 10 * full.loss


def test_a_row_s_scale_sees_dead_columns_only_in_the_published_order(xp):
    w, h = problem(2, dead=True)
    w[:, 2] = 50.0  # the dead columns are 2 and 7
    scheme = Scheme(4, "half_integer_unsigned", "channel")
    live = np.delete(w, [2, 7], axis=1)
    clean, quirk = (
        gptq(xp.asarray(w), xp.asarray(h), scheme, upstream_quirks=flag) for flag in (False, True)
    )
    assert np.array_equal(to_host(clean.scale), to_host(weight_qparams(live, scheme)[0]))
    assert np.all(to_host(quirk.scale) == 50.0 / 7.5)


# --- the reference implementation ---------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_oracle_the_codes_are_llm_compressor_s(xp, name):
    """Recorded by ``golden/make_gptq.py``. In float32 a tie can fall the other way and take
    its row along.
    """
    case = CASES[name]
    golden = np.load(FILE)
    w, x = (xp.asarray(a) for a in golden_inputs(case))
    rule = "half_integer" if case.symmetric else "asymmetric_signed"
    scheme = Scheme(case.bits, rule, "group" if case.group else "channel", case.group)
    q = gptq(w, hessian(x), scheme, act_order=case.act_order, static_groups=True)
    assert np.array_equal(to_host(q.scale), golden[f"{name}/scale"])
    assert np.array_equal(to_host(q.zero_point), golden[f"{name}/zero"])
    assert np.mean(to_host(q.codes) == golden[f"{name}/codes"]) >= 0.99
    assert abs(q.loss / float(golden[f"{name}/loss"]) - 1) <= 1e-3
    assert q.g_idx is None


# --- degenerate ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "granularity", [("channel", None), ("group", 1), ("tensor", None), ("block", 3)]
)
@pytest.mark.parametrize(
    "options", [{}, {"act_order": True}, {"static_groups": True}, {"mse": True}]
)
def test_degenerate_a_single_column_or_row_is_round_to_nearest(xp, granularity, options):
    scheme = Scheme(4, "asymmetric", *granularity)
    w = xp.asarray(np.random.default_rng(0).standard_normal((4, 1)).astype("float32"))
    got = gptq(w, xp.asarray(np.array([[3.0]], dtype="float32")), scheme, **options)
    assert np.array_equal(to_host(got.codes), to_host(rtn(w, scheme, mse="mse" in options).codes))


def test_degenerate_all_columns_dead_gives_zeros(xp):
    w = xp.asarray(np.random.default_rng(0).standard_normal((3, 8)))
    for rule in RULES:
        q = gptq(w, xp.zeros((8, 8)), Scheme(4, rule, "group", 4), act_order=True)
        assert to_host(q.dead).all()
        assert not to_host(q.dequantize()).any()
        assert q.loss == 0.0


def test_degenerate_zero_and_constant_weights(xp):
    _, h = problem(4)
    for rule in RULES:
        scheme = Scheme(4, rule, "group", 8)
        zero = gptq(xp.zeros((2, N)), xp.asarray(h), scheme)
        assert zero.loss == 0.0
        assert not to_host(zero.dequantize()).any()
        constant = gptq(xp.full((2, N), -0.75), xp.asarray(h), scheme)
        assert np.isfinite(constant.loss)


def test_fewer_tokens_than_columns_and_no_damping_raise_the_damping_and_report_it(xp):
    w, h = problem(5, tokens=4)
    q = gptq(xp.asarray(w), xp.asarray(h), Scheme(3, "asymmetric", "group", 8), damp=0.01)
    assert q.damp == 0.01
    shifted = h - 1.1 * damped(h, 0.01)[0, 0] * np.eye(N)  # no longer a Hessian that 1 % could mend
    np.fill_diagonal(shifted, np.abs(np.diag(shifted)))
    q = gptq(xp.asarray(w), xp.asarray(shifted), Scheme(3, "asymmetric", "group", 8), damp=0.01)
    assert q.damp > 0.01
    exact = damped(shifted, q.damp)
    assert close(q.loss, loss_of(w, to_host(q.dequantize()), exact), exact)


def test_float32_comes_close_to_float64(xp):
    """Codes may part at ties, the losses by what a few codes make."""
    w, h = problem(6)
    scheme = Scheme(4, "asymmetric", "group", 8)
    double, single = (
        gptq(xp.asarray(w.astype(t)), xp.asarray(h.astype(t)), scheme)
        for t in ("float64", "float32")
    )
    assert to_host(single.dequantize()).dtype == np.float32
    assert np.mean(to_host(single.codes) == to_host(double.codes)) > 0.95
    assert abs(single.loss / double.loss - 1) < 0.05
    # a factor in float64 for a float32 weight
    wide = gptq(xp.asarray(w.astype("float32")), xp.asarray(h), scheme)
    assert to_host(wide.scale).dtype == np.float32
    assert abs(wide.loss / double.loss - 1) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones((2, 5))}, r"up: shape \(2, 5\) does not fit a Hessian of 24 columns"),
        ({"weight": np.ones(24)}, r"up: shape \(24,\) does not fit"),
        (
            {"weight": np.ones((2, 24), dtype=int)},
            "up: GPTQ rounds floating-point weights, got int",
        ),
        (
            {"weight": np.full((2, 24), np.nan)},
            r"up: holds NaN or infinity, first at index \(0, 0\)",
        ),
        (
            {"scheme": Scheme(4, "power", "group", 7)},
            "up: groups of 7 do not divide a row of 24.* 6 and 8",
        ),
        ({"scheme": Scheme(4, "power", "token")}, "up: granularity 'token' is for activations"),
        ({"block_size": 0}, "block_size=0"),
        ({"hessian": np.full((24, 24), np.inf)}, "hessian: it holds NaN or infinity"),
        ({"damp": -1.0}, "0 or more, got -1.0"),
    ],
)
def test_what_does_not_fit_is_rejected(xp, change, message):
    arguments = {
        "weight": np.ones((2, N)),
        "hessian": np.eye(N),
        "scheme": Scheme(4, "power", "channel"),
        **change,
    }
    w = xp.asarray(arguments.pop("weight"))
    h = xp.asarray(arguments.pop("hessian"))
    with pytest.raises(ValueError, match=message):
        gptq(w, h, name="up", **arguments)


def test_a_factor_for_the_other_order_is_rejected(xp):
    w, h = (xp.asarray(a) for a in problem(0))
    for made, asked in ((True, False), (False, True)):
        with pytest.raises(
            ValueError, match=f"act_order={asked}, but the factor was made with act_order={made}"
        ):
            gptq(w, factor(h, 0.01, made), Scheme(4, "power", "channel"), act_order=asked)
