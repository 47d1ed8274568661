"""``refllm eval``: what ``measure.perplexity`` measures, as a table and as JSON."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from command_line import TEXT, run, save_tiny_model, write_text
from refllm.api import load
from refllm.checkpoints.writer import save
from refllm.corpus import Document
from refllm.measure.comparison import compare
from refllm.measure.perplexity import evaluate
from tiny_models import byte_tokenizer, tiny_config, tiny_params


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "code.py")


def test_eval_prints_what_perplexity_measures(model, text_file):
    loaded = load(model, "numpy")
    score = evaluate(loaded, [Document("code.py", TEXT)], window=64, stride=32, max_tokens=300)
    options = ("--model", model, "--text", text_file, "--max-tokens", "300")
    facts = json.loads(run("eval", *options, "--json").stdout)
    assert facts["bits per byte"] == score.bits_per_byte
    assert facts["perplexity"] == pytest.approx(math.exp(facts["nats per token"]))
    assert (facts["tokens"], facts["bytes"], facts["window"], facts["stride"]) == (
        300,
        score.bytes,
        64,
        32,
    )
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    shown = run("eval", *options).stdout
    assert f"{score.bits_per_byte:.3f}" in shown
    assert "code.py" in shown
    assert facts["python"] in shown
    assert "the first 300 tokens of the given text" in shown
    assert "the first" not in run("eval", "--model", model, "--text", text_file).stdout
    assert "\x1b" not in shown


def test_eval_compares_with_a_reference(model, text_file, tmp_path):
    config = tiny_config(max_position_embeddings=64)
    save(
        tmp_path / "other",
        config,
        tiny_params(config, 1, "float32"),
        byte_tokenizer(),
        dtype="float32",
    )
    pair = load(tmp_path / "other", "numpy"), load(model, "numpy")
    rng = np.random.default_rng(3)
    expected = compare(*pair, [Document("code.py", TEXT)], rng=rng, window=32, stride=16)
    options = ("--model", tmp_path / "other", "--reference", model, "--text", text_file)
    facts = json.loads(run("eval", *options, "--window", "32", "--seed", "3", "--json").stdout)[
        "against"
    ]
    assert facts["KL"] == {
        "mean": expected.kl.mean,
        "low": expected.kl.low,
        "high": expected.kl.high,
    }
    assert facts["top-1 agreement"]["mean"] == expected.agreement.mean
    shown = run("eval", *options).stdout
    assert f"against {model}" in shown
    assert "bootstrap" in shown


def test_json_has_null_for_what_is_not_finite(model, text_file):
    """One block of tokens has no interval; -Infinity would be no JSON."""
    result = run(
        "eval",
        "--model",
        model,
        "--text",
        text_file,
        "--reference",
        model,
        "--max-tokens",
        "1",
        "--json",
    )
    facts = json.loads(result.stdout, parse_constant=pytest.fail)
    assert facts["against"]["KL"] == {"mean": 0.0, "low": None, "high": None}


def test_text_is_called_held_out_only_where_the_manifest_says_so(model, monkeypatch):
    """The bundled model's manifest lists the modules; a checkpoint from elsewhere has none."""
    module = Document("sched.py", "import time\n")
    monkeypatch.setattr("refllm.corpus.held_out_documents", lambda: [module])
    assert run("eval", "--model", "stdlib-draft").stdout.startswith(
        "stdlib-draft on the held-out modules, Python"
    )
    assert "no manifest says that they are held out" in run("eval", "--model", model).stdout
