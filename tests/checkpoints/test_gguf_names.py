"""A network's configuration as GGUF metadata: written, read back, and rejected entry by
entry.
"""

from __future__ import annotations

import numpy as np
import pytest

from networks import LLAMA3, NETWORKS
from refllm.checkpoints.gguf_names import (
    config_from_metadata,
    config_metadata,
    gguf_name,
)
from refllm.checkpoints.gguf_rope import ROPE_FACTORS, rope_factors
from refllm.checkpoints.tensor_files import CheckpointError, tensor_shapes
from refllm.model.config import ModelConfig

CONFIG = ModelConfig(
    "llama", 300, 64, 96, 2, 4, 2, 20, 1e-5, 500.0, max_position_embeddings=77, bos_token_id=3
)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {gguf_name(name): shape for name, shape in tensor_shapes(config)}


def read(entries: dict[str, object] | None = None, config: ModelConfig = CONFIG) -> ModelConfig:
    """The configuration of a file whose entries are changed; None leaves one out."""
    metadata = config_metadata(config, "name") | (entries or {})
    known = {key: value for key, value in metadata.items() if value is not None}
    return config_from_metadata(known, shapes(config), "x.gguf")


def test_the_entries_have_the_names_and_types_of_the_specification():
    expected = {
        "general.architecture": "llama",
        "general.name": "name",
        "llama.vocab_size": np.uint32(300),
        "llama.context_length": np.uint32(77),
        "llama.embedding_length": np.uint32(64),
        "llama.block_count": np.uint32(2),
        "llama.feed_forward_length": np.uint32(96),
        "llama.attention.head_count": np.uint32(4),
        "llama.attention.head_count_kv": np.uint32(2),
        "llama.attention.key_length": np.uint32(20),
        "llama.attention.value_length": np.uint32(20),
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "llama.rope.dimension_count": np.uint32(20),
        "llama.rope.freq_base": np.float32(500),
    }
    written = config_metadata(CONFIG, "name")
    assert written == expected
    assert all(type(written[key]) is type(value) for key, value in expected.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_comes_back_but_for_the_tokens(name):
    config = NETWORKS[name]
    known = shapes(config)
    if rope_factors(config) is not None:
        known[ROPE_FACTORS] = (config.head_dim // 2,)
    back = config_from_metadata(config_metadata(config, "x"), known, "x.gguf")
    assert back.bos_token_id is None
    assert back.eos_token_ids == ()
    family = config.family
    if family == "mistral" and config.sliding_window is None:
        family = "llama"  # GGUF has no other word for it
    assert back.to_hf() | {"eos_token_id": 0, "bos_token_id": 0} == ModelConfig(
        **vars(config) | {"family": family}
    ).to_hf() | {"eos_token_id": 0, "bos_token_id": 0}


def test_epsilon_is_the_shortest_decimal_that_the_file_means():
    assert read().rms_norm_eps == 1e-5  # and not 9.99999974e-06
    assert read({"llama.rope.freq_base": np.float32(1e6)}).rope_theta == 1e6


def test_entries_that_may_be_missing():
    assert read({"llama.rope.freq_base": None}).rope_theta == 10_000.0
    assert read({"llama.attention.head_count_kv": None}).num_key_value_heads == 4
    widths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    assert read({f"llama.{key}": None for key in widths}).head_dim == 16  # 64 / 4
    assert read({"llama.vocab_size": None}).vocab_size == 300  # from the embedding's shape
    assert read({"llama.rope.dimension_count": None}) == read({"llama.attention.causal": True})
    assert read({"llama.expert_count": np.uint32(0)}) == read({"llama.attention.causal": np.True_})


def test_one_value_per_layer_is_read_if_all_are_equal():
    heads = np.array([2, 2], dtype=np.uint32)
    assert read({"llama.attention.head_count_kv": heads}).num_key_value_heads == 2
    for values in ([2, 4], []):
        different = np.array(values, dtype=np.uint32)
        with pytest.raises(CheckpointError, match="not an integer"):
            read({"llama.attention.head_count_kv": different})


def test_a_window_makes_a_mistral_and_zero_means_none():
    window = read({"llama.attention.sliding_window": np.uint32(7)})
    assert (window.family, window.sliding_window) == ("mistral", 7)
    none = read({"llama.attention.sliding_window": np.uint32(0)})
    assert (none.family, none.sliding_window) == ("llama", None)
    qwen = NETWORKS["qwen2"]
    other = read({"qwen2.attention.sliding_window": np.uint32(7)}, qwen)  # off in these files
    assert (other.family, other.sliding_window) == ("qwen2", None)


def test_tokens_of_the_end():
    both = read(
        {
            "tokenizer.ggml.bos_token_id": np.uint32(1),
            "tokenizer.ggml.eos_token_id": np.uint32(9),
            "tokenizer.ggml.eot_token_id": np.uint32(5),
        }
    )
    assert (both.bos_token_id, both.eos_token_ids) == (1, (9, 5))
    same = {f"tokenizer.ggml.{key}_token_id": np.uint32(5) for key in ("eos", "eot")}
    assert read(same).eos_token_ids == (5,)


@pytest.mark.parametrize("value", [True, np.True_, "5", np.float32(5), [5], -1, np.int32(-1)])
@pytest.mark.parametrize("key", ["bos", "eos", "eot", "eom"])
def test_a_token_id_of_another_type_is_rejected(value, key):
    """True would be token 1."""
    entry = f"tokenizer.ggml.{key}_token_id"
    with pytest.raises(CheckpointError, match=f"the entry {entry} is .*, not a token id"):
        read({entry: value})


def test_a_scaling_without_its_factors_is_not_the_networks():
    """The file's own factors decide; our entry alone would change the rotation."""
    config = NETWORKS["llama3-rope"]
    metadata = config_metadata(config, "x")
    found = config_from_metadata(metadata, shapes(config) | {ROPE_FACTORS: (5,)}, "x.gguf")
    assert found.rope_scaling == LLAMA3
    assert config_from_metadata(metadata, shapes(config), "x.gguf").rope_scaling is None


def test_factors_slow_long_wavelengths_and_keep_short_ones():
    assert rope_factors(CONFIG) is None
    factors = rope_factors(NETWORKS["llama3-rope"])
    assert factors.dtype == np.float32
    assert factors.shape == (5,)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert (np.diff(factors) >= 0).all()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"general.architecture": None}, "general.architecture is None"),
        ({"general.architecture": np.uint32(1)}, "supported are llama, qwen2, qwen3"),
        ({"llama.block_count": np.float32(2)}, "llama.block_count is np.float32"),
        ({"llama.block_count": np.True_}, "llama.block_count is np.True_, not an integer"),
        ({"llama.block_count": np.uint32(0)}, "num_hidden_layers must be a positive integer"),
        ({"llama.attention.head_count": np.uint32(0)}, "num_attention_heads must be a positive"),
        ({"llama.rope.freq_base": "500"}, "llama.rope.freq_base is '500', not a number"),
        ({"llama.rope.freq_base": np.True_}, "not a number"),
        ({"llama.rope.freq_base": np.float32(-1)}, "rope_theta must be positive"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing$"),
        ({"llama.rope.scaling.type": "su"}, "RoPE scaling 'su' is not supported"),
        ({"llama.rope.scaling.factor": np.float32(-2)}, "scaling.factor is -2.0, not positive"),
        ({"llama.rope.dimension_count": np.uint32(10)}, "dimension_count is 10, and a head has 20"),
        ({"llama.attention.value_length": np.uint32(10)}, "value_length is 10, and key_length 20"),
        ({"llama.attention.causal": np.False_}, "only causal attention is supported"),
        ({"llama.attention.causal": np.uint32(1)}, "only causal attention is supported"),
        ({"llama.attention.sliding_window_pattern": np.uint32(2)}, "window in some layers only"),
        ({"llama.expert_count": np.uint32(8)}, "a mixture of experts .* experts are not computed"),
    ],
)
def test_entries_that_make_no_sense_are_named(entries, message):
    with pytest.raises(CheckpointError, match=message):
        read(entries)


def test_a_scaling_of_the_type_none_is_none():
    assert read({"llama.rope.scaling.type": "none"}).rope_theta == 500.0
