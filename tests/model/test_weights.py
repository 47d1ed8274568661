"""``Dense`` in both layouts against the plain matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.model import weights
from refllm.model.weights import BLOCK, Dense, WeightArena, bind_fused, fuse, fused_matmul
from strategies import arrays, seeds

# one block and several, one row less and one more, and sizes that are no multiple of 64
outputs = st.sampled_from([1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK, 5 * BLOCK])
dtypes = st.sampled_from(["float32", "float64"])


@st.composite
def matrices(draw):
    """Host W[M, N]; every kind but the extreme one, whose products overflow in any layout."""
    kinds = ("normal", "outlier_column", "zero", "constant", "denormal", "one_sided")
    return draw(arrays(draw(outputs), st.integers(1, 9), dtype=draw(dtypes), kinds=kinds))


@pytest.fixture(params=[True, False], ids=["AVX-512", "no AVX-512"])
def processor(request, monkeypatch):
    """Both kinds of processor, since the layout of a weight depends on it."""
    monkeypatch.setattr(weights, "has_small_kernels", lambda: request.param)


@pytest.mark.theorem(
    "Dense.matmul(x) = x Wᵀ in every layout, for every M, N and T",
    source="ARCHITECTURE.md: the weight seam",
)
@given(
    matrices(),
    st.integers(0, 70),
    st.sampled_from([0, 3, 4, 5, 16, 10**6]),
    st.sampled_from([2, 30, weights.PACKED_FROM]),
    st.sampled_from([0, 1, 3, weights.PACKED_SIZE]),
    st.booleans(),
    seeds,
)
def test_matmul_is_the_plain_product(xp, weight, rows, most, many, wide, in_place, seed):
    x = np.random.default_rng(seed).standard_normal((rows, weight.shape[1])).astype(weight.dtype)
    # groups of at most ``most`` rows; below 4 there are no groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "SMALL_PRODUCT", most * BLOCK * weight.shape[1])
        patch.setattr(weights, "PACKED_FROM", many)
        # blocks side by side at a time
        patch.setattr(weights, "PACKED_SIZE", wide * BLOCK * weight.shape[1])
        patch.setattr(weights, "has_small_kernels", lambda: in_place)
        got = to_host(Dense(xp.asarray(weight)).matmul(xp.asarray(x)))
    assert got.shape == (rows, weight.shape[0])
    assert got.dtype == weight.dtype
    exact = x.astype(np.longdouble) @ weight.T.astype(np.longdouble)
    # a sum of N products errs by N·eps of the sum of their sizes, in any order; a denormal
    # product by its spacing
    info = np.finfo(weight.dtype)
    n = weight.shape[1]
    bound = (
        n
        * float(info.eps)
        * (np.abs(x).astype(np.longdouble) @ np.abs(weight).T.astype(np.longdouble))
    )
    assert (np.abs(got - exact) <= bound + n * float(info.smallest_subnormal)).all()


@pytest.mark.parametrize("rows", range(12))
def test_every_row_is_in_a_group_whatever_the_rest(rows, monkeypatch):
    monkeypatch.setattr(weights, "SMALL_PRODUCT", 4 * BLOCK * 7)  # groups of at most 4 rows
    monkeypatch.setattr(weights, "has_small_kernels", lambda: True)
    w = np.arange(2 * BLOCK * 7.0).reshape(-1, 7)
    x = np.arange(7.0 * rows).reshape(rows, 7)
    dense = Dense(w)
    out = np.full((rows, 2 * BLOCK), np.nan)
    dense.bind(x, out)()
    np.testing.assert_array_equal(out, x @ w.T)  # integers: exact
    np.testing.assert_array_equal(dense.matmul(x), out)


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 9])
def test_many_rows_see_every_block_however_many_lie_side_by_side(blocks, monkeypatch):
    monkeypatch.setattr(weights, "PACKED_FROM", 4)
    # 0: not even one fits, and one is taken
    monkeypatch.setattr(weights, "PACKED_SIZE", blocks * BLOCK * 7)
    monkeypatch.setattr(weights, "has_small_kernels", lambda: True)
    w = np.arange(5 * BLOCK * 7.0).reshape(-1, 7)
    x = np.arange(28.0).reshape(4, 7)
    np.testing.assert_array_equal(Dense(w).matmul(x), x @ w.T)  # integers: exact


@pytest.mark.usefixtures("processor")
@given(matrices(), st.data())
def test_rows_are_the_rows_of_the_matrix(xp, weight, data):
    index = data.draw(st.lists(st.integers(0, weight.shape[0] - 1), max_size=8))
    got = Dense(xp.asarray(weight)).rows(xp.asarray(np.array(index, dtype=np.int64)))
    assert got.shape == (len(index), weight.shape[1])
    np.testing.assert_array_equal(to_host(got), weight[index])


@pytest.mark.theorem(
    "Dense.dequantize() is the matrix, bit for bit, and shares no memory with the weight",
    source="ARCHITECTURE.md",
)
@pytest.mark.usefixtures("processor")
@given(matrices())
def test_dequantize_is_exact_and_a_new_array(xp, weight):
    dense = Dense(xp.asarray(weight.copy()))
    first = dense.dequantize()
    np.testing.assert_array_equal(to_host(first), weight)
    first[...] = 7.0
    np.testing.assert_array_equal(to_host(dense.dequantize()), weight)


@pytest.mark.usefixtures("processor")
@given(matrices())
def test_storage_is_counted_and_the_layout_costs_none(xp, weight):
    dense = Dense(xp.asarray(weight))
    assert dense.shape == weight.shape
    assert dense.nbytes == weight.nbytes
    assert dense.bits_per_weight == 8 * weight.dtype.itemsize
    assert dense.dtype == weight.dtype


def test_layout_is_chosen_by_library_and_shape(xp):
    multiple = xp.zeros((2 * BLOCK, 3))
    other = xp.zeros((2 * BLOCK + 1, 3))
    assert Dense(multiple).blocked == (xp is np)
    assert not Dense(other).blocked


# --- fused weights ------------------------------------------------------------------------


def laid_out(xp, sizes, columns, seed, dtype="float64", arena_dtype="float64"):
    """Host weights [M, N] of ``sizes`` rows, the same in an arena of their own, and the
    arena.
    """
    rng = np.random.default_rng(seed)
    host = [rng.standard_normal((m, columns)).astype(dtype) for m in sizes]
    arena = WeightArena([w.shape for w in host], xp.zeros(1, dtype=arena_dtype))
    return host, fuse((xp.asarray(w) for w in host), arena), arena


@pytest.mark.theorem(
    "fused_matmul(x, W₁, W₂, …) = [x W₁ᵀ | x W₂ᵀ | …], fused or one by one, of any of the "
    "weights in any order",
    source="ARCHITECTURE.md: the weight seam",
)
@pytest.mark.usefixtures("processor")
@given(st.data(), st.integers(1, 9), st.integers(0, 5), seeds)
def test_fused_product_is_the_products_side_by_side(xp, data, columns, rows, seed):
    sizes = data.draw(
        st.lists(st.sampled_from([BLOCK, 2 * BLOCK, 3 * BLOCK, 5]), min_size=1, max_size=4)
    )
    host, dense, _ = laid_out(xp, sizes, columns, seed)
    chosen = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=4))
    mine = [Dense(xp.asarray(host[i])) if data.draw(st.booleans()) else dense[i] for i in chosen]
    for indices, weights_there in ((range(len(sizes)), dense), (chosen, mine)):
        x = np.random.default_rng(seed).standard_normal((rows, columns))
        got = to_host(fused_matmul(xp.asarray(x), *weights_there))
        expected = np.concatenate([x @ host[i].T for i in indices], axis=1)
        np.testing.assert_allclose(got, expected, rtol=0, atol=columns * 40 * np.finfo(float).eps)
    for w, d in zip(host, dense, strict=True):
        np.testing.assert_array_equal(to_host(d.dequantize()), w)
        assert d.nbytes == w.nbytes


@pytest.mark.theorem(
    "A bound product multiplies what x holds when it is called, for every layout, T and "
    "choice of weights",
    source="ARCHITECTURE.md: the weight seam",
)
@pytest.mark.usefixtures("processor")
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 4, 10**6]), seeds)
def test_a_bound_product_reads_x_when_it_is_called(data, columns, rows, most, seed):
    sizes = data.draw(st.lists(st.sampled_from([BLOCK, 2 * BLOCK, 5]), min_size=1, max_size=3))
    _, dense, _ = laid_out(np, sizes, columns, seed)
    mine = dense if data.draw(st.booleans()) else dense[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "SMALL_PRODUCT", most * BLOCK * columns)
        x = np.zeros((rows, columns))
        out = np.full((rows, sum(sizes)), np.nan)
        call = bind_fused(x, out, mine)
        for _ in range(2):
            x[...] = np.random.default_rng(seed).standard_normal(x.shape)
            call()
            expected = np.concatenate([x @ w.dequantize().T for w in mine], axis=1)
            np.testing.assert_allclose(
                out, expected, rtol=0, atol=columns * 40 * np.finfo(float).eps
            )
            seed += 1


@pytest.mark.parametrize(
    ("in_place", "padded"),
    [(True, [0, 2, 2, 4, 4, 5, 6, 7, 8, 9]), (False, [0, 1, 2, 3, 4, 8, 8, 8, 8, 12])],
)
def test_rows_are_padded_to_what_is_fastest(in_place, padded, monkeypatch):
    monkeypatch.setattr(weights, "has_small_kernels", lambda: in_place)
    blocked = Dense(np.ones((2 * BLOCK, 3)))
    plain = Dense(np.ones((BLOCK + 1, 3)))
    assert [blocked.padded_rows(rows) for rows in range(10)] == padded
    assert [plain.padded_rows(rows) for rows in range(10)] == list(range(10))


@pytest.mark.usefixtures("processor")
def test_fused_weights_are_one_product_and_share_the_arena(xp, monkeypatch):
    _, dense, arena = laid_out(xp, (2 * BLOCK, BLOCK), 3, 0)
    multiplied = []
    monkeypatch.setattr(
        Dense,
        "matmul",
        lambda self, x, f=Dense.matmul: (multiplied.append(self.shape), f(self, x))[1],
    )
    x = xp.ones((2, 3))
    fused_matmul(x, *dense)
    assert multiplied == ([(3 * BLOCK, 3)] if xp is np else [(2 * BLOCK, 3), (BLOCK, 3)])
    assert arena.used == (9 * BLOCK if xp is np else 0)
    for others in (dense[:1], dense[::-1], [dense[0], Dense(xp.ones((BLOCK, 3)))]):
        multiplied.clear()
        fused_matmul(x, *others)
        assert multiplied == [w.shape for w in others]  # never the fused one


@pytest.mark.usefixtures("processor")
def test_an_arena_takes_only_blocks_of_its_own_dtype():
    for sizes, types in (((BLOCK, BLOCK + 1), {}), ((BLOCK, BLOCK), {"dtype": "float32"})):
        _, dense, _ = laid_out(np, sizes, 3, 0, **types)
        assert all(w.fused is None for w in dense)
    _, (first, second), arena = laid_out(np, (BLOCK, BLOCK), 3, 0)
    assert first.blocked
    assert arena.buffer.__array_interface__["data"][0] % 64 == 0
    assert np.shares_memory(first.fused._data, second._data)
    assert arena.buffer.size == arena.used == 6 * BLOCK


def test_mixed_types_follow_numpys_promotion():
    weight = np.ones((BLOCK, 4), dtype=np.float32)
    assert Dense(weight).matmul(np.ones((2, 4))).dtype == np.float64


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_only_a_matrix_is_a_weight(shape):
    with pytest.raises(ValueError, match="matrix"):
        Dense(np.zeros(shape))
