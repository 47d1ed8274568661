"""A network from a GGUF file: weights stay in the file's bytes, everything else becomes
what ``llama.build`` expects.

| part       | read as                                                                                       |
|------------|-----------------------------------------------------------------------------------------------|
| matrices   | ``GGUFLinear``, in the file's own type; F32, F16 and BF16 as plain arrays                     |
| q and k    | rows put back into Hugging Face's order, which costs nothing: rows are coded one by one        |
| vectors    | arrays in the dtype that is computed in                                                        |
| rope_freqs | the rotation's frequencies, divided by them                                                    |

A tensor is copied out of the mapped file when it is looked up, so the file may be closed,
or changed, afterwards.

Left out: files in several parts, adapters, experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refllm.checkpoints.gguf_names import ROPE_FACTORS, config_of, gguf_name, hf_name, permutation
from refllm.checkpoints.gguf_tokenizer import tokenizer_of
from refllm.checkpoints.tensor_files import (
    CheckpointError,
    Shape,
    check_tensors,
    check_vocabulary,
    converted,
    tensor_shapes,
)
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.formats.gguf.codec import dequantize
from refllm.formats.gguf.linear import GGUFLinear
from refllm.formats.gguf.reader import GGUFError, GGUFFile
from refllm.model.config import ModelConfig
from refllm.model.layers import rope_frequencies
from refllm.model.llama import Weights, build

__all__ = ["GGUFTensors", "load", "open_file"]


def open_file(path: str | Path) -> GGUFFile:
    """The file; CheckpointError for what is no such file."""
    try:
        file = GGUFFile(path)
    except GGUFError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    parts = file.metadata.get("split.count", 1)
    if not isinstance(parts, np.integer | int) or int(parts) > 1:
        raise CheckpointError(
            f"{path} is one of several parts; join them with llama-gguf-split --merge first"
        )
    return file


def load(path: str | Path, xp: Any, dtype: str) -> tuple[ModelConfig, Weights, Tokenizer]:
    """Config, weight tree and tokenizer of a file, on the library ``xp``.

    Raises
    ------
    CheckpointError
        for whatever is wrong with the file.
    """
    with open_file(path) as file:
        tensors = GGUFTensors(file, xp, dtype)
        tensors.check()
        tokenizer = tokenizer_of(file.metadata, str(path))
        check_vocabulary(tokenizer, tensors.config, Path(path))
        weights = build(tensors.config, tensors)
        factors = tensors.factors
        if factors is not None:
            plain = rope_frequencies(tensors.config.head_dim, tensors.config.rope_theta)
            weights["rope_frequencies"] = xp.asarray(np.array(plain) / factors)
    return tensors.config, weights, tokenizer


class GGUFTensors(Mapping[str, Any]):
    """The tensors of a file by Hugging Face's names, each copied and moved when it is
    looked up.

    ``xp`` None leaves them on the host; ``dtype`` None gives plain tensors as float32.
    """

    quantization = "gguf"  # ``build`` asks: such weights need no room for floats

    def __init__(self, file: GGUFFile, xp: Any, dtype: str | None):
        self.file = file
        self.xp = xp
        self.dtype = dtype or "float32"
        self.where = file.path
        shapes = {name: record.shape for name, record in file.tensors.items()}
        self.config = config_of(file.metadata, shapes, str(file.path))

    @property
    def factors(self) -> np.ndarray | None:
        """float64 [D/2]: what ``rope_freqs`` divides the frequencies by; None if the file
        has none.
        """
        if ROPE_FACTORS not in self.file:
            return None
        factors = self._floats(ROPE_FACTORS).astype(np.float64).reshape(-1)
        if factors.shape != (self.config.head_dim // 2,) or not (factors > 0).all():
            raise CheckpointError(
                f"{self.where}: {ROPE_FACTORS} must hold {self.config.head_dim // 2} positive factors"
            )
        return factors

    def check(self) -> None:
        """CheckpointError unless names and shapes are those of the network that the
        metadata describe.
        """
        found: dict[str, Any] = {}
        for name, record in self.file.tensors.items():
            if name != ROPE_FACTORS:
                found[hf_name(name) or name] = np.broadcast_to(np.float32(0), record.shape)
        check_tensors(self.config, found, self.where)

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return dict(tensor_shapes(self.config))

    def __getitem__(self, name: str) -> Any:
        if name not in self._shapes:
            raise KeyError(name)
        own = gguf_name(name)
        record = self.file.tensors[own]
        order = permutation(self.config, name)
        back = None if order is None else np.argsort(order)
        if not record.type.quantized:
            floats = self._floats(own)
            host = converted(floats if back is None else floats[back], self.dtype, name, self.where)
            return host if self.xp is None else self.xp.asarray(host)
        raw = self.file[own]
        raw = np.array(raw if back is None else raw[back])  # a copy: the mapped file may go
        if len(record.shape) != 2:
            raise CheckpointError(f"{self.where}: {own} is quantised, but no matrix")
        self._refuse_broken(raw, record.type.name, own)
        return GGUFLinear(
            raw if self.xp is None else self.xp.asarray(raw), record.type.name, self.dtype
        )

    def _refuse_broken(self, raw: np.ndarray, type: str, name: str) -> None:
        """CheckpointError if a step is infinite or NaN: no number of its block could be
        computed with.
        """
        step = max(1, (1 << 22) // max(1, raw.shape[1]))
        for start in range(0, raw.shape[0], step):
            if not np.isfinite(dequantize(raw[start : start + step], type)).all():
                raise CheckpointError(
                    f"{self.where}: {name} holds steps that are NaN or infinite, from row {start} "
                    "on: the file is damaged, or its weights overflowed"
                )

    def _floats(self, own: str) -> np.ndarray:
        """A tensor of plain floats as float32, in its shape."""
        record = self.file.tensors[own]
        raw = self.file[own]
        floats: np.ndarray = dequantize(
            np.ascontiguousarray(raw.reshape(-1, raw.shape[-1])), record.type.name
        )
        return floats.reshape(record.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
