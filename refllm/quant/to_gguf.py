"""Checkpoints to GGUF: a Hugging Face directory, or a GGUF file of plain floats, into a
file that llama.cpp opens.

The tensors are cut into slabs of rows, which are independent of one another: each worker
opens the source itself, reads its rows, encodes them, and sends back bytes. The file is
written in order as they arrive. So memory holds the slabs in flight, and a checkpoint
larger than one machine's memory passes through.

| step      | where                                                                              |
|-----------|------------------------------------------------------------------------------------|
| names, rows of q and k, metadata | ``checkpoints.gguf_names``, ``checkpoints.gguf_tokenizer``              |
| types     | ``formats.gguf.mixes``                                                             |
| encoding  | ``formats.gguf.quantize``                                                          |
| workers   | ``parallel``                                                                       |
| importance| ``importance``                                                                     |

Left out: sources that are quantised already (rounding errors would be rounded once more),
chat templates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from refllm.checkpoints import gguf_tokenizer
from refllm.checkpoints.gguf import GGUFTensors, open_file
from refllm.checkpoints.gguf_names import (
    ROPE_FACTORS,
    architecture,
    config_metadata,
    gguf_name,
    permutation,
    rope_factors,
)
from refllm.checkpoints.loading import is_gguf, read_config, read_quantization, read_tokenizer
from refllm.checkpoints.tensor_files import (
    CheckpointError,
    TensorFiles,
    check_tensors,
    check_tied,
    converted,
    tensor_shapes,
)
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.formats.gguf.codec import quantize
from refllm.formats.gguf.mixes import MIXES, Heads, bits_per_weight, mix
from refllm.formats.gguf.types import gguf_type, row_bytes
from refllm.formats.gguf.writer import write
from refllm.model.config import ModelConfig
from refllm.quant.worker_pool import in_order, processes

__all__ = ["Converted", "convert", "open_source"]

SLAB = 1 << 23  # numbers that a worker takes at a time


@dataclass(frozen=True)
class Converted:
    """What was written."""

    path: Path
    types: dict[str, str]  # GGUF name → storage type
    nbytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Slab:
    """Rows ``start`` to ``stop`` of a tensor: all that a worker is told. ``weights`` is the
    importance, if any.
    """

    source: str
    name: str  # Hugging Face's
    type: str
    start: int
    stop: int
    weights: np.ndarray | None = None


def free(target: str | Path, overwrite: bool) -> Path:
    """Where a file may be written. CheckpointError if something stands there that is not to
    be replaced.
    """
    target = Path(os.path.expanduser(target))
    if target.exists() and not (overwrite and target.is_file()):
        if target.is_file():
            how = ", or replace it with --overwrite (overwrite=True)"
        else:
            how = ""
        raise CheckpointError(f"{target} is there already: choose another name{how}")
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
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Converted:
    """Write ``target``, a GGUF file of the mix ``type``, from the checkpoint ``source``.

    Parameters
    ----------
    importance
        GGUF name → float32 [N] (``quant.imatrix``); tensors that it does not name are
        encoded without.
    executor
        An ``Executor``, or what makes one; None is ``workers`` processes (all cores, None),
        or none at all for 1.
    progress
        Is told the bytes that are written, and those that will be.

    Raises
    ------
    CheckpointError
        for what is wrong with the source, a target that is there, and weights that the type
        cannot hold.
    """
    target = free(target, overwrite)
    config, tokenizer = open_source(source)
    shapes = {gguf_name(name): shape for name, shape in _ordered(config)}
    heads = Heads(
        architecture(config),
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    types = mix(shapes, type, heads, importance=importance is not None)
    plan = {name: (types[name], shape) for name, shape in shapes.items()}
    _check_importance(importance or {}, shapes)
    own = {gguf_name(name): name for name, _ in tensor_shapes(config)}
    factors = rope_factors(config)
    if factors is not None:
        plan = {ROPE_FACTORS: ("F32", (factors.size,))} | plan
    slabs = [
        s
        for name, entry in plan.items()
        if name in own
        for s in _slabs(str(source), own[name], *entry, (importance or {}).get(name))
    ]
    total = sum(_nbytes(entry) for entry in plan.values())
    done = 0
    encoded = _encoded(slabs, executor, workers)

    def read(name: str) -> np.ndarray:
        nonlocal done
        if name == ROPE_FACTORS:
            assert factors is not None
            return factors.view(np.uint8)
        out = np.empty(_nbytes(plan[name]), dtype=np.uint8)
        at = 0
        while at < out.size:
            part = next(encoded)
            out[at : at + part.size] = part
            at = at + part.size
            done = done + part.size
            progress(done, total)
        return out

    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = config_metadata(config, _model_name(source)) | {
        "general.file_type": np.uint32(MIXES[type][1])
    }
    if any(gguf_type(t).quantized for t in types.values()):
        metadata["general.quantization_version"] = np.uint32(2)
    write(target, metadata | gguf_tokenizer.tokenizer_metadata(tokenizer, config), plan, read)
    return Converted(target, types, target.stat().st_size, bits_per_weight(shapes, types))


def open_source(path: str | Path) -> tuple[ModelConfig, Tokenizer]:
    """Config and tokenizer of a checkpoint, after a check of everything that a header can
    tell.
    """
    if is_gguf(path):
        with open_file(path) as file:
            tensors = GGUFTensors(file, None, None)
            tensors.check()
            coded = [name for name, record in file.tensors.items() if record.type.quantized]
            if coded:
                raise CheckpointError(
                    f"{path}: {coded[0]} is quantised already: start from a file of F32, F16 or BF16"
                )
            if tensors.rope_factors is not None and tensors.config.rope_scaling is None:
                raise CheckpointError(
                    f"{path}: its {ROPE_FACTORS} cannot be told from its metadata: start from the "
                    "Hugging Face checkpoint"
                )
            return tensors.config, gguf_tokenizer.tokenizer_from_metadata(file.metadata, str(path))
    config = read_config(path)
    directory = Path(os.path.expanduser(path))
    if read_quantization(directory) is not None:
        raise CheckpointError(
            f"{path} is quantised already: start from the model that it was made from"
        )
    with TensorFiles(directory) as files:
        check_tensors(config, files, directory)
        check_tied(config, files, directory)
    return config, read_tokenizer(directory, config)


def _model_name(source: str | Path) -> str:
    """``general.name``: the directory's, or what the file already says."""
    if not is_gguf(source):
        return Path(source).expanduser().resolve().name
    with open_file(source) as file:
        name = file.metadata.get("general.name")
        return name if isinstance(name, str) else Path(source).stem


def _ordered(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors in the order of GGUF files: output before the layers, as it reads first what
    is largest.
    """
    shapes = dict(tensor_shapes(config))
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        if name in shapes:
            yield name, shapes.pop(name)
    yield from shapes.items()


def _check_importance(
    importance: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, weights in importance.items():
        if name not in shapes or weights.shape != shapes[name][-1:]:
            raise ValueError(
                f"convert: the importance of {name!r} has shape {weights.shape}, and the network "
                f"{shapes.get(name, 'no such tensor')}"
            )


def _nbytes(entry: tuple[str, tuple[int, ...]]) -> int:
    type, shape = entry
    return int(np.prod(shape[:-1], dtype=np.int64)) * row_bytes(type, shape[-1])


def _slabs(
    source: str, name: str, type: str, shape: tuple[int, ...], weights: np.ndarray | None
) -> Iterator[Slab]:
    rows = shape[0] if len(shape) == 2 else 1
    step = max(1, SLAB // shape[-1])
    for start in range(0, rows, step):
        yield Slab(source, name, type, start, min(start + step, rows), weights)


def _encoded(
    slabs: list[Slab], executor: Executor | Callable[[], Executor] | None, workers: int | None
) -> Iterator[np.ndarray]:
    """The bytes of each slab, in order."""
    count = workers or os.cpu_count() or 1
    if executor is None and count == 1:
        return map(encode, slabs)
    return in_order(encode, slabs, executor or processes(count), flight=2 * count)


def encode(slab: Slab) -> np.ndarray:
    """The bytes of a slab, one after another; runs in a worker.

    Raises
    ------
    CheckpointError
        naming the tensor, for numbers that are not finite or beyond what the type can hold.
    """
    tensors = _opened(slab.source)
    x = tensors(slab.name, slab.start, slab.stop)
    try:
        raw: np.ndarray = quantize(x, slab.type, slab.weights, overflow="raise")
        return raw.reshape(-1)
    except ValueError as error:
        raise CheckpointError(
            f"{slab.source}: {slab.name}, from row {slab.start} on: {error}"
        ) from error


@lru_cache(maxsize=2)
def _opened(source: str) -> Callable[[str, int, int], np.ndarray]:
    """What reads rows of a tensor as float32 [R, K], in GGUF's order; kept open for the
    worker's next slab.
    """
    config, _ = (open_source if is_gguf(source) else _config_only)(source)
    plain = (
        GGUFTensors(open_file(source), None, None)
        if is_gguf(source)
        else TensorFiles(os.path.expanduser(source))
    )

    def read(name: str, start: int, stop: int) -> np.ndarray:
        order = permutation(config, name)
        if isinstance(plain, TensorFiles) and order is None:
            rows = plain.rows(name, start, stop)
            where = plain.file(name)
        else:
            whole = plain[name]
            where = Path(source)
            if whole.ndim == 1:
                rows = whole
            elif order is None:
                rows = whole[start:stop]
            else:
                rows = whole[order[start:stop]]
        floats: np.ndarray = converted(rows, "float32", name, where)
        matrix: np.ndarray = np.atleast_2d(floats)
        return matrix

    return read


def _config_only(source: str) -> tuple[ModelConfig, Any]:
    return read_config(source), None
