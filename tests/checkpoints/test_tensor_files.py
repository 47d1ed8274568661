"""Reading tensors from disk: every type exactly, nothing before it is looked up, and errors
that name the bad file.
"""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from safetensors.numpy import save_file

from refllm.checkpoints import tensor_files
from refllm.checkpoints.tensor_files import (
    INDEX,
    SINGLE,
    CheckpointError,
    TensorFiles,
    check_tensors,
    converted,
    tensor_shapes,
)
from refllm.model.config import ModelConfig
from strategies import model_configs

BF16 = ml_dtypes.bfloat16


def write_sharded(
    directory: Path,
    shards: dict[str, dict[str, np.ndarray]],
    weight_map: dict[str, str] | None = None,
) -> None:
    """Shards by file name, and an index over them (or the given one)."""
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- what is read -------------------------------------------------------------------------


@pytest.mark.theorem(
    "reading a bfloat16 or float16 tensor as float32 is exact, for all 65,536 codes",
    source="enumeration",
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_float_is_read_exactly(tmp_path, dtype):
    codes = np.arange(65536, dtype=np.uint16)
    numbers = codes.view(BF16 if dtype == "bfloat16" else dtype)
    # ml_dtypes lets a signalling NaN raise the processor's flag
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(numbers)
    for code in codes[~finite]:
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            converted(code.reshape(1).view(numbers.dtype), "float32", "x", tmp_path)
    numbers = numbers[finite]
    save_file({"x": numbers}, tmp_path / SINGLE)
    with TensorFiles(tmp_path) as files:
        stored = files["x"]
        assert files.dtype("x") == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert stored.dtype == numbers.dtype
    wide = converted(stored, "float32", "x", tmp_path)
    if dtype == "bfloat16":  # the upper half of a float32's bits, by definition
        by_definition = (numbers.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        sign, exponent, fraction = _fields(numbers)
        by_definition = (
            np.where(
                exponent == 0, fraction * 2.0**-24, (1024 + fraction) * 2.0 ** (exponent - 25.0)
            )
            * sign
        )
    np.testing.assert_array_equal(wide, by_definition)


def _fields(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sign, biased exponent and fraction of float16 values, as IEEE 754 lays them out."""
    codes = numbers.view(np.uint16).astype(np.int64)
    return 1.0 - 2.0 * (codes >> 15), (codes >> 10) & 31, codes & 1023


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_wide_types_are_read_bit_for_bit(tmp_path, dtype):
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    save_file({"x": x, "scalar": np.array(2.0, dtype=dtype)}, tmp_path / SINGLE)
    with TensorFiles(tmp_path) as files:
        assert list(files) == ["scalar", "x"]
        assert len(files) == 2
        assert files.shape("x") == (3, 5)
        assert files["scalar"].shape == files.shape("scalar") == ()
        np.testing.assert_array_equal(files["x"], x)
        assert files.file("x") == tmp_path / SINGLE


@pytest.mark.parametrize("dtype", ["float32", "float16", BF16])
def test_rows_are_the_rows_of_a_matrix_and_all_of_a_vector(tmp_path, dtype):
    matrix = np.arange(12).reshape(6, 2).astype(dtype)
    save_file({"m": matrix, "v": matrix[:, 0].copy(), "i": np.arange(4)}, tmp_path / SINGLE)
    with TensorFiles(tmp_path) as files:
        for start, stop in ((0, 6), (0, 1), (2, 5), (5, 6), (3, 3), (4, 6)):
            part = files.rows("m", start, stop)
            assert part.dtype == matrix.dtype
            np.testing.assert_array_equal(part, matrix[start:stop])
        np.testing.assert_array_equal(files.rows("v", 2, 3), matrix[:, 0])
        with pytest.raises(CheckpointError, match="'i' is stored as I64"):
            files.rows("i", 0, 1)


def test_shards_are_one_mapping(tmp_path):
    x = np.arange(4.0)
    y = np.arange(6.0).reshape(2, 3)
    write_sharded(
        tmp_path,
        {"a.safetensors": {"x": x}, "b.safetensors": {"y": y, "unlisted": x}},
        {"x": "a.safetensors", "y": "b.safetensors"},
    )
    with TensorFiles(tmp_path) as files:
        assert sorted(files) == ["x", "y"]
        np.testing.assert_array_equal(files["y"], y)
        assert files.file("x").name == "a.safetensors"


def test_a_single_file_wins_over_an_index(tmp_path):
    write_sharded(tmp_path, {"a.safetensors": {"x": np.zeros(2)}})
    save_file({"x": np.ones(2)}, tmp_path / SINGLE)
    with TensorFiles(tmp_path) as files:
        np.testing.assert_array_equal(files["x"], np.ones(2))


def test_nothing_is_read_before_it_is_looked_up(tmp_path):
    large = np.ones((256, 1024), dtype=np.float32)
    save_file({f"x{i}": large for i in range(8)}, tmp_path / SINGLE)
    tracemalloc.start()
    try:
        with TensorFiles(tmp_path) as files:
            assert [files.shape(name) for name in files] == [large.shape] * 8
            assert tracemalloc.get_traced_memory()[1] < large.nbytes // 8
            for name in files:
                assert files[name].shape == large.shape
            assert tracemalloc.get_traced_memory()[1] < 2.5 * large.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.theorem(
    "the stored tensors of a network count up to its number of parameters",
    source="serving arithmetic",
)
@given(model_configs())
def test_shapes_count_up_to_the_parameters(config):
    shapes = dict(tensor_shapes(config))
    assert sum(math.prod(shape) for shape in shapes.values()) == config.num_parameters


# --- bad files ----------------------------------------------------------------------------


def opened(directory: Path) -> dict[str, np.ndarray]:
    with TensorFiles(directory) as files:
        return dict(files)


def test_every_truncation_is_noticed(tmp_path):
    save_file({"x": np.arange(5.0)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated.*again"):
            opened(tmp_path)
    (tmp_path / SINGLE).write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="truncated or no safetensors"):
        opened(tmp_path)


def raw_file(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x95 a pickle",
        b"\xff" * 16,
        struct.pack("<Q", 4) + b"[1]]",
        raw_file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        raw_file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
        raw_file({"x": {"dtype": "NEW", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        raw_file({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        raw_file({"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}, b"\0" * 4),
    ],
    ids=["pickle", "length", "no object", "shape", "hole", "type", "negative", "overflow"],
)
def test_a_file_that_is_no_safetensors_is_rejected(tmp_path, content):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or no safetensors"):
        opened(tmp_path)


@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "F8_E5M2"])
def test_other_types_are_rejected_by_name(tmp_path, dtype):
    size = {"I32": 4, "I64": 8}.get(dtype, 1)
    header = {"q": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}
    (tmp_path / SINGLE).write_bytes(raw_file(header, b"\0" * size))
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: 'q' is stored as {dtype}.*[Qq]uantised"
    ):
        opened(tmp_path)


def test_a_file_that_must_not_be_read_says_so(tmp_path, monkeypatch):
    """The library reports "No such file". The user who runs the tests may have all
    permissions, so both are simulated.
    """

    def reject(path, framework):
        raise FileNotFoundError("No such file or directory")

    (tmp_path / SINGLE).touch()
    monkeypatch.setattr(tensor_files, "safe_open", reject)
    monkeypatch.setattr(tensor_files.os, "access", lambda path, mode: False)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors cannot be read: permission denied"
    ):
        opened(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_sharded(
        tmp_path,
        {"a.safetensors": {"x": np.zeros(1)}},
        {"x": "a.safetensors", "y": "b.safetensors"},
    )
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing.*download"):
        opened(tmp_path)


def test_a_shard_that_lacks_its_tensor_is_named(tmp_path):
    write_sharded(
        tmp_path,
        {"a.safetensors": {"x": np.zeros(1)}},
        {"x": "a.safetensors", "y": "a.safetensors"},
    )
    with pytest.raises(CheckpointError, match=r"a\.safetensors does not hold 'y'"):
        opened(tmp_path)


def test_a_shard_that_holds_another_shards_tensor_is_named(tmp_path):
    shards = {
        "a.safetensors": {"x": np.zeros(1)},
        "b.safetensors": {"x": np.ones(1), "y": np.ones(1)},
    }
    write_sharded(tmp_path, shards, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"b\.safetensors holds 'x', which .* puts into another shard"
    ):
        opened(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "sub/../../a.safetensors",
        "/etc/passwd",
        "C:\\a.safetensors",
        "..\\a.safetensors",
        "\\\\host\\a",
    ],
)
def test_a_shard_outside_the_directory_is_rejected(tmp_path, name):
    home = tmp_path / "model"
    home.mkdir()
    save_file({"x": np.zeros(1)}, tmp_path / "a.safetensors")
    write_sharded(home, {}, {"x": name})
    with pytest.raises(CheckpointError, match="points outside .*rejected"):
        opened(home)


@pytest.mark.parametrize(
    "name", ["", ".", "sub", "x" * 5000, "a\0b"], ids=["empty", "dot", "directory", "long", "nul"]
)
def test_a_shard_name_that_is_no_file_is_missing(tmp_path, name):
    (tmp_path / "sub").mkdir()
    write_sharded(tmp_path, {}, {"x": name})
    with pytest.raises(CheckpointError, match="is missing"):
        opened(tmp_path)


def test_a_link_out_of_the_directory_is_rejected(tmp_path):
    home = tmp_path / "model"
    home.mkdir()
    save_file({"x": np.zeros(1)}, tmp_path / "secret.safetensors")
    (home / "a.safetensors").symlink_to(tmp_path / "secret.safetensors")
    write_sharded(home, {}, {"x": "a.safetensors"})
    with pytest.raises(CheckpointError, match="is a link to .*secret.* outside"):
        opened(home)


def test_links_of_the_download_cache_are_followed(tmp_path):
    """models--owner--name/snapshots/<commit>/file → ../../blobs/<hash>, as huggingface_hub
    lays it out.
    """
    home = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    home.mkdir(parents=True)
    blobs.mkdir()
    save_file({"x": np.ones(2)}, blobs / "f00d")
    (home / "a.safetensors").symlink_to(Path("../../blobs/f00d"))
    (home / "sub").mkdir()
    write_sharded(
        home,
        {"sub/b.safetensors": {"y": np.zeros(1)}},
        {"x": "a.safetensors", "y": "sub/b.safetensors"},
    )
    np.testing.assert_array_equal(opened(home)["x"], np.ones(2))
    assert opened(home)["y"] == 0


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 3}}', "[" * 100_000, "\xff"],
)
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth"]
)
def test_pickled_weights_are_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match=rf"{name}.*never opened.*save_pretrained"):
        opened(tmp_path)


def test_a_directory_without_weights_says_so(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        opened(tmp_path)


# --- values -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", BF16])
def test_a_value_that_is_not_finite_is_named_with_its_place(value, dtype):
    x = np.zeros((3, 4), dtype=dtype)
    x[1, 2] = value
    x[2, 3] = value
    with pytest.raises(
        CheckpointError,
        match=r"here: 'w' holds 2 values that are NaN or infinite, the first at \(1, 2\)",
    ):
        converted(x, "float32", "w", Path("here"))


@pytest.mark.parametrize(
    ("largest", "beyond", "dtype", "wider"),
    [
        (65519.99, 65520.0, "float16", "float32 or bfloat16"),
        (3.4028235e38, 3.4028236e38, "float32", "float64"),
        (3.39e38, 3.4e38, "bfloat16", "float32"),
    ],
)
def test_a_value_that_would_become_infinite_is_rejected(largest, beyond, dtype, wider):
    """Up to half a spacing beyond the largest finite value, rounding returns that value;
    from there on it is ∞.
    """
    for sign in (1, -1):
        assert np.isfinite(converted(np.array([sign * largest]), dtype, "w", Path("here"))).all()
        with pytest.raises(
            CheckpointError, match=rf"'w' holds .* beyond the largest {dtype}, .*: choose {wider}$"
        ):
            converted(np.array([1.0, sign * beyond]), dtype, "w", Path("here"))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.3.gate_proj.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.mlp.experts.down_proj",
        "blk.0.ffn_gate_exps.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_up.7.weight",  # llama.cpp's first layout of experts
    ],
)
def test_experts_are_named_before_anything_is_missing(name):
    config = ModelConfig("llama", 9, 8, 8, 1, 1, 1, 8)
    with pytest.raises(CheckpointError, match="experts: experts are not computed here"):
        check_tensors(config, {name: np.zeros(3)}, Path("here"))


def test_a_missing_head_may_be_the_embedding():
    config = ModelConfig("llama", 9, 8, 8, 1, 1, 1, 8)
    tensors = {name: np.zeros(shape) for name, shape in tensor_shapes(config)}
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match="'lm_head.weight' is missing: .* tie_word_embeddin"):
        check_tensors(config, tensors, Path("here"))
    check_tensors(replace(config, tie_word_embeddings=True), tensors, Path("here"))


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint16", "bool", "complex64"])
def test_only_floating_point_is_a_weight(dtype):
    with pytest.raises(CheckpointError, match=f"'w' has type {dtype}"):
        converted(np.ones(2, dtype=dtype), "float32", "w", Path("here"))


@pytest.mark.parametrize("dtype", ["int8", "nonsense", ""])
def test_weights_become_floating_point_only(dtype):
    with pytest.raises(
        ValueError, match="weights are one of float64, float32, float16, bfloat16, not"
    ):
        converted(np.ones(2), dtype, "w", Path("here"))


def test_conversion_gives_contiguous_arrays_of_the_same_shape():
    x = np.arange(24.0).reshape(4, 6)
    for view in (x, x.T, x[::2, 1::3], x[:0], np.array(3.0), np.array(3.0, dtype=BF16)):
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            out = converted(view, dtype, "w", Path("here"))
            assert out.shape == view.shape
            assert out.dtype.name == dtype
            assert out.flags.c_contiguous
            np.testing.assert_array_equal(out.astype(np.float64), view.astype(np.float64))
