"""Exported checkpoints: what transformers and ``load`` make of them is the model that was
quantised.
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

from conftest import oracle
from exported_models import IDS, output, products_of, their_model
from networks import NETWORKS, VOCAB, random_tensors, tokenizer
from refllm.checkpoints.loading import load
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.writer import save
from refllm.formats.quantized_linear import QuantizedLinear
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS
from refllm.quant.export import default_layout, export, export_spec_for
from refllm.quant.recipe import quantize_model
from refllm.quant.taps import tapped

CONFIG = ModelConfig("llama", VOCAB, 64, 96, 2, 4, 2, 16, bos_token_id=0, eos_token_ids=(0,))


class Way(NamedTuple):
    """A method and a scheme, and the layout that they come out in."""

    method: str
    scheme: Scheme | None
    layout: str
    options: Any = MappingProxyType({})


W8A8_OPTIONS = {"rule": "half_integer", "scale_dtype": "float16"}  # what the layout can hold
WAYS = {
    "w4-g32": Way("rtn", Scheme(4, "half_integer", "group", 32), "pack-quantized"),
    "w4-channel": Way("gptq", Scheme(4, "half_integer", "channel"), "pack-quantized"),
    "w8-g16": Way("rtn", Scheme(8, "half_integer", "group", 16), "pack-quantized"),
    "w8-channel": Way("rtn", Scheme(8, "restricted", "channel"), "pack-quantized"),
    "w3-g32": Way("gptq", Scheme(3, "half_integer", "group", 32), "pack-quantized"),
    "w3-channel": Way("rtn", Scheme(3, "half_integer", "channel"), "pack-quantized"),
    "int8": Way("int8", None, "pack-quantized"),
    "w8a8": Way("smoothquant", None, "int-quantized", W8A8_OPTIONS),
    "w8a8-keep": Way("smoothquant", None, "int-quantized",
                     W8A8_OPTIONS | {"keep": ("down_proj", "o_proj")}),
    "gptq": Way("gptq", Scheme(4, "asymmetric", "group", 32), "gptq_v2"),
    "gptq-act-order": Way("gptq", Scheme(4, "half_integer", "group", 16), "gptq_v2",
                          {"act_order": True}),
    "gptq-3": Way("rtn", Scheme(3, "asymmetric", "group", 32), "gptq_v2"),
    "gptq-v1": Way("gptq", Scheme(4, "half_integer", "group", 32), "gptq"),
    "awq": Way("awq", Scheme(4, "awq", "group", 32), "awq"),
}  # fmt: skip
GIVEN = ("gptq", "gptq-v1")  # not the layout that would be chosen
COMPRESSED = [
    name for name, way in WAYS.items() if way.layout in ("pack-quantized", "int-quantized")
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model whose floats are exact in float16, so that nothing but quantisation changes
    them.
    """
    path = tmp_path_factory.mktemp("original") / "m"
    save(path, CONFIG, random_tensors(CONFIG, 0, "float32"), tokenizer(), dtype="float16")
    return load(path)


@pytest.fixture(scope="module")
def exported(original, tmp_path_factory):
    """name → (the quantised model in memory, its directory), made when asked for."""
    folder = tmp_path_factory.mktemp("exported")
    made = {}

    def get(name: str) -> Any:
        if name not in made:
            way = WAYS[name]
            model, _ = quantize_model(original, way.method, way.scheme, IDS, **way.options)
            export(folder / name, model, layout=way.layout if name in GIVEN else None)
            made[name] = model, folder / name
        return made[name]

    return get


# --- read back ----------------------------------------------------------------------------


@pytest.mark.theorem(
    "load(export(model)) = model: every weight equal bit for bit, in every layout",
    source="the formats' definitions",
)
@pytest.mark.parametrize("name", WAYS)
def test_what_is_read_back_is_what_was_written(exported, name):
    model, path = exported(name)
    read = load(path)
    way = WAYS[name]
    assert read.config == model.config
    for one, other in zip(model.weights["layers"], read.weights["layers"], strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if key not in PROJECTIONS:  # SmoothQuant's and AWQ's gains are rounded to float16
                np.testing.assert_array_equal(other[key], one[key].astype("float16"))
            elif key in way.options.get("keep", ()):
                np.testing.assert_array_equal(
                    other[key].dequantize(), one[key].dequantize().astype("float16")
                )
            elif name == "int8":  # scales were float32
                assert np.abs(one[key].dequantize() - other[key].dequantize()).max() < 2.0**-11 * 4
            else:
                np.testing.assert_array_equal(
                    one[key].dequantize(), other[key].dequantize(), err_msg=key
                )
    if way.layout == "pack-quantized" and name != "int8":
        np.testing.assert_array_equal(output(read), output(model))


@pytest.mark.parametrize("family", ["qwen2", "qwen3-tied", "mistral-window"])
def test_biases_norms_and_tied_heads_come_back(tmp_path, family):
    config = NETWORKS[family]
    save(tmp_path / "m", config, random_tensors(config, 1, "float32"), tokenizer(), dtype="float16")
    model, _ = quantize_model(load(tmp_path / "m"), "rtn", Scheme(4, "half_integer", "group", 8))
    export(tmp_path / "q", model, max_shard_bytes=20_000)
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 1
    read = load(tmp_path / "q")
    assert (read.weights["lm_head"] is read.weights["embed_tokens"]) == config.tie_word_embeddings
    np.testing.assert_array_equal(output(read), output(model))


# --- transformers -------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.theorem(
    "transformers loads W4A16, W8A16 and W3A16 checkpoints, group and channel, with no "
    "missing and no unexpected key, "
    "and its logits are ours within 1e-4",
    source="transformers 5 with compressed-tensors",
)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name in COMPRESSED if not name.startswith("w8a8")])
def test_weight_only_checkpoints_in_transformers(exported, name):
    _, path = exported(name)
    ours = output(load(path))
    theirs = their_model(path)
    torch = oracle("torch")
    with torch.no_grad():
        got = theirs(torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(ours - got).max() <= 1e-4


@pytest.mark.oracle
@pytest.mark.theorem(
    "W8A8: on equal inputs each linear of transformers gives our product within 1e-4 of its "
    "size; codes of activations "
    "differ only at ties, and the logits of sequences without one are ours within 1e-3",
    source="transformers 5 with compressed-tensors; activations by absmax/127.5",
)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["w8a8", "w8a8-keep"])
def test_w8a8_checkpoints_in_transformers(exported, name):
    _, path = exported(name)
    read = load(path)
    got, seen = products_of(their_model(path), IDS)
    own: dict[tuple[int, str], np.ndarray] = {}
    ours = output(read, tapped(read.weights, lambda index, key, x: own.setdefault((index, key), x)))
    # sequences whose activations have equal codes in every linear
    same = np.ones(len(IDS), dtype=bool)
    for (index, key), (x, y) in seen.items():
        linear = read.weights["layers"][index][key]
        flat = x.reshape(-1, x.shape[-1])
        assert np.abs(linear.matmul(flat).reshape(y.shape) - y).max() <= 1e-4 * np.abs(y).max(), (
            index,
            key,
        )
        if not isinstance(linear, W8A8Linear):
            continue
        (theirs_codes, scale), (our_codes, _) = (
            linear.quantize_activations(a) for a in (flat, own[index, key])
        )
        differ = theirs_codes != our_codes
        sequence = np.arange(len(flat)) // IDS.shape[1]
        fresh = differ & same[sequence][:, None]  # behind a code that differs everything may
        tie = np.abs(np.abs(flat / scale % 1.0) - 0.5)
        assert (tie[fresh] <= 1e-3).all(), (index, key)
        same[np.unique(sequence[differ.any(axis=1)])] = False
    assert same.any()
    assert np.abs(ours - got)[same].max() <= 1e-3


# --- which layout, and what has none ------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_the_layout_is_the_one_that_most_programs_read(exported, name):
    model, path = exported(name)
    raw = json.loads((path / "config.json").read_text())["quantization_config"]
    found = raw.get("format") or (raw.get("checkpoint_format") or raw["quant_method"])
    assert found == WAYS[name].layout
    assert export_spec_for(model.weights, WAYS[name].layout).quantization.groups[0][1].name == found


def test_default_layouts():
    assert default_layout(Scheme(4, "asymmetric", "channel")) == "awq"
    assert default_layout(Scheme(3, "asymmetric", "channel")) == "gptq_v2"
    assert default_layout(Scheme(4, "half_integer", "channel"), act_order=True) == "gptq_v2"


def test_what_cannot_be_exported_is_rejected_and_nothing_is_written(original, tmp_path):
    target = tmp_path / "q"
    with pytest.raises(
        CheckpointError, match="all projections of a name must be quantised alike; found none"
    ):
        export(target, original)
    mixed, _ = quantize_model(original, "rtn", Scheme(4, "half_integer", "channel"))
    other, _ = quantize_model(original, "rtn", Scheme(8, "half_integer", "channel"))
    mixed.weights["layers"][1]["k_proj"] = other.weights["layers"][1]["k_proj"]
    with pytest.raises(
        CheckpointError,
        match=r"alike; found .*layers\.0\.self_attn\.q_proj.*layers\.1\.self_attn\.k",
    ):
        export(target, mixed)
    mixed.weights["layers"][1]["k_proj"] = original.weights["layers"][1]["k_proj"]
    with pytest.raises(CheckpointError, match="quantised alike"):
        export(target, mixed)
    with pytest.raises(
        ValueError, match="awq cannot hold 8-bit weights, only 4-bit ones; what can: pack-quantized"
    ):
        export(target, other, layout="awq")
    with pytest.raises(ValueError, match="dtype 'int8' is not stored"):
        export(target, other, dtype="int8")
    static, _ = quantize_model(original, "smoothquant", None, IDS, level="O3")
    with pytest.raises(
        CheckpointError, match="stored activations have 8 bits and a dynamic scale per token"
    ):
        export(target, static)
    assert not target.exists()
    export(target, other)
    with pytest.raises(CheckpointError, match="not empty"):
        export(target, other)
    export(target, other, overwrite=True)
    assert isinstance(load(target).weights["layers"][0]["q_proj"], QuantizedLinear)
    assert not list(tmp_path.glob(".*"))
