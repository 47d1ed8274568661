"""How a quantised model is stored: its layout, the type of what stays in floats, and what
is not quantised.

From a layout (``formats.layouts``) and a network this makes the list of all tensors of its
files, and from a layer in memory the tensors themselves.

| name                    | stored as                                                                  |
|-------------------------|----------------------------------------------------------------------------|
| projections             | the tensors of the layout; those named in ``keep`` as they are             |
| embedding, norms, biases, head | in ``dtype``, as are all scales                                      |

LLM.int8()'s weights are stored as 8-bit weights with a scale a row: which columns of the
activations are outliers is found anew at each call, by whoever computes. Readers of
compressed-tensors use them with activations as they are.

Left out: quantised embeddings and heads.

<<MERGED>>
Quantised models as checkpoints that ``transformers``, vLLM and ``refllm.load`` read.

| layout          | quantised by, typically       | activations                                |
|-----------------|-------------------------------|--------------------------------------------|
| pack-quantized  | rtn, gptq, awq (symmetric); int8 | as they are                             |
| int-quantized   | smoothquant                   | 8 bits, a step a token (absmax/127.5)      |
| gptq_v2         | gptq, rtn, awq                | as they are                                |
| awq             | awq                           | as they are                                |
| float-quantized | fp8, by row or block          | 8-bit floats, a scale a token or tile      |
| fp8             | fp8, by block                 | 8-bit floats, a scale a tile               |

``export`` writes a model in memory, ``assemble`` the layers that a run left in files. Both
write all files in a new directory, which takes its name only when it is whole
(``checkpoints.writer``).

Readers of "int-quantized" round activations to absmax/127.5, SmoothQuant to absmax/127:
what is loaded computes as the format's readers do, which is not bit for bit what was
quantised.

Left out: GGUF, several layouts in one checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refllm.backend import to_numpy
from refllm.checkpoints.loading import stored_specs
from refllm.checkpoints.tensor_files import (
    EMBEDDING,
    HEAD,
    CheckpointError,
    Shape,
    check_vocabulary,
    converted,
    host_dtype,
)
from refllm.checkpoints.writer import (
    STORED_TYPES,
    Plan,
    check_target,
    documents,
    resolved,
    write_directory,
)
from refllm.formats import float_layouts
from refllm.formats.float_layouts import layout_for as float_layout_for
from refllm.formats.fp8_linear import Fp8Linear
from refllm.formats.layouts import FLOAT, FLOAT8, WeightLayout, layout_for, to_tensor
from refllm.formats.quantization_config import Quantization, parse, quantization_config
from refllm.formats.quantized_linear import QuantizedLinear
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS, Layer
from refllm.model.weights import Dense, Linear
from refllm.quant.llm_int8 import Int8Linear

Read = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Storing:
    """``keep`` names the projections (keys of ``llama.PROJECTIONS``) that are not
    quantised.
    """

    stored: WeightLayout
    dtype: str = "float16"
    keep: tuple[str, ...] = ()

    @property
    def entry(self) -> dict[str, Any]:
        """The ``quantization_config`` of its config.json."""
        paths = [PROJECTIONS[key].replace(".", r"\.") for key in self.keep]
        return quantization_config(
            self.stored, ["lm_head", *(rf"re:.*\.{path}$" for path in paths)]
        )

    @cached_property
    def quantization(self) -> Quantization:
        """The same, as a reader understands it."""
        return parse(self.entry)

    def of(self, name: str, shape: Shape) -> WeightLayout | None:
        """How the tensor ``name`` of a network is stored; None: in ``dtype``."""
        paths = (f".{path}.weight" for key, path in PROJECTIONS.items() if key not in self.keep)
        return self.stored if name.endswith(tuple(paths)) else None

    def plan(self, config: ModelConfig) -> Plan:
        """Every tensor of the files; CheckpointError naming a weight that the layout has no
        place for.
        """
        specs = stored_specs(config, self.of)
        # Scales of 8-bit floats stay in float32: rounding them would be a second error in
        # every weight.
        scales = ("weight_scale", "weight_scale_inv") if self.stored.is_float else ()
        return {
            name: (
                dtype if dtype != FLOAT else "float32" if name.endswith(scales) else self.dtype,
                shape,
            )
            for name, (dtype, shape) in specs
        }

    def reader(self, tensors: Mapping[str, Any], where: Path) -> Read:
        """What looks up the stored tensors of ``tensors`` (plain names; arrays, or a
        ``Linear`` each), on the host.

        The look-up raises CheckpointError naming ``where`` for numbers that are not finite
        in ``dtype``.
        """
        linears = {
            name: storable(t, name) for name, t in tensors.items() if self.of(name, ()) is not None
        }

        def read(name: str) -> np.ndarray:
            module, _, suffix = name.rpartition(".")
            weight = linears.get(f"{module}.weight")
            if weight is not None and suffix != "bias":
                if isinstance(weight, Fp8Linear):
                    host = to_numpy(float_layouts.to_tensor(weight, suffix))
                    if suffix == "weight":
                        return host.view(host_dtype(FLOAT8))
                    return host
                host = to_numpy(to_tensor(weight, self.stored, suffix, dtype=self.dtype))
                if host.dtype.name == "uint16":
                    return host.view(host_dtype("bfloat16"))
                return host
            plain = tensors[name]
            floats = to_numpy(plain.dequantize() if hasattr(plain, "dequantize") else plain)
            return converted(floats, self.dtype, name, where)

        return read


def storable(weight: Linear, name: str = "weight") -> QuantizedLinear | W8A8Linear | Fp8Linear:
    """``weight`` in a form that ``formats.layouts`` stores.

    Raises
    ------
    CheckpointError
        naming ``name``, for what no layout holds.
    """
    if isinstance(weight, Int8Linear):
        return QuantizedLinear.from_codes(
            weight.codes, weight.scale, None, Scheme(8, "restricted", "channel")
        )
    if isinstance(weight, W8A8Linear) and (weight.scheme.granularity, weight.scheme.bits) != (
        "token",
        8,
    ):
        raise CheckpointError(
            f"{name}: stored activations have 8 bits and a step a token, found anew (level O1), not "
            f"{weight.scheme.bits} bits {'static' if weight.static else 'a tensor'}"
        )
    if not isinstance(weight, (QuantizedLinear, W8A8Linear, Fp8Linear)):
        raise CheckpointError(
            f"{name}: {type(weight).__name__} is not quantised: quantise it, or name it in keep"
        )
    return weight


def named(layer: Layer, index: int) -> dict[str, Any]:
    """A layer's projections, norms and biases under their names in the checkpoint:
    ``llama.build_layer`` backwards.
    """
    at = f"model.layers.{index}."
    found = {f"{at}{path}.weight": layer[key] for key, path in PROJECTIONS.items()}
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
    model: Any,
    *,
    layout: str | None = None,
    dtype: str = "float16",
    max_shard_bytes: int | None = None,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``model`` (a record with ``.config .weights .tokenizer`` whose projections are
    quantised).

    ``layout`` None is the usual one of its weights (see ``default_layout``). Embedding,
    norms, biases, head and scales are stored in ``dtype``: a model that was quantised with
    that ``scale_dtype`` is stored exactly.

    Raises
    ------
    ValueError
        for weights that the layout cannot hold, naming the layouts that can; otherwise as
        ``writer.save``. Nothing has been written then.
    """
    config = model.config
    weights = model.weights
    tokenizer = model.tokenizer
    storing = storing_of(weights, layout, dtype)
    target = resolved(path)
    check_target(target, overwrite)
    check_vocabulary(tokenizer, config, target)
    plan = storing.plan(config)
    tensors = {
        EMBEDDING: weights["embed_tokens"],
        "model.norm.weight": weights["norm"],
        HEAD: weights["lm_head"],
    }
    for index, layer in enumerate(weights["layers"]):
        tensors |= named(layer, index)
    texts = documents(
        config, tokenizer, dtype, extra_files or {}, quantization_config=storing.entry
    )
    write_directory(
        target, texts, plan, storing.reader(tensors, target), max_shard_bytes=max_shard_bytes
    )


def storing_of(
    weights: Mapping[str, Any], layout: str | None = None, dtype: str = "float16"
) -> Storing:
    """How a weight tree is stored; ValueError if its projections are not all quantised
    alike, or no layout fits.
    """
    if dtype not in STORED_TYPES:
        raise ValueError(
            f"export: dtype {dtype!r} is not stored; choose one of {', '.join(STORED_TYPES)}"
        )
    kinds: dict[Any, str] = {}
    plain: set[tuple[str, bool]] = set()
    for index, layer in enumerate(weights["layers"]):
        for key, path in PROJECTIONS.items():
            name = f"model.layers.{index}.{path}"
            plain.add((key, isinstance(layer[key], Dense)))
            if not isinstance(layer[key], Dense):
                made = storable(layer[key], name)
                if isinstance(made, Fp8Linear):
                    kinds.setdefault((float_layout_for(made, layout), True, False), name)
                    continue
                inner = made.weight if isinstance(made, W8A8Linear) else made
                act_order = getattr(inner, "g_idx", None) is not None
                kinds.setdefault((inner.scheme, made is not inner, act_order), name)
    keep = tuple(key for key in PROJECTIONS if (key, True) in plain)
    if len(kinds) != 1 or any((key, False) in plain for key in keep):
        found = ", ".join(f"{kind[0]} ({name})" for kind, name in kinds.items()) or "none"
        raise CheckpointError(
            f"export: all projections of a name must be quantised alike; found {found}"
        )
    scheme, activations, act_order = next(iter(kinds))
    if isinstance(scheme, WeightLayout):
        return Storing(scheme, dtype, keep)
    layout = layout or default_layout(scheme, activations=activations, act_order=act_order)
    return Storing(
        layout_for(scheme, layout, activations=activations, act_order=act_order), dtype, keep
    )


def default_layout(scheme: Any, *, activations: bool = False, act_order: bool = False) -> str:
    """The layout that most programs read weights of this kind in."""
    if activations:
        return "int-quantized"
    if act_order:
        return "gptq_v2"
    if scheme.symmetric:
        return "pack-quantized"
    if scheme.bits == 4:
        return "awq"
    return "gptq_v2"
