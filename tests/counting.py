"""An array module that counts: NumPy inside, and counts of multiply-adds and of bytes
read and written.

A ``Counted`` array carries a ``role`` ("weight", "kv" or "" for activations) that its views
keep. A product adds 2·M·N·K FLOP per matrix, read off the operands' shapes, under the role
of its operands; any operation that reads an array with a role adds that array's bytes to
``read[role]``, and an assignment adds to ``written[role]``. Looking at an array (reshape,
transpose, slice) costs nothing, unless NumPy had to copy.

It stands in for no library: what the network calls is passed on to NumPy as it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

VIEWS = {"reshape", "transpose", "swapaxes", "permute_dims"}
SILENT = {"empty_like", "zeros_like", "ones_like", "full_like"}  # look at shape and dtype only
OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "pow",
    "matmul",
    "gt",
    "lt",
    "ge",
    "le",
    "eq",
    "ne",
    "or",
    "and",
)


class Counts:
    """What has been executed: FLOP of products by role, bytes by role."""

    def __init__(self) -> None:
        self.flops: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()

    def product(self, a: Counted, b: Counted) -> None:
        """a[..., M, K] @ b[..., K, N]: 2·M·N·K for each matrix of the broadcast stack."""
        stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        roles = {a.role, b.role} - {""}
        self.flops[roles.pop() if roles else ""] += (
            2 * int(np.prod(stack)) * a.shape[-2] * a.shape[-1] * b.shape[-1]
        )


class CountingModule:
    """The array module of ``Counted`` arrays: ``module.name(...)`` runs ``numpy.name`` and
    keeps the counts.
    """

    __name__ = "counting"

    def __init__(self) -> None:
        self.counts = Counts()

    def __getattr__(self, name: str) -> Any:
        target = getattr(np, name)
        if not callable(target) or isinstance(target, type):
            return target
        return lambda *args, **kwargs: self.call(name, target, args, kwargs)

    def array(self, x: Any, role: str = "") -> Counted:
        return Counted(np.asarray(x), self, role)

    def call(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        """Run ``function`` on the bare arrays; count what it read, unless its result is a
        view.
        """
        operands = [x for x in _flat(args) if isinstance(x, Counted)]
        if name == "matmul":
            self.counts.product(*operands[:2])
        result = function(*_bare(args), **{k: _bare(v) for k, v in kwargs.items()})
        if isinstance(kwargs.get("out"), Counted):
            self._read(operands)
            return kwargs["out"]
        if not isinstance(result, np.ndarray | np.generic):
            return result
        role = ""
        if name in VIEWS and np.shares_memory(result, operands[0].bare):
            role = operands[0].role
        elif name not in SILENT:
            self._read(operands)
        return Counted(np.asarray(result), self, role)

    def _read(self, operands: list[Counted]) -> None:
        for x in operands:
            if x.role:
                self.counts.read[x.role] += x.bare.nbytes


class Counted:
    """An array of a ``CountingModule``."""

    def __init__(self, bare: np.ndarray, module: CountingModule, role: str = ""):
        self.bare = bare
        self.module = module
        self.role = role

    shape = property(lambda self: self.bare.shape)
    ndim = property(lambda self: self.bare.ndim)
    dtype = property(lambda self: self.bare.dtype)
    size = property(lambda self: self.bare.size)
    nbytes = property(lambda self: self.bare.nbytes)
    T = property(lambda self: self.transpose())

    def __array_namespace__(self) -> CountingModule:
        return self.module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(self.bare, name):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.module.call(
            name,
            lambda x, *rest, **options: getattr(x, name)(*rest, **options),
            (self, *args),
            kwargs,
        )

    def __getitem__(self, index: Any) -> Counted:
        taken = np.asarray(self.bare[_bare(index)])
        view = np.shares_memory(taken, self.bare)
        if self.role and not view:
            self.module.counts.read[self.role] += taken.nbytes
        return Counted(taken, self.module, self.role if view else "")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.bare[_bare(index)] = _bare(value)
        if self.role:
            self.module.counts.written[self.role] += np.asarray(self.bare[_bare(index)]).nbytes

    def __neg__(self) -> Counted:
        return self.module.negative(self)


def _operator(name: str, reflected: bool, in_place: bool) -> Any:
    method = f"__{'i' if in_place else 'r' if reflected else ''}{name}__"

    def apply(self: Counted, other: Any) -> Any:
        result = self.module.call(name, lambda a, b: getattr(a, method)(b), (self, other), {})
        return self if in_place else result

    return apply


for _name in OPERATORS:
    for _kind in ("", "r", "i"):
        if _kind == "i" and _name in ("gt", "lt", "ge", "le", "eq", "ne"):
            continue
        setattr(Counted, f"__{_kind}{_name}__", _operator(_name, _kind == "r", _kind == "i"))


def _flat(args: Any) -> list[Any]:
    return [y for x in args for y in (_flat(x) if isinstance(x, list | tuple) else [x])]


def _bare(x: Any) -> Any:
    if isinstance(x, Counted):
        return x.bare
    return type(x)(_bare(y) for y in x) if isinstance(x, list | tuple) else x
