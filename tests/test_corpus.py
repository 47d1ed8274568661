"""The corpus: held-out text is not trained on, enough is held out, and none of it is in the
repository.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from conftest import ROOT
from refllm import corpus
from refllm.corpus import (
    HELD_OUT,
    Document,
    held_out_documents,
    installer_documents,
    training_documents,
)

STEMS = (
    "argparse",
    "heapq",
    "textwrap",
    "statistics",
    "zipfile",
    "cookiejar",
    "difflib",
    "sched",
    "fractions",
)


@pytest.fixture(scope="module")
def held_out() -> list[Document]:
    return held_out_documents()


@pytest.fixture(scope="module")
def trained_on() -> list[Document]:
    """All training documents: the library, its topics, and, where present, its tests and
    installers.
    """
    return training_documents() + training_documents(tests=True) + installer_documents()


def test_every_held_out_module_is_there_and_they_are_enough(held_out):
    assert {Path(name).stem for name in HELD_OUT} == set(STEMS)
    for name in HELD_OUT:
        assert any(
            d.name in (name, f"{name}.py") or d.name.startswith(f"{name}/") for d in held_out
        ), name
    assert sum(len(d.text.encode()) for d in held_out) >= 200_000


def test_no_held_out_module_and_no_test_of_one_is_trained_on(held_out, trained_on):
    assert not {d.name for d in held_out} & {d.name for d in trained_on}
    for document in trained_on:
        parts = Path(document.name).with_suffix("").parts
        for stem in STEMS:
            assert stem not in parts, document.name
            assert not any(part.startswith(f"test_{stem}") for part in parts), document.name
        assert "test_http_cookiejar" not in parts


def runs_of_lines(text: str, length: int = 8) -> set[int]:
    """Hash of every run of ``length`` lines, stripped, of at least 200 characters."""
    lines = [line.strip() for line in text.splitlines()]
    runs = ("\n".join(lines[i : i + length]) for i in range(len(lines) - length + 1))
    return {hash(run) for run in runs if len(run) >= 200}


@pytest.fixture(scope="module")
def passages(held_out, trained_on) -> dict[str, set[int]]:
    """The runs of lines of every document of the corpus."""
    return {d.name: runs_of_lines(d.text) for d in held_out + trained_on}


def test_no_passage_of_a_held_out_module_occurs_in_the_training_text(
    held_out, trained_on, passages
):
    """By content and not by name: a vendored or quoted copy would be found."""
    unseen = set().union(*(passages[d.name] for d in held_out))
    assert len(unseen) > 3000  # the search is not empty
    for document in trained_on:
        assert unseen.isdisjoint(passages[document.name]), document.name


def test_library_and_tests_do_not_overlap_and_names_are_unique(trained_on):
    names = [d.name for d in trained_on]
    assert len(names) == len(set(names))
    library = {d.name for d in training_documents()}
    assert not any(name.startswith("test/") for name in library)
    assert {"ast.py", "json/decoder.py", "pydoc_data/topics/if"} <= library
    assert all(d.name.startswith("ensurepip/") for d in installer_documents())


def test_documents_are_text_and_no_tables(trained_on):
    for document in trained_on:
        assert document.text.strip()
        assert not document.name.startswith(("encodings/cp", "encodings/iso8859", "lib2to3/tests/"))
        assert "site-packages" not in document.name
        assert "\\" not in document.name


def digest(documents: list[Document]) -> str:
    return hashlib.sha256("\n".join(f"{d.name} {d.sha256}" for d in documents).encode()).hexdigest()


def test_the_documents_and_their_order_are_the_same_in_every_process(held_out, trained_on):
    """Another process, with another seed of Python's string hash and another working
    directory.
    """
    program = (
        "from refllm.corpus import *; import hashlib;"
        "d = training_documents() + training_documents(tests=True) + installer_documents() "
        "+ held_out_documents();"
        "print(hashlib.sha256('\\n'.join(f'{x.name} {x.sha256}' for x in d).encode()).hexdigest())"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(trained_on + held_out)


def test_nothing_of_the_text_is_copied_into_the_repository(passages):
    """No file of the project holds a passage of the corpus."""
    files = []
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and name not in ("runs", "build", "dist")
        ]
        files += [
            Path(folder, n)
            for n in names
            if n.endswith((".py", ".txt", ".md", ".json", ".ipynb", ".toml"))
        ]
    assert ROOT / "refllm/corpus.py" in files
    own = {
        run: path
        for path in files
        for run in runs_of_lines(path.read_text(encoding="utf-8", errors="replace"))
    }
    for name, runs in passages.items():
        copied = [str(own[run]) for run in runs & own.keys()]
        assert not copied, f"{copied[0]} holds a passage of {name}"


def test_an_interpreter_without_a_held_out_module_is_named(monkeypatch, tmp_path):
    (tmp_path / "argparse.py").write_text("x = 1\n")
    monkeypatch.setattr(corpus, "_root", lambda: tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"carries no source of the held-out module heapq\.py"
    ):
        held_out_documents()


def test_a_small_library_by_hand(monkeypatch, tmp_path):
    """Each rule once: what is read and what is skipped, as a module or as a package."""
    for name, text in {
        "a.py": "a = 1\n",
        "zipfile.py": "held out, as one file\n",
        "zipfile/_path.py": "held out, as a package\n",
        "http/cookiejar.py": "held out\n",
        "http/server.py": "read\n",
        "heapq_like.py": "read: another name\n",
        "empty.py": " \n",
        "encodings/cp037.py": "a table\n",
        "encodings/ascii.py": "read\n",
        "lib2to3/tests/data/x.py": "data\n",
        "pydoc_data/topics.py": "read by name instead\n",
        "site-packages/b.py": "not of the library\n",
        "test/test_heapq.py": "test of a held-out module\n",
        "test/test_zipfile/test_core.py": "test of a held-out module\n",
        "test/test_ast.py": "read with the tests\n",
        "unittest/test/test_case.py": "read with the tests\n",
        "note.txt": "no Python\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")  # not UTF-8
    monkeypatch.setattr(corpus, "_root", lambda: tmp_path)
    library = [d.name for d in training_documents() if not d.name.startswith("pydoc_data/topics/")]
    assert library == ["a.py", "encodings/ascii.py", "heapq_like.py", "http/server.py"]
    assert [d.name for d in training_documents(tests=True)] == [
        "test/test_ast.py",
        "unittest/test/test_case.py",
    ]


# --- the installers -----------------------------------------------------------------------


def wheel(root: Path, name: str, files: dict[str, str | bytes]) -> None:
    """A wheel as in ``ensurepip``."""
    folder = root / "ensurepip" / "_bundled"
    folder.mkdir(parents=True, exist_ok=True)
    with ZipFile(folder / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_two_installers_by_hand(monkeypatch, tmp_path):
    """Each rule once; of a text in both wheels the first is read."""
    files = {
        "pip/a.py": "a = b\r\n",
        "pip/_vendor/zipp.py": "what zipfile took its Path from\n",
        "pip/_vendor/zipp/glob.py": "the same, as a package\n",
        "pip/_vendor/zipped.py": "another name\n",
        "pip/table.py": "X = [0x1234567, 0x89]\n",
        "pip/empty.py": " \n",
        "pip/latin.py": b"# \xe9\n",
        "pip-1.dist-info/METADATA": "no Python\n",
    }
    wheel(tmp_path, "pip-1-py3-none-any.whl", files)
    wheel(
        tmp_path,
        "setuptools-2-py3-none-any.whl",
        {"setuptools/same.py": "a = b\n", "setuptools/b.py": "c = d\n"},
    )
    monkeypatch.setattr(corpus, "_root", lambda: tmp_path)
    assert [(d.name, d.text) for d in installer_documents()] == [
        ("ensurepip/pip/pip/_vendor/zipped.py", "another name\n"),
        ("ensurepip/pip/pip/a.py", "a = b\n"),
        ("ensurepip/setuptools/setuptools/b.py", "c = d\n"),
    ]


@pytest.mark.parametrize("folder", ["", "ensurepip", "ensurepip/_bundled"])
def test_an_interpreter_without_wheels_has_no_installers(monkeypatch, tmp_path, folder):
    """Debian's, for one."""
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(corpus, "_root", lambda: tmp_path)
    assert installer_documents() == []
