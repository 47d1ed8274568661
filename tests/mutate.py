"""Plant faults by rule, one at a time, and print those that no test notices.

    python -m tests.mutate --count 300 --seed 0            # the whole package
    python -m tests.mutate --room kv --count 40 --jobs 2   # one room
    python -m tests.mutate --file refllm/kv/radix_tree.py  # one file, every fault
    python -m tests.mutate --list --count 20               # show, run nothing

A fault is a change of one node of a file's syntax tree (``changed``). Each is written into
a copy of the project, and the tests of that file run against the copy until one fails: the
test file with its name and the examples in its docstrings, then the rest of its room's
tests, then the files elsewhere that use it most. Faults are drawn from the copy, so the
checkout may change meanwhile. A file whose tests fail without any fault is left out and
named.

A run that takes far longer than the same run without a fault, and longer than ``--limit``
seconds, counts as noticed, because the suite has a time limit per test.

What survives is printed as file:line with the line before and after: a hole in the tests, or
a fault that changes no result (an equivalent one), which only a reader can tell. Lines that
say why no test can notice them end in the comment ``# mutate: equivalent``.

Left out: faults in docstrings, annotations, messages of errors, defaults of the command
line, the settings of an experiment (its module's constants, and those of its figure's look),
and two faults at once.
"""

from __future__ import annotations

import argparse
import ast
import copy
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    *("formats", "model", "checkpoints", "train", "quant", "kv", "decode", "serve", "simulate"),
    *("measure", "experiments", "jobs"),
)
EQUIVALENT = "# mutate: equivalent"
OUTSIDE = 2  # test files of other rooms that are run at most
EXAMPLES = "tests/project/test_doctests.py::test_the_examples_of_a_module_print_what_they_say[{}]"

COMPARE = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "len", "floor": "round"}
DROPPED = ("clip", "copy", "astype", "round", "maximum")  # as methods of a namespace
ATTRIBUTES = {"minimum": "maximum", "maximum": "minimum", "argmax": "argmin", "min": "max"}


@dataclass(frozen=True)
class Fault:
    """One change: the file, the line, and the node's place in ``ast.walk`` with its variant."""

    path: Path
    line: int
    node: int
    variant: int
    name: str


def changed(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The (rule's name, replacement) pairs of a node; the replacement is a changed copy."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in COMPARE:
        new.ops[0] = COMPARE[type(new.ops[0])]()
        yield "comparison", new
    elif isinstance(new, (ast.BinOp, ast.AugAssign)) and type(new.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(new.op)]()
        yield "operator", new
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        yield "and, or", new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, (ast.Not, ast.USub)):
        yield "sign dropped", new.operand
    elif isinstance(new, ast.Constant) and type(new.value) is bool:
        yield "flag", ast.Constant(not new.value)
    elif isinstance(new, ast.Constant) and type(new.value) in (int, float):
        if new.value + 1 != new.value:  # 1e30 + 1 is 1e30
            yield "constant", ast.Constant(new.value + 1)
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Name) and new.func.id in CALLS:
        new.func.id = CALLS[new.func.id]
        yield "function", new
    elif isinstance(new, ast.Attribute) and new.attr in ATTRIBUTES:
        new.attr = ATTRIBUTES[new.attr]
        yield "method", new
    if isinstance(node, ast.Call) and node.args and _name(node.func) in DROPPED:
        yield "call dropped", copy.deepcopy(node.args[0])
    if isinstance(node, (ast.Expr, ast.AugAssign)) and not _is_docstring(node):
        yield "statement dropped", ast.Pass()
    if isinstance(node, ast.If) and not _raises(node):
        never = copy.deepcopy(node)
        never.test = ast.Constant(False)
        yield "branch never taken", never


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else ""


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _raises(node: ast.AST) -> bool:
    return any(isinstance(child, (ast.Raise, ast.Assert)) for child in ast.walk(node))


def _skipped(tree: ast.AST) -> set[int]:
    """Ids of nodes in annotations, decorators, messages of errors and module constants' docs."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parts += [node.returns, *node.decorator_list]
            parts += [arg.annotation for arg in ast.walk(node.args) if isinstance(arg, ast.arg)]
        elif isinstance(node, ast.ClassDef):
            parts += node.decorator_list
        elif isinstance(node, ast.keyword) and node.arg == "strict":  # zip's own check
            parts.append(node.value)
        elif isinstance(node, ast.AnnAssign):
            parts.append(node.annotation)
        elif isinstance(node, (ast.Raise, ast.JoinedStr)):
            parts.append(node)
        elif isinstance(node, ast.Assert):
            parts.append(node.msg)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            parts.append(node)
        skipped |= {id(child) for part in parts if part is not None for child in ast.walk(part)}
    return skipped


def _settings(tree: ast.Module) -> set[int]:
    """Ids of nodes that set up an experiment or the look of its figure: the assignments of a
    module (windows, seeds, sizes), its call as a script, and constants where it draws.
    """
    settings: set[int] = set()
    for node in tree.body:
        parts = ast.walk(node)
        if isinstance(node, ast.FunctionDef) and re.match("_?(draw|plot)", node.name):
            settings |= {id(part) for part in parts if isinstance(part, ast.Constant)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.If)):
            settings |= {id(part) for part in parts}
    return settings


def faults_of(path: Path) -> list[Fault]:
    """All faults of a file, in the order of its nodes."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    skipped = _skipped(tree)
    if path.parent.name == "experiments":
        skipped |= _settings(tree)
    found = []
    for index, node in enumerate(ast.walk(tree)):
        line = getattr(node, "lineno", 0)
        if id(node) in skipped or not line or EQUIVALENT in lines[line - 1]:
            continue
        for variant, (name, _) in enumerate(changed(node)):
            found.append(Fault(path, line, index, variant, name))
    return found


def planted(fault: Fault) -> tuple[str, str, str]:
    """(the changed file, the node before, the node after)."""
    tree = ast.parse(fault.path.read_text(encoding="utf-8"))
    target = list(ast.walk(tree))[fault.node]
    replacement = list(changed(target))[fault.variant][1]
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, field, replacement)
            elif isinstance(value, list):
                setattr(parent, field, [replacement if v is target else v for v in value])
    ast.fix_missing_locations(tree)
    before, after = ast.unparse(target), ast.unparse(replacement)
    return ast.unparse(tree), before.splitlines()[0], after.splitlines()[0]


def tests_of(path: Path, root: Path) -> list[list[str]]:
    """Arguments of pytest for each run, nearest tests first: the test file of the module's
    name and the module's own examples; the other test files of its room; the ``OUTSIDE``
    files elsewhere that name it, or what it exports, most often.
    """
    relative = path.relative_to(root)
    module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    package, _, name = module.rpartition(".")
    exported = _exported(path.parent / "__init__.py", module)
    named, room = [], []
    users: Counter[str] = Counter()
    for test in sorted((root / "tests").rglob("test_*.py")):
        where = str(test.relative_to(root))
        source = test.read_text(encoding="utf-8")
        if test.stem == f"test_{name}":
            named.append(where)
        elif where.startswith(f"tests/{relative.parts[1]}/"):
            room.append(where)
        elif used := _used(ast.parse(source), module, package, {name} | exported):
            users[where] = sum(len(re.findall(rf"\b{word}\b", source)) for word in used)
    outside = [where for where, _ in users.most_common(OUTSIDE)]
    if relative.parts[1] == "experiments":  # whose figures are drawn by way of the registry
        outside.append("tests/figures/test_shown.py")
    runs = [[*named, EXAMPLES.format(module)], room, outside]
    return [run for run in runs if run]


def _exported(init: Path, module: str) -> set[str]:
    """The names of a module that its room's ``__init__`` exports."""
    if not init.is_file():
        return set()
    nodes = ast.walk(ast.parse(init.read_text(encoding="utf-8")))
    return {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == module
        for alias in node.names
    }


def _used(tree: ast.AST, module: str, package: str, names: set[str]) -> set[str]:
    """What a test file imports from the module, or of ``names`` from its package."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in (module, package):
            imported = {alias.name for alias in node.names}
            found |= imported if node.module == module else imported & names
        elif isinstance(node, ast.Constant) and node.value == module:  # import_module("…")
            found.add(module)
    return found


@contextmanager
def broken(fault: Fault, root: Path, workplace: Path) -> Iterator[None]:
    """Within the block ``workplace``, a copy of ``root``, holds the fault."""
    target = workplace / fault.path.relative_to(root)
    original = target.read_text(encoding="utf-8")
    target.write_text(planted(fault)[0], encoding="utf-8")
    try:
        yield
    finally:
        target.write_text(original, encoding="utf-8")


class Usual(dict[tuple[str, ...], float]):
    """Seconds that a run of tests takes without any fault; infinite if it fails.

    Each run is tried when it is first asked about, so that tests which notice a fault early
    spare the later ones.
    """

    def of(self, arguments: list[str], workplace: Path) -> float:
        """The seconds of a run, tried once in ``workplace``, which holds no fault."""
        key = tuple(arguments)
        if key not in self:
            began = time.monotonic()
            good = _run(arguments, workplace, None)
            self[key] = time.monotonic() - began if good else math.inf
        return self[key]


def verdict(fault: Fault, root: Path, workplace: Path, usual: Usual, limit: float) -> str:
    """ "noticed", "survived", or "left out" if its tests fail without it and no other notices."""
    sound = True
    for arguments in tests_of(fault.path, root):
        seconds = usual.of(arguments, workplace)
        if math.isinf(seconds):
            sound = False
            continue
        with broken(fault, root, workplace):
            if not _run(arguments, workplace, max(limit, 4 * seconds)):
                return "noticed"
    return "survived" if sound else "left out, tests fail without a fault"


def _run(arguments: list[str], workplace: Path, limit: float | None) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(workplace), "CI": "true"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=workplace, env=environment, capture_output=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def chosen(options: argparse.Namespace, root: Path) -> list[Fault]:
    """The faults to plant: all of the named files, or a sample spread over the rooms."""
    if options.file:
        return [fault for name in options.file for fault in faults_of(root / name)]
    rng = random.Random(options.seed)
    rooms = [options.room] if options.room else list(ROOMS)
    found = []
    for room in rooms:
        faults = [f for p in sorted((root / "refllm" / room).rglob("*.py")) for f in faults_of(p)]
        found += rng.sample(faults, min(len(faults), -(-options.count // len(rooms))))
    return found


def main() -> None:
    """Plant, run, and print what survived and the share that was noticed per room."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="faults in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", choices=ROOMS)
    parser.add_argument("--file", action="append")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds per run of tests")
    parser.add_argument("--list", action="store_true", help="show the faults, run nothing")
    options = parser.parse_args()
    if options.list:
        for fault in chosen(options, ROOT):
            print(f"{fault.path.relative_to(ROOT)}:{fault.line} {fault.name}: ", end="")
            print(" -> ".join(planted(fault)[1:]))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = _copied(ROOT, Path(folder) / "original")
        run(chosen(options, root), root, options.jobs, options.limit)


def _copied(root: Path, place: Path) -> Path:
    """A copy of the project without its caches."""
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", ".hypothesis", ".*cache", "shared"
    )
    shutil.copytree(root, place, ignore=ignore)
    return place


def run(faults: list[Fault], root: Path, jobs: int, limit: float) -> None:
    """Plant every fault, ``jobs`` at a time, each in a copy of the project of its own."""
    noticed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    places: Queue[Path] = Queue()
    for i in range(jobs):
        places.put(_copied(root, root.with_name(f"copy{i}")))
    usual = Usual()

    def judged(fault: Fault) -> str:
        place = places.get()
        try:
            return verdict(fault, root, place, usual, limit)
        finally:
            places.put(place)

    with ThreadPoolExecutor(jobs) as pool:
        verdicts = zip(faults, pool.map(judged, faults), strict=True)
        for done, (fault, found) in enumerate(verdicts, start=1):
            print(f"{done} of {len(faults)}", end="\r", file=sys.stderr, flush=True)
            room = fault.path.relative_to(root / "refllm").parts[0]
            if found != "noticed":
                _, before, after = planted(fault)
                where = f"{fault.path.relative_to(root)}:{fault.line}"
                print(f"{found}  {where}  {fault.name}: {before}  ->  {after}", flush=True)
            if found in ("survived", "noticed"):
                total[room] += 1
                noticed[room] += found != "survived"
    for room in total:
        print(f"{room:12} {noticed[room]:4} of {total[room]:4} noticed")
    print(f"{'all':12} {sum(noticed.values()):4} of {sum(total.values()):4} noticed")


if __name__ == "__main__":
    main()
