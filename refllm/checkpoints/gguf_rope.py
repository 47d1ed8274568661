"""RoPE's scaling in GGUF metadata: what the keys mean, and how a network's scaling is written.

| key (after ``ARCHITECTURE.rope.``)   | meaning                                            |
|--------------------------------------|----------------------------------------------------|
| scaling.type                         | none, linear or yarn; a missing one is linear      |
| scaling.factor; older: scale_linear  | s; a missing one, or 0, is 1                       |
| scaling.attn_factor                  | multiplies the attention factor of any type        |
| scaling.original_context_length      | L; a missing one, or 0, is context_length          |
| scaling.yarn_beta_fast, _beta_slow   | β, α                                               |
| scaling.yarn_attn_factor             | the attention factor of a config that states one   |
| scaling.yarn_log_multiplier          | mscale_all_dim, with mscale 1                      |
| tensor rope_freqs                    | factors that the frequencies are divided by        |

llama.cpp reads the keys from yarn_beta_fast on in few architectures, none of these three;
its converter writes them all the same. refllm computes what the file says. A scaling that
llama.cpp cannot compute from its keys (Llama 3's, a YaRN with other ends than 32 and 1) is
written as ``rope_freqs``, which llama.cpp uses in "llama" and rejects in "qwen2" and
"qwen3"; our own key ``refllm.rope_scaling`` then says what the factors were computed from.

Source: llama.cpp's loader, context and converter.

Left out: longrope, sections for several axes, yarn_ext_factor other than 1, other keys: each
is rejected by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from refllm.array_types import Json, JsonView
from refllm.checkpoints.gguf_entries import Entries
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.model.config import ModelConfig, UnsupportedModel
from refllm.model.rope import (
    LinearScaling,
    RopeScaling,
    YarnScaling,
    rope_frequencies,
    yarn_attention_factor,
)
from refllm.model.rope_config import read_rope, write_scaling

__all__ = [
    "OWN_KEY",
    "ROPE_FACTORS",
    "rope_factors",
    "scaling_from_metadata",
    "scaling_metadata",
]

ROPE_FACTORS = "rope_freqs.weight"
OWN_KEY = "refllm.rope_scaling"  # the object of a config.json, as JSON
_IGNORED = ("finetuned",)  # keys after rope.scaling. that change nothing
_PLAIN = ("type", "factor", "attn_factor", "original_context_length")
_YARN = ("beta_fast", "beta_slow", "attn_factor", "log_multiplier", "ext_factor")
_KNOWN = {*_IGNORED, *_PLAIN, *(f"yarn_{key}" for key in _YARN)}


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """float32 [D/2]: what each pair's frequency is divided by; None where llama.cpp's keys
    suffice.
    """
    scaling = config.rope_scaling
    if scaling is None or _in_keys(scaling):
        return None
    plain = np.array(rope_frequencies(config.head_dim, config.rope_theta))
    scaled = rope_frequencies(config.head_dim, config.rope_theta, scaling)
    factors: np.ndarray = plain / scaled
    return factors.astype(np.float32)


def _in_keys(scaling: RopeScaling) -> bool:
    """Whether llama.cpp computes a scaling from its keys."""
    if isinstance(scaling, YarnScaling):
        plain = YarnScaling(scaling.factor, scaling.original_max_position_embeddings, 1.0)
        return replace(scaling, attention_factor=1.0) == plain
    return isinstance(scaling, LinearScaling)


def scaling_metadata(config: ModelConfig, arch: str) -> Json:
    """The entries of a network's scaling."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    prefix = f"{arch}.rope.scaling."
    entries: Json = {}
    implied = 1.0
    if not _in_keys(scaling):
        entries[OWN_KEY] = json.dumps(write_scaling(scaling))
    elif isinstance(scaling, YarnScaling):
        entries[prefix + "type"] = "yarn"
        entries[prefix + "factor"] = np.float32(scaling.factor)
        original = scaling.original_max_position_embeddings
        entries[prefix + "original_context_length"] = np.uint32(original)
        implied = yarn_attention_factor(scaling.factor)
    else:
        entries[prefix + "type"] = "linear"
        entries[prefix + "factor"] = np.float32(scaling.factor)
    if scaling.attention_factor != implied:
        entries[prefix + "attn_factor"] = np.float32(scaling.attention_factor / implied)
    return entries


def scaling_from_metadata(
    entries: Entries, shapes: Mapping[str, tuple[int, ...]]
) -> RopeScaling | None:
    """The scaling that a file describes. ``rope_freqs`` are applied to the frequencies where
    weights are loaded; only our own key says what they mean.

    Raises
    ------
    CheckpointError
        for a type that is not computed, a key that is not known, and values that make no
        sense.
    """
    _check_keys(entries)
    if OWN_KEY in entries.metadata and ROPE_FACTORS in shapes:
        return _from_own_key(entries)
    kind = entries.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{entries.where}: RoPE scaling {kind!r:.40} is not supported; supported are none, "
            "linear, yarn"
        )
    key = "rope.scaling.factor"
    if not entries.has(key):
        key = "rope.scale_linear"  # its old name
    factor = entries.number(key, 1.0) or 1.0
    if not 0 < factor < np.inf:
        raise CheckpointError(f"{entries.where}: {entries.arch}.{key} is {factor!r}, not positive")
    attention = entries.number("rope.scaling.attn_factor", 1.0)
    extension = entries.number("rope.scaling.yarn_ext_factor", -1.0)  # below 0: by the type
    if extension >= 0 and extension != (kind == "yarn"):
        raise CheckpointError(
            f"{entries.where}: {entries.arch}.rope.scaling.yarn_ext_factor {extension!r} is not "
            f"supported with the type {kind}"
        )
    if kind == "yarn":
        return _yarn(entries, factor, attention)
    if kind == "none":
        factor = 1.0
    if factor == 1 and attention == 1:
        return None
    return LinearScaling(factor, attention)


def _yarn(entries: Entries, factor: float, attention: float) -> YarnScaling:
    """YaRN from its keys."""
    original = entries.integer("rope.scaling.original_context_length", 0)
    mscale_all_dim = entries.number("rope.scaling.yarn_log_multiplier", 0.0)
    implied = yarn_attention_factor(factor, 1.0, mscale_all_dim)
    return YarnScaling(
        factor,
        original or entries.integer("context_length"),
        attention * entries.number("rope.scaling.yarn_attn_factor", implied),
        entries.number("rope.scaling.yarn_beta_fast", 32.0),
        entries.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def _from_own_key(entries: Entries) -> RopeScaling | None:
    """The scaling in our own key, which the file's ``rope_freqs`` were computed from."""
    text = entries.metadata[OWN_KEY]
    try:
        entry = json.loads(text) if isinstance(text, str) else None
        if not isinstance(entry, dict) or not entry:
            raise UnsupportedModel("it must be a JSON object")
        return read_rope({"rope_scaling": entry})[1]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{entries.where}: the entry {OWN_KEY} is wrong: {error}") from error


def _check_keys(entries: Entries) -> None:
    """CheckpointError for keys of RoPE that would change the output if they were ignored."""
    prefix = f"{entries.arch}.rope."
    metadata: JsonView = entries.metadata
    for name in metadata:
        key = name.removeprefix(prefix)
        if key == name:
            continue
        part = key.removeprefix("scaling.")
        if part != key and part not in _KNOWN:
            raise CheckpointError(f"{entries.where}: the entry {name:.80} is not supported")
        if key == "dimension_sections":
            raise CheckpointError(
                f"{entries.where}: RoPE in sections ({name:.80}) is not supported"
            )
