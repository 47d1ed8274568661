"""docs/requests.md names every field of a request and of its result, and tests that exist."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from conftest import ROOT
from refllm.decode.completion import CompletionOutput
from refllm.decode.output_params import OutputParams
from refllm.decode.sampling_params import SamplingParams
from refllm.serve.outputs import RequestOutput
from refllm.serve.request import Request

PAGE = (ROOT / "docs" / "requests.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ")]
NAMED = {name for row in ROWS for name in re.findall(r"`(\w+)`", row)}
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize(
    "record", [Request, SamplingParams, OutputParams, CompletionOutput, RequestOutput]
)
def test_every_field_has_a_row(record):
    assert {field.name for field in fields(record)} <= NAMED


def test_every_row_names_a_test_that_exists():
    found = [re.findall(r"`(test_\w+)`", row) for row in ROWS if "test |" not in row]
    assert all(found), "a row without a test"
    assert {name for names in found for name in names} <= TESTS
