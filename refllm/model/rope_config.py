"""RoPE's entries of a Hugging Face ``config.json``: base and scaling, read and written.

| place                                              | written by                   |
|----------------------------------------------------|------------------------------|
| rope_theta, rope_scaling                           | transformers before 5        |
| rope_parameters (with rope_theta in it)            | transformers from 5 on       |
| original_max_position_embeddings beside the others | some; it has the last word   |

Where both objects are there they must mean the same. ``rope_parameters``' own rope_theta wins
over the flat one, as in transformers.

Source: transformers' ``modeling_rope_utils``, whose defaults apply where an entry is missing.

Left out: dynamic, longrope (su), mrope and other kinds; rotation of a part of the head. Each
is rejected by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from refllm.array_types import Json, JsonView
from refllm.errors import UnsupportedModel
from refllm.model.rope import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)

__all__ = ["flag", "integer", "number", "read_rope", "write_scaling"]

_FLAT = ("rope_theta", "partial_rotary_factor")
# Entries that other programs read and transformers does not, with their neutral value
_FOREIGN = {"extrapolation_factor": 1.0, "attn_factor": 1.0}


def read_rope(raw: JsonView) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a config.json whose defaults are filled in.

    Raises
    ------
    UnsupportedModel
        for a kind of scaling that is not computed, a value that makes no sense, and two
        objects that contradict each other.
    """
    found = [_parsed(raw, raw[key]) for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    if not found:
        return _parsed(raw, {})
    if found[0] != found[-1]:
        raise UnsupportedModel(
            "config: rope_scaling and rope_parameters contradict each other: remove one of them"
        )
    return found[0]


def _parsed(raw: JsonView, entry: object) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of one of the two objects."""
    if not isinstance(entry, Mapping) or any(isinstance(v, Mapping) for v in entry.values()):
        raise UnsupportedModel(
            f"config: RoPE's parameters must be one object for all layers, got {entry!r}"
        )
    parameters = {key: raw[key] for key in _FLAT if key in raw} | dict(entry)
    theta = number(parameters, "rope_theta", 10_000.0)
    if number(parameters, "partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(
            "config: RoPE over a part of the head (partial_rotary_factor) is not supported"
        )
    if "mrope_section" in parameters:
        raise UnsupportedModel("config: RoPE in sections (mrope_section) is not supported")
    kind = parameters.get("rope_type", parameters.get("type"))
    if kind is None and parameters.get("factor") not in (None, 1, 1.0):
        raise UnsupportedModel(
            f"config: RoPE has a factor {parameters['factor']!r} and no rope_type: add the type, "
            "'linear', 'yarn' or 'llama3'"
        )
    if kind in (None, "default"):
        return theta, None
    original = raw.get("original_max_position_embeddings")
    if original is None:
        original = parameters.get("original_max_position_embeddings")
    if original is None:
        original = raw.get("max_position_embeddings")
    parameters["original_max_position_embeddings"] = original
    if kind == "linear":
        return theta, _linear(parameters)
    if kind == "yarn":
        return theta, _yarn(parameters, raw)
    if kind == "llama3":
        return theta, Llama3Scaling(
            number(parameters, "factor"),
            number(parameters, "low_freq_factor"),
            number(parameters, "high_freq_factor"),
            integer(parameters, "original_max_position_embeddings"),
        )
    raise UnsupportedModel(
        f"config: RoPE scaling {kind!r} is not supported; supported are 'default', 'linear', "
        "'yarn', 'llama3'"
    )


def _linear(parameters: JsonView) -> LinearScaling | None:
    """Linear scaling; None for the factor 1."""
    if number(parameters, "attention_factor", 1.0) != 1.0:
        raise UnsupportedModel(
            "config: linear RoPE scaling has no attention_factor: transformers ignores it"
        )
    scaling = LinearScaling(number(parameters, "factor"))
    return None if scaling.factor == 1 else scaling


def _yarn(parameters: JsonView, raw: JsonView) -> YarnScaling:
    """YaRN with all its options. A factor of null is the ratio of the two contexts."""
    for key, neutral in _FOREIGN.items():
        if number(parameters, key, neutral) != neutral:
            raise UnsupportedModel(
                f"config: yarn RoPE scaling's {key} {parameters[key]!r} is not supported: "
                "transformers ignores it"
            )
    original = integer(parameters, "original_max_position_embeddings")
    if "factor" in parameters and parameters["factor"] is None and original > 0:
        factor = integer(raw, "max_position_embeddings") / original
    else:
        factor = number(parameters, "factor")
    # the record rejects factors that are not positive
    mscale = number(parameters, "mscale", 0.0)
    all_dim = number(parameters, "mscale_all_dim", 0.0)
    implied = yarn_attention_factor(factor, mscale, all_dim)
    return YarnScaling(
        factor,
        original,
        number(parameters, "attention_factor", implied),
        number(parameters, "beta_fast", 32.0) or 32.0,
        number(parameters, "beta_slow", 1.0) or 1.0,
        flag(parameters, "truncate") if "truncate" in parameters else True,
    )


def write_scaling(scaling: RopeScaling) -> Json:
    """The ``rope_scaling`` object that ``read_rope`` reads back.

    A linear scaling with an attention factor, which GGUF alone can express, is written with
    its ``attention_factor``, and rejected when it is read.
    """
    if isinstance(scaling, Llama3Scaling):
        return {"rope_type": "llama3", **asdict(scaling)}
    if isinstance(scaling, LinearScaling):
        entry: Json = {"rope_type": "linear", "factor": scaling.factor}
        if scaling.attention_factor != 1.0:
            entry["attention_factor"] = scaling.attention_factor
        return entry
    entry = {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "attention_factor": scaling.attention_factor,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
    }
    implied = {
        "attention_factor": yarn_attention_factor(scaling.factor),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }
    # what a reader assumes anyway is left out: not every program knows every option
    return {key: value for key, value in entry.items() if implied.get(key) != value}


def number(raw: JsonView, key: str, default: float | None = None) -> float:
    """The number under ``key``; ``default`` if the key is missing or null."""
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise UnsupportedModel(f"config: {key!r} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnsupportedModel(f"config: {key} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise UnsupportedModel(f"config: {key} is too large a number") from error


def integer(raw: JsonView, key: str, default: int | None = None) -> int:
    """The integer under ``key``; ``default`` if the key is missing or null."""
    value = number(raw, key, default)
    if not value.is_integer():  # nor are inf and nan
        raise UnsupportedModel(f"config: {key} must be an integer, got {value!r}")
    return int(value)


def flag(raw: JsonView, key: str) -> bool:
    """The boolean under ``key``, false if it is missing or null; the string "false" is rejected."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise UnsupportedModel(f"config: {key} must be true or false, got {value!r}")
    return bool(value)
