"""The training checkpoint: complete or absent, and rejected if it is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from conftest import to_host
from refllm.model.config import ModelConfig
from refllm.train import state as module
from refllm.train.optimizer import AdamW
from refllm.train.schedule import Phase, Plan
from refllm.train.state import State, load_state, save_state

CONFIG = ModelConfig("llama", 7, 8, 6, 1, 2, 1, 4, tie_word_embeddings=True, eos_token_ids=(0,))
PLAN = Plan((Phase(9, 2, 4),))


def some_state(xp=np, dtype: str = "float32", seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 4), "b": (5,)}
    groups = [
        {n: xp.asarray(rng.standard_normal(s).astype(dtype)) for n, s in shapes.items()}
        for _ in "wmv"
    ]
    return State(groups[0], AdamW(step=3, m=groups[1], v=groups[2]), [{"step": 3, "loss": 2.5}])


def same(a: State, b: State) -> bool:
    pairs = [(a.params, b.params), (a.optimizer.m, b.optimizer.m), (a.optimizer.v, b.optimizer.v)]
    return (
        a.optimizer.step == b.optimizer.step
        and a.curve == b.curve
        and all(x.keys() == y.keys() for x, y in pairs)
        and all(
            to_host(x[name]).tobytes() == to_host(y[name]).tobytes() for x, y in pairs for name in x
        )
        and all(x[name].dtype == y[name].dtype for x, y in pairs for name in x)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_trip_of_every_bit(xp, tmp_path, dtype):
    state = some_state(xp, dtype)
    save_state(state, tmp_path / "state.safetensors", CONFIG, PLAN)
    again, about = load_state(tmp_path / "state.safetensors")
    assert same(state, again)
    assert ModelConfig.from_hf(json.loads(about["config"])) == CONFIG
    assert json.loads(about["plan"])["phases"] == [
        {"steps": 9, "batch": 2, "length": 4, "repeats": [1]}
    ]
    # no temporary file is left
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "state.safetensors"
    save_state(some_state(), path, CONFIG, PLAN)
    return path.read_bytes()


@pytest.mark.theorem(
    "no proper prefix of a checkpoint is accepted as one", source="state.load_state"
)
@given(data=st.data())
def test_a_file_cut_anywhere_is_rejected(whole, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "state.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="is damaged or no training checkpoint"):
        load_state(path)


def test_an_interrupted_write_leaves_the_old_checkpoint_intact(monkeypatch, tmp_path, whole):
    """The process dies with half of the new file written: the name still means the old one."""
    path = tmp_path / "state.safetensors"
    save_state(some_state(seed=1), path, CONFIG, PLAN)

    def dies(tensors, filename, metadata):
        Path(filename).write_bytes(whole[: len(whole) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        save_state(some_state(seed=2), path, CONFIG, PLAN)
    assert same(load_state(path)[0], some_state(seed=1))
    monkeypatch.undo()
    save_state(some_state(seed=3), path, CONFIG, PLAN)  # and the interrupted write does not matter
    assert same(load_state(path)[0], some_state(seed=3))
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="the limit is POSIX's")
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, whole):
    import resource

    path = tmp_path / "state.safetensors"
    save_state(some_state(seed=1), path, CONFIG, PLAN)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores its signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"state\.safetensors cannot be written"):
            save_state(some_state(seed=2), path, CONFIG, PLAN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {path.name: before}


def test_the_bytes_are_on_the_disk_before_the_name_is(monkeypatch, tmp_path):
    order = []
    sync = os.fsync
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("name"), replace(a, b)))
    save_state(some_state(), tmp_path / "state.safetensors", CONFIG, PLAN)
    assert order == ["sync", "name"]


def write(path: Path, tensors: dict[str, np.ndarray], **metadata: str) -> None:
    save_file(tensors, path, metadata=metadata)


ABOUT = {"step": "3", "curve": "[]", "config": "{}", "plan": "{}"}
W = {"w.a": np.zeros(2, "float32")}
MOMENTS = {"m.a": np.zeros(2, "float32"), "v.a": np.zeros(2, "float32")}


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        (
            {"model.norm.weight": np.zeros(2, "float32")},
            ABOUT,
            "model",
        ),  # a model's file, not a run's
        ({"norm": np.zeros(2, "float32")}, ABOUT, "unpack"),
        (W | MOMENTS, {}, "no config, curve, plan, step"),
        (W | MOMENTS, {k: v for k, v in ABOUT.items() if k != "curve"}, "no curve"),
        (W | MOMENTS, ABOUT | {"step": "three"}, "three"),
        (W | MOMENTS, ABOUT | {"curve": "[{"}, "Expecting"),
        (W, ABOUT, "the moments are not those of the parameters"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_rejected(tmp_path, tensors, metadata, reason):
    path = tmp_path / "state.safetensors"
    write(path, tensors, **metadata)
    with pytest.raises(
        ValueError, match=r"state\.safetensors is damaged or no training checkpoint"
    ) as error:
        load_state(path)
    assert reason in str(error.value)


def test_the_tensors_of_the_file_have_the_documented_names(whole, tmp_path):
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    assert set(header) == {"__metadata__", *(f"{kind}.{name}" for kind in "wmv" for name in "ab")}
    assert set(header["__metadata__"]) == {"step", "curve", "config", "plan"}
