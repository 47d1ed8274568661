"""The long ways through the package stay short: a reader follows each in a few files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from conftest import ROOT

MOST_FILES = {"generate": 15, "drafter": 21, "engine": 30, "quantize": 42}


@pytest.fixture(scope="module")
def walk() -> ModuleType:
    spec = importlib.util.spec_from_file_location("walk", ROOT / "benchmarks" / "walk.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ways(walk: ModuleType) -> dict[str, object]:
    return walk.ways()


@pytest.mark.parametrize("way", MOST_FILES)
def test_a_way_runs_in_few_files(walk: ModuleType, ways: dict[str, object], way: str) -> None:
    ways[way]()  # what is imported or cached on the first run does not count
    called = walk.trace(ways[way])
    assert len(called) <= MOST_FILES[way], "\n".join(called)


def test_functions_count_where_they_are_called_and_bodies_do_not(
    walk: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.py").write_text(
        "class Body:\n    x = 1\n    def method(self):\n        return [y for y in (1, 2)]\n"
    )
    monkeypatch.setattr(walk, "PACKAGE", tmp_path)
    spec = importlib.util.spec_from_file_location("one", tmp_path / "one.py")
    one = importlib.util.module_from_spec(spec)
    assert walk.trace(lambda: spec.loader.exec_module(one)) == {}
    names = walk.trace(lambda: one.Body().method())["one.py"]
    assert {name for name in names if "<listcomp>" not in name} == {"Body.method"}
