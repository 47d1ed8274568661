"""A weight that is rounded column by column gets the scales that its scheme gives each group,
in any order of the visit.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.formats.uniform import RULES, Scheme, dequantize_codes, qparams, quantize_codes
from refllm.quant import column_quantizer
from refllm.quant.column_quantizer import ColumnQuantizer, GPTQResult, weight_qparams
from strategies import seeds

SHAPES = [
    ("tensor", None),
    ("channel", None),
    ("group", 4),
    ("group", 12),
    ("block", (3, 4)),
    ("block", 5),
]
M = 7
N = 12


def weight(seed):
    return np.random.default_rng(seed).standard_normal((M, N))


def visit(xp, w, columns, order):
    """Round the columns of w without compensation, in this order; codes[M, N] and values[M, N] in
    the order of the visit.
    """
    codes = []
    values = []
    for i, j in enumerate(order):
        if columns.dynamic and i % columns.width == 0:
            columns.begin_group(xp.asarray(w[:, order[i : i + columns.width]].T.copy()))
        q, back = columns.quantize(i, xp.asarray(w[:, j].copy()))
        codes.append(to_host(q))
        values.append(to_host(back))
    return np.stack(codes, axis=1), np.stack(values, axis=1)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@given(seed=seeds, rule=st.sampled_from(RULES), ordered=st.booleans())
def test_equality_column_by_column_is_all_at_once(xp, static, shape, seed, rule, ordered):
    """With no error passed on, columns rounded one by one are the matrix rounded whole;
    groups where they belong.
    """
    scheme = Scheme(3, rule, *shape)
    w = weight(seed)
    order = np.random.default_rng(seed).permutation(N) if ordered else np.arange(N)
    given_order = xp.asarray(order) if ordered else None
    columns = ColumnQuantizer(xp.asarray(w), scheme, order=given_order, static=static)
    codes, values = visit(xp, w, columns, order)
    assert columns.dynamic == (shape[0] in ("group", "block") and not static)

    # dynamic groups are groups of columns as they are visited
    seen = w[:, order] if columns.dynamic else w
    scale, zero_point = qparams(seen, scheme)
    whole = quantize_codes(seen, scale, zero_point, scheme)
    back = dequantize_codes(whole, scale, zero_point, scheme)
    if not columns.dynamic:
        whole = whole[:, order]
        back = back[:, order]
    assert np.array_equal(codes, whole)
    assert np.array_equal(values, back)
    for got, expected in zip(columns.qparams(), (scale, zero_point), strict=True):
        assert np.array_equal(to_host(got), expected)

    kept = GPTQResult.collect(
        xp.asarray(codes), columns, loss=1.5, damp=0.25, dead=xp.zeros(N, dtype=xp.bool_)
    )
    assert (kept.loss, kept.damp, tuple(kept.shape)) == (1.5, 0.25, (M, N))
    there = np.argsort(order)
    assert np.array_equal(to_host(kept.codes), whole[:, there])
    assert np.array_equal(to_host(kept.dequantize()), back[:, there])
    assert (kept.g_idx is None) == (not (ordered and columns.dynamic))
    x = np.random.default_rng(seed).standard_normal((2, N))
    assert np.abs(to_host(kept.matmul(xp.asarray(x))) - x @ back[:, there].T).max() < 1e-12 * N


def test_g_idx_says_which_scale_a_column_has(xp):
    scheme = Scheme(4, "asymmetric", "group", 4)
    w = weight(3)
    order = np.random.default_rng(3).permutation(N)
    columns = ColumnQuantizer(xp.asarray(w), scheme, order=xp.asarray(order))
    codes, _ = visit(xp, w, columns, order)
    kept = GPTQResult.collect(
        xp.asarray(codes), columns, loss=0.0, damp=0.0, dead=xp.zeros(N, dtype=xp.bool_)
    )
    g_idx, scale, zero = (to_host(a) for a in (kept.g_idx, kept.scale, kept.zero_point))
    assert g_idx.dtype == np.int32
    assert np.bincount(g_idx).tolist() == [4, 4, 4]
    by_hand = scale[:, g_idx] * (to_host(kept.codes).astype(float) - zero[:, g_idx])
    assert np.array_equal(by_hand, to_host(kept.dequantize()))
    plain = ColumnQuantizer(xp.asarray(w), scheme)
    codes, _ = visit(xp, w, plain, np.arange(N))
    bare = GPTQResult.collect(
        xp.asarray(codes), plain, loss=0.0, damp=0.0, dead=xp.zeros(N, dtype=xp.bool_)
    )
    assert kept.nbytes == bare.nbytes + 4 * N


@pytest.mark.parametrize("rule", ["half_integer", "asymmetric"])
def test_the_searched_scales_of_ragged_blocks_are_those_of_their_own_values(xp, rule, monkeypatch):
    """Blocks of (3, 5) over 7 × 12, also where a piece ends with each row of blocks. They are so
    small that an error in the padding would hide theirs in float32.
    """
    w = (np.random.default_rng(5).standard_t(2, (M, N)) * 2.0**-20).astype("float32")
    expected = np.empty((2, 3, 3))
    for i, j in np.ndindex(3, 3):
        block = np.ascontiguousarray(w[3 * i : 3 * i + 3, 5 * j : 5 * j + 5])
        alone = Scheme(3, rule, "block", block.shape)
        expected[:, i, j] = [a[0, 0] for a in weight_qparams(block, alone, mse=True)]
    for piece in (1, 1 << 19):
        monkeypatch.setattr(column_quantizer, "_PIECE", piece)
        found = weight_qparams(xp.asarray(w), Scheme(3, rule, "block", (3, 5)), mse=True)
        assert np.array_equal([to_host(a) for a in found], expected)


def test_codes_are_made_with_the_scale_that_is_stored(xp):
    w = weight(4).astype("float32")
    scheme = Scheme(8, "restricted", "channel")
    columns = ColumnQuantizer(xp.asarray(w), scheme, scale_dtype="bfloat16")
    scale = to_host(columns.qparams()[0])
    assert not np.any(scale.view("uint32") & 0xFFFF)  # a bfloat16 is the upper half of a float32
    codes, _ = visit(xp, w, columns, np.arange(N))
    assert np.array_equal(
        codes, quantize_codes(w, scale, np.zeros_like(scale, dtype="int32"), scheme)
    )
    kept = GPTQResult.collect(
        xp.asarray(codes),
        columns,
        loss=0.0,
        damp=0.0,
        dead=xp.zeros(N, dtype=xp.bool_),
        scale_dtype="bfloat16",
    )
    assert np.array_equal(to_host(kept.scale), scale)


def test_a_column_that_outgrew_a_tiny_scale_is_clipped_without_overflow(xp):
    """A group of denormals keeps its scale while other groups' errors move its columns: the
    quotient is infinite.
    """
    w = np.full((2, 4), 1e-40, dtype="float32")
    w[:, 2:] = 1.0
    columns = ColumnQuantizer(xp.asarray(w), Scheme(4, "asymmetric", "group", 2), static=True)
    q, back = columns.quantize(0, xp.asarray(np.array([300.0, -300.0], dtype="float32")))
    assert to_host(q).tolist() == [15, 0]
    assert np.all(np.isfinite(to_host(back)))


def test_granularities_and_groups_that_do_not_fit_are_rejected_by_name(xp):
    w = xp.asarray(weight(0))
    with pytest.raises(ValueError, match="up_proj: granularity 'token' is for activations"):
        ColumnQuantizer(w, Scheme(4, "power", "token"), name="up_proj")
    for static in (False, True):
        with pytest.raises(
            ValueError, match="up_proj: groups of 5 do not divide a row of 12.* 4 and 6"
        ):
            ColumnQuantizer(w, Scheme(4, "power", "group", 5), static=static, name="up_proj")
