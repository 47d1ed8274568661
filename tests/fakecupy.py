"""A stand-in for CuPy on the CPU: NumPy inside, CuPy's rules outside.

It is used as the module ``cupy`` is (``fakecupy.asarray(x)``, ``namespace(x)`` returns it)
and refuses what CuPy refuses, or does silently otherwise than NumPy:

- a name, or a parameter of a function, that CuPy has not (``cupy_names.txt``, recorded from
  CuPy itself);
- host arrays and NumPy scalars in operators, functions, indices and assignments;
  ``numpy.asarray(x)``, ``numpy.sum(x)`` and every other silent trip to the host;
- repeated indices in an assignment (undefined on a GPU), integer arrays that index out of
  range (they wrap), more than one array in an index with a mask, casts of floats that the
  integer type cannot hold (undefined).

Reductions and single elements stay 0-d arrays, and single elements are views. What a GPU
program pays for is counted in ``counters``; ``with fakecupy.counting() as c:`` counts one
stretch, and ``c`` is read after it.

Left out: random numbers (the project draws them on the host), streams, kernels, float
rounding other than NumPy's, speed. ``launches`` counts calls that write an array, a lower
bound of real kernel launches.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

import cupy_names


@dataclass
class Counters:
    """Events since the start (``counters``), or since a ``counting`` block began."""

    h2d: int = 0  # copies from host to device
    d2h: int = 0  # copies from device to host
    syncs: int = 0  # times that the host waited for the device
    launches: int = 0  # calls that wrote an array on the device


counters = Counters()
_counting = [counters]  # all that count at present: nested blocks each see their own events


@contextmanager
def counting() -> Iterator[Counters]:
    """Count from zero within the block; what is yielded can be read within and after it."""
    inner = Counters()
    _counting.append(inner)
    try:
        yield inner
    finally:
        # by identity, not by value
        _counting[:] = [counter for counter in _counting if counter is not inner]


def _count(**events: int) -> None:
    for counter in _counting:
        for name, times in events.items():
            setattr(counter, name, getattr(counter, name) + times)


# --- crossing the border ------------------------------------------------------------------


def _to_host(x: ndarray) -> np.ndarray:
    """What ``get`` does: wait for the device and copy."""
    _count(d2h=1, syncs=1)
    return x._host.copy()


def _unwrap(x: Any) -> Any:
    """A function's argument as NumPy takes it; TypeError if it lives on the host."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError("a host array meets a device array: move it with asarray first")
    if isinstance(x, np.generic):
        raise TypeError(f"{x!r} is a NumPy scalar and would decide the dtype: use a Python number")
    if isinstance(x, (list, tuple)):
        return type(x)([_unwrap(item) for item in x])
    return x


def _wrap(x: Any) -> Any:
    """A result of NumPy's as CuPy returns it: arrays on the device, scalars as 0-d arrays."""
    if isinstance(x, (np.ndarray, np.generic)):
        return ndarray(np.asarray(x))
    if isinstance(x, (list, tuple)):
        items = [_wrap(item) for item in x]
        return x._make(items) if hasattr(x, "_make") else type(x)(items)
    return x


def _check_cast(source: np.ndarray, dtype: Any) -> None:
    """Refuse a cast to an integer type of numbers that it cannot hold: NumPy and CuPy
    answer differently.
    """
    dtype = np.dtype(dtype)
    if source.dtype.kind not in "fV" or dtype.kind not in "iu" or source.size == 0:
        return
    whole = np.trunc(source.astype(np.float64))
    low = float(np.iinfo(dtype).min)
    high = float(np.iinfo(dtype).max + 1)
    if not np.all((whole >= low) & (whole < high)):  # NaN fails both
        raise ValueError(
            f"cast of {source.dtype} to {dtype}: a value does not fit, the result is undefined: "
            "clip first"
        )


# --- calls --------------------------------------------------------------------------------

# The host must know how many elements there are: it waits.
_SHAPE_DEPENDS_ON_VALUES = {
    *(
        "argwhere",
        "bincount",
        "compress",
        "extract",
        "flatnonzero",
        "nonzero",
        "trim_zeros",
        "unique",
    ),
    *("unique_all", "unique_counts", "unique_inverse", "unique_values"),
}
_BOOLEAN_ON_DEVICE = {"allclose", "array_equal", "array_equiv"}  # Python bools in NumPy
_SECTIONS_FROM_HOST = {"split", "array_split", "hsplit", "vsplit", "dsplit"}
_UNWRITTEN = {"empty", "empty_like", "ndarray.view"}
_ATOMIC = {"add", "subtract", "maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor"}
_ATOMIC_DTYPES = {
    "int32",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
}


def _check_signature(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    signature = cupy_names.load().get(name)
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"cupy.{name}{signature}: {error}") from None


def _call(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *own: Any,
) -> Any:
    """Call NumPy's ``function`` under CuPy's name for it; ``own`` is the array whose method
    it is, if any.
    """
    _check_signature(name, args, kwargs)
    short = name.removeprefix("ndarray.")
    on_device = [isinstance(a, ndarray) for a in (*own, *args)]
    if short in _SECTIONS_FROM_HOST and any(on_device[1:]):
        raise TypeError(f"cupy.{name} takes the sections from the host only")
    if (
        short in _SHAPE_DEPENDS_ON_VALUES
        or (short == "where" and len(args) + len(kwargs) == 1)
        or (short == "repeat" and any(on_device[1:]))
    ):
        _count(syncs=1)
    host_args = _unwrap(list(args))
    host_kwargs = {key: _unwrap(value) for key, value in kwargs.items()}
    with np.errstate(all="ignore"):  # a GPU sets no flags: 1/0 is inf without a word
        result = function(*host_args, **host_kwargs)
    if short in _BOOLEAN_ON_DEVICE:
        result = np.asarray(result)
    out = kwargs.get("out")
    if isinstance(out, ndarray):
        _count(launches=1)
        return out
    wrapped = _wrap(result)
    inputs = [x for x in (*own, *args, *kwargs.values()) if isinstance(x, ndarray)]
    if name not in _UNWRITTEN and _writes(wrapped, inputs):
        _count(launches=1)
    return wrapped


def _writes(result: Any, inputs: list[ndarray]) -> bool:
    """Whether a call made something: nothing returned (it worked in place), or an array
    that is no view.
    """
    if result is None:
        return True
    if isinstance(result, (list, tuple)):
        return any(_writes(item, inputs) for item in result if isinstance(item, ndarray))
    return isinstance(result, ndarray) and not any(
        np.may_share_memory(result._host, x._host) for x in inputs
    )


def asarray(a: Any, *args: Any, **kwargs: Any) -> ndarray:
    """Move to the device, or convert there; a device array of the right dtype is returned
    as it is.
    """
    return _create("asarray", a, args, kwargs)


def array(obj: Any, *args: Any, **kwargs: Any) -> ndarray:
    """As ``asarray``, always a copy unless ``copy=False``."""
    return _create("array", obj, args, kwargs)


def _create(name: str, a: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ndarray:
    _check_signature(name, (a, *args), kwargs)
    kwargs.pop("blocking", None)
    dtype = args[0] if args else kwargs.get("dtype")
    if isinstance(a, ndarray):
        if dtype is not None:
            _check_cast(a._host, dtype)
        host = getattr(np, name)(a._host, *args, **kwargs)
        if host is a._host:
            return a
        _count(launches=not np.may_share_memory(host, a._host))
        return ndarray(host)
    from_device = isinstance(a, (list, tuple)) and any(isinstance(item, ndarray) for item in a)
    source = np.array(_unwrap(a) if from_device else a)
    if dtype is not None:
        _check_cast(source, dtype)
    _count(h2d=not from_device)
    # NumPy gives a Python list its dtype by the values; a copy, because device memory is no
    # host memory
    return ndarray(np.array(getattr(np, name)(source, *args, **{**kwargs, "copy": None})))


def asnumpy(a: Any) -> np.ndarray:
    """``a.get()``, or the host array itself."""
    return _to_host(a) if isinstance(a, ndarray) else np.asarray(a)


class _Ufunc:
    """A ufunc with the methods that CuPy implements, for the dtypes that it implements them
    for.
    """

    def __init__(self, name: str):
        self.__name__ = name
        self._numpy = getattr(np, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _call(self.__name__, self._numpy, args, kwargs)

    def at(self, a: ndarray, indices: Any, b: Any = None) -> None:
        if self.__name__ not in _ATOMIC:
            raise NotImplementedError(f"cupy.{self.__name__}.at is not supported")
        if a.dtype.name not in _ATOMIC_DTYPES:
            raise TypeError(
                f"cupy.{self.__name__}.at does not support {a.dtype}: there is no atomic operation "
                "for it"
            )
        _count(launches=1)
        self._numpy.at(a._host, _index(indices)[0], _unwrap(b))

    def reduce(
        self,
        array: ndarray,
        axis: Any = 0,
        dtype: Any = None,
        out: Any = None,
        keepdims: bool = False,
    ) -> Any:
        if self.__name__ not in ("add", "multiply"):
            raise NotImplementedError(f"cupy.{self.__name__}.reduce is not supported")
        return _call(
            "sum",
            self._numpy.reduce,
            (array, axis),
            {"dtype": dtype, "out": out, "keepdims": keepdims},
        )

    def accumulate(self, array: ndarray, axis: int = 0, dtype: Any = None, out: Any = None) -> Any:
        if self.__name__ not in ("add", "multiply"):
            raise NotImplementedError(f"cupy.{self.__name__}.accumulate is not supported")
        return _call("cumsum", self._numpy.accumulate, (array, axis), {"dtype": dtype, "out": out})

    def outer(self, A: Any, B: Any, **kwargs: Any) -> Any:
        return _call(self.__name__, self._numpy.outer, (A, B), kwargs)


class _Submodule:
    """``linalg`` or ``fft``."""

    def __init__(self, name: str):
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        return _lookup(f"{self.__name__}.{name}")


@cache
def _lookup(name: str) -> Any:
    """The thing that CuPy calls ``name``; AttributeError if it has none, or if the stand-in
    has none.
    """
    if name not in cupy_names.load():
        raise AttributeError(
            f"CuPy has no {name!r}: it is outside the dialect that NumPy and CuPy share"
        )
    if name in ("linalg", "fft"):
        return _Submodule(name)
    try:
        value = operator.attrgetter(name)(np)
    except AttributeError:
        raise AttributeError(
            f"NumPy has no {name!r}: it is outside the dialect that NumPy and CuPy share"
        ) from None
    if name in ("random", "testing", "lib", "exceptions", "polynomial", "typing"):
        raise AttributeError(
            f"{name!r} is not used on the device (random numbers are drawn on the host)"
        )
    if isinstance(value, np.ufunc):
        return _Ufunc(name)
    if isinstance(value, type) or not callable(value):
        return value  # dtypes, constants, iinfo and finfo: CuPy's are NumPy's own

    def function(*args: Any, **kwargs: Any) -> Any:
        return _call(name, value, args, kwargs)

    function.__name__ = name
    return function


def __getattr__(name: str) -> Any:
    return _lookup(name)


# --- indices ------------------------------------------------------------------------------


def _index(index: Any) -> tuple[tuple[Any, ...], list[np.ndarray]]:
    """An index as NumPy takes it, and the arrays in it; counts what an index costs a GPU."""
    parts: list[Any] = []
    arrays: list[np.ndarray] = []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, slice) and any(
            isinstance(p, ndarray) for p in (part.start, part.stop, part.step)
        ):
            raise TypeError("a slice's bounds are host integers: CuPy arrays have no __index__")
        if isinstance(part, list):
            _count(h2d=1)
            part = np.asarray(part, dtype=None if part else np.int64)
            arrays.append(part)
        elif isinstance(part, (np.ndarray, ndarray)):
            part = _unwrap(part)
            arrays.append(part)
        elif isinstance(part, np.integer):
            part = int(part)
        parts.append(part)
    if any(a.dtype.kind == "b" for a in arrays):
        _count(syncs=1)  # the host must know how many are true
        if len(arrays) > 1:
            raise ValueError(
                "CuPy supports one boolean array in an index, and no other array beside it"
            )
    return tuple(parts), arrays


def _out_of_range(error: IndexError, arrays: list[np.ndarray]) -> IndexError:
    return IndexError(
        f"{error} (CuPy wraps silently: assert bounds on the host)" if arrays else str(error)
    )


class ndarray:
    """A device array: a NumPy array that only this module may touch."""

    __slots__ = ("_host",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: np.ndarray):
        if (
            host.dtype.kind not in "biufc" and host.dtype.name != "bfloat16"
        ) or host.dtype.char in "gG":
            raise TypeError(f"CuPy has no arrays of dtype {host.dtype}")
        self._host = host

    # the properties that cost nothing
    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    T = property(lambda self: ndarray(self._host.T))
    mT = property(lambda self: ndarray(self._host.mT))
    real = property(lambda self: ndarray(self._host.real))
    imag = property(lambda self: ndarray(self._host.imag))

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        # real CuPy arrays have none: backend.namespace asks them by type
        return sys.modules[__name__]

    # everything that would take the array to the host behind the reader's back
    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError(
            "implicit conversion of a device array to NumPy: use refllm.backend.to_numpy"
        )

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"numpy.{ufunc.__name__} of a device array: use xp.{ufunc.__name__}, "
            "and no host operands"
        )

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} of a device array: use xp.{function.__name__}")

    def __bool__(self) -> bool:
        return bool(_to_host(self))

    def __int__(self) -> int:
        return int(_to_host(self))

    def __float__(self) -> float:
        return float(_to_host(self))

    def __complex__(self) -> complex:
        return complex(_to_host(self))

    def __repr__(self) -> str:
        return repr(_to_host(self))

    def get(self, *args: Any, **kwargs: Any) -> np.ndarray:
        _check_signature("ndarray.get", args, kwargs)
        return _to_host(self)

    def item(self) -> Any:
        return _to_host(self).item()

    def tolist(self) -> Any:
        return _to_host(self).tolist()

    def tobytes(self, order: Any = "C") -> bytes:
        return _to_host(self).tobytes(order)

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        """Copy a host array of the same shape and dtype into this one."""
        if not isinstance(arr, np.ndarray) or arr.shape != self.shape or arr.dtype != self.dtype:
            raise TypeError(f"set takes a host array of shape {self.shape} and dtype {self.dtype}")
        _count(h2d=1)
        self._host[...] = arr

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self._host)))

    def __getitem__(self, index: Any) -> ndarray:
        parts, arrays = _index(index)
        try:
            if arrays:
                _count(launches=1)
                return _wrap(self._host[parts])
            # with an ellipsis even a single element is a view, as it is on the device
            return ndarray(self._host[parts if any(p is ... for p in parts) else (*parts, ...)])
        except IndexError as error:
            raise _out_of_range(error, arrays) from None

    def __setitem__(self, index: Any, value: Any) -> None:
        parts, arrays = _index(index)
        source = np.asarray(_unwrap(value))
        _check_cast(source, self.dtype)
        _count(launches=1)
        try:
            if any(a.dtype.kind != "b" for a in arrays):
                written = np.arange(self.size).reshape(self.shape)[parts]
                if np.unique(written).size != written.size:
                    raise ValueError(
                        "an assignment repeats an index: which value stays is undefined on a GPU"
                    )
            self._host[parts] = source
        except IndexError as error:
            raise _out_of_range(error, arrays) from None

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> ndarray:
        _check_cast(self._host, dtype)
        return _call("ndarray.astype", self._host.astype, (dtype, *args), kwargs, self)

    def __copy__(self) -> ndarray:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> ndarray:
        return self.copy()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or f"ndarray.{name}" not in cupy_names.load():
            raise AttributeError(f"cupy.ndarray has no {name!r}")
        method = getattr(self._host, name, None)
        if not callable(method) or name in (
            "data",
            "flat",
            "base",
            "device",
            "cstruct",
            "dump",
            "dumps",
            "tofile",
        ):
            raise AttributeError(f"the stand-in for CuPy does not offer ndarray.{name}")
        return lambda *args, **kwargs: _call(f"ndarray.{name}", method, args, kwargs, self)


# --- operators ----------------------------------------------------------------------------


def _binary(
    function: Callable[[Any, Any], Any], *, swap: bool = False, in_place: bool = False
) -> Any:
    def operate(self: ndarray, other: Any) -> Any:
        if not isinstance(other, (ndarray, np.ndarray, np.generic, bool, int, float, complex)):
            return NotImplemented
        a, b = (_unwrap(other), self._host) if swap else (self._host, _unwrap(other))
        _count(launches=1)
        with np.errstate(all="ignore"):
            result = function(a, b)
        return self if in_place else _wrap(result)

    return operate


def _unary(function: Callable[[Any], Any]) -> Any:
    def operate(self: ndarray) -> ndarray:
        _count(launches=1)
        return _wrap(function(self._host))

    return operate


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    _function = getattr(operator, f"__{_name}__")
    setattr(ndarray, f"__{_name}__", _binary(_function))
    setattr(ndarray, f"__r{_name}__", _binary(_function, swap=True))
    setattr(ndarray, f"__i{_name}__", _binary(getattr(operator, f"__i{_name}__"), in_place=True))
# no __imatmul__: CuPy has none, Python then makes a new array of a @ b
ndarray.__matmul__ = _binary(operator.matmul)  # type: ignore[attr-defined]
ndarray.__rmatmul__ = _binary(operator.matmul, swap=True)  # type: ignore[attr-defined]
ndarray.__divmod__ = _binary(divmod)  # type: ignore[attr-defined]
for _name in ("lt", "le", "eq", "ne", "gt", "ge"):
    setattr(ndarray, f"__{_name}__", _binary(getattr(operator, _name)))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(ndarray, f"__{_name}__", _unary(getattr(operator, f"__{_name}__")))
