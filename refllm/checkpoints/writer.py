"""Writing files that are either whole or absent: text, safetensors, and whole checkpoint
directories.

| function                     | what it writes                                         |
|------------------------------|--------------------------------------------------------|
| write_whole                  | one text file, under a temporary name that is renamed  |
| write_tensors, write_file    | ``model.safetensors``, or shards and their index       |
| write_directory              | a directory that takes its name once it is complete    |
| save                         | a Hugging Face checkpoint of full-precision weights    |

``transformers``, vLLM and llama.cpp's converter read the result: ``config.json``,
``generation_config.json``, ``tokenizer.json``, ``tokenizer_config.json`` and the weights
as safetensors (see ``checkpoints.tensor_files`` for the format). A tied head is stored
once. Only one tensor is in memory at a time.

Left out: model cards (pass one in ``extra_files``), uploading, quantised weights
(``quant.export`` writes them through ``write_directory``), the states of a training run
(``train.state``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refllm.backend import Array, to_numpy
from refllm.checkpoints.tensor_files import (
    FLOATS,
    INDEX,
    INTEGERS,
    SINGLE,
    CheckpointError,
    Shape,
    check_tensors,
    check_tied,
    check_vocabulary,
    converted,
    host_dtype,
    tensor_shapes,
)
from refllm.model.config import ModelConfig

if TYPE_CHECKING:  # the tokenizer itself writes its file with ``write_whole``
    from refllm.checkpoints.tokenizer import Tokenizer


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


_CODES = {name: code for code, name in (FLOATS | INTEGERS).items()}

# name → dtype's name ("float16", "bfloat16", "int32" …) and shape
Plan = Mapping[str, tuple[str, Shape]]
Read = Callable[[str], np.ndarray]  # the tensor of a name, of the planned type and shape


def write_tensors(directory: Path, plan: Plan, read: Read, limit: int | None = None) -> None:
    """Write ``model.safetensors``, or shards of at most ``limit`` bytes (or one tensor) and
    their index.
    """
    runs = _share_out({name: _size(*plan[name]) for name in plan}, limit)
    count = len(runs)
    if count == 1:
        files = [SINGLE]
    else:
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for file, names in zip(files, runs, strict=True):
        write_file(directory / file, {name: plan[name] for name in names}, read)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, runs, strict=True) for name in names}
        index = {
            "metadata": {"total_size": sum(_size(*entry) for entry in plan.values())},
            "weight_map": weight_map,
        }
        write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def write_file(path: Path, plan: Plan, read: Read) -> None:
    """Write one file and wait until it is on the disk; each tensor is asked for, written
    and dropped.
    """
    # stable: the plan's order otherwise
    names = sorted(plan, key=lambda name: -host_dtype(plan[name][0]).itemsize)
    with path.open("wb") as out:
        out.write(_header({name: plan[name] for name in names}))
        for name in names:
            dtype, shape = plan[name]
            tensor = np.ascontiguousarray(read(name))
            if (tensor.dtype, tensor.shape) != (host_dtype(dtype), shape):
                raise AssertionError(
                    f"{name}: {tensor.dtype} {tensor.shape} is not the {dtype} {shape} of the plan"
                )
            # bfloat16 has no buffer protocol, its bytes have
            out.write(tensor.reshape(-1).view("uint8").data)
        settle(out)


def _size(dtype: str, shape: Shape) -> int:
    return int(host_dtype(dtype).itemsize) * math.prod(shape)


def _share_out(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Names in order, cut into runs of at most ``limit`` bytes, or of one name that is
    larger alone.
    """
    if limit is None:
        return [list(sizes)]
    runs: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if runs[-1] and used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(name)
        used += size
    return runs


def _header(entries: Plan) -> bytes:
    """The length and the JSON with which a safetensors file begins; tensors follow without
    gaps.
    """
    # transformers refuses a file that lacks it
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in entries.items():
        end = at + _size(dtype, shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # data begins at a multiple of eight, so that it can be mapped as it is
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


STORED_TYPES = ("float16", "bfloat16", "float32")


def save(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Array],
    tokenizer: Tokenizer,
    *,
    dtype: str = "float16",
    max_shard_bytes: int | None = None,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a directory that ``load`` and transformers read. ``tensors`` go under Hugging
    Face's names.

    All files are written and flushed in a new directory beside ``path``, which is then
    renamed: a reader, or a crash, finds the old checkpoint or the new one and never a part.
    With ``overwrite`` the old directory goes as a whole, whatever else it held; between two
    renames it waits under ``.NAME.*.old``. ``extra_files`` maps plain file names to text (a
    model card, say).

    Raises
    ------
    CheckpointError
        for tensors that do not fit the config, values that are not finite in ``dtype``, and
        a ``path`` that must not be replaced. Nothing has changed then.
    """
    if dtype not in STORED_TYPES:
        raise ValueError(
            f"save: dtype {dtype!r} is not stored; choose one of {', '.join(STORED_TYPES)}"
        )
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"save: max_shard_bytes must be positive, got {max_shard_bytes}")
    target = resolved(path)
    check_target(target, overwrite)
    check_tensors(config, tensors, target)
    check_tied(config, tensors, target)
    check_vocabulary(tokenizer, config, target)

    def read(name: str) -> np.ndarray:
        return converted(to_numpy(tensors[name]), dtype, name, target)

    texts = documents(config, tokenizer, dtype, extra_files or {})
    plan = {name: (dtype, shape) for name, shape in tensor_shapes(config)}
    write_directory(target, texts, plan, read, max_shard_bytes=max_shard_bytes)


def write_directory(
    target: Path,
    texts: Mapping[str, str],
    plan: Plan,
    read: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int | None = None,
    temporary: Path | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write text files and tensors in a new directory, then give it the name ``target``
    (see ``save``).

    ``temporary`` is what it is called meanwhile; ``finish`` is shown it, whole, before it
    takes its name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if temporary is None:
        temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    temporary.mkdir()
    try:
        for name, text in texts.items():
            write_text(temporary / name, text)
        write_tensors(temporary, plan, read, max_shard_bytes)
        if finish is not None:
            finish(temporary)
        flush(temporary)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a success it is no longer there


def resolved(path: str | Path) -> Path:
    """The directory that ``path`` means, links and ~ followed."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def documents(
    config: ModelConfig, tokenizer: Tokenizer, dtype: str, extra: Mapping[str, str], **entries: Any
) -> dict[str, str]:
    """The text files of a checkpoint, by name; ``entries`` are added to config.json."""
    raw = config.to_hf() | {"torch_dtype": dtype} | entries
    special = {
        "bos_token": config.bos_token_id,
        "eos_token": next(iter(config.eos_token_ids), None),
    }
    words = {key: tokenizer.inner.id_to_token(i) for key, i in special.items() if i is not None}
    about_tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: word for key, word in words.items() if word is not None},
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,  # else decode(encode(x)) would drop spaces before punctuation
    }
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": raw["eos_token_id"]}
    texts = {
        "config.json": json.dumps(raw, indent=2) + "\n",
        "generation_config.json": json.dumps(
            {k: v for k, v in generation.items() if v is not None}, indent=2
        )
        + "\n",
        "tokenizer_config.json": json.dumps(about_tokens, indent=2, ensure_ascii=False) + "\n",
        "tokenizer.json": tokenizer.inner.to_str(pretty=True),
    }
    for name in extra:
        plain = Path(name).name == name and name not in ("", "..")
        if not plain or name in texts or name.startswith(("model.", "model-")):
            raise CheckpointError(
                f"save: the extra file {name!r} must be a plain new file name in the directory"
            )
    return texts | dict(extra)


def check_target(target: Path, overwrite: bool) -> None:
    """CheckpointError if ``save`` would refuse to write there."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file: choose the name of a directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} is not empty: choose another name, or pass overwrite=True to replace it"
        )
    if not (target / "config.json").is_file():  # a mistyped path must not cost a home directory
        raise CheckpointError(
            f"{target} holds no config.json: only a checkpoint is replaced; remove it yourself"
        )


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target``; an old ``target`` is moved aside first, and back
    if that fails.
    """
    if not target.exists():
        os.rename(temporary, target)
    else:
        old = temporary.with_suffix(".old")
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old)
    flush(target.parent)
