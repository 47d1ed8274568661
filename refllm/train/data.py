"""From documents to token streams: the documents of the standard library, or of given text
files, and their token ids.

| name      | meaning                                                                     |
|-----------|-----------------------------------------------------------------------------|
| document  | one text with a name (``corpus.Document``)                                 |
| stream    | the ids of many documents, each after a start token, int32[T]              |
| ``Data``  | the documents of each stream, its passes per epoch, and held-out documents |

The standard library makes two streams, the library and its test package. Tests are
repetitive and so less valuable: each pass through them goes with several passes through the
library, and the last phase uses the library alone. Given text files make one stream.

Left out: anything but UTF-8 text; streaming from disk (all text is in memory).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refllm import corpus
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.corpus import Document
from refllm.errors import InputError

LIBRARY_PASSES = 4  # per pass through the tests of the library
INSTALLER_PASSES = 3  # through pip and setuptools, per pass through the tests


@dataclass(frozen=True)
class Data:
    """The documents that a run trains on, and those that it is evaluated on.

    ``repeats`` and ``last_repeats`` (of the last phase) are those of ``schedule.Phase``.
    """

    name: str
    streams: dict[str, list[Document]]
    held_out: list[Document]
    repeats: tuple[int, ...]
    last_repeats: tuple[int, ...]
    code: bool = False  # Python source


def standard_library(*, tests: bool = True, installers: bool = False) -> Data:
    """The library of the running interpreter, with its test package and the installers in
    ``ensurepip`` where they are wanted and present.
    """
    streams = {"library": corpus.training_documents()}
    name = "the Python standard library"
    repeats = [LIBRARY_PASSES]
    last = [1]
    if tests and (documents := corpus.training_documents(tests=True)):
        streams["tests"] = documents
        name = name + ", its tests"
        repeats = [*repeats, 1]
        last = [*last, 0]
    if installers and (documents := corpus.installer_documents()):
        streams["installers"] = documents
        name = name + ", the installers that it carries"
        repeats = [*repeats, INSTALLER_PASSES]
        last = [*last, 1]
    name = " and ".join(name.rsplit(", ", 1))
    if len(streams) == 1:
        repeats = [1]
    return Data(name, streams, corpus.held_out_documents(), tuple(repeats), tuple(last), code=True)


def text_files(paths: Sequence[Path], held_out: Sequence[Path] = (), share: float = 0.05) -> Data:
    """Text files, and folders of them, as one stream.

    Without ``held_out``, about ``share`` of the text is held out: complete documents,
    chosen by the hash of their text, so that the choice changes little when files are
    added; of a single document, its last lines.

    Raises
    ------
    ValueError
        if there is no text, or nothing would be left to train on.
    FileNotFoundError
        for a path that does not exist.
    """
    documents = read_files(paths)
    if held_out:
        tests = read_files(held_out)
        # held-out text is never trained on, under any name
        known = {d.sha256 for d in tests}
        documents = [d for d in documents if d.sha256 not in known]
    else:
        documents, tests = split(documents, share)
    if not documents or not tests:
        raise InputError(
            "the data is too small to be split into training and held-out text: give more of it"
        )
    return Data(
        ", ".join(sorted({path.name or str(path) for path in paths})),
        {"files": documents},
        tests,
        (1,),
        (1,),
    )


def read_files(paths: Iterable[Path]) -> list[Document]:
    """One document for each non-empty UTF-8 file in ``paths``, folders in the order of names.

    In a folder, hidden files and files that are not UTF-8 are skipped; ValueError for a
    path to a file that is not UTF-8, or if there is no text. Every kind of line end is read
    as ``\\n``: bytes are counted without carriage returns.
    """
    documents = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            for file in inside:
                if not any(part.startswith(".") for part in file.relative_to(path).parts):
                    documents += _document(
                        file, f"{path.name}/{file.relative_to(path).as_posix()}", named=False
                    )
        else:
            documents += _document(path, path.name, named=True)
    if not documents:
        raise InputError(f"no text was found in {', '.join(map(str, paths))}")
    return documents


def _document(path: Path, name: str, *, named: bool) -> list[Document]:
    """The document of a file, or none if it is empty, or not UTF-8 and not ``named`` by the
    caller.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if named:
            raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from error
        return []
    return [Document(name, text)] if text.strip() else []


def split(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, which together are the given ones; see ``text_files``.

    >>> training, held_out = split([Document("notes", "one\\ntwo\\nthree\\nfour\\n")], 0.25)
    >>> training[0].text, held_out[0].text
    ('one\\ntwo\\nthree\\n', 'four\\n')
    """
    if not 0 < share < 1:
        raise InputError(f"the held-out share must be within (0, 1), got {share}")
    if len(documents) == 1:
        return _split_lines(documents[0], share)
    total = sum(len(d.text) for d in documents)
    taken = 0
    held: set[int] = set()
    for index in sorted(range(len(documents)), key=lambda i: documents[i].sha256):
        if held and (taken >= share * total or len(held) == len(documents) - 1):
            break
        held.add(index)
        taken += len(documents[index].text)
    return (
        [d for i, d in enumerate(documents) if i not in held],
        [d for i, d in enumerate(documents) if i in held],
    )


def _split_lines(document: Document, share: float) -> tuple[list[Document], list[Document]]:
    """``split`` of a single document: its last lines are held out."""
    lines = document.text.splitlines(keepends=True)
    if len(lines) < 2:
        return [], [Document(f"{document.name} (end)", document.text)]
    # both sides get a line
    cut = max(1, len(lines) - max(1, round(share * len(lines))))
    training = Document(document.name, "".join(lines[:cut]))
    return [training], [Document(f"{document.name} (end)", "".join(lines[cut:]))]


def encode(
    tokenizer: Tokenizer, documents: Sequence[Document], begin: int = 0
) -> NDArray[np.int32]:
    """The documents as one stream of ids, each document after the id ``begin``; int32[T]."""
    ids = tokenizer.encode_batch([d.text for d in documents])
    return np.concatenate([np.array([begin, *part], dtype=np.int32) for part in ids])


def fingerprint(documents: Iterable[Document]) -> dict[str, str]:
    """Name → sha256 of every text: records which text was read without copying it."""
    return {d.name: d.sha256 for d in documents}
