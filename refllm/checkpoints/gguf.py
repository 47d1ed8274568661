"""Load a network from a GGUF file: quantised weights stay in the file's bytes.

| part       | read as                                                                      |
|------------|------------------------------------------------------------------------------|
| matrices   | ``InterleavedLinear`` in the file's own type, on a device ``GGUFLinear``;    |
|            | F32, F16 and BF16 as arrays                                                  |
| q and k    | rows in Hugging Face's order; rows are quantised one by one, so any order is |
|            | possible without requantising                                                |
| vectors    | arrays in the dtype of computation                                           |
| rope_freqs | factors that the RoPE frequencies are divided by                             |

A tensor is copied out of the mapped file when it is looked up, so the file may be closed or
changed afterwards.

Left out: adapters, experts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refllm.backend import NUMPY, Array, Namespace, to_numpy
from refllm.checkpoints.chat_template import ChatTemplates
from refllm.checkpoints.chat_template_files import templates_from_metadata
from refllm.checkpoints.gguf_entries import check_types
from refllm.checkpoints.gguf_names import (
    config_from_metadata,
    gguf_name,
    hf_name,
    permutation,
)
from refllm.checkpoints.gguf_rope import OWN_KEY, ROPE_FACTORS
from refllm.checkpoints.gguf_tokenizer import tokenizer_from_metadata
from refllm.checkpoints.tensor_files import (
    CheckpointError,
    Shape,
    check_tensors,
    converted,
    tensor_shapes,
)
from refllm.checkpoints.tokenizer import Tokenizer, fitted, read_named_tokenizer
from refllm.checkpoints.weight_storage import Decoded, StoredTensor, choose
from refllm.formats.gguf.codec import dequantize
from refllm.formats.gguf.interleaved import InterleavedLinear
from refllm.formats.gguf.linear import GGUFLinear
from refllm.formats.gguf.parts import open_gguf
from refllm.formats.gguf.reader import GGUFError, GGUFFile
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights, build
from refllm.model.rope import rope_frequencies

__all__ = ["GGUFTensors", "load", "open_file", "read_config"]


def open_file(path: str | Path) -> GGUFFile:
    """Open a GGUF file, with all of its parts where it has several; CheckpointError if it is
    none, or parts are missing.
    """
    try:
        file = open_gguf(path)
    except GGUFError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    check_types(file.metadata, str(file.path))
    return file


def read_config(path: str | Path) -> ModelConfig:
    """The network's shape, from the metadata alone; CheckpointError for anything wrong."""
    with open_file(path) as file:
        return GGUFTensors(file, None, None).config


def load(
    path: str | Path,
    xp: Namespace,
    dtype: str,
    weights: str = "stored",
    tokenizer: str | os.PathLike[str] | None = None,
) -> tuple[ModelConfig, Weights, Tokenizer, str, ChatTemplates]:
    """Config, weight tree, tokenizer, how the weights are held in words, and chat templates
    of a file, on the library ``xp``; ``weights`` as in ``weight_storage``, ``tokenizer`` as
    in ``loading.load``.

    Raises
    ------
    CheckpointError
        for anything wrong with the file, or weights that do not fit into the free memory.
    """
    with open_file(path) as file:
        tensors = GGUFTensors(file, xp, dtype)
        tensors.check()
        text = read_tokenizer(file, tensors.config, tokenizer)
        templates = templates_from_metadata(file.metadata, str(path))
        chosen = choose(weights, tensors.stored(), dtype, xp, path)
        found: Mapping[str, Any] = tensors
        if chosen.decoded:
            found = Decoded(tensors, chosen.decoded)
        tree = build(tensors.config, found)
        factors = tensors.rope_factors
        if factors is not None:
            scaled = np.array(tensors.scaled_by_keys)
            tree["rope_frequencies"] = xp.asarray(scaled / factors)  # [D/2]
    return tensors.config, tree, text, chosen.summary, templates


def read_tokenizer(
    file: GGUFFile, config: ModelConfig, named: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """The tokenizer of a file, or the ``named`` one; CheckpointError if it is not supported."""
    if named is not None:
        return read_named_tokenizer(named, config)
    return fitted(tokenizer_from_metadata(file.metadata, str(file.path)), config, file.path)


class GGUFTensors(Mapping[str, Any]):
    """The tensors of a file under Hugging Face's names, each copied and moved when it is looked up.

    ``xp`` None leaves them on the host; ``dtype`` None is float32. A look-up raises
    CheckpointError for values that are not finite.
    """

    quantization = "gguf"  # ``llama.build`` reserves no memory for floating-point weights then

    def __init__(self, file: GGUFFile, xp: Namespace | None, dtype: str | None):
        self.file = file
        self.xp = xp
        self.dtype = dtype or "float32"
        self.where = file.path
        shapes = {name: record.shape for name, record in file.tensors.items()}
        self.config = config_from_metadata(file.metadata, shapes, str(file.path))

    @property
    def states_scaling(self) -> bool:
        """Whether a key of refllm's own says which scaling ``rope_freqs`` were computed from."""
        return OWN_KEY in self.file.metadata

    @property
    def scaled_by_keys(self) -> list[float]:
        """The D/2 RoPE frequencies before they are divided by ``rope_freqs``: scaled by the
        keys of the metadata, unless the factors are the config's scaling themselves.
        """
        config = self.config
        scaling = None if self.states_scaling else config.rope_scaling
        return rope_frequencies(config.head_dim, config.rope_theta, scaling)

    @property
    def rope_factors(self) -> np.ndarray | None:
        """float64 [D/2]: ``rope_freqs``, which the frequencies are divided by; None if the
        file has none.
        """
        if ROPE_FACTORS not in self.file:
            return None
        factors = self._floats(ROPE_FACTORS).astype(np.float64).reshape(-1)
        if factors.shape != (self.config.head_dim // 2,) or not (factors > 0).all():
            raise CheckpointError(
                f"{self.where}: {ROPE_FACTORS} must hold {self.config.head_dim // 2} positive "
                "factors"
            )
        return factors

    def check(self) -> None:
        """CheckpointError unless names and shapes are those of the network that the
        metadata describe.
        """
        found: dict[str, np.ndarray] = {}
        own: dict[str, str] = {}
        for name, record in self.file.tensors.items():
            if name != ROPE_FACTORS:
                shaped = np.broadcast_to(np.float32(0), record.shape)  # no memory, only a shape
                found[hf_name(name) or name] = shaped
                own[hf_name(name) or name] = name

        def spelled(name: str) -> str:
            """The file's name of a tensor, also of one that it lacks."""
            return own[name] if name in own else gguf_name(name)

        check_tensors(self.config, found, self.where, described_by="its metadata", spelled=spelled)

    def stored(self) -> Iterator[StoredTensor]:
        """Each tensor of the network as the file stores it."""
        for name, shape in self._shapes.items():
            record = self.file.tensors[gguf_name(name)]
            format = record.type.name if record.type.quantized else None
            yield StoredTensor(name, math.prod(shape), format, record.nbytes)

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        """Name → shape of the network's tensors."""
        return dict(tensor_shapes(self.config))

    def __getitem__(self, name: str) -> Any:
        if name not in self._shapes:
            raise KeyError(name)
        own = gguf_name(name)
        tensor = self._read(name, own)
        self.file.forget(own)  # or the file's pages would count beside the copy
        return tensor

    def _read(self, name: str, own: str) -> Any:
        """A tensor, copied; ``own`` is its name in the file."""
        record = self.file.tensors[own]
        rows = permutation(self.config, name)
        order: slice | np.ndarray = slice(None)  # of the file's rows, for Hugging Face
        if rows is not None:
            order = np.argsort(rows)
        if not record.type.quantized:
            return self._moved(converted(self._floats(own)[order], self.dtype, name, self.where))
        if len(record.shape) != 2:
            raise CheckpointError(f"{self.where}: {own} is quantised, but no matrix")
        raw = self.file[own][order]
        weight = InterleavedLinear(raw, record.type.name, self.dtype)  # copies the bytes
        damaged = weight.damaged_row()
        if damaged is not None:
            raise CheckpointError(
                f"{self.where}: {own} holds scales that are NaN or infinite, from row {damaged} "
                "on: the file is damaged, or its weights overflowed"
            )
        if self.xp is None or self.xp is NUMPY:
            return weight
        return GGUFLinear(self._moved(np.array(raw)), record.type.name, self.dtype)

    def _moved(self, host: np.ndarray) -> Array:
        """A host array on the library's device."""
        return host if self.xp is None else self.xp.asarray(host)

    def _floats(self, own: str) -> np.ndarray:
        """A tensor of plain floats as float32, in its shape."""
        record = self.file.tensors[own]
        raw = self.file[own]
        rows = np.ascontiguousarray(raw.reshape(-1, raw.shape[-1]))  # [rows, bytes]
        return to_numpy(dequantize(rows, record.type.name)).reshape(record.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
