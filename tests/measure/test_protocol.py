"""A figure of bits per byte says its text and windows, and claims only what a manifest lists."""

from __future__ import annotations

import json

import pytest

from refllm.checkpoints.sources import locate
from refllm.corpus import held_out_documents
from refllm.measure.protocol import (
    MANIFEST,
    describe_text,
    describe_windows,
    is_held_out,
)


def write_manifest(directory, held_out=(), **streams):
    listed = {
        "held out": dict.fromkeys(held_out, "a digest"),
        "trained on": {name: dict.fromkeys(files, "a digest") for name, files in streams.items()},
    }
    (directory / MANIFEST).write_text(json.dumps(listed))


def test_a_document_is_held_out_if_the_manifest_says_so_of_each(tmp_path):
    assert not is_held_out(tmp_path, ["a.py"])  # no manifest
    write_manifest(tmp_path, ["a.py", "b.py", "c.py"], library=["c.py", "d.py"], tests=["e.py"])
    assert is_held_out(tmp_path, ["a.py"])
    assert is_held_out(str(tmp_path), iter(["b.py", "a.py"]))
    assert not is_held_out(tmp_path, ["a.py", "f.py"])  # one that it does not know
    assert not is_held_out(tmp_path, ["c.py"])  # trained on as well
    assert not is_held_out(tmp_path, ["d.py"])
    assert not is_held_out(tmp_path / MANIFEST, ["a.py"])  # a file, as a GGUF is


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"held out": {}}', '{"held out": 1}', "3"])
def test_of_a_broken_manifest_nothing_is_claimed(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    assert not is_held_out(tmp_path, ["a.py"])


@pytest.mark.parametrize("name", ["stdlib", "stdlib-draft"])
def test_the_bundled_models_have_not_seen_the_held_out_modules(name):
    listed = json.loads((locate(name) / MANIFEST).read_text("utf-8"))["held out"]
    assert is_held_out(locate(name), listed)
    # of another Python, zipfile may be a package
    common = [d.name for d in held_out_documents() if not d.name.startswith("zipfile")]
    assert is_held_out(locate(name), common)
    assert not is_held_out(locate(name), [*common, "abc.py"])


def test_a_figure_says_its_text_and_its_windows():
    assert (
        describe_text(27, ["a.py", "b.py", "c.py"], "3")
        == "27 tokens of a.py, b.py, c.py, Python 3"
    )
    assert (
        describe_text(1000, ["a.py"] * 4, "3.11.7") == "1,000 tokens of 4 documents, Python 3.11.7"
    )
    assert describe_windows(1024, 512) == "1,024 tokens every 512"
