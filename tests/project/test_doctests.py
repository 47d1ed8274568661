"""The examples in the docstrings of the package run and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import numpy
import pytest

import refllm

PACKAGE = Path(refllm.__file__).resolve().parent
MODULES = sorted(
    ".".join(("refllm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def examples(name: str) -> list[doctest.DocTest]:
    """The docstrings of a module that hold examples; none if it needs a missing package."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "refllm").split(".")[0] == "refllm":
            raise
        return []
    # as in NumPy's own docstrings, np need not be imported
    found = doctest.DocTestFinder().find(module, name, extraglobs={"np": numpy})
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_print_what_they_say(name: str) -> None:
    runner = doctest.DocTestRunner(verbose=False)
    printed: list[str] = []
    for test in examples(name):
        runner.run(test, out=printed.append)
    assert not runner.failures, "".join(printed)


def test_the_package_has_examples() -> None:
    assert sum(len(test.examples) for name in MODULES for test in examples(name)) >= 1
