"""Atomic writing: a file that is either the complete new one or the old one, unchanged.

The way is POSIX's (and SQLite's, and every package manager's): write under a temporary name
in the same directory, wait until the bytes are on the disk, rename. ``checkpoints.writer``
does the same with a whole directory.

Left out: locks (of two writers at once the last one to finish wins), files that a killed
process leaves under its temporary name (``.NAME.*.partial``).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name next to ``path``: the file that the block writes there becomes
    ``path`` once the block has ended and the bytes are on the disk.

    After any exception (a full disk, an interruption) the old file is unchanged and the
    temporary one is gone.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "a.txt") as partial:
    ...         _ = partial.write_text("new")
    ...     [file.name for file in Path(folder).iterdir()]
    ['a.txt']
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("r+b") as file:
            sync(file)  # otherwise a power failure may leave the new name without its bytes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # after a success it has been renamed


def write_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text, line ends as they are. OSError (a full disk, say) leaves the old
    file unchanged.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def sync(file: IO[str] | IO[bytes]) -> None:
    """Wait until a file is on the disk, even if the power fails."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Wait until a directory's entries are on the disk (on POSIX; elsewhere a rename is
    durable without).
    """
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
