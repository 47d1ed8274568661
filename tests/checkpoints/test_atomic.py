"""A text file is the old one or the new one, wherever the writing breaks off."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.checkpoints import directory_writer
from refllm.checkpoints.atomic import write_whole
from study_models import byte_tokenizer


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_to_the_byte(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("whole") / "file"
    write_whole(path, text)
    assert path.read_bytes() == text.encode()  # line ends as they are, on every system


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, step, error
):
    def fails(*args):
        raise error

    path = tmp_path / "file"
    write_whole(path, "old")
    monkeypatch.setattr(directory_writer.os, step, fails)
    with pytest.raises(error):
        write_whole(path, "new")
    with pytest.raises(error):
        byte_tokenizer().save(path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(os.name != "posix", reason="the limit is POSIX's")
def test_a_full_disk_costs_no_tokenizer(tmp_path):
    """A resumed run writes its tokenizer anew; without it the state of the run would be of
    no use.
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
