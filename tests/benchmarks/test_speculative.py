"""The benchmark of speculation at its smallest size: which texts count, what a record and
its figure hold.
"""

from __future__ import annotations

import importlib
import json
import re
from typing import Any

import pytest

from conftest import ROOT
from refllm.experiments import speculative_decoding
from refllm.measure.records import read


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as its program finds it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("speculative")


def test_loops_and_copies_are_told_by_their_8_grams(benchmark):
    fresh = list(range(40))
    loop = [1, 2, 3, 4] * 10
    assert not benchmark.loops(fresh)
    assert benchmark.loops(loop)
    assert benchmark.copied(fresh, fresh[10:30]) == 1.0
    assert benchmark.copied(fresh, [*fresh[:8], *range(100, 108)]) == pytest.approx(1 / 9)
    assert benchmark.copied(fresh, fresh[::-1]) == 0.0


def test_the_smallest_run_gives_a_record_and_a_figure(benchmark, monkeypatch, tmp_path, capsys):
    prompt = list(range(50, 90)) * 2

    def two_tasks(model, count, new):
        return {
            name: {"prompts": [prompt], "looked_at": 1, "copied": 0.5} for name in ("code", "copy")
        }

    monkeypatch.setattr(benchmark, "tasks", two_tasks)
    real = benchmark.verification
    monkeypatch.setattr(benchmark, "verification", lambda rounds: real(1, vocab=1000, gamma=2))
    result = tmp_path / "speculative.json"
    figure = tmp_path / "figure.json"
    arguments = [
        "--prompts",
        "1",
        "--new",
        "6",
        "--rounds",
        "1",
        "--gammas",
        "1",
        "2",
        "--temperatures",
        "0",
    ]
    assert (
        benchmark.main(
            [*arguments, "--batch", "1", "2", "--output", str(result), "--figure", str(figure)]
        )
        == 0
    )
    record = json.loads(result.read_text())
    assert record["benchmark"] == "speculative"
    assert {(r["task"], r["drafter"]) for r in record["results"]} == {
        (task, drafter)
        for task in ("code", "copy")
        for drafter in ("model", "n-gram", "tree", "n-gram, tree")
    }
    for r in record["results"]:
        assert 1 <= r["length"] <= r["gamma"] + 1
        assert r["rate"] <= r["alpha"] <= 1
        assert min(r["speedup"]["low"], r["formula"], r["flat"]) > 0
    assert [r["batch"] for r in record["batches"]] == [1, 2]
    printed = capsys.readouterr().out
    best = re.findall(
        r"^best on (\w+) with (.+): ([\d.]+)x .* at γ = (\d+), temperature 0.0 ",
        printed,
        re.MULTILINE,
    )
    asked = (
        ("code", ["model", "tree"]),
        ("code", ["n-gram, tree"]),
        ("copy", ["n-gram", "n-gram, tree"]),
    )
    for (task, drafters), (on, who, ratio, gamma) in zip(asked, best, strict=True):
        rows = {
            (r["drafter"], r["gamma"]): r["speedup"]["median"]
            for r in record["results"]
            if r["task"] == task and r["drafter"] in drafters
        }
        assert on == task
        assert rows[who, int(gamma)] == max(rows.values())  # whatever was fastest in this minute
        assert f"{max(rows.values()):.2f}" == ratio
    speculative_decoding.draw(read(figure).values)
