"""GGUF files of random networks, for tests that read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from networks import random_tensors
from refllm.checkpoints.gguf_names import config_metadata, gguf_name, permutation
from refllm.checkpoints.gguf_tokenizer_writer import tokenizer_metadata
from refllm.formats.gguf.codec import quantize
from refllm.formats.gguf.writer import write
from refllm.model.config import ModelConfig
from tiny_models import byte_tokenizer

CONFIG = ModelConfig("llama", 300, 64, 96, 2, 4, 2, 16, bos_token_id=0, eos_token_ids=(0,))


def tensors_of(config: ModelConfig) -> dict[str, np.ndarray]:
    return random_tensors(config, 0, "float32")


def make(
    path: Path,
    config: ModelConfig = CONFIG,
    type: str = "F32",
    *,
    metadata: Mapping[str, object] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A file of the random network: matrices in ``type``, vectors in F32; ``extra`` are more
    float32 tensors under their names in the file. Entries of None are left out.
    """
    data: dict[str, np.ndarray] = {}
    plan: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in tensors_of(config).items():
        rows = permutation(config, name)
        stored = type if tensor.ndim == 2 else "F32"
        matrix = np.atleast_2d(tensor if rows is None else tensor[rows])
        data[gguf_name(name)] = quantize(matrix, stored).reshape(-1)
        plan[gguf_name(name)] = (stored, tensor.shape)
    for name, tensor in (extra or {}).items():
        data[name] = tensor.astype(np.float32).view(np.uint8).reshape(-1)
        plan[name] = ("F32", tensor.shape)
    entries = config_metadata(config, "x") | tokenizer_metadata(byte_tokenizer(), config)
    entries |= metadata or {}
    write(path, {k: v for k, v in entries.items() if v is not None}, plan, data.__getitem__)
    return path
