"""``quantization_config`` of a ``config.json``: which weights of a checkpoint are stored
how. Plain data, no arrays.

| quant_method       | format                                              | which weights                            |
|--------------------|-----------------------------------------------------|------------------------------------------|
| compressed-tensors | pack-quantized, int-quantized, naive-quantized       | by ``targets`` and ``ignore``            |
| compressed-tensors | float-quantized                                      | by ``targets`` and ``ignore``            |
| fp8                | E4M3 in blocks (DeepSeek-V3)                         | those that have a ``weight_scale_inv``   |
| gptq               | ``checkpoint_format`` gptq (v1) or gptq_v2           | those that have a ``qweight``            |
| awq                | ``version`` gemm                                     | those that have a ``qweight``            |

What is written is what the spec of each format calls for, ``lm_head`` in ``ignore``
(readers look for a packed head otherwise) and ``quantization_status`` "compressed"
(transformers fills in random weights otherwise). What is read is refused, with the reason,
wherever ignoring an entry would change the output.

Sources: compressed-tensors' QuantizationConfig, transformers' GPTQConfig and AwqConfig.

Left out: 8-bit floats with static activations or a scale a tensor, per-module overrides of
GPTQModel ("dynamic"), schemes by the name of a preset, sparsity.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from refllm.formats.layouts import FLOATS, GPTQ_BITS, WeightLayout

__all__ = ["SUPPORTED", "Quantization", "UnsupportedQuantization", "parse", "quantization_config"]

COMPRESSED = ("pack-quantized", "int-quantized", "naive-quantized")
SUPPORTED = f"compressed-tensors ({', '.join(COMPRESSED)}, float-quantized), fp8 (in blocks), gptq (v1 and v2) and awq (gemm)"


class UnsupportedQuantization(ValueError):
    """A quantization_config that is damaged, or asks for what refllm does not read."""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are stored. ``groups`` are (targets, how) in the
    order of the file.
    """

    method: str
    groups: tuple[tuple[tuple[str, ...], WeightLayout], ...]
    ignore: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.method}: {', '.join(str(stored) for _, stored in self.groups)}"

    def of(self, module: str, names: Container[str]) -> WeightLayout | None:
        """How the weight of a linear ``module`` is stored, in a checkpoint with tensors
        ``names``; None: plainly.
        """
        if self.method != "compressed-tensors":
            sign = "weight_scale_inv" if self.method == "fp8" else "qweight"
            if f"{module}.{sign}" in names:
                return self.groups[0][1]
            return None
        if any(_matches(entry, module) for entry in self.ignore):
            return None
        found = [
            (rank, stored)
            for targets, stored in self.groups
            for t in targets
            if (rank := _matches(t, module))
        ]
        # of equals the first
        if found:
            return min(found, key=lambda pair: pair[0])[1]
        return None


def _matches(target: str, module: str) -> int:
    """1 for a module's own name, 2 for a pattern, 3 for the class of all linear modules; 0
    if it does not match.
    """
    if target == module:
        return 1
    if target.startswith("re:"):
        try:
            if re.match(target.removeprefix("re:"), module):
                return 2
            return 0
        except re.error as error:
            raise UnsupportedQuantization(
                f"quantization_config: {target!r} is no pattern ({error})"
            ) from error
    return 3 if target == "Linear" else 0


# --- writing ------------------------------------------------------------------------------


def quantization_config(stored: WeightLayout, ignore: Sequence[str] = ("lm_head",)) -> dict[str, Any]:
    """The entry for a checkpoint whose linear weights, but for ``ignore``, are all
    ``stored`` alike.
    """
    group = -1 if stored.group_size is None else stored.group_size
    if stored.layout == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(ignore),
        }
    if stored.layout in ("gptq", "gptq_v2"):
        return {
            "quant_method": "gptq",
            "bits": stored.bits,
            "group_size": group,
            "desc_act": stored.reordered,
            "sym": stored.symmetric,
            "checkpoint_format": stored.layout,
            "lm_head": False,
        }
    if stored.layout == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [stored.group_size] * 2,
            "modules_to_not_convert": list(ignore),
        }
    if stored.floats:
        weights, inputs = _float_arguments(stored)
        return _entry(stored, weights, inputs, ignore)
    weights = {
        "num_bits": stored.bits,
        "type": "int",
        "symmetric": stored.symmetric,
        "dynamic": False,
        "strategy": "group" if stored.group_size else "channel",
        "group_size": stored.group_size,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return _entry(stored, weights, inputs, ignore)


def _float_arguments(stored: WeightLayout) -> tuple[dict[str, Any], dict[str, Any]]:
    """How compressed-tensors spells 8-bit floats: by row and token, or in blocks with
    tiles.
    """
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    size = stored.group_size
    if size is None:
        return number | {"strategy": "channel", "dynamic": False}, number | {
            "strategy": "token",
            "dynamic": True,
        }
    block = {"strategy": "block", "dynamic": False, "block_structure": [size, size]}
    return number | block, number | {"strategy": "group", "group_size": size, "dynamic": True}


def _entry(stored: WeightLayout, weights: Any, inputs: Any, ignore: Sequence[str]) -> dict[str, Any]:
    """compressed-tensors' entry of one group of modules."""
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if stored.activations else None,
        "output_activations": None,
        "format": stored.layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": stored.layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


# --- reading ------------------------------------------------------------------------------


def parse(raw: Any) -> Quantization:
    """Read the entry of a ``config.json``.

    Raises
    ------
    UnsupportedQuantization
        for every method, format and option that is not read, naming what is.
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
    layout, bits, symmetric = _gptq(raw) if method == "gptq" else _awq(raw)
    group = raw.get("group_size", raw.get("q_group_size"))
    stored = WeightLayout(
        layout, bits, None if group == -1 else _size(group), symmetric, bool(raw.get("desc_act"))
    )
    return Quantization(str(method), ((("Linear",), stored),))


def _gptq(raw: Mapping[str, Any]) -> tuple[str, int, bool]:
    layout = raw.get("checkpoint_format") or raw.get("format") or "gptq"
    bits = raw.get("bits")
    if layout not in ("gptq", "gptq_v2") or raw.get("is_marlin_format"):
        _refuse(
            "checkpoint_format",
            "marlin" if raw.get("is_marlin_format") else layout,
            "gptq and gptq_v2",
        )
    if not isinstance(bits, int) or bits not in GPTQ_BITS:
        _refuse("bits", bits, "2, 3, 4 and 8")
    if raw.get("dynamic"):
        _refuse("dynamic", raw["dynamic"], "one scheme for all modules")
    return layout, bits, False  # the zero points are in the file, whatever "sym" says


def _awq(raw: Mapping[str, Any]) -> tuple[str, int, bool]:
    version = str(raw.get("version", "gemm")).lower()
    bits = raw.get("bits", raw.get("w_bit"))
    if version != "gemm":
        _refuse("version", raw["version"], "gemm")
    if bits != 4:
        _refuse("bits", bits, "4")
    if not raw.get("zero_point", True):
        _refuse("zero_point", raw["zero_point"], "true")
    return "awq", 4, False


def _deepseek(raw: Mapping[str, Any]) -> WeightLayout:
    for key, value in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if raw.get(key, value) != value:
            _refuse(key, raw[key], value)
    # a power of two is a float32 number, too
    if raw.get("scale_fmt") not in (None, "float", "ue8m0"):
        _refuse("scale_fmt", raw["scale_fmt"], "float and ue8m0")
    return WeightLayout("fp8", 8, _square(raw.get("weight_block_size"), "weight_block_size"))


def _square(sizes: Any, key: str) -> int:
    """b of a block of [b, b]."""
    if not isinstance(sizes, list) or len(sizes) != 2 or sizes[0] != sizes[1]:
        _refuse(key, sizes, "[128, 128] and other square blocks")
    return _size(sizes[0])


def _float_group(weights: Mapping[str, Any], inputs: Any) -> WeightLayout:
    """A group of 8-bit floats: rows with tokens, or blocks with tiles."""
    if (weights.get("num_bits"), weights.get("symmetric", True)) != (8, True) or weights.get(
        "dynamic"
    ):
        _refuse("weights of float-quantized", dict(weights), "symmetric 8-bit floats")
    strategy = weights.get("strategy")
    if strategy not in ("channel", "block"):
        _refuse("weights of float-quantized", dict(weights), "a scale a row, or a block")
    if strategy == "block":
        size = _square(weights.get("block_structure"), "block_structure")
    else:
        size = None
    stored = WeightLayout("float-quantized", 8, size, plain_inputs=inputs is None)
    wanted = _float_arguments(stored)[1]
    if inputs is not None and not (
        isinstance(inputs, Mapping)
        and all(inputs.get(key) == value for key, value in wanted.items())
    ):
        _refuse(
            "input_activations of float-quantized",
            inputs,
            f"null, or dynamic 8-bit floats like {wanted}",
        )
    return stored


def _compressed(raw: Mapping[str, Any]) -> Quantization:
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if raw.get(key):
            _refuse(key, raw[key], "null")
    sparsity = raw.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        _refuse("sparsity_config", sparsity, "dense weights")
    if raw.get("quantization_status") != "compressed":
        _refuse("quantization_status", raw.get("quantization_status"), "compressed")
    groups = raw.get("config_groups")
    ignore = raw.get("ignore") or []
    if not isinstance(groups, Mapping) or not groups:
        _refuse("config_groups", groups, "an object of at least one group")
    return Quantization(
        "compressed-tensors", tuple(_group(g, raw) for g in groups.values()), _strings(ignore)
    )


def _group(group: Any, raw: Mapping[str, Any]) -> tuple[tuple[str, ...], WeightLayout]:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        _refuse("config_groups", group, "groups with 'targets' and 'weights'")
    layout = group.get("format") or raw.get("format")
    weights = group["weights"]
    inputs = group.get("input_activations")
    if group.get("output_activations"):
        _refuse("output_activations", group["output_activations"], "null")
    if layout in FLOATS[:1] and weights.get("type") == "float":
        return _strings(group.get("targets")), _float_group(weights, inputs)
    if layout not in COMPRESSED:
        _refuse("format", layout, ", ".join((*COMPRESSED, *FLOATS[:1])))
    if layout == "int-quantized" and inputs is None:
        layout = "naive-quantized"
    if (layout == "int-quantized") != (inputs is not None) or (
        inputs is not None and not _dynamic(inputs)
    ):
        _refuse(
            f"input_activations of {layout}",
            inputs,
            "dynamic symmetric 8-bit integers a token in int-quantized",
        )
    strategy = weights.get("strategy")
    size = weights.get("group_size")
    if (
        weights.get("type", "int") != "int"
        or weights.get("dynamic")
        or strategy not in ("channel", "group")
    ):
        _refuse("weights", dict(weights), "integers by channel or group")
    if weights.get("actorder") in ("group", "dynamic"):
        _refuse("actorder", weights["actorder"], "null and weight")
    bits = weights.get("num_bits")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        _refuse("symmetric", symmetric, "true and false")
    allowed = range(1, 9) if layout == "pack-quantized" else (8,)
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in allowed:
        _refuse(f"num_bits of {layout}", bits, f"{allowed[0]} to {allowed[-1]}")
    if layout == "int-quantized" and (strategy == "group" or not symmetric):
        _refuse("weights of int-quantized", dict(weights), "symmetric ones by channel")
    stored = WeightLayout(layout, bits, _size(size) if strategy == "group" else None, symmetric)
    return _strings(group.get("targets")), stored


def _dynamic(inputs: Any) -> bool:
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return isinstance(inputs, Mapping) and all(
        inputs.get(key) == value for key, value in wanted.items()
    )


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse("group_size", value, "a positive number, or -1 for a scale a row")
    size: int = value
    return size


def _strings(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        _refuse("targets and ignore", values, "lists of names")
    return tuple(values)


def _refuse(key: str, value: Any, supported: str) -> NoReturn:
    raise UnsupportedQuantization(
        f"quantization_config: {key} {value!r} is not supported; supported: {supported}"
    )
