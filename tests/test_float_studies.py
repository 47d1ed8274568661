"""The studies of small floats: rows of formats, where each wins, and 8-bit training that goes on where it stopped."""

from __future__ import annotations

import numpy as np
import pytest

from refllm.model.config import ModelConfig
from refllm.study import floats, fp8_training
from refllm.study.records import Record, write


def test_rows_of_formats():
    """More bits of one kind of format, less error; and a format whose groups do not fit is passed over."""
    w = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)
    found = {name: (bits, error) for name, bits, error, _ in floats.rows(w)}
    assert set(found) == set(floats.FORMATS)
    for more, less in (("GGUF Q8_0", "GGUF Q4_0"), ("GGUF Q6_K", "GGUF Q4_K"), ("MXFP8", "MXFP4")):
        assert found[more][0] > found[less][0]
        assert found[more][1] < found[less][1]
    assert found["FP8 E4M3, blocks of 128 × 128"][1] < found["FP8 E5M2, blocks of 128 × 128"][1]
    assert "GGUF Q4_K" not in [row[0] for row in floats.rows(w[:, :128])]


def test_what_is_counted(tmp_path):
    made = floats.values()
    assert made["data"]["normal"]["int8"] < made["data"]["normal"]["e4m3"]
    assert made["data"]["one outlier channel"]["int8"] > made["data"]["one outlier channel"]["e4m3"]
    never, often, wide = made["accumulator"].values()
    assert never[-1] > 10 * often[-1] > 100 * wide[-1]
    assert made["delayed"] == sorted(made["delayed"])
    assert made["delayed"][0] == 0
    write(tmp_path / "r.json", Record("x", "A", "none", made))


def test_training_goes_on_and_is_compared(tmp_path, monkeypatch):
    config = ModelConfig("llama", 40, 16, 24, 1, 2, 1, 8, tie_word_embeddings=True)
    text = np.random.default_rng(0).integers(0, 40, 400)
    monkeypatch.setattr(fp8_training, "SAVE", 2)
    runs: dict = {}
    for method, seed in fp8_training.RUNS[:3]:
        curve = fp8_training.losses(config, text, method, seed, tmp_path, steps=4, batch=1, length=16)
        assert len(curve) == 4
        assert curve == fp8_training.losses(config, text, method, seed, tmp_path, steps=4, batch=1, length=16)
        runs.setdefault(method, {})[str(seed)] = curve
    assert runs["tile"]["0"] != runs["float32"]["0"]
    made = fp8_training.values(runs, {"tile": 0.1}, last=2)
    plain = [sum(runs["float32"][s][-2:]) / 2 for s in "01"]
    assert made["spread of seeds"] == pytest.approx(max(plain) / min(plain) - 1)
    assert made["against float32"]["tile"]["0"] == pytest.approx(sum(runs["tile"]["0"][-2:]) / 2 / plain[0] - 1)


def test_gradient_errors():
    from refllm.model.train import initialize

    config = ModelConfig("llama", 40, 16, 24, 1, 2, 1, 8, tie_word_embeddings=True)
    params = initialize(config, np.random.default_rng(0))
    found = fp8_training.gradient_errors(params, config, np.random.default_rng(1).integers(0, 40, (2, 17)))
    assert set(found) == {"tile", "tensor", "E5M2 gradients"}
    assert all(0 < error < 0.5 for error in found.values())
