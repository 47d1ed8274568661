"""Names, row order and configuration of a network in GGUF and in Hugging Face's format.

| GGUF                            | Hugging Face                                             |
|---------------------------------|----------------------------------------------------------|
| token_embd, output_norm, output | model.embed_tokens, model.norm, lm_head                  |
| blk.N.attn_q, _k, _v, _output   | model.layers.N.self_attn.q_proj, k_proj, v_proj, o_proj  |
| blk.N.ffn_gate, _up, _down      | model.layers.N.mlp.gate_proj, up_proj, down_proj         |
| blk.N.attn_norm, ffn_norm       | model.layers.N.input_layernorm, post_attention_layernorm |
| blk.N.attn_q_norm, _k_norm      | model.layers.N.self_attn.q_norm, k_norm                  |
| rope_freqs                      | none: a RoPE scaling as one factor per pair              |

Architecture "llama" (Llama, Mistral) rotates neighbouring pairs, while Hugging Face's code
pairs the halves of a head. So the rows of q and k have another order: row (h, i, s) in GGUF
is row (h, s, i) in Hugging Face, with s the half and i the pair. Qwen's architectures rotate
halves in both formats and keep their rows.

Source: the GGUF specification's keys and llama.cpp's converter.

``gguf_rope`` reads and writes RoPE's scaling.

Left out: experts, rotation of a part of the head, value heads of another width than the keys',
attention that is not causal, windows in some layers only: each is rejected by name. llama.cpp
ignores Mistral's sliding window; refllm alone reads the key.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refllm.array_types import Json, JsonView
from refllm.checkpoints.gguf_entries import Entries
from refllm.checkpoints.gguf_rope import scaling_from_metadata, scaling_metadata
from refllm.checkpoints.gguf_special_tokens import begin_and_ends
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.model.config import ModelConfig

__all__ = [
    "architecture",
    "config_from_metadata",
    "config_metadata",
    "gguf_name",
    "hf_name",
    "permutation",
]

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_PLAIN = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
_BACK = {short: long for long, short in (_PLAIN | _LAYER).items()}


def architecture(config: ModelConfig) -> str:
    """``general.architecture`` of a network."""
    return _ARCHITECTURES[config.family]


def gguf_name(name: str) -> str:
    """Hugging Face's name of a tensor → GGUF's.

    >>> gguf_name("model.layers.3.mlp.down_proj.weight")
    'blk.3.ffn_down.weight'
    """
    stem, _, suffix = name.rpartition(".")
    if stem in _PLAIN:
        return f"{_PLAIN[stem]}.{suffix}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[part]}.{suffix}"


def hf_name(name: str) -> str | None:
    """GGUF's name of a tensor → Hugging Face's; None for a name that no such network has.

    >>> hf_name("blk.3.ffn_down.weight"), hf_name("blk.3.ffn_gate_exps.weight")
    ('model.layers.3.mlp.down_proj.weight', None)
    """
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        layer, _, part = stem.removeprefix("blk.").partition(".")
        if layer.isdigit() and part in _BACK:
            return f"model.layers.{layer}.{_BACK[part]}.{suffix}"
        return None
    if stem in _PLAIN.values():
        return f"{_BACK[stem]}.{suffix}"
    return None


def permutation(config: ModelConfig, name: str) -> np.ndarray | None:
    """For each row of a GGUF tensor the row in Hugging Face's, by Hugging Face's ``name``;
    None if the order is the same.

    >>> config = ModelConfig("llama", 9, 6, 4, 1, 1, 1, head_dim=6)
    >>> permutation(config, "model.layers.0.self_attn.q_proj.weight").tolist()
    [0, 3, 1, 4, 2, 5]
    """
    part = name.split(".")[-2] if "." in name else name
    if architecture(config) != "llama" or part not in ("q_proj", "k_proj"):
        return None
    if part == "q_proj":
        heads = config.num_attention_heads
    else:
        heads = config.num_key_value_heads
    rows = np.arange(heads * config.head_dim).reshape(heads, 2, config.head_dim // 2)
    order: np.ndarray = rows.swapaxes(1, 2).reshape(-1)  # (h, s, i) → (h, i, s)
    return order


def config_metadata(config: ModelConfig, name: str) -> Json:
    """The entries that describe the network; ``name`` is ``general.name``."""
    arch = architecture(config)
    u32 = np.uint32
    entries: Json = {
        "general.architecture": arch,
        "general.name": name,
        f"{arch}.vocab_size": u32(config.vocab_size),
        f"{arch}.context_length": u32(config.max_position_embeddings),
        f"{arch}.embedding_length": u32(config.hidden_size),
        f"{arch}.block_count": u32(config.num_hidden_layers),
        f"{arch}.feed_forward_length": u32(config.intermediate_size),
        f"{arch}.attention.head_count": u32(config.num_attention_heads),
        f"{arch}.attention.head_count_kv": u32(config.num_key_value_heads),
        f"{arch}.attention.key_length": u32(config.head_dim),
        f"{arch}.attention.value_length": u32(config.head_dim),
        f"{arch}.attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        f"{arch}.rope.dimension_count": u32(config.head_dim),
        f"{arch}.rope.freq_base": np.float32(config.rope_theta),
    }
    if config.sliding_window is not None:
        entries[f"{arch}.attention.sliding_window"] = u32(config.sliding_window)
    return entries | scaling_metadata(config, arch)


def config_from_metadata(
    metadata: JsonView, shapes: Mapping[str, tuple[int, ...]], where: str
) -> ModelConfig:
    """The network that a file describes; ``shapes`` are those of its tensors, by name.

    Raises
    ------
    CheckpointError
        naming the entry that is missing or makes no sense.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _ARCHITECTURES.values():
        if isinstance(arch, str) and (arch.endswith("moe") or f"{arch}.expert_count" in metadata):
            raise CheckpointError(
                f"{where}: general.architecture is {arch!r:.60}, a mixture of experts: experts are "
                "not computed here"
            )
        known = ", ".join(sorted(set(_ARCHITECTURES.values())))
        raise CheckpointError(
            f"{where}: general.architecture is {arch!r:.60}; supported are {known}"
        )
    entries = Entries(metadata, arch, where)
    window = entries.integer("attention.sliding_window", 0) or None
    width = entries.integer("embedding_length")
    heads = entries.integer("attention.head_count")
    head_dim = entries.integer("attention.key_length", width // max(1, heads))
    _check_supported(entries, head_dim)
    begin, ends = begin_and_ends(metadata, where)
    family = arch
    if window and arch == "llama":
        family = "mistral"
    try:
        return ModelConfig(
            family=family,
            vocab_size=shapes.get("token_embd.weight", (0,))[0],
            hidden_size=width,
            intermediate_size=entries.integer("feed_forward_length"),
            num_hidden_layers=entries.integer("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=entries.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=entries.number("attention.layer_norm_rms_epsilon"),
            rope_theta=entries.number("rope.freq_base", 10_000.0),
            rope_scaling=scaling_from_metadata(entries, shapes),
            tie_word_embeddings="output.weight" not in shapes,
            attention_bias=arch == "qwen2",
            qk_norm=arch == "qwen3",
            sliding_window=window if arch == "llama" else None,
            max_position_embeddings=entries.integer("context_length"),
            bos_token_id=begin,
            eos_token_ids=ends,
        )
    except CheckpointError:  # names the file already
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _check_supported(entries: Entries, head_dim: int) -> None:
    """CheckpointError for what the file's network computes and refllm does not."""
    where = entries.where
    arch = entries.arch
    if entries.integer("expert_count", 0):
        raise CheckpointError(
            f"{where} is a mixture of experts ({arch}.expert_count): experts are not computed here"
        )
    rotated = entries.integer("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise CheckpointError(
            f"{where}: {arch}.rope.dimension_count is {rotated}, and a head has {head_dim} "
            "elements: RoPE over a part of the head is not supported"
        )
    values = entries.integer("attention.value_length", head_dim)
    if values != head_dim:
        raise CheckpointError(
            f"{where}: {arch}.attention.value_length is {values}, and key_length {head_dim}: "
            "heads of two widths are not supported"
        )
    if entries.has("attention.sliding_window_pattern"):
        raise CheckpointError(
            f"{where}: a sliding window in some layers only ({arch}.attention."
            "sliding_window_pattern) is not supported"
        )
    causal = entries.metadata.get(f"{arch}.attention.causal", True)
    if causal is not True and causal is not np.True_:
        raise CheckpointError(
            f"{where}: {arch}.attention.causal is {causal!s:.40}: only causal attention is "
            "supported"
        )
