"""A GGUF file in several parts: the file that it was, whichever part is named, and every way
in which parts do not belong together.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle
from refllm.formats.gguf.parts import open_gguf, part_names
from refllm.formats.gguf.reader import GGUFError, GGUFFile
from refllm.formats.gguf.writer import write

NAMES = ["a.weight", "b.weight", "c.weight", "d.weight", "e.weight"]
METADATA = {"general.architecture": "llama", "x.ids": np.arange(3, dtype=np.int32)}


def tensor(name: str) -> np.ndarray:
    rng = np.random.default_rng(NAMES.index(name))
    return rng.standard_normal((3, NAMES.index(name) + 1)).astype(np.float32)


def split(folder: Path, cuts: list[int], stem: str = "m", **changes: object) -> list[Path]:
    """Parts whose tensors end at ``cuts``; ``changes`` maps "NO.key" to another value of the
    split entries, None leaves one out.
    """
    paths = []
    ends = [*cuts, len(NAMES)]
    for i, (first, last) in enumerate(zip([0, *cuts], ends, strict=True)):
        entries: dict[str, object] = {
            "split.no": np.uint16(i),
            "split.count": np.uint16(len(ends)),
            "split.tensors.count": np.int32(len(NAMES)),
        }
        for key, value in changes.items():
            if key.startswith(f"{i}."):
                entries[key.partition(".")[2]] = value
        entries = {key: value for key, value in entries.items() if value is not None}
        if i == 0:
            entries = METADATA | entries
        plan = {name: ("F32", tensor(name).shape) for name in NAMES[first:last]}
        path = folder / f"{stem}-{i + 1:05d}-of-{len(ends):05d}.gguf"
        write(path, entries, plan, lambda name: tensor(name).view(np.uint8))
        paths.append(path)
    return paths


@pytest.mark.theorem(
    "A file in parts is the file that it was before, whichever part is named",
    source="llama-gguf-split",
)
@given(
    cuts=st.lists(st.integers(0, len(NAMES)), min_size=1, max_size=4).map(sorted),
    number=st.integers(0, 4),
)
def test_any_part_opens_all(tmp_path_factory, cuts, number):
    folder = tmp_path_factory.mktemp("parts")
    paths = split(folder, cuts)  # parts may hold no tensor at all
    with open_gguf(paths[min(number, len(cuts))]) as file:
        assert list(file) == NAMES
        assert len(file) == len(NAMES)
        assert "a.weight" in file
        assert file.metadata["general.architecture"] == "llama"
        for name in NAMES:
            assert file.tensors[name].shape == tensor(name).shape
            np.testing.assert_array_equal(file[name].view(np.float32), tensor(name))
        held = file["e.weight"]
    np.testing.assert_array_equal(held.view(np.float32), tensor("e.weight"))
    with pytest.raises(AttributeError):
        file["a.weight"]  # all parts are closed


def test_a_name_with_the_pattern_in_it_twice(tmp_path):
    stem = "x-00001-of-00002.gguf-y\n"
    path = split(tmp_path, [2], stem)[1]
    with open_gguf(path) as file:
        assert list(file) == NAMES
    assert part_names("m-00001-of-00002.gguf", 1, 2) is None
    assert part_names("m-00002-of-00003.gguf", 1, 2) is None
    assert part_names("m-2-of-2.gguf", 1, 2) is None
    assert part_names("m-00002-of-00002.bin", 1, 2) is None


@pytest.mark.parametrize("count", [np.uint16(0), np.uint16(1), None])
def test_a_file_in_one_part(tmp_path, count):
    entries = METADATA if count is None else METADATA | {"split.count": count}
    plan = {"a.weight": ("F32", tensor("a.weight").shape)}
    write(tmp_path / "x.gguf", entries, plan, lambda name: tensor(name).view(np.uint8))
    with open_gguf(tmp_path / "x.gguf") as file:
        assert type(file) is GGUFFile
        assert list(file) == ["a.weight"]


def test_missing_parts_are_named(tmp_path):
    paths = split(tmp_path, [1, 2, 3])
    paths[2].unlink()
    for path in (paths[0], paths[3]):
        with pytest.raises(
            GGUFError, match=r"of 4, and m-00003-of-00004.gguf is missing beside it: download all"
        ):
            open_gguf(path)
    paths[0].unlink()
    with pytest.raises(GGUFError, match=r"m-00001-of-00004.gguf, m-00003-of-00004.gguf are m"):
        open_gguf(paths[1])
    renamed = paths[1].rename(tmp_path / "x.gguf")
    with pytest.raises(GGUFError, match=r"its name does not end in -00002-of-00004.gguf: give all"):
        open_gguf(renamed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.split.no": None}, "the entry split.no is None, not an integer"),
        ({"0.split.no": "0"}, "the entry split.no is '0', not an integer"),
        ({"0.split.count": "two"}, "the entry split.count is 'two', not an integer"),
        ({"0.split.count": np.bool_(True)}, "the entry split.count is np.True_, not an integer"),
        ({"0.split.count": np.int32(-2)}, "the entry split.count is -2, which makes no sense"),
        ({"0.split.count": np.uint64(2**63)}, "which makes no sense"),
        ({"0.split.no": np.uint16(1)}, "is part 2 of 2, but its name does not end in -00002-of"),
        (
            {"1.split.no": np.uint16(0)},
            "says that it is part 1 of 2: the parts belong to diff",
        ),
        ({"1.split.count": np.uint16(3)}, "says that it is part 2 of 3: the parts belong"),
        ({"1.split.count": None}, "the entry split.count is None, not an integer"),
        ({"0.split.tensors.count": np.int32(6)}, "hold 6 tensors, but they hold 5"),
        ({"0.split.tensors.count": np.float32(5)}, "split.tensors.count is np.float32"),
    ],
)
def test_parts_that_do_not_belong_together_are_rejected(tmp_path, changes, message):
    path = split(tmp_path, [2], **changes)[0]
    with pytest.raises(GGUFError) as error:
        open_gguf(path)
    assert message in str(error.value)


def test_a_tensor_in_two_parts_is_rejected(tmp_path):
    paths = split(tmp_path, [2])
    other = split(tmp_path, [1], "other", **{"1.split.tensors.count": None})
    other[1].replace(paths[1])
    with pytest.raises(GGUFError, match="holds 'b.weight', which m-00001-of-00002.gguf holds too"):
        open_gguf(paths[0])


@pytest.mark.oracle
def test_what_the_gguf_package_writes_in_parts_is_read(tmp_path):
    gguf = oracle("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_string("x.name", "whole")
    for name in NAMES:
        writer.add_tensor(name, tensor(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "m-00003-of-00003.gguf") as file:
        assert list(file) == NAMES
        assert file.metadata["x.name"] == "whole"
        for name in NAMES:
            np.testing.assert_array_equal(file[name].view(np.float32), tensor(name))
