"""``ModelConfig``: round trips, every rejection, and the values that transformers'
configuration classes read.
"""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given

from conftest import oracle
from refllm.model.config import ARCHITECTURES, ModelConfig, UnsupportedModel
from refllm.model.rope_config import write_scaling
from strategies import model_configs

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.25,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "truncate": False,
}
CLASSES = {
    "LlamaForCausalLM": "LlamaConfig",
    "MistralForCausalLM": "MistralConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen3ForCausalLM": "Qwen3Config",
}


def raw(architecture: str = "LlamaForCausalLM", **changes: object) -> dict[str, object]:
    """A small, complete config.json; a change to ``...`` removes the key."""
    base: dict[str, object] = {
        "architectures": [architecture],
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "bos_token_id": 3,
        "eos_token_id": 4,
    } | changes
    return {key: value for key, value in base.items() if value is not ...}


@given(model_configs())
def test_reading_what_was_written_gives_the_same_record(config):
    assert ModelConfig.from_hf(config.to_hf()) == config
    # through the file's text
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("ends", [(), (7,), (7, 9)])
def test_end_tokens_round_trip_as_none_one_id_or_list(ends):
    config = ModelConfig("llama", 97, 48, 80, 3, 6, 2, 8, bos_token_id=None, eos_token_ids=ends)
    assert config.to_hf()["eos_token_id"] == {0: None, 1: 7, 2: [7, 9]}[len(ends)]
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_the_five_switches_are_set_by_the_family():
    read = {name: ModelConfig.from_hf(raw(name, sliding_window=16)) for name in ARCHITECTURES}
    assert {name: (c.attention_bias, c.qk_norm, c.sliding_window) for name, c in read.items()} == {
        "LlamaForCausalLM": (False, False, None),
        "MistralForCausalLM": (False, False, 16),
        "Qwen2ForCausalLM": (True, False, None),
        "Qwen3ForCausalLM": (False, True, None),
    }


def test_a_null_is_not_a_missing_entry():
    assert (
        ModelConfig.from_hf(raw("MistralForCausalLM", sliding_window=None)).sliding_window is None
    )
    assert ModelConfig.from_hf(raw("MistralForCausalLM", sliding_window=...)).sliding_window == 4096
    assert (
        ModelConfig.from_hf(raw(num_key_value_heads=None, head_dim=None)).num_key_value_heads == 6
    )
    assert ModelConfig.from_hf(raw(eos_token_id=None)).eos_token_ids == ()
    assert ModelConfig.from_hf(raw(eos_token_id=...)).eos_token_ids == (2,)


REJECTED = {
    "no architectures": (raw() | {"architectures": None}, "no 'architectures'"),
    "architectures is a word": (
        raw() | {"architectures": "LlamaForCausalLM"},
        "no 'architectures'",
    ),
    "architecture in a list of its own": (
        raw(architectures=[["LlamaForCausalLM"]]),
        "is not supported; supported",
    ),
    "unknown architecture": (
        raw("GPT2LMHeadModel"),
        "'GPT2LMHeadModel' is not supported; supported are LlamaFor",
    ),
    "size missing": (raw(hidden_size=...), "'hidden_size' is missing"),
    "vocabulary missing": (raw(vocab_size=...), "'vocab_size' is missing"),
    "size null": (raw(intermediate_size=None), "'intermediate_size' is missing"),
    "size is a word": (raw(hidden_size="48"), "hidden_size must be a number"),
    "size is true": (raw(vocab_size=True), "vocab_size must be a number"),
    "size broken": (raw(num_hidden_layers=2.5), "num_hidden_layers must be an integer"),
    "size infinite": (
        raw(num_hidden_layers=float("inf")),
        "num_hidden_layers must be an integer",
    ),
    "size zero": (raw(vocab_size=0), "vocab_size must be a positive integer"),
    "size negative": (raw(num_hidden_layers=-1), "num_hidden_layers must be a positive integer"),
    "no heads": (raw(num_attention_heads=0), "num_attention_heads must be a positive integer"),
    "heads do not divide": (raw(num_key_value_heads=4), "6 attention heads do not divide into 4"),
    "odd head": (raw(head_dim=7), "head_dim must be even"),
    "epsilon zero": (raw(rms_norm_eps=0), "rms_norm_eps must be positive"),
    "epsilon nan": (raw(rms_norm_eps=float("nan")), "rms_norm_eps must be positive"),
    "theta negative": (raw(rope_theta=-1.0), "rope_theta must be positive"),
    "theta beyond a float": (raw(rope_theta=10**400), "rope_theta is too large a number"),
    "theta's inverse beyond a float": (raw(rope_theta=1e-320), "rope_theta must be positive"),
    "theta is a word": (raw(rope_theta="1e4"), "rope_theta must be a number"),
    "MLP bias": (raw(mlp_bias=True), "biases are supported in qwen2"),
    "attention bias": (raw(attention_bias=True), "biases are supported in qwen2"),
    "not causal": (raw(is_causal=False), "is_causal is False: only causal attention"),
    "activation": (raw(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "window in qwen2": (
        raw("Qwen2ForCausalLM", use_sliding_window=True, max_window_layers=1),
        "2 of 3 layers attend through a sliding window: a window is supported in all layers of "
        "mistral only",
    ),
    "window in all of qwen2's layers": (
        raw("Qwen2ForCausalLM", use_sliding_window=True, max_window_layers=0),
        "3 of 3 layers attend through a sliding window",
    ),
    "window in llama": (raw(layer_types=["sliding_attention"] * 3), "3 of 3 layers attend"),
    "window without a width": (
        raw("MistralForCausalLM", sliding_window=None, layer_types=["sliding_attention"] * 3),
        "layer_types says 'sliding_attention', and sliding_window is missing",
    ),
    "kinds of too few layers": (
        raw(layer_types=["full_attention"] * 2),
        "layer_types describes 2 layers, and num_hidden_layers is 3",
    ),
    "an unknown kind of layer": (
        raw(layer_types=["chunked_attention"] * 3),
        "layer_types must be a list of 'full_attention' and 'sliding_attention'",
    ),
    "experts": (raw("MixtralForCausalLM"), "MixtralForCausalLM is a mixture of experts, which is"),
    "experts of qwen": (raw("Qwen3MoeForCausalLM"), "experts, which is not computed here"),
    "window in some layers": (
        raw(
            "Qwen3ForCausalLM",
            use_sliding_window=True,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        "1 of 3 layers attend through a sliding window",
    ),
    "windows in some of mistral's layers": (
        raw(
            "MistralForCausalLM",
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        "1 of 3 layers attend through a sliding window",
    ),
    "layer types no list": (raw(layer_types=5), "layer_types must be a list"),
    "window is true": (
        raw("MistralForCausalLM", sliding_window=True),
        "sliding_window must be a positive integer",
    ),
    "window zero": (
        raw("MistralForCausalLM", sliding_window=0),
        "sliding_window must be a positive integer or null",
    ),
    "window is a word": (
        raw("MistralForCausalLM", sliding_window="8"),
        "sliding_window must be a positive integer",
    ),
    "RoPE no object": (raw(rope_scaling="yarn"), "RoPE's parameters must be one object"),
    "RoPE by kind of layer": (
        raw(rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 4.0}}),
        "RoPE's parameters must be one object for all layers",
    ),
    "RoPE of one kind of layer beside its own": (
        raw(rope_parameters={"rope_type": "default", "full_attention": {"rope_type": "yarn"}}),
        "RoPE's parameters must be one object for all layers",
    ),
    "partial RoPE": (raw(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "llama3 without factor": (
        raw(rope_scaling={k: v for k, v in LLAMA3.items() if k != "factor"}),
        "'factor' is missing",
    ),
    "llama3 with an empty band": (
        raw(rope_scaling=LLAMA3 | {"high_freq_factor": 1.0}),
        "llama3 RoPE scaling needs positive factors and low < high",
    ),
    "llama3 with factor zero": (
        raw(rope_scaling=LLAMA3 | {"factor": 0.0}),
        "llama3 RoPE scaling needs positive",
    ),
    "llama3 with a negative factor": (
        raw(rope_scaling=LLAMA3 | {"factor": -8.0}),
        "llama3 RoPE scaling needs positive",
    ),
    "llama3 with a low factor of zero": (
        raw(rope_scaling=LLAMA3 | {"low_freq_factor": 0.0}),
        "llama3 RoPE scaling needs positive",
    ),
    "llama3 with an infinite band": (
        raw(rope_scaling=LLAMA3 | {"high_freq_factor": float("inf")}),
        "llama3 RoPE scaling needs positive",
    ),
    "llama3 without a context": (
        raw(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 0}),
        "llama3 RoPE scaling needs positive",
    ),
    "end token is true": (
        raw(eos_token_id=True),
        "eos_token_id must be an integer or a list of them, got True",
    ),
    "an end token is true": (
        raw(eos_token_id=[2, True]),
        "eos_token_id must be an integer or a list of them, got [2, True]",
    ),
    "an end token of an object": (raw(eos_token_id={"id": 2}), "must be an integer or a list"),
    "end token beyond any vocabulary": (
        raw(eos_token_id=2**31),
        "eos_token_id must be token ids, got 2147483648",
    ),
    "beginning token is true": (
        raw(bos_token_id=True),
        "bos_token_id and eos_token_id must be token ids, got True",
    ),
    "end token is a word": (raw(eos_token_id="</s>"), "eos_token_id must be an integer or a list"),
    "end token below zero": (raw(eos_token_id=-1), "eos_token_id must be token ids, got -1"),
    "beginning token is a word": (
        raw(bos_token_id="1"),
        "bos_token_id and eos_token_id must be token ids, got '1'",
    ),
    "beginning token below zero": (
        raw(bos_token_id=-1),
        "must be token ids, got -1",
    ),  # the last row, to NumPy
    "tied is a word": (
        raw(tie_word_embeddings="false"),
        "tie_word_embeddings must be true or false, got 'false'",
    ),
    "no positions": (
        raw(max_position_embeddings=0),
        "max_position_embeddings must be a positive integer",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejects(case):
    values, message = REJECTED[case]
    with pytest.raises(UnsupportedModel) as error:
        ModelConfig.from_hf(values)
    assert message in str(error.value)


@pytest.mark.theorem(
    "layer_types decides over sliding_window, and both over nothing",
    source="transformers' AutoConfig, which reads a Mistral with layer_types as a Ministral",
)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_kinds_of_layers_decide_over_the_window(layers):
    def window(architecture, **changes):
        values = raw(architecture, num_hidden_layers=layers, sliding_window=9, **changes)
        return ModelConfig.from_hf(values).sliding_window

    full = ["full_attention"] * layers
    assert window("MistralForCausalLM") == 9
    assert window("MistralForCausalLM", layer_types=["sliding_attention"] * layers) == 9
    for architecture in ARCHITECTURES:
        assert window(architecture, layer_types=full) is None
    for architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert window(architecture, use_sliding_window=True, layer_types=full) is None
        assert window(architecture, use_sliding_window=True, max_window_layers=layers) is None
        assert window(architecture, use_sliding_window=True) is None  # from layer 28 on
        assert window(architecture, max_window_layers=0) is None  # it is off


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_layer_of_another_kind_is_rejected(at):
    kinds = ["full_attention"] * 3
    kinds[at] = "sliding_attention"
    for architecture in ("MistralForCausalLM", "Qwen3ForCausalLM"):
        with pytest.raises(UnsupportedModel, match="1 of 3 layers attend through"):
            ModelConfig.from_hf(raw(architecture, use_sliding_window=True, layer_types=kinds))


@pytest.mark.parametrize(("heads", "width"), [(1, 48), (2, 24), (6, 8)])
def test_the_width_of_a_head_is_the_quotient_where_it_is_missing(heads, width):
    values = raw(num_attention_heads=heads, num_key_value_heads=1, head_dim=...)
    assert ModelConfig.from_hf(values).head_dim == width


def test_boundaries_that_are_accepted():
    """The largest token id, the smallest theta, one of everything."""
    config = ModelConfig.from_hf(raw(eos_token_id=[2**31 - 1, 0], bos_token_id=2**31 - 1))
    assert (config.bos_token_id, config.eos_token_ids) == (2**31 - 1, (2**31 - 1, 0))
    tiny = sys.float_info.min
    assert ModelConfig.from_hf(raw(rope_theta=tiny)).rope_theta == tiny
    least = ModelConfig("mistral", 1, 1, 1, 1, 1, 1, 2, sliding_window=1, max_position_embeddings=1)
    assert least.num_parameters == 1 + 1 * 2 * 4 + 3 + 2 + 1 + 1  # embedding, q k v o, MLP, norms


SHAPES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
    "bos_token_id",
)


def agrees_with_transformers(ours: ModelConfig, theirs) -> None:
    for name in SHAPES:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == (
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    )
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    assert (ours.rope_scaling is None) == (rope["rope_type"] == "default")
    if ours.rope_scaling is not None:
        written = write_scaling(ours.rope_scaling)
        assert written == {key: rope[key] for key in written}
    window = theirs.sliding_window if theirs.model_type == "mistral" else None
    assert ours.sliding_window == window
    ends = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (
        [] if ends is None else ends if isinstance(ends, list) else [ends]
    )


def build(architecture: str, values: dict[str, object]):
    transformers = oracle("transformers")
    return getattr(transformers, CLASSES[architecture])(**values)


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("scaling", [None, LLAMA3, LINEAR, YARN], ids=str)
def test_oracle_every_spelling_of_transformers_is_read_alike(architecture, scaling):
    values = raw(architecture, **({} if scaling is None else {"rope_scaling": scaling}))
    theirs = build(architecture, values)
    for written in (
        theirs.to_dict(),
        json.loads(
            theirs.to_json_string(use_diff=True)
        ),  # what save_pretrained puts into config.json
        values,  # the flat keys of older versions
    ):
        agrees_with_transformers(ModelConfig.from_hf(written), theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", CLASSES)
def test_oracle_transformers_reads_what_we_write_alike(architecture):
    for scaling in (LLAMA3, LINEAR, YARN):
        values = raw(
            architecture, tie_word_embeddings=True, eos_token_id=[4, 5], rope_scaling=scaling
        )
        ours = ModelConfig.from_hf(values)
        agrees_with_transformers(ours, build(architecture, ours.to_hf()))


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize(
    "silent",
    [
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "bos_token_id",
        "eos_token_id",
        "sliding_window",
        "tie_word_embeddings",
    ],
)
def test_oracle_defaults_of_missing_entries_are_those_of_transformers(architecture, silent):
    # 64 heads of width 128, so that every default (8 or 32 key/value heads, head width 128)
    # fits
    values = raw(
        architecture,
        hidden_size=64 * 16,
        num_attention_heads=64,
        num_key_value_heads=32,
        head_dim=16,
    )
    if silent == "head_dim" and architecture in (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
    ):
        values["hidden_size"] = 64 * 24  # their default is the quotient
    values.pop(silent, None)
    agrees_with_transformers(ModelConfig.from_hf(values), build(architecture, values))


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("tied", [False, True])
def test_oracle_the_number_of_parameters_is_that_of_the_network_which_transformers_builds(
    architecture, tied
):
    torch = oracle("torch")
    transformers = oracle("transformers")
    values = raw(architecture, tie_word_embeddings=tied)
    with torch.device("meta"):  # shapes without memory
        network = getattr(transformers, architecture)(build(architecture, values))
    # A shared tensor counts once; ``parameters`` gives each tensor once.
    assert ModelConfig.from_hf(values).num_parameters == sum(
        p.numel() for p in network.parameters()
    )
