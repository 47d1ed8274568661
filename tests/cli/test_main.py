"""The root of the command line: help, messages and exit codes for bad input, Ctrl-C and pipes,
and memory that is kept.
"""

from __future__ import annotations

import errno
import os
import platform
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import refllm
from command_line import TEXT, run, save_tiny_model, write_text
from conftest import ROOT
from refllm import backend
from refllm.api import load
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.writer import save
from refllm.cli.main import explain
from refllm.model.weights import Dense
from tiny_models import byte_tokenizer, tiny_config, tiny_params

COMMANDS = (
    "tour",
    "info",
    "generate",
    "chat",
    "eval",
    "train",
    "quantize",
    "convert",
    "simulate",
    "figures",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "code.py")


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


def bad_commands() -> list[tuple[str, str]]:
    return [
        ("nonsense", "No such command"),
        ("info --nonsense", "No such option"),
        ("info --model NOWHERE", "does not exist: pass the path"),
        ("info --model TEXT", "is a file"),
        ("info --model EMPTY", "no config.json"),
        ("info --model MODEL --backend torch", "unknown backend 'torch'"),
        ("generate --model MODEL", "give one prompt"),
        ("generate x --prompt-file TEXT --model MODEL", "give one prompt"),
        ("generate --prompt-file NOWHERE --model MODEL", "No such file"),
        ("generate --prompt-file BINARY --model MODEL", "not UTF-8"),
        ("generate x --model NOWHERE", "does not exist: pass the path"),
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
        ("eval --model MODEL --text TEXT --reference NOWHERE", "does not exist: pass the path"),
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
    result = run("quantize", "--model", tmp_path / "x.gguf", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert (
        "is a GGUF file: here a Hugging Face directory is needed; load, generate, chat, eval, "
        "info, simulate and convert" in result.stderr
    )


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

    monkeypatch.setattr("refllm.cli.model_facts.describe", broken)
    result = run("info", "--model", model)
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_is_quiet(model, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("refllm.cli.model_facts.describe", interrupted)
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


ALLOCATIONS = """
import resource, sys
import numpy as np
from refllm.cli.main import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    np.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(setting: str) -> int:
    command = [sys.executable, "-c", ALLOCATIONS, setting]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_that_is_freed_serves_the_next_array_without_a_page_fault():
    kept = page_faults("keep")
    assert kept < 20
    # 64 MiB arrays: above glibc's own highest threshold, 32 MiB
    assert kept < page_faults("default")
