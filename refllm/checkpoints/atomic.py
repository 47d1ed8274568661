"""Files that are whole or not there: text written atomically, and bytes that have reached
the disk.

Left out: directories and tensors (``checkpoints.directory_writer``), training states
(``train.state``).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name, then rename it. OSError (a full disk) leaves
    the old file as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            # the bytes reach the disk before the name does, even if the power fails
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # after a success it is no longer there


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, on the disk when this returns."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        settle(file)


def flush(directory: Path) -> None:
    """Wait until a directory's entries are on the disk (POSIX; elsewhere a rename is
    durable by itself).
    """
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle(file: Any) -> None:
    """Wait until a file is on the disk: a rename may reach it before the data does."""
    file.flush()
    os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """The digest of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
