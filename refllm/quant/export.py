"""Quantised models as checkpoints that ``transformers``, vLLM and ``refllm.load`` read.

| layout          | quantised by, typically          | activations                              |
|-----------------|----------------------------------|------------------------------------------|
| pack-quantized  | rtn, gptq, awq (symmetric); int8 | not quantised                            |
| int-quantized   | smoothquant                      | 8 bits, a scale per token (absmax/127.5) |
| gptq_v2         | gptq, rtn, awq                   | not quantised                            |
| awq             | awq                              | not quantised                            |
| float-quantized | fp8, by row or block             | 8-bit floats, a scale per token or tile  |
| fp8             | fp8, by block                    | 8-bit floats, a scale per tile           |

An ``ExportSpec`` says how a model is stored: the layout of its quantised projections
(``formats.layouts``), the dtype of everything else (embedding, norms, biases, head, and the
scales), and the projections in ``keep``, which are not quantised. From it follow the list of
all tensors of the files, their values, and the ``quantization_config`` of config.json.

``export`` writes a model in memory, ``layer_io.assemble`` the layers that a run left in files.
Both write all files to a new directory, which gets its name only when it is complete
(``checkpoints.writer``).

What is loaded computes as the readers of the format do, which is not always bit for bit what
was quantised: readers of "int-quantized" round activations to absmax/127.5, SmoothQuant to
absmax/127; LLM.int8()'s weights are stored as plain 8-bit weights with a scale per row, and
readers do not quantise their activations.

Left out: GGUF, several layouts in one checkpoint, quantised embeddings and heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np

from refllm.array_types import Json
from refllm.backend import Array, to_numpy
from refllm.checkpoints.loading import stored_specs
from refllm.checkpoints.tensor_files import (
    EMBEDDING,
    HEAD,
    CheckpointError,
    Shape,
    converted,
    host_dtype,
)
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.checkpoints.writer import (
    STORED_TYPES,
    TensorSpecs,
    check_target,
    documents,
    resolved,
    write_directory,
)
from refllm.errors import InputError
from refllm.formats import float_layouts
from refllm.formats.float_layouts import layout_for as float_layout_for
from refllm.formats.fp8_linear import Fp8Linear
from refllm.formats.layouts import FLOAT, FLOAT8, WeightLayout, layout_for, to_tensor
from refllm.formats.quantization_config import Quantization, parse, quantization_config
from refllm.formats.quantized_linear import QuantizedLinear
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS, Layer, Weights, projection_name
from refllm.model.weights import Dense, Linear
from refllm.quant.llm_int8 import Int8Linear
from refllm.quant.rotation import RotatedLinear

Read = Callable[[str], np.ndarray]


class ModelRecord(Protocol):
    """What ``export`` needs of a model; ``refllm.api.Model`` is one."""

    @property
    def config(self) -> ModelConfig:
        """The shapes and constants of the network."""
        ...

    @property
    def weights(self) -> Weights:
        """The weight tree, with quantised projections."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, whose vocabulary must fit the embedding."""
        ...


@dataclass(frozen=True)
class ExportSpec:
    """How a quantised model is stored."""

    layout: WeightLayout  # of the quantised projections
    dtype: str = "float16"  # of all floating-point tensors
    keep: tuple[str, ...] = ()  # projections (keys of ``llama.PROJECTIONS``) not quantised

    @property
    def config_entry(self) -> Json:
        """The ``quantization_config`` of config.json."""
        paths = [PROJECTIONS[key].replace(".", r"\.") for key in self.keep]
        return quantization_config(
            self.layout, ["lm_head", *(rf"re:.*\.{path}$" for path in paths)]
        )

    @cached_property
    def quantization(self) -> Quantization:
        """``config_entry`` as a reader parses it."""
        return parse(self.config_entry)

    def layout_of(self, name: str, shape: Shape) -> WeightLayout | None:
        """The layout of the network's tensor ``name``; None for one that is stored in ``dtype``."""
        paths = (f".{path}.weight" for key, path in PROJECTIONS.items() if key not in self.keep)
        return self.layout if name.endswith(tuple(paths)) else None

    def plan(self, config: ModelConfig) -> TensorSpecs:
        """Dtype and shape of every tensor of the files; CheckpointError naming a weight that
        the layout cannot hold.
        """
        # Scales of 8-bit floats stay in float32: rounding them would be a second error in
        # every weight.
        scales = ("weight_scale", "weight_scale_inv") if self.layout.is_float else ()
        found = {}
        for name, (dtype, shape) in stored_specs(config, self.layout_of):
            if dtype == FLOAT:
                dtype = "float32" if name.endswith(scales) else self.dtype
            found[name] = (dtype, shape)
        return found

    def reader(self, tensors: Mapping[str, Array | Linear], where: Path) -> Read:
        """A function that looks up the stored tensors of ``tensors`` (names of the network;
        arrays or ``Linear``s), on the host.

        The function raises CheckpointError naming ``where`` for values that are not finite in
        ``dtype``.
        """
        linears = {
            name: storable(cast(Linear, tensor), name)
            for name, tensor in tensors.items()
            if self.layout_of(name, ()) is not None
        }

        def read(name: str) -> np.ndarray:
            module, _, suffix = name.rpartition(".")
            weight = linears.get(f"{module}.weight")
            if weight is not None and suffix != "bias":
                return self._stored_tensor(weight, suffix)
            plain = tensors[name]
            floats = to_numpy(plain.dequantize() if hasattr(plain, "dequantize") else plain)
            return converted(floats, self.dtype, name, where)

        return read

    def _stored_tensor(
        self, weight: QuantizedLinear | W8A8Linear | Fp8Linear, suffix: str
    ) -> np.ndarray:
        """One tensor of a quantised weight (``suffix``: "weight_packed", "scales", …)."""
        if isinstance(weight, Fp8Linear):
            host = to_numpy(float_layouts.to_tensor(weight, suffix))
            return host.view(host_dtype(FLOAT8)) if suffix == "weight" else host
        host = to_numpy(to_tensor(weight, self.layout, suffix, dtype=self.dtype))
        # bfloat16 comes as its bits
        return host.view(host_dtype("bfloat16")) if host.dtype.name == "uint16" else host


def storable(weight: Linear, name: str = "weight") -> QuantizedLinear | W8A8Linear | Fp8Linear:
    """``weight`` in a form that ``formats.layouts`` can store.

    Raises
    ------
    CheckpointError
        naming ``name``, for a weight that no layout can hold.
    """
    if isinstance(weight, Int8Linear):
        scheme = Scheme(8, "restricted", "channel")
        return QuantizedLinear.from_codes(weight.codes, weight.scale, None, scheme)
    if isinstance(weight, W8A8Linear):
        bits = weight.scheme.bits
        if weight.scheme.granularity != "token" or bits != 8:
            kind = "a static scale" if weight.static else "a scale per tensor"
            raise CheckpointError(
                f"{name}: stored activations have 8 bits and a dynamic scale per token (level "
                f"O1), not {bits} bits and {kind}"
            )
    if not isinstance(weight, (QuantizedLinear, W8A8Linear, Fp8Linear)):
        raise CheckpointError(
            f"{name}: {type(weight).__name__} is not quantised: quantise it, or name it in keep"
        )
    return weight


def checkpoint_names(layer: Layer, index: int) -> dict[str, Array | Linear]:
    """A layer's projections, norms and biases under their names in the checkpoint: the inverse
    of ``llama.build_layer``.
    """
    at = f"model.layers.{index}."
    found: dict[str, Array | Linear] = {
        f"{projection_name(index, key)}.weight": layer[key] for key in PROJECTIONS
    }
    for key, tensor in layer.items():
        if key.endswith("_bias"):
            found[f"{at}self_attn.{key[0]}_proj.bias"] = tensor
        elif key in ("q_norm", "k_norm"):
            found[f"{at}self_attn.{key}.weight"] = tensor
        elif key not in PROJECTIONS:
            found[f"{at}{key}.weight"] = tensor
    return found


def export(
    path: str | Path,
    model: ModelRecord,
    *,
    layout: str | None = None,
    dtype: str = "float16",
    max_shard_bytes: int | None = None,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``model`` (a record with ``.config .weights .tokenizer`` whose projections are
    quantised).

    ``layout`` None is the usual one for its weights (see ``default_layout``). Embedding,
    norms, biases, head and scales are stored in ``dtype``: a model that was quantised with
    that ``scale_dtype`` is stored exactly.

    Raises
    ------
    ValueError
        for weights that the layout cannot hold, naming the layouts that can; otherwise as
        ``checkpoints.writer.save``. Nothing has been written then.
    """
    config = model.config
    weights = model.weights
    tokenizer = model.tokenizer
    spec = export_spec_for(weights, layout, dtype)
    target = resolved(path)
    check_target(target, overwrite)
    plan = spec.plan(config)
    tensors = {
        EMBEDDING: weights["embed_tokens"],
        "model.norm.weight": weights["norm"],
        HEAD: weights["lm_head"],
    }
    for index, layer in enumerate(weights["layers"]):
        tensors |= checkpoint_names(layer, index)
    texts = documents(
        config, tokenizer, dtype, extra_files or {}, quantization_config=spec.config_entry
    )
    read = spec.reader(tensors, target)
    write_directory(target, texts, plan, read, max_shard_bytes=max_shard_bytes)


class _Kind(NamedTuple):
    """What all quantised projections of an exported model must have in common."""

    scheme: Scheme | WeightLayout  # 8-bit floats know their layout
    activations: bool = False
    act_order: bool = False


def export_spec_for(
    weights: Weights, layout: str | None = None, dtype: str = "float16"
) -> ExportSpec:
    """How a weight tree is stored.

    Raises
    ------
    ValueError
        if its projections are not all quantised alike, or no layout fits.
    """
    if dtype not in STORED_TYPES:
        raise InputError(
            f"export: dtype {dtype!r} is not stored; choose one of {', '.join(STORED_TYPES)}"
        )
    kinds: dict[_Kind, str] = {}  # and the first weight of the kind
    plain: set[tuple[str, bool]] = set()  # (projection, in floating point?)
    for index, layer in enumerate(weights["layers"]):
        for key in PROJECTIONS:
            name = projection_name(index, key)
            if isinstance(layer[key], RotatedLinear):
                raise CheckpointError(
                    f"export: {name} reads a Hadamard transform at run time, which no checkpoint "
                    "format has: rotate with Rotations(mlp=False)"
                )
            plain.add((key, isinstance(layer[key], Dense)))
            if not isinstance(layer[key], Dense):
                kinds.setdefault(_kind(storable(layer[key], name), layout), name)
    keep = tuple(key for key in PROJECTIONS if (key, True) in plain)
    if len(kinds) != 1 or any((key, False) in plain for key in keep):
        found = ", ".join(f"{kind.scheme} ({name})" for kind, name in kinds.items()) or "none"
        raise CheckpointError(
            f"export: all projections of a name must be quantised alike; found {found}"
        )
    scheme, activations, act_order = next(iter(kinds))
    if isinstance(scheme, WeightLayout):
        return ExportSpec(scheme, dtype, keep)
    layout = layout or default_layout(scheme, activations=activations, act_order=act_order)
    stored = layout_for(scheme, layout, activations=activations, act_order=act_order)
    return ExportSpec(stored, dtype, keep)


def _kind(weight: QuantizedLinear | W8A8Linear | Fp8Linear, layout: str | None) -> _Kind:
    """The kind of a weight that ``storable`` returned."""
    if isinstance(weight, Fp8Linear):
        return _Kind(float_layout_for(weight, layout), activations=True)
    inner = weight.weight if isinstance(weight, W8A8Linear) else weight
    act_order = getattr(inner, "g_idx", None) is not None
    return _Kind(inner.scheme, isinstance(weight, W8A8Linear), act_order)


def default_layout(scheme: Scheme, *, activations: bool = False, act_order: bool = False) -> str:
    """The layout in which most programs read weights of this kind.

    >>> default_layout(Scheme(4, "half_integer", "group", 128))
    'pack-quantized'
    >>> default_layout(Scheme(4, "half_integer", "group", 128), act_order=True)
    'gptq_v2'
    """
    if activations:
        return "int-quantized"
    if act_order:
        return "gptq_v2"
    if scheme.symmetric:
        return "pack-quantized"
    if scheme.bits == 4:
        return "awq"
    return "gptq_v2"
