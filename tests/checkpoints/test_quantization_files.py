"""Directories of AutoGPTQ and old AutoAWQ: the same weights as in a directory of today, and
what contradicts itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from networks import VOCAB, random_tensors, tokenizer
from refllm.checkpoints.loading import load
from refllm.checkpoints.quantization_files import read_quantization
from refllm.checkpoints.tensor_files import SINGLE, CheckpointError
from refllm.checkpoints.writer import save
from refllm.formats.uniform import Scheme
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS
from refllm.quant.export import export
from refllm.quant.recipe import quantize_model

CONFIG = ModelConfig("llama", VOCAB, 128, 96, 1, 4, 2, 32, bos_token_id=0, eos_token_ids=(0,))
SYMMETRIC = Scheme(4, "half_integer", "group", 32)
ASYMMETRIC = Scheme(4, "asymmetric", "group", 32)
WRITERS = {"gptq": SYMMETRIC, "gptq_v2": ASYMMETRIC, "awq": ASYMMETRIC}


@pytest.fixture(scope="module")
def today(tmp_path_factory) -> dict[str, Path]:
    """Layout → a directory of today's layout."""
    root = tmp_path_factory.mktemp("today")
    tensors = random_tensors(CONFIG, 0, "float32")
    save(root / "m", CONFIG, tensors, tokenizer(), dtype="float16")
    original = load(root / "m")
    made = {}
    for layout, scheme in WRITERS.items():
        model, _ = quantize_model(original, "rtn", scheme, np.zeros((1, 4), np.int64))
        export(root / layout, model, layout=layout)
        made[layout] = root / layout
    return made


def older(source: Path, target: Path, file: str, name: str = SINGLE, **changes: object) -> Path:
    """A directory whose entry lies in a file of its own, and whose weights in ``name``."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != SINGLE:
            (target / path.name).write_bytes(path.read_bytes())
    (target / name).write_bytes((source / SINGLE).read_bytes())
    config = json.loads((target / "config.json").read_text())
    entry = config.pop("quantization_config") | changes
    (target / "config.json").write_text(json.dumps(config))
    kept = {key: value for key, value in entry.items() if value is not ...}
    (target / file).write_text(json.dumps(kept))
    return target


def require_equal(path: Path, expected: Path) -> None:
    one, other = (load(p).weights["layers"][0] for p in (path, expected))
    for key in PROJECTIONS:
        assert type(one[key]) is type(other[key])
        np.testing.assert_array_equal(one[key].dequantize(), other[key].dequantize())


@pytest.mark.theorem(
    "A directory of AutoGPTQ, or of AutoAWQ before 0.1.6, holds the weights of today's layout",
    source="AutoGPTQ's BaseQuantizeConfig, AutoAWQ's AwqConfig",
)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "gptq_model-4bit-32g.safetensors", "Vicuna.act.safetensors"]
)
def test_files_of_older_writers(today, tmp_path, name):
    silent = {"quant_method": ..., "checkpoint_format": ..., "lm_head": ...}
    gptq = older(today["gptq"], tmp_path / "gptq", "quantize_config.json", name, **silent)
    require_equal(gptq, today["gptq"])
    v2 = {"quant_method": ..., "model_file_base_name": None}
    newer = older(today["gptq_v2"], tmp_path / "v2", "quantize_config.json", name, **v2)
    require_equal(newer, today["gptq_v2"])
    renamed = dict.fromkeys(("quant_method", "bits", "group_size", "modules_to_not_convert"), ...)
    renamed |= {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    awq = older(today["awq"], tmp_path / "awq", "quant_config.json", name, **renamed)
    require_equal(awq, today["awq"])


def test_shards_of_older_writers(today, tmp_path):
    path = older(today["gptq"], tmp_path / "m", "quantize_config.json")
    tensors = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    names = sorted(tensors)
    shards = {
        f"gptq_model-4bit-32g-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)
    }
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, path / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = path / "gptq_model-4bit-32g.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    require_equal(path, today["gptq"])


def test_both_files_may_say_the_same(today, tmp_path):
    path = older(today["gptq"], tmp_path / "m", "quantize_config.json")
    plain = read_quantization(path)
    for name in ("config.json",):
        (path / name).write_text((today["gptq"] / name).read_text())
    assert read_quantization(path) == plain
    assert read_quantization(today["gptq"]) == plain
    (path / "quantize_config.json").write_text('{"damp_percent": 0.01}')  # adds nothing
    assert read_quantization(path) == plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "quantize_config.json says gptq: gptq, 8 bits.* but config.json says gptq"),
        ({"group_size": 64}, "groups of 64, but config.json says .* groups of 32"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2, 4 bits, .* remove the file that is wrong"),
        ({"bits": 5}, r"quantize_config.json: .*bits 5 is not supported"),
        ({"sym": "yes"}, "sym 'yes' is not supported; supported: true and false"),
    ],
)
def test_two_files_that_disagree_are_rejected(today, tmp_path, change, message):
    path = older(today["gptq"], tmp_path / "m", "quantize_config.json", **change)
    (path / "config.json").write_text((today["gptq"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_file_of_another_name_is_told_apart(today, tmp_path):
    """Without the writer's own file nothing says that this is the checkpoint."""
    path = older(today["gptq"], tmp_path / "m", "quantize_config.json", "other.safetensors")
    (path / "config.json").write_text((today["gptq"] / "config.json").read_text())
    (path / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds other.safetensors, but neither model.safet"):
        load(path)


def test_two_files_of_weights_are_not_guessed_between(today, tmp_path):
    path = older(today["gptq"], tmp_path / "m", "quantize_config.json", "a.safetensors")
    (path / "b.safetensors").write_bytes((path / "a.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds a.safetensors, but neither model.safet"):
        load(path)


def rezeroed(source: Path, target: Path, word: int, **changes: object) -> Path:
    """A copy with other zero points and another entry."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / SINGLE)
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name] = np.full_like(tensors[name], np.uint32(word).astype(np.int32))
    save_file(tensors, target / SINGLE)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.theorem(
    "A symmetric GPTQ checkpoint has the zero points 2^(b−1), or is rejected",
    source="AutoGPTQ's Quantizer: zero = (maxq + 1) / 2",
)
@pytest.mark.parametrize(
    ("layout", "word", "message"),
    [
        ("gptq", 0x88888888, "zero point 9, .* with 8: 'checkpoint_format' should say gptq_v2"),
        ("gptq_v2", 0x77777777, "zero point 7, .* with 8: 'checkpoint_format' should say gptq,"),
        ("gptq", 0x77777778, "zero point 9, .* with 8: set 'sym' to false"),
        ("gptq_v2", 0x99999999, "zero point 9, .* with 8: set 'sym' to false"),
    ],
)
def test_symmetric_weights_with_other_zero_points_are_rejected(
    today, tmp_path, layout, word, message
):
    with pytest.raises(CheckpointError, match=message):
        load(rezeroed(today[layout], tmp_path / "m", word, sym=True))
    load(rezeroed(today[layout], tmp_path / "free", word, sym=False))
    right = {"gptq": 0x77777777, "gptq_v2": 0x88888888}[layout]
    load(rezeroed(today[layout], tmp_path / "right", right, sym=True))
