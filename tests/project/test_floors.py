"""The house stands: an import never points up, and importing a module does nothing else.

``FLOORS`` lists the floors, lowest first. Every import counts, those inside functions and
under ``TYPE_CHECKING`` too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "refllm"
FLOORS = [
    ["errors", "openblas"],
    ["array_types", "atomic"],
    ["backend"],
    ["kernels"],
    ["formats"],
    ["model"],
    ["checkpoints"],
    ["corpus"],
    ["train", "quant", "kv"],
    ["decode"],
    ["api"],
    ["serve"],
    ["lang"],
    ["simulate"],
    ["terminal"],
    ["measure"],
    ["experiments"],
    ["figures"],
    ["jobs", "tour"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Plain control plane and number formats: no path of imports leads from here to a model.
KNOW_NO_MODEL = (
    "formats",
    "kernels",
    "kv.block_pool",
    "kv.radix_tree",
    "serve.scheduler",
    "serve.request",
)

# Importing any module of the package must stay cheap and must not need an optional package;
# matplotlib is imported where a figure is drawn.
HEAVY = ("cupy", "torch", "transformers", "matplotlib", "IPython", "pytest", "hypothesis")


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name relative to refllm (``""`` is refllm itself) → file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module of refllm) for each import in a syntax tree, names imported from
    packages resolved.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide where they point"
            base = node.module or ""
            names = [
                full if (full := f"{base}.{alias.name}").removeprefix("refllm.") in known else base
                for alias in node.names
            ]
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("refllm.")
        ):
            # import_module("refllm.…")
            names = [node.value] if node.value.removeprefix("refllm.") in known else []
        else:
            continue
        for name in names:
            if name == "refllm":
                yield node.lineno, ""
            elif name.startswith("refllm."):
                yield node.lineno, name.removeprefix("refllm.")


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
GRAPH = {name: sorted(set(imports(tree, set(MODULES)))) for name, tree in TREES.items()}


def may_import(source: str, target: str) -> bool:
    """Whether ``source`` may import ``target`` (names relative to refllm)."""
    if source == "":
        return True  # refllm/__init__.py stands above everything and resolves its names lazily
    a = source.split(".")[0]  # `from refllm import load` is api's
    b = target.split(".")[0] or "api"
    if a == b:
        return True
    return LEVEL[b] < LEVEL[a]


def test_every_room_has_a_floor():
    rooms = {name.split(".")[0] for name in MODULES if name}
    assert rooms <= set(LEVEL), f"rooms without a floor: {sorted(rooms - set(LEVEL))}"


@pytest.mark.theorem(
    "No import points from a lower floor of the package to a higher one", source="ARCHITECTURE.md"
)
def test_no_import_points_up():
    up = [
        f"refllm/{MODULES[source].relative_to(PACKAGE)}:{line} imports refllm.{target}"
        for source, targets in GRAPH.items()
        for line, target in targets
        if not may_import(source, target)
    ]
    assert not up, "\n".join(up)


def test_the_rule_sees_every_way_to_point_up():
    known = {"model", "model.llama", "serve", "serve.engine"}
    ways = [
        "import refllm.serve.engine",
        "from refllm.serve import engine",
        "from refllm.serve.engine import Engine",
        "def f():\n    from refllm.serve.engine import Engine",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from "
        "refllm.serve.engine import Engine",
        "importlib.import_module('refllm.serve.engine')",
    ]
    for way in ways:
        found = [target for _, target in imports(ast.parse(way), known)]
        assert found == ["serve.engine"], way
        assert not may_import("model.llama", found[0])
    assert may_import("tour.stops", "serve.engine")
    assert not may_import("kv.paged", "quant.rtn")
    assert not may_import("quant.rtn", "kv.paged")
    assert may_import("cli.info", "")
    assert not may_import("model.llama", "")
    with pytest.raises(AssertionError, match="relative"):
        list(imports(ast.parse("from ..serve import engine"), known))


def _lies_in(name: str, places: tuple[str, ...]) -> bool:
    """Whether a module is one of ``places``, or lies below one of them."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.theorem(
    "No path of imports leads from formats, kernels, kv.block_pool, kv.radix_tree, "
    "serve.scheduler or serve.request to a model",
    source="ARCHITECTURE.md",
)
def test_what_knows_no_model_reaches_none():
    for start in (name for name in MODULES if _lies_in(name, KNOW_NO_MODEL)):
        seen = {start}
        stack = [start]
        while stack:
            fresh = {target for _, target in GRAPH.get(stack.pop(), [])} - seen
            seen |= fresh
            stack += fresh
        reached = sorted(name for name in seen if name.split(".")[0] == "model")
        assert not reached, f"refllm.{start} reaches {reached}"


# --- nothing happens at import ------------------------------------------------------------

_DEFINITIONS = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
)


def _only_defines(node: ast.stmt) -> bool:
    if isinstance(node, _DEFINITIONS):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)  # a docstring
    if isinstance(node, ast.If):  # if TYPE_CHECKING, if __name__ == "__main__"
        return ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
    return False


def test_modules_only_define():
    acts = [
        f"refllm/{MODULES[name].relative_to(PACKAGE)}:{node.lineno}: "
        f"{ast.unparse(node).splitlines()[0]}"
        for name, tree in TREES.items()
        for node in tree.body
        if not _only_defines(node)
    ]
    # typer registers commands by `app.command()(function)` or by decorators; sub-commands
    # by `app.add_typer`
    acts = [act for act in acts if not (act.startswith("refllm/cli") and ": app." in act)]
    assert not acts, "\n".join(acts)


def test_no_module_rebinds_a_global():
    found = [
        f"refllm/{MODULES[name].relative_to(PACKAGE)}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]
    assert not found, f"state belongs into objects: {found}"


def _run(code: str, directory: Path) -> str:
    """Output of ``code`` in a new interpreter that stands in an empty directory."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        **{
            "capture_output": True,
            "text": True,
            "env": environment,
            "cwd": directory,
            "timeout": 120,
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_importing_refllm_imports_nothing_else(tmp_path):
    loaded = _run(
        "import sys, refllm; print(refllm.__version__); print(*sorted(sys.modules))", tmp_path
    ).splitlines()
    assert loaded[0].count(".") == 2
    assert {"refllm"} == {
        m for m in loaded[1].split() if m.split(".")[0] in ("refllm", "numpy", *HEAVY)
    }


def test_importing_every_module_is_quiet_and_light(tmp_path):
    names = [f"refllm.{name}" for name in MODULES if name]
    code = f"""
import os, sys, importlib
for name in {names!r}:
    importlib.import_module(name)
assert os.listdir(".") == []
print(*[m for m in {HEAVY!r} if m in sys.modules])
"""
    assert _run(code, tmp_path).split() == []


def test_load_is_resolved_when_it_is_used(tmp_path):
    code = "import refllm, refllm.api; print(refllm.load is refllm.api.load, 'load' in dir(refllm))"
    assert _run(code, tmp_path) == "True True\n"
    with pytest.raises(AssertionError, match="no attribute 'lode'"):
        _run("import refllm; refllm.lode", tmp_path)
