"""Writing checkpoints: safetensors, and directories that are either complete or absent.

| function                     | what it writes                                         |
|------------------------------|--------------------------------------------------------|
| write_tensors, write_file    | ``model.safetensors``, or shards and their index       |
| write_directory              | a directory that takes its name once it is complete    |
| save                         | a Hugging Face checkpoint of full-precision weights    |

``transformers``, vLLM and llama.cpp's converter read the result: ``config.json``,
``generation_config.json``, ``tokenizer.json``, ``tokenizer_config.json`` and the weights
as safetensors (see ``checkpoints.tensor_files`` for the format). A tied head is stored
once. Only one tensor is in memory at a time.

Left out: model cards (pass one in ``extra_files``), uploading, quantised weights
(``quant.export`` writes them through ``write_directory``), the states of a training run
(``train.state``), the atomic writing of one file (``refllm.atomic``).
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

import numpy as np

from refllm.atomic import sync, sync_directory
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
    converted,
    host_dtype,
    tensor_shapes,
)
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.errors import InputError
from refllm.model.config import ModelConfig


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; it is on the disk when this returns."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        sync(file)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read one megabyte at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):  # mutate: equivalent (any size will do)
            digest.update(chunk)
    return digest.hexdigest()


_CODES = {name: code for code, name in (FLOATS | INTEGERS).items()}

STORED_TYPES = ("float16", "bfloat16", "float32")

# name → dtype ("float16", "bfloat16", "int32" …) and shape of each tensor to be written
TensorSpecs = Mapping[str, tuple[str, Shape]]
# name → the tensor, of the specified dtype and shape; called once for each
Read = Callable[[str], np.ndarray]


def write_tensors(
    directory: Path, specs: TensorSpecs, read: Read, limit: int | None = None
) -> None:
    """Write ``model.safetensors``, or shards of at most ``limit`` bytes (or one tensor) and
    their index.
    """
    shards = _split({name: _nbytes(*specs[name]) for name in specs}, limit)
    count = len(shards)
    if count == 1:
        files = [SINGLE]
    else:
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for file, names in zip(files, shards, strict=True):
        write_file(directory / file, {name: specs[name] for name in names}, read)
    if count > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {
            "metadata": {"total_size": sum(_nbytes(*spec) for spec in specs.values())},
            "weight_map": weight_map,
        }
        write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def write_file(path: Path, specs: TensorSpecs, read: Read) -> None:
    """Write one safetensors file, one tensor in memory at a time; it is on the disk when
    this returns.

    Tensors of wide types come first (as the safetensors library does it), so that each is
    aligned to its type and can be mapped.
    """
    # a stable sort: otherwise in the order of ``specs``
    names = sorted(specs, key=lambda name: -host_dtype(specs[name][0]).itemsize)
    with path.open("wb") as out:
        out.write(_header({name: specs[name] for name in names}))
        for name in names:
            dtype, shape = specs[name]
            tensor = read(name)
            if (tensor.dtype, tensor.shape) != (host_dtype(dtype), shape):
                raise AssertionError(
                    f"{name}: {tensor.dtype} {tensor.shape} is not the {dtype} {shape} of its spec"
                )
            # bfloat16 has no buffer protocol, its bytes have
            out.write(np.ascontiguousarray(tensor).reshape(-1).view("uint8").data)
        sync(out)


def _nbytes(dtype: str, shape: Shape) -> int:
    """Bytes of a tensor."""
    return int(host_dtype(dtype).itemsize) * math.prod(shape)


def _split(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Names in order, in shards of at most ``limit`` bytes, or of one tensor that is larger
    by itself.

    >>> _split({"a": 3, "b": 3, "c": 9, "d": 1}, limit=6)
    [['a', 'b'], ['c'], ['d']]
    """
    if limit is None:
        return [list(sizes)]
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _header(specs: TensorSpecs) -> bytes:
    """The length and the JSON at the start of a safetensors file; tensors follow without gaps."""
    # transformers rejects a file without this entry
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in specs.items():
        stop = start + _nbytes(dtype, shape)
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    # the data starts at a multiple of eight, so that it can be mapped
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


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
    """Write a checkpoint directory that ``load`` and transformers read; ``tensors`` have
    Hugging Face's names.

    All files are written to a new directory next to ``path`` and synced, and the directory
    is then renamed: a reader finds the old checkpoint or the new one and never a part, even
    after a crash. With ``overwrite`` the old directory is removed with everything in it;
    between two renames it is called ``.NAME.*.old``. ``extra_files`` maps plain file names
    to text (a model card, say).

    Raises
    ------
    CheckpointError
        for tensors that do not fit the config, values that are not finite in ``dtype``, and
        a ``path`` that must not be replaced. Nothing has changed then.
    ValueError
        for a ``dtype`` or ``max_shard_bytes`` that makes no sense.
    """
    if dtype not in STORED_TYPES:
        raise InputError(
            f"save: dtype {dtype!r} is not stored; choose one of {', '.join(STORED_TYPES)}"
        )
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise InputError(f"save: max_shard_bytes must be positive, got {max_shard_bytes}")
    target = resolved(path)
    check_target(target, overwrite)
    check_tensors(config, tensors, target)
    check_tied(config, tensors, target)

    def read(name: str) -> np.ndarray:
        """A tensor in the stored dtype."""
        return converted(to_numpy(tensors[name]), dtype, name, target)

    texts = documents(config, tokenizer, dtype, extra_files or {})
    specs = {name: (dtype, shape) for name, shape in tensor_shapes(config)}
    write_directory(target, texts, specs, read, max_shard_bytes=max_shard_bytes)


def write_directory(
    target: Path,
    texts: Mapping[str, str],
    specs: TensorSpecs,
    read: Read,
    *,
    max_shard_bytes: int | None = None,
    temporary: Path | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write text files and tensors to a new directory, then rename it to ``target`` (see ``save``).

    ``temporary`` is its name until then; ``finish`` is called with the complete directory
    before it is renamed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if temporary is None:
        temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    temporary.mkdir()
    try:
        for name, text in texts.items():
            write_text(temporary / name, text)
        write_tensors(temporary, specs, read, max_shard_bytes)
        if finish is not None:
            finish(temporary)
        sync_directory(temporary)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a success it has been renamed


def resolved(path: str | Path) -> Path:
    """The real path, with ~ expanded and links followed."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def documents(
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str,
    extra: Mapping[str, str],
    **entries: object,
) -> dict[str, str]:
    """The text files of a checkpoint, by name; ``entries`` are added to config.json."""
    raw = config.to_hf() | {"torch_dtype": dtype} | entries
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": raw["eos_token_id"]}
    generation = {key: token for key, token in generation.items() if token is not None}
    texts = {
        "config.json": json.dumps(raw, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    if tokenizer.available:
        texts["tokenizer_config.json"] = _tokenizer_config(tokenizer, config)
        texts["tokenizer.json"] = tokenizer.inner.to_str(pretty=True)
    for name in extra:
        plain = Path(name).name == name and name not in ("", "..")
        if not plain or name in texts or name.startswith(("model.", "model-")):
            raise CheckpointError(
                f"save: the extra file {name!r} must be a plain new file name in the directory"
            )
    return texts | dict(extra)


def _tokenizer_config(tokenizer: Tokenizer, config: ModelConfig) -> str:
    """The tokenizer_config.json that ``transformers`` reads beside tokenizer.json."""
    special = {
        "bos_token": config.bos_token_id,
        "eos_token": next(iter(config.eos_token_ids), None),
    }
    words = {key: tokenizer.inner.id_to_token(i) for key, i in special.items() if i is not None}
    entries = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: word for key, word in words.items() if word is not None},
        "model_max_length": config.max_position_embeddings,
        # otherwise decode(encode(x)) would drop spaces before punctuation
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


def check_target(target: Path, overwrite: bool) -> None:
    """CheckpointError if ``save`` must not write there: a file, a directory that is not empty
    (without ``overwrite``), or one that holds no checkpoint.
    """
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
    """Rename ``temporary`` to ``target``; an old ``target`` is moved aside first, and moved
    back if that fails.
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
    sync_directory(target.parent)
