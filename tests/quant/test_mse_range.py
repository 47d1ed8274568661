"""The shrinking search against every candidate tried by hand, and against
compressed-tensors' own rounding.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.formats.uniform import (
    RULES,
    Scheme,
    dequantize_codes,
    quantize_codes,
    range_to_qparams,
    ranges,
)
from refllm.quant.mse_range import mse_range
from strategies import arrays, seeds

SCHEMES = [
    Scheme(4, "half_integer", "channel"),
    Scheme(3, "asymmetric", "group", 4),
    Scheme(8, "restricted", "tensor"),
    Scheme(2, "asymmetric_signed", "token"),
    Scheme(4, "half_integer_unsigned", "block", (2, 3)),
    Scheme(4, "awq", "group", 8),
]
schemes = st.sampled_from(SCHEMES)
weights = arrays(st.integers(1, 5), st.sampled_from([8, 16]), dtype="float64")


def error(x, lo, hi, scheme, norm):
    """Σ|x̂ − x|^norm over each range, by slicing, shaped like the scale; in halves: x̂ may
    overflow.
    """
    # NumPy makes scalars of 0-d arrays
    scale, zero = range_to_qparams(np.asarray(lo), np.asarray(hi), scheme)
    e = np.abs(
        dequantize_codes(
            quantize_codes(x, scale, zero, scheme), np.asarray(0.5 * scale), zero, scheme
        )
        - 0.5 * x
    )
    # powers of the largest values overflow, those of the smallest underflow
    e = e / (np.abs(x).max() or 1.0)
    e = e**norm
    if scheme.granularity == "tensor":
        return np.asarray(e.sum())
    rows, columns = scheme.block if scheme.granularity in ("group", "block") else (1, x.shape[1])
    out = np.empty(scale.shape)
    for index in np.ndindex(scale.shape):
        out[index] = e[index[0] * rows :, index[1] * columns :][:rows, :columns].sum()
    return out


@pytest.mark.theorem(
    "The shrinking search's range has the least Σ|x̂ − x|^2.4 of all candidates, so never "
    "more than min-max's",
    source="llm-compressor, observers/mse; GPTQ's authors, quant.py",
)
@given(weights, schemes, st.sampled_from([(100, 0.2, 2.4), (10, 0.8, 2.0), (20, 0.95, 3.0)]))
def test_no_candidate_is_better(x, scheme, search):
    grid, shrink, norm = search
    lo, hi = mse_range(x, scheme, grid=grid, max_shrink=shrink, norm=norm, patience=None)
    low, high = ranges(x, scheme)
    ours = error(x, lo, hi, scheme, norm)
    candidates = [(1 - i / grid) for i in range(int(shrink * grid))]
    errors = np.stack([error(x, p * low, p * high, scheme, norm) for p in candidates])
    # sums of at most 80 terms in another order
    assert (ours <= errors.min(axis=0) * (1 + 200 * np.finfo(np.float64).eps)).all()
    assert (np.maximum(np.abs(lo), np.abs(hi)) <= np.maximum(np.abs(low), np.abs(high))).all()
    chosen = np.where(
        high != 0,
        hi / np.where(high != 0, high, 1),
        np.where(low != 0, lo / np.where(low != 0, low, 1), 1),
    )
    assert np.isclose(chosen[..., None], candidates, rtol=1e-12).any(axis=-1).all()


@given(weights, schemes)
def test_of_equal_errors_the_widest_range_wins(x, scheme):
    """At one candidate, and where the data is zero, the range is min-max's own."""
    low, high = ranges(x, scheme)
    for lo, _ in (mse_range(x, scheme, grid=5), mse_range(0 * x, scheme)):
        assert lo.shape == low.shape
    np.testing.assert_array_equal(mse_range(x, scheme, grid=5)[0], low)  # int(0.2 · 5) = 1
    np.testing.assert_array_equal(mse_range(0 * x, scheme)[1], 0 * high)


def test_patience_ends_the_search_when_no_range_improves():
    """From p = 0.99 to 0.94 the error only grows; the best is further down, where patience
    5 does not arrive.
    """
    scheme = Scheme(2, "restricted", "tensor")  # codes −s, 0, s
    x = np.array([[1.0] * 3 + [0.8] * 4])
    far = mse_range(x, scheme, max_shrink=0.8, patience=None, norm=1.0)
    near = mse_range(x, scheme, max_shrink=0.8, patience=5, norm=1.0)
    assert float(near[1]) == float(far[1]) == 0.8  # 4·(s − 0.8) falls faster than 3·(1 − s) grows
    # now it falls slower, up to s = 0.8: a walk uphill all the way
    x = np.array([[1.0] * 5 + [0.8] * 4])
    assert float(mse_range(x, scheme, max_shrink=0.8, patience=None, norm=1.0)[1]) == 1.0


def test_patience_is_the_number_of_candidates_in_a_row_that_improve_nothing(monkeypatch):
    """p = 1, 0.99, …, with errors of which the third after each improvement is the next one."""
    module = importlib.import_module("refllm.quant.mse_range")
    script = [5.0, 6.0, 5.0, 4.0, 4.0, 9.0, 3.0, 3.0, 3.0, 3.0, 0.0]
    tried: list[float] = []

    def error(x, lo, hi, unit, scheme, norm):
        tried.append(float(hi[0]))
        return np.full(unit.shape, script[len(tried) - 1])

    monkeypatch.setattr(module, "_error", error)
    scheme = Scheme(4, "half_integer", "tensor")
    for patience, candidates, best in ((1, 2, 0), (2, 3, 0), (3, 10, 6), (4, 11, 10)):
        tried.clear()
        _, hi = mse_range(np.ones((1, 2)), scheme, max_shrink=0.11, patience=patience)
        assert len(tried) == candidates
        assert float(hi) == tried[best] == 1 - best / 100


def test_patience_waits_for_an_improvement_and_not_longer():
    """2·(1 − s) costs more at first; below s = 0.985 the five others are rounded to s, and
    cost less the smaller s is: the third candidate is the first that improves.
    """
    scheme = Scheme(2, "restricted", "tensor")  # codes −s, 0, s
    x = np.array([[1.0] * 2 + [0.4925] * 5])
    ends = [
        float(mse_range(x, scheme, norm=1.0, patience=patience)[1]) for patience in (1, 2, 3, 5)
    ]
    assert ends == [1.0, 1.0, 1 - 19 / 100, 1 - 19 / 100]


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((3, 4), (2, 3)),
        ((5, 7), (3, 4)),  # 2 rows and 3 columns are left: a copy of the last would weigh double
    ],
)
def test_ragged_blocks_are_searched_by_their_own_values(xp, shape, block):
    """Each block has the range that its values have alone. They are so small that an error in
    the padding, of any usual size, would hide theirs in float32.
    """
    rng = np.random.default_rng(3)
    x = (rng.standard_t(2, shape) * 2.0**-20).astype(np.float32)
    for rule in RULES:
        scheme = Scheme(3, rule, "block", block)
        alone = Scheme(3, rule, "tensor")
        options = {"max_shrink": 0.8, "patience": None}
        whole = [to_host(end) for end in mse_range(xp.asarray(x), scheme, **options)]
        for i, top in enumerate(range(0, shape[0], block[0])):
            for j, left in enumerate(range(0, shape[1], block[1])):
                inside = x[top : top + block[0], left : left + block[1]]
                piece = xp.asarray(np.ascontiguousarray(inside))
                for end, expected in zip(whole, mse_range(piece, alone, **options), strict=True):
                    assert end[i, j] == float(expected)


def test_the_exponent_matters(xp):
    """A large exponent favours the largest value, a small one the many others."""
    rng = np.random.default_rng(0)
    x = xp.asarray(np.concatenate([rng.standard_normal(2000), [12.0]])[None, :].astype(np.float32))
    scheme = Scheme(4, "half_integer", "tensor")
    ends = [
        float(mse_range(x, scheme, max_shrink=0.8, patience=None, norm=p)[1])
        for p in (2.0, 2.4, 6.0)
    ]
    assert ends[0] <= ends[1] < ends[2]


@given(weights, schemes, seeds)
def test_libraries_agree(xp, x, scheme, seed):
    here = [to_host(v) for v in mse_range(xp.asarray(x), scheme)]
    for ours, theirs in zip(here, mse_range(x, scheme), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_tensors_finds_no_better_candidate(bits, symmetric):
    torch = oracle("torch")
    ct = oracle("compressed_tensors.quantization")
    utils = oracle("compressed_tensors.quantization.utils")
    forward = oracle("compressed_tensors.quantization.lifecycle")
    x = np.random.default_rng(bits).standard_t(3, (16, 64)).astype(np.float32)
    args = ct.QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="channel")
    tensor = torch.from_numpy(x)
    low = tensor.amin(1, keepdim=True)
    high = tensor.amax(1, keepdim=True)

    def loss(lo, hi):
        scale, zero = utils.calculate_qparams(lo, hi, args)
        return (
            (forward.fake_quantize(tensor, scale, zero, args) - tensor)
            .abs()
            .double()
            .pow(2.4)
            .sum(1)
        )

    scheme = Scheme(bits, "half_integer" if symmetric else "asymmetric_signed", "channel")
    lo, hi = (torch.from_numpy(v) for v in mse_range(x, scheme, patience=None))
    best = torch.stack([loss(low * (1 - i / 100), high * (1 - i / 100)) for i in range(20)]).amin(0)
    # our errors are summed in float32: two candidates that differ by 64·eps of it count as
    # equal
    assert (loss(lo, hi) <= best * (1 + 64 * np.finfo(np.float32).eps)).all()
    assert (hi < high).any() or bits == 8  # at 8 bits nothing is worth clipping here


@pytest.mark.parametrize(("grid", "shrink"), [(4, 0.2), (10, 0.0), (10, 1.2)])
def test_a_search_without_candidates_is_rejected(grid, shrink):
    with pytest.raises(ValueError, match="no candidate"):
        mse_range(np.ones((2, 4)), SCHEMES[0], grid=grid, max_shrink=shrink)


def test_what_is_not_finite_is_rejected_by_name(xp):
    with pytest.raises(ValueError, match="w: holds NaN"):
        mse_range(xp.asarray(np.array([[1.0, np.nan]])), SCHEMES[0], name="w")
