"""``Dense`` in every layout against the plain matrix, and weights that are multiplied as one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.model import weight_layout
from refllm.model.weight_layout import COLUMNS, WeightArena
from refllm.model.weights import Dense, bind_fused, fuse, fused_matmul
from strategies import seeds
from weight_layouts import PROCESSORS, matrices, on_processor


@pytest.fixture(params=PROCESSORS, ids=lambda processor: f"{processor[0]}-{processor[1]}")
def processor(request, monkeypatch):
    """Every kind of processor, since the layout of a weight depends on it."""
    on_processor(monkeypatch, *request.param)


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
    multiple = xp.zeros((2 * COLUMNS, 3))
    other = xp.zeros((2 * COLUMNS + 1, 3))
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
        st.lists(st.sampled_from([COLUMNS, 2 * COLUMNS, 3 * COLUMNS, 5]), min_size=1, max_size=4)
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
    sizes = data.draw(st.lists(st.sampled_from([COLUMNS, 2 * COLUMNS, 5]), min_size=1, max_size=3))
    _, dense, _ = laid_out(np, sizes, columns, seed)
    mine = dense if data.draw(st.booleans()) else dense[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_layout, "SMALL_PRODUCT", most * COLUMNS * columns)
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


@pytest.mark.usefixtures("processor")
def test_fused_weights_are_one_product_and_share_the_arena(xp, monkeypatch):
    _, dense, arena = laid_out(xp, (2 * COLUMNS, COLUMNS), 3, 0)
    multiplied = []
    monkeypatch.setattr(
        Dense,
        "matmul",
        lambda self, x, f=Dense.matmul: (multiplied.append(self.shape), f(self, x))[1],
    )
    x = xp.ones((2, 3))
    fused_matmul(x, *dense)
    assert multiplied == ([(3 * COLUMNS, 3)] if xp is np else [(2 * COLUMNS, 3), (COLUMNS, 3)])
    assert arena.used == (9 * COLUMNS if xp is np else 0)
    for others in (dense[:1], dense[::-1], [dense[0], Dense(xp.ones((COLUMNS, 3)))]):
        multiplied.clear()
        fused_matmul(x, *others)
        assert multiplied == [w.shape for w in others]  # never the fused one


@pytest.mark.usefixtures("processor")
def test_an_arena_takes_only_blocks_of_its_own_dtype():
    for sizes, types in (((COLUMNS, COLUMNS + 1), {}), ((COLUMNS, COLUMNS), {"dtype": "float32"})):
        _, dense, _ = laid_out(np, sizes, 3, 0, **types)
        assert all(w.fused is None for w in dense)
    _, (first, second), arena = laid_out(np, (COLUMNS, COLUMNS), 3, 0)
    assert first.blocked
    assert arena.buffer.__array_interface__["data"][0] % 64 == 0
    assert np.shares_memory(first.fused._data, second._data)
    assert arena.buffer.size == arena.used == 6 * COLUMNS


def test_mixed_types_follow_numpys_promotion():
    weight = np.ones((COLUMNS, 4), dtype=np.float32)
    assert Dense(weight).matmul(np.ones((2, 4))).dtype == np.float64


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_only_a_matrix_is_a_weight(shape):
    with pytest.raises(ValueError, match="matrix"):
        Dense(np.zeros(shape))
