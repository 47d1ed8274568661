"""How many threads a command takes, and that it gives them back."""

from __future__ import annotations

import math
import os

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from command_line import run, save_tiny_model, write_text
from refllm.cli import threads
from refllm.cli.threads import MOST, VARIABLES, free_cores, usable_cores


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of so many cores, with a load, running processes and a quota of one's choice."""

    def made(
        cores: int, load: float = 0.0, running: int = 1, affinity: int | None = None, cgroup=None
    ):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        usable = set(range(affinity or cores))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: usable, raising=False)
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
        (tmp_path / "loadavg").write_text(f"{load} 0.0 0.0 {running}/80 11206\n")
        monkeypatch.setattr(threads, "LOADAVG", tmp_path / "loadavg")
        monkeypatch.setattr(threads, "CPU_MAX", tmp_path / "cpu.max")
        monkeypatch.setattr(threads, "CFS", tmp_path)
        for name, text in (cgroup or {}).items():
            (tmp_path / name).write_text(text)
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)

    return made


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"cores": 2}, 2),
        ({"cores": 4, "load": 0.4}, 4),
        ({"cores": 4, "load": 0.6}, 3),
        ({"cores": 4, "load": 1.6}, 2),
        ({"cores": 4, "load": 30.0}, 1),  # never 0
        ({"cores": 4, "running": 4}, 1),  # a load that the average does not show yet
        ({"cores": 4, "running": 2}, 3),
        ({"cores": 4, "load": 2.0, "running": 1}, 2),  # the larger of both
        ({"cores": 64}, MOST),
        ({"cores": 64, "load": 30.0, "affinity": 3}, 3),
        (
            {"cores": 8, "cgroup": {"cpu.max": "250000 100000\n"}},
            2,
        ),  # whole cores: a thread on half of one is waited for
        ({"cores": 8, "cgroup": {"cpu.max": "max 100000\n"}}, 8),
        ({"cores": 8, "cgroup": {"cpu.max": "50000 100000\n"}}, 1),
        (
            {"cores": 8, "cgroup": {"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}},
            3,
        ),
        ({"cores": 8, "cgroup": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}}, 8),
        ({"cores": 8, "cgroup": {"cpu.max": "nonsense"}}, 8),
    ],
)
def test_free_cores_are_what_affinity_quota_and_load_leave(machine, facts, expected):
    machine(**facts)
    assert free_cores() == expected


def test_a_system_without_these_files_and_calls_has_its_cores(machine, monkeypatch, tmp_path):
    machine(4)
    (tmp_path / "loadavg").unlink()
    monkeypatch.delattr(os, "getloadavg")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert (free_cores(), usable_cores()) == (4, 4)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert (free_cores(), usable_cores()) == (1, 1)
    assert threads.container_quota() == math.inf


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "tiny")


@pytest.fixture
def seen(monkeypatch):
    """The threads of BLAS at the time when a command's model computes."""
    from refllm.api import Model

    found = []

    def spy(self, *arguments, original=Model._tokens, **options):
        found.append(blas())
        return original(self, *arguments, **options)

    monkeypatch.setattr(Model, "_tokens", spy)
    return found


def blas() -> int:
    return max(p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas")


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_command_computes_with_the_threads_it_is_told_and_says_so(model, seen, asked):
    with threadpool_limits(1, user_api="blas"):
        result = run("generate", "def", "--model", model, "-n", 3, "--threads", asked)
        assert seen == [asked]
        assert blas() == 1  # given back
    assert result.exit_code == 0
    words = "1 thread" if asked == 1 else f"{asked} threads"
    assert words in result.stderr


def test_by_default_a_command_takes_the_free_cores(model, seen, machine):
    machine(8, load=5.0)
    assert "3 threads" in run("generate", "def", "--model", model, "-n", 2).stderr
    assert seen == [3]


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_environment_decides_unless_an_option_does(
    model, seen, machine, monkeypatch, name
):
    machine(8)
    monkeypatch.setenv(name, "2")  # BLAS has read it when it was loaded
    with threadpool_limits(2, user_api="blas"):
        run("generate", "def", "--model", model, "-n", 2)
        run("generate", "def", "--model", model, "-n", 2, "--threads", 1)
    assert seen == [2, 1]


def test_zero_threads_are_rejected(model):
    result = run("generate", "def", "--model", model, "--threads", 0)
    assert result.exit_code == 2
    assert "--threads" in result.output


@pytest.mark.parametrize("command", ["generate", "eval", "quantize", "convert", "train"])
def test_every_command_that_computes_takes_threads(command):
    assert "--threads" in run(command, "--help").output


def test_verbose_names_the_kernels_and_who_chose_them(model, monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    quiet = run("generate", "def", "--model", model, "-n", 2, "--threads", 1).stderr
    result = run("--verbose", "generate", "def", "--model", model, "-n", 2, "--threads", 1)
    assert "OPENBLAS_CORETYPE=Haswell" in result.stderr
    assert "kernels" in result.stderr
    assert "CORETYPE" not in quiet
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    result = run("--verbose", "generate", "def", "--model", model, "-n", 2, "--threads", 1)
    assert "its own choice" in result.stderr


def test_the_time_and_threads_of_an_evaluation_are_in_its_summary(model, tmp_path):
    text = write_text(tmp_path / "code.py")
    result = run("eval", "--model", model, "--text", text, "--max-tokens", 50, "--threads", 1)
    assert result.exit_code == 0
    assert "50 tokens in" in result.stderr
    assert "1 thread" in result.stderr
