"""Stored or decoded: the same weights bit for bit, in every format that is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refllm
from conftest import to_host
from gguf_data import BLOCKS
from gguf_files import make
from networks import VOCAB, random_tensors, tokenizer
from refllm.checkpoints import weight_storage
from refllm.checkpoints.loading import load
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.weight_storage import StoredTensor, choose
from refllm.checkpoints.writer import save
from refllm.errors import InputError
from refllm.formats.uniform import Scheme
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS
from refllm.model.weights import Dense
from refllm.quant.export import export
from refllm.quant.recipe import quantize_model

CONFIG = ModelConfig("llama", VOCAB, 128, 96, 2, 4, 2, 32, bos_token_id=0, eos_token_ids=(0,))
WIDE = ModelConfig("llama", VOCAB, 256, 256, 1, 4, 2, 64, bos_token_id=0, eos_token_ids=(0,))
IDS = np.random.default_rng(7).integers(0, VOCAB, (4, 8))
FORMATS: dict[str, tuple[str, Scheme | None, str, dict[str, Any]]] = {
    "pack-quantized": ("rtn", Scheme(4, "half_integer", "group", 32), "pack-quantized", {}),
    "gptq_v2": ("rtn", Scheme(4, "asymmetric", "group", 32), "gptq_v2", {}),
    "gptq act-order": (
        "gptq",
        Scheme(4, "half_integer", "group", 32),
        "gptq_v2",
        {"act_order": True},
    ),
    "gptq": ("rtn", Scheme(4, "half_integer", "group", 32), "gptq", {}),
    "awq": ("rtn", Scheme(4, "asymmetric", "group", 32), "awq", {}),
    "float-quantized": ("fp8", None, "float-quantized", {"activations": False}),
}
ACTIVATIONS = {
    "int-quantized": (
        "smoothquant",
        None,
        "int-quantized",
        {"rule": "half_integer", "scale_dtype": "float16"},
    ),
    "fp8": ("fp8", None, "fp8", {}),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Any:
    path = tmp_path_factory.mktemp("original") / "m"
    save(path, CONFIG, random_tensors(CONFIG, 0, "float32"), tokenizer(), dtype="float16")
    return load(path)


def quantised(original: Any, path: Path, name: str) -> Path:
    method, scheme, layout, options = (FORMATS | ACTIVATIONS)[name]
    model, _ = quantize_model(original, method, scheme, IDS, **options)
    export(path, model, layout=layout)
    return path


def linears(model: Any) -> Iterator[Any]:
    for layer in model.weights["layers"]:
        yield from (layer[key] for key in PROJECTIONS)
    yield model.weights["embed_tokens"]
    yield model.weights["lm_head"]


def require_the_same_values(stored: Any, decoded: Any) -> None:
    kinds = set()
    for one, other in zip(linears(stored), linears(decoded), strict=True):
        kinds.add(type(one))
        assert isinstance(other, Dense)
        np.testing.assert_array_equal(to_host(other.dequantize()), to_host(one.dequantize()))
    assert kinds - {Dense}, "nothing was stored: the test could not fail"


@pytest.mark.theorem(
    'load(weights="float") holds the values that load(weights="stored") dequantises, bit for bit',
    source="the formats' definitions",
)
@pytest.mark.parametrize("name", FORMATS)
def test_weight_only_formats_decode_to_the_values_that_they_stand_for(original, tmp_path, name):
    path = quantised(original, tmp_path / "m", name)
    stored = refllm.load(path, "numpy", weights="stored")
    decoded = refllm.load(path, "numpy", weights="float")
    require_the_same_values(stored, decoded)
    auto = refllm.load(path, "numpy")  # a small model: decoded
    assert auto.storage == decoded.storage
    assert "float32 weights, decoded from" in repr(auto)
    assert repr(stored).count("stored as") == 1
    ids = IDS[0]
    z = stored.logits(ids)
    np.testing.assert_allclose(decoded.logits(ids), z, rtol=0, atol=1e-5 * np.abs(z).max())


@pytest.mark.theorem(
    'load(weights="float") holds the values that load(weights="stored") dequantises, bit for bit',
    source="the GGUF types' definitions",
)
@pytest.mark.parametrize("type", BLOCKS)
def test_gguf_types_decode_to_the_values_that_they_stand_for(tmp_path, type):
    path = make(tmp_path / "m.gguf", WIDE, type)
    stored = refllm.load(path, "numpy", weights="stored")
    require_the_same_values(stored, refllm.load(path, "numpy", weights="float"))
    assert stored.storage == f"weights stored as {type}"
    assert refllm.load(path, "numpy").storage == f"float32 weights, decoded from {type}"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formats_that_quantise_activations_stay_stored_unless_asked(original, tmp_path, name):
    path = quantised(original, tmp_path / "m", name)
    stored = refllm.load(path, "numpy", weights="stored")
    auto = refllm.load(path, "numpy")
    assert auto.storage == stored.storage == f"weights stored as {name} (8 bits, activations too)"
    np.testing.assert_array_equal(auto.logits(IDS[0]), stored.logits(IDS[0]))
    decoded = refllm.load(path, "numpy", weights="float")
    for one, other in zip(linears(stored), linears(decoded), strict=True):
        np.testing.assert_array_equal(other.dequantize(), one.dequantize())
    assert not np.array_equal(decoded.logits(IDS[0]), stored.logits(IDS[0]))


def test_everything_stays_stored_on_cupy(tmp_path, monkeypatch):
    import fakecupy
    from refllm.checkpoints import loading

    monkeypatch.setattr(loading, "get", lambda backend: fakecupy)
    path = make(tmp_path / "m.gguf", WIDE, "Q4_K")
    assert refllm.load(path).storage == "weights stored as Q4_K"
    assert "float32 weights" in refllm.load(path, weights="float").storage


@pytest.mark.real
def test_the_real_model_computes_the_same_stored_and_decoded():
    try:
        stored = refllm.load("smollm2", "numpy", weights="stored")
    except CheckpointError as error:
        pytest.skip(str(error))
    decoded = refllm.load("smollm2", "numpy", weights="float")
    require_the_same_values(stored, decoded)
    ids = stored.tokenizer.encode("The capital of France is")
    z = decoded.logits(ids)
    np.testing.assert_allclose(stored.logits(ids), z, rtol=0, atol=1e-5 * np.abs(z).max())


# --- the decision -------------------------------------------------------------------------

TENSORS = [
    StoredTensor("plain", 1000),
    StoredTensor("small", 1000, "Q4_1", 625),
    StoredTensor("w8a8", 1000, "int-quantized (8 bits, activations too)", 1004, True),
]
FLOAT = 4000 + 4000 + 4000
AUTO = 4000 + 4000 + 1004
STORED = 4000 + 625 + 1004


@pytest.fixture
def memory(monkeypatch):
    def set_free(free: int | None) -> None:
        monkeypatch.setattr(weight_storage, "free_memory", lambda xp: free)

    return set_free


@pytest.mark.parametrize(
    ("weights", "free", "decoded", "nbytes"),
    [
        ("auto", 2 * AUTO, {"small"}, AUTO),
        ("auto", 2 * AUTO - 1, set(), STORED),
        ("auto", None, {"small"}, AUTO),
        ("stored", STORED, set(), STORED),
        ("float", FLOAT, {"small", "w8a8"}, FLOAT),
    ],
)
def test_auto_decodes_what_fits_into_half_of_the_free_memory(
    memory, weights, free, decoded, nbytes
):
    memory(free)
    chosen = choose(weights, iter(TENSORS), "float32", np, "x")
    assert chosen.decoded == decoded
    assert chosen.nbytes == nbytes


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("float64", 8)])
def test_the_dtype_counts(memory, dtype, size):
    memory(1 << 30)
    assert choose("float", TENSORS, dtype, np, "x").nbytes == 3000 * size


def test_what_does_not_fit_is_rejected_with_both_numbers(memory):
    memory(FLOAT - 1)
    with pytest.raises(CheckpointError, match=r'x: its float32 .* load it with weights="stored"'):
        choose("float", TENSORS, "float32", np, "x")
    memory(STORED - 1)
    for weights in weight_storage.WEIGHTS:
        with pytest.raises(CheckpointError, match=r"need 0\.00 GB.*free some memory"):
            choose(weights, TENSORS, "float32", np, "x")
    memory(7_000_000_000)
    big = [StoredTensor("w", 8_030_000_000, "Q4_K", 4_920_000_000)]
    assert choose("auto", big, "float32", np, "x").decoded == set()
    with pytest.raises(
        CheckpointError, match=r"need 32\.12 GB, but only 7\.00 GB .* needs 4\.92 GB"
    ):
        choose("float", big, "float32", np, "x")


def test_a_model_that_does_not_fit_is_rejected_before_its_weights_are_read(
    tmp_path, memory, monkeypatch
):
    from refllm.checkpoints.gguf import GGUFTensors

    path = make(tmp_path / "m.gguf", WIDE, "Q4_K")
    memory(1000)
    monkeypatch.setattr(GGUFTensors, "__getitem__", lambda self, name: pytest.fail("was read"))
    with pytest.raises(CheckpointError, match="are free"):
        refllm.load(path, "numpy")


def test_another_choice_is_rejected(tmp_path):
    with pytest.raises(InputError, match="weights is one of auto, float, stored, got 'int8'"):
        refllm.load("stdlib", weights="int8")
