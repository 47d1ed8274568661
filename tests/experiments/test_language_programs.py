"""The three language programs on the bundled model: both ways give the same answers, and sharing
computes less.
"""

from __future__ import annotations

import json

import pytest

from refllm import load
from refllm.experiments import language_programs as experiment
from refllm.measure.records import Record

MODEL = load("stdlib")


@pytest.mark.parametrize("name", experiment.PROGRAMS)
def test_both_ways_answer_alike_and_sharing_computes_less(name, monkeypatch):
    monkeypatch.setattr(experiment, "TASKS", experiment.TASKS[:1])
    monkeypatch.setattr(experiment, "PEOPLE", experiment.PEOPLE[:2])
    questions = experiment.questions(4)
    monkeypatch.setattr(experiment, "questions", lambda: questions)
    row = experiment.measure(MODEL, name)
    assert row["same_answers"]
    assert row["shared"]["computed_tokens"] < row["naive"]["computed_tokens"]
    assert row["shared"]["forward_passes"] < row["naive"]["forward_passes"]
    assert row["naive"]["hit_rate"] == 0 < row["shared"]["hit_rate"]


def test_questions_have_one_right_topic_each():
    for question in experiment.questions(8):
        assert len(question["topics"]) == len(set(question["topics"])) == 4
        assert question["right"] in question["topics"]
        assert question["sentence"]


def test_extracted_facts_satisfy_the_schema():
    with experiment.Runtime(MODEL) as runtime:
        state = experiment.extract.run(runtime, text=experiment.PEOPLE[0])
    assert set(state.returned) == {"name", "age", "city"}
    assert 0 <= state.returned["age"] <= 120
    assert len(state.returned["name"]) <= 24


def test_the_record_is_written_and_drawn(tmp_path, monkeypatch):
    counts = {"computed_tokens": 10, "forward_passes": 2}
    row = {"program": "x", "shared": counts, "naive": {k: 4 * v for k, v in counts.items()}}
    monkeypatch.setattr(experiment, "measure", lambda model, name: row | {"program": name})
    path = tmp_path / "record.json"
    assert experiment.main(["--model", "stdlib-draft", "--output", str(path)]) == 0
    record = Record(**json.loads(path.read_text("utf-8")))
    figure = experiment.draw(record.values)
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == 6 * ["25 %"]
