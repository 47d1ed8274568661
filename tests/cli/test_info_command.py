"""``refllm info``: sizes, the manifest, the bundled models' records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from command_line import run, save_tiny_model
from gguf_files import make
from refllm.checkpoints import weight_storage
from refllm.checkpoints.writer import file_sha256
from refllm.cli.simulate_setup import model_config
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
        "tensors": {"float32": 21},
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
        "pre": None,
        "tokens": 257,
        "begin": "<|endoftext|>",
        "begins text": True,
        "end": ["<|endoftext|>"],
    }
    text = run("info", "--model", model).stdout
    for part in (
        "tiny",
        f"{config.num_parameters:,}",
        "float32",
        "32.00 bits",
        "loaded as      float32 weights",
        "base 10,000, no scaling",
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


# --- names, runs, and what is unusual -----------------------------------------------------


def facts_of(*arguments: str | Path) -> dict:
    result = run("info", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_model_is_named_by_position_or_by_option():
    assert facts_of("stdlib-draft") == facts_of("--model", "stdlib-draft")
    assert facts_of() == facts_of("stdlib")
    both = run("info", "stdlib", "--model", "stdlib-draft")
    assert both.exit_code == 2
    assert "name one model" in both.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["info", ""], "a model is named by a string or a path, got an empty one"),
        (["info", "--model", ""], "a model is named by a string or a path, got an empty one"),
        (["info", "Stdlb"], "did you mean 'stdlib'?"),
        (["generate", "x", "--model", "smolm2"], "did you mean 'smollm2'?"),
        (["simulate", "--model", "lama-8b"], "did you mean 'llama-8b'?"),
        (["genrate"], "Did you mean 'generate'?"),
        (["simulate", "--device", "h20"], "did you mean 'h200'?"),
        (["simulate", "--traffic", "sharegtp", "--requests", "1"], "did you mean 'sharegpt'?"),
        (["simulate", "--policy", "fcsf", "--requests", "1"], "did you mean 'fcfs'?"),
        (["convert", "--to", "x.gguf", "--type", "Q4_KM"], "did you mean 'Q4_K_M'?"),
        (["quantize", "--method", "gtpq", "--output", "x"], "did you mean 'gptq'?"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not list(tmp_path.iterdir())


def test_all_training_runs_are_told():
    """The record nests each run in the one that began from its weights."""
    facts = facts_of("stdlib")
    steps = []
    training = facts["card"]["training"]
    while training is not None:
        steps.append(training["steps"])
        training = (training.get("start") or {}).get("training")
    runs = facts["training runs"]
    assert [r["steps"] for r in runs] == steps[::-1]
    assert len(runs) > 1
    text = run("info", "stdlib").stdout
    assert f"{len(runs)} runs of " in text
    assert f"{sum(r['tokens'] for r in runs):,} tokens" in text
    assert "runs of" not in run("info", "stdlib-draft").stdout


def test_weights_says_how_they_would_be_held(tmp_path, monkeypatch):
    path = make(tmp_path / "x.gguf", WIDE, "Q4_K")
    assert facts_of(path)["loaded as"].startswith("float32 weights, decoded from Q4_K, ")
    stored = facts_of(path, "--weights", "stored")
    assert stored["loaded as"].startswith("weights stored as Q4_K, ")
    monkeypatch.setattr(weight_storage, "free_memory", lambda xp: 1000)
    tight = facts_of(path)["loaded as"]
    assert tight.startswith("not here: its weights stored as Q4_K need ")
    assert str(path) not in tight


WIDE = ModelConfig("llama", 300, 256, 512, 2, 4, 2, 64, bos_token_id=0, eos_token_ids=(0,))


def test_a_gguf_file_is_described(tmp_path):
    path = make(
        tmp_path / "x.gguf",
        WIDE,
        "Q6_K",
        metadata={
            "general.name": "Mine",
            "general.file_type": np.uint32(18),
            "tokenizer.chat_template": "\n{{ bos_token }}\n{% for m in messages %}{% endfor %}",
        },
    )
    facts = facts_of(path)
    matrices = 2 + 2 * 7
    norms = 1 + 2 * 2
    nbytes = (
        round(
            sum(
                rows * columns
                for rows, columns in [(300, 256), (300, 256)]
                + 2
                * [
                    (256, 256),
                    (128, 256),
                    (128, 256),
                    (256, 256),
                    (512, 256),
                    (512, 256),
                    (256, 512),
                ]
            )
            * 6.5625
            / 8
        )
        + 4 * 256 * norms
    )
    assert facts["model"] == "Mine"
    assert ModelConfig.from_hf(facts["config"]) == WIDE
    assert facts["weights"] == {
        "tensors": {"Q6_K": matrices, "F32": norms},
        "bytes": nbytes,
        "bits per weight": 8 * nbytes / WIDE.num_parameters,
        "quantised": "Q6_K",
    }
    assert facts["tokenizer"]["pre"] == "gpt-2"
    assert facts["chat template"] == {"names": ["default"], "first line": "{{ bos_token }}"}
    assert facts["unusual"] == []
    assert [f["name"] for f in facts["files"]] == ["x.gguf"]
    text = run("info", path).stdout
    for part in ("16 Q6_K, 5 F32", "words gpt-2", "{{ bos_token }}", "Q6_K"):
        assert part in text
    assert run("info", path, "--verify").stdout.count(file_sha256(path)[:16]) == 1


def test_a_directorys_chat_template_and_rope_scaling_are_shown(model, tmp_path):
    path = shutil.copytree(model, tmp_path / "m")
    (path / "chat_template.jinja").write_text("{# chat #}\n{{ messages }}")
    config = json.loads((path / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    (path / "config.json").write_text(json.dumps(config))
    facts = facts_of(path)
    assert facts["chat template"]["first line"] == "{# chat #}"
    assert facts["RoPE"] == {"base": 10000.0, "scaling": "linear: factor 4, attention_factor 1"}


def test_what_is_unusual_about_a_gguf_file_is_said(tmp_path):
    narrow = ModelConfig("llama", 300, 64, 96, 1, 4, 2, 16, bos_token_id=0, eos_token_ids=(0,))
    path = make(
        tmp_path / "x.gguf",
        narrow,
        "Q5_0",
        metadata={"general.file_type": np.uint32(15), "tokenizer.ggml.eos_token_id": None},
    )
    found = facts_of(path)["unusual"]
    fallen = "tensors fell back to Q5_0: blocks of 256 do not divide their rows of"
    assert f"8 {fallen} 64" in found
    assert f"1 {fallen} 96" in found
    assert any("general.file_type says Q4_K_M, and no tensor has the type Q4_K" in s for s in found)
    assert "generation also ends at <|endoftext|>: recognised by the spelling" in found
    assert "unusual 2" in run("info", path).stdout
    plain = make(tmp_path / "y.gguf", narrow, "Q5_0", metadata={})
    assert facts_of(plain)["unusual"] == []


def test_what_is_unusual_about_a_directory_is_said(model, tmp_path):
    path = shutil.copytree(model, tmp_path / "m")
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert facts_of(path)["unusual"] == [
        "config.json names the end token 0, generation_config.json [0, 7]: the latter is used, "
        "as in transformers"
    ]
    (path / "generation_config.json").write_text('{"eos_token_id": [0]}')
    assert facts_of(path)["unusual"] == []
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    added = {
        "id": 257,
        "content": "<pad>",
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    tokenizer["added_tokens"].append(added)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert facts_of(path)["unusual"] == [
        "the tokenizer has 1 more ids than the embedding has rows: they are rejected where they "
        "are used"
    ]
    (path / "generation_config.json").write_text('{"eos_token_id": [9999]}')
    assert "the end token 9999 is none of the tokenizer's" in facts_of(path)["unusual"]
    (path / "tokenizer.json").unlink()
    facts = facts_of(path)
    assert facts["tokenizer"] is None
    assert "no tokenizer that refllm reads: token ids in, token ids out" in facts["unusual"]
    assert "tokenizer      none" in run("info", path).stdout


def test_simulate_takes_the_shape_of_a_gguf_file(tmp_path):
    path = make(tmp_path / "x.gguf", WIDE, "Q4_K")
    assert model_config(str(path)) == WIDE
    assert run("simulate", "--model", path, "--requests", "2").exit_code == 0


@pytest.mark.real
def test_smollm2_is_described():
    facts = json.loads(run("info", "smollm2", "--json").stdout)
    assert facts["files"][0]["state"] == "recorded"
    verified = json.loads(run("info", "smollm2", "--verify", "--json").stdout)
    assert verified["files"][0]["state"] == "verified"
    assert facts["weights"]["tensors"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert facts["tokenizer"]["pre"] == "smollm"
    assert facts["tokenizer"]["end"] == ["<|im_end|>", "<|endoftext|>", "<reponame>"]
    assert facts["chat template"]["names"] == ["default"]
