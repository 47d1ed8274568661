"""RoPE's scaling in GGUF metadata: every key, there and back, and llama.cpp's logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_data import llama_cpp_logits
from gguf_files import make
from networks import LLAMA3, NETWORKS, SIZES, TOKENS, full_logits
from refllm.checkpoints import gguf
from refllm.checkpoints.gguf_entries import Entries
from refllm.checkpoints.gguf_rope import (
    OWN_KEY,
    ROPE_FACTORS,
    rope_factors,
    scaling_from_metadata,
    scaling_metadata,
)
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.model.config import ModelConfig
from refllm.model.rope import (
    LinearScaling,
    YarnScaling,
    rope_frequencies,
    yarn_attention_factor,
)

PREFIX = "llama.rope."
CONTEXT = 256
KEYS = {  # 32-bit values, as converters write them
    "factor": np.float32,
    "attn_factor": np.float32,
    "original_context_length": np.uint32,
    "yarn_beta_fast": np.float32,
    "yarn_beta_slow": np.float32,
    "yarn_attn_factor": np.float32,
    "yarn_ext_factor": np.float32,
    "yarn_log_multiplier": np.float32,
}


def read(entries: dict[str, object], shapes: dict[str, tuple[int, ...]] | None = None):
    """The scaling of a file with these entries."""
    metadata = {"llama.context_length": np.uint32(CONTEXT)} | entries
    return scaling_from_metadata(Entries(metadata, "llama", "x.gguf"), shapes or {})


def scaled(type: str | None = None, **values: float):
    """The scaling of a file with these keys after ``rope.scaling.``"""
    entries: dict[str, object] = {} if type is None else {PREFIX + "scaling.type": type}
    for key, value in values.items():
        entries[f"{PREFIX}scaling.{key}"] = KEYS[key](value)
    return read(entries)


@pytest.mark.theorem(
    "A factor without a type is linear, by its old key too; a factor of 1 is none; attn_factor "
    "counts for every type",
    source="llama.cpp's load_hparams",
)
def test_linear_in_every_spelling():
    assert scaled("linear", factor=4) == LinearScaling(4.0)
    assert scaled(factor=4) == LinearScaling(4.0)
    assert read({PREFIX + "scale_linear": np.float32(4)}) == LinearScaling(4.0)
    both = {PREFIX + "scale_linear": np.float32(4), PREFIX + "scaling.factor": np.float32(2)}
    assert read(both) == LinearScaling(2.0)  # the newer key wins
    assert scaled("none", factor=4) is None
    assert [scaled(), scaled("linear"), scaled(factor=1), scaled("linear", factor=1)] == [None] * 4
    assert read({PREFIX + "scaling.finetuned": np.True_}) is None
    # llama.cpp's "unscaled" is a factor of 0, by either key and for any type
    assert [scaled(factor=0), scaled("linear", factor=0), scaled("none", factor=0)] == [None] * 3
    assert scaled("yarn", factor=0) == scaled("yarn", factor=1)
    zero = {PREFIX + "scale_linear": np.float32(4), PREFIX + "scaling.factor": np.float32(0)}
    assert read(zero) is None
    assert read({PREFIX + "scale_linear": np.float32(0)}) is None
    assert scaled(attn_factor=0.5) == LinearScaling(1.0, 0.5)
    assert scaled("none", factor=4, attn_factor=0.5) == LinearScaling(1.0, 0.5)
    assert scaled(factor=4, attn_factor=0.5) == LinearScaling(4.0, 0.5)
    assert scaled("linear", factor=4, yarn_ext_factor=0) == LinearScaling(4.0)


def test_yarn_with_every_key():
    implied = yarn_attention_factor(4.0)
    plain = YarnScaling(4.0, 64, implied)
    assert scaled("yarn", factor=4, original_context_length=64) == plain
    whole = replace(plain, original_max_position_embeddings=CONTEXT)
    assert scaled("yarn", factor=4) == whole
    assert scaled("yarn", factor=4, original_context_length=0) == whole

    def changed(**values: float) -> YarnScaling:
        return scaled("yarn", factor=4, original_context_length=64, **values)

    assert changed(yarn_beta_fast=16, yarn_beta_slow=2) == replace(
        plain, beta_fast=16.0, beta_slow=2.0
    )
    assert changed(attn_factor=0.5) == replace(plain, attention_factor=0.5 * implied)
    assert changed(yarn_attn_factor=1.5) == replace(plain, attention_factor=1.5)
    assert changed(yarn_attn_factor=1.5, attn_factor=0.5).attention_factor == 0.75
    log = changed(yarn_log_multiplier=0.5)
    assert log.attention_factor == pytest.approx(implied / (0.05 * np.log(4) + 1), rel=1e-14)
    assert changed(yarn_ext_factor=1) == changed(yarn_ext_factor=-1) == plain


CONFIG = NETWORKS["llama"]


@pytest.mark.theorem("What is written is read back, whatever the scaling", source="GGUF")
@given(
    st.sampled_from(["llama", "qwen3"]),
    st.integers(2, 64),
    st.sampled_from([None, 1.0, 1.25, 0.5]),
    st.sampled_from([(32.0, 1.0), (16.0, 2.0)]),
    st.booleans(),
)
def test_round_trip(arch, factor, attention, betas, truncate):
    implied = yarn_attention_factor(float(factor))
    scalings = [
        LLAMA3,
        LinearScaling(float(factor), attention or 1.0),
        YarnScaling(float(factor), 4096, attention or implied, *betas, truncate),
    ]
    for scaling in scalings:
        config = replace(CONFIG, rope_scaling=scaling)
        entries = scaling_metadata(config, arch)
        shapes = {ROPE_FACTORS: (5,)} if rope_factors(config) is not None else {}
        found = scaling_from_metadata(
            Entries({f"{arch}.context_length": np.uint32(8), **entries}, arch, "x"), shapes
        )
        assert type(found) is type(scaling)
        # in float32, if it is not what the factor implies
        assert found.attention_factor == pytest.approx(scaling.attention_factor, rel=2**-22)
        if not isinstance(scaling, type(LLAMA3)):
            found = replace(found, attention_factor=scaling.attention_factor)
        assert found == scaling
    assert scaling_metadata(CONFIG, arch) == {}


def test_llama_cpps_own_keys_are_written_where_they_suffice():
    """Otherwise the frequencies themselves, which llama.cpp uses whatever made them."""
    plain = YarnScaling(4.0, 64, yarn_attention_factor(4.0))
    expected = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": np.float32(4),
        "llama.rope.scaling.original_context_length": np.uint32(64),
    }
    for scaling, more in (
        (plain, {}),
        (replace(plain, attention_factor=1.0), {"llama.rope.scaling.attn_factor"}),
    ):
        config = replace(CONFIG, rope_scaling=scaling)
        written = scaling_metadata(config, "llama")
        assert {key: written[key] for key in expected} == expected
        assert set(written) == {*expected, *more}
        assert rope_factors(config) is None
    for change in ({"beta_fast": 16.0}, {"beta_slow": 2.0}, {"truncate": False}):
        config = replace(CONFIG, rope_scaling=replace(plain, **change))
        written = scaling_metadata(config, "llama")
        assert set(written) == {OWN_KEY, "llama.rope.scaling.attn_factor"}
        frequencies = np.array(rope_frequencies(10, config.rope_theta)) / rope_factors(config)
        np.testing.assert_allclose(
            frequencies, rope_frequencies(10, config.rope_theta, config.rope_scaling), rtol=2**-23
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("factor", value) for value in (-4.0, float("nan"), float("inf"))),
        *(("attn_factor", value) for value in (0.0, -4.0, float("nan"), float("inf"))),
    ],
)
@pytest.mark.parametrize("type", ["linear", "yarn", None])
def test_factors_that_make_no_sense_are_rejected(type, key, value):
    with pytest.raises(ValueError, match=f"{key} is|attention_factor is"):
        scaled(type, **{key: value})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"scaling.type": "longrope"}, "RoPE scaling 'longrope' is not supported; supported are"),
        ({"scaling.type": "dynamic"}, "RoPE scaling 'dynamic' is not supported"),
        ({"scaling.type": np.uint32(1)}, "scaling.type is np.uint32(1), not a string"),
        ({"scaling.factor": "4"}, "llama.rope.scaling.factor is '4', not a number"),
        ({"scale_linear": np.True_}, "llama.rope.scale_linear is np.True_, not a number"),
        ({"scale_linear": np.float32(-1)}, "llama.rope.scale_linear is -1.0, not positive"),
        ({"scaling.factor": np.zeros(2)}, "not a number"),
        ({"scaling.alpha": np.float32(8)}, "the entry llama.rope.scaling.alpha is not supported"),
        ({"dimension_sections": np.zeros(4)}, "RoPE in sections"),
        ({"scaling.yarn_ext_factor": np.float32(1)}, "yarn_ext_factor 1.0 is not supported with"),
        (
            {"scaling.type": "yarn", "scaling.yarn_ext_factor": np.float32(0.5)},
            "yarn_ext_factor 0.5 is not supported with the type yarn",
        ),
        (
            {"scaling.type": "yarn", "scaling.yarn_ext_factor": np.float32(0)},
            "yarn_ext_factor 0.0 is not supported with the type yarn",
        ),
    ],
)
def test_rejects(entries, message):
    with pytest.raises(CheckpointError) as error:
        read({PREFIX + key: value for key, value in entries.items()})
    assert message in str(error.value)


@pytest.mark.parametrize("value", ["{", "[]", '{"type": "dynamic"}', "[" * 99999, np.zeros(4)])
def test_a_damaged_entry_of_our_own_is_named(value):
    with pytest.raises(CheckpointError, match=r"x\.gguf: the entry refllm.rope_scaling is wrong"):
        read({OWN_KEY: value}, {ROPE_FACTORS: (5,)})
    assert read({OWN_KEY: value}) is None  # the file's own factors decide


# --- files --------------------------------------------------------------------------------

ROPE_KEYS = {
    "old key": {PREFIX + "scale_linear": np.float32(4)},
    "factor alone": {PREFIX + "scaling.factor": np.float32(4)},
    "attn_factor": {PREFIX + "scaling.attn_factor": np.float32(0.5)},
    "linear": {PREFIX + "scaling.type": "linear", PREFIX + "scaling.factor": np.float32(2.5)},
    "none": {PREFIX + "scaling.type": "none", PREFIX + "scaling.factor": np.float32(2.5)},
    "linear, attn_factor": {
        PREFIX + "scaling.factor": np.float32(2.5),
        PREFIX + "scaling.attn_factor": np.float32(0.75),
    },
    "yarn": {
        PREFIX + "scaling.type": "yarn",
        PREFIX + "scaling.factor": np.float32(4),
        PREFIX + "scaling.original_context_length": np.uint32(64),
    },
    "yarn of the whole context": {
        PREFIX + "scaling.type": "yarn",
        PREFIX + "scaling.factor": np.float32(4),
        PREFIX + "scaling.attn_factor": np.float32(0.75),
    },
}
FACTORS = np.array([1, 1, 1.5, 2, 3, 4, 5, 6], dtype=np.float32)


@pytest.mark.parametrize("name", ROPE_KEYS)
@pytest.mark.parametrize("factors", [False, True])
def test_factors_of_the_file_divide_what_the_keys_scale(name, factors, tmp_path):
    extra = {ROPE_FACTORS: FACTORS} if factors else None
    config = ModelConfig("llama", **SIZES, head_dim=16, rope_theta=500.0)
    path = make(tmp_path / "x.gguf", config, metadata=ROPE_KEYS[name], extra=extra)
    found, weights, *_ = gguf.load(path, np, "float64")
    expected = np.array(rope_frequencies(16, 500.0, found.rope_scaling))
    if factors:
        expected /= FACTORS
    np.testing.assert_allclose(weights["rope_frequencies"], expected, rtol=1e-15)


@pytest.mark.llamacpp
@pytest.mark.theorem(
    "Logits of a file with any of llama.cpp's RoPE keys are llama.cpp's, |Δ| ≤ 3e-4 · max|logit|",
    source="llama.cpp",
)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("name", ROPE_KEYS)
def test_llama_cpp_computes_the_same_logits(name, factors, tmp_path):
    extra = {ROPE_FACTORS: FACTORS} if factors else None
    config = ModelConfig("llama", **SIZES, head_dim=16, rope_theta=500.0, bos_token_id=0)
    path = make(tmp_path / "x.gguf", config, metadata=ROPE_KEYS[name], extra=extra)
    found, weights, *_ = gguf.load(path, np, "float32")
    ours = full_logits(weights, found)
    theirs = llama_cpp_logits(path, list(TOKENS))
    assert np.abs(ours - theirs).max() <= 3e-4 * np.abs(ours).max()
    if name != "none":  # the bound is far below what the keys do to the logits
        _, weights, *_ = gguf.load(make(tmp_path / "y.gguf", config), np, "float32")
        assert np.abs(full_logits(weights, config) - theirs).max() > 3e-3 * np.abs(theirs).max()
