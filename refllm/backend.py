"""Which array library owns an array: NumPy on the host, CuPy on a GPU.

Every public function on arrays starts with ``xp = namespace(x)`` and then uses the dialect
that NumPy 2 and CuPy 14 share. This file holds ``namespace``, the few operations that the two
libraries spell differently, and nothing that NumPy already has.

Left out: a wrapper module. A reader who steps into ``xp.max`` lands in NumPy itself.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import cast

import numpy as np

from refllm.array_types import Array as Array  # "as": meant to be imported from here
from refllm.array_types import DType as DType
from refllm.array_types import Namespace as Namespace
from refllm.array_types import Operand as Operand
from refllm.errors import InputError, alternatives

NUMPY = cast(Namespace, np)  # numpy itself, under the type that namespace() gives
NAMES = ("numpy", "cupy")
ENVIRONMENT_VARIABLE = "REFLLM_BACKEND"


class BackendUnavailable(RuntimeError):
    """The requested backend cannot run on this machine; the message says why and what to
    install.
    """


def namespace(*arrays: Operand) -> Namespace:
    """Return the array module that owns all of ``arrays``.

    Python scalars and ``None`` have no owner and are skipped.

    Raises
    ------
    TypeError
        if two libraries own them (nothing moves silently between host and device), or if
        there is no array.

    >>> namespace(np.zeros(3), 2.0).__name__
    'numpy'
    """
    # the common case costs one type check per array: a decode step calls this about 60 times
    for x in arrays:
        if not isinstance(x, np.ndarray):
            break
    else:
        if arrays:
            return NUMPY
    owners: list[Namespace] = []
    for x in arrays:
        if x is None or isinstance(x, (bool, int, float)):
            continue
        owner = _owner(x)
        if owner not in owners:
            owners.append(owner)
    if len(owners) == 1:
        return owners[0]
    if not owners:
        raise TypeError("namespace() needs at least one array; got only scalars")
    names = " and ".join(sorted(o.__name__ for o in owners))
    raise TypeError(
        f"arrays of {names} are mixed; move them with refllm.backend.asarray_like first"
    )


def _owner(x: Operand) -> Namespace:
    """The library of one array."""
    if isinstance(x, (np.ndarray, np.generic)):
        return NUMPY
    cupy = sys.modules.get("cupy")  # cupy.ndarray has no __array_namespace__ (14.2): ask by type
    if cupy is not None and isinstance(x, cupy.ndarray):
        return cupy
    if hasattr(x, "__array_namespace__"):
        module: Namespace = x.__array_namespace__()
        return module
    raise TypeError(f"{type(x).__name__} is not an array of NumPy, CuPy or an array-API library")


def get(name: str | None = None) -> Namespace:
    """Return the module called ``name`` (``"numpy"`` or ``"cupy"``); ``None`` reads
    ``REFLLM_BACKEND``.

    Raises
    ------
    ValueError
        for any other name.
    BackendUnavailable
        if CuPy is missing or finds no usable GPU.
    """
    name = name or os.environ.get(ENVIRONMENT_VARIABLE) or "numpy"
    if name not in NAMES:
        raise InputError(f"unknown backend {name!r}; {alternatives(name, NAMES)}")
    if name == "numpy":
        return NUMPY
    if "cupy" not in sys.modules and importlib.util.find_spec("cupy") is None:
        raise BackendUnavailable(
            "the cupy package is not installed: pip install 'refllm[gpu]' (CUDA 12) or "
            "'refllm[gpu-cuda13]'"
        )
    try:
        import cupy
    except Exception as error:  # a broken install fails in many ways
        raise BackendUnavailable(f"the cupy package does not import: {error}") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # cudaErrorInsufficientDriver, cudaErrorNoDevice
        raise BackendUnavailable(
            f"CuPy {cupy.__version__} finds no usable GPU: {error}. Install NVIDIA's driver and "
            "the cupy package of the same CUDA major version, or use --backend numpy"
        ) from error
    if count == 0:
        raise BackendUnavailable(f"CuPy {cupy.__version__} finds no GPU; use --backend numpy")
    module: Namespace = cupy
    return module


def to_numpy(x: Operand) -> np.ndarray:
    """Copy ``x`` to host memory (a NumPy array is returned unchanged); on a GPU this waits
    for the device.
    """
    if isinstance(x, (np.ndarray, np.generic)):
        return np.asarray(x)
    if hasattr(x, "get"):
        host: np.ndarray = x.get()
        return host
    return np.asarray(x)


def asarray_like(x: Operand, like: Array, dtype: DType | None = None) -> Array:
    """Move host array ``x`` (or a nested list) to the library and the device of ``like``."""
    return namespace(like).asarray(x, dtype=dtype)


def bitcast(x: Array, dtype: DType) -> Array:
    """Reinterpret the bits of ``x`` as ``dtype`` of the same item size; no value is converted.

    >>> bitcast(np.float32([1.0, -0.0]), "uint32").tolist()
    [1065353216, 2147483648]
    """
    if np.dtype(x.dtype).itemsize != np.dtype(dtype).itemsize:
        raise InputError(
            f"bitcast keeps the item size: {x.dtype} is not of the size of {np.dtype(dtype)}"
        )
    return x.view(dtype)


def scatter_add(out: Array, index: Array, values: Array) -> None:
    """``out[index[i]] += values[i]`` for every i, in place.

    Repeated indices are summed; ``out[index] += values`` would keep one of them.

    >>> out = np.zeros(3)
    >>> scatter_add(out, np.array([0, 0, 2]), np.array([1.0, 1.0, 5.0]))
    >>> out.tolist()
    [2.0, 0.0, 5.0]
    """
    xp = namespace(out, values)
    xp.add.at(out, index, values)


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """Return the ``k`` largest values along the last axis, largest first, and their indices.

    x[..., V] → values[..., k], indices[..., k]. Equal values are in the order of their
    indices, in both libraries (``argpartition`` leaves the order of ties open).

    >>> values, indices = top_k(np.array([3, 9, 9, 1]), 2)
    >>> values.tolist(), indices.tolist()
    ([9, 9], [1, 2])
    """
    xp = namespace(x)
    if not 1 <= k <= x.shape[-1]:
        raise InputError(f"top_k: k = {k} is not within 1..{x.shape[-1]}")
    # −x overflows in an integer type, ~x reverses its order
    falling = -x if np.dtype(x.dtype).kind == "f" else ~x
    order = xp.argsort(falling, axis=-1, kind="stable")[..., :k]  # [..., k]
    return xp.take_along_axis(x, order, axis=-1), order


def finite_argmax(x: Array) -> list[int]:
    """The index of the largest element of each row of x[R, V], on the host; −1 where that is
    not finite: NaN, +inf, or only −inf.

    >>> finite_argmax(np.array([[0.0, 2.0, 1.0], [0.0, np.nan, 1.0]]))
    [1, -1]
    """
    xp = namespace(x)
    index = xp.argmax(x, axis=-1)  # treats a NaN as the largest
    finite = xp.isfinite(x[xp.arange(x.shape[0]), index])
    found: list[int] = to_numpy(xp.where(finite, index, -1)).tolist()  # one copy for both
    return found


def normal(
    rng: np.random.Generator, shape: tuple[int, ...], like: Array, dtype: DType = "float32"
) -> Array:
    """Standard normal values [*shape], drawn on the host so that every backend gets the same."""
    return asarray_like(rng.standard_normal(shape).astype(dtype), like)
