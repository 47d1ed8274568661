"""One file at a time: the new one complete, or the old one unchanged and nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm
from refllm.atomic import replacing, write_atomic
from refllm.figures import registry
from refllm.formats.gguf import writer as gguf_writer
from refllm.measure import records
from tiny_models import byte_tokenizer


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_to_the_byte(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("whole") / "file"
    write_atomic(path, text)
    assert path.read_bytes() == text.encode()  # line ends as they are, on every system


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, step, error
):
    def fails(*args):
        raise error

    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr(os, step, fails)
    with pytest.raises(error):
        write_atomic(path, "new")
    with pytest.raises(error):
        byte_tokenizer().save(path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(os.name != "posix", reason="the limit is POSIX's")
def test_a_full_disk_costs_no_tokenizer(tmp_path):
    """A resumed run writes its tokenizer again; without a tokenizer its state would be
    useless.
    """
    import resource

    path = tmp_path / "tokenizer.json"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    byte_tokenizer().save(path)
    before = path.read_bytes()
    # Python ignores its signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            byte_tokenizer().save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {path.name: before}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_exception_halfway_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "old"}


def test_two_writers_at_once_never_mix_their_bytes(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write_text("the first writer")
        with replacing(path) as second:
            second.write_text("2nd")
        assert path.read_text() == "2nd"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "the first writer"}


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    fsync = os.fsync
    replace = os.replace

    def synced(handle: int) -> None:
        order.append(("sync", os.fstat(handle).st_size))
        fsync(handle)

    def named(old: Path, new: Path) -> None:
        order.append(("name", new.name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    write_atomic(tmp_path / "file", "twelve bytes")
    assert order == [("sync", 12), ("name", "file")]


def gguf(path: Path, value: int) -> None:
    plan = {"a": ("F32", (1, 4)), "b": ("F32", (1, 4))}
    gguf_writer.write(path, {}, plan, lambda _: np.full(16, value, "uint8"))


def record(path: Path, value: int) -> None:
    records.write(path, records.Record("make x", "A", "none", {"value": value}))


def figure(path: Path, value: int) -> None:
    from matplotlib.figure import Figure

    image = Figure(figsize=(1, 1))
    image.subplots().plot([0, value], [0, 1])
    registry.save(image, path)


@pytest.mark.theorem(
    "every file that the package replaces is, after a failed write, the old one byte for byte, "
    "and no temporary file is left beside it",
    source="refllm.atomic",
)
@pytest.mark.parametrize("write", [gguf, record, figure])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write, call):
    def fails(*args):
        raise OSError("No space left on device")

    path = tmp_path / "file"
    write(path, 1)
    before = path.read_bytes()
    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="No space"):
        write(path, 2)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": before}
    monkeypatch.undo()
    write(path, 2)
    assert path.read_bytes() != before


def test_only_one_module_renames_files():
    """Everything else that replaces a file goes through ``replacing``."""
    package = Path(refllm.__file__).parent
    sources = {
        p.relative_to(package).as_posix(): p.read_text("utf-8") for p in package.rglob("*.py")
    }
    assert [name for name in sources if "os.replace(" in sources[name]] == ["atomic.py"]
    renaming = [name for name in sources if "os.rename(" in sources[name]]
    assert renaming == ["checkpoints/writer.py"]  # directories
