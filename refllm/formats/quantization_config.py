"""``quantization_config`` of a ``config.json``: which weights of a checkpoint are stored in
which layout. Plain data, no arrays.

| quant_method       | format                                     | which weights                 |
|--------------------|--------------------------------------------|-------------------------------|
| compressed-tensors | pack-, int- or naive-quantized             | by ``targets`` and ``ignore`` |
| compressed-tensors | float-quantized                            | by ``targets`` and ``ignore`` |
| fp8                | E4M3 in blocks (DeepSeek-V3)               | with a weight_scale_inv       |
| gptq               | ``checkpoint_format`` gptq (v1) or gptq_v2 | with a qweight                |
| awq                | ``version`` gemm                           | with a qweight                |

Written is what the specification of each format asks for, ``lm_head`` in ``ignore``
(readers look for a packed head otherwise) and ``quantization_status`` "compressed"
(transformers fills in random weights otherwise). Reading rejects, with the reason, every
entry that would change the output if it were ignored.

Sources: compressed-tensors' QuantizationConfig, transformers' GPTQConfig and AwqConfig.

Left out: 8-bit floats with static activations or one scale per tensor, per-module overrides
of GPTQModel ("dynamic"), schemes by the name of a preset, sparsity.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from refllm.errors import InputError
from refllm.formats.layouts import GPTQ_BITS, WeightLayout

__all__ = ["SUPPORTED", "Quantization", "UnsupportedQuantization", "parse", "quantization_config"]

COMPRESSED = ("pack-quantized", "int-quantized", "naive-quantized")
SUPPORTED = (
    f"compressed-tensors ({', '.join(COMPRESSED)}, float-quantized), fp8 (in blocks), "
    "gptq (v1 and v2) and awq (gemm)"
)
Entry = Mapping[str, object]  # an object of the JSON file

# compressed-tensors' entry for dynamic 8-bit activations with one scale per token
PER_TOKEN: Entry = {"strategy": "token", "dynamic": True}
INT8_PER_TOKEN: Entry = {"num_bits": 8, "type": "int", "symmetric": True, **PER_TOKEN}


class UnsupportedQuantization(InputError):
    """A quantization_config that is damaged, or needs what refllm does not read."""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are stored. ``groups`` are (targets, layout) in the
    order of the file.
    """

    method: str
    groups: tuple[tuple[tuple[str, ...], WeightLayout], ...]
    ignore: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.method}: {', '.join(str(layout) for _, layout in self.groups)}"

    def of(self, module: str, names: Container[str]) -> WeightLayout | None:
        """The layout of the weight of a linear ``module`` in a checkpoint with tensors
        ``names``; None if it is not quantised.
        """
        if self.method != "compressed-tensors":
            mark = "weight_scale_inv" if self.method == "fp8" else "qweight"
            if f"{module}.{mark}" in names:
                return self.groups[0][1]
            return None
        if any(_matches(entry, module) for entry in self.ignore):
            return None
        found = [
            (rank, layout)
            for targets, layout in self.groups
            for target in targets
            if (rank := _matches(target, module))
        ]
        if not found:
            return None
        return min(found, key=lambda pair: pair[0])[1]  # the first of equal ranks


def _matches(target: str, module: str) -> int:
    """Rank of a match: 1 for the module's own name, 2 for a pattern, 3 for the class of all
    linear modules; 0 if ``target`` does not match.
    """
    if target == module:
        return 1
    if target.startswith("re:"):
        try:
            found = re.match(target.removeprefix("re:"), module)
        except re.error as error:
            raise UnsupportedQuantization(
                f"quantization_config: {target!r} is not a pattern ({error})"
            ) from error
        return 2 if found else 0
    return 3 if target == "Linear" else 0


# --- writing ------------------------------------------------------------------------------


def quantization_config(
    layout: WeightLayout, ignore: Sequence[str] = ("lm_head",)
) -> dict[str, object]:
    """The entry for a checkpoint whose linear weights, except those in ``ignore``, all have
    the same ``layout``.

    >>> quantization_config(WeightLayout("awq", 4, 128))["quant_method"]
    'awq'
    """
    group = -1 if layout.group_size is None else layout.group_size
    if layout.name == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignore),
        }
    if layout.name in ("gptq", "gptq_v2"):
        return {
            "quant_method": "gptq",
            "bits": layout.bits,
            "group_size": group,
            "desc_act": layout.act_order,
            "sym": layout.symmetric,
            "checkpoint_format": layout.name,
            "lm_head": False,
        }
    if layout.name == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [layout.group_size] * 2,
            "modules_to_not_convert": list(ignore),
        }
    if layout.is_float:
        return _compressed_entry(layout, *_float_arguments(layout), ignore)
    weights = {
        "num_bits": layout.bits,
        "type": "int",
        "symmetric": layout.symmetric,
        "dynamic": False,
        "strategy": "group" if layout.group_size else "channel",
        "group_size": layout.group_size,
    }
    return _compressed_entry(layout, weights, INT8_PER_TOKEN, ignore)


def _float_arguments(layout: WeightLayout) -> tuple[Entry, Entry]:
    """compressed-tensors' arguments of weights and activations in 8-bit floats: per row and
    token, or in blocks with tiles.
    """
    e4m3: dict[str, object] = {"num_bits": 8, "type": "float", "symmetric": True}
    size = layout.group_size
    if size is None:
        return {**e4m3, "strategy": "channel", "dynamic": False}, {**e4m3, **PER_TOKEN}
    weights = {**e4m3, "strategy": "block", "dynamic": False, "block_structure": [size, size]}
    return weights, {**e4m3, "strategy": "group", "group_size": size, "dynamic": True}


def _compressed_entry(
    layout: WeightLayout, weights: Entry, inputs: Entry, ignore: Sequence[str]
) -> dict[str, object]:
    """compressed-tensors' entry with one group of modules."""
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if layout.activations else None,
        "output_activations": None,
        "format": layout.name,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout.name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


# --- reading ------------------------------------------------------------------------------


def parse(raw: object) -> Quantization:
    """Read the entry of a ``config.json``.

    Raises
    ------
    UnsupportedQuantization
        for every method, format and option that is not read, naming those that are.
    """
    if not isinstance(raw, Mapping):
        raise UnsupportedQuantization(f"quantization_config must be an object, got {raw!r}")
    method = raw.get("quant_method")
    if method == "compressed-tensors":
        return _compressed(raw)
    if method == "fp8":
        return Quantization("fp8", ((("Linear",), _deepseek(raw)),))
    if method not in ("gptq", "awq"):
        raise UnsupportedQuantization(
            f"quantization_config: quant_method {method!r} is not supported; "
            f"supported are {SUPPORTED}"
        )
    if method == "gptq":
        name, bits = _gptq(raw)
    else:
        name, bits = _awq(raw)
    size = raw.get("group_size", raw.get("q_group_size"))
    size = None if size == -1 else _size(size)
    # zero points are in the file; where "sym" is set, ``layouts.from_tensors`` checks them
    symmetric = method == "gptq" and _flag(raw, "sym")
    layout = WeightLayout(name, bits, size, symmetric, act_order=_flag(raw, "desc_act"))
    return Quantization(str(method), ((("Linear",), layout),))


def _gptq(raw: Entry) -> tuple[str, int]:
    """Layout and bits of a GPTQ entry."""
    name = raw.get("checkpoint_format") or raw.get("format") or "gptq"
    if raw.get("is_marlin_format"):
        name = "marlin"
    bits = raw.get("bits")
    if name not in ("gptq", "gptq_v2"):
        _reject("checkpoint_format", name, "gptq and gptq_v2")
    if not isinstance(bits, int) or bits not in GPTQ_BITS:
        _reject("bits", bits, "2, 3, 4 and 8")
    if raw.get("dynamic"):
        _reject("dynamic", raw["dynamic"], "one scheme for all modules")
    return str(name), bits


def _awq(raw: Entry) -> tuple[str, int]:
    """Layout and bits of an AWQ entry."""
    version = str(raw.get("version", "gemm")).lower()
    bits = raw.get("bits", raw.get("w_bit"))
    if version != "gemm":
        _reject("version", raw["version"], "gemm")
    if bits != 4:
        _reject("bits", bits, "4")
    if not raw.get("zero_point", True):
        _reject("zero_point", raw["zero_point"], "true")
    return "awq", 4


def _deepseek(raw: Entry) -> WeightLayout:
    """The layout of DeepSeek-V3's fp8 entry."""
    for key, value in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if raw.get(key, value) != value:
            _reject(key, raw[key], value)
    # scales that are powers of two are stored as float32 as well
    if raw.get("scale_fmt") not in (None, "float", "ue8m0"):
        _reject("scale_fmt", raw["scale_fmt"], "float and ue8m0")
    return WeightLayout("fp8", 8, _square(raw.get("weight_block_size"), "weight_block_size"))


def _compressed(raw: Entry) -> Quantization:
    """A compressed-tensors entry."""
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if raw.get(key):
            _reject(key, raw[key], "null")
    sparsity = raw.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        _reject("sparsity_config", sparsity, "dense weights")
    if raw.get("quantization_status") != "compressed":
        _reject("quantization_status", raw.get("quantization_status"), "compressed")
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _reject("config_groups", groups, "an object of at least one group")
    found = tuple(_group(group, raw) for group in groups.values())
    return Quantization("compressed-tensors", found, _strings(raw.get("ignore") or []))


def _group(group: object, raw: Entry) -> tuple[tuple[str, ...], WeightLayout]:
    """(targets, layout) of one of compressed-tensors' config groups."""
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        _reject("config_groups", group, "groups with 'targets' and 'weights'")
    name = group.get("format") or raw.get("format")
    weights = group["weights"]
    inputs = group.get("input_activations")
    if group.get("output_activations"):
        _reject("output_activations", group["output_activations"], "null")
    if name == "float-quantized" and weights.get("type") == "float":
        layout = _float_group(weights, inputs)
    elif name in COMPRESSED:
        layout = _integer_group(str(name), weights, inputs)
    else:
        _reject("format", name, ", ".join((*COMPRESSED, "float-quantized")))
    return _strings(group.get("targets")), layout


def _integer_group(name: str, weights: Entry, inputs: object) -> WeightLayout:
    """The layout of a group of integer weights."""
    if name == "int-quantized" and inputs is None:
        name = "naive-quantized"
    dynamic = inputs is None or _agrees(inputs, INT8_PER_TOKEN)
    if (name == "int-quantized") != (inputs is not None) or not dynamic:
        supported = "dynamic symmetric 8-bit integers per token in int-quantized"
        _reject(f"input_activations of {name}", inputs, supported)
    strategy = weights.get("strategy")
    integers = weights.get("type", "int") == "int" and not weights.get("dynamic")
    if not integers or strategy not in ("channel", "group"):
        _reject("weights", dict(weights), "integers by channel or group")
    if weights.get("actorder") in ("group", "dynamic"):
        _reject("actorder", weights["actorder"], "null and weight")
    bits = weights.get("num_bits")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        _reject("symmetric", symmetric, "true and false")
    allowed = range(1, 9) if name == "pack-quantized" else (8,)
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in allowed:
        _reject(f"num_bits of {name}", bits, f"{allowed[0]} to {allowed[-1]}")
    if name == "int-quantized" and (strategy == "group" or not symmetric):
        _reject("weights of int-quantized", dict(weights), "symmetric ones by channel")
    size = _size(weights.get("group_size")) if strategy == "group" else None
    return WeightLayout(name, bits, size, symmetric)


def _float_group(weights: Entry, inputs: object) -> WeightLayout:
    """The layout of a group of 8-bit floats: rows with tokens, or blocks with tiles."""
    kind = (weights.get("num_bits"), weights.get("symmetric", True))
    if kind != (8, True) or weights.get("dynamic"):
        _reject("weights of float-quantized", dict(weights), "symmetric 8-bit floats")
    strategy = weights.get("strategy")
    if strategy not in ("channel", "block"):
        _reject("weights of float-quantized", dict(weights), "one scale per row or block")
    size = None
    if strategy == "block":
        size = _square(weights.get("block_structure"), "block_structure")
    layout = WeightLayout("float-quantized", 8, size, weight_only=inputs is None)
    wanted = _float_arguments(layout)[1]
    if inputs is not None and not _agrees(inputs, wanted):
        supported = f"null, or dynamic 8-bit floats like {wanted}"
        _reject("input_activations of float-quantized", inputs, supported)
    return layout


# --- values -------------------------------------------------------------------------------


def _flag(raw: Entry, key: str) -> bool:
    """A boolean, false if it is missing or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        _reject(key, value, "true and false")
    return bool(value)


def _agrees(inputs: object, wanted: Entry) -> bool:
    """Whether an entry for activations has all the values of ``wanted``."""
    if not isinstance(inputs, Mapping):
        return False
    return all(inputs.get(key) == value for key, value in wanted.items())


def _size(value: object) -> int:
    """A group size."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _reject("group_size", value, "a positive integer, or -1 for one scale per row")
    return value


def _square(sizes: object, key: str) -> int:
    """b of a block of [b, b]."""
    if not isinstance(sizes, list) or len(sizes) != 2 or sizes[0] != sizes[1]:
        _reject(key, sizes, "[128, 128] and other square blocks")
    return _size(sizes[0])


def _strings(values: object) -> tuple[str, ...]:
    """A list of names as a tuple."""
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        _reject("targets and ignore", values, "lists of names")
    return tuple(values)


def _reject(key: str, value: object, supported: str) -> NoReturn:
    """UnsupportedQuantization that names the entry, and what is supported instead."""
    raise UnsupportedQuantization(
        f"quantization_config: {key} {value!r} is not supported; supported: {supported}"
    )
