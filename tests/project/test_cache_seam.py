"""Callers use every cache through one interface: none asks which kind it has."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from conftest import ROOT

PACKAGE = ROOT / "refllm"
# A class of refllm.kv with one of these methods is a kind of caches or of policies.
METHODS = {"view", "new_cache"}


def kinds() -> set[str]:
    """The names of the caches and the cache policies of refllm.kv."""
    return {
        node.name
        for path in (PACKAGE / "kv").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(part, ast.FunctionDef) and part.name in METHODS for part in node.body)
    }


def questions(tree: ast.AST, names: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) wherever ``isinstance``, ``issubclass``, ``type(x) is``, or a ``case`` asks
    for a class of ``names``, imported under its own name or another.
    """
    aliases = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            asked = node.args[1:] if node.func.id in ("isinstance", "issubclass") else []
        elif isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchClass):
            asked = [node.cls]
        else:
            continue
        for part in (part for root in asked for part in ast.walk(root)):
            if isinstance(part, ast.Attribute):
                name = part.attr
            elif isinstance(part, ast.Name):
                name = aliases.get(part.id, part.id)
            else:
                continue
            if name in names:
                yield node.lineno, name


def test_no_module_outside_kv_asks_for_the_kind_of_a_cache():
    names = kinds()
    assert {"ContiguousCache", "ContiguousPolicy", "Kivi", "KiviCache"} <= names
    assert {"SparsePolicy", "SparseCache", "PagedKVCache", "Cache", "CachePolicy"} <= names
    found = [
        f"{path.relative_to(ROOT)}:{line} asks for {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent != PACKAGE / "kv"
        for line, name in questions(ast.parse(path.read_text(encoding="utf-8")), names)
    ]
    assert not found, "\n".join(found)


def test_the_rule_sees_every_way_to_ask():
    for code in (
        "isinstance(cache, KiviCache)",
        "isinstance(cache, (int, kivi_cache.KiviCache))",
        "issubclass(type(cache), int | KiviCache)",
        "type(cache) is KiviCache",
        "cache.__class__ == KiviCache",
        "match cache:\n    case KiviCache():\n        pass",
        "from refllm.kv.kivi_cache import KiviCache as K\nisinstance(cache, K)",
    ):
        assert [name for _, name in questions(ast.parse(code), {"KiviCache"})] == ["KiviCache"]
    for code in (
        "cache: KiviCache = KiviCache(config, 1, 2)",
        "KiviCache.view(cache, [1])",
        "isinstance(cache, Kivi)",
    ):
        assert not list(questions(ast.parse(code), {"KiviCache"}))
