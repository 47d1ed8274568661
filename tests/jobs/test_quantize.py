"""``refllm quantize``: from a directory to a directory, killed and resumed, and what is
rejected at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import ml_dtypes  # noqa: F401 (bfloat16 for safetensors' NumPy reader)
import numpy as np
import pytest

from networks import VOCAB, random_tensors, tokenizer
from refllm.api import load
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.writer import save
from refllm.cli import app
from refllm.cli.quantize import scheme_for
from refllm.corpus import Document
from refllm.formats.fp8_linear import Fp8Linear
from refllm.formats.quantized_linear import QuantizedLinear
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear
from refllm.jobs.quantize import prepare
from refllm.jobs.quantize import run as run_job
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS
from refllm.quant import layer_io
from refllm.quant.recipe import METHODS

LAYERS = 6
CONFIG = ModelConfig(
    "llama", VOCAB, 64, 96, LAYERS, 4, 2, 16, max_position_embeddings=64, eos_token_ids=(0,)
)
TEXT = [Document("own", "def f(x):\n    return x + 1\n" * 40)]
SMALL = {"texts": TEXT, "samples": 4, "length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantizing") / "m"
    save(path, CONFIG, random_tensors(CONFIG, 0, "float32"), tokenizer(), dtype="float16")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def scheme(method: str) -> Scheme:
    return scheme_for(
        method, None, {"fp8": 0, "smoothquant": None, "int8": None}.get(method, 32), None
    )


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr("refllm.cli.quantize.keep_freed_memory", lambda: None)

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            app([str(word) for word in words])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def rejected(run, *words: object) -> str:
    """The message of a command that ends with exit code 2: one line."""
    code, out, err = run("quantize", *words)
    assert code == 2, err
    assert not out
    lines = err.splitlines()
    assert lines[-1].startswith("Error: ")
    return lines[-1]


# --- what comes out -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_from_files_to_files(model, tmp_path, method):
    seen = []
    job = prepare(model, tmp_path / "q", method, scheme(method), **SMALL)
    record = run_job(
        job,
        measure=200,
        progress=lambda *row: seen.append(row),
        measuring=lambda *at: seen.append(at),
    )
    # no folder of layers, nothing half-written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q"]
    read = load(os.fspath(tmp_path / "q"), weights="stored")
    kind = {"smoothquant": W8A8Linear, "fp8": Fp8Linear}.get(method, QuantizedLinear)
    assert all(isinstance(layer["down_proj"], kind) for layer in read.weights["layers"])
    assert (tmp_path / "q" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "q" / "quantization.json").read_text())["tensors"] == json.loads(
        json.dumps(record["tensors"])
    )
    assert record["bits per weight"] == pytest.approx(
        8 * sum(t["nbytes"] for t in record["tensors"]) / record["quantised weights"]
    )
    files = {
        what: sum(p.stat().st_size for p in path.glob("*.safetensors"))
        for what, path in (("model", tmp_path / "q"), ("model before", model))
    }
    assert {key: record["bytes"][key] for key in files} == files
    if method != "int8":  # whose scales take four bytes in memory and two in the file
        held = sum(layer[key].nbytes for layer in read.weights["layers"] for key in PROJECTIONS)
        assert record["bytes"]["quantised weights"] == held
    score = record["bits per byte"]
    assert abs(score["after"] / score["before"] - 1) < 0.5
    assert score["tokens"] == 200
    assert [row[0] for row in seen if row[0] in ("before", "after")]
    assert sum(1 for row in seen if row[0] not in ("before", "after")) == 7 * LAYERS


def test_the_table_the_totals_and_the_commands_that_read_the_result(model, tmp_path, run):
    text = tmp_path / "text.py"
    text.write_text(TEXT[0].text)
    words = (
        "-m",
        model,
        "-o",
        tmp_path / "q",
        "--method",
        "gptq",
        "--group-size",
        32,
        "--text",
        text,
        "--samples",
        4,
        "--length",
        32,
        "--max-tokens",
        200,
    )
    code, out, err = run("quantize", *words)
    assert code == 0, err
    rows = [line.split() for line in err.splitlines()]
    assert [row[0] for row in rows if len(row) == 5 and row[0].isdigit()] == [
        str(i) for i in range(LAYERS)
    ]
    assert "4.500 bits" in out  # 4 + 16/32
    assert "bits per byte" in out
    for name, *more in (
        ["info"],
        ["eval", "--max-tokens", "100", "--text", text],
        ["generate", "d", "--max-tokens", 3],
    ):
        code, out, err = run(name, *more, "--model", tmp_path / "q")
        assert code == 0, err
        assert name != "info" or "pack-quantized, 4 bits, groups of 32" in out
    assert "exists already" in rejected(run, *words)


# --- killed -------------------------------------------------------------------------------


@pytest.mark.theorem(
    "A process killed between two layers continues when it is started again: finished "
    "layers are not recomputed, and the result is that of an uninterrupted run, byte for "
    "byte",
    source="ARCHITECTURE.md",
)
@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_a_killed_process_continues_where_it_was(model, tmp_path, run):
    words = (
        "-m",
        model,
        "--method",
        "gptq",
        "--group-size",
        16,
        "--samples",
        16,
        "--length",
        64,
        "--no-evaluate",
    )
    work = tmp_path / "q.quantizing"
    output = tmp_path / "q"
    program = f"""
import sys
from refllm.cli import app
from refllm.quant.layer_io import LayerFiles
put = LayerFiles.put
def put_and_print(self, index, *rest):
    put(self, index, *rest)
    print("stored", index, flush=True)
    if index == 1:
        sys.stdin.read()  # until it is killed
LayerFiles.put = put_and_print
app({["quantize", *map(str, words), "-o", str(output)]!r})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        while process.stdout.readline().strip() not in ("stored 1", ""):
            pass
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    records = {path.name: path.read_text() for path in sorted(work.glob("layer-*.json"))}
    assert 2 <= len(records) < LAYERS
    assert not output.exists()
    code, out, err = run("quantize", *words, "-o", output, "--json")
    assert code == 0, err
    rows = json.loads(out)["tensors"]
    kept = [row for text in records.values() for row in json.loads(text)["rows"]]
    # not done again
    assert [row["seconds"] for row in rows[: len(kept)]] == [row["seconds"] for row in kept]
    assert not work.exists()
    assert run("quantize", *words, "-o", tmp_path / "whole")[0] == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_that_dies_while_it_is_measured_keeps_its_layers_and_leaves_no_output(
    model, tmp_path
):
    job = prepare(model, tmp_path / "q", "rtn", scheme("rtn"))

    def dies(what, done, total):
        if what == "after":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, measure=100, measuring=dies)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.quantizing"]
    rows = []
    run_job(job, measure=None, progress=lambda *row: rows.append(row))
    assert (tmp_path / "q" / "config.json").is_file()


def test_one_layer_is_read_at_a_time(model, tmp_path, monkeypatch):
    """What is asked of the source: each layer once, in order; embeddings only by rows."""
    asked = []
    layer = layer_io.CheckpointSource.layer
    monkeypatch.setattr(
        layer_io.CheckpointSource,
        "layer",
        lambda self, index: asked.append(index) or layer(self, index),
    )
    run_job(prepare(model, tmp_path / "q", "gptq", scheme("gptq"), **SMALL), measure=None)
    assert asked == list(range(LAYERS))


# --- rejected -----------------------------------------------------------------------------


def test_bad_input_ends_in_one_sentence(model, tmp_path, run):
    """As a user sees it; all others below, faster."""
    sentence = rejected(run, "-m", model, "-o", tmp_path / "q", "--method", "best")
    assert "unknown method 'best'; choose one of rtn, gptq, awq, smoothquant, int8, fp8" in sentence
    broken = tmp_path / "broken"
    tensors = random_tensors(CONFIG, 0, "float32")
    save(broken, CONFIG, tensors, tokenizer(), dtype="float32")
    raw = bytearray((broken / "model.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    begin = json.loads(raw[8 : 8 + length])["model.layers.3.mlp.up_proj.weight"]["data_offsets"][0]
    raw[8 + length + begin : 12 + length + begin] = np.float32(np.nan).tobytes()
    (broken / "model.safetensors").write_bytes(bytes(raw))
    sentence = rejected(
        run, "-m", broken, "-o", tmp_path / "q", "--group-size", 32, "--no-evaluate"
    )
    assert "model.layers.3.mlp.up_proj" in sentence
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("method", "given", "more", "sentence"),
    [
        (
            "rtn",
            {"group_size": 40},
            {},
            "q_proj.*groups of 40 do not divide a row of 64: the nearest",
        ),
        (
            "gptq",
            {"group_size": 32},
            {"samples": 1},
            "1 windows of 32 tokens are too few for inputs of 96 columns: gptq needs at least 3",
        ),
        (
            "awq",
            {"group_size": 32},
            {"texts": [Document("x", "def")]},
            "the text has . tokens, too few for a",
        ),
        (
            "awq",
            {"group_size": 32},
            {"length": 65},
            "windows of 65 tokens are longer than the model's 64 positions",
        ),
        (
            "rtn",
            {"group_size": 32, "bits": 3},
            {"layout": "awq"},
            "awq cannot hold 3-bit .*; what can: pack-quantized",
        ),
        (
            "rtn",
            {"group_size": 32},
            {"dtype": "int4"},
            "dtype 'int4' is not stored; choose one of float16",
        ),
        (
            "rtn",
            {"group_size": 32},
            {"damp": 0.1},
            "rtn has no option 'damp'; its options are scale_dtype",
        ),
        ("smoothquant", {"bits": 4}, {}, "int-quantized cannot hold 4-bit weights"),
        ("smoothquant", {}, {"keep": ("x_proj",)}, "no projection is called x_proj"),
        ("int8", {"bits": 4}, {}, "int8 has one scheme"),
        (
            "fp8",
            {},
            {},
            "whole tiles of 128, which do not divide its 64 columns; fp8 takes any shape",
        ),
        (
            "fp8",
            {"group_size": 0},
            {"layout": "fp8"},
            "fp8 holds e4m3 in square blocks, not e4m3 by channel",
        ),
        (
            "fp8",
            {},
            {"layout": "pack-quantized"},
            "pack-quantized cannot hold 8-bit floats; what can: float-quantized",
        ),
        ("fp8", {"bits": 4}, {}, "fp8 takes 8 bits"),
    ],
)
def test_what_would_fail_later_is_rejected_before_anything_is_written(
    model, tmp_path, method, given, more, sentence
):
    asked = {"bits": None, "group_size": None, "symmetric": None} | given
    with pytest.raises(ValueError, match=sentence):
        prepare(model, tmp_path / "q", method, scheme_for(method, **asked), **SMALL | more)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_taken_is_not_touched(model, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "letter").write_text("dear")
    for overwrite, sentence in (
        (False, "exists already: choose another --output"),
        (True, "holds no config.json"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            prepare(model, tmp_path / "q", "rtn", scheme("rtn"), overwrite=overwrite)
    assert (tmp_path / "q" / "letter").read_text() == "dear"


def test_what_is_quantised_already_is_rejected(model, tmp_path):
    run_job(prepare(model, tmp_path / "q", "rtn", scheme("rtn")), measure=None)
    with pytest.raises(
        CheckpointError, match="is quantised already: start from the model that it was made from"
    ):
        run_job(prepare(tmp_path / "q", tmp_path / "r", "rtn", scheme("rtn")), measure=None)


def test_schemes_are_the_methods_own_with_what_was_asked_for():
    assert scheme_for("gptq", None, None, None) == Scheme(4, "half_integer", "group", 128)
    assert scheme_for("rtn", 3, 0, None) == Scheme(3, "half_integer", "channel")
    assert scheme_for("rtn", 3, -1, False) == Scheme(3, "asymmetric", "channel")
    assert scheme_for("awq", None, None, None) == Scheme(4, "awq", "group", 128)
    assert scheme_for("rtn", 1, 32, False).bits == 1
    with pytest.raises(ValueError, match="no other level than 0: take --bits 2, or --asymmetric"):
        scheme_for("rtn", 1, 32, None)
    assert scheme_for("awq", None, 64, True) == Scheme(4, "half_integer", "group", 64)
    assert scheme_for("smoothquant", None, None, True) == Scheme(8, "restricted", "channel")
    assert scheme_for("fp8", None, None, None) == Scheme(8, "restricted", "block", 128)
    with pytest.raises(ValueError, match="fp8 has no zero points"):
        scheme_for("fp8", None, None, False)
    with pytest.raises(ValueError, match="unknown method 'nope'"):
        scheme_for("nope", None, None, None)
