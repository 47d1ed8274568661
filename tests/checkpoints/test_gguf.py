"""Loading a GGUF file: names, row orders, copies, and every entry that can be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gguf_files import CONFIG, make, tensors_of
from networks import LLAMA3, full_logits
from refllm.checkpoints.gguf import GGUFTensors, load, open_file
from refllm.checkpoints.gguf_names import config_metadata, gguf_name
from refllm.checkpoints.gguf_rope import ROPE_FACTORS, rope_factors
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.formats.gguf.codec import quantize
from refllm.formats.gguf.linear import GGUFLinear
from refllm.formats.gguf.writer import write
from refllm.model.config import ModelConfig
from refllm.model.rope import rope_frequencies

# --- what is read -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_plain_weights_are_those_that_were_written(tmp_path, dtype):
    expected = tensors_of(CONFIG)
    with open_file(make(tmp_path / "x.gguf")) as file:
        tensors = GGUFTensors(file, None, dtype)
        assert set(tensors) == set(expected)
        assert len(tensors) == len(expected)
        for name, tensor in expected.items():
            assert tensors[name].dtype == dtype
            np.testing.assert_array_equal(tensors[name], tensor)
        with pytest.raises(KeyError):
            tensors["model.layers.2.mlp.up_proj.weight"]
        assert GGUFTensors(file, None, None)["model.norm.weight"].dtype == "float32"


@pytest.mark.parametrize("type", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_file_that_is_overwritten_after_loading_changes_no_weight(tmp_path, type, dtype):
    """Weights are copied out of the mapped file, quantised ones too: the same bytes of the
    disk may become another model while this one answers.
    """
    path = make(tmp_path / "x.gguf", type=type)
    config, weights, *_ = load(path, np, dtype)
    layer = weights["layers"][1]
    assert isinstance(layer["up_proj"], GGUFLinear) is (type == "Q8_0")
    before = full_logits(weights, config)
    codes = {key: np.array(layer[key].dequantize()) for key in ("q_proj", "up_proj")}
    with path.open("r+b") as file:  # in place: the map of an old file would show it
        size = path.stat().st_size
        file.seek(size // 8)
        file.write(b"\xff" * (size - size // 8))
    for key, expected in codes.items():
        np.testing.assert_array_equal(layer[key].dequantize(), expected)
    np.testing.assert_array_equal(full_logits(weights, config), before)


def test_quantised_rows_of_q_and_k_come_in_the_order_of_hugging_face(tmp_path):
    expected = tensors_of(CONFIG)
    with open_file(make(tmp_path / "x.gguf", type="Q8_0")) as file:
        tensors = GGUFTensors(file, np, "float32")
        for part in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.1.self_attn.{part}.weight"
            weight = tensors[name]
            assert isinstance(weight, GGUFLinear)
            largest = np.abs(expected[name]).max()
            # half a scale, and a scale that is rounded to float16
            np.testing.assert_allclose(
                weight.dequantize(), expected[name], rtol=0, atol=largest / 127
            )


def test_rope_factors_divide_the_frequencies(tmp_path):
    config = replace(CONFIG, rope_scaling=LLAMA3)
    factors = rope_factors(config)
    assert factors is not None
    path = make(tmp_path / "x.gguf", config, extra={ROPE_FACTORS: factors})
    loaded, weights, *_ = load(path, np, "float64")
    assert loaded.rope_scaling == LLAMA3
    expected = rope_frequencies(16, config.rope_theta, LLAMA3)
    np.testing.assert_allclose(weights["rope_frequencies"], expected, rtol=2**-23)


# --- what is rejected ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "factors",
    [
        [1, 1, 1, 1, 1, 1, 1, -2],
        [0, 1, 1, 1, 1, 1, 1, 1],
        [1] * 7,
        [1] * 9,
    ],
    ids=["negative", "zero", "too few", "too many"],
)
def test_rope_factors_that_make_no_sense_are_rejected(tmp_path, factors):
    path = make(tmp_path / "x.gguf", extra={ROPE_FACTORS: np.array(factors, "float32")})
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight must hold 8 positive factors"):
        load(path, np, "float32")


@pytest.mark.parametrize(
    ("metadata", "extra", "sentence"),
    [
        ({}, ["blk.0.attn_q.bias"], r"has the tensor 'blk\.0\.attn_q\.bias': to ignore it"),
        ({}, ["output_norm.bias", "x"], r"has the tensor 'output_norm\.bias' and 1 more: to"),
        (
            {"llama.block_count": np.uint32(3)},
            [],
            r"'blk\.2\.attn_norm\.weight' is missing, .*of 3",
        ),
        ({"llama.embedding_length": np.uint32(32)}, [], r"'token_embd\.weight' has shape"),
        ({"llama.embedding_length": None}, [], r"entry llama\.embedding_length is missing$"),
        ({"llama.attention.causal": np.False_}, [], r"causal is False: only causal"),
    ],
)
def test_sentences_use_the_files_own_names(tmp_path, metadata, extra, sentence):
    tensors = {name: np.ones(64, "float32") for name in extra}
    path = make(tmp_path / "x.gguf", metadata=metadata, extra=tensors)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load(path, np, "float32")
    assert not any(word in str(caught.value) for word in ("config.json", "model.", "np."))


@pytest.mark.parametrize("count", ["two", np.float32(1.0), np.array([1, 1], "uint16"), ["1"]])
def test_a_count_of_parts_is_an_integer(tmp_path, count):
    path = make(tmp_path / "x.gguf", metadata={"split.count": count})
    with pytest.raises(CheckpointError, match=r"the entry split.count is .*, not an integer"):
        open_file(path)


def test_a_network_in_two_parts_is_that_of_one_file(tmp_path):
    whole = make(tmp_path / "x.gguf", type="Q8_0")
    config, weights, *_ = load(whole, np, "float32")
    expected = full_logits(weights, config)
    with open_file(whole) as file:
        names = list(file)
        for i, part in enumerate((names[:9], names[9:])):
            plan = {name: (file.tensors[name].type.name, file.tensors[name].shape) for name in part}
            entries = {"split.no": np.uint16(i), "split.count": np.uint16(2)}
            if i == 0:
                entries = file.metadata | entries
            path = tmp_path / f"x-0000{i + 1}-of-00002.gguf"
            write(path, entries, plan, lambda name: np.array(file[name]))
    for i in (1, 2):
        config, weights, *_ = load(tmp_path / f"x-0000{i}-of-00002.gguf", np, "float32")
        np.testing.assert_array_equal(full_logits(weights, config), expected)
    (tmp_path / "x-00001-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"x-00001-of-00002.gguf is missing beside it"):
        load(tmp_path / "x-00002-of-00002.gguf", np, "float32")


@pytest.mark.parametrize("count", [np.uint16(0), np.uint16(1), None])
def test_a_file_in_one_part_says_so_or_nothing(tmp_path, count):
    assert len(open_file(make(tmp_path / "x.gguf", metadata={"split.count": count}))) == 21


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"y\.gguf cannot be read: No such file"):
        open_file(tmp_path / "y.gguf")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_named_with_its_row(tmp_path, value):
    path = make(tmp_path / "x.gguf", type="Q8_0")
    with open_file(path) as file:
        record = file.tensors["blk.1.ffn_up.weight"]
        width = record.nbytes // record.shape[0]
    raw = bytearray(path.read_bytes())
    at = record.start + 95 * width  # the last row
    raw[at : at + 2] = np.float16(value).tobytes()
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight holds scales that are NaN or"):
        load(path, np, "float32")


def test_a_bad_scale_beyond_the_first_group_is_found(tmp_path):
    """The row that is named begins the group of rows that are interleaved."""
    config = replace(CONFIG, vocab_size=70_000, tie_word_embeddings=True)
    path = make(tmp_path / "x.gguf", config, "Q8_0")
    with open_file(path) as file:
        record = file.tensors["token_embd.weight"]
    raw = bytearray(path.read_bytes())
    at = record.start + record.nbytes - 34
    raw[at : at + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(raw)
    group = (1 << 19) // 64
    with pytest.raises(CheckpointError, match=f"from row {69_999 // group * group} on"):
        load(path, np, "float32")


def test_a_quantised_vector_is_rejected(tmp_path):
    """GGUF allows it; a norm has no quantised form here."""
    path = tmp_path / "x.gguf"
    make(tmp_path / "plain.gguf")
    with open_file(tmp_path / "plain.gguf") as file:
        plan = {name: (r.type.name, r.shape) for name, r in file.tensors.items()}
        data = {name: np.array(file[name]).reshape(-1) for name in file}
        plan["output_norm.weight"] = ("Q8_0", (64,))
        data["output_norm.weight"] = quantize(np.ones((1, 64), "float32"), "Q8_0").reshape(-1)
        write(path, file.metadata, plan, data.__getitem__)
    with pytest.raises(CheckpointError, match=r"output_norm.weight is quantised, but no matrix"):
        load(path, np, "float32")


def make_with(path: Path, config: ModelConfig, metadata: Mapping[str, object]) -> Path:
    """A file of the random network with these entries of the tokenizer."""
    data = {}
    plan = {}
    for name, tensor in tensors_of(config).items():
        data[gguf_name(name)] = quantize(np.atleast_2d(tensor), "F32").reshape(-1)
        plan[gguf_name(name)] = ("F32", tensor.shape)
    write(path, config_metadata(config, "x") | metadata, plan, data.__getitem__)
    return path


def resident(path: Path) -> int:
    """Bytes of a mapped file that count as this process's memory."""
    total = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line[:1].isupper():  # the line of a mapping, with its file
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="smaps is Linux's")
def test_the_files_pages_do_not_count_beside_the_copies(tmp_path):
    config = replace(CONFIG, vocab_size=70_000, tie_word_embeddings=True)
    path = make(tmp_path / "x.gguf", config, "Q8_0")
    with open_file(path) as file:
        record = file.tensors["token_embd.weight"]
        before = bytes(file["token_embd.weight"].reshape(-1))
        assert resident(path) >= record.nbytes - (1 << 16)
        file.forget("token_embd.weight")
        rest = path.stat().st_size - record.nbytes + (1 << 16)  # the header, the edges
        assert resident(path) < rest
        assert bytes(file["token_embd.weight"].reshape(-1)) == before  # read again
        weight = GGUFTensors(file, None, None)["model.embed_tokens.weight"]
        assert resident(path) < rest
        assert bytes(weight.raw.reshape(-1)) == before
