"""The experiments on small floats: rows of formats, where each wins, and 8-bit training that
continues where it stopped.
"""

from __future__ import annotations

import numpy as np
import pytest

from refllm.checkpoints.loading import iter_tensors, read_config
from refllm.checkpoints.sources import locate
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.corpus import held_out_documents
from refllm.experiments import float_formats, fp8_training
from refllm.measure.records import Record, write
from refllm.model.config import ModelConfig
from refllm.train.backward import loss_and_gradients
from refllm.train.loop import initialize


def test_rows_of_formats():
    """More bits of one kind of format, less error; and a format whose groups do not fit is
    left out.
    """
    w = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)
    found = {name: (bits, error) for name, bits, error, _ in float_formats.rows(w)}
    assert set(found) == set(float_formats.FORMATS)
    for more, less in (("GGUF Q8_0", "GGUF Q4_0"), ("GGUF Q6_K", "GGUF Q4_K"), ("MXFP8", "MXFP4")):
        assert found[more][0] > found[less][0]
        assert found[more][1] < found[less][1]
    assert found["FP8 E4M3, blocks of 128 × 128"][1] < found["FP8 E5M2, blocks of 128 × 128"][1]
    assert "GGUF Q4_K" not in [row[0] for row in float_formats.rows(w[:, :128])]


def test_what_is_counted(tmp_path):
    made = float_formats.values()
    assert made["data"]["normal"]["int8"] < made["data"]["normal"]["e4m3"]
    assert made["data"]["one outlier channel"]["int8"] > made["data"]["one outlier channel"]["e4m3"]
    never, often, wide = made["accumulator"].values()
    assert never[-1] > 10 * often[-1] > 100 * wide[-1]
    assert made["delayed"] == sorted(made["delayed"])
    assert made["delayed"][0] == 0
    write(tmp_path / "r.json", Record("x", "A", "none", made))


CONFIG = ModelConfig("llama", 40, 16, 24, 1, 2, 1, 8, tie_word_embeddings=True)


def test_training_continues_and_is_compared(tmp_path, monkeypatch):
    text = np.random.default_rng(0).integers(0, 40, 400)
    monkeypatch.setattr(fp8_training, "SAVE", 2)
    runs: dict = {}
    for start, method, seed in fp8_training.RUNS[:3] + fp8_training.RUNS[-2:-1]:
        first = fp8_training.first_weights(CONFIG, {}, start, method, seed)
        work = tmp_path / f"{method}{seed}"
        curve = fp8_training.losses(
            CONFIG, text, first, method, 1e-3, work, steps=4, batch=1, length=16
        )
        assert len(curve) == 4
        assert curve == fp8_training.losses(
            CONFIG, text, {}, method, 1e-3, work, steps=4, batch=1, length=16
        )
        runs.setdefault(start, {}).setdefault(method, {})[str(seed)] = curve
    of = runs["random weights"]
    assert of["tile"]["0"] != of["float32"]["0"]
    made = fp8_training.values(runs, last=2)
    plain = [sum(of["float32"][s][-2:]) / 2 for s in "02"]
    off = made["against float32"]["random weights"]
    assert made["spread of seeds"]["random weights"] == pytest.approx(max(plain) / min(plain) - 1)
    assert off["tile"]["0"] == pytest.approx(sum(of["tile"]["0"][-2:]) / 2 / plain[0] - 1)
    assert abs(off["nudged"]["0"]) < 1e-5  # chance alone, before it has grown


def test_seeds_change_first_weights_and_a_nudge_hardly_does():
    made = [
        fp8_training.first_weights(CONFIG, {}, "random weights", *run)["model.embed_tokens.weight"]
        for run in (("float32", 0), ("tile", 0), ("nudged", 0), ("float32", 1))
    ]
    np.testing.assert_array_equal(made[0], made[1])
    assert 0 < np.max(np.abs(made[2] - made[0])) < 1e-5 * np.max(np.abs(made[0]))
    assert not np.allclose(made[3], made[0], rtol=0.1)


def params():
    return initialize(CONFIG, np.random.default_rng(0))


def test_training_does_not_write_into_the_bundled_weights():
    bundled = params()
    first = fp8_training.first_weights(CONFIG, bundled, "bundled weights", "float32", 0)
    for name, t in first.items():
        np.testing.assert_array_equal(t, bundled[name])
        assert not np.shares_memory(t, bundled[name])


def test_gradient_errors():
    found = fp8_training.gradient_errors(
        params(), CONFIG, np.random.default_rng(1).integers(0, 40, (2, 17))
    )
    assert set(found) == {"tile", "tensor", "E5M2 gradients"}
    assert all(0 < error < 0.5 for error in found.values())
    assert found["E5M2 gradients"] > found["tile"]


def test_outliers_change_no_loss_in_float32_and_hurt_one_scale_per_tensor():
    """The other tiles have no outlier; the tensor has, and its other values fall below
    E4M3's smallest.
    """
    directory = locate("stdlib")
    config = read_config(directory)
    held = next(iter(held_out_documents())).text
    network = {name: np.asarray(t) for name, t in iter_tensors(directory, dtype="float32")}
    tokens = np.array([Tokenizer.from_file(directory / "tokenizer.json").encode(held)[:129]])
    plain, _ = loss_and_gradients(network, config, tokens)
    assert (
        loss_and_gradients(fp8_training.with_outliers(network, config, 2.0**16), config, tokens)[0]
        == plain
    )
    found = fp8_training.outlier_losses(network, config, tokens, powers=(0, 16))
    assert found["tensor"][1] > 0.1 > 3 * max(abs(found["tensor"][0]), abs(found["tile"][0]))
    assert found["tensor"][1] > 3 * abs(found["tile"][1])
