"""The data plane speaks the dialect that NumPy 2 and CuPy 14 share, and nothing else: read
from the syntax trees.

The data plane is every function of arrays in ``formats``, ``kernels``, ``model``, ``kv``,
``decode`` and ``quant``. There ``np`` may name types, but computes nothing, except in the
places of ``HOST``, each with its reason. And everywhere in the package each ``xp.name(…)``
is a function of both libraries that takes these arguments in both. ``fakecupy`` holds the
same rules at run time.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
from collections.abc import Iterator
from functools import reduce
from typing import Any

import numpy as np
import pytest
from test_floors import MODULES, PACKAGE, TREES

import cupy_names

DATA_PLANE = ("formats", "kernels", "model", "checkpoints", "train", "kv", "decode", "quant")

# Where NumPy itself is meant: a module, or a function or class in one, and why nothing
# there lives on a device.
BLOCKS = "the blocked layout works around OpenBLAS's packing and exists on the host only"
OVERHEAD = "removes Python's overhead between small products; a GPU captures the step in a graph"
FILES = "files hold host bytes; tensors are moved once they are checked"
HOST = {
    "formats.uniform:_extremes": "reduceat is twice as fast; CuPy takes the other branch",
    "formats.gguf.arithmetic:without_warnings": "NumPy warns of overflow and 0/0; CuPy never does",
    "formats.gguf.reader": FILES,
    "formats.gguf.writer": FILES,
    "checkpoints.gguf": FILES,
    "checkpoints.gguf_names": "metadata and orders of rows are host data",
    "checkpoints.gguf_rope": "metadata are host data",
    "checkpoints.gguf_tokenizer_writer": "metadata are host data",
    "checkpoints.loading:_floats": FILES,
    "checkpoints.tensor_files": FILES,
    "checkpoints.writer": "files hold host bytes; tensors were moved to the host before",
    "train.data": "tokenised text is cut and joined on the host",
    "train.schedule": "the order of the training windows is drawn on the host",
    "train.loop": "initial weights and batches; the step itself is train.backward's",
    "train.state": "a checkpoint is a host file",
    "model.naive": "the network in loops over plain NumPy vectors: a definition to test against",
    "model.weight_layout": BLOCKS,
    "quant.to_gguf": "from files to files; encoders are formats.gguf's",
    "quant.imatrix:importance": "sums of a layer's inputs are moved to the host and kept there",
    "quant.hadamard:hadamard": "matrices of signs are built once, on the host",
    "quant.hadamard:_paley": "matrices of signs are built once, on the host",
    "quant.hadamard:_jacobsthal": "matrices of signs are built once, on the host",
    "quant.rotation": "weights are rotated once, in float64 on the host",
    "quant.layer_inputs:calibration_windows": "token ids are host data until they are embedded",
    "decode.sampling_params:as_generator": "random numbers are drawn on the host",
    "decode.fast.captured_step": OVERHEAD,
    "decode.fast.single_token": OVERHEAD,
    "decode.constraint": "masks of grammars are host data; a step moves those of its rows at once",
    "decode.grammar": "automata are host data; so are the masks that they give",
    "decode.generate": "prompts are lists; the device gets one array per step",
}
TYPES = {
    "ndarray",
    "generic",
    "number",
    "integer",
    "floating",
    "dtype",
    "random.Generator",
    "bool_",
}
UFUNC_METHODS = {"at", "reduce", "accumulate", "outer"}


def dotted(node: ast.expr, root: str) -> str | None:
    """``a.b`` for the expression ``root.a.b``; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (
        ".".join(reversed(parts))
        if parts and isinstance(node, ast.Name) and node.id == root
        else None
    )


class _WithoutAnnotations(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return ast.copy_location(ast.Expr(self.visit(node.value)), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def numpy_uses(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """(qualified name of the function, line, what) for each use of NumPy that is more than
    a type or a comparison.
    """
    tree = _WithoutAnnotations().visit(copy.deepcopy(tree))

    def walk(node: ast.AST, where: str) -> Iterator[tuple[str, int, str]]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            where = f"{where}.{node.name}" if where else node.name
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numpy":
            if node.module != "numpy.typing":
                yield where, node.lineno, f"from {node.module} import …"
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "numpy" and (alias.name, alias.asname) != (
                    "numpy",
                    "np",
                ):
                    yield where, node.lineno, f"import {alias.name} as {alias.asname}"
            return
        if isinstance(node, ast.Compare) and all(
            isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops
        ):
            return  # namespace(x) is np
        name = dotted(node, "np") if isinstance(node, ast.Attribute) else None
        if name is not None:
            if name not in TYPES:
                yield where, node.lineno, f"np.{name}"
            return
        if isinstance(node, ast.Name) and node.id == "np":
            yield where, node.lineno, "np"
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, where)

    return walk(tree, "")


def allowed(module: str, function: str) -> str | None:
    """The entry of HOST that allows NumPy there, if one does."""
    for entry in HOST:
        name, _, qualified = entry.partition(":")
        if f"{module}.".startswith(f"{name}.") and (
            not qualified or function == qualified or function.startswith(qualified + ".")
        ):
            return entry
    return None


def _data_plane() -> list[str]:
    return [name for name in MODULES if name.split(".")[0] in DATA_PLANE]


def test_the_data_plane_computes_nothing_with_numpy_itself():
    stray = [
        f"refllm/{MODULES[name].relative_to(PACKAGE)}:{line}: {what} in {function or 'the module'}"
        for name in _data_plane()
        for function, line, what in numpy_uses(TREES[name])
        if allowed(name, function) is None
    ]
    assert not stray, (
        "use xp = namespace(x), or name the place and the reason in HOST:\n" + "\n".join(stray)
    )


def test_the_exceptions_are_needed():
    used = {
        allowed(name, function)
        for name in _data_plane()
        for function, _, _ in numpy_uses(TREES[name])
    }
    assert not set(HOST) - used, f"no longer needed in HOST: {sorted(set(HOST) - used)}"


# --- xp.name ------------------------------------------------------------------------------


def calls_of_xp(tree: ast.AST) -> Iterator[tuple[int, str, ast.Call | None]]:
    """(line, dotted name, the call if it is called) for each maximal ``xp.a.b``."""
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    calls = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and id(node) not in inner
            and (name := dotted(node, "xp"))
        ):
            if name.startswith("__"):
                continue  # xp.__name__, for a message
            yield node.lineno, name, calls.get(id(node))


def complaint(name: str, call: ast.Call | None) -> str | None:
    """What is wrong with ``xp.name(…)`` in the common dialect, or None."""
    record = cupy_names.load()
    base, _, method = name.rpartition(".")
    if base and method in UFUNC_METHODS and isinstance(getattr(np, base, None), np.ufunc):
        return None if base in record else f"CuPy has no {base}"
    if name not in record:
        return f"CuPy has no {name}"
    try:
        numpys: Any = reduce(getattr, name.split("."), np)
    except AttributeError:
        return f"NumPy has no {name}"
    if (
        call is None
        or any(isinstance(a, ast.Starred) for a in call.args)
        or any(k.arg is None for k in call.keywords)
    ):
        return None
    signatures = {"CuPy": record[name]}
    with contextlib.suppress(ValueError, TypeError):  # some functions written in C do not tell
        signatures["NumPy"] = None if isinstance(numpys, type) else inspect.signature(numpys)
    for library, signature in signatures.items():
        if signature is not None:
            try:
                signature.bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg})
            except TypeError as error:
                return f"{library}'s {name}: {error}"
    return None


@pytest.mark.theorem(
    "Each array function that the package calls exists in NumPy 2 and in CuPy 14 and "
    "takes these arguments in both",
    source="NumPy's and CuPy's own signatures",
)
def test_every_xp_name_exists_in_both_libraries_and_takes_these_arguments():
    wrong = [
        f"refllm/{MODULES[module].relative_to(PACKAGE)}:{line}: xp.{name}: {reason}"
        for module, tree in TREES.items()
        for line, name, call in calls_of_xp(tree)
        if (reason := complaint(name, call))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_method_is_used_that_only_numpy_arrays_have():
    only_numpy = {
        n
        for n in dir(np.ndarray)
        if not n.startswith("_") and f"ndarray.{n}" not in cupy_names.load()
    }
    found = [
        f"refllm/{MODULES[module].relative_to(PACKAGE)}:{node.lineno}: .{node.attr}"
        for module in _data_plane()
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Attribute) and node.attr in only_numpy
    ]
    assert not found, "\n".join(found)


# --- the rules themselves -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(x):\n    return np.sum(x)", [("f", "np.sum")]),
        (
            "class A:\n    def f(self, x):\n        return np.linalg.norm(x)",
            [("A.f", "np.linalg.norm")],
        ),
        ("TABLE = np.array([1, 2])", [("", "np.array")]),
        ("def f(x, xp=np):\n    return xp.sum(x)", [("f", "np")]),
        ("def f(x):\n    xp = np", [("f", "np")]),
        ("from numpy import sum", [("", "from numpy import …")]),
        ("import numpy.linalg as la", [("", "import numpy.linalg as la")]),
        ("import numpy", [("", "import numpy as None")]),
        (
            "def f(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:\n    y: "
            "np.float32 = x\n    return y",
            [],
        ),
        ("def f(x):\n    return isinstance(x, np.ndarray) and namespace(x) is np", []),
        ("def f(rng):\n    return np.random.default_rng(0)", [("f", "np.random.default_rng")]),
    ],
)
def test_uses_of_numpy_are_found(source, found):
    assert [(where, what) for where, _, what in numpy_uses(ast.parse(source))] == found


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("xp.vecdot(a, b)", "CuPy has no vecdot"),
        ("xp.linalg.vector_norm(a)", "CuPy has no linalg.vector_norm"),
        ("xp.asnumpy(a)", "NumPy has no asnumpy"),
        ("xp.clip(a, min=0, max=1)", "CuPy's clip"),
        ("xp.clip(a, 0)", "CuPy's clip"),
        ("xp.zeros(3, device='cpu')", "CuPy's zeros"),
        ("xp.take_along_axis(a, i)", "CuPy's take_along_axis"),
        ("xp.einsum('i,i->', a, a, out=b)", "CuPy's einsum"),
        ("xp.sum(a, where=m)", "CuPy's sum"),
        ("xp.searchsorted(a, v, side='left', sorting=None)", "'s searchsorted"),
        ("xp.repeat(a, 2, axes=0)", "repeat"),
        ("xp.add.at(a, i, b)", None),
        ("xp.add(a, b, out=c)", None),
        ("xp.max(a, axis=-1, keepdims=True)", None),
        ("xp.float32", None),
        ("xp.linalg.cholesky(a)", None),
        ("xp.zeros(*shape, **options)", None),
    ],
)
def test_names_and_arguments_outside_the_dialect_are_found(source, reason):
    [(_, name, call)] = calls_of_xp(ast.parse(source))
    found = complaint(name, call)
    assert (found is None) if reason is None else (reason in found)
