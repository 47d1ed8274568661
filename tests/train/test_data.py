"""Documents from files, their split into training and held-out text, and their encoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm import corpus
from refllm.checkpoints.writer import file_sha256
from refllm.corpus import Document
from refllm.train.data import encode, fingerprint, read_files, split, standard_library, text_files
from tiny_models import byte_tokenizer

texts = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=2, max_size=12
)


def documents_of(items: list[str]) -> list[Document]:
    return [Document(f"{i}", text) for i, text in enumerate(items)]


@given(texts, st.floats(0.01, 0.9))
def test_a_split_is_a_partition_with_both_sides_filled(items, share):
    documents = documents_of(items)
    train, held = split(documents, share)
    assert train
    assert held
    assert sorted(train + held, key=lambda d: int(d.name)) == documents
    taken, total = (sum(len(d.text) for d in part) for part in (held, documents))
    # the last document that was taken crossed the share; without it, the share was not
    # reached
    assert taken < share * total + max(len(d.text) for d in held) + 1e-9


@given(st.lists(st.text(min_size=1), min_size=3, max_size=12, unique=True), st.randoms())
def test_the_split_depends_on_the_texts_and_not_on_their_order(items, random):
    documents = documents_of(items)
    shuffled = list(documents)
    random.shuffle(shuffled)
    assert {d.text for d in split(documents, 0.3)[1]} == {d.text for d in split(shuffled, 0.3)[1]}


@given(st.integers(2, 60), st.floats(0.01, 0.9))
def test_a_single_document_is_cut_between_lines(count, share):
    text = "".join(f"line {i}\n" for i in range(count))
    (train,), (held,) = split([Document("one", text)], share)
    assert train.text + held.text == text
    assert train.text.endswith("\n")
    lines = held.text.count("\n")
    # the share, rounded to lines, but never all or none of them
    assert 1 <= lines < count
    assert abs(lines - share * count) <= 1


def test_a_single_line_leaves_nothing_to_train_on():
    assert split([Document("one", "no end")], 0.5) == ([], [Document("one (end)", "no end")])


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_outside_zero_to_one_is_rejected(share):
    with pytest.raises(ValueError, match="share"):
        split(documents_of(["a", "b"]), share)


@given(texts)
def test_a_stream_is_each_document_after_the_start_token(items):
    tokenizer = byte_tokenizer()
    stream = encode(tokenizer, documents_of(items))
    assert stream.dtype == np.int32
    cuts = np.flatnonzero(stream == 0)  # byte-level text never gives id 0, which is <|endoftext|>
    parts = [part.tolist()[1:] for part in np.split(stream, cuts[1:])]
    assert [tokenizer.decode(part) for part in parts] == items


def test_a_folder_gives_its_text_files_in_order(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b" / "c.txt").write_text("second")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "blank").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    assert [(d.name, d.text) for d in read_files([tmp_path])] == [
        (f"{tmp_path.name}/a.txt", "first"),
        (f"{tmp_path.name}/b/c.txt", "second"),
    ]


def test_a_named_file_must_be_text(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"ok\xff")
    with pytest.raises(ValueError, match=r"x is not UTF-8 text \(byte 2\)"):
        read_files([tmp_path / "x"])
    with pytest.raises(FileNotFoundError):
        read_files([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text was found"):
        read_files([tmp_path / "empty"])


def test_held_out_text_is_not_trained_on_under_another_name(tmp_path: Path):
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).write_text(text)
    data = text_files([tmp_path], [tmp_path / "a"])
    assert [d.text for d in data.streams["files"]] == ["other"]
    assert [d.text for d in data.held_out] == ["same"]
    with pytest.raises(ValueError, match="too small"):
        text_files([tmp_path / "a"], [tmp_path / "b"])


def test_the_standard_library_keeps_its_held_out_modules_apart():
    data = standard_library()
    held = {d.sha256 for d in data.held_out}
    assert not any(d.sha256 in held for documents in data.streams.values() for d in documents)
    assert len(data.streams) == len(data.repeats) == len(data.last_repeats)
    alone = standard_library(tests=False)
    assert list(alone.streams) == ["library"]
    assert alone.repeats == alone.last_repeats == (1,)


def test_the_installers_are_a_third_stream_where_wanted_and_present(monkeypatch):
    pieces = {
        "tests": [Document("t", "t")],
        "installers": [Document("i", "i")],
        "library": [Document("l", "l")],
    }
    monkeypatch.setattr(
        corpus, "training_documents", lambda tests=False: pieces["tests" if tests else "library"]
    )
    monkeypatch.setattr(corpus, "installer_documents", lambda: pieces["installers"])
    both = standard_library(installers=True)
    assert list(both.streams) == ["library", "tests", "installers"]
    assert (both.repeats, both.last_repeats) == ((4, 1, 3), (1, 0, 1))
    assert both.name == "the Python standard library, its tests and the installers that it carries"
    alone = standard_library(tests=False, installers=True)
    assert list(alone.streams) == ["library", "installers"]
    assert (alone.repeats, alone.last_repeats) == ((4, 3), (1, 1))
    assert list(standard_library().streams) == ["library", "tests"]
    pieces["installers"] = []
    assert list(standard_library(installers=True).streams) == ["library", "tests"]


def test_fingerprints_are_of_the_bytes(tmp_path: Path):
    (tmp_path / "x").write_bytes("tüt\n".encode())
    assert fingerprint([Document("x", "tüt\n")]) == {"x": file_sha256(tmp_path / "x")}


@pytest.mark.parametrize(
    ("share", "held"), [(0.3, 3), (0.31, 4), (0.05, 1), (0.1, 1), (0.99, 9), (0.9, 9)]
)
def test_a_share_that_is_reached_exactly_takes_no_more(share, held):
    """Ten documents of ten characters: 0.3 of them is three, and training keeps one."""
    documents = documents_of([f"{i}" * 10 for i in range(10)])
    assert len(split(documents, share)[1]) == held
    assert len(split(documents, share)[0]) == 10 - held


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(4, 0.25, 1), (4, 0.5, 2), (4, 0.01, 1), (2, 0.9, 1), (10, 0.36, 4)],
)
def test_the_share_of_a_single_document_in_lines(count, share, held):
    text = "".join(f"{i}\n" for i in range(count))
    (train,), (end,) = split([Document("one", text)], share)
    assert (train.name, end.name) == ("one", "one (end)")
    assert end.text == "".join(f"{i}\n" for i in range(count - held, count))


def test_folders_and_files_are_read_in_the_order_that_is_given(tmp_path: Path):
    (tmp_path / "docs" / ".git").mkdir(parents=True)
    (tmp_path / "docs" / ".git" / "config").write_text("hidden by its folder")
    (tmp_path / "docs" / "z").write_text("z\r\nz")
    (tmp_path / "a").write_text("a")
    (tmp_path / ".dot").write_text("named, so it is read")
    (tmp_path / "blank").write_text("\n")
    paths = [tmp_path / name for name in ("docs", ".dot", "blank", "a")]
    found = read_files(paths)
    assert [(d.name, d.text) for d in found] == [
        ("docs/z", "z\nz"),
        (".dot", "named, so it is read"),
        ("a", "a"),
    ]
    data = text_files([tmp_path / "docs", tmp_path / "a"], share=0.5)
    assert data.name == "a, docs"
    assert sorted(d.name for d in [*data.streams["files"], *data.held_out]) == ["a", "docs/z"]
    assert (data.repeats, data.last_repeats, data.code) == ((1,), (1,), False)


def test_the_start_token_stands_before_every_document():
    stream = encode(byte_tokenizer(), documents_of(["a", "bc"]), begin=7)
    ids = byte_tokenizer().encode("abc")
    assert stream.tolist() == [7, ids[0], 7, *byte_tokenizer().encode("bc")]
    assert standard_library(tests=False).code
