"""Types of metadata entries: those of one architecture are checked when they are read, those
of the tokenizer when a file is opened.

Left out: the values of the tokenizer's entries (``gguf_tokenizer``, ``gguf_special_tokens``).
"""

from __future__ import annotations

import numpy as np

from refllm.array_types import JsonView
from refllm.checkpoints.tensor_files import CheckpointError

__all__ = ["Entries", "check_types"]

# Entries that are read whatever the architecture → what they are
_TYPES = {
    "tokenizer.ggml.model": "a string",
    "tokenizer.ggml.pre": "a string",
    "tokenizer.ggml.tokens": "a list of strings",
    "tokenizer.ggml.merges": "a list of strings",
    "tokenizer.ggml.scores": "a list of numbers",
    "tokenizer.ggml.token_type": "a list of integers",
    "tokenizer.ggml.add_space_prefix": "a boolean",
}


def check_types(metadata: JsonView, where: str) -> None:
    """CheckpointError for an entry of the tokenizer that has another type than the
    specification's.
    """
    for key, wanted in _TYPES.items():
        if key in metadata and _kind(metadata[key]) != wanted:
            if wanted == "a list of numbers" and _kind(metadata[key]) == "a list of integers":
                continue
            raise CheckpointError(
                f"{where}: the entry {key} is {metadata[key]!r:.40}, not {wanted}"
            )


def _kind(value: object) -> str:
    """What a value is, in the words of ``_TYPES``."""
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "a list of strings"
    if isinstance(value, bool | np.bool_):
        return "a boolean"
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return "a list of integers"
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return "a list of numbers"
    return "a number"


class Entries:
    """The entries of one architecture; CheckpointError for one that has another type."""

    def __init__(self, metadata: JsonView, arch: str, where: str):
        self.metadata = metadata
        self.arch = arch
        self.where = where

    def has(self, key: str) -> bool:
        """Whether there is an entry ``ARCHITECTURE.key``."""
        return f"{self.arch}.{key}" in self.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        """The integer ``ARCHITECTURE.key``; ``default`` if there is no such entry."""
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0]  # some files have one value per layer
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self._wrong(key, value, "an integer")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """The number ``ARCHITECTURE.key``; ``default`` if there is no such entry."""
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise self._wrong(key, value, "a number")
        # the shortest decimal that is this float32: 1e-05, not 9.99999975e-06
        return float(str(value))

    def text(self, key: str, default: str) -> str:
        """The string ``ARCHITECTURE.key``; ``default`` if there is no such entry."""
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        """The error for an entry that is missing, or of another type."""
        if value is None:
            return CheckpointError(f"{self.where}: the entry {self.arch}.{key} is missing")
        return CheckpointError(
            f"{self.where}: the entry {self.arch}.{key} is {value!r:.40}, not {wanted}"
        )
