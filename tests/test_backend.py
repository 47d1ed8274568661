"""The seam between the array libraries: who owns an array, how to get a library, and what
the two spell otherwise.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fakecupy
from conftest import to_host
from refllm import backend
from strategies import arrays, seeds

# --- namespace ----------------------------------------------------------------------------


def test_namespace_is_the_owner_and_scalars_have_none(xp):
    x = xp.zeros(3, dtype=xp.float32)
    assert backend.namespace(x) is xp
    assert backend.namespace(None, 1, 2.0, True, x, x[0]) is xp
    assert backend.namespace(xp.sum(x)) is xp  # NumPy's scalar, CuPy's 0-d array


def test_namespace_of_the_array_api_reference():
    strict = pytest.importorskip("array_api_strict")
    assert backend.namespace(strict.asarray([1.0])) is strict


def test_namespace_rejects_a_mix_and_names_both_sides():
    device = fakecupy.zeros(2)
    host = np.zeros(2)
    with pytest.raises(TypeError, match="fakecupy and numpy are mixed"):
        backend.namespace(device, host)
    with pytest.raises(TypeError, match="fakecupy and numpy are mixed"):
        backend.namespace(device, np.float32(1))  # a NumPy scalar is NumPy's


def test_namespace_rejects_what_is_no_array():
    with pytest.raises(TypeError, match="only scalars"):
        backend.namespace(1.0, None)
    with pytest.raises(TypeError, match="list is not an array"):
        backend.namespace([1.0, 2.0])


def test_namespace_asks_cupy_by_type_because_its_arrays_have_no_namespace(monkeypatch):
    class ndarray:
        pass

    module = ModuleType("cupy")
    module.ndarray = ndarray
    monkeypatch.setitem(sys.modules, "cupy", module)
    assert backend.namespace(ndarray(), ndarray()) is module


# --- get ----------------------------------------------------------------------------------


class DriverError(RuntimeError):
    """Stands for cupy_backends' CUDARuntimeError."""


def _cupy(count: int | Exception) -> ModuleType:
    """A module that imports as CuPy does on a machine with ``count`` devices, or whose
    driver raises.
    """

    def device_count() -> int:
        if isinstance(count, Exception):
            raise count
        return count

    module = ModuleType("cupy")
    module.__version__ = "14.2.0"
    module.cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=device_count))
    return module


def test_get_numpy_is_the_default(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    assert backend.get() is np
    assert backend.get("numpy") is np


def test_get_reads_the_environment_variable_and_an_argument_wins(monkeypatch):
    cupy = _cupy(1)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setenv("REFLLM_BACKEND", "cupy")
    assert backend.get() is cupy
    assert backend.get("numpy") is np
    monkeypatch.setenv("REFLLM_BACKEND", "torch")
    with pytest.raises(ValueError, match="'torch'.*numpy, cupy"):
        backend.get()
    monkeypatch.setenv("REFLLM_BACKEND", "")
    assert backend.get() is np


def test_get_rejects_other_names():
    with pytest.raises(ValueError, match="'jax'.*numpy, cupy"):
        backend.get("jax")


def test_get_cupy_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        backend.BackendUnavailable, match=r"not installed: pip install 'refllm\[gpu\]'"
    ):
        backend.get("cupy")


def test_get_cupy_that_does_not_import_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # Python's own way to make an import fail
    with pytest.raises(backend.BackendUnavailable, match="does not import: .*cupy"):
        backend.get("cupy")


@pytest.mark.parametrize("count", [DriverError("cudaErrorInsufficientDriver"), 0])
def test_get_cupy_without_a_gpu_says_why_and_what_to_do(monkeypatch, count):
    monkeypatch.setitem(sys.modules, "cupy", _cupy(count))
    with pytest.raises(backend.BackendUnavailable, match="14.2.0 finds no .*GPU") as caught:
        backend.get("cupy")
    assert "numpy" in str(caught.value)
    if count:
        assert "cudaErrorInsufficientDriver" in str(caught.value)
        assert "driver" in str(caught.value)


def test_get_cupy_with_a_gpu_is_the_module(monkeypatch):
    cupy = _cupy(2)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert backend.get("cupy") is cupy


# --- moving -------------------------------------------------------------------------------


@given(host=arrays(st.integers(1, 4), st.integers(1, 5), dtype="float32"))
def test_moving_to_the_device_and_back_changes_no_bit(xp, host):
    device = backend.asarray_like(host, xp.zeros(1))
    assert backend.namespace(device) is xp
    assert to_host(device).tobytes() == host.tobytes()
    assert to_host(device).dtype == host.dtype


def test_asarray_like_takes_lists_and_a_dtype(xp):
    x = backend.asarray_like([[1, 2], [3, 4]], xp.zeros(1), "int32")
    assert to_host(x).tolist() == [[1, 2], [3, 4]]
    assert x.dtype == np.int32


def test_to_numpy_returns_a_host_array_as_it_is():
    host = np.arange(3)
    assert backend.to_numpy(host) is host
    assert isinstance(backend.to_numpy(np.float32(1.5)), np.ndarray)


def test_to_numpy_waits_for_the_device_once():
    x = fakecupy.zeros((3, 4))
    with fakecupy.counting() as c:
        backend.to_numpy(x)
    assert (c.d2h, c.syncs) == (1, 1)


def test_to_numpy_reads_the_array_api_reference():
    strict = pytest.importorskip("array_api_strict")
    assert backend.to_numpy(strict.asarray([1.0, 2.0])).tolist() == [1.0, 2.0]


# --- bitcast ------------------------------------------------------------------------------


@given(host=arrays(st.integers(1, 4), st.integers(1, 5), dtype="float32"))
def test_bitcast_there_and_back_is_the_identity(xp, host):
    bits = backend.bitcast(xp.asarray(host), "uint32")
    assert to_host(bits).tolist() == host.view(np.uint32).tolist()
    assert to_host(backend.bitcast(bits, "float32")).tobytes() == host.tobytes()


def test_bitcast_reads_ieee_754(xp):
    x = xp.asarray([0.0, -0.0, 1.0, -2.0], dtype="float16")
    assert to_host(backend.bitcast(x, "uint16")).tolist() == [0x0000, 0x8000, 0x3C00, 0xC000]


def test_bitcast_rejects_another_item_size(xp):
    with pytest.raises(ValueError, match="item size"):
        backend.bitcast(xp.zeros(4, dtype="float32"), "uint16")


# --- scatter_add --------------------------------------------------------------------------


@given(indices=st.lists(st.integers(0, 4), max_size=20), seed=seeds)
def test_scatter_add_sums_repeated_indices(xp, indices, seed):
    # small integers as floats: sums are exact, so the order in which a GPU adds does not
    # matter
    values = np.random.default_rng(seed).integers(-8, 9, (len(indices), 3)).astype(np.float32)
    expected = np.zeros((5, 3), np.float32)
    for i, row in zip(indices, values, strict=True):
        expected[i] += row
    out = xp.zeros((5, 3), dtype="float32")
    backend.scatter_add(out, xp.asarray(np.array(indices, np.int64)), xp.asarray(values))
    assert np.array_equal(to_host(out), expected)


# --- top_k --------------------------------------------------------------------------------


@given(data=st.data(), values=st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_top_k_is_the_stable_sort_so_ties_come_in_order_of_their_index(xp, data, values):
    k = data.draw(st.integers(1, len(values)))
    # sorted() is stable and reverse=False: equal keys keep the order of their indices
    order = sorted(range(len(values)), key=lambda i: -values[i])[:k]
    x = xp.asarray(np.array([values, values[::-1]], np.float32))
    top, index = backend.top_k(x, k)
    assert to_host(index)[0].tolist() == order
    assert to_host(top)[0].tolist() == [values[i] for i in order]
    assert to_host(top)[1].tolist() == to_host(top)[0].tolist()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool"])
def test_top_k_of_integers_is_right_at_the_ends_of_their_range(xp, dtype):
    """There −x is no falling key: −(−128) is −128 in int8, and −1 is 255 in uint8."""
    low, high = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    values, index = backend.top_k(xp.asarray(np.array([low, high, low, high], dtype)), 3)
    assert to_host(index).tolist() == [1, 3, 0]
    assert to_host(values).tolist() == [high, high, low]


@pytest.mark.parametrize("k", [0, 5, -1])
def test_top_k_rejects_more_than_there_is(xp, k):
    with pytest.raises(ValueError, match=f"k = {k} is not within 1..4"):
        backend.top_k(xp.zeros((2, 4)), k)


# --- normal -------------------------------------------------------------------------------


def test_finite_argmax_is_the_first_of_the_largest_and_none_where_that_is_not_finite(xp):
    rows = [
        ([1.0, 3.0, 3.0], 1),
        ([-np.inf, -2.0, -np.inf], 1),
        ([0.0, np.inf, 1.0], -1),
        ([5.0, 0.0, np.nan], -1),
        ([np.nan, np.inf, 1.0], -1),
        ([-np.inf] * 3, -1),
    ]
    x = xp.asarray(np.array([row for row, _ in rows]))
    found = backend.finite_argmax(x)
    assert found == [index for _, index in rows]
    assert all(type(index) is int for index in found)


@given(seed=seeds)
def test_normal_draws_are_the_hosts_on_every_library(xp, seed):
    drawn = backend.normal(np.random.default_rng(seed), (3, 4), xp.zeros(1))
    assert backend.namespace(drawn) is xp
    assert drawn.dtype == np.float32
    expected = np.random.default_rng(seed).standard_normal((3, 4)).astype(np.float32)
    assert to_host(drawn).tobytes() == expected.tobytes()
