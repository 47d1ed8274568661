"""Checkpoints in 8-bit floats: what is read back is what was written, and transformers
computes the same with it.
"""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from conftest import oracle, to_host
from exported_models import output, products_of, their_model
from networks import VOCAB, random_tensors, tokenizer
from refllm.checkpoints.loading import load
from refllm.checkpoints.tensor_files import CheckpointError, TensorFiles
from refllm.checkpoints.writer import save
from refllm.formats.block_float import FloatScheme, quantize
from refllm.formats.float_layouts import from_tensors, layout_for, to_tensor
from refllm.formats.fp8_linear import Fp8Linear
from refllm.formats.layouts import WeightLayout, tensor_specs
from refllm.formats.quantization_config import UnsupportedQuantization, parse, quantization_config
from refllm.formats.uniform import Scheme
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS
from refllm.quant.export import export
from refllm.quant.fp8 import fp8
from refllm.quant.recipe import quantize_model
from strategies import build

# 144 and 160 are no multiples of 128: blocks at the edges are ragged
CONFIG = ModelConfig("llama", VOCAB, 144, 160, 2, 3, 1, 48, bos_token_id=0, eos_token_ids=(0,))
EVEN = ModelConfig("llama", VOCAB, 128, 256, 2, 2, 1, 64, bos_token_id=0, eos_token_ids=(0,))
IDS = np.random.default_rng(7).integers(0, VOCAB, (4, 8))
BLOCK = Scheme(8, "restricted", "block", 128)
CHANNEL = Scheme(8, "restricted", "channel")
WAYS = {
    "channel": (CHANNEL, {}, "float-quantized"),
    "channel-weights": (CHANNEL, {"activations": False}, "float-quantized"),
    "block": (BLOCK, {}, "float-quantized"),
    "block-weights": (BLOCK, {"activations": False}, "float-quantized"),
    "deepseek": (BLOCK, {}, "fp8"),
    "deepseek-ragged": (BLOCK, {}, "fp8"),
    "deepseek-ue8m0": (BLOCK, {"scale": "ue8m0"}, "fp8"),
}


WHOLE = ("block", "deepseek", "deepseek-ue8m0")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Two models: one with ragged blocks, and one whose blocks are whole."""
    folder = tmp_path_factory.mktemp("original")
    made = {}
    for name, config in (("ragged", CONFIG), ("even", EVEN)):
        save(
            folder / name,
            config,
            random_tensors(config, 0, "float32"),
            tokenizer(),
            dtype="float16",
        )
        made[name] = load(folder / name)
    return made


@pytest.fixture(scope="module")
def exported(original, tmp_path_factory):
    """name → (the quantised model in memory, its directory)."""
    folder = tmp_path_factory.mktemp("exported")
    made = {}

    def get(name):
        if name not in made:
            scheme, options, layout = WAYS[name]
            source = original["even" if name in WHOLE else "ragged"]
            model, report = quantize_model(source, "fp8", scheme, **options)
            assert report.bits_per_weight < 8.3
            export(folder / name, model, layout=layout)
            made[name] = model, folder / name
        return made[name]

    return get


@pytest.mark.theorem(
    "load(export(model)) = model: codes and scales equal bit for bit, in both layouts of "
    "8-bit floats",
    source="the formats' definitions",
)
@pytest.mark.parametrize("name", WAYS)
def test_what_is_read_back_is_what_was_written(exported, name):
    model, path = exported(name)
    read = load(path)
    for one, other in zip(model.weights["layers"], read.weights["layers"], strict=True):
        for key in PROJECTIONS:
            np.testing.assert_array_equal(one[key].weight.codes, other[key].weight.codes)
            np.testing.assert_array_equal(one[key].weight.scale, other[key].weight.scale)
            assert one[key].activation == other[key].activation
    np.testing.assert_array_equal(output(read, ids=IDS), output(model, ids=IDS))


@pytest.mark.parametrize("name", ["channel", "block", "deepseek-ragged"])
def test_the_files_by_definition(exported, name):
    """E4M3 tensors under the usual name, and a float32 scale for each row or block."""
    model, path = exported(name)
    at = "model.layers.0.mlp.down_proj."
    scale = "weight_scale_inv" if name == "deepseek-ragged" else "weight_scale"
    with safe_open(path / "model.safetensors", framework="numpy") as file:
        assert file.get_slice(at + "weight").get_dtype() == "F8_E4M3"
        scales = file.get_tensor(at + scale)
    with TensorFiles(path) as files:
        codes = files.raw(at + "weight")
    assert scales.dtype == np.float32
    weight = model.weights["layers"][0]["down_proj"]
    m, n = weight.shape
    assert scales.shape == (
        (144, 1) if name == "channel" else (2, 2) if name == "deepseek-ragged" else (1, 2)
    )
    wide = scales if name == "channel" else np.kron(scales, np.ones((128, 128), np.float32))[:m, :n]
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(codes.astype(np.float32) * wide, weight.dequantize())


@pytest.mark.oracle
@pytest.mark.theorem(
    "transformers loads float-quantized (channel, block) and DeepSeek's fp8 with no missing "
    "and no unexpected key, and "
    "where activations stay in floating point its logits are ours within 1e-4",
    source="transformers 5 with compressed-tensors; it dequantises fp8 on a CPU",
)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["channel-weights", "block-weights", "deepseek", "deepseek-ue8m0"])
def test_logits_in_transformers(exported, name):
    # DeepSeek's with whole blocks: on a CPU transformers 5 cuts 144 rows with two scales
    # into 72 and 72, not 128 and 16
    torch = oracle("torch")
    model, path = exported(name)
    for layer in model.weights["layers"]:
        for key in PROJECTIONS:
            layer[key].activation = None  # on a CPU transformers multiplies dequantised weights
    with torch.no_grad():
        got = their_model(path)(torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(output(model, ids=IDS) - got).max() <= 1e-4


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["channel", "block"])
def test_linears_with_rounded_activations_in_transformers(exported, name):
    """On equal inputs each linear gives our product within 1e-4 of its size, but where a
    code is a tie in one.
    """
    _, path = exported(name)
    read = load(path)
    _, seen = products_of(their_model(path), IDS)
    for (index, key), (x, y) in seen.items():
        linear = read.weights["layers"][index][key]
        off = np.abs(linear.matmul(x.reshape(-1, x.shape[-1])).reshape(y.shape) - y)
        assert np.median(off) <= 1e-6 * np.abs(y).max(), (index, key)
        assert np.mean(off > 1e-4 * np.abs(y).max()) < 0.02, (index, key)


# --- what is rejected ----------------------------------------------------------------------


def test_what_no_layout_holds():
    w = np.ones((4, 8), dtype=np.float32)
    with pytest.raises(
        ValueError, match="pack-quantized cannot hold 8-bit floats; what can: float-quantized, fp8"
    ):
        layout_for(fp8(w, CHANNEL), "pack-quantized")
    with pytest.raises(ValueError, match="fp8 holds e4m3 in square blocks, not e4m3 by channel"):
        layout_for(fp8(w, CHANNEL), "fp8")
    with pytest.raises(
        ValueError, match="holds e4m3 in square blocks or by channel, not e5m2 by channel"
    ):
        layout_for(fp8(w, CHANNEL, format="e5m2"))
    with pytest.raises(ValueError, match="not e4m3 by tensor"):
        layout_for(fp8(w, Scheme(8, "restricted", "tensor")))
    with pytest.raises(ValueError, match="fp8 goes with activations by tile, not None"):
        layout_for(fp8(w, BLOCK, activations=False), "fp8")
    for layout in ("fp8", None):
        with pytest.raises(ValueError, match="tiles of 64 columns of the activations .* only 128"):
            layout_for(fp8(w, Scheme(8, "restricted", "block", 64)), layout)
    blocks = fp8(w, Scheme(8, "restricted", "block", 64), activations=False)
    assert layout_for(blocks) == WeightLayout("float-quantized", 8, 64, weight_only=True)
    with pytest.raises(ValueError, match="not e4m3 by block"):
        layout_for(Fp8Linear(quantize(w, FloatScheme("e4m3", "block", (128, 64)))))
    tokens = Fp8Linear(quantize(w, FloatScheme("e4m3", "block", 128)), "token")
    with pytest.raises(ValueError, match="float-quantized goes with activations by tile, not tok"):
        layout_for(tokens)
    with pytest.raises(ValueError, match="goes with activations by token, not tensor"):
        layout_for(Fp8Linear(quantize(w, FloatScheme("e4m3", "channel")), "tensor"))


def test_integers_go_into_other_layouts(original, tmp_path):
    model, _ = quantize_model(original["even"], "rtn", Scheme(8, "restricted", "channel"))
    with pytest.raises(
        ValueError,
        match="float-quantized cannot hold integers, only 8-bit floats; what can: pack",
    ):
        export(tmp_path / "q", model, layout="float-quantized")
    ragged, _ = quantize_model(original["ragged"], "fp8")
    with pytest.raises(
        ValueError,
        match="whole tiles of 128, which do not divide its 144 columns; fp8 takes any shape",
    ):
        export(tmp_path / "q", ragged)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("layout", ["fp8", "float-quantized"])
def test_damaged_tensors_are_rejected(xp, layout):
    """One damaged code or scale among good ones, in the last block or row."""
    x = build("normal", (130, 140), 0)
    weight = fp8(xp.asarray(x), BLOCK if layout == "fp8" else CHANNEL)
    stored = layout_for(weight, layout)
    tensors = {suffix: to_tensor(weight, suffix) for suffix in tensor_specs(stored, x.shape)}
    read = from_tensors(tensors, stored, x.shape)
    np.testing.assert_array_equal(to_host(read.dequantize()), to_host(weight.dequantize()))
    key = "weight_scale_inv" if layout == "fp8" else "weight_scale"
    for code in (0x7F, 0xFF):
        codes = to_host(tensors["weight"]).copy()
        codes[129, 139] = code
        with pytest.raises(ValueError, match="w: a code is NaN"):
            from_tensors(tensors | {"weight": xp.asarray(codes)}, stored, x.shape, name="w")
    for wrong in (-1.0, -1e-45, np.inf, -np.inf, np.nan):
        scale = to_host(tensors[key]).copy()
        scale[-1, -1] = wrong
        with pytest.raises(ValueError, match="w: a scale is negative or not finite"):
            from_tensors(tensors | {key: xp.asarray(scale)}, stored, x.shape, name="w")


def test_every_code_but_nan_and_any_scale_from_zero_up_is_read(xp):
    """Codes 0x00 to 0x7E of both signs times scales of any floating-point type."""
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], dtype=np.uint8).reshape(2, 127)
    stored = WeightLayout("float-quantized", 8)
    for dtype in ("float16", "float32", "float64"):
        scale = np.array([[0.5], [0.0]], dtype=dtype)
        tensors = {"weight": xp.asarray(codes), "weight_scale": xp.asarray(scale)}
        read = from_tensors(tensors, stored, (2, 127), dtype="float64")
        back = to_host(read.dequantize())
        assert back.dtype == np.float64
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        np.testing.assert_array_equal(back, values * [[0.5], [0.0]])
        assert read.weight.scale.dtype == xp.float32
        assert read.nbytes == codes.size + 8
    nothing = {
        "weight": xp.asarray(np.zeros((0, 4), np.uint8)),
        "weight_scale": xp.asarray(np.zeros((0, 1), np.float32)),
    }
    assert from_tensors(nothing, stored, (0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("stored", "activation"),
    [
        (WeightLayout("float-quantized", 8), "token"),
        (WeightLayout("float-quantized", 8, 128), "tile"),
        (WeightLayout("fp8", 8, 128), "tile"),
        (WeightLayout("float-quantized", 8, weight_only=True), None),
        (WeightLayout("float-quantized", 8, 128, weight_only=True), None),
    ],
)
def test_activations_of_each_layout(stored, activation):
    specs = tensor_specs(stored, (4, 128))
    tensors = {
        suffix: np.ones(shape, dtype="uint8" if suffix == "weight" else "float32")
        for suffix, (_, shape) in specs.items()
    }
    read = from_tensors(tensors, stored, (4, 128), name="q_proj")
    assert read.activation == activation
    assert layout_for(read, stored.name) == stored
    if activation is not None:
        with pytest.raises(ValueError, match="the input of q_proj: holds NaN"):
            read.matmul(np.full((1, 128), np.nan, dtype=np.float32))


def test_a_damaged_file_is_named_with_its_weight(exported, tmp_path):
    """The scale of a row becomes −1 in the file."""
    path = tmp_path / "m"
    shutil.copytree(exported("channel")[1], path)
    file = path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])["model.layers.0.mlp.down_proj.weight_scale"]
    at = 8 + length + entry["data_offsets"][0]
    raw[at : at + 4] = np.float32(-1).tobytes()
    file.write_bytes(raw)
    with pytest.raises(
        CheckpointError, match=r"m: model\.layers\.0\.mlp\.down_proj: a scale is negative or not"
    ):
        load(path)


@pytest.mark.theorem(
    "parse(quantization_config(stored)) = stored, for every way of storing 8-bit floats",
    source="refllm.formats.quantization_config",
)
@pytest.mark.parametrize(
    "stored",
    [
        WeightLayout("fp8", 8, 128),
        WeightLayout("float-quantized", 8),
        WeightLayout("float-quantized", 8, 128),
        WeightLayout("float-quantized", 8, weight_only=True),
        WeightLayout("float-quantized", 8, 128, weight_only=True),
    ],
)
def test_entries_are_read_as_they_are_written(stored):
    entry = json.loads(json.dumps(quantization_config(stored)))
    assert parse(entry).groups == ((("Linear",), stored),)
    assert (
        str(stored).endswith("8 bits")
        or "row" in str(stored)
        or "blocks of 128 × 128" in str(stored)
    )


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]},
            "activation_scheme",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}, "fmt 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [1, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "int"}, "scale_fmt"),
    ],
)
def test_what_is_not_read_is_rejected(entry, words):
    with pytest.raises(UnsupportedQuantization, match=words):
        parse(entry)


def test_options_of_compressed_tensors_that_are_not_read():
    entry = quantization_config(WeightLayout("float-quantized", 8))
    for where, key, value, words in (
        ("weights", "strategy", "tensor", "one scale per row or block"),
        ("weights", "num_bits", 4, "8-bit"),
        ("weights", "symmetric", False, "symmetric 8-bit floats"),
        ("weights", "dynamic", True, "symmetric 8-bit floats"),
        ("weights", "type", "int", "format 'float-quantized' is not supported"),
        ("input_activations", "dynamic", False, "dynamic 8-bit floats"),
        ("input_activations", "num_bits", 4, "dynamic 8-bit floats"),
        ("input_activations", "strategy", "tensor", "dynamic 8-bit floats"),
    ):
        changed = json.loads(json.dumps(entry))
        changed["config_groups"]["group_0"][where][key] = value
        with pytest.raises(UnsupportedQuantization, match=words):
            parse(changed)


def test_a_file_of_another_type_is_rejected(exported, tmp_path):
    """Integers where E4M3 is meant, as a damaged or foreign file may have them."""
    _, path = exported("deepseek")
    target = tmp_path / "damaged"
    target.mkdir()
    for file in path.iterdir():
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            data = data.replace(b'"F8_E4M3"', b'"I8"     ')
        (target / file.name).write_bytes(data)
    with pytest.raises(CheckpointError, match="is stored as I8, not as float8_e4m3fn"):
        load(target)
