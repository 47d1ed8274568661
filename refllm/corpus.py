"""The text that every CPython installation includes: training and held-out documents.

It is read from the running interpreter, never copied into the repository: the standard
library's ``.py`` files, ``pydoc_data.topics`` and, where present, the ``test`` package and
the installers (pip, setuptools and what they vendor) that ``ensurepip`` includes as wheels.
The held-out modules are excluded by name from all training documents, and so are their
tests and copies of them.

The text differs a little between Python versions, so a measurement on it names the version.
Within one installation the documents and their order are always the same.

Left out: files that are tables rather than code (the charmap codecs, and files in the
wheels with more than a tenth of digits), lib2to3's test data, and files that are not UTF-8.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

HELD_OUT = (
    "argparse.py",
    "heapq.py",
    "textwrap.py",
    "statistics.py",
    "zipfile",  # one file up to Python 3.11, a package since 3.12
    "http/cookiejar.py",
    "difflib.py",
    "sched.py",
    "fractions.py",
)
_TESTS_OF_HELD_OUT = (*("test_" + Path(name).stem for name in HELD_OUT), "test_http_cookiejar")
_SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__")
# the package that zipfile copied its Path from, line for line
_COPIES_OF_HELD_OUT = ("zipp.py", "zipp/")
_TABLE_DIGITS = 0.1  # a file with a larger share of digits is data
_CHARMAPS = ("cp", "iso8859", "mac_", "koi8", "kz1048", "ptcp", "tis_", "hp_")


@dataclass(frozen=True)
class Document:
    """One source file: its path below the library's root (POSIX) and its text."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the UTF-8 text, to record which text a model has seen
        without copying it.
        """
        return hashlib.sha256(self.text.encode()).hexdigest()


def _root() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def held_out_documents() -> list[Document]:
    """The held-out modules of the running interpreter, sorted by name (479 kB in CPython 3.11.7).

    Raises
    ------
    FileNotFoundError
        if the interpreter has no source of one of them (embedded and trimmed builds).
    """
    root = _root()
    found = []
    for name in HELD_OUT:
        if name.endswith(".py"):
            candidates = [root / name]
        else:
            candidates = [root / f"{name}.py", *(root / name).rglob("*.py")]
        present = [path for path in candidates if path.is_file()]
        if not present:
            version = ".".join(map(str, sys.version_info[:3]))
            raise FileNotFoundError(
                f"Python {version} in {root} carries no source of the held-out module {name}"
            )
        found += present
    return _read(root, found)


def training_documents(*, tests: bool = False) -> list[Document]:
    """The documents that may be trained on: the library and its topics, or (``tests=True``)
    its test package.
    """
    root = _root()
    found = []
    for folder, subfolders, files in os.walk(root):
        # in place: os.walk does not enter the others
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            name = path.relative_to(root).as_posix()
            if _is_held_out(name) or _is_table(name) or _is_test(name) != tests:
                continue
            if tests and any(part in name for part in _TESTS_OF_HELD_OUT):
                continue
            found.append(path)
    documents = _read(root, found)
    return documents if tests else documents + _topics()


def installer_documents() -> list[Document]:
    """The Python source in the wheels of ``ensurepip``; a text that occurs twice is read once.

    Empty where the interpreter's packager has removed the wheels, as Debian does.
    """
    documents: dict[str, Document] = {}
    for wheel in sorted((_root() / "ensurepip" / "_bundled").glob("*.whl")):
        for document in _python_in(wheel):
            documents.setdefault(document.sha256, document)
    return sorted(documents.values(), key=lambda d: d.name)


def _python_in(wheel: Path) -> Iterator[Document]:
    """The Python source in a wheel, except for data and copies of held-out modules."""
    with ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".py") or any("/" + copy in name for copy in _COPIES_OF_HELD_OUT):
                continue
            try:
                text = archive.read(name).decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:
                continue
            if text.strip() and sum(c.isdigit() for c in text) < _TABLE_DIGITS * len(text):
                yield Document(f"ensurepip/{wheel.name.split('-')[0]}/{name}", text)


def _is_held_out(name: str) -> bool:
    """Whether a path below the library belongs to a held-out module."""
    return any(name in (h, h + ".py") or name.startswith(h + "/") for h in HELD_OUT)


def _is_table(name: str) -> bool:
    """Whether a path below the library is a table rather than code."""
    charmap = name.startswith(tuple("encodings/" + c for c in _CHARMAPS))
    # the topics are read by ``_topics`` instead
    return charmap or name.startswith(("lib2to3/tests/", "pydoc_data/"))


def _is_test(name: str) -> bool:
    """Whether a path below the library belongs to a test package."""
    return name.startswith(("test/", "tests/")) or any(
        part in name for part in ("/test/", "/tests/", "idle_test")
    )


def _read(root: Path, paths: list[Path]) -> list[Document]:
    """The documents at ``paths`` in the order of their names; empty files and files that
    are not UTF-8 are skipped.
    """
    documents = []
    for path in sorted(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            documents.append(Document(path.relative_to(root).as_posix(), text))
    return documents


def _topics() -> list[Document]:
    """The language reference as ``help()`` prints it: prose about Python, one document per
    topic.
    """
    from pydoc_data.topics import topics

    return [
        Document(f"pydoc_data/topics/{name}", text)
        for name, text in sorted(topics.items())
        if text.strip()
    ]
