"""The text that every CPython installation carries: training and held-out documents.

Read from the running interpreter, never copied into the repository: the standard library's ``.py`` files,
``pydoc_data.topics`` and, where it is installed, the ``test`` package. The held-out modules are excluded by
name from everything that is trained on, and so are their tests.

Left out: files that are tables rather than code (the charmap codecs), lib2to3's test data, and any file
that is not UTF-8.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

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
_TESTS_OF_HELD_OUT = tuple("test_" + Path(n).stem for n in HELD_OUT) + ("test_http_cookiejar",)
_NOT_TEXT = ("site-packages", "__pycache__", "dist-packages")


@dataclass(frozen=True)
class Document:
    """One source file: its path below the library's root (POSIX) and its text."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _is_held_out(name: str) -> bool:
    return any(name in (h, h + ".py") or name.startswith(h + "/") for h in HELD_OUT)


def _is_table(name: str) -> bool:
    stem = name.removeprefix("encodings/")
    charmap = stem != name and stem.startswith(("cp", "iso8859", "mac_", "koi8", "kz1048", "ptcp", "tis_", "hp_"))
    return charmap or name.startswith(("lib2to3/tests/data", "pydoc_data/")) or "lib2to3/tests/" in name


def _read(root: Path, paths: list[Path]) -> list[Document]:
    documents = []
    for path in sorted(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            documents.append(Document(path.relative_to(root).as_posix(), text))
    return documents


def held_out_documents() -> list[Document]:
    """The held-out modules of the running interpreter, sorted by name (about 390 kB in CPython 3.11)."""
    root = _root()
    paths = [p for h in HELD_OUT for p in ([root / h] if h.endswith(".py") else [root / f"{h}.py"])]
    paths += [p for h in HELD_OUT if not h.endswith(".py") for p in (root / h).rglob("*.py")]
    return _read(root, [p for p in paths if p.is_file()])


def training_documents(*, tests: bool = False) -> list[Document]:
    """Everything that may be trained on: the library and its topics, or (``tests=True``) its test package."""
    root = _root()
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        first = name.split("/", 1)[0]
        if first in _NOT_TEXT or "__pycache__" in name or _is_held_out(name) or _is_table(name):
            continue
        in_tests = first in ("test", "tests") or "/test/" in name or "/tests/" in name or "idle_test" in name
        if in_tests != tests:
            continue
        if in_tests and any(part in name for part in _TESTS_OF_HELD_OUT):
            continue
        found.append(path)
    documents = _read(root, found)
    return documents if tests else documents + _topics()


def _topics() -> list[Document]:
    """The language reference as ``help()`` carries it: prose about Python, one document a topic."""
    from pydoc_data.topics import topics

    return [Document(f"pydoc_data/topics/{k}", v) for k, v in sorted(topics.items()) if v.strip()]
