"""RoPE's entries of a config.json: every spelling, what contradicts itself, what is rejected."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rope import yarns

from refllm.model.config import ModelConfig, UnsupportedModel
from refllm.model.rope import LinearScaling, Llama3Scaling, YarnScaling, yarn_attention_factor
from refllm.model.rope_config import flag, read_rope, write_scaling

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "llama3": (LLAMA3, Llama3Scaling(8.0, 1.0, 4.0, 64)),
    "linear": (LINEAR, LinearScaling(4.0)),
    "yarn": (YARN, YarnScaling(4.0, 64, yarn_attention_factor(4.0))),
}
PLAIN = {"rope_theta": 5e5, "max_position_embeddings": 256}


def read(**entries: object):
    """The scaling of a config.json with these entries."""
    return read_rope(PLAIN | entries)[1]


@pytest.mark.parametrize("kind_key", ["rope_type", "type"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_is_read_from_either_spelling(name, place, kind_key):
    entry, expected = SCALINGS[name]
    renamed = {key if key != "rope_type" else kind_key: value for key, value in entry.items()}
    assert read_rope(PLAIN | {place: renamed}) == (5e5, expected)
    both = {"rope_scaling": renamed, "rope_parameters": entry}
    assert read_rope(PLAIN | both) == (5e5, expected)


def test_the_base_in_rope_parameters_wins_over_the_flat_one():
    assert read_rope(PLAIN | {"rope_parameters": LLAMA3 | {"rope_theta": 7e3}})[0] == 7e3
    assert read_rope(PLAIN | {"rope_parameters": {"rope_theta": 7e3}}) == (7e3, None)
    assert read_rope({"max_position_embeddings": 8}) == (10_000.0, None)


@given(yarns())
def test_round_trip_of_yarn_with_every_option(scaling):
    assert read(rope_scaling=write_scaling(scaling)) == scaling


@given(st.floats(1.5, 64))
def test_round_trip_of_linear(factor):
    assert read(rope_scaling=write_scaling(LinearScaling(factor))) == LinearScaling(factor)


def test_what_readers_assume_is_not_written():
    assert write_scaling(SCALINGS["yarn"][1]) == YARN
    assert write_scaling(SCALINGS["linear"][1]) == LINEAR


def test_options_of_yarn():
    def yarn(**options: object) -> YarnScaling:
        return read(rope_scaling=YARN | options)

    assert yarn(attention_factor=1.5).attention_factor == 1.5
    both = yarn(mscale=0.5, mscale_all_dim=2.0).attention_factor
    assert both == pytest.approx((0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1), rel=1e-15)
    assert yarn(mscale=0.5).attention_factor == yarn().attention_factor  # one alone is none
    assert yarn(attention_factor=1.5, mscale=0.5, mscale_all_dim=2.0).attention_factor == 1.5
    assert (yarn(beta_fast=16, beta_slow=2).beta_fast, yarn(beta_slow=2).beta_slow) == (16.0, 2.0)
    assert yarn(beta_fast=0, beta_slow=None) == yarn()  # transformers takes 0 for missing
    assert [yarn(truncate=t).truncate for t in (True, False, None)] == [True, False, False]
    assert yarn(factor=None).factor == 4.0  # 256 / 64
    assert yarn(extrapolation_factor=1, attn_factor=1.0, finetuned=True) == yarn()


@pytest.mark.parametrize("name", ["yarn", "llama3"])
def test_the_context_of_training_has_three_places(name):
    entry = SCALINGS[name][0]
    silent = {k: v for k, v in entry.items() if k != "original_max_position_embeddings"}

    def context(**entries: object) -> int:
        return read(**entries).original_max_position_embeddings

    assert context(rope_scaling=entry) == 64
    assert context(rope_scaling=silent) == 256  # the whole context
    # beside the object it has the last word, as in transformers
    assert context(rope_scaling=entry, original_max_position_embeddings=32) == 32


@pytest.mark.parametrize(
    "entry",
    [{}, None, {"rope_type": "default"}, {"rope_type": "linear", "factor": 1}, {"type": None}],
)
def test_no_scaling(entry):
    assert read(rope_scaling=entry) is None


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "proportional", "", 5])
def test_other_kinds_are_rejected_by_name(kind):
    with pytest.raises(UnsupportedModel) as error:
        read(rope_scaling={"type": kind, "factor": 4.0})
    assert f"RoPE scaling {kind!r} is not supported; supported are 'default', 'linear'" in str(
        error.value
    )


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("factor", [0, 0.0, -4.0, math.nan, math.inf, -math.inf])
def test_factors_that_make_no_sense_are_rejected(name, factor):
    with pytest.raises(UnsupportedModel, match=f"{name} RoPE scaling needs positive factors"):
        read(rope_scaling=SCALINGS[name][0] | {"factor": factor})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rope_scaling": "yarn"}, "RoPE's parameters must be one object"),
        ({"rope_scaling": {"factor": 4.0}}, "RoPE has a factor 4.0 and no rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": {"type": "yarn"}}, "'factor' is missing"),
        ({"rope_scaling": LINEAR | {"factor": "4"}}, "factor must be a number, got '4'"),
        ({"rope_scaling": LINEAR | {"factor": True}}, "factor must be a number, got True"),
        ({"rope_scaling": LINEAR | {"attention_factor": 2.0}}, "linear RoPE scaling has no atten"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, "truncate must be true or false, got 'no'"),
        ({"rope_scaling": YARN | {"attn_factor": 2.0}}, "attn_factor 2.0 is not supported"),
        ({"rope_scaling": YARN | {"extrapolation_factor": 0.5}}, "extrapolation_factor 0.5 is not"),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor is -1.0"),
        (
            {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": -10 / math.log(4.0)}},
            "yarn RoPE scaling needs positive factors, and attention_factor is",
        ),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 6.5}}, "must be an integer"),
        ({"rope_scaling": LINEAR, "rope_parameters": YARN}, "contradict each other"),
        (
            {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 7.0}},
            "rope_scaling and rope_parameters contradict each other",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
    ],
)
def test_rejects(entries, message):
    with pytest.raises(UnsupportedModel) as error:
        read(**entries)
    assert message in str(error.value)


def test_a_flag_is_a_boolean_or_missing():
    assert [flag({"x": value}, "x") for value in (True, False, None)] == [True, False, False]
    for value in ("false", 1, 0.0, []):
        with pytest.raises(UnsupportedModel, match="x must be true or false"):
            flag({"x": value}, "x")


def test_an_attention_factor_of_linear_scaling_is_not_read_back():
    """GGUF alone can express it: what is written for the eye is rejected by readers."""
    config = ModelConfig("llama", 9, 8, 8, 1, 1, 1, 8, rope_scaling=LinearScaling(4.0, 0.5))
    written = config.to_hf()
    assert written["rope_scaling"]["attention_factor"] == 0.5
    with pytest.raises(UnsupportedModel, match="linear RoPE scaling has no attention_factor"):
        ModelConfig.from_hf(written)
