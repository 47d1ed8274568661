"""Checkpoints: a Hugging Face directory read into a weight tree, and written so that transformers loads it.

Reading is here, in ``shards`` (the tensors' files) and ``quantized`` (weights of several tensors); writing is in
``writer``.

| file                   | read                                     | written                                   |
|------------------------|------------------------------------------|-------------------------------------------|
| config.json            | ``ModelConfig.from_hf``, and its         | ``to_hf`` and the stored type             |
|                        | ``quantization_config``                  |                                           |
| model.safetensors      | or shards with an index (``shards``)     | one file, or shards of a given size       |
| tokenizer.json         | ``Tokenizer.from_file``                  | as the tokenizers library saves it        |
| generation_config.json | its end-of-text ids win over the config's| end and beginning of text                 |
| tokenizer_config.json  | not read                                 | the class and special tokens              |

Every tensor is read, checked, converted and laid out before the next one is read, so loading needs one model
of memory and one tensor, never two models. Weights are never unpickled.

Quantised weights stay quantised: they multiply in the form in which they are stored.

Left out: chat templates, downloading, tensors that the network does not use (refused,
but for the rotary tables of old Llama files, which are recomputed).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refllm.backend import Array, get
from refllm.checkpoints import gguf, stored_tensors
from refllm.checkpoints.directory_writer import save
from refllm.checkpoints.stored_tensors import NetworkTensors
from refllm.checkpoints.tensor_files import CheckpointError, TensorFiles, check_tensors, check_vocabulary, read_json
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights, build

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "build_weights",
    "iter_tensors",
    "load",
    "read_config",
    "read_tensor",
    "read_tokenizer",
    "save",
]


@dataclass(frozen=True)
class Checkpoint:
    """What the lower floors pass around: the network's shape, its weight tree, its tokenizer, its origin."""

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    path: Path


def load(path: str | Path, *, backend: str | None = None, dtype: str = "float32") -> Checkpoint:
    """Load a directory or a GGUF file for ``backend`` ("numpy", "cupy", None: the environment's) in ``dtype``.

    Raises
    ------
    CheckpointError
        for every kind of bad input, naming the file and what to do.
    ValueError
        for a dtype that the backend does not compute in.
    BackendUnavailable
        if CuPy is asked for and cannot run.
    """
    xp = get(backend)
    types = ("float32", "float64") if xp is np else ("float16", "float32", "float64")
    if dtype not in types:
        raise ValueError(f"load: dtype {dtype!r} is not computed in on {xp.__name__}; choose one of {', '.join(types)}")
    if gguf.is_gguf(path):
        return Checkpoint(*gguf.load(path, xp, dtype), Path(path))
    directory = _directory(path)
    config = read_config(directory)
    tokenizer = read_tokenizer(directory, config)
    with TensorFiles(directory) as files:
        weights = build(config, NetworkTensors(files, config, stored_tensors.read(directory), xp, dtype).check())
    return Checkpoint(config, weights, tokenizer, directory)


def read_config(path: str | Path) -> ModelConfig:
    """The network's shape from ``config.json``, with the end-of-text ids of ``generation_config.json``."""
    directory = _directory(path)
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory} has no config.json: pass the directory of a Hugging Face checkpoint")
    raw = read_json(file)
    try:
        config = ModelConfig.from_hf(raw)
    except KeyError as error:
        raise CheckpointError(f"{file}: the entry {error} is missing") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # UnsupportedModel, or a wrong JSON type
        raise CheckpointError(f"{file}: {error}") from error
    eos = _generation_eos(directory / "generation_config.json")
    return config if eos is None else replace(config, eos_token_ids=eos)


def build_weights(config: ModelConfig, tensors: Mapping[str, Array]) -> Weights:
    """``llama.build`` after a check of names and shapes; CheckpointError says which tensor is wrong."""
    check_tensors(config, tensors, Path("tensors"))
    return build(config, tensors)


def iter_tensors(path: str | Path, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(name, host array) of every tensor of a network, layer by layer, one in memory at a time.

    ``dtype`` None keeps the stored type (bfloat16 is ml_dtypes'); what is stored quantised comes as the floats that
    it stands for, float32 then.
    """
    directory = _directory(path)
    config = read_config(directory)
    with TensorFiles(directory) as files:
        tensors = NetworkTensors(files, config, stored_tensors.read(directory), None, dtype).check()
        for name in tensors:
            yield name, _floats(tensors[name])


def read_tensor(path: str | Path, name: str, dtype: str | None = None) -> np.ndarray:
    """One tensor of a checkpoint directory by its Hugging Face name, as ``iter_tensors`` gives it."""
    directory = _directory(path)
    config = read_config(directory)
    with TensorFiles(directory) as files:
        tensors = NetworkTensors(files, config, stored_tensors.read(directory), None, dtype).check()
        if name not in tensors:
            raise CheckpointError(f"{directory} holds no tensor {name!r}")
        return _floats(tensors[name])


def _floats(tensor: Any) -> np.ndarray:
    floats: np.ndarray = tensor.dequantize() if hasattr(tensor, "dequantize") else tensor
    return floats


def _directory(path: str | Path) -> Path:
    directory = Path(os.path.expanduser(path))  # unlike Path's, leaves an unknown ~user as it is
    if not os.path.exists(directory):  # unlike Path's, False for a name that the file system cannot hold
        raise CheckpointError(f"{directory} does not exist: pass the directory of a Hugging Face checkpoint")
    if directory.is_file() and directory.suffix == ".gguf":
        raise CheckpointError(
            f"{directory} is a GGUF file: here a Hugging Face directory is needed; load, generate, eval and convert "
            "read GGUF"
        )
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: pass the directory that holds it and config.json")
    return directory


def _generation_eos(file: Path) -> tuple[int, ...] | None:
    if not file.is_file():
        return None
    eos = read_json(file).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise CheckpointError(f"{file}: eos_token_id must be a token id or a list of them, got {eos!r}")
    return tuple(ids) or None


def read_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a directory; CheckpointError if it is broken, or has ids beyond the model's vocabulary."""
    try:
        tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    check_vocabulary(tokenizer, config, directory / "tokenizer.json")
    return tokenizer
