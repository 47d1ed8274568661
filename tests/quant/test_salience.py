"""The 1 % experiment: which channels are chosen, what keeping them costs, and what it
repairs.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.formats.quantized_linear import quantize
from refllm.formats.uniform import Scheme
from refllm.model.weights import Dense
from refllm.quant.salience import BY, Protected, experiment, output_error, salient_channels
from strategies import build, seeds

W3 = Scheme(3, "asymmetric", "group", 8)
KINDS = ("normal", "outlier_column", "zero", "constant", "one_sided")


def problem(kind, seed, t=13, m=11, n=24, dtype="float64"):
    return build(kind, (t, n), seed, dtype), build(kind, (m, n), seed + 1, dtype)


@given(
    kind=st.sampled_from(KINDS),
    seed=seeds,
    by=st.sampled_from(BY),
    fraction=st.sampled_from([0, 0.01, 0.05, 0.3, 1]),
)
def test_exact_value_the_largest_channels_are_chosen(xp, kind, seed, by, fraction):
    x, w = problem(kind, seed)
    found = salient_channels(
        xp.asarray(x), xp.asarray(w), by, fraction=fraction, rng=np.random.default_rng(seed)
    )
    size = {
        "activation": np.abs(x).sum(axis=0),
        "weight": np.sqrt((w**2).sum(axis=0)),
        "random": np.random.default_rng(seed).permutation(24),
    }[by]
    kept = to_host(found).tolist()
    assert len(kept) == math.ceil(fraction * 24)
    assert kept == sorted(set(kept))
    others = [j for j in range(24) if j not in kept]
    slack = 1e-12 * size.max()  # of two sums in another order
    assert not kept or not others or size[kept].min() >= size[others].max() - slack
    if kind in ("zero", "constant") and by != "random":
        assert kept == list(range(len(kept)))  # equals in the order of their index


@given(
    kind=st.sampled_from(KINDS),
    seed=seeds,
    kept=st.sets(st.integers(0, 23)),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_bound_only_the_kept_columns_differ_from_round_to_nearest(xp, kind, seed, kept, dtype):
    x, w = problem(kind, seed, dtype=dtype)
    index = np.array(sorted(kept), dtype=np.int64)
    plain = quantize(xp.asarray(w), W3)
    protected = Protected(xp.asarray(w), W3, xp.asarray(index))
    others = [j for j in range(24) if j not in kept]
    restored = to_host(protected.dequantize())
    assert np.array_equal(restored[:, index], w[:, index])
    assert np.array_equal(restored[:, others], to_host(plain.dequantize())[:, others])
    y = to_host(protected.matmul(xp.asarray(x)))
    # a sum of 24 products, twice
    bound = 2 * 24 * float(np.finfo(dtype).eps) * (np.abs(x) @ np.abs(restored).T)
    assert y.dtype == dtype
    assert np.all(np.abs(y - x @ restored.T) <= bound)
    assert protected.shape == (11, 24)
    assert protected.nbytes == plain.nbytes + len(kept) * (11 * w.itemsize + 8)
    assert protected.bits_per_weight == 8 * protected.nbytes / (11 * 24)


def test_the_input_and_the_weight_are_left_as_they_are(xp):
    x, w = (xp.asarray(v) for v in problem("normal", 0))
    before = to_host(x).tobytes(), to_host(w).tobytes()
    experiment(x, w, W3, rng=np.random.default_rng(0))
    assert (to_host(x).tobytes(), to_host(w).tobytes()) == before


@given(seed=seeds)
def test_degenerate_keeping_nothing_is_round_to_nearest_and_keeping_all_is_exact(xp, seed):
    x, w = (xp.asarray(v) for v in problem("normal", seed))
    none = experiment(x, w, W3, fraction=0, rng=np.random.default_rng(seed))
    assert len({round(error, 12) for error in none.values()}) == 1
    everything = experiment(x, w, W3, fraction=1, rng=np.random.default_rng(seed))
    assert all(everything[by] <= 1e-28 for by in BY)  # rounding of a product in float64, squared
    assert everything["none"] == none["none"] > 1e-4


def test_channels_that_carry_the_activations_repair_more_than_large_weights_or_random_ones(xp):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 256))
    w = rng.standard_normal((96, 256))
    x[:, [31, 77, 200]] *= 20  # ⌈1 % of 256⌉
    errors = experiment(xp.asarray(x), xp.asarray(w), W3, rng=rng)
    assert set(errors) == {"none", *BY}
    assert errors["activation"] < 0.3 * errors["none"]
    assert min(errors["weight"], errors["random"]) > 0.9 * errors["none"]


@given(seed=seeds)
def test_exact_value_output_error_is_relative_and_squared(xp, seed):
    x, w = problem("normal", seed)
    error = output_error(xp.asarray(x), xp.asarray(w), Dense(xp.asarray(1.5 * w)))
    assert error == pytest.approx(0.25, rel=1e-12)


def test_degenerate_the_error_of_a_zero_output(xp):
    zero = xp.zeros((2, 24))
    w = xp.ones((3, 24))
    assert output_error(zero, w, Dense(w)) == 0.0
    assert output_error(xp.ones((2, 24)), 0 * w, Dense(w)) == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "loss"}, "choose by one of activation, weight, random"),
        ({"by": "random"}, "random needs rng"),
        ({"by": "weight", "fraction": 1.5}, "fraction 1.5 is not within 0..1"),
        ({"by": "weight", "fraction": math.nan}, "is not within"),
    ],
)
def test_rejected(xp, options, message):
    with pytest.raises(ValueError, match=message):
        salient_channels(xp.ones((2, 24)), xp.ones((3, 24)), **options)
