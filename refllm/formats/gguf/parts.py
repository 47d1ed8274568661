"""A GGUF file in several parts: opened as one, whichever part is named.

llama.cpp's ``llama-gguf-split`` and the ``gguf`` package write ``NAME-00001-of-00004.gguf``
and so on. The first part holds the metadata, and each part the records and bytes of its own
tensors; the first one may have none.

| entry               | meaning                                     |
|---------------------|---------------------------------------------|
| split.count         | how many parts there are; 0 and 1 mean none |
| split.no            | which part this is, from 0 on               |
| split.tensors.count | how many tensors all parts hold together    |

Left out: parts of other names, writing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from refllm.formats.gguf.reader import GGUFError, GGUFFile

__all__ = ["GGUFParts", "open_gguf", "part_names"]

MOST_PARTS = 1 << 16
_NAME = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.gguf", re.DOTALL)


def open_gguf(path: str | Path) -> GGUFFile:
    """A GGUF file, or all parts of it.

    Raises
    ------
    GGUFError
        for what ``GGUFFile`` rejects, and for parts that are missing or do not belong
        together.
    """
    file = GGUFFile(path)
    count = _entry(file, "split.count", 1)
    if count <= 1:
        return file
    number = _entry(file, "split.no", None)
    names = part_names(file.path.name, number, count)
    if names is None:
        raise GGUFError(
            f"{file.path} is part {number + 1} of {count}, but its name does not end in "
            f"-{number + 1:05d}-of-{count:05d}.gguf: give all parts the names that they had, or "
            "join them with llama-gguf-split --merge"
        )
    paths = [file.path.with_name(name) for name in names]
    missing = [part.name for part in paths if not os.path.isfile(part)]
    if missing:
        raise GGUFError(
            f"{file.path} is part {number + 1} of {count}, and {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} missing beside it: download all parts"
        )
    return GGUFParts(file.path, [GGUFFile(part) for part in paths])


def part_names(name: str, number: int, count: int) -> list[str] | None:
    """The names of all parts, given that of part ``number`` (from 0 on) of ``count``; None if
    it is no such name.

    >>> part_names("m-00002-of-00003.gguf", 1, 3)
    ['m-00001-of-00003.gguf', 'm-00002-of-00003.gguf', 'm-00003-of-00003.gguf']
    """
    found = _NAME.fullmatch(name)
    if found is None or (int(found[2]), int(found[3])) != (number + 1, count):
        return None
    return [f"{found[1]}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]


class GGUFParts(GGUFFile):
    """All parts of a file as one ``GGUFFile``: the metadata of the first part, the tensors of
    all.
    """

    def __init__(self, path: Path, parts: list[GGUFFile]):
        self.path = path
        self.metadata = parts[0].metadata
        self.alignment = parts[0].alignment
        self.tensors = {}
        self._holder: dict[str, GGUFFile] = {}
        self._parts = parts
        for i, part in enumerate(parts):
            stated = (_entry(part, "split.no", None), _entry(part, "split.count", None))
            if stated != (i, len(parts)):
                raise GGUFError(
                    f"{part.path} says that it is part {stated[0] + 1} of {stated[1]}: the parts "
                    "belong to different files"
                )
            for name in part.tensors:
                if name in self.tensors:
                    raise GGUFError(
                        f"{part.path} holds {name!r}, which {self._holder[name].path.name} holds "
                        "too: the parts belong to different files"
                    )
                self.tensors[name] = part.tensors[name]
                self._holder[name] = part
        total = _entry(parts[0], "split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise GGUFError(
                f"{parts[0].path} says that its parts hold {total} tensors, but they hold "
                f"{len(self.tensors)}: the parts belong to different files"
            )

    @property
    def paths(self) -> list[Path]:
        """The parts, in their order."""
        return [part.path for part in self._parts]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._holder[name][name]

    def forget(self, name: str) -> None:
        """``GGUFFile.forget``"""
        self._holder[name].forget(name)

    def __exit__(self, *exception: object) -> None:
        for part in self._parts:
            part.__exit__(*exception)


def _entry(file: GGUFFile, key: str, default: int | None) -> int:
    """The integer ``key`` of the metadata; GGUFError if it is missing without a default, or
    something else.
    """
    value = file.metadata.get(key, default)
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise GGUFError(f"{file.path}: the entry {key} is {value!r:.40}, not an integer")
    if not 0 <= value <= MOST_PARTS << 16:
        raise GGUFError(f"{file.path}: the entry {key} is {value}, which makes no sense")
    return int(value)
