"""Dense in both layouts against the plain matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.model.weights import BLOCK, Dense
from strategies import arrays, seeds

# one block and several, one row less and one more, and sizes that are no multiple of the block
outputs = st.sampled_from([1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK, 5 * BLOCK])
dtypes = st.sampled_from(["float32", "float64"])


@st.composite
def matrices(draw):
    """Host W[M, N]; every kind but the extreme one, whose products overflow in any layout."""
    kinds = ("normal", "outlier_column", "zero", "constant", "denormal", "one_sided")
    return draw(arrays(draw(outputs), st.integers(1, 9), dtype=draw(dtypes), kinds=kinds))


@pytest.mark.theorem("Dense.matmul(x) = x Wᵀ in either layout, for every M, N and T", source="design: the weight seam")
@given(matrices(), st.integers(0, 70), seeds)
def test_matmul_is_the_plain_product(xp, weight, rows, seed):
    x = np.random.default_rng(seed).standard_normal((rows, weight.shape[1])).astype(weight.dtype)
    got = to_host(Dense(xp.asarray(weight)).matmul(xp.asarray(x)))
    assert got.shape == (rows, weight.shape[0])
    assert got.dtype == weight.dtype
    exact = x.astype(np.longdouble) @ weight.T.astype(np.longdouble)
    # a sum of N products errs by N·eps of the sum of their sizes, in any order; a denormal product by its spacing
    info = np.finfo(weight.dtype)
    n = weight.shape[1]
    bound = n * float(info.eps) * (np.abs(x).astype(np.longdouble) @ np.abs(weight).T.astype(np.longdouble))
    assert (np.abs(got - exact) <= bound + n * float(info.smallest_subnormal)).all()


@given(matrices(), st.data())
def test_rows_are_the_rows_of_the_matrix(xp, weight, data):
    index = data.draw(st.lists(st.integers(0, weight.shape[0] - 1), max_size=8))
    got = Dense(xp.asarray(weight)).rows(xp.asarray(np.array(index, dtype=np.int64)))
    assert got.shape == (len(index), weight.shape[1])
    np.testing.assert_array_equal(to_host(got), weight[index])


@pytest.mark.theorem(
    "Dense.dequantize() is the matrix, bit for bit, and shares no memory with the weight", source="design"
)
@given(matrices())
def test_dequantize_is_exact_and_a_new_array(xp, weight):
    dense = Dense(xp.asarray(weight.copy()))
    first = dense.dequantize()
    np.testing.assert_array_equal(to_host(first), weight)
    first[...] = 7.0
    np.testing.assert_array_equal(to_host(dense.dequantize()), weight)


@given(matrices())
def test_storage_is_counted_and_the_layout_costs_none(xp, weight):
    dense = Dense(xp.asarray(weight))
    assert dense.shape == weight.shape
    assert dense.nbytes == weight.nbytes
    assert dense.bits_per_weight == 8 * weight.dtype.itemsize
    assert dense.dtype == weight.dtype


def test_layout_is_chosen_by_library_and_shape(xp):
    multiple, other = xp.zeros((2 * BLOCK, 3)), xp.zeros((2 * BLOCK + 1, 3))
    assert Dense(multiple).blocked == (xp is np)
    assert not Dense(other).blocked


def test_mixed_types_follow_numpys_promotion():
    weight = np.ones((BLOCK, 4), dtype=np.float32)
    assert Dense(weight).matmul(np.ones((2, 4))).dtype == np.float64


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_only_a_matrix_is_a_weight(shape):
    with pytest.raises(ValueError, match="matrix"):
        Dense(np.zeros(shape))
