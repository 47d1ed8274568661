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
from symtable import SymbolTable, symtable
from typing import NamedTuple

from refllm.measure import plotting

PACKAGE = "refllm."


class _Module(NamedTuple):
    """A module's text, its top-level definitions, and where its imported names come from."""

    text: str
    defined: dict[str, list[ast.stmt]]
    imported: dict[str, tuple[str, str]]  # name → (module, name there)
    tables: list[SymbolTable]  # the scopes of its functions and classes


class SourceReader:
    """Reads the source of definitions, each module once: make a new one for each check."""

    def __init__(self) -> None:
        self._modules: dict[str, _Module] = {}

    def sources(self, *definitions: Callable[..., object]) -> list[str]:
        """The text of functions and classes and of all that they depend on, sorted by module
        and name.

        >>> reader = SourceReader()
        >>> len(reader.sources(_text)) < len(reader.sources(_bound, _text))
        True
        """
        found = {(plotting.__name__, ""): self._read(plotting.__name__).text}
        pending = [(f.__module__, f.__name__) for f in definitions]
        while pending:
            module_name, name = place = pending.pop()
            if place in found or module_name == plotting.__name__:
                continue
            module = self._read(module_name)
            if name in module.imported:
                origin, there = module.imported[name]
                if is_module(f"{origin}.{there}"):
                    found[origin, there] = self._read(f"{origin}.{there}").text
                else:
                    pending.append((origin, there))
                continue
            statements = module.defined.get(name, [])
            found[place] = "\n".join(_text(module.text, statement) for statement in statements)
            for statement in statements:
                pending += [(module_name, used) for used in _uses(statement, module.tables)]
        return [text for _, text in sorted(found.items()) if text]

    def _read(self, name: str) -> _Module:
        """A module, parsed; imports inside functions count too."""
        if name not in self._modules:
            self._modules[name] = _parse(inspect.getsource(import_module(name)))
        return self._modules[name]


def _parse(text: str) -> _Module:
    """The definitions and the imports of a module."""
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
    return _Module(text, defined, imported, symtable(text, "module", "exec").get_children())


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a top-level definition or assignment binds."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _uses(statement: ast.stmt, tables: list[SymbolTable]) -> set[str]:
    """The module's names that a top-level statement reads.

    A function's own variables are not among them, though they may be called like one;
    ``tables`` are the scopes of the functions and classes of the module.
    """
    if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return _loads([statement])
    found = _loads(statement.decorator_list)
    if isinstance(statement, ast.FunctionDef):
        found |= _loads([*statement.args.defaults, *filter(None, statement.args.kw_defaults)])
    else:
        found |= _loads(statement.bases)
    for table in tables:
        if table.get_name() == statement.name:
            found |= _global_names(table)
    return found


def _loads(nodes: Iterable[ast.AST]) -> set[str]:
    """The names that are read anywhere below ``nodes``."""
    return {
        node.id
        for top in nodes
        for node in ast.walk(top)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def _global_names(table: SymbolTable) -> set[str]:
    """The names of a scope, and of those inside it, that are the module's."""
    found = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return found.union(*map(_global_names, table.get_children()))


def _text(module: str, statement: ast.stmt) -> str:
    """A statement's lines, its decorators included."""
    decorators = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(d.lineno for d in decorators)])
    return "\n".join(module.splitlines()[first - 1 : statement.end_lineno])


def is_module(name: str) -> bool:
    """Whether ``name`` is a module, and not a name that a module defines.

    >>> is_module("refllm.measure.plotting"), is_module("refllm.measure.plotting.axes")
    (True, False)
    """
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False
