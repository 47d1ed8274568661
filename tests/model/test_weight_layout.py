"""Each layout of a weight against the plain matrix, which layout is chosen, and which results
have the same bits.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.model import weight_layout
from refllm.model.weight_layout import COLUMNS, NARROW, Blocks, OneBlock, Tiles, layout_for
from refllm.model.weights import Dense
from strategies import seeds
from weight_layouts import PROCESSORS, matrices, on_processor

LAYOUTS = (Blocks, Tiles, OneBlock)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def laid_out(layout: type[Blocks], weight: np.ndarray) -> Blocks:
    """W[M, N] in the given layout."""
    m, n = weight.shape
    width = layout.width(m)
    return layout(np.empty((m // width, n, width), dtype=weight.dtype)).fill(weight)


@pytest.mark.theorem(
    "Dense.matmul(x) = x Wᵀ in every layout, for every M, N and T",
    source="ARCHITECTURE.md: the weight seam",
)
@given(
    matrices(),
    st.integers(0, 70),
    st.sampled_from([0, 3, 4, 5, 16, 10**6]),
    st.sampled_from([2, 30, 128]),
    st.sampled_from([0, 1, 3, 2**20]),
    st.sampled_from(PROCESSORS),
    st.booleans(),
    seeds,
)
def test_matmul_is_the_plain_product(xp, weight, rows, most, many, wide, processor, zen4, seed):
    x = np.random.default_rng(seed).standard_normal((rows, weight.shape[1])).astype(weight.dtype)
    # groups of at most ``most`` rows; below 4 there are no groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_layout, "SMALL_PRODUCT", most * COLUMNS * weight.shape[1])
        patch.setattr(Blocks, "DIVIDED_FROM", 0)  # however small
        for layout in (Blocks, Tiles):
            patch.setattr(layout, "PACKED_FROM", many)
            # blocks side by side at a time
            patch.setattr(layout, "PACKED_SIZE", wide * layout.WIDTH * weight.shape[1])
        on_processor(patch, *processor)
        patch.setattr(weight_layout, "runs_on_zen4", lambda: zen4)
        got = to_host(Dense(xp.asarray(weight)).matmul(xp.asarray(x)))
    assert got.shape == (rows, weight.shape[0])
    assert got.dtype == weight.dtype
    exact = x.astype(np.longdouble) @ weight.T.astype(np.longdouble)
    # a sum of N products errs by N·eps of the sum of their sizes, in any order; a denormal
    # product by its spacing
    info = np.finfo(weight.dtype)
    n = weight.shape[1]
    sizes = np.abs(x).astype(np.longdouble) @ np.abs(weight).T.astype(np.longdouble)
    bound = n * float(info.eps) * sizes
    assert (np.abs(got - exact) <= bound + n * float(info.smallest_subnormal)).all()


@pytest.mark.parametrize("rows", range(12))
def test_every_row_is_in_a_group_whatever_the_rest(rows, monkeypatch):
    monkeypatch.setattr(weight_layout, "SMALL_PRODUCT", 4 * COLUMNS * 7)  # groups of at most 4
    w = np.arange(2 * COLUMNS * 7.0).reshape(-1, 7)
    x = np.arange(7.0 * rows).reshape(rows, 7)
    blocks = laid_out(Blocks, w)
    out = np.full((rows, 2 * COLUMNS), np.nan)
    blocks.bind(x, out)()
    np.testing.assert_array_equal(out, x @ w.T)  # integers: exact
    np.testing.assert_array_equal(blocks.matmul(x), out)


@pytest.mark.parametrize("layout", [Blocks, Tiles], ids=["Blocks", "Tiles"])
@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 9])
def test_many_rows_see_every_block_however_many_lie_side_by_side(layout, blocks, monkeypatch):
    monkeypatch.setattr(weight_layout, "runs_on_zen4", lambda: False)
    monkeypatch.setattr(layout, "PACKED_FROM", 4)
    # 0: not even one fits, and one is taken
    monkeypatch.setattr(layout, "PACKED_SIZE", blocks * layout.WIDTH * 7)
    w = np.arange(5 * COLUMNS * 7.0).reshape(-1, 7)
    x = np.arange(28.0).reshape(4, 7)
    multiplied = laid_out(layout, w)
    np.testing.assert_array_equal(multiplied.matmul(x), x @ w.T)  # integers: exact
    out = np.full((4, 5 * COLUMNS), np.nan)
    call = multiplied.bind(x, out)
    x += 1  # a bound product reads x when it is called
    call()
    np.testing.assert_array_equal(out, x @ w.T)


@pytest.mark.theorem(
    "Up to 127 rows (Blocks), 6 (Tiles) or 3 (OneBlock), the bits of a row of x Wᵀ do not depend "
    "on the rows that are multiplied with it",
    source="model/weight_layout.py: what rounds how",
)
@layouts
@pytest.mark.parametrize("shape", [(4 * COLUMNS, 100), (COLUMNS, 37), (9 * COLUMNS, 576)])
def test_the_bits_of_a_row_do_not_depend_on_its_company(layout, shape):
    if layout is Blocks and not weight_layout.has_small_kernels():
        pytest.skip("these kernels pack: the processor, or OPENBLAS_CORETYPE, has no AVX-512")
    rng = np.random.default_rng(0)
    multiplied = laid_out(layout, rng.standard_normal(shape, dtype=np.float32))
    most = layout.PACKED_FROM - 1 if layout is Blocks else layout.MATVEC_ROWS
    x = rng.standard_normal((most, shape[1]), dtype=np.float32)
    alone = np.concatenate([multiplied.matmul(row[None]) for row in x])
    for rows in range(1, most + 1):
        np.testing.assert_array_equal(multiplied.matmul(x[:rows]), alone[:rows])


@layouts
@given(st.integers(1, 70), st.integers(1, 9), seeds)
def test_padding_rows_do_not_show(layout, rows, columns, seed):
    rng = np.random.default_rng(seed)
    multiplied = laid_out(layout, rng.integers(-9, 9, (2 * COLUMNS, columns)).astype(float))
    x = rng.integers(-9, 9, (rows, columns)).astype(float)
    np.testing.assert_array_equal(multiplied.matmul(x), x @ multiplied.to_matrix().T)  # exact
    assert multiplied.padded_rows(rows) >= rows


@pytest.mark.parametrize(
    ("layout", "threads", "padded"),
    [
        (Blocks, 1, [0, 2, 2, 4, 4, 5, 6, 7, 8, 9, 10]),
        (Blocks, 2, [0, 2, 2, 4, 4, 5, 6, 7, 8, 9, 10]),
        (Tiles, 1, [0, 1, 2, 3, 4, 5, 6, 8, 8, 12, 12]),
        (OneBlock, 1, [0, 1, 2, 3, 4, 8, 8, 8, 8, 12, 12]),
        (OneBlock, 2, [0, 1, 2, 3, 8, 8, 8, 8, 8, 16, 16]),
        (OneBlock, 3, [0, 1, 2, 3, 8, 8, 8, 8, 8, 16, 16]),
    ],
)
def test_rows_are_padded_to_what_is_fastest(layout, threads, padded, monkeypatch):
    on_processor(monkeypatch, "Haswell", threads)
    blocks = laid_out(layout, np.ones((2 * COLUMNS, 3)))
    assert [blocks.padded_rows(rows) for rows in range(11)] == padded


def test_a_plain_matrix_needs_no_padding():
    plain = Dense(np.ones((COLUMNS + 1, 3)))
    assert [plain.padded_rows(rows) for rows in range(10)] == list(range(10))


@pytest.mark.parametrize(
    ("processor", "narrow", "wide"),
    [
        (("SkylakeX", 1), Blocks, Blocks),
        (("Cooperlake", 2), Blocks, Blocks),
        (("SapphireRapids", 2), Blocks, Blocks),
        (("Haswell", 1), Tiles, OneBlock),
        (("Zen", 1), Tiles, OneBlock),
        (("Haswell", 2), OneBlock, OneBlock),
        (("NEOVERSEN1", 1), OneBlock, OneBlock),
        (("", 1), OneBlock, OneBlock),
    ],
)
def test_kernels_threads_and_width_choose_the_layout(processor, narrow, wide, monkeypatch):
    on_processor(monkeypatch, *processor)
    assert layout_for(COLUMNS) is narrow
    assert layout_for(NARROW) is narrow
    assert layout_for(NARROW + COLUMNS) is wide


@pytest.mark.parametrize(
    ("zen4", "threads", "packs"), [(True, 1, False), (True, 2, True), (False, 1, True)]
)
def test_many_rows_are_packed_except_on_one_thread_of_a_zen4(zen4, threads, packs, monkeypatch):
    on_processor(monkeypatch, "SkylakeX", threads)
    monkeypatch.setattr(weight_layout, "runs_on_zen4", lambda: zen4)
    packed = []
    monkeypatch.setattr(
        Blocks, "_multiply_side_by_side", lambda self, x, out: packed.append(len(x))
    )
    blocks = laid_out(Blocks, np.ones((2 * COLUMNS, 3)))
    for rows in (127, 128, 300):
        blocks.matmul(np.ones((rows, 3)))
    assert packed == ([128, 300] if packs else [])


def test_one_layout_holds_a_weight_once_in_order():
    w = np.arange(4.0 * COLUMNS * 3).reshape(-1, 3)
    assert laid_out(Blocks, w).data.shape == (4, 3, 64)
    assert laid_out(Tiles, w).data.shape == (8, 3, 32)
    assert laid_out(OneBlock, w).data.shape == (1, 3, 4 * COLUMNS)
    for layout in LAYOUTS:
        np.testing.assert_array_equal(laid_out(layout, w).to_matrix(), w)


def test_tiles_are_the_outer_loop_and_rows_the_inner_one(monkeypatch):
    """By the strides of the result NumPy would take the rows first, and read every tile from
    memory once per row; ``order="C"`` keeps the order of the operands' axes.
    """
    calls = []
    monkeypatch.setattr(
        weight_layout, "partial", lambda *operands, **options: calls.append((operands, options))
    )
    x = np.ones((3, 5))
    laid_out(Tiles, np.ones((2 * COLUMNS, 5))).products(x, np.empty((3, 2 * COLUMNS)))
    (operands, options), *rest = calls
    assert not rest
    assert options["order"] == "C"
    assert operands[1].shape == (1, 3, 1, 5)
    assert operands[2].shape == (4, 1, 5, 32)
    assert options["out"].shape == (4, 3, 1, 32)


def test_the_kernels_of_this_process_are_known_by_name():
    family = weight_layout.kernel_family()
    assert weight_layout.has_small_kernels() == (family in weight_layout.AVX512_KERNELS)
    assert weight_layout.blas_threads() >= 1
