"""The judge of real schemas: what it counts; and a part of the real schemas, where they are."""

import json

import pytest
from maskbench import Case, data_folder, report, run_case, sample, spellings, suite

needs_data = pytest.mark.skipif(
    data_folder() is None, reason="needs the schemas: set REFLLM_SHARED_DATA to their folder"
)


def judged(schema, *instances):
    return run_case((Case("one", "hand-made", schema, instances), "refllm", True, True))


def test_right_is_compiled_and_judged_as_marked():
    schema = {"type": "array", "items": {"type": "integer"}}
    verdict = judged(schema, ([1, 2], True), (["a"], False), ({}, False))
    assert verdict.right
    assert (verdict.rejected, verdict.accepted, verdict.spellings) == ([], [], [])


def test_wrong_judgements_are_told_apart():
    schema = {"type": "array", "items": {"type": "integer"}}
    verdict = judged(schema, ([1], False), (["a"], True), ([], True))
    assert not verdict.right
    assert (verdict.rejected, verdict.accepted) == ([1], [0])


def test_a_schema_that_is_rejected_is_counted_by_its_keyword():
    verdict = judged({"items": {"type": "strng"}}, ([], True))
    assert (verdict.refused, verdict.right, verdict.crashed) == ("type", False, False)
    table = report([verdict, judged({"type": "null"}, (None, True))])
    assert "not compiled, by keyword: {'type': 1}" in table
    assert "right                  1  (50.00%)" in table


def test_a_fault_is_no_rejection(monkeypatch):
    monkeypatch.setitem(run_case.__globals__["JUDGES"], "refllm", lambda *_: 1 / 0)
    verdict = judged({}, (1, True))
    assert verdict.crashed
    assert not verdict.right


def test_all_spellings_are_of_one_value():
    value = {"é": [1, {"a": None}], "b": []}
    assert [json.loads(text) for text in spellings(value)] == [value] * 3
    assert len(set(spellings(value))) == 3


@needs_data
def test_real_schemas_are_right_or_rejected_by_name():
    cases = list(sample(data_folder()))[::40]
    verdicts = [run_case((case, "refllm", True, False)) for case in cases]
    wrong = [v.name for v in verdicts if v.crashed or v.rejected or v.accepted]
    assert wrong == []
    assert sum(v.right for v in verdicts) >= 0.93 * len(verdicts)


@needs_data
def test_groups_of_the_official_suite_are_right_or_rejected_by_name():
    verdicts = [run_case((case, "refllm", False, False)) for case in suite(data_folder())]
    assert [v.name for v in verdicts if v.crashed or v.rejected or v.accepted] == []
    rejected = {v.refused for v in verdicts if v.refused is not None}
    assert rejected == {"$ref", "$schema", "multipleOf", "?"}  # "?": unsatisfiable
    assert sum(v.right for v in verdicts) >= 0.9 * len(verdicts)
