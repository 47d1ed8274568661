"""Round to nearest is ``quantize``, and searched ranges are the best of the candidates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.formats.quantized_linear import quantize
from refllm.formats.uniform import (
    RULES,
    Scheme,
    dequantize_codes,
    qparams,
    quantize_codes,
    range_to_qparams,
)
from refllm.quant import column_quantizer
from refllm.quant.column_quantizer import weight_qparams
from refllm.quant.rtn import rtn
from strategies import KINDS, arrays, seeds

EPS32 = float(np.finfo("float32").eps)
MODEST = [kind for kind in KINDS if kind not in ("extreme", "denormal")]
SCHEMES = [
    Scheme(4, "asymmetric", "group", 4),
    Scheme(3, "half_integer", "channel"),
    Scheme(2, "restricted", "tensor"),
    Scheme(4, "half_integer_unsigned", "group", 8),
    Scheme(3, "awq", "block", (3, 5)),
    Scheme(8, "asymmetric_signed", "channel"),
    Scheme(4, "power", "block", 4),
]
schemes = st.sampled_from(SCHEMES)


def errors(w, scale, zero_point, scheme):
    """Σ |x̂ − x|^2.4 of each range, by the definition, float64."""
    off = (
        np.abs(
            dequantize_codes(
                quantize_codes(w, scale, zero_point, scheme), scale, zero_point, scheme
            )
            - w
        ).astype("float64")
        ** 2.4
    )
    if scheme.granularity == "tensor":
        return off.sum()
    rows, columns = {"channel": (1, w.shape[1])}.get(scheme.granularity) or scheme.block
    return np.array(
        [
            [off[i : i + rows, j : j + columns].sum() for j in range(0, w.shape[1], columns)]
            for i in range(0, w.shape[0], rows)
        ]
    )


@given(w=arrays(st.integers(1, 9), 8), scheme=schemes)
def test_without_a_search_it_is_quantize(xp, w, scheme):
    w = xp.asarray(w)
    got = rtn(w, scheme, scale_dtype="float32")
    expected = quantize(w, scheme, scale_dtype="float32")
    assert np.array_equal(to_host(got.packed()), to_host(expected.packed()))
    assert np.array_equal(to_host(got.scale), to_host(expected.scale))
    assert got.nbytes == expected.nbytes


@pytest.mark.theorem(
    "The searched range of a group has at most the error, in the norm of the search, of its "
    "whole range",
    source="the whole range is the first candidate",
)
@given(w=arrays(st.integers(1, 9), 8, kinds=MODEST), scheme=schemes)
def test_bound_a_search_never_loses_to_the_whole_range(xp, w, scheme):
    w = w.astype("float64")
    found = weight_qparams(xp.asarray(w), scheme, mse=True)
    whole = qparams(w, scheme)
    before = errors(w, *whole, scheme)
    after = errors(w, *map(to_host, found), scheme)
    assert np.all(after <= before * (1 + 100 * np.finfo("float64").eps))
    span = 1.0 if scheme.rule == "awq" else 1.0 + 1e-15  # narrower ranges, so smaller scales
    assert np.all(to_host(found[0]) <= whole[0] * span)


@given(
    w=arrays(st.integers(1, 6), 8, kinds=["normal", "outlier_column", "one_sided"]), scheme=schemes
)
def test_exact_value_the_search_finds_the_best_of_eighty_ranges(xp, w, scheme):
    """By hand: every candidate with the definition of its error, the first of the best
    ones.
    """
    w = w.astype("float64")
    scale, zero_point = (to_host(p) for p in weight_qparams(xp.asarray(w), scheme, mse=True))
    lo, hi = (np.asarray(p) for p in column_quantizer.ranges(w, scheme))
    tried = [
        tuple(map(np.asarray, range_to_qparams(np.asarray(p * lo), np.asarray(p * hi), scheme)))
        for p in (1 - np.arange(80) / 100)
    ]
    cost = np.array([errors(w, *grid, scheme) for grid in tried])  # [80, …]
    mine = errors(w, scale, zero_point, scheme)
    assert np.all(np.abs(mine - cost.min(axis=0)) <= 1e-12 * cost[0])
    chosen = np.array([np.isclose(s, scale, rtol=1e-14, atol=0) for s, _ in tried])
    assert chosen.any(axis=0).all()  # each is one of the candidates


@given(seed=seeds, scheme=schemes, exponent=st.integers(-60, 60))
def test_invariance_the_search_does_not_see_a_power_of_two(xp, seed, scheme, exponent):
    """Errors are measured in units of the scale: weights of any size are searched alike, without
    underflow.
    """
    if scheme.rule == "awq" and exponent < 0:
        return  # its smallest range is 1e-5, for any weights
    w = np.random.default_rng(seed).standard_normal((4, 8)).astype("float32")
    plain = rtn(xp.asarray(w), scheme, mse=True)
    scaled = rtn(xp.asarray(w * np.float32(2.0**exponent)), scheme, mse=True)
    assert np.array_equal(to_host(plain.codes), to_host(scaled.codes))
    assert np.array_equal(to_host(plain.scale) * np.float32(2.0**exponent), to_host(scaled.scale))


def test_the_search_clips_where_one_weight_is_far_from_all_others(xp):
    w = np.random.default_rng(0).standard_normal((1, 1024)).astype("float32")
    w[0, 7] = 9.0
    scheme = Scheme(3, "half_integer", "channel")
    plain = rtn(xp.asarray(w), scheme)
    searched = rtn(xp.asarray(w), scheme, mse=True)
    assert float(to_host(searched.scale)[0, 0]) < 0.8 * float(to_host(plain.scale)[0, 0])
    assert to_host(searched.dequantize())[0, 7] < 9.0
    error = [np.mean((to_host(q.dequantize()) - w) ** 2) for q in (plain, searched)]
    assert error[1] < error[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_invariance_pieces_change_nothing(xp, scheme, monkeypatch):
    w = xp.asarray(np.random.default_rng(1).standard_normal((11, 8)).astype("float32"))
    whole = weight_qparams(w, scheme, mse=True)
    monkeypatch.setattr(column_quantizer, "_PIECE", 20)
    for got, expected in zip(weight_qparams(w, scheme, mse=True), whole, strict=True):
        assert np.array_equal(to_host(got), to_host(expected))


@pytest.mark.parametrize("rule", RULES)
def test_degenerate_ranges_without_extent_are_searched_too(xp, rule):
    for w in (np.zeros((2, 8)), np.full((2, 8), 0.5), np.full((2, 1), -3.0)):
        q = rtn(xp.asarray(w.astype("float32")), Scheme(4, rule, "channel"), mse=True)
        assert np.all(np.isfinite(to_host(q.dequantize())))
        if not w.any():
            assert np.array_equal(to_host(q.dequantize()), w)


def test_one_sided_ranges_get_half_of_the_step_where_the_quirk_is_asked_for(xp):
    scheme = Scheme(4, "half_integer_unsigned", "channel")
    w = np.array(
        [[0.0, 1.0, 15.0], [-1.0, 1.0, 15.0], [-15.0, -1.0, 0.0], [0.0, 0.0, 0.0]], dtype="float32"
    )
    plain, quirk = (
        to_host(weight_qparams(xp.asarray(w), scheme, one_sided=flag)[0])[:, 0]
        for flag in (False, True)
    )
    # only the row that is not negative anywhere, and not all zero
    assert quirk.tolist() == [plain[0] / 2, *plain[1:]]
    other = dataclasses.replace(scheme, rule="half_integer")
    assert np.array_equal(
        *(to_host(weight_qparams(xp.asarray(w), other, one_sided=f)[0]) for f in (False, True))
    )


@pytest.mark.parametrize("mse", [False, True])
def test_what_cannot_be_rounded_is_rejected_by_name(xp, mse):
    w = np.ones((2, 12), dtype="float32")
    with pytest.raises(ValueError, match=r"head: groups of 5 do not divide a row of 12.* 4 and 6"):
        rtn(xp.asarray(w), Scheme(4, "power", "group", 5), mse=mse, name="head")
    w[1, 3] = np.nan
    with pytest.raises(ValueError, match=r"head: holds NaN or infinity, first at index \(1, 3\)"):
        rtn(xp.asarray(w), Scheme(4, "power", "channel"), mse=mse, name="head")
