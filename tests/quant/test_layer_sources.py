"""Layers come from memory and from files alike, one at a time, and only where the files are
a whole checkpoint.
"""

from __future__ import annotations

import numpy as np
import pytest

from conftest import to_host
from networks import NETWORKS, random_tensors, tokenizer
from refllm.checkpoints.loading import load
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.writer import save
from refllm.model.llama import PROJECTIONS
from refllm.quant.layer_io import CheckpointSource, MemorySink, ModelSource


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "m"
    save(
        path,
        NETWORKS["qwen2"],
        random_tensors(NETWORKS["qwen2"], 0, "float32"),
        tokenizer(),
        dtype="float16",
    )
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_files_give_what_the_loaded_model_has(directory, dtype):
    model = load(directory, dtype=dtype)
    memory = ModelSource(model.config, model.weights)
    with CheckpointSource(str(directory), dtype=dtype) as files:
        assert files.config == memory.config
        rows = files.rows([5, 0, 5])
        assert rows.dtype == dtype
        np.testing.assert_array_equal(rows, memory.rows([5, 0, 5]))
        for index in (2, 0):
            a = files.layer(index)
            b = memory.layer(index)
            assert a.keys() == b.keys() == model.weights["layers"][index].keys()
            for key in a:
                x, y = ((w[key].dequantize() if key in PROJECTIONS else w[key]) for w in (a, b))
                assert x.dtype == dtype
                np.testing.assert_array_equal(x, y)


def test_a_layer_may_be_changed_without_changing_the_model(xp):
    model = load_tiny(xp)
    source = ModelSource(model["config"], model["weights"])
    layer = source.layer(1)
    layer["q_proj"] = None
    assert model["weights"]["layers"][1]["q_proj"] is not None
    assert to_host(source.rows([1, 2])).shape == (2, 40)


def load_tiny(xp):
    from refllm.model.llama import build

    config = NETWORKS["llama"]
    tensors = {name: xp.asarray(t) for name, t in random_tensors(config, 0).items()}
    return {"config": config, "weights": build(config, tensors)}


def test_what_is_no_checkpoint_is_refused_at_once(tmp_path, directory):
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointSource(tmp_path / "nothing")
    save(
        tmp_path / "m",
        NETWORKS["llama"],
        random_tensors(NETWORKS["llama"], 0, "float32"),
        tokenizer(),
    )
    (tmp_path / "m" / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(CheckpointError, match="bias"):
        CheckpointSource(tmp_path / "m")


def test_a_list_keeps_layers_in_their_order():
    sink = MemorySink()
    assert sink.done(0) is None
    sink.put(0, {"a": 1}, [])
    sink.put(1, {"a": 2}, [])
    assert sink.layers == [sink.layer(0), sink.layer(1)] == [{"a": 1}, {"a": 2}]
