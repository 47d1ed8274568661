"""``refllm info``: sizes, the manifest, the bundled models' records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from command_line import run, save_tiny_model
from refllm.checkpoints.writer import file_sha256
from refllm.model.config import ModelConfig
from tiny_models import tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "tiny")


def test_info_states_the_sizes(model):
    facts = json.loads(run("info", "--model", model, "--json").stdout)
    config = tiny_config(max_position_embeddings=64)
    assert ModelConfig.from_hf(facts["config"]) == config
    assert facts["parameters"] == config.num_parameters
    assert facts["weights"] == {
        "types": ["float32"],
        "bytes": 4 * config.num_parameters,
        "bits per weight": 32.0,
        "quantised": None,
    }
    assert facts["KV cache bytes per token"] == {
        "float16": 2 * 2 * 2 * 4 * 2,
        "float32": 2 * 2 * 2 * 4 * 4,
    }
    assert facts["tokenizer"] == {
        "kind": "BPE",
        "tokens": 257,
        "begin": "<|endoftext|>",
        "end": ["<|endoftext|>"],
    }
    text = run("info", "--model", model).stdout
    for part in (
        "tiny",
        f"{config.num_parameters:,}",
        "float32",
        "32.00 bits",
        "<|endoftext|>",
        "model.safetensors",
    ):
        assert part in text
    assert "\x1b" not in text


def test_info_verifies_the_manifest(model, tmp_path):
    (tmp_path / "copy").mkdir()
    for file in model.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    good = json.loads(run("info", "--model", tmp_path / "copy", "--verify", "--json").stdout)
    assert {f["state"] for f in good["files"]} == {"not recorded"}
    recorded = {f.name: {"sha256": file_sha256(f)} for f in model.iterdir()} | {
        "lost.txt": {"sha256": "0" * 64}
    }
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps({"files": recorded}))
    with (tmp_path / "copy" / "generation_config.json").open("a") as file:
        file.write(" ")
    # a file is missing: no hash is needed to see that
    assert run("info", "--model", tmp_path / "copy").exit_code == 1
    result = run("info", "--model", tmp_path / "copy", "--verify", "--json")
    assert result.exit_code == 1
    states = {f["name"]: f["state"] for f in json.loads(result.stdout)["files"]}
    assert states.pop("generation_config.json") == "differs"
    assert states.pop("lost.txt") == "missing"
    assert states.pop("manifest.json") == "the record"
    assert set(states.values()) == {"verified"}


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("manifest.json", '{"files": 5}', 2, "is no manifest"),
        ("manifest.json", '{"files": {"x": 5}}', 2, "is no manifest"),
        ("manifest.json", '{"files": {"config.json": {"sha256": 5}}}', 1, "differs"),
        ("card.json", '{"data": 5}', 0, "no training record of refllm's"),
    ],
)
def test_files_of_another_tool_are_no_bug(model, tmp_path, name, content, code, message):
    path = shutil.copytree(model, tmp_path / "copy")
    (path / name).write_text(content)
    result = run("info", "--model", path, "--verify")
    assert result.exit_code == code
    assert message in result.output


def bundled_facts(name: str) -> dict:
    return json.loads(run("info", "--model", name, "--verify", "--json").stdout)


@pytest.mark.parametrize("name", ["stdlib", "stdlib-draft"])
def test_bundled_models_have_a_record_and_the_files_that_it_names(name):
    facts = bundled_facts(name)
    assert {f["state"] for f in facts["files"] if f["name"] != "manifest.json"} == {"verified"}
    assert facts["card"]["name"] == name


@pytest.mark.parametrize(("name", "bits"), [("stdlib", 1.05), ("stdlib-draft", 1.5)])
def test_bundled_models_predict_no_worse_than_when_they_were_bundled(name, bits):
    assert bundled_facts(name)["card"]["measured"]["bits per byte"] <= bits


def test_most_of_the_short_samples_of_the_bundled_model_tokenize():
    """Real files cut at the same lengths tokenize in four cases of five: a cut may fall
    inside brackets.
    """
    samples = bundled_facts("stdlib")["card"]["measured"]["samples"]
    assert samples["by length"][0]["share"] >= 0.6
