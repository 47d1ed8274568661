"""Checkpoints written: all files in a new directory that takes its name only when it is whole.

What is written is what ``transformers``, vLLM and llama.cpp's converter expect of a Hugging Face directory:
``config.json``, ``generation_config.json``, ``tokenizer.json``, ``tokenizer_config.json`` and the weights as
safetensors (the format is described in ``shards``), in one file or in shards. A tied head is stored once.

Left out: model cards (pass one in ``extra_files``), quantised layouts, uploading.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refllm.backend import Array, to_numpy
from refllm.model.config import ModelConfig
from refllm.model.shards import (
    FLOATS,
    INDEX,
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
from refllm.model.tokenizer import Tokenizer

STORED_TYPES = ("float16", "bfloat16", "float32")
_CODES = {name: code for code, name in FLOATS.items()}


def save(
    path: str | Path, config: ModelConfig, tensors: Mapping[str, Array], tokenizer: Tokenizer, *,
    dtype: str = "float16", max_shard_bytes: int | None = None, extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Write a directory that ``load`` and transformers read. ``tensors`` go under Hugging Face's names.

    All files are written and flushed in a new directory beside ``path``, which is then renamed: a reader, or
    a crash, finds the old checkpoint or the new one and never a part. With ``overwrite`` the old directory
    goes as a whole, whatever else it held; between two renames it waits under ``.NAME.*.old``.
    ``extra_files`` maps plain file names to text (a model card, say).

    Raises
    ------
    CheckpointError
        for tensors that do not fit the config, values that are not finite in ``dtype``, and a ``path`` that
        must not be replaced. Nothing has changed then.
    """
    if dtype not in STORED_TYPES:
        raise ValueError(f"save: dtype {dtype!r} is not stored; choose one of {', '.join(STORED_TYPES)}")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"save: max_shard_bytes must be positive, got {max_shard_bytes}")
    target = Path(os.path.realpath(os.path.expanduser(path)))
    check_target(target, overwrite)
    check_tensors(config, tensors, target)
    check_tied(config, tensors, target)
    check_vocabulary(tokenizer, config, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    temporary.mkdir()
    try:
        for name, text in _documents(config, tokenizer, dtype, extra_files or {}).items():
            _write_text(temporary / name, text)
        _write_tensors(temporary, config, tensors, dtype, max_shard_bytes, where=target)
        _flush_directory(temporary)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a success it is no longer there


def _documents(config: ModelConfig, tokenizer: Tokenizer, dtype: str, extra: Mapping[str, str]) -> dict[str, str]:
    """The text files of a checkpoint, by name."""
    raw = config.to_hf() | {"torch_dtype": dtype}
    special = {"bos_token": config.bos_token_id, "eos_token": next(iter(config.eos_token_ids), None)}
    words = {key: tokenizer.inner.id_to_token(i) for key, i in special.items() if i is not None}
    about_tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: word for key, word in words.items() if word is not None},
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,  # else decode(encode(x)) would drop spaces before punctuation
    }
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": raw["eos_token_id"]}
    documents = {
        "config.json": json.dumps(raw, indent=2) + "\n",
        "generation_config.json": json.dumps({k: v for k, v in generation.items() if v is not None}, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(about_tokens, indent=2, ensure_ascii=False) + "\n",
        "tokenizer.json": tokenizer.inner.to_str(pretty=True),
    }
    for name in extra:
        plain = Path(name).name == name and name not in ("", "..")
        if not plain or name in documents or name.startswith(("model.", "model-")):
            raise CheckpointError(f"save: the extra file {name!r} must be a plain new file name in the directory")
    return documents | dict(extra)


def check_target(target: Path, overwrite: bool) -> None:
    """CheckpointError if ``save`` would refuse to write there."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file: choose the name of a directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{target} is not empty: choose another name, or pass overwrite=True to replace it")
    if not (target / "config.json").is_file():  # a mistyped path must not cost a home directory
        raise CheckpointError(f"{target} holds no config.json: only a checkpoint is replaced; remove it yourself")


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target``; an old ``target`` is moved aside first, and back if that fails."""
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
    _flush_directory(target.parent)


def _flush_directory(path: Path) -> None:
    """Wait until a directory's entries are on the disk (POSIX; elsewhere a rename is durable by itself)."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_tensors(
    directory: Path, config: ModelConfig, tensors: Mapping[str, Array], dtype: str, limit: int | None, where: Path
) -> None:
    """Write the tensors that ``config`` names, in its order; each is looked up, converted, written, dropped."""
    shapes, size = dict(tensor_shapes(config)), host_dtype(dtype).itemsize
    shards = _share_out({name: size * math.prod(shape) for name, shape in shapes.items()}, limit)
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for file, names in zip(files, shards, strict=True):
        with (directory / file).open("wb") as out:
            out.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                tensor = converted(to_numpy(tensors[name]), dtype, name, where)
                out.write(tensor.reshape(-1).view("uint8").data)  # bfloat16 has no buffer protocol, its bytes have
            _settle(out)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = size * sum(math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def _share_out(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Names in order, cut into runs of at most ``limit`` bytes, or of one name that is larger alone."""
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


def _header(shapes: Mapping[str, Shape], dtype: str) -> bytes:
    """The length and the JSON with which a safetensors file begins; tensors follow without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that lacks it
    at, size = 0, host_dtype(dtype).itemsize
    for name, shape in shapes.items():
        end = at + size * math.prod(shape)
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of eight, so that it can be mapped as it is
    return struct.pack("<Q", len(text)) + text


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        _settle(file)


def _settle(file: Any) -> None:
    """Wait until a file is on the disk: a rename may reach it before the data does."""
    file.flush()
    os.fsync(file.fileno())
