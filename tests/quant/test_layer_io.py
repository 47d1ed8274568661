"""Layers come from memory and from files alike, one at a time; layers on disk are read back as
they were written, and what is not whole is done again.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import to_host
from networks import NETWORKS, VOCAB, random_tensors, tokenizer
from refllm.checkpoints.loading import load
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.writer import save
from refllm.formats.layouts import layout_for
from refllm.formats.uniform import Scheme
from refllm.model.llama import PROJECTIONS
from refllm.quant import layer_io
from refllm.quant.export import ExportSpec
from refllm.quant.layer_io import CheckpointSource, LayerFiles, MemorySink, ModelSource
from refllm.quant.recipe import quantize_layers, settings


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


def test_what_is_no_checkpoint_is_rejected_at_once(tmp_path, directory):
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


SCHEME = Scheme(4, "half_integer", "group", 8)
IDS = np.random.default_rng(1).integers(0, VOCAB, (3, 20))
STORING = ExportSpec(layout_for(SCHEME, "pack-quantized"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("layers") / "m"
    save(
        path,
        NETWORKS["qwen2"],
        random_tensors(NETWORKS["qwen2"], 0, "float32"),
        tokenizer(),
        dtype="float16",
    )
    with CheckpointSource(path) as source:
        yield source


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """The folder of a run that is done, and its report."""
    folder = tmp_path_factory.mktemp("finished") / "work"
    return folder, run(source, folder)


def opened(source, folder, **changed) -> LayerFiles:
    return LayerFiles(folder, source, STORING, settings("gptq", SCHEME, IDS) | changed)


def run(source, folder, sink=None):
    return quantize_layers(source, sink or opened(source, folder), "gptq", SCHEME, IDS)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run, to be damaged."""
    shutil.copytree(finished[0], tmp_path / "work")
    return tmp_path / "work"


def test_layers_from_disk_are_those_that_were_put_there(source, finished):
    sink = MemorySink()
    folder, report = finished
    run(source, None, sink)
    files = opened(source, folder)
    for index, expected in enumerate(sink.layers):
        assert files.done(index) == [t for t in report.tensors if t.layer == index]
        read = files.layer(index)
        assert read.keys() == expected.keys()
        for key in read:
            pair = [
                layer[key].dequantize() if key in PROJECTIONS else layer[key]
                for layer in (read, expected)
            ]
            np.testing.assert_array_equal(*pair, err_msg=key)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])  # one of them is a line's end


def turn(path):
    """One bit of the last byte."""
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def forget_digest(path):
    path.write_text(json.dumps({"rows": json.loads(path.read_text())["rows"]}))


@pytest.mark.theorem(
    "a layer is trusted only if its record is whole and its tensors have the recorded "
    "digest; all others are done "
    "again, and the run ends with the same bytes",
    source="ARCHITECTURE.md",
)
@pytest.mark.parametrize(
    ("name", "damage", "found"),
    [
        ("layer-00001.safetensors", cut, 1),
        ("layer-00001.safetensors", turn, 1),
        ("layer-00001.safetensors", lambda path: path.unlink(), 1),
        ("layer-00001.json", cut, 1),
        ("layer-00001.json", forget_digest, 1),
        ("layer-00001.json", lambda path: path.write_text("[]"), 1),
        (
            "layer-00001.json",
            lambda path: path.unlink(),
            0,
        ),  # nothing is claimed: not counted as distrusted
    ],
)
def test_what_is_not_whole_is_done_again(source, finished, folder, name, damage, found):
    damage(folder / name)
    before = (folder / "layer-00000.safetensors").stat().st_mtime_ns
    sink = opened(source, folder)
    assert [sink.done(index) is None for index in range(3)] == [False, True, False]
    assert sink.redone == found
    run(source, folder)
    assert (folder / "layer-00000.safetensors").stat().st_mtime_ns == before
    for index in range(3):
        file = f"layer-{index:05}.safetensors"
        assert (folder / file).read_bytes() == (finished[0] / file).read_bytes()


def test_a_record_gets_its_name_when_the_tensors_are_on_the_disk(
    source, finished, tmp_path, monkeypatch
):
    """Also their names: a directory is flushed after each, as a power failure would show."""
    layer = opened(source, finished[0]).layer(0)
    sink = opened(source, tmp_path / "layers")
    events: list[str] = []
    replace = os.replace

    def named(old, new):
        events.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", named)
    monkeypatch.setattr(layer_io, "sync_directory", lambda path: events.append(path.name))
    sink.put(0, layer, [])
    assert events == ["layer-00000.safetensors", "layers", "layer-00000.json", "layers"]


def test_a_file_that_was_being_written_is_no_layer(source, folder):
    shutil.move(folder / "layer-00002.safetensors", folder / "layer-00002.partial")
    (folder / "layer-00002.json").unlink()
    assert opened(source, folder).done(2) is None


def test_another_run_is_not_gone_on_with(source, folder):
    with pytest.raises(
        CheckpointError, match="a run with another calibration: choose another folder, or remove it"
    ):
        opened(source, folder, calibration=None)
    with pytest.raises(CheckpointError, match="another method and options"):
        opened(source, folder, method="rtn", options={})
    (folder / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged: remove .* to start again"):
        opened(source, folder)
    (folder / "settings.json").unlink()
    with pytest.raises(CheckpointError, match="holds something else than a run's layers"):
        opened(source, folder)


def test_a_folder_that_is_empty_or_not_there_is_taken(source, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep"):
        assert opened(source, tmp_path / name).done(0) is None
