"""Checkpoints of the Hugging Face Hub, against a small server on loopback."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

import refllm
from hub_server import Hub, commit, serving
from refllm.checkpoints import hub as module
from refllm.checkpoints.hub import fetch
from refllm.checkpoints.sources import locate
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.errors import InputError
from tiny_models import tiny_config

NAME = "org/tiny"


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint, tmp_path_factory) -> dict[str, bytes]:
    path = make_checkpoint(tiny_config(), tmp_path_factory.mktemp("hub") / "tiny")
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serving() as made:
        yield made


@pytest.fixture
def hub(server, tmp_path, monkeypatch) -> Hub:
    """The server without models, an empty cache, and an empty current directory."""
    server.models.clear()
    server.gated.clear()
    server.requested.clear()
    server.failing = False
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "TIMEOUT", 2.0)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return server


MORE = {
    "README.md": b"# a model",
    "pytorch_model.bin": b"pickled",
    "modeling_tiny.py": b"raise SystemExit",
    "model-Q4_K_M.gguf": b"GGUF",
    "onnx/model.onnx": b"onnx",
    "consolidated.safetensors": b"a second copy",
    "original/consolidated.00.safetensors": b"a second copy",
}


def test_only_configuration_tokenizer_and_safetensors_are_downloaded(hub, checkpoint):
    hub.add(NAME, checkpoint | MORE)
    model = refllm.load(NAME, "numpy")
    assert model.config == tiny_config()
    known = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert hub.downloaded() == known & checkpoint.keys()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= hub.downloaded()


def test_every_chat_template_that_is_read_is_downloaded(hub, checkpoint):
    template = "{{ messages[0].content }}"
    more = {
        "chat_template.jinja": template.encode(),
        "additional_chat_templates/tool_use.jinja": b"tools " + template.encode(),
        "additional_chat_templates/notes.txt": b"",
        "old/additional_chat_templates/x.jinja": b"",
    }
    hub.add(NAME, checkpoint | more)
    templates = refllm.load(NAME).chat_templates
    assert dict(templates.sources) == {"default": template, "tool_use": f"tools {template}"}
    assert hub.downloaded() & more.keys() == set(list(more)[:2])


def test_a_gguf_file_without_a_network_is_not_chosen(hub):
    others = {"imatrix.gguf", "mmproj-F16.gguf", "x/m-mmproj-BF16.gguf", "m.imatrix.gguf"}
    files = dict.fromkeys([*others, "mmprojector-7B.gguf"], b"GGUF")
    hub.add(NAME, files)
    assert fetch(NAME).name == "mmprojector-7B.gguf"
    assert fetch(f"{NAME}:imatrix.gguf").name == "imatrix.gguf"  # by its name
    hub.add("org/none", dict.fromkeys(others, b"GGUF"))
    with pytest.raises(CheckpointError, match="has neither config.json with safetensors nor a GGU"):
        fetch("org/none")


def test_the_revision_that_is_missing_is_named(hub, checkpoint):
    hub.add(NAME, checkpoint, "refs/pr/1")
    with pytest.raises(CheckpointError, match="org/tiny has no revision 'main'$"):
        fetch(NAME)
    assert refllm.load(NAME, revision="refs/pr/1").config == tiny_config()


def test_what_is_in_the_cache_is_not_downloaded_again(hub, checkpoint):
    hub.add(NAME, checkpoint)
    first = fetch(NAME)
    hub.requested.clear()
    assert fetch(NAME) == first
    assert hub.downloaded() == set()


def test_a_revision_is_pinned(hub, checkpoint):
    other = checkpoint | {"generation_config.json": json.dumps({"eos_token_id": 7}).encode()}
    hub.add(NAME, checkpoint)
    hub.add(NAME, other, "v1")
    assert refllm.load(NAME).config.eos_token_ids == (0,)
    for revision in ("v1", commit(NAME + "v1")):
        assert refllm.load(NAME, revision=revision).config.eos_token_ids == (7,)
    assert commit(NAME + "v1") in str(fetch(NAME, "v1"))
    with pytest.raises(CheckpointError, match="org/tiny has no revision 'v2'"):
        fetch(NAME, "v2")


def test_sharded_safetensors(hub, checkpoint, tmp_path):
    (tmp_path / "one.safetensors").write_bytes(checkpoint["model.safetensors"])
    tensors = load_file(tmp_path / "one.safetensors")
    names = sorted(tensors)
    files = {k: v for k, v in checkpoint.items() if k != "model.safetensors"}
    weight_map = {}
    for i, part in enumerate((names[:5], names[5:]), 1):
        shard = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
        files[shard] = (tmp_path / shard).read_bytes()
        weight_map |= dict.fromkeys(part, shard)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    files["consolidated.safetensors"] = b"not named by the index"
    hub.add(NAME, files)
    model = refllm.load(NAME, "numpy")
    np.testing.assert_array_equal(model.weights["norm"], tensors["model.norm.weight"])
    assert "consolidated.safetensors" not in hub.downloaded()
    assert hub.downloaded() >= {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    del files["model-00002-of-00002.safetensors"]
    hub.add(NAME, files, "broken")
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00002.safetensors, which its"):
        fetch(NAME, "broken")


@pytest.mark.parametrize("quantization", ["quantize_config.json", "quant_config.json"])
def test_old_gptq_and_awq_files_are_downloaded_too(hub, quantization):
    files = {"config.json": b"{}", quantization: b"{}", "gptq-4bit.safetensors": b"x"}
    hub.add(NAME, files | {"gptq.bin": b"pickled"})
    folder = fetch(NAME)
    assert {path.name for path in folder.iterdir()} == files.keys()


# --- GGUF files ---------------------------------------------------------------------------


def test_the_only_gguf_file_needs_no_name(hub):
    hub.add(NAME, {"model.gguf": b"GGUF one", "README.md": b""})
    path = fetch(NAME)
    assert path.name == "model.gguf"
    assert path.read_bytes() == b"GGUF one"
    assert hub.downloaded() == {"model.gguf"}


def test_of_several_gguf_files_one_is_chosen(hub):
    files = {"a[1]-Q4_K_M.gguf": b"GGUF a", "b-Q8_0.gguf": b"GGUF b", "a1-Q4_K_M.gguf": b"GGUF c"}
    hub.add(NAME, files)
    with pytest.raises(
        CheckpointError,
        match=r"has several GGUF files.*a1-Q4_K_M\.gguf, a\[1\]-Q4_K_M\.gguf, b-Q8_0\.gguf",
    ):
        fetch(NAME)
    for file, data in files.items():
        hub.requested.clear()
        assert fetch(f"{NAME}:{file}").read_bytes() == data
        assert hub.downloaded() == {file}
    with pytest.raises(CheckpointError, match=r"has no GGUF file 'c\.gguf': its GGUF files are a1"):
        fetch(f"{NAME}:c.gguf")
    hub.add("org/none", {"README.md": b""})
    with pytest.raises(CheckpointError, match="it has no GGUF files"):
        fetch("org/none:c.gguf")
    with pytest.raises(CheckpointError, match=r"has no GGUF file 'README\.md'"):
        fetch("org/none:README.md")


def test_a_gguf_file_in_a_folder(hub):
    hub.add(NAME, {"Q4/a.gguf": b"GGUF", "config.json": b"{}"})
    assert fetch(NAME).parts[-2:] == ("Q4", "a.gguf")  # a config alone is no checkpoint
    assert fetch(f"{NAME}:Q4/a.gguf").read_bytes() == b"GGUF"


def test_all_parts_of_a_gguf_file_are_downloaded(hub):
    parts = {f"m-0000{i}-of-00003.gguf": b"GGUF %d" % i for i in (1, 2, 3)}
    hub.add(NAME, parts)
    path = fetch(NAME)
    assert path.name == "m-00001-of-00003.gguf"
    assert {each.name for each in path.parent.iterdir()} == parts.keys()
    assert fetch(f"{NAME}:m-00002-of-00003.gguf").name == "m-00002-of-00003.gguf"
    del parts["m-00003-of-00003.gguf"]
    hub.add(NAME, parts, "broken")
    with pytest.raises(CheckpointError, match=r"lacks m-00003-of-00003\.gguf, a part of m-00001"):
        fetch(NAME, "broken")


def test_a_repository_without_weights_says_what_it_holds(hub):
    hub.add(NAME, {"config.json": b"{}", "pytorch_model.bin": b"", "a.py": b""})
    with pytest.raises(
        CheckpointError,
        match=r"neither config\.json with safetensors nor a GGUF file.*a\.py, config\.json, pyto",
    ):
        fetch(NAME)
    assert hub.downloaded() == set()


# --- what is not there --------------------------------------------------------------------


def test_an_unknown_name_is_one_sentence(hub):
    with pytest.raises(CheckpointError, match=r"has no public model 'org/nothing': check the spel"):
        refllm.load("org/nothing")
    hub.gated.add("org/gated")
    with pytest.raises(CheckpointError, match=r"org/gated is gated: .* hf auth login"):
        refllm.load("org/gated")
    with pytest.raises(CheckpointError, match="no name of a model"):
        refllm.load("org/a--b..c")


def test_a_download_that_breaks_off_is_one_sentence(hub, checkpoint, monkeypatch):
    import huggingface_hub

    hub.add(NAME, checkpoint)

    def fail(error: Exception) -> Any:
        def snapshot_download(*args: Any, **options: Any) -> str:
            raise error

        return snapshot_download

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail(ConnectionError("reset")))
    with pytest.raises(CheckpointError, match=r"broke off \(reset\): try again, it continues"):
        fetch(NAME)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail(OSError(28, "no space")))
    with pytest.raises(OSError, match="no space"):
        fetch(NAME)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        fetch(NAME)


def test_a_path_wins_over_the_hub(hub, checkpoint):
    hub.add(NAME, checkpoint)
    Path(NAME).mkdir(parents=True)
    assert locate(NAME) == Path(NAME)
    assert hub.requested == []
    for name in ("./org/other", "other", "a/b/c", "models/x.gguf", Path("org/other")):
        with pytest.raises(
            CheckpointError, match=r"neither a folder|does not exist: pass the path"
        ):
            locate(name)
    assert hub.requested == []


def test_a_revision_goes_with_the_hub_alone(hub):
    Path("mine").mkdir()
    for name in ("stdlib", "mine", Path("mine")):
        with pytest.raises(InputError, match="revision goes with a model of the Hugging Face Hub"):
            locate(name, "main")


@pytest.mark.parametrize("how", ["offline", "unreachable", "failing"])
def test_without_the_server_the_cache_is_used(hub, checkpoint, monkeypatch, how):
    hub.add(NAME, checkpoint)
    hub.add("org/gguf", {"m.gguf": b"GGUF"}, "v1")
    online = fetch(NAME)
    file = fetch("org/gguf", "v1")
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        reason = "HF_HUB_OFFLINE is set"
    elif how == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        reason = "http://127.0.0.1:9 cannot be reached"
    else:
        hub.failing = True
        reason = "cannot be reached"
    hub.requested.clear()
    assert fetch(NAME) == fetch(NAME, "main") == fetch(NAME, commit(NAME + "main")) == online
    assert fetch("org/gguf", "v1") == fetch("org/gguf:m.gguf", "v1") == file
    with pytest.raises(CheckpointError, match=f"{reason}, and 'main' of it is not in the cache"):
        fetch("org/gguf")
    with pytest.raises(CheckpointError, match=f"'org/never' is no path here, .*{reason}"):
        fetch("org/never")
    assert hub.downloaded() == set()
    if how == "offline":
        assert hub.requested == []


def test_an_empty_cache_is_no_error_of_its_own(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="is not in the cache"):
        fetch(NAME)


def test_without_the_package_the_sentence_gives_the_command(hub, monkeypatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match=r"pip install 'refllm\[hub\]'"):
        refllm.load(NAME)


# --- names that are not trusted -----------------------------------------------------------


@pytest.mark.parametrize(
    "bad", ["../x.gguf", "a/../../x.gguf", "/x.gguf", "..\\x.gguf", "C:\\x.gguf", "\\\\h\\x.gguf"]
)
def test_no_file_leaves_the_repository(hub, checkpoint, bad):
    hub.add(NAME, {bad: b"GGUF", "m.gguf": b"GGUF"})
    with pytest.raises(CheckpointError, match="points outside the repository: rejected"):
        fetch(f"{NAME}:m.gguf")
    with pytest.raises(CheckpointError, match="points outside the repository: rejected"):
        fetch(f"{NAME}:{bad.replace(':', '')}")
    files = {k: v for k, v in checkpoint.items() if k != "model.safetensors"}
    index = {"weight_map": {"a": bad}}
    hub.add(NAME, files | {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(CheckpointError, match="points outside the repository: rejected"):
        fetch(NAME)


def test_through_the_environment_and_the_command_line(hub, checkpoint, tmp_path):
    """``HF_ENDPOINT``, ``HF_HOME`` and ``HF_HUB_OFFLINE``, as a user sets them."""
    hub.add(NAME, checkpoint)
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "refllm", "generate", "x", "--model", NAME, "-n", "2"]

    def refllm_run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment | more, capture_output=True, text=True)

    online = refllm_run()
    assert online.returncode == 0, online.stderr
    assert "Fetching" not in online.stderr  # progress bars are for terminals
    hub.requested.clear()
    offline = refllm_run(HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout
    assert hub.requested == []
