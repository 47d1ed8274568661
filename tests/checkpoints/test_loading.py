"""Loading: the result, the memory it takes, and an error for every bad input (see also
test_transformers).
"""

from __future__ import annotations

import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fakecupy
from conftest import to_host
from networks import (
    LLAMA3,
    NETWORKS,
    TOKENS,
    close,
    full_logits,
    random_tensors,
    tokenizer,
)
from refllm.checkpoints import loading
from refllm.checkpoints.loading import (
    Checkpoint,
    build_weights,
    iter_tensors,
    load,
    read_tensor,
)
from refllm.checkpoints.tensor_files import INDEX, SINGLE, CheckpointError
from refllm.checkpoints.writer import save
from refllm.model.naive import naive_logits

# --- what is loaded -----------------------------------------------------------------------


@pytest.fixture
def good(tmp_path) -> Path:
    """A complete float32 checkpoint, written by the safetensors library, not by ours."""
    config = NETWORKS["llama"]
    path = tmp_path / "good"
    path.mkdir()
    save_file(random_tensors(config, 0, "float32"), path / SINGLE)
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    tokenizer().save(path / "tokenizer.json")
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_load_gives_config_weights_tokenizer_and_path(good, dtype):
    ours = load(good, dtype=dtype)
    assert isinstance(ours, Checkpoint)
    assert (ours.config, ours.path) == (NETWORKS["llama"], good)
    assert ours.tokenizer.encode("return x") == tokenizer().encode("return x")
    assert load(str(good)).path == good
    expected = naive_logits(ours.config, random_tensors(ours.config, 0, "float32"), TOKENS.tolist())
    result = full_logits(ours.weights, ours.config)
    assert result.dtype == np.dtype(dtype)
    assert (
        np.abs(result - expected).max()
        <= (2e-5 if dtype == "float32" else 1e-12) * np.abs(expected).max()
    )


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_device_gets_arrays_converted_on_the_host(tmp_path, monkeypatch, stored, dtype):
    """The device has no bfloat16; the values are those that the host would have."""
    config = NETWORKS["qwen2"]
    save(tmp_path / "m", config, random_tensors(config, 0), tokenizer(), dtype=stored)
    monkeypatch.setattr(loading, "get", lambda name: {"cupy": fakecupy}[name])
    weights = load(tmp_path / "m", backend="cupy", dtype=dtype).weights
    some = {
        "model.norm.weight": weights["norm"],
        "lm_head.weight": weights["lm_head"].dequantize(),
        "model.layers.1.self_attn.k_proj.bias": weights["layers"][1]["k_bias"],
    }
    for name, mine in some.items():
        assert isinstance(mine, fakecupy.ndarray)
        np.testing.assert_array_equal(
            to_host(mine), read_tensor(tmp_path / "m", name).astype(dtype)
        )
    with pytest.raises(ValueError, match="choose one of float16, float32, float64"):
        load(tmp_path / "m", backend="cupy", dtype="bfloat16")
    if dtype == "float32":
        host = load_on_host(monkeypatch, tmp_path / "m")
        assert close(full_logits(weights, config, fakecupy), full_logits(host.weights, config))


def load_on_host(monkeypatch, path: Path) -> Checkpoint:
    with monkeypatch.context() as patch:
        patch.setattr(loading, "get", lambda name: np)
        return load(path)


def test_memory_never_holds_two_models(tmp_path):
    config = replace(
        NETWORKS["llama"], hidden_size=128, intermediate_size=512, num_hidden_layers=24
    )
    save(
        tmp_path / "m", config, random_tensors(config, 0, "float32"), tokenizer(), dtype="bfloat16"
    )
    load(tmp_path / "m")  # modules and caches are loaded once and do not count
    model = 4 * config.num_parameters
    tracemalloc.start()
    try:
        kept = load(tmp_path / "m")
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept.config == config
    assert model < now < 1.1 * model
    assert peak < 1.25 * model


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 5}, (5,)),
        ({"eos_token_id": [5, 9]}, (5, 9)),
        ({"eos_token_id": None}, (0,)),
        ({"eos_token_id": []}, (0,)),
        ({"eos_token_id": 0}, (0,)),
        ({"eos_token_id": [2147483647]}, (2**31 - 1,)),
        ({}, (0,)),
        (None, (0,)),
    ],
)
def test_end_tokens_of_the_generation_config_win(good, generation, expected):
    if generation is not None:
        (good / "generation_config.json").write_text(json.dumps(generation))
    assert load(good).config.eos_token_ids == expected


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_both_spellings_of_rope_are_read(good, key):
    raw = NETWORKS["llama3-rope"].to_hf()
    scaling = {key: "llama3", **vars(LLAMA3)}
    flat = {k: v for k, v in raw.items() if not k.startswith("rope_")} | {
        "rope_theta": 500.0,
        "rope_scaling": scaling,
    }
    nested = {k: v for k, v in raw.items() if not k.startswith("rope_")} | {
        "rope_parameters": scaling | {"rope_theta": 500.0}
    }
    for spelling in (flat, nested):
        (good / "config.json").write_text(json.dumps(spelling))
        assert load(good).config == NETWORKS["llama3-rope"]


def test_a_padded_vocabulary_is_common(good):
    assert tokenizer().vocab_size < load(good).config.vocab_size


def test_a_tied_head_that_is_stored_is_ignored(tmp_path, good):
    raw = NETWORKS["llama"].to_hf() | {"tie_word_embeddings": True}
    (good / "config.json").write_text(json.dumps(raw))
    tensors = load_file(good / SINGLE)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, good / SINGLE)
    weights = load(good).weights
    assert weights["lm_head"] is weights["embed_tokens"]
    assert "lm_head.weight" not in dict(iter_tensors(good))


def test_old_rotary_tables_are_ignored(good):
    tables = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(5, dtype=np.float32)
        for i in range(3)
    }
    save_file(load_file(good / SINGLE) | tables, good / SINGLE)
    assert load(good).config == NETWORKS["llama"]


def test_tensors_come_layer_by_layer_in_their_stored_type(good):
    tensors = load_file(good / SINGLE) | {
        "model.norm.weight": np.ones(40, dtype=ml_dtypes.bfloat16)
    }
    save_file(tensors, good / SINGLE)
    names = [name for name, _ in iter_tensors(good)]
    assert names == list(random_tensors(NETWORKS["llama"], 0))
    assert [n.split(".")[2] for n in names if "layers" in n] == sorted(
        n.split(".")[2] for n in names if "layers" in n
    )
    assert {t.dtype.name for _, t in iter_tensors(good)} == {"float32", "bfloat16"}
    assert {t.dtype.name for _, t in iter_tensors(good, "float64")} == {"float64"}
    assert read_tensor(good, "model.norm.weight").dtype == ml_dtypes.bfloat16
    with pytest.raises(CheckpointError, match="holds no tensor 'nothing'"):
        read_tensor(good, "nothing")


# --- bad input ----------------------------------------------------------------------------


def edit_config(path: Path, **entries) -> None:
    raw = json.loads((path / "config.json").read_text())
    for key, value in entries.items():
        if value is ...:
            raw.pop(key)
        else:
            raw[key] = value
    (path / "config.json").write_text(json.dumps(raw))


def edit_tensors(path: Path, **entries) -> None:
    tensors = load_file(path / SINGLE)
    for name, value in entries.items():
        name = name.replace("__", ".")
        tensors.pop(name) if value is ... else tensors.update({name: value})
    save_file(tensors, path / SINGLE)


NORM = "model__norm__weight"
HUGE = {"num_hidden_layers": 10**9}
BAD = {
    "no path": (shutil.rmtree, r"good does not exist: pass the directory"),
    "a file": (
        lambda p: (shutil.rmtree(p), p.touch()),
        r"good is a file, and no GGUF file: pass the directory",
    ),
    "no config": (
        lambda p: (p / "config.json").unlink(),
        r"has no config\.json: pass the directory",
    ),
    "config no JSON": (
        lambda p: (p / "config.json").write_text("{"),
        r"config\.json is not valid JSON .*again",
    ),
    "config no UTF-8": (
        lambda p: (p / "config.json").write_bytes(b'{"a": "\xff"}'),
        r"config\.json is not valid JSON",
    ),
    "config no object": (
        lambda p: (p / "config.json").write_text("[1]"),
        r"config\.json holds a JSON list",
    ),
    "architecture": (
        lambda p: edit_config(p, architectures=["GPT2LMHeadModel"]),
        r"config\.json.*'GPT2LMHeadModel' is not supported.*LlamaForCausalLM, Mistral.*, "
        r"Qwen2.*, Qwen3",
    ),
    "no architecture": (
        lambda p: edit_config(p, architectures=...),
        r"config\.json.*architectures.*LlamaForCausalLM",
    ),
    "size missing": (
        lambda p: edit_config(p, hidden_size=...),
        r"config\.json.*'hidden_size' is missing",
    ),
    "size no number": (lambda p: edit_config(p, hidden_size=[40]), r"config\.json.*hidden_size"),
    "size negative": (
        lambda p: edit_config(p, num_hidden_layers=-1),
        r"config\.json.*num_hidden_layers must",
    ),
    "rope no object": (lambda p: edit_config(p, rope_scaling=3), r"config\.json: "),
    "rope kind": (
        lambda p: edit_config(p, rope_scaling={"type": "dynamic"}),
        r"config\.json.*'dynamic' is not supported",
    ),
    "quantised": (
        lambda p: edit_config(p, quantization_config={"quant_method": "fp6"}),
        r"config\.json: quantization_config: quant_method 'fp6' is not supported; supported "
        r"are compressed-tensors",
    ),
    "generation no JSON": (
        lambda p: (p / "generation_config.json").write_text("x"),
        r"generation_config\.json is not",
    ),
    "generation eos": (
        lambda p: (p / "generation_config.json").write_text('{"eos_token_id": "<eos>"}'),
        r"generation_config\.json: eos_token_id must be a token id or a list",
    ),
    "generation eos below zero": (
        lambda p: (p / "generation_config.json").write_text('{"eos_token_id": [2, -1]}'),
        r"generation_config\.json: eos_token_id must be a token id or a list",
    ),
    "generation eos is true": (
        lambda p: (p / "generation_config.json").write_text('{"eos_token_id": true}'),
        r"generation_config\.json: eos_token_id must be a token id or a list of them, got True",
    ),
    "a generation eos is true": (
        lambda p: (p / "generation_config.json").write_text('{"eos_token_id": [2, true]}'),
        r"generation_config\.json: eos_token_id must be a token id or a list of them, got \[2, T",
    ),
    "generation eos beyond any vocabulary": (
        lambda p: (p / "generation_config.json").write_text('{"eos_token_id": 2147483648}'),
        r"generation_config\.json: eos_token_id must be a token id or a list",
    ),
    "config eos is true": (
        lambda p: edit_config(p, eos_token_id=True),
        r"config\.json: config: eos_token_id must be an integer or a list of them, got True",
    ),
    "tokenizer broken": (
        lambda p: (p / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json is not a valid",
    ),
    "tokenizer empty": (
        lambda p: (p / "tokenizer.json").write_text(
            '{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}'
        ),
        r"tokenizer\.json: the tokenizer has no tokens",
    ),
    "tensor missing": (
        lambda p: edit_tensors(p, **{NORM: ...}),
        r"good: the tensor 'model\.norm\.weight' is missing",
    ),
    "shape": (
        lambda p: edit_tensors(p, **{NORM: np.ones(41)}),
        r"good: 'model\.norm\.weight' has shape \(41,\), but config\.json says \(40,\)",
    ),
    "transposed": (
        lambda p: edit_config(p, intermediate_size=71),
        r"gate_proj\.weight' has shape \(72, 40\)",
    ),
    "more layers": (
        lambda p: edit_config(p, **HUGE),
        r"'model\.layers\.3\..*' is missing, .* 1000000000 layers",
    ),
    "fewer layers": (
        lambda p: edit_config(p, num_hidden_layers=2),
        r"good: no .* has the tensor 'model\.layers\.2\..*' and \d more:",
    ),
    "left-over bias": (
        lambda p: edit_tensors(p, model__layers__0__self_attn__q_proj__bias=np.ones(40)),
        r"no llama network .* has the tensor '.*q_proj\.bias': to ignore it",
    ),
    "tied but different": (
        lambda p: edit_config(p, tie_word_embeddings=True),
        r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word_embeddings",
    ),
    "nan": (
        lambda p: edit_tensors(p, **{NORM: np.full(40, np.nan, dtype=np.float32)}),
        r"model\.safetensors: 'model\.norm\.weight' holds 40 values that are NaN",
    ),
    "too large": (
        lambda p: edit_tensors(p, **{NORM: np.full(40, 1e39)}),
        r"model\.safetensors: 'model\.norm\.weight' holds 1e\+39, beyond the largest float32",
    ),
    "integers": (
        lambda p: edit_tensors(p, **{NORM: np.ones(40, dtype=np.int32)}),
        r"model\.safetensors: 'model\.norm\.weight' is stored as I32",
    ),
    "header cut": (
        lambda p: (p / SINGLE).write_bytes((p / SINGLE).read_bytes()[:100]),
        r"model\.safetensors is truncated",
    ),
    "data cut": (
        lambda p: (p / SINGLE).write_bytes((p / SINGLE).read_bytes()[:-1]),
        r"model\.safetensors is truncated",
    ),
    "no weights": (lambda p: (p / SINGLE).unlink(), r"good holds neither model\.safetensors nor"),
    "pickle only": (
        lambda p: (p / SINGLE).rename(p / "pytorch_model.bin"),
        r"holds pytorch_model\.bin .*never opened.*save_pretrained",
    ),
    "shard escapes": (
        lambda p: (
            (p / SINGLE).rename(p.parent / SINGLE),
            (p / INDEX).write_text(json.dumps({"weight_map": {"x": f"../{SINGLE}"}})),
        ),
        r"index\.json names the shard '\.\./model\.safetensors', which points outside",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_each_bad_input_has_its_own_error(good, case):
    damage, message = BAD[case]
    load(good)
    damage(good)
    with pytest.raises(CheckpointError, match=message):
        load(good)


@pytest.mark.parametrize(
    "name", ["x" * 5000, "~nobody-of-that-name/x", "a\0b"], ids=["long", "home", "nul"]
)
def test_a_path_that_the_file_system_cannot_hold_does_not_exist(name):
    with pytest.raises(CheckpointError, match="does not exist"):
        load(name)


def test_a_file_that_must_not_be_read_is_named(good, monkeypatch):
    def reject(self: Path, encoding: str) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(
        Path, "read_text", reject
    )  # the user who runs the tests may have all permissions
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Permission denied"):
        load(good)


def test_arguments_that_make_no_sense_are_rejected(good):
    for dtype in ("float16", "bfloat16", "int8", ""):
        with pytest.raises(ValueError, match="float32, float64"):
            load(good, dtype=dtype)
    with pytest.raises(ValueError, match="unknown backend"):
        load(good, backend="jax")


def test_a_tree_is_built_from_checked_tensors_only():
    config = NETWORKS["qwen3"]
    tensors = random_tensors(config, 0)
    assert (
        build_weights(config, tensors)["layers"][0]["q_norm"]
        is tensors["model.layers.0.self_attn.q_norm.weight"]
    )
    del tensors["model.layers.2.self_attn.k_norm.weight"]
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.2\.self_attn\.k_norm\.weight' is missing"
    ):
        build_weights(config, tensors)
