"""From documents to what training reads: token streams, and documents made of one's own
files.

| name      | meaning                                                                     |
|-----------|-----------------------------------------------------------------------------|
| document  | one text with a name (``corpus.Document``)                                  |
| stream    | the ids of many documents, each behind a beginning token, int32[T]          |
| ``Data``  | the streams' documents, how often each stream is passed through, held-out   |

The standard library makes two streams, the library and its test package, because they
differ in worth: tests repeat themselves, so the library is passed through several times for
each pass through the tests, and the last phase sees the library alone. One's own files make
one stream.

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

LIBRARY_PASSES = 4  # through the library for each pass through its tests
INSTALLER_PASSES = 3  # through pip and setuptools for each pass through the tests


@dataclass(frozen=True)
class Data:
    """What a run trains on and is judged by. ``repeats`` and ``last_repeats`` are as in
    ``plan.Phase``.
    """

    name: str
    streams: dict[str, list[Document]]
    held_out: list[Document]
    repeats: tuple[int, ...]
    last_repeats: tuple[int, ...]
    code: bool = False  # is it Python?


def standard_library(*, tests: bool = True, installers: bool = False) -> Data:
    """The running interpreter's own library; without its test package, or the installers
    that ``ensurepip`` carries, where they are absent or not wanted.
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


def own_files(paths: Sequence[Path], held_out: Sequence[Path] = (), share: float = 0.05) -> Data:
    """Text files, and folders of them, as one stream.

    Without ``held_out``, about ``share`` of the bytes is held out: whole documents, chosen
    by the hash of their text, so that the choice does not move when files are added; of a
    single document, its last lines.

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
        # a text that is held out is never trained on, whatever its name
        known = {d.sha256 for d in tests}
        documents = [d for d in documents if d.sha256 not in known]
    else:
        documents, tests = split(documents, share)
    if not documents or not tests:
        raise ValueError(
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
    """One document for each non-empty UTF-8 file in ``paths``, folders walked in the order
    of names.

    In a folder, hidden files and what is no UTF-8 text are passed over; a file named
    outright must be text. Every kind of line end is read as ``\\n``: a text's bytes are
    counted without the carriage returns.
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
        raise ValueError(f"no text was found in {', '.join(map(str, paths))}")
    return documents


def _document(path: Path, name: str, *, named: bool) -> list[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if named:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
        return []
    return [Document(name, text)] if text.strip() else []


def split(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents; see ``own_files``. Both together are the documents
    given.
    """
    if not 0 < share < 1:
        raise ValueError(f"the held-out share must be within (0, 1), got {share}")
    if len(documents) == 1:
        lines = documents[0].text.splitlines(keepends=True)
        # both sides get a line where there are two
        kept = max(1, len(lines) - max(1, round(share * len(lines))))
        cut = kept if len(lines) > 1 else 0
        name = documents[0].name
        parts = (
            Document(name, "".join(lines[:cut])),
            Document(f"{name} (end)", "".join(lines[cut:])),
        )
        return ([parts[0]] if cut else []), [parts[1]]
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


def encode(
    tokenizer: Tokenizer, documents: Sequence[Document], begin: int = 0
) -> NDArray[np.int32]:
    """The documents as one stream of ids, each document behind the id ``begin``; int32[T]."""
    ids = tokenizer.encode_batch([d.text for d in documents])
    return np.concatenate([np.array([begin, *part], dtype=np.int32) for part in ids])


def fingerprint(documents: Iterable[Document]) -> dict[str, str]:
    """Name → sha256 of every text: says which text was read without copying any of it."""
    return {d.name: d.sha256 for d in documents}
