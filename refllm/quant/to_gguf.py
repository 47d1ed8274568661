"""Checkpoints to GGUF: a Hugging Face directory, or a GGUF file in floating point, becomes a
file that llama.cpp opens.

The tensors are cut into slabs of rows, which are independent of each other: each worker opens
the source itself, reads its rows, encodes them, and sends the bytes back. The file is written
in order as they arrive. So memory holds only the slabs in flight, and a checkpoint larger
than the memory can be converted.

| part                             | where                                                      |
|----------------------------------|------------------------------------------------------------|
| names, rows of q and k, metadata | ``checkpoints.gguf_names``                                 |
| tokenizer                        | ``checkpoints.gguf_tokenizer_writer``                      |
| types                            | ``formats.gguf.mixes``                                     |
| encoding                         | ``formats.gguf.codec``                                     |
| workers                          | ``worker_pool``                                            |
| importance                       | ``imatrix``                                                |

The files that a worker has open belong to one conversion: the next one opens them again, since
the source may have been rewritten in between. They are closed when a conversion ends; only the
processes of a caller's own executor keep the newest source open, until their next conversion.

Left out: sources that are quantised already (rounding errors would be rounded again).
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from refllm.backend import to_numpy
from refllm.checkpoints import gguf
from refllm.checkpoints.chat_template import ChatTemplates
from refllm.checkpoints.chat_template_files import (
    templates_beside,
    templates_from_directory,
    templates_from_metadata,
    templates_metadata,
    tokens_read_otherwise,
)
from refllm.checkpoints.gguf import GGUFTensors, open_file
from refllm.checkpoints.gguf_names import (
    architecture,
    config_metadata,
    gguf_name,
    permutation,
)
from refllm.checkpoints.gguf_rope import ROPE_FACTORS, rope_factors
from refllm.checkpoints.gguf_tokenizer_writer import tokenizer_metadata
from refllm.checkpoints.loading import read_config
from refllm.checkpoints.quantization_files import read_quantization
from refllm.checkpoints.sources import is_gguf
from refllm.checkpoints.tensor_files import (
    CheckpointError,
    TensorFiles,
    check_tensors,
    check_tied,
    converted,
    tensor_shapes,
)
from refllm.checkpoints.tokenizer import Tokenizer, read_tokenizer
from refllm.errors import InputError
from refllm.formats.gguf.codec import quantize
from refllm.formats.gguf.mixes import MIXES, Heads, bits_per_weight, mix, mix_name
from refllm.formats.gguf.types import gguf_type, row_bytes
from refllm.formats.gguf.writer import write
from refllm.model.config import ModelConfig
from refllm.quant.worker_pool import in_order, processes

__all__ = ["Converted", "convert", "open_source"]

SLAB = 1 << 23  # weights per slab

Plan = dict[str, tuple[str, tuple[int, ...]]]  # GGUF name → (storage type, shape), in file order


@dataclass(frozen=True)
class Converted:
    """The file that was written; ``notes`` say what GGUF cannot express of the tokenizer."""

    path: Path
    types: dict[str, str]  # GGUF name → storage type
    nbytes: int
    bits_per_weight: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slab:
    """Rows ``start`` to ``stop`` of a tensor: everything that a worker needs to know."""

    source: str
    conversion: str  # different for each call of ``convert``, whatever the source
    name: str  # Hugging Face's name
    type: str
    start: int
    stop: int
    importance: np.ndarray | None = None  # of the columns, float32


def writable(target: str | Path, overwrite: bool) -> Path:
    """The path of a file that may be written. CheckpointError if something is there that must
    not be replaced, or the folder that it is to lie in is missing.
    """
    target = Path(os.path.expanduser(target))
    if not target.parent.exists():
        raise CheckpointError(
            f"{target} cannot be written: create the folder {target.parent} first, or choose "
            "another one"
        )
    if target.exists() and not (overwrite and target.is_file()):
        advice = "choose another name"
        if target.is_file():
            advice += ", or replace it with --overwrite"
        raise CheckpointError(f"{target} is there already: {advice}")
    return target


def convert(
    source: str | Path,
    target: str | Path,
    type: str = "Q4_K_M",
    *,
    importance: Mapping[str, np.ndarray] | None = None,
    executor: Executor | Callable[[], Executor] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Converted:
    """Write ``target``, a GGUF file of the mix ``type``, from the checkpoint ``source``.

    Parameters
    ----------
    importance
        GGUF name → float32 [N] (``imatrix``); other tensors are encoded without.
    executor
        an ``Executor``, or a function that creates one. None is ``workers`` processes (as
        many as there are cores if None), or this process alone if that is 1.
    tokenizer
        A folder whose tokenizer.json, and whose chat templates if it has any, are written in
        place of the source's own.
    progress
        is called with (bytes written, all bytes).

    Raises
    ------
    CheckpointError
        for an invalid source, a target that exists, weights that the type cannot hold, and a
        tokenizer that GGUF cannot hold.
    """
    target = writable(target, overwrite)
    type = mix_name(type)
    config, text = open_source(source, tokenizer)
    notes: list[str] = []
    templates = templates_beside(tokenizer, _chat_templates(source))
    entries = tokenizer_metadata(text, _ending_as(config, text, templates), notes.append)
    notes += tokens_read_otherwise(templates, entries)
    shapes = {gguf_name(name): shape for name, shape in _ordered(config)}
    heads = Heads(
        architecture(config),
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    types = mix(shapes, type, heads, importance=importance is not None)
    plan: Plan = {name: (types[name], shape) for name, shape in shapes.items()}
    importance = importance or {}
    _check_importance(importance, shapes)
    factors = rope_factors(config)
    if factors is not None:
        plan = {ROPE_FACTORS: ("F32", (factors.size,))} | plan
    slabs = _slabs(config, str(source), plan, importance)
    total = sum(_nbytes(entry) for entry in plan.values())
    done = 0

    def read(name: str, encoded: Iterator[np.ndarray]) -> np.ndarray:
        nonlocal done
        if name == ROPE_FACTORS:
            assert factors is not None
            return factors.view(np.uint8)
        out = np.empty(_nbytes(plan[name]), dtype=np.uint8)
        at = 0
        while at < out.size:
            part = next(encoded)
            out[at : at + part.size] = part
            at += part.size
            done += part.size
            progress(done, total)
        return out

    metadata = config_metadata(config, _model_name(source))
    metadata["general.file_type"] = np.uint32(MIXES[type][1])
    if any(gguf_type(t).quantized for t in types.values()):
        metadata["general.quantization_version"] = np.uint32(2)
    metadata |= entries
    metadata |= templates_metadata(templates)
    with contextlib.closing(_encoded(slabs, executor, workers)) as encoded:
        write(target, metadata, plan, lambda name: read(name, encoded))
    bits = bits_per_weight(shapes, types)
    return Converted(target, types, target.stat().st_size, bits, tuple(notes))


def open_source(
    path: str | Path, tokenizer: str | os.PathLike[str] | None = None
) -> tuple[ModelConfig, Tokenizer]:
    """Config and tokenizer of a checkpoint, or the named tokenizer, after everything has been
    checked that the headers of its files state.
    """
    if is_gguf(path):
        with open_file(path) as file:
            tensors = GGUFTensors(file, None, None)
            tensors.check()
            coded = [name for name, record in file.tensors.items() if record.type.quantized]
            if coded:
                raise CheckpointError(
                    f"{path}: {coded[0]} is quantised already: start from a file of F32, F16 or "
                    "BF16"
                )
            if tensors.rope_factors is not None and not tensors.states_scaling:
                raise CheckpointError(
                    f"{path}: its {ROPE_FACTORS} cannot be told from its metadata: start from the "
                    "Hugging Face checkpoint"
                )
            return tensors.config, gguf.read_tokenizer(file, tensors.config, tokenizer)
    config = read_config(path)
    directory = Path(os.path.expanduser(path))
    if read_quantization(directory) is not None:
        raise CheckpointError(
            f"{path} is quantised already: start from the model that it was made from"
        )
    with TensorFiles(directory) as files:
        check_tensors(config, files, directory)
        check_tied(config, files, directory)
    return config, read_tokenizer(directory, config, tokenizer)


def _chat_templates(source: str | Path) -> ChatTemplates:
    """The chat templates of a checkpoint."""
    if not is_gguf(source):
        return templates_from_directory(Path(os.path.expanduser(source)))
    with open_file(source) as file:
        return templates_from_metadata(file.metadata, str(source))


def _ending_as(config: ModelConfig, tokenizer: Tokenizer, templates: ChatTemplates) -> ModelConfig:
    """The config, whose first end token is the templates' ``eos_token`` if it is one of several:
    a GGUF file has one key for both.
    """
    token = templates.special_tokens.get("eos_token")
    if token is None or not tokenizer.available:
        return config
    ends = config.eos_token_ids
    first = tokenizer.inner.token_to_id(token)
    if first not in ends:
        return config
    return replace(config, eos_token_ids=(first, *(end for end in ends if end != first)))


def _model_name(source: str | Path) -> str:
    """``general.name``: the name of the directory, or that in the metadata of the file."""
    if not is_gguf(source):
        return Path(source).expanduser().resolve().name
    with open_file(source) as file:
        name = file.metadata.get("general.name")
        return name if isinstance(name, str) else Path(source).stem


def _ordered(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors in the order of llama.cpp's files: output and embedding, the largest, before the
    layers.
    """
    shapes = dict(tensor_shapes(config))
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        if name in shapes:
            yield name, shapes.pop(name)
    yield from shapes.items()


def _check_importance(
    importance: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """ValueError unless each importance belongs to a tensor and has one entry per column."""
    for name, weights in importance.items():
        if name not in shapes or weights.shape != shapes[name][-1:]:
            raise InputError(
                f"convert: the importance of {name!r} has shape {weights.shape}, and the network "
                f"{shapes.get(name, 'no such tensor')}"
            )


def _nbytes(entry: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of a tensor, given its type and shape."""
    type, shape = entry
    return int(np.prod(shape[:-1], dtype=np.int64)) * row_bytes(type, shape[-1])


def _slabs(
    config: ModelConfig, source: str, plan: Plan, importance: Mapping[str, np.ndarray]
) -> list[Slab]:
    """The slabs of all tensors of the network, in file order."""
    slabs = []
    conversion = uuid.uuid4().hex
    names = {gguf_name(name): name for name, _ in tensor_shapes(config)}
    for stored, (type, shape) in plan.items():
        if stored not in names:
            continue  # the RoPE factors, which are computed
        rows = shape[0] if len(shape) == 2 else 1
        count = max(1, SLAB // shape[-1])
        for start in range(0, rows, count):
            stop = min(start + count, rows)
            weights = importance.get(stored)
            slabs.append(Slab(source, conversion, names[stored], type, start, stop, weights))
    return slabs


def _encoded(
    slabs: list[Slab], executor: Executor | Callable[[], Executor] | None, workers: int | None
) -> Generator[np.ndarray, None, None]:
    """The bytes of each slab, in order. Closing it stops the workers and closes the source."""
    count = workers or os.cpu_count() or 1
    try:
        if executor is None and count == 1:
            yield from map(encode, slabs)
        else:
            yield from in_order(encode, slabs, executor or processes(count), flight=2 * count)
    finally:
        _opened.cache_clear()


def encode(slab: Slab) -> np.ndarray:
    """The bytes of a slab, uint8; runs in a worker.

    Raises
    ------
    CheckpointError
        naming the tensor, for values that are not finite or that the type cannot hold.
    """
    tensors = _opened(slab.source, slab.conversion)
    x = tensors(slab.name, slab.start, slab.stop)
    try:
        raw = quantize(x, slab.type, slab.importance, overflow="raise")
        return to_numpy(raw).reshape(-1)
    except ValueError as error:
        raise CheckpointError(
            f"{slab.source}: {slab.name}, from row {slab.start} on: {error}"
        ) from error


@lru_cache(maxsize=1)
def _opened(source: str, conversion: str) -> Callable[[str, int, int], np.ndarray]:
    """A function (name, start, stop) that reads rows of a tensor as float32 [R, K] in GGUF's
    order. The files stay open for the worker's next slab of the same conversion.
    """
    if is_gguf(source):
        stored = GGUFTensors(open_file(source), None, None)
        config = stored.config
        tensors: GGUFTensors | TensorFiles = stored
    else:
        config = read_config(source)
        tensors = TensorFiles(os.path.expanduser(source))

    def read(name: str, start: int, stop: int) -> np.ndarray:
        order = permutation(config, name)
        where = Path(source)
        if isinstance(tensors, TensorFiles) and order is None:
            rows = tensors.rows(name, start, stop)
            where = tensors.file(name)
        else:
            rows = tensors[name]
            if rows.ndim > 1:
                rows = rows[start:stop] if order is None else rows[order[start:stop]]
        floats: np.ndarray = converted(rows, "float32", name, where)
        return np.atleast_2d(floats)

    return read
