"""The repository tells the truth about itself: links, versions, notebooks, and weights that
are never unpickled.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from test_floors import MODULES, PACKAGE, TREES

import refllm

ROOT = PACKAGE.parent
PAGES = sorted([*ROOT.glob("*.md"), *PACKAGE.glob("models/*/*.md")])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_point_at_files_that_exist(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    local = [
        t.split("#")[0] for t in targets if "://" not in t and not t.startswith(("#", "mailto:"))
    ]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "README.md"])
def test_paths_in_code_font_exist(name: str):
    page = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:refllm|tests|benchmarks|figures)/[\w/.]+)`", page)
    assert not [p for p in paths if "NAME" not in p and not (ROOT / p).exists()]


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.M)[1] == refllm.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["version"]["path"] == "refllm/__init__.py"
    assert "version" in project["project"]["dynamic"]


def test_the_changelog_has_a_place_for_what_is_new():
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_nothing_is_unpickled():
    found = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {m.split(".")[0] for m in modules} & {
                "pickle",
                "marshal",
                "shelve",
                "joblib",
                "dill",
                "torch",
            }:
                found.append(f"refllm/{MODULES[name].relative_to(PACKAGE)}:{node.lineno}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                found.append(f"refllm/{MODULES[name].relative_to(PACKAGE)}:{node.value.lineno}")
    assert not found, f"a weight file must not be able to run code: {found}"


def test_what_the_package_imports_is_what_it_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        re.match(r"[\w-]+", requirement)[0].replace("-", "_")
        for requirement in project["dependencies"]
    }
    imported = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {
                m.split(".")[0]: f"refllm/{MODULES[name].relative_to(PACKAGE)}:{node.lineno}"
                for m in modules
            }
    # the extras gpu, gpu-cuda13, hub and grammars
    optional = {"cupy", "cupyx", "huggingface_hub", "jsonschema"}
    third = {
        m: where
        for m, where in imported.items()
        if m not in sys.stdlib_module_names and m != "refllm"
    }
    assert not {m: where for m, where in third.items() if m not in declared | optional}, (
        "declare or drop these imports"
    )
    assert not declared - set(third), "declared, but nothing imports it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path: Path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not [
        c
        for c in cells
        if c["cell_type"] == "code" and (c["outputs"] or c["execution_count"] is not None)
    ]


def test_oracles_are_imported_by_the_helper_only():
    """``importorskip`` would hide a missing comparison from continuous integration."""
    optional = {"torch", "transformers", "accelerate", "compressed_tensors", "gguf", "llama_cpp"}
    found = []
    tests = ROOT / "tests"
    for path in sorted([*tests.glob("*.py"), *tests.rglob("test_*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip"):
                names += [a.value for a in node.args if isinstance(a, ast.Constant)]
            found += [
                f"{path.name}:{node.lineno}: {n}" for n in names if n.split(".")[0] in optional
            ]
    assert not found, "use oracle('…') from conftest: " + "; ".join(found)


def test_names_of_test_files_are_unique():
    """pytest imports test files by their names alone: a second one would not be collected."""
    names = [path.name for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
