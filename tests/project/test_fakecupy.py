"""The stand-in for CuPy keeps CuPy's rules, and its record of CuPy's names is CuPy's own."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cupy_names
import fakecupy as xp
from conftest import to_host
from refllm import backend
from strategies import arrays

HOST = np.arange(12.0, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def x():
    return xp.asarray(HOST)


def test_record_is_that_of_the_installed_cupy():
    cupy = pytest.importorskip(
        "cupy", reason="compares the record with an installed CuPy; no GPU is needed"
    )
    first = cupy_names.PATH.read_text(encoding="utf-8").splitlines()[0]
    if first != f"# CuPy {cupy.__version__}":
        pytest.skip(f"the record is of {first[2:]}, installed is {cupy.__version__}")
    assert cupy_names.record(cupy) == cupy_names.PATH.read_text(encoding="utf-8"), (
        "run python tests/cupy_names.py"
    )


def test_record_holds_what_upstream_documents_as_missing():
    names = cupy_names.load()
    missing = [
        "vecdot",
        "unstack",
        "errstate",
        "block",
        "insert",
        "matvec",
        "vecmat",
        "linalg.vector_norm",
    ]
    assert not [n for n in missing if n in names]
    assert {"einsum", "matmul", "take_along_axis", "linalg.cholesky", "ndarray.astype"} <= set(
        names
    )
    assert "upper" not in names["linalg.cholesky"].parameters
    assert "device" not in names["zeros"].parameters


def test_every_name_offered_is_cupys():
    for name in dir(np):
        if not name.startswith("_") and hasattr(xp, name) and name not in vars(xp):
            assert name in cupy_names.load()


# --- the border ---------------------------------------------------------------------------

OPERATORS = [
    operator.add,
    operator.mul,
    operator.truediv,
    operator.matmul,
    operator.lt,
    operator.eq,
    operator.iadd,
]


@pytest.mark.parametrize("operate", OPERATORS)
@pytest.mark.parametrize("host", [np.ones((4, 4), np.float32), np.float32(2.0), np.float64(2.0)])
def test_operators_reject_host_operands_on_either_side(x, operate, host):
    device = xp.ones((4, 4), dtype=np.float32)
    with pytest.raises(TypeError):
        operate(device, host)
    with pytest.raises(TypeError):
        operate(host, device)


@pytest.mark.parametrize(
    "leak",
    [
        lambda x: np.asarray(x),
        lambda x: np.array(x),
        lambda x: np.sum(x),
        lambda x: np.exp(x),
        lambda x: np.concatenate([x, x]),
        lambda x: np.zeros(3).__setitem__(slice(None), x[0, :3]),
        lambda x: np.zeros(3) + x[0, :3],
        lambda x: np.matmul(np.zeros((3, 3)), x),
        lambda x: np.zeros(3)[xp.asarray([0])],
        lambda x: xp.sum(HOST),
        lambda x: xp.concatenate([x, HOST]),
        lambda x: xp.where(x > 0, x, HOST),
        lambda x: xp.matmul(x, x.T, out=np.zeros((3, 3), np.float32)),
        lambda x: xp.add.at(x, 0, HOST),
        lambda x: x.__setitem__(0, HOST[0]),
        lambda x: x[np.array([0])],
        lambda x: x[: xp.asarray(2)],
        lambda x: range(xp.asarray(2)),
        lambda x: [0, 1, 2][xp.asarray(1)],
        lambda x: hash(x),
    ],
)
def test_nothing_crosses_the_border_silently(x, leak):
    with pytest.raises(TypeError):
        leak(x)


def test_names_and_parameters_that_cupy_lacks_are_rejected(x):
    for name in ("vecdot", "errstate", "block", "insert", "matvec"):
        with pytest.raises(AttributeError, match=name):
            getattr(xp, name)
    for name in ("ctypes", "resize", "newbyteorder"):
        with pytest.raises(AttributeError):
            getattr(x, name)
    with pytest.raises(AttributeError, match="host"):
        xp.random  # noqa: B018
    for call in (
        lambda: xp.clip(x, min=0.0, max=1.0),
        lambda: xp.clip(x, 0.0),
        lambda: xp.zeros(3, device="cpu"),
        lambda: xp.einsum("ij->i", x, out=x[:, 0]),
        lambda: xp.linalg.cholesky(x, upper=True),
        lambda: xp.take_along_axis(x, xp.argsort(x)),
        lambda: xp.sum(x, where=x > 0),
        lambda: x.sum(initial=0.0),
    ):
        with pytest.raises(TypeError):
            call()


def test_ufunc_methods_are_those_that_cupy_implements(x):
    assert float(xp.add.reduce(x, axis=None)) == HOST.sum()
    with pytest.raises(NotImplementedError):
        xp.maximum.reduce(x)
    with pytest.raises(NotImplementedError):
        xp.multiply.at(x, 0, 2.0)
    counts = xp.zeros(3, dtype=np.int64)
    with pytest.raises(TypeError, match="int64"):
        xp.add.at(counts, xp.asarray([0, 0]), 1)


# --- what CuPy does otherwise, and silently -----------------------------------------------


def test_repeated_indices_in_an_assignment_raise(x):
    with pytest.raises(ValueError, match="repeats"):
        x[xp.asarray([0, 0])] = 1.0
    with pytest.raises(ValueError, match="repeats"):
        x[xp.asarray([0, 1, 0]), xp.asarray([2, 2, 2])] += 1.0
    with pytest.raises(ValueError, match="repeats"):
        x[[0, -3]] = 1.0  # -3 is 0
    x[xp.asarray([0, 1]), xp.asarray([2, 2])] = 7.0  # the same column, but other rows
    assert to_host(x)[:2, 2].tolist() == [7.0, 7.0]


def test_integer_arrays_out_of_range_raise(x):
    for index in (xp.asarray([3]), xp.asarray([-4]), [0, 3]):
        with pytest.raises(IndexError, match="CuPy wraps"):
            x[index]
        with pytest.raises(IndexError, match="CuPy wraps"):
            x[index] = 0.0
    with pytest.raises(IndexError):
        x[3]


def test_a_mask_stands_alone_in_an_index(x):
    mask = x[:, 0] > 0
    assert x[mask].shape == (2, 4)
    with pytest.raises(ValueError, match="boolean"):
        x[mask, xp.asarray([0, 1])]


@pytest.mark.parametrize("value", [-1.0, 256.0, np.nan, np.inf, -np.inf])
def test_casts_that_do_not_fit_raise(value):
    floats = xp.asarray([0.0, value])
    with pytest.raises(ValueError, match="clip"):
        floats.astype(np.uint8)
    with pytest.raises(ValueError, match="clip"):
        xp.asarray(floats, dtype=np.uint8)
    with pytest.raises(ValueError, match="clip"):
        xp.zeros(2, dtype=np.uint8)[:] = floats


def test_casts_that_fit_are_numpys():
    floats = np.array([-0.9, 0.0, 0.5, 255.9], np.float32)  # −0.9 is cut to 0, which fits
    assert to_host(xp.asarray(floats).astype(np.uint8)).tolist() == [0, 0, 0, 255]
    assert to_host(xp.asarray([-128.9, 127.9]).astype(np.int8)).tolist() == [-128, 127]


def test_reductions_and_elements_stay_on_the_device(x):
    for result in (
        x.sum(),
        xp.max(x),
        x[1, 2],
        xp.argmax(x),
        x.mean(axis=None),
        xp.allclose(x, x),
        x[0] @ x[0],
    ):
        assert isinstance(result, xp.ndarray)
        assert result.shape == ()


def test_an_element_is_a_view_as_on_the_device(x):
    element = x[1, 2]
    element += 100.0
    assert to_host(x)[1, 2] == 106.0


def test_dtypes_that_cupy_lacks_are_rejected():
    for host in (np.array(["text"]), np.array([None]), np.zeros(2, np.longdouble)):
        with pytest.raises(TypeError, match="dtype"):
            xp.asarray(host)


# --- counting -----------------------------------------------------------------------------


def test_transfers_and_synchronisations_are_counted():
    with xp.counting() as c:
        x = xp.asarray(HOST)
        y = xp.asarray([1.0, 2.0])
    assert (c.h2d, c.d2h, c.syncs) == (2, 0, 0)
    with xp.counting() as c:
        (
            float(y[0]),
            int(y[1]),
            bool(x.sum() > 0),
            y.get(),
            to_host(y),
            y.tolist(),
            y[1].item(),
            xp.asnumpy(y),
        )
    assert (c.h2d, c.d2h, c.syncs) == (0, 8, 8)
    with xp.counting() as c:
        x[x > 3], xp.nonzero(x), xp.where(x > 0), xp.unique(x), xp.repeat(y, xp.asarray([1, 2]))
    assert (c.h2d, c.d2h, c.syncs) == (1, 0, 5)  # the list of repeats went to the device
    with xp.counting() as c:
        _ = x[[0, 1]]  # a list as an index is copied to the device
    assert (c.h2d, c.syncs) == (1, 0)


def test_launches_count_what_writes_and_not_what_only_looks(x):
    out = xp.empty((3, 3), dtype=np.float32)
    with xp.counting() as c:
        (
            x.T,
            x[1:],
            x.reshape(4, 3),
            x.swapaxes(0, 1),
            x[None],
            xp.empty_like(x),
            x.view(np.int32),
            x.shape,
            x[0, 0],
        )
        (
            xp.broadcast_to(x, (2, 3, 4)),
            xp.ascontiguousarray(x),
            xp.asarray(x),
            x.astype(np.float32, copy=False),
        )
    assert c.launches == 0
    with xp.counting() as c:
        (
            x @ x.T,
            x + 1,
            -x,
            xp.matmul(x, x.T, out=out),
            x.sum(),
            x.T.reshape(12),
            x.copy(),
            x[xp.arange(2)],
        )
        x += 1.0
        x[0] = 0.0
        x.fill(2.0)
    assert c.launches == 12  # arange counts too


def test_blocks_of_counting_nest(x):
    before = xp.counters.launches
    with xp.counting() as outer:
        with xp.counting() as inner:
            x + 1
        x + 1  # outer and inner were equal when inner ended
    assert (outer.launches, inner.launches, xp.counters.launches - before) == (2, 1, 2)


# --- the same numbers as NumPy ------------------------------------------------------------


@given(
    arrays(
        st.integers(1, 4), st.integers(1, 5), dtype="float32", kinds=["normal", "zero", "one_sided"]
    )
)
def test_results_are_numpys_bit_for_bit(host):
    device = xp.asarray(host)

    def program(lib, a):
        a = a.copy()
        b = lib.einsum("ij,kj->ik", a, a)
        lib.exp(-lib.abs(b), out=b)
        b *= 0.5
        order = lib.argsort(-a, axis=-1, kind="stable")
        top = lib.take_along_axis(a, order, axis=-1)[..., :1]
        a[:, 0] = 1.0
        joined = lib.concatenate([a, lib.where(a > 0, a, lib.zeros_like(a))], axis=0)
        return [
            b,
            1.0 - b,
            2.0**b,
            top,
            joined,
            lib.cumsum(joined, axis=0),
            lib.linalg.norm(b),
            joined.view("int32"),
        ]

    for mine, numpys in zip(program(xp, device), program(np, host), strict=True):
        assert mine.dtype == numpys.dtype
        assert np.array_equal(to_host(mine), np.asarray(numpys))


def test_backend_knows_the_stand_in(x):
    assert backend.namespace(x, x) is xp
    with pytest.raises(TypeError, match="fakecupy and numpy"):
        backend.namespace(x, HOST)
    assert type(backend.to_numpy(x)) is np.ndarray
