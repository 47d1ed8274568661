"""What all tests share: Hypothesis profiles, the array libraries to run on, oracles and
the theorem table.

A data-plane test takes ``xp`` and runs once per array library::

    def test_softmax_sums_to_one(xp):
        x = xp.asarray(host_array)                 # move to the library's device
        assert to_host(softmax(x)).sum() == ...    # and back, with ``from conftest import to_host``

``xp`` is NumPy, the CPU stand-in for CuPy (``fakecupy``) and, with ``-m gpu``, CuPy itself;
``xp_kind`` is its name. ``pure_xp`` adds ``array_api_strict`` for modules of pure
mathematics. A test against a reference implementation is marked ``oracle`` and imports it
with ``oracle("torch")``. A test marked ``real`` loads ``"smollm2"``, and is skipped where
that is not installed. ``pytest --theorems`` lists what is checked.
"""

from __future__ import annotations

import os

# Set before NumPy is imported: on a busy machine two BLAS threads wait for each other longer
# than they compute.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib
import inspect
import re
import warnings
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import hypothesis
import numpy
import pytest

import fakecupy
from refllm import backend

ROOT = Path(__file__).resolve().parent.parent
REQUIRE_ORACLES = "REFLLM_REQUIRE_ORACLES"
REQUIRE_REAL = "REFLLM_REQUIRE_REAL"
to_host = backend.to_numpy  # tests read `to_host(x)`: copy to the host and compare there

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev")
)

# --- array libraries ----------------------------------------------------------------------

_LIBRARIES = ["numpy", "fakecupy", pytest.param("cupy", marks=pytest.mark.gpu)]


def _library(kind: str) -> ModuleType:
    if kind == "cupy":
        try:
            return backend.get("cupy")
        except backend.BackendUnavailable as error:
            pytest.skip(str(error))
    if kind == "array_api_strict":
        return pytest.importorskip("array_api_strict")
    return {"numpy": numpy, "fakecupy": fakecupy}[kind]


# Module scope, because Hypothesis rejects fixtures that are created for each test
# function.
@pytest.fixture(scope="module", params=_LIBRARIES)
def xp_kind(request: pytest.FixtureRequest) -> str:
    """The name of the array library that the test runs on."""
    return request.param


@pytest.fixture(scope="module")
def xp(xp_kind: str) -> ModuleType:
    """The array library that the test runs on: the dialect that NumPy and CuPy share."""
    return _library(xp_kind)


@pytest.fixture(scope="module", params=[*_LIBRARIES, "array_api_strict"])
def pure_xp(request: pytest.FixtureRequest) -> ModuleType:
    """As ``xp``, and the array-API standard's strict reference: for modules of pure
    mathematics.
    """
    return _library(request.param)


@pytest.fixture(scope="session")
def make_checkpoint() -> Any:
    """``make_checkpoint(config, path)``: a Hugging Face directory of random float32
    weights.
    """
    from networks import random_tensors
    from refllm.checkpoints.writer import save
    from tiny_models import byte_tokenizer

    def make(config: Any, path: Path) -> Path:
        save(path, config, random_tensors(config, 0, "float32"), byte_tokenizer(), dtype="float32")
        return path

    return make


# --- oracles ------------------------------------------------------------------------------

_running: list[pytest.Item] = []  # the item under way, for `oracle` to look at its marks


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.pop()


def oracle(name: str, install: str = "pip install 'refllm[oracles]'") -> ModuleType:
    """Import a reference implementation; skip the test with the install line where it is
    missing.

    Call it inside a test or a fixture. ``REFLLM_REQUIRE_ORACLES=1`` turns the skip into a
    failure, which is how continuous integration knows that every comparison was made.
    """
    if not any(
        _running[-1].get_closest_marker(mark) for mark in ("oracle", "llamacpp") if _running
    ):
        pytest.fail(
            "oracle() belongs inside a test marked @pytest.mark.oracle, or `make "
            "test-oracles` misses it"
        )
    try:
        with warnings.catch_warnings():
            # warnings of another library's import are not ours to fix
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get(REQUIRE_ORACLES) == "1":
            pytest.fail(
                f"{REQUIRE_ORACLES}=1 and the oracle {name} is missing ({error}): {install}"
            )
        pytest.skip(f"oracle {name} is missing: {install}")


# --- the real model -----------------------------------------------------------------------


@cache
def _real_model_missing() -> str:
    """Why ``"smollm2"`` cannot be loaded, with its install line; empty if it can."""
    from refllm.checkpoints.sources import locate
    from refllm.checkpoints.tensor_files import CheckpointError

    try:
        locate("smollm2")
    except CheckpointError as error:
        return str(error)
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``real`` where the model is not installed. ``REFLLM_REQUIRE_REAL=1``
    turns the skip into a failure.
    """
    if item.get_closest_marker("real") and (missing := _real_model_missing()):
        if os.environ.get(REQUIRE_REAL) == "1":
            pytest.fail(f"{REQUIRE_REAL}=1, and {missing}")
        pytest.skip(missing)


# --- theorems -----------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("theorems")
    group.addoption(
        "--theorems",
        action="store_true",
        help="print the theorems that the tests check; run nothing",
    )
    group.addoption(
        "--theorems-write", action="store_true", help="write them to THEOREMS.md; run nothing"
    )
    group.addoption(
        "--theorems-check", action="store_true", help="fail if THEOREMS.md is stale; run nothing"
    )


def theorem_rows(items: list[pytest.Item]) -> list[tuple[str, str, str, str]]:
    """(test file, test, statement, source) for each marker, one row a test function, in the
    order of the files.
    """
    # a dict keeps the order and drops the parametrised repeats
    rows: dict[tuple[str, str, str, str], None] = {}
    for item in sorted(items, key=lambda item: (item.path.as_posix(), item.location[1] or 0)):
        for mark in item.iter_markers("theorem"):
            if len(mark.args) != 1 or set(mark.kwargs) != {"source"}:
                raise pytest.UsageError(
                    f'{item.nodeid}: write @pytest.mark.theorem("statement", source="where from")'
                )
            test = getattr(item, "originalname", item.name)
            rows[
                item.path.relative_to(ROOT / "tests").as_posix(),
                test,
                mark.args[0],
                mark.kwargs["source"],
            ] = None
    return list(rows)


def theorem_page(rows: list[tuple[str, str, str, str]]) -> str:
    """THEOREMS.md as text."""
    lines = [
        "# What the tests check",
        "",
        "Generated from the tests' `theorem` markers by `make theorems`; `pytest "
        "--theorems` prints it.",
        "A statement about real numbers is checked in floating point within a derived "
        "tolerance, on inputs that",
        "Hypothesis draws; a statement about finite sets is checked by enumeration where "
        "the test says so.",
        "",
        f"{len(rows)} statements.",
    ]
    for file in dict.fromkeys(row[0] for row in rows):
        lines += [
            "",
            f"## [{file}](tests/{file})",
            "",
            "| statement | source | test |",
            "|---|---|---|",
        ]
        for _, test, statement, source in (row for row in rows if row[0] == file):
            cells = (" ".join(text.split()).replace("|", "\\|") for text in (statement, source))
            lines.append("| {} | {} | `{}` |".format(*cells, test))
    return "\n".join(lines) + "\n"


# What a test that asserts equality of floating-point results, bit for bit, says in its source.
_EQUALITY = re.compile(r"array_equal|tobytes\(|\.view\(|same_bits|bits\(|max_ulp|== 0\.0")


@cache
def _compares_bits(test: FunctionType) -> bool:
    return _EQUALITY.search(inspect.getsource(test)) is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the GPU's tests out unless they are asked for: a machine without one would skip
    a third of the suite. Mark the tests that compare bits, where those are asked for.
    """
    markers = config.option.markexpr or ""
    if "float_equality" in markers:
        for item in items:
            if isinstance(item, pytest.Function) and _compares_bits(item.function):
                item.add_marker("float_equality")
    if "gpu" in markers:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    option = session.config.option
    if not (option.theorems or option.theorems_write or option.theorems_check):
        return None  # the usual loop runs
    if session.testsfailed:
        raise session.Interrupted("a test file does not import: the table would be incomplete")
    page = theorem_page(theorem_rows(session.items))
    path = ROOT / "THEOREMS.md"
    if option.theorems:
        print("\n" + page)
    if option.theorems_check and (not path.exists() or path.read_text(encoding="utf-8") != page):
        raise pytest.UsageError("THEOREMS.md is stale: run `make theorems` and commit it")
    if option.theorems_write:
        path.write_text(page, encoding="utf-8")
    return True
