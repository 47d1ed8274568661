"""Quantised models as checkpoints that ``transformers``, vLLM and ``refllm.load`` read.

| layout          | quantised by, typically       | activations                                |
|-----------------|-------------------------------|--------------------------------------------|
| pack-quantized  | rtn, gptq, awq (symmetric); int8 | as they are                             |
| int-quantized   | smoothquant                   | 8 bits, a step a token (absmax/127.5)      |
| gptq_v2         | gptq, rtn, awq                | as they are                                |
| awq             | awq                           | as they are                                |
| float-quantized | fp8, by row or block          | 8-bit floats, a scale a token or tile      |
| fp8             | fp8, by block                 | 8-bit floats, a scale a tile               |

``export`` writes a model in memory, ``assemble`` the layers that a run left in files. Both write all files in a new
directory, which takes its name only when it is whole (``checkpoints.directory_writer``).

Readers of "int-quantized" round activations to absmax/127.5, SmoothQuant to absmax/127: what is loaded computes as the
format's readers do, which is not bit for bit what was quantised.

Left out: GGUF, several layouts in one checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refllm.backend import to_numpy
from refllm.checkpoints.directory_writer import STORED_TYPES, check_target, documents, resolved, write_directory
from refllm.checkpoints.tensor_files import EMBEDDING, HEAD, CheckpointError, check_vocabulary, converted
from refllm.formats.float_layouts import stored_as as stored_floats
from refllm.formats.fp8_linear import Fp8Linear
from refllm.formats.stored import Stored, stored_as
from refllm.formats.w8a8_linear import W8A8Linear
from refllm.model.llama import PROJECTIONS
from refllm.model.weights import Dense
from refllm.quant.export_spec import Storing, named, storable
from refllm.quant.resumable_layers import LayerFiles

__all__ = ["LayerFiles", "Storing", "assemble", "default_layout", "export", "storing_of"]


def export(
    path: str | Path, model: Any, *, layout: str | None = None, dtype: str = "float16",
    max_shard_bytes: int | None = None, extra_files: Mapping[str, str] | None = None, overwrite: bool = False,
) -> None:  # fmt: skip
    """Write ``model`` (a record with ``.config .weights .tokenizer`` whose projections are quantised).

    ``layout`` None is the usual one of its weights (see ``default_layout``). Embedding, norms, biases, head and scales
    are stored in ``dtype``: a model that was quantised with that ``scale_dtype`` is stored exactly.

    Raises
    ------
    ValueError
        for weights that the layout cannot hold, naming the layouts that can; otherwise as ``writer.save``. Nothing has
        been written then.
    """
    config, weights, tokenizer = model.config, model.weights, model.tokenizer
    storing = storing_of(weights, layout, dtype)
    target = resolved(path)
    check_target(target, overwrite)
    check_vocabulary(tokenizer, config, target)
    plan = storing.plan(config)
    tensors = {EMBEDDING: weights["embed_tokens"], "model.norm.weight": weights["norm"], HEAD: weights["lm_head"]}
    for index, layer in enumerate(weights["layers"]):
        tensors |= named(layer, index)
    texts = documents(config, tokenizer, dtype, extra_files or {}, quantization_config=storing.entry)
    write_directory(target, texts, plan, storing.reader(tensors, target), max_shard_bytes=max_shard_bytes)


def storing_of(weights: Mapping[str, Any], layout: str | None = None, dtype: str = "float16") -> Storing:
    """How a weight tree is stored; ValueError if its projections are not all quantised alike, or no layout fits."""
    if dtype not in STORED_TYPES:
        raise ValueError(f"export: dtype {dtype!r} is not stored; choose one of {', '.join(STORED_TYPES)}")
    kinds: dict[Any, str] = {}
    plain: set[tuple[str, bool]] = set()
    for index, layer in enumerate(weights["layers"]):
        for key, path in PROJECTIONS.items():
            name = f"model.layers.{index}.{path}"
            plain.add((key, isinstance(layer[key], Dense)))
            if not isinstance(layer[key], Dense):
                made = storable(layer[key], name)
                if isinstance(made, Fp8Linear):
                    kinds.setdefault((stored_floats(made, layout), True, False), name)
                    continue
                inner = made.weight if isinstance(made, W8A8Linear) else made
                reordered = getattr(inner, "g_idx", None) is not None
                kinds.setdefault((inner.scheme, made is not inner, reordered), name)
    keep = tuple(key for key in PROJECTIONS if (key, True) in plain)
    if len(kinds) != 1 or any((key, False) in plain for key in keep):
        found = ", ".join(f"{kind[0]} ({name})" for kind, name in kinds.items()) or "none"
        raise CheckpointError(f"export: all projections of a name must be quantised alike; found {found}")
    scheme, activations, reordered = next(iter(kinds))
    if isinstance(scheme, Stored):
        return Storing(scheme, dtype, keep)
    layout = layout or default_layout(scheme, activations=activations, reordered=reordered)
    return Storing(stored_as(scheme, layout, activations=activations, reordered=reordered), dtype, keep)


def default_layout(scheme: Any, *, activations: bool = False, reordered: bool = False) -> str:
    """The layout that most programs read weights of this kind in."""
    if activations:
        return "int-quantized"
    if reordered:
        return "gptq_v2"
    return "pack-quantized" if scheme.symmetric else "awq" if scheme.bits == 4 else "gptq_v2"


def assemble(
    target: Path, layers: LayerFiles, rest: Mapping[str, Any], texts: Mapping[str, str], *,
    max_shard_bytes: int | None = None, finish: Callable[[Path], None] | None = None,
) -> None:  # fmt: skip
    """Write the layers of a finished run, with the ``rest`` of the network's tensors (embedding, norm, head).

    ``finish`` is called with the new directory before it takes its name.
    """
    dtype, config = layers.storing.dtype, layers.source.config

    def read(name: str) -> np.ndarray:
        if name.startswith("model.layers."):
            return layers.read(name)
        return converted(to_numpy(rest[name]), dtype, name, target)

    temporary = target.with_name(f".{target.name}.quantized.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that was killed
    plan = layers.storing.plan(config)
    write_directory(target, texts, plan, read, max_shard_bytes=max_shard_bytes, temporary=temporary, finish=finish)
