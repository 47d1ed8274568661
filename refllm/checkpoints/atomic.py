"""Writing a text file so that it is whole: the old one or the new one, whatever happens in between.

Left out: directories (``writer``) and tensors (``state``), which do the same in their own way.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name, then rename it. OSError (a full disk) leaves the old file as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # the bytes reach the disk before the name does, even if the power fails
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # after a success it is no longer there
