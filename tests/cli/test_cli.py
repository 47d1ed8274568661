"""The command line: results on stdout, one sentence and exit code 2 for bad input."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

import refllm
from conftest import ROOT
from refllm import backend
from refllm.api import Model, load
from refllm.checkpoints.loading import bundled
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.writer import file_sha256, save
from refllm.cli import app
from refllm.cli.generate import read_prompt
from refllm.cli.main import explain
from refllm.cli.simulate import _digits
from refllm.corpus import Document
from refllm.decode.sampling_params import SamplingParams
from refllm.jobs import train
from refllm.jobs.train_options import TrainingOptions
from refllm.kv.kivi import Kivi
from refllm.kv.kivi_attend import KiviAttend
from refllm.kv.sparse import h2o, recent_only, snapkv, streaming, tova
from refllm.measure.comparison import compare
from refllm.measure.memory import human
from refllm.measure.perplexity import evaluate
from refllm.model.config import ModelConfig
from refllm.model.weights import Dense
from refllm.terminal import TABLE_WIDTH, format_bytes, printable, table
from refllm.train import data
from refllm.train.data import Data, standard_library
from refllm.train.schedule import Phase
from tiny_models import byte_tokenizer, tiny_config, tiny_params

COMMANDS = ("tour", "info", "generate", "eval", "train", "quantize", "simulate", "figures")
TEXT = "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(40))


def run(*args: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], input=stdin)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny"
    config = tiny_config(max_position_embeddings=64)
    save(path, config, tiny_params(config, 0, "float32"), byte_tokenizer(), dtype="float32")
    return path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "code.py"
    path.write_text(TEXT, encoding="utf-8")
    return path


# --- help and start -----------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_backend_and_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"refllm {command}" in result.output.replace(f"Usage: refllm {command}", "")
    assert "--backend numpy|cupy" in result.output


def test_without_a_command_there_is_help():
    result = run()
    assert result.exit_code == 0
    assert all(f"\n  {command}" in result.output for command in COMMANDS)
    assert run("--version").output == f"refllm {refllm.__version__}\n"


def test_help_imports_nothing_heavy():
    """It takes a fifth of a second; an import of the tokenizers or of matplotlib would
    double that.
    """
    heavy = (
        "tokenizers",
        "safetensors",
        "matplotlib",
        "ml_dtypes",
        "cupy",
        "refllm.api",
        "refllm.model.llama",
    )
    code = f"import sys, refllm.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"


# --- bad input ----------------------------------------------------------------------------


def bad_commands() -> list[tuple[str, str]]:
    return [
        ("nonsense", "No such command"),
        ("info --nonsense", "No such option"),
        ("info --model NOWHERE", "neither a folder nor a bundled model"),
        ("info --model TEXT", "is a file"),
        ("info --model EMPTY", "no config.json"),
        ("info --model MODEL --backend torch", "unknown backend 'torch'"),
        ("generate --model MODEL", "give one prompt"),
        ("generate x --prompt-file TEXT --model MODEL", "give one prompt"),
        ("generate --prompt-file NOWHERE --model MODEL", "No such file"),
        ("generate --prompt-file BINARY --model MODEL", "not UTF-8"),
        ("generate x --model NOWHERE", "neither a folder"),
        ("generate x --model MODEL --temperature -1", "temperature"),
        ("generate x --model MODEL --temperature hot", "temperature"),
        ("generate x --model MODEL --top-p 0", "top_p"),
        ("generate x --model MODEL --max-tokens 1000", "exceeds the model's 64 positions"),
        ("generate x --model MODEL --max-tokens -1", "max-tokens"),
        ("generate x --model MODEL --stop=", "stop"),
        ("eval --model MODEL --text NOWHERE", "No such file"),
        ("eval --model MODEL --text BINARY", "not UTF-8"),
        ("eval --model MODEL --text EMPTY", "no text was found"),
        ("eval --model MODEL --text TEXT --window 8 --stride 9", "stride must be within 1..window"),
        ("eval --model MODEL --text TEXT --reference NOWHERE", "neither a folder"),
        ("train", "--output"),
        ("train --output MODEL", "exists already"),
        (
            "train --output FOLDER --overwrite --data TEXT",
            "holds no config.json: only a checkpoint is replaced",
        ),
        ("train --output TEXT --overwrite --data TEXT", "is a file"),
        (
            "train --output NOWHERE --data TEXT --width 1000000000000",
            "more than can be trained here",
        ),
        (
            "train --output NOWHERE --data TEXT --vocab-size 100000000000",
            "more than can be trained here",
        ),
        ("train --output NOWHERE --data TEXT --phase 0,2,4", "at least one step"),
        ("train --output NOWHERE --data TEXT --phase 1,2,4,0", "leaves out every stream"),
        ("train --output NOWHERE --data NOWHERE", "No such file"),
        ("train --output NOWHERE --held-out TEXT", "belongs to --data"),
        ("train --output NOWHERE --schedule flat", "unknown schedule"),
        ("train --output NOWHERE --rate 0", "learning rate"),
        (
            "train --output NOWHERE --data TEXT --width 100 --heads 3",
            "does not divide into 3 heads",
        ),
        ("train --output NOWHERE --data TEXT --length 4096", "longer than the context"),
        (
            "train --output NOWHERE --data TEXT --steps 10 --long-steps 11",
            "do not fit into 10 steps",
        ),
        ("train --output NOWHERE --data TEXT", "too few for windows of 256"),
        ("train --output NOWHERE --data TEXT --phase 1,2", "--phase takes STEPS,BATCH,LENGTH"),
        ("train --output NOWHERE --data TEXT --phase 1,2,4,1,1", "2 repeats for 1 streams"),
        ("tour --stop nowhere", "no stop 'nowhere'; its stops are meet"),
        ("figures --output NOWHERE", "no data/"),
    ]


@pytest.mark.parametrize(("command", "message"), bad_commands())
def test_bad_input_is_one_sentence_and_exit_code_2(command, message, model, text_file, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    names = {
        "MODEL": model,
        "TEXT": text_file,
        "EMPTY": tmp_path / "empty",
        "BINARY": tmp_path / "binary",
    }
    names |= {"NOWHERE": tmp_path / "nowhere", "FOLDER": tmp_path / "folder"}
    result = run(*(names.get(word, word) for word in shlex.split(command)))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert message in last
    assert "Traceback" not in result.stderr
    # a rejected command leaves no file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["binary", "empty", "folder"]


def test_an_existing_output_is_rejected_before_anything_is_computed(text_file, monkeypatch):
    def late(*_: object) -> None:
        raise AssertionError("importance was computed for a file that is not written")

    monkeypatch.setattr("refllm.cli.convert._importance", late)
    result = run("convert", "--to", text_file, "--imatrix")
    assert result.exit_code == 2
    assert "is there already: choose another name, or replace it with --overwrite" in result.stderr
    assert text_file.read_text(encoding="utf-8") == TEXT


def test_a_gguf_file_gets_a_message_that_names_the_commands_for_it(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    result = run("info", "--model", tmp_path / "x.gguf")
    assert result.exit_code == 2
    assert (
        "is a GGUF file: here a Hugging Face directory is needed; load, generate, eval "
        "and convert" in result.stderr
    )


def test_small_times_keep_two_digits():
    assert [_digits(ms) for ms in (1234.5678, 0.1, 0.01234, 0.0)] == [
        "1,234.57",
        "0.10",
        "0.012",
        "0",
    ]


def test_an_unavailable_backend_says_why(model, monkeypatch):
    try:
        backend.get("cupy")
    except backend.BackendUnavailable:
        for option in (["--backend", "cupy"], []):
            monkeypatch.setenv("REFLLM_BACKEND", "cupy")  # the default of every command
            result = run("info", "--model", model, *option)
            assert result.exit_code == 2
            assert "cupy" in result.stderr.lower()
    else:
        pytest.skip("this machine has a GPU")


def raised(call) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_a_bug_is_not_taken_for_bad_input():
    """A ValueError that NumPy raises inside refllm is a bug of refllm's; one of refllm's
    own ``raise`` is not.
    """
    numpys = raised(lambda: Dense(np.ones((64, 3))).matmul(np.ones((2, 5))))
    assert isinstance(numpys, ValueError)
    assert explain(numpys) is None
    ours = raised(lambda: Dense(np.ones(3)))
    assert explain(ours) == str(ours)
    chained = raised(lambda: load("/nonexistent/place"))
    assert isinstance(chained, CheckpointError)
    assert explain(chained) == str(chained)
    assert explain(raised(lambda: int("x"))) is None  # not raised by a `raise` of refllm
    assert explain(KeyError("x")) is None
    assert explain(backend.BackendUnavailable("no GPU")) == "no GPU"
    assert (
        explain(raised(lambda: Path("/nonexistent").read_text()))
        == "/nonexistent: No such file or directory"
    )
    assert explain(BrokenPipeError()) is None
    full = str(explain(OSError(errno.ENOSPC, "No space left on device")))
    assert (
        full == "the output: no space is left on its disk: free some space, or choose another disk"
    )
    assert "out of memory: Unable to allocate" in str(
        explain(raised(lambda: np.zeros(2**60, np.int8)))
    )


def test_a_bug_shows_its_traceback(model, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("refllm.cli.info.describe", broken)
    result = run("info", "--model", model)
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_is_quiet(model, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("refllm.cli.info.describe", interrupted)
    result = run("info", "--model", model)
    assert (result.exit_code, result.output) == (130, "")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_ctrl_c_in_the_middle_of_a_line_is_quiet(tmp_path):
    """A real process and a real signal, while text is streaming."""
    config = tiny_config(max_position_embeddings=1_000_000, eos_token_ids=())
    save(
        tmp_path / "endless",
        config,
        tiny_params(config, 0, "float32"),
        byte_tokenizer(),
        dtype="float32",
    )
    command = [
        sys.executable,
        "-m",
        "refllm",
        "generate",
        "x",
        "--model",
        tmp_path / "endless",
        "-n",
        "20000",
        "-t",
        "1",
    ]
    # a job started in the background ignores SIGINT, and its children inherit that: the
    # default is put back
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, cwd=ROOT, preexec_fn=heed)
    assert process.stdout.read(1)  # the first character is there
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b""


@pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX")
def test_a_reader_that_goes_away_is_no_error(model):
    generate = f"{sys.executable} -m refllm generate x --model {shlex.quote(str(model))} -n 60 -t 1"
    command = f"{generate} | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="the shell is POSIX's")
def test_a_closed_stream_is_the_null_device(model):
    """Notes stay out of stdout also where stderr is closed; a closed stdin is an empty
    prompt.
    """
    command = f"{sys.executable} -m refllm generate - --model {shlex.quote(str(model))} -n 3"
    closed = f"{command} <&- 2>&-; {command} </dev/null >&- 2>/dev/null; echo code $?"
    done = subprocess.run(
        ["bash", "-c", closed], capture_output=True, cwd=ROOT, timeout=120, check=True
    )
    prompt = run("generate", "", "--model", model, "-n", "3").stdout
    assert done.stdout.decode() == f"{prompt}code 0\n"


# --- info ---------------------------------------------------------------------------------


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
    if name not in bundled() or not (refllm.api.BUNDLED / name / "manifest.json").exists():
        pytest.skip(f"refllm/models/{name} is not there yet")
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


# --- generate -----------------------------------------------------------------------------


def as_lines(text: str) -> str:
    """What is printed: the text, and a newline where it does not end with one."""
    return text if text.endswith("\n") else text + "\n"


def test_generate_prints_only_what_is_new(model, text_file):
    expected = as_lines(load(model, "numpy").generate("def f", 20))
    result = run("generate", "def f", "--model", model, "--max-tokens", "20")
    assert result.stdout == expected
    assert "6 + 20 tokens, the first after" in result.stderr
    assert "tokens/s" in result.stderr
    assert run("generate", "-", "--model", model, "-n", "20", stdin="def f").stdout == expected
    short = text_file.with_name("prompt")
    short.write_text("def f")
    assert run("generate", "--prompt-file", short, "--model", model, "-n", "20").stdout == expected


def test_generate_passes_every_sampling_option_on(model):
    sampling = SamplingParams(0.9, 30, 0.95, 0.001, 1.2)
    expected = "".join(
        load(model, "numpy").stream("x", 30, sampling=sampling, rng=5, ignore_eos=True)
    )
    options = shlex.split(
        "-t 0.9 --top-k 30 --top-p 0.95 --min-p 0.001 --repetition-penalty 1.2 --seed 5 "
        "--ignore-eos"
    )
    result = run("generate", "x", "--model", model, "-n", "30", *options)
    assert result.stdout == as_lines(expected)
    assert "seed 5" in result.stderr
    stop = expected[4:6]
    cut = run(
        "generate", "x", "--model", model, "-n", "30", *options, "--stop", "\0", "--stop", stop
    )
    assert cut.stdout == as_lines(expected[: expected.index(stop)])


def test_what_is_piped_ends_with_one_newline(model, monkeypatch):
    for text, printed in (("a", "a\n"), ("a\n", "a\n"), ("a\n\n", "a\n\n"), ("", "")):
        pieces = list(text)
        monkeypatch.setattr(Model, "stream", lambda *a, pieces=pieces, **k: iter(pieces))
        assert run("generate", "x", "--model", model).stdout == printed


def test_a_random_seed_is_printed_so_that_the_text_can_be_reproduced(model):
    first = run("generate", "x", "--model", model, "-n", "20", "-t", "1")
    seed = first.stderr.rsplit("seed ", 1)[1].strip()
    assert (
        run("generate", "x", "--model", model, "-n", "20", "-t", "1", "--seed", seed).stdout
        == first.stdout
    )


def test_the_default_length_fits_the_context(model):
    # 61 of 64 positions are taken
    assert run("generate", "x" * 60, "--model", model).exit_code == 0


def test_a_prompt_has_one_source(tmp_path):
    assert read_prompt("x", None) == "x"
    (tmp_path / "p").write_text("y")
    assert read_prompt(None, tmp_path / "p") == "y"
    with pytest.raises(ValueError, match="one prompt"):
        read_prompt(None, None)


@given(st.text())
def test_printable_text_steers_no_terminal(text):
    shown = printable(text)
    assert all(c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) for c in shown)
    if all(c in "\n\t" or c.isprintable() for c in text):
        assert shown == text


@pytest.mark.parametrize("width", [TABLE_WIDTH, 100, 200])
def test_a_table_folds_names_and_never_cuts_a_number(width):
    shown = io.StringIO()
    name = "folder/" * 20 + "name.py"
    made = table("document", "tokens", "bytes", "bits/byte", "perplexity")
    made.add_row(name, "1,234,567", "12,345,678", "1.234", "123456.78")
    Console(file=shown, width=width).print(made)
    head, _, *rows = shown.getvalue().splitlines()
    assert head.split() == ["document", "tokens", "bytes", "bits/byte", "perplexity"]
    assert rows[0].split()[1:] == ["1,234,567", "12,345,678", "1.234", "123456.78"]
    assert "".join(row.split()[0] for row in rows) == name


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (8_397_272, "8.4 MB"),
        (999_600, "1 MB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_sizes_have_three_digits(count, text):
    assert format_bytes(count) == text


# --- eval ---------------------------------------------------------------------------------


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


def test_kv_bits_generates_and_evaluates_with_the_kivi_cache_of_the_options(model, text_file):
    """The model's heads have 4 channels: groups of 4, and R = 8 is the least that fills
    words of 4-bit codes.
    """
    few = ("--kv-bits", "4", "--kv-group", "4", "--kv-residual", "8")
    kivi = Kivi(4, 4, 4, 8)
    loaded = load(model, "numpy")
    result = run(
        "generate", "def f(x): return x", "--model", model, "-n", "20", "--ignore-eos", *few
    )
    plain = run("generate", "def f(x): return x", "--model", model, "-n", "20", "--ignore-eos")
    assert result.stdout == as_lines(
        loaded.generate("def f(x): return x", 20, ignore_eos=True, cache=kivi)
    )
    assert "in 4-bit codes except for the newest tokens, at most 8" in result.stderr
    # 18 + 1 + 20 tokens, the last never read
    assert human(kivi.nbytes(loaded.config, 38, full=32)) in result.stderr
    assert "cache:" not in plain.stderr

    document = [Document("code.py", TEXT)]
    rng = np.random.default_rng(0)
    memory = partial(KiviAttend, kivi=kivi)
    expected = compare(
        loaded, loaded, document, rng=rng, window=64, stride=32, max_tokens=300, attend=memory
    )
    options = ("eval", "--model", model, "--text", text_file, "--max-tokens", "300", *few)
    facts = json.loads(run(*options, "--reference", model, "--json").stdout)
    assert facts["against"]["KL"]["mean"] == expected.kl.mean > 0
    assert facts["kv cache"] == {"key_bits": 4, "value_bits": 4, "group": 4, "residual": 8}
    alone = run(*options)
    assert "keys and values in 4 bits, 4 per scale, the newest 8 in full" in alone.stdout
    assert f"{expected.model.bits_per_byte:.3f}" in alone.stdout
    assert "nothing was quantised: the newest 64 tokens" in run(*options[:-1], "64").stderr
    assert "nothing was quantised" not in alone.stderr
    short = run("generate", "x", "--model", model, "-n", "3", "--ignore-eos", *few)
    assert "nothing quantised: 4 tokens fit into the full-precision window of 8" in short.stderr
    assert "cache:" not in run("generate", "x", "--model", model, "-n", "0", *few).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-group", "8"], "add --kv-bits"),
        (["--kv-bits", "2"], "a head of 4 channels does not divide into groups of 32; 4 would fit"),
        (
            ["--kv-bits", "2", "--kv-group", "3"],
            "a head of 4 channels does not divide into groups of 3; 2 would fit",
        ),
        (["--kv-bits", "2", "--kv-residual", "40"], "residual 40 is no multiple of group 32"),
        (["--kv-bits", "9"], "--kv-bits"),
    ],
)
def test_cache_options_that_do_not_fit_are_rejected(model, options, message):
    for command in (["generate", "x"], ["eval"]):
        result = run(*command, "--model", model, *options)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    tree = run("generate", "x", "--model", model, "--kv-bits", "4", "--draft", model, "--tree")
    assert tree.exit_code == 2
    assert "--tree needs a cache that keeps everything" in tree.stderr


def test_kv_keep_generates_with_the_sparse_policy_of_the_options(model):
    loaded = load(model, "numpy")  # 23 tokens
    text = "def f(x): return x + 1"
    for name, policy, held in (
        ("h2o", h2o(12), 12),
        ("tova", tova(12), 12),
        ("streaming", streaming(12), 12),
        ("recent", recent_only(12), 12),
    ):
        got = run(
            "generate",
            text,
            "--model",
            model,
            "-n",
            "20",
            "--ignore-eos",
            "--kv-keep",
            "12",
            "--kv-policy",
            name,
        )
        assert got.stdout == as_lines(loaded.generate(text, 20, ignore_eos=True, cache=policy))
        assert f"{held} of 42 tokens per key head" in got.stderr
    got = run("generate", text * 2, "--model", model, "-n", "3", "--ignore-eos", "--kv-keep", "40")
    assert got.stdout == as_lines(loaded.generate(text * 2, 3, ignore_eos=True, cache=snapkv(40)))
    assert "42 of 47 tokens per key head" in got.stderr
    for options, message in (
        (
            ["--kv-keep", "16"],
            "16 tokens do not hold the first 0 and the newest 32; raise the budget to 32",
        ),
        (["--kv-policy", "h2o"], "say how many with --kv-keep"),
        (["--kv-keep", "16", "--kv-policy", "luck"], "choose one of snapkv, h2o, tova"),
        (["--kv-keep", "16", "--kv-policy", "h2o", "--kv-bits", "4"], "choose one"),
        (["--kv-keep", "16", "--kv-policy", "h2o", "--draft", model, "--tree"], "keeps everything"),
    ):
        rejected = run("generate", "x", "--model", model, *options)
        assert rejected.exit_code == 2
        assert message in " ".join(rejected.stderr.split())


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


# --- train --------------------------------------------------------------------------------


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


def test_the_defaults_are_the_plan_and_the_network_of_the_bundled_model():
    data = standard_library()
    if len(data.streams) == 1:
        pytest.skip("this Python carries no test package")
    assert TrainingOptions().phases(data) == (
        Phase(10_625, 8, 256, (4, 1)),
        Phase(1_875, 2, 1024, (1, 0)),
    )
    assert TrainingOptions().config(4096, 0) == ModelConfig(
        "llama",
        4096,
        256,
        768,
        4,
        4,
        2,
        64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(0,),
    )
    draft = TrainingOptions(width=64, layers=2).config(4096, 0)
    assert (draft.num_attention_heads, draft.num_key_value_heads, draft.intermediate_size) == (
        1,
        1,
        192,
    )


SMALL = shlex.split(
    "--vocab-size 300 --width 16 --layers 1 --heads 2 --context 64 --steps 6 --batch 2 "
    "--length 16 --long-steps 2 --long-length 24 --rate 0.01 --warmup 1 --workers 1 "
    "--evaluate-every 3 --save-every 2"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("train") / "mine"
    return output, run("train", "--output", output, "--data", text_file, *SMALL)


def test_train_leaves_a_model_that_measures_as_it_says(trained, text_file, tmp_path):
    output, result = trained
    assert result.exit_code == 0, result.output
    card = json.loads((output / "card.json").read_text())
    bits = card["measured"]["bits per byte"]
    assert (
        result.stdout
        == f"{output}: {bits:.3f} bits per byte on {card['measured']['tokens']:,} held-out tokens\n"
    )
    assert "\x1b" not in result.output
    held = tmp_path / "held"
    held.write_text("".join(TEXT.splitlines(keepends=True)[-4:]))  # 5 % of its 80 lines
    assert (
        json.loads(run("eval", "--model", output, "--text", held, "--json").stdout)["bits per byte"]
        == bits
    )
    assert run("generate", "def", "--model", output, "-n", "5").exit_code == 0
    assert "training" in run("info", "--model", output, "--verify").stdout
    rows = [
        line.split() for line in result.stderr.splitlines() if line.strip().startswith(("3 ", "6 "))
    ]
    assert [row[0] for row in rows] == ["3", "6"]


def test_the_recorded_command_gives_the_same_model(trained, tmp_path, monkeypatch):
    """The command on the card, given from where the data is, ends with the same bytes."""
    output, _ = trained
    command = shlex.split(json.loads((output / "card.json").read_text())["training"]["command"])
    assert command[:2] == ["refllm", "train"]
    monkeypatch.chdir(tmp_path)
    assert run(*command[1:]).exit_code == 0
    again = tmp_path / output.name
    assert (again / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert (again / "tokenizer.json").read_bytes() == (output / "tokenizer.json").read_bytes()


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    trained, text_file, tmp_path, monkeypatch
):
    output, _ = trained
    real = train.train

    def interrupted(*args, **kwargs):
        def on_step(step, loss):
            if step == 5:
                raise KeyboardInterrupt

        return real(*args, **{**kwargs, "on_step": on_step})

    again = tmp_path / "again"
    monkeypatch.setattr(train, "train", interrupted)
    stopped = run("train", "--output", again, "--data", text_file, *SMALL)
    assert stopped.exit_code == 130
    assert not again.exists()
    monkeypatch.setattr(train, "train", real)
    result = run("train", "--output", again, "--data", text_file, *SMALL)
    assert result.exit_code == 0
    assert "continued after 4 steps" in result.stderr
    assert (again / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


def test_a_finished_run_is_only_finished_again(trained, text_file):
    """Nothing is trained: the state is complete, and the directory is written from it."""
    output, _ = trained
    before = (output / "model.safetensors").read_bytes()
    assert run("train", "--output", output, "--data", text_file, *SMALL).exit_code == 2
    result = run("train", "--output", output, "--data", text_file, *SMALL, "--overwrite")
    assert result.exit_code == 0
    assert (output / "model.safetensors").read_bytes() == before


def test_a_home_directory_is_found_also_where_the_shell_leaves_it(text_file, tmp_path, monkeypatch):
    """``--output=~/tiny`` reaches the program as it is typed."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    result = run("train", "--output", "~/tiny", "--data", text_file, *SMALL)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "home" / "tiny" / "manifest.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_the_current_folder_is_an_output_if_it_is_empty(text_file, tmp_path, monkeypatch):
    home = tmp_path / "mine"
    home.mkdir()
    monkeypatch.chdir(home)
    for name, rejected in ((".", False), (".", True), ("..", True), ("/", True)):
        result = run("train", "--output", name, "--data", text_file, *SMALL)
        assert result.exit_code == (2 if rejected else 0), result.output
        assert ("exists already" in result.stderr) == rejected
        monkeypatch.chdir(home)  # it is a new folder now
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "mine.training"]


def test_a_run_is_not_continued_with_other_text(trained, text_file, tmp_path):
    output, _ = trained
    other = tmp_path / "code.py"
    other.write_text(TEXT + "x = 1\n")
    work = output.with_name(output.name + ".training")
    result = run("train", "--output", tmp_path / "m", "--work", work, "--data", other, *SMALL)
    assert result.exit_code == 2
    assert "begun with other text" in result.stderr


def test_another_plan_is_noted(trained, text_file, tmp_path):
    output, _ = trained
    # the others need it
    work = shutil.copytree(output.with_name(output.name + ".training"), tmp_path / "work")
    longer = [word if word != "6" else "8" for word in SMALL]
    result = run(
        "train", "--output", tmp_path / "longer", "--work", work, "--data", text_file, *longer
    )
    assert result.exit_code == 0
    assert "begun with another plan" in result.stderr


@pytest.mark.parametrize(
    ("option", "message"), [("--mlp", "of another network"), ("--seed", "6 steps of another plan")]
)
def test_a_finished_run_is_not_passed_off_as_another(trained, text_file, tmp_path, option, message):
    """Nothing would be trained, and the card would record a command that never ran."""
    work = trained[0].with_name(trained[0].name + ".training")
    before = {p.name: p.read_bytes() for p in work.iterdir()}
    command = ("train", "--output", tmp_path / "other", "--work", work, "--data", text_file, *SMALL)
    result = run(*command, option, "10")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "other").exists()
    assert {p.name: p.read_bytes() for p in work.iterdir()} == before
    assert run(*command, "--evaluate-every", "1").exit_code == 0  # what is reported does not matter


def test_a_draft_reads_its_teachers_tokens(trained, text_file, tmp_path):
    output, _ = trained
    options = [*SMALL, "--layers", "1", "--width", "8", "--heads", "1"]
    draft = tmp_path / "draft"
    assert (
        run(
            "train", "--output", draft, "--data", text_file, "--draft-of", output, *options
        ).exit_code
        == 0
    )
    assert (draft / "tokenizer.json").read_bytes() == (output / "tokenizer.json").read_bytes()
    card = json.loads((draft / "card.json").read_text())
    assert 0 < card["measured"]["against the teacher"]["acceptance"] < 1
    assert "--teacher" in card["training"]["command"]


def test_another_teacher_is_noticed(trained, text_file, tmp_path):
    """While there is something left to train it is told; a finished run is not passed off
    as another's.
    """
    output, _ = trained
    command = (
        "train",
        "--output",
        tmp_path / "m",
        "--work",
        tmp_path / "w",
        "--data",
        text_file,
        *SMALL,
    )
    taught = (*command, "--teacher", output, "--overwrite")
    assert run(*taught).exit_code == 0
    assert run(*taught).exit_code == 0  # the same again: nothing is left to do
    for other in ((*command, "--overwrite", "--vocab-size", "281"), (*taught, "--alpha", "0.5")):
        result = run(*other)
        assert result.exit_code == 2, result.output
    assert "6 steps of another teacher, or weight of it" in result.stderr
    longer = [word if word != "6" else "8" for word in taught]
    result = run(*longer, "--alpha", "0.5")
    assert result.exit_code == 0
    assert "begun with another teacher, or weight of it" in result.stderr
    # of a run that an earlier version began, nothing is known
    (tmp_path / "w" / train.ORIGIN).unlink()
    assert run(*longer, "--alpha", "1").exit_code == 0


def test_a_run_goes_on_from_the_weights_that_it_began_with(trained, text_file, tmp_path):
    output, _ = trained
    command = (
        "train",
        "--output",
        tmp_path / "m",
        "--work",
        tmp_path / "w",
        "--data",
        text_file,
        *SMALL,
        "--overwrite",
    )
    assert run(*command, "--start", output, "--start-share", 0.5).exit_code == 0
    assert "--start-share 0.5" in (tmp_path / "m" / "card.json").read_text("utf-8")
    alone = run(*command, "--start-share", 0.5)
    assert (alone.exit_code, "name that model, too" in alone.stderr) == (2, True)
    assert run(*command, "--start", output).exit_code == 0
    other = tmp_path / "other"
    shutil.copytree(output, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, other / "model.safetensors")
    result = run(*command, "--start", other)
    assert result.exit_code == 2
    assert "begun from other weights" in result.stderr


def test_the_installers_are_read_where_they_are_asked_for(monkeypatch, tmp_path):
    """And the card's command says so, either way."""
    asked = []
    commands = []

    def read(**options):
        asked.append(options)
        return Data(
            "letters",
            {"library": [Document("a", TEXT)]},
            [Document("b", TEXT)],
            (1,),
            (1,),
            code=False,
        )

    def keep(run, *, command, **rest):
        commands.append(shlex.split(command))
        return {"measured": {"bits per byte": 1.0, "tokens": 1}}

    monkeypatch.setattr(data, "standard_library", read)
    monkeypatch.setattr(train, "run", keep)
    for option in ((), ("--installers",), ("--no-installers", "--no-tests")):
        assert run("train", "--output", tmp_path / "m", *SMALL, *option).exit_code == 0
    assert asked == [
        {"tests": True, "installers": False},
        {"tests": True, "installers": True},
        {"tests": False, "installers": False},
    ]
    recorded = [
        [word for word in words if "installers" in word or "tests" in word] for words in commands
    ]
    assert recorded == [
        ["--tests", "--no-installers"],
        ["--tests", "--installers"],
        ["--no-tests", "--no-installers"],
    ]


def test_phases_can_be_spelled_out(text_file, tmp_path):
    phases = ["--phase", "2,1,16", "--phase", "1,2,8,1"]
    result = run(
        "train", "--output", tmp_path / "m", "--data", text_file, "--no-tests", *SMALL, *phases
    )
    assert result.exit_code == 0, result.output
    training = json.loads((tmp_path / "m" / "card.json").read_text())["training"]
    words = shlex.split(training["command"])
    assert words.count("--phase") == 2
    assert "--no-tests" in words
    assert "--no-installers" in words
    assert not {"--steps", "--tests", "--work", "--overwrite", "--backend"} & set(words)
    plan = training["plan"]
    assert [list(p.values()) for p in plan["phases"]] == [[2, 1, 16, [1]], [1, 2, 8, [1]]]


# --- figures ------------------------------------------------------------------------------


def test_figures_are_drawn_and_checked():
    data = ROOT / "figures" / "data"
    if not data.is_dir():
        pytest.skip("no figure has data yet")
    result = run("figures", "--check", "--output", ROOT / "figures")
    assert result.exit_code in (0, 1)
    assert (result.exit_code == 0) == (result.stdout == "")


def test_a_figure_is_drawn_from_its_data(tmp_path):
    record = {
        "command": "x",
        "kind": "A",
        "hardware": "none",
        "values": {
            "devices": [{"name": "d", "peak_flops": 1e12, "peak_bandwidth": 1e11}],
            "points": [{"label": "p", "intensity": 2.0}],
        },
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "roofline.json").write_text(json.dumps(record))
    result = run("figures", "--output", tmp_path)
    assert result.stdout == f"{tmp_path / 'roofline.png'}\n"
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    stale = run("figures", "--check", "--output", tmp_path)
    assert stale.exit_code == 1
    assert "roofline.png" not in stale.stdout  # the others have no data here
