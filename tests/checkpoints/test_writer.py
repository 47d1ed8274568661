"""Writing checkpoints: round trips, the exact files, and what is left when it fails
halfway.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from networks import random_tensors
from refllm.checkpoints import writer
from refllm.checkpoints.loading import iter_tensors, load
from refllm.checkpoints.tensor_files import INDEX, SINGLE, CheckpointError, TensorFiles
from refllm.checkpoints.tokenizer import MissingTokenizer, Tokenizer
from refllm.checkpoints.writer import save
from refllm.model.config import ModelConfig
from strategies import model_configs, seeds

CONFIG = ModelConfig(
    "llama", 300, 8, 12, 2, 4, 2, 4, tie_word_embeddings=True, bos_token_id=0, eos_token_ids=(0,)
)
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def f(x):\n    return x\n" * 3], 270)


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return random_tensors(CONFIG, 0, "float32")


def tree(directory: Path) -> dict[str, bytes]:
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
    }


# --- round trips --------------------------------------------------------------------------


@pytest.mark.theorem(
    "what is written is read back: float32 bit for bit, float16 and bfloat16 as rounded "
    "once, in one file or in "
    "shards of any size, with the same config and the same tokens",
    source="round trip",
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model_configs(),
    seeds,
    st.sampled_from(writer.STORED_TYPES),
    st.one_of(st.none(), st.integers(1, 4000)),
    st.data(),
)
def test_round_trip(tmp_path_factory, tokenizer, config, seed, dtype, limit, data):
    config = replace(
        config,
        vocab_size=tokenizer.vocab_size + data.draw(st.integers(0, 3)),
        eos_token_ids=data.draw(st.sampled_from([(), (0,), (0, 5)])),
    )
    given_tensors = random_tensors(config, seed, data.draw(st.sampled_from(["float32", "float64"])))
    path = tmp_path_factory.mktemp("round") / "model"
    save(path, config, given_tensors, tokenizer, dtype=dtype, max_shard_bytes=limit)

    stored = dict(iter_tensors(path))
    assert list(stored) == list(given_tensors)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    for name, tensor in given_tensors.items():
        assert stored[name].dtype == kind
        np.testing.assert_array_equal(stored[name], tensor.astype(kind))
    checkpoint = load(path, dtype="float64")
    assert checkpoint.config == config
    assert checkpoint.tokenizer.encode("return f(x)") == tokenizer.encode("return f(x)")
    head = given_tensors[
        "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    ]
    np.testing.assert_array_equal(
        checkpoint.weights["lm_head"].dequantize(), head.astype(kind).astype(np.float64)
    )

    shards = sorted(path.glob("*.safetensors"))
    previous = None  # bytes of the shard before
    for shard in shards:
        # the library's own reader, and its own checks
        with safe_open(shard, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = [stored[name].nbytes for name in file.keys()]  # noqa: SIM118 (it is no mapping)
        assert limit is None or sum(sizes) <= limit or len(sizes) == 1
        with TensorFiles(path) as files:
            first = next(stored[name].nbytes for name in given_tensors if files.file(name) == shard)
        # a shard is full before the next begins
        assert previous is None or previous + first > limit
        previous = sum(sizes)
    if len(shards) > 1:
        index = json.loads((path / INDEX).read_text())
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    else:
        assert [shard.name for shard in shards] == [SINGLE]
        assert not (path / INDEX).exists()


def test_arrays_that_are_not_contiguous_are_written_in_their_order(tmp_path, tokenizer, tensors):
    """The library's own writer takes a transposed array's memory as it lies and swaps its
    elements.
    """
    strided = {name: np.ascontiguousarray(t.T).T for name, t in tensors.items()}
    assert not strided["model.embed_tokens.weight"].flags.c_contiguous
    save(tmp_path / "m", CONFIG, strided, tokenizer, dtype="float32")
    for name, stored in iter_tensors(tmp_path / "m"):
        np.testing.assert_array_equal(stored, tensors[name])


def test_device_arrays_are_written(tmp_path, xp, tokenizer, tensors):
    save(
        tmp_path / "m",
        CONFIG,
        {k: xp.asarray(v) for k, v in tensors.items()},
        tokenizer,
        dtype="float32",
    )
    for name, stored in iter_tensors(tmp_path / "m"):
        np.testing.assert_array_equal(stored, tensors[name])


@pytest.mark.parametrize("dtype", writer.STORED_TYPES)
def test_files_are_what_other_programs_expect(tmp_path, tokenizer, tensors, dtype):
    save(
        tmp_path / "m",
        CONFIG,
        tensors,
        tokenizer,
        dtype=dtype,
        extra_files={"README.md": "A card — ok\n"},
    )
    assert set(tree(tmp_path / "m")) == FILES | {SINGLE, "README.md"}
    read = {name: json.loads((tmp_path / "m" / name).read_text(encoding="utf-8")) for name in FILES}
    assert read["config.json"]["torch_dtype"] == dtype
    assert read["config.json"]["architectures"] == ["LlamaForCausalLM"]
    assert read["generation_config.json"] == {"bos_token_id": 0, "eos_token_id": 0}
    assert read["tokenizer_config.json"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (
        read["tokenizer_config.json"]["eos_token"]
        == read["tokenizer_config.json"]["bos_token"]
        == "<|endoftext|>"
    )
    assert (tmp_path / "m" / "README.md").read_text(encoding="utf-8") == "A card — ok\n"
    raw = (tmp_path / "m" / SINGLE).read_bytes()
    # the data can be mapped where it begins
    assert (8 + int.from_bytes(raw[:8], "little")) % 8 == 0


def test_shards_are_named_as_transformers_names_them(tmp_path, tokenizer, tensors):
    """One tensor per shard, counted from one, in the order of the network."""
    save(tmp_path / "m", CONFIG, tensors, tokenizer, max_shard_bytes=1)
    count = len(tensors)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert sorted(p.name for p in (tmp_path / "m").glob("*.safetensors")) == names
    weight_map = json.loads((tmp_path / "m" / INDEX).read_text())["weight_map"]
    assert list(weight_map.items()) == list(zip(tensors, names, strict=True))


def test_wide_types_come_first_so_that_every_tensor_is_aligned(tmp_path):
    """Otherwise in the order that is given; zero bytes and scalars have a place too."""
    data = {
        "a": np.arange(3, dtype=np.int8),
        "b": np.arange(3, dtype=np.float16),
        "c": np.arange(5, dtype=np.int64),
        "d": np.ones((2, 1), dtype=np.float32),
        "e": np.zeros((0, 4), dtype=np.float32),
        "f": np.array(7.5, dtype=np.float16),
        "g": np.arange(2, dtype=np.int64),
    }
    specs = {name: (tensor.dtype.name, tensor.shape) for name, tensor in data.items()}
    writer.write_file(tmp_path / "x.safetensors", specs, data.__getitem__)
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    assert list(header) == ["c", "g", "d", "e", "b", "f", "a"]
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert (8 + length + begin) % data[name].itemsize == 0
        assert raw[8 + length + begin : 8 + length + end] == data[name].tobytes()
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert all(np.array_equal(file.get_tensor(name), data[name]) for name in data)


@pytest.mark.parametrize("wrong", [np.zeros(3, "float16"), np.zeros((3, 1)), np.zeros(4)])
def test_a_tensor_that_is_not_as_it_was_announced_is_a_mistake_of_the_caller(tmp_path, wrong):
    with pytest.raises(AssertionError, match=r"a: float.* is not the float64 \(3,\) of its spec"):
        writer.write_file(tmp_path / "x", {"a": ("float64", (3,))}, lambda _: wrong)


def test_a_tied_head_is_stored_once(tmp_path, tokenizer, tensors):
    both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    save(tmp_path / "m", CONFIG, both, tokenizer)
    with TensorFiles(tmp_path / "m") as files:
        assert "lm_head.weight" not in files
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight differs from .*tie_word_embeddings"
    ):
        save(
            tmp_path / "n",
            CONFIG,
            both | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1},
            tokenizer,
        )


def test_a_checkpoint_is_copied_one_tensor_at_a_time(tmp_path, tokenizer):
    """``tensors`` may be files: each is read, converted and written before the next."""
    config = replace(CONFIG, hidden_size=128, intermediate_size=512, num_hidden_layers=16)
    tensors = random_tensors(config, 0, "float32")
    save(tmp_path / "m", config, tensors, tokenizer, dtype="float32")
    total = sum(t.nbytes for t in tensors.values())
    largest = max(t.nbytes for t in tensors.values())
    del tensors
    with TensorFiles(tmp_path / "m") as files:
        tracemalloc.start()
        try:
            save(
                tmp_path / "n",
                config,
                files,
                tokenizer,
                dtype="bfloat16",
                max_shard_bytes=2_000_000,
            )
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 4 * largest + 3_000_000 < total / 2  # the rest is what pytest allocates meanwhile


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_files_get_the_permissions_that_new_files_get(tmp_path, tokenizer, tensors):
    save(tmp_path / "m", CONFIG, tensors, tokenizer)
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "directory").stat().st_mode
    assert {p.stat().st_mode for p in (tmp_path / "m").iterdir()} == {
        (tmp_path / "file").stat().st_mode
    }


# --- what is rejected ----------------------------------------------------------------------

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def changed(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[3] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed(NORM, 65520.0),
            r"'model\.norm\.weight' holds 65520, beyond the largest float16, 65504",
        ),
        (
            changed(EMBEDDING, -1e5),
            r"'model\.embed_tokens\.weight' holds 100000, beyond the largest float16",
        ),
        (
            changed(NORM, math.nan),
            r"'model\.norm\.weight' holds 1 values that are NaN or infinite, the first at \(3,\)",
        ),
        (lambda t: t.pop(NORM), r"'model\.norm\.weight' is missing"),
        (
            lambda t: t.update({NORM: np.ones(9)}),
            r"'model\.norm\.weight' has shape \(9,\), but config\.json says \(8,\)",
        ),
        (lambda t: t.update({"other": np.ones(9)}), r"no llama network .* has the tensor 'other':"),
        (
            lambda t: t.update({NORM: np.ones(8, dtype=np.int64)}),
            r"'model\.norm\.weight' has type int64",
        ),
    ],
    ids=["overflow", "negative overflow", "nan", "missing", "shape", "left over", "integers"],
)
def test_tensors_that_do_not_fit_are_rejected_by_name(
    tmp_path, tokenizer, tensors, change, message
):
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        save(tmp_path / "m", CONFIG, tensors, tokenizer)
    assert str(tmp_path / "m") in str(caught.value)
    assert "partial" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_largest_float16_is_written(tmp_path, tokenizer, tensors):
    changed(NORM, 65504.0)(tensors)
    save(tmp_path / "m", CONFIG, tensors, tokenizer)
    assert dict(iter_tensors(tmp_path / "m"))[NORM][3] == 65504.0


def test_a_tokenizer_larger_than_the_model_is_written_as_it_is(tmp_path, tokenizer):
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size - 1)
    save(tmp_path / "m", config, random_tensors(config, 0), tokenizer)
    assert load(tmp_path / "m").tokenizer.vocab_size == tokenizer.vocab_size


def test_a_model_without_a_tokenizer_is_written_without_one(tmp_path, tensors):
    save(tmp_path / "m", CONFIG, tensors, MissingTokenizer("m"))
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "config.json", "generation_config.json", SINGLE,
    }  # fmt: skip
    assert not load(tmp_path / "m").tokenizer.available


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", ".", "..", "/x", "config.json", "model.safetensors", "model-1.bin"]
)
def test_extra_files_are_plain_new_names(tmp_path, tokenizer, tensors, name):
    with pytest.raises(CheckpointError, match="plain new file name"):
        save(tmp_path / "m", CONFIG, tensors, tokenizer, extra_files={name: "x"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"dtype": "float64"}, {"max_shard_bytes": 0}])
def test_arguments_that_make_no_sense_are_rejected(tmp_path, tokenizer, tensors, wrong):
    with pytest.raises(ValueError, match="save: "):
        save(tmp_path / "m", CONFIG, tensors, tokenizer, **wrong)


# --- what stands there already ------------------------------------------------------------


def test_an_empty_directory_is_taken_and_parents_are_made(tmp_path, tokenizer, tensors):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        save(path, CONFIG, tensors, tokenizer)
        assert load(path).config == CONFIG


def test_nothing_is_overwritten_without_overwrite(tmp_path, tokenizer, tensors):
    save(tmp_path / "m", CONFIG, tensors, tokenizer)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="is not empty: .*overwrite=True"):
        save(tmp_path / "m", CONFIG, tensors, tokenizer, dtype="float32")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        save(tmp_path / "file", CONFIG, tensors, tokenizer, overwrite=True)
    (tmp_path / "file").unlink()
    assert tree(tmp_path) == before


def test_overwrite_replaces_a_checkpoint_and_nothing_else(tmp_path, tokenizer, tensors):
    save(
        tmp_path / "m",
        CONFIG,
        tensors,
        tokenizer,
        max_shard_bytes=500,
        extra_files={"old.txt": "x"},
    )
    save(tmp_path / "m", CONFIG, tensors, tokenizer, overwrite=True)
    assert set(tree(tmp_path)) == {f"m/{name}" for name in FILES | {SINGLE}}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").touch()
    with pytest.raises(
        CheckpointError, match=r"holds no config\.json: only a checkpoint is replaced"
    ):
        save(tmp_path / "home", CONFIG, tensors, tokenizer, overwrite=True)
    assert (tmp_path / "home" / "diary.txt").exists()


def test_a_link_stays_a_link(tmp_path, tokenizer, tensors):
    save(tmp_path / "real", CONFIG, tensors, tokenizer)
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", CONFIG, tensors, tokenizer, dtype="float32", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert {t.dtype.name for _, t in iter_tensors(tmp_path / "real")} == {"float32"}


@pytest.mark.theorem(
    "an error at any write, flush or rename leaves the old checkpoint or the new one, "
    "complete, and no other files",
    source="every step made to fail in turn",
)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which file a handle is")
def test_everything_is_on_the_disk_before_the_directory_gets_its_name(
    tmp_path, monkeypatch, tokenizer, tensors
):
    """And the name itself when ``save`` returns: a power failure at any time leaves the old
    checkpoint or the new one.
    """
    calls: list[tuple[str, str]] = []
    fsync = os.fsync
    rename = os.rename

    def synced(handle: int) -> None:
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        calls.append(("name", new.name))
        rename(old, new)
        calls.append(("named", new.name))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    save(tmp_path / "m", CONFIG, tensors, tokenizer, max_shard_bytes=500)
    at = calls.index(("name", "m"))
    files = {path.name for path in (tmp_path / "m").iterdir()}
    before = [name for kind, name in calls[:at] if kind == "sync"]
    assert files == set(before[:-1])
    assert before[-1].endswith(".partial")  # the new directory, with the names of its files
    assert calls[at + 1 :] == [("named", "m"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
def test_a_failure_at_any_step_leaves_a_complete_checkpoint(
    tmp_path, monkeypatch, tokenizer, tensors, existing
):
    new = {name: t + 1 for name, t in tensors.items()}
    save(tmp_path / "expected", CONFIG, new, tokenizer, max_shard_bytes=500)
    after = tree(tmp_path / "expected")
    outcomes = set()
    for failing in range(1000):
        home = tmp_path / str(failing)
        home.mkdir()
        if existing:
            save(home / "m", CONFIG, tensors, tokenizer)
        before = tree(home)
        left = failing  # steps that succeed

        def step(function, *args, **named):
            nonlocal left
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
            return function(*args, **named)

        with monkeypatch.context() as patch:
            for name in ("fsync", "rename"):
                patch.setattr(writer.os, name, partial(step, getattr(os, name)))
            try:
                save(home / "m", CONFIG, new, tokenizer, max_shard_bytes=500, overwrite=existing)
            except KeyboardInterrupt:
                pass
            else:
                break
        assert tree(home) in (before, {f"m/{name}": content for name, content in after.items()})
        outcomes.add(tree(home) == before)
        shutil.rmtree(home)
    # each file's sync, the directories' and the renames were made to fail
    assert failing > len(after)
    assert outcomes == {True, False}
    assert tree(home / "m") == after
