"""Which source code decides what a function does: its own, and that of every definition of
this package that it uses, directly or through others.

A drawing function stands in the module of its experiment, between code that measures. If
the whole module decided whether a picture is stale, every edit of the measuring code would
ask for a new picture. So the names that the function uses are followed: to functions,
classes and constants of its module, and through imports to those of other modules of the
package. ``measure.plotting``, which every figure shares, counts as a whole.

Left out: methods that are reached through an argument alone (a record's values are plain
JSON), and other packages.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from refllm.measure import plotting

PACKAGE = "refllm."


class _Module(NamedTuple):
    """A module's text, its top-level definitions, and where its imported names come from."""

    lines: list[str]
    defined: dict[str, list[ast.stmt]]
    imported: dict[str, tuple[str, str]]  # name → (module, name there)


def sources(*functions: Callable[..., object]) -> list[str]:
    """The text of every definition that ``functions`` depend on, sorted by module and name.

    >>> len(sources(sources)) > len(sources(_names))  # with its helpers
    True
    """
    parsed: dict[str, _Module] = {}
    found = {(plotting.__name__, ""): inspect.getsource(plotting)}
    pending = [(f.__module__, f.__name__) for f in functions]
    while pending:
        module_name, name = place = pending.pop()
        if place in found or module_name == plotting.__name__:
            continue
        if module_name not in parsed:
            parsed[module_name] = _parse(module_name)
        module = parsed[module_name]
        if name in module.imported:
            origin, there = module.imported[name]
            if find_spec(origin) and _is_module(f"{origin}.{there}"):
                found[origin, there] = inspect.getsource(import_module(f"{origin}.{there}"))
            else:
                pending.append((origin, there))
            continue
        statements = module.defined.get(name, [])
        found[place] = "\n".join(_text(module.lines, statement) for statement in statements)
        pending += [(module_name, used) for used in _names(statements)]
    return [text for _, text in sorted(found.items()) if text]


def _parse(name: str) -> _Module:
    """Read a module; imports inside functions count too."""
    text = inspect.getsource(import_module(name))
    tree = ast.parse(text)
    defined: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        for bound in _bound(statement):
            defined.setdefault(bound, []).append(statement)
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGE)
        for alias in node.names
    }
    return _Module(text.splitlines(), defined, imported)


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a top-level definition or assignment binds."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _names(statements: Iterable[ast.stmt]) -> set[str]:
    """The names that statements read."""
    return {
        node.id
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def _text(lines: list[str], statement: ast.stmt) -> str:
    """A statement's lines, its decorators included."""
    decorators = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(d.lineno for d in decorators)])
    return "\n".join(lines[first - 1 : statement.end_lineno])


def _is_module(name: str) -> bool:
    """Whether ``name`` is a module of the package, and not a name that one defines."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False
