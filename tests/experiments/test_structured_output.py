"""Structured output on the bundled model: which schemas are read, and what a grammar changes."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from chat_models import SPECIAL_TOKENS, TEMPLATES
from refllm import load
from refllm.checkpoints.chat_template import ChatTemplates
from refllm.decode import grammar as grammars
from refllm.experiments import structured_output as experiment
from refllm.serve.engine import Engine

MODEL = load("stdlib")
MODEL.chat_templates = ChatTemplates({"default": TEMPLATES["chatml"]}, SPECIAL_TOKENS)
FLAG = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}


def test_read_schemas_keeps_short_objects_and_arrays_that_compile(tmp_path):
    rows = [
        {"name": "scalar", "schema": {"type": "integer"}},
        {"name": "boolean", "schema": True},
        {"name": "long", "schema": FLAG | {"description": "x " * 9000}},
        {"name": "rejected", "schema": {"type": "object", "$ref": "#/nowhere"}},
        {"name": "kept", "schema": FLAG},
    ]
    path = tmp_path / "schemas.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    assert experiment.read_schemas(path, MODEL, 2) == [("kept", FLAG)]


@pytest.mark.parametrize(
    ("text", "whole", "value"),
    [
        ('so: {"a": 1}.', False, ({"a": 1},)),
        ("{broken [2]", False, ([2],)),
        ("none", False, None),
        ("[1]", True, ([1],)),
        ("[1] and", True, None),
        ("so [1]", True, None),
    ],
)
def test_the_first_value_of_a_text(text, whole, value):
    assert experiment.first_value(text, whole=whole) == value


def test_outputs_under_a_grammar_are_valid_and_jumps_save_tokens():
    pytest.importorskip("jsonschema")
    engine = Engine(MODEL, num_blocks=64)
    plain = experiment.run(engine, [("flag", FLAG)], "compact")
    jumping = experiment.run(engine, [("flag", FLAG)], "compact + jump")
    for row in (plain, jumping):
        assert (row["schemas"], row["valid"], row["unfinished"]) == (1, 1, 0)
    assert plain["jumped"] == 0 < jumping["jumped"] <= jumping["tokens"]


def test_a_walk_is_a_legal_text_and_its_mass_is_that_of_the_legal_tokens():
    steps = list(experiment.walk(MODEL))
    assert steps[-1]["token"] == "end"
    text = "".join(step["token"] for step in steps[:-1])
    assert set(json.loads(text)) == set(experiment.WALKED["properties"])
    grammar = grammars.compile(json_schema=experiment.WALKED, tokenizer=MODEL.tokenizer)
    assert steps[0]["legal"] == np.count_nonzero(grammar.mask(grammar.start))
    assert all(0 < step["mass"] <= 1 + 1e-9 for step in steps)
