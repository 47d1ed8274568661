"""Any value of a config.json may be anything: it is read, or ends in one sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refllm.checkpoints.loading import read_config
from refllm.checkpoints.quantization_files import read_quantization
from refllm.errors import InputError
from refllm.formats.layouts import WeightLayout
from refllm.formats.quantization_config import quantization_config
from refllm.model.config import ARCHITECTURES, ModelConfig
from refllm.model.rope import Llama3Scaling, YarnScaling

BASE = ModelConfig("llama", 300, 8, 8, 2, 2, 1, 4, rope_scaling=YarnScaling(4.0, 64, 1.0, 16.0))
LAYOUTS = (
    WeightLayout("gptq", 4, 32),
    WeightLayout("awq", 4, 32),
    WeightLayout("pack-quantized", 4, 32),
    WeightLayout("int-quantized", 8),
    WeightLayout("fp8", 8, 128),
    WeightLayout("float-quantized", 8),
)
MORE = ("layer_types", "use_sliding_window", "max_window_layers", "sliding_window", "hidden_act",
        "attention_bias", "mlp_bias", "partial_rotary_factor", "rope_parameters",
        "original_max_position_embeddings", "head_dim")  # fmt: skip
LLAMA3 = {"rope_type": "llama3", **vars(Llama3Scaling(8.0, 1.0, 4.0, 64))}
SCALINGS = (BASE.to_hf()["rope_scaling"], LLAMA3, {"type": "linear", "factor": 2.0})

leaves = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2, 4, 2**31, 10**400, 0.5, 1e-320, 1e308])
    | st.sampled_from([float("nan"), float("inf"), -1.0, 4.0])
    | st.sampled_from(["", "yarn", "linear", "llama3", "default", "gptq", "gemm", "full_attention"])
    | st.sampled_from(list(ARCHITECTURES))
)
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)


def paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys of an object and of the objects in it."""
    found = []
    for key, inner in value.items():
        found.append((*prefix, key))
        if isinstance(inner, dict):
            found += paths(inner, (*prefix, key))
    return found


def outcome(use: Callable[[Path], object], path: Path) -> str:
    """The sentence of the InputError; empty if there is none."""
    try:
        use(path)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.theorem(
    "Whatever the values of a config.json are, it is read or ends in an InputError of one line",
    source="malformed configs of published checkpoints",
)
@settings(max_examples=100)
@given(st.data())
def test_any_value_is_read_or_ends_in_one_sentence(tmp_path_factory, data):
    layout = data.draw(st.sampled_from(LAYOUTS))
    raw = copy.deepcopy(BASE.to_hf() | {"quantization_config": quantization_config(layout)})
    raw["architectures"] = [data.draw(st.sampled_from(list(ARCHITECTURES)))]
    raw["rope_scaling"] = dict(data.draw(st.sampled_from(SCALINGS)))
    places = st.sampled_from([*paths(raw), *((key,) for key in MORE)])
    for place in data.draw(st.lists(places, min_size=1, max_size=3, unique=True)):
        at: Any = raw
        for key in place[:-1]:
            at = at.get(key) if isinstance(at, dict) else None
        if isinstance(at, dict):
            at[place[-1]] = data.draw(anything)
    directory = tmp_path_factory.mktemp("m")
    (directory / "config.json").write_text(json.dumps(raw))
    for use in (read_config, read_quantization):
        sentence = outcome(use, directory)
        assert "\n" not in sentence
        assert sentence.count(str(directory)) == (sentence != "")
