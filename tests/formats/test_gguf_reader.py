"""GGUF files: written as the gguf package writes them, read back, and rejected when they
lie.
"""

from __future__ import annotations

import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz_gguf
from conftest import oracle
from gguf_data import K_QUANTS, LEGACY
from refllm.formats.gguf import reader
from refllm.formats.gguf.codec import quantize
from refllm.formats.gguf.reader import GGUFError, GGUFFile, parse
from refllm.formats.gguf.writer import write
from strategies import build

METADATA = {
    "general.architecture": "llama",
    "general.name": "größer",
    "a.u8": np.uint8(7),
    "a.i8": np.int8(-7),
    "a.u16": np.uint16(700),
    "a.i16": np.int16(-700),
    "a.u32": np.uint32(7),
    "a.i32": np.int32(-7),
    "a.f32": np.float32(0.1),
    "a.true": True,
    "a.u64": np.uint64(2**60),
    "a.i64": np.int64(-(2**60)),
    "a.f64": np.float64(0.1),
    "a.words": ["", "a", "ü" * 40],
    "a.numbers": np.arange(5, dtype=np.int32),
    "a.floats": np.linspace(0, 1, 3, dtype=np.float32),
    "a.flags": np.array([True, False]),
}


def tensors():
    x = build("normal", (3, 512), 0)
    made = {
        f"blk.{i}.weight": (type, (3, 512), quantize(x, type))
        for i, type in enumerate((*LEGACY, *K_QUANTS, "F16"))
    }
    made["norm.weight"] = ("F32", (7,), quantize(x[:1, :7], "F32"))
    made["cube"] = ("F32", (2, 3, 5), quantize(build("normal", (6, 5), 1), "F32"))
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    made = tensors()
    write(
        path,
        METADATA,
        {name: (type, shape) for name, (type, shape, _) in made.items()},
        lambda name: made[name][2],
    )
    return path


def test_what_was_written_is_read(file):
    with GGUFFile(file) as read:
        assert list(read.metadata) == list(METADATA)
        for key, value in METADATA.items():
            found = read.metadata[key]
            assert np.array_equal(found, value), key
            assert isinstance(value, (bool, str, list)) or found.dtype == value.dtype
        assert read.metadata["a.true"].dtype == np.dtype(bool)
        assert list(read) == list(tensors())
        for name, (type, shape, raw) in tensors().items():
            assert (read.tensors[name].type.name, read.tensors[name].shape) == (type, shape)
            assert read.tensors[name].start % 32 == 0
            np.testing.assert_array_equal(read[name].reshape(-1), raw.reshape(-1))
        assert read["cube"].shape == (2, 3, 20)
        assert "cube" in read
        assert "dice" not in read
        assert len(read) == len(tensors())


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_files_equal_the_gguf_packages(file, tmp_path):
    gguf = oracle("gguf")
    made = gguf.GGUFWriter(str(tmp_path / "b.gguf"), "llama")
    types = gguf.GGUFValueType
    for key, value in list(METADATA.items())[1:]:
        if isinstance(value, np.generic):
            made.add_key_value(key, value.item(), types[value.dtype.name.upper()])
        elif isinstance(value, np.ndarray):
            sub = types["BOOL" if value.dtype == bool else value.dtype.name.upper()]
            made.add_key_value(key, value.tolist(), types.ARRAY, sub_type=sub)
        elif isinstance(value, list):
            made.add_array(key, value)
        else:
            (made.add_bool if isinstance(value, bool) else made.add_string)(key, value)
    for name, (type, shape, raw) in tensors().items():
        shaped = raw.reshape(*shape[:-1], -1)
        made.add_tensor(
            name,
            shaped
            if type not in ("F32", "F16")
            else shaped.view({"F32": np.float32, "F16": np.float16}[type]),
            raw_dtype=gguf.GGMLQuantizationType[type],
        )
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    assert (tmp_path / "b.gguf").read_bytes() == file.read_bytes()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_the_gguf_package_reads_the_same(file):
    reader = oracle("gguf").GGUFReader(str(file))
    with GGUFFile(file) as ours:
        assert [t.name for t in reader.tensors] == list(ours)
        for tensor in reader.tensors:
            assert tensor.data_offset == ours.tensors[tensor.name].start
            assert tuple(int(n) for n in tensor.shape[::-1]) == ours.tensors[tensor.name].shape


# --- invalid files ------------------------------------------------------------------------


def entry(key, type_id, raw):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", type_id) + raw


def record(name=b"t", shape=(32,), type_id=0, offset=0):
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)
    )


def whole(entries=(), records=(), data=b"\0" * 128, *, version=3, tensors=None, count=None):
    head = struct.pack(
        "<IQQ",
        version,
        len(records) if tensors is None else tensors,
        len(entries) if count is None else count,
    )
    text = b"GGUF" + head + b"".join(entries) + b"".join(records)
    return text + b"\0" * (-len(text) % 32) + data


HUGE = 2**64 - 1
INVALID = {
    "does not begin with 'GGUF'": b"GGML" + b"\0" * 60,
    "is of GGUF version 1;": whole(version=1),
    "is of GGUF version 4;": whole(version=4),
    "is of GGUF version 0;": whole(version=0),
    "is a big-endian GGUF file": whole(version=3 << 24),
    "claims 18,446,744,073,709,551,615 tensors": whole(tensors=HUGE),
    "claims 18,446,744,073,709,551,615 entries": whole(count=HUGE),
    "claims 100,000 tensors, more than the file": whole(tensors=100_000),
    "the key of entry 0 claims to be 70,000 bytes": whole([entry(b"a" * 70_000, 4, b"\0" * 4)]),
    "entry 0 has no key": whole([entry(b"", 4, b"\0" * 4)]),
    "the key of entry 0 is not valid UTF-8": whole([entry(b"\xff\xff", 4, b"\0" * 4)]),
    "the key 'a' occurs twice": whole([entry(b"a", 4, b"\0" * 4)] * 2),
    "the value of 'a' has type 13": whole([entry(b"a", 13, b"\0" * 4)]),
    "the value of 'a' needs 4,611,686,018,427,387,904": whole(
        [entry(b"a", 9, struct.pack("<IQ", 4, 2**60))]
    ),
    "the value of 'a' needs 8,000,000,000,000 bytes": whole(
        [entry(b"a", 9, struct.pack("<IQ", 8, 10**12))]
    ),
    "the value of 'a' is an array of type 9": whole(
        [entry(b"a", 9, struct.pack("<IQ", 9, 1) + b"\0" * 99)]
    ),
    "the value of 'a' needs 18,446,744,073,709,551,615": whole(
        [entry(b"a", 8, struct.pack("<Q", HUGE))]
    ),
    "a bool that is neither": whole([entry(b"a", 7, b"\x02")]),
    "general.alignment is np.uint32(0)": whole(
        [entry(b"general.alignment", 4, struct.pack("<I", 0))]
    ),
    "general.alignment is np.uint32(24)": whole(
        [entry(b"general.alignment", 4, struct.pack("<I", 24))]
    ),
    "general.alignment is '32'": whole(
        [entry(b"general.alignment", 8, struct.pack("<Q", 2) + b"32")]
    ),
    "the name in tensor record 0 claims to be 64 bytes": whole(records=[record(b"t" * 64)]),
    "'t' has 5 dimensions": whole(records=[record(shape=(1, 1, 1, 1, 32))]),
    "'t' has 0 dimensions": whole(records=[record(shape=())]),
    "'t' has shape (0,)": whole(records=[record(shape=(0,))]),
    "'t' is stored as IQ2_XXS": whole(records=[record(type_id=16)]),
    "'t' is stored as type 99": whole(records=[record(type_id=99)]),
    "'t' has shape (33,), which Q4_0 cannot": whole(records=[record(shape=(33,), type_id=2)]),
    "'t' has shape (4294967296, 4294967296), more": whole(records=[record(shape=(2**32, 2**32))]),
    "more than the whole file": whole(records=[record(shape=(HUGE, HUGE, HUGE, HUGE))]),
    "'t' begins at 32 after the first tensor": whole(records=[record(offset=32)]),
    "'u' begins at 140 after": whole(
        records=[record(shape=(35,)), record(b"u", offset=140)], data=b"\0" * 400
    ),
    "the tensor 't' occurs twice": whole(records=[record(), record(offset=128)], data=b"\0" * 256),
    "'t' ends beyond the end of the file": whole(records=[record()], data=b"\0" * 127),
    "the value of 'a' claims 4,194,305 strings": whole(
        [entry(b"a", 9, struct.pack("<IQ", 8, 2**22 + 1))], data=b"\0" * (8 * 2**22 + 99)
    ),
}


@pytest.mark.parametrize("message", INVALID)
def test_an_invalid_file_costs_one_message_and_no_memory(message, tmp_path):
    data = INVALID[message]
    (tmp_path / "x.gguf").write_bytes(data)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(GGUFError) as error:
        GGUFFile(tmp_path / "x.gguf")
    assert time.process_time() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20  # the file itself is mapped, not read
    tracemalloc.stop()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_the_honest_file_is_read():
    header = parse(
        whole(
            [entry(b"a", 4, b"\1\0\0\0")],
            [record(), record(b"u", (2, 16), offset=128)],
            b"\0" * 256,
        )
    )
    assert header.metadata == {"a": 1}
    assert {name: r.shape for name, r in header.tensors.items()} == {"t": (32,), "u": (16, 2)}


def strings(*words):
    """An array of strings as a value."""
    return struct.pack("<IQ", 8, len(words)) + b"".join(
        struct.pack("<Q", len(word)) + word for word in words
    )


ENTRIES = [
    entry(b"a", 4, b"\1\0\0\0"),
    entry(b"n", 9, struct.pack("<IQ3h", 3, 3, 1, -2, 3)),
    entry(b"s", 9, strings(b"x", b"", "ü".encode())),
    entry(b"last", 8, struct.pack("<Q", 2) + b"ok"),
]


@pytest.mark.parametrize("count", range(1, 5))
def test_a_file_may_end_with_the_last_byte_of_its_header(tmp_path, count):
    """Without tensors there is nothing to be aligned. One byte less is one too few."""
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, count) + b"".join(ENTRIES[:count])
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with GGUFFile(path) as file:
        assert len(file) == 0
        assert list(file.metadata) == ["a", "n", "s", "last"][:count]
        if count == 4:
            assert file.metadata["n"].tolist() == [1, -2, 3]
            assert file.metadata["s"] == ["x", "", "ü"]
            assert file.metadata["last"] == "ok"
    for size in range(4, len(data)):
        with pytest.raises(GGUFError):
            parse(data[:size])


def test_the_smallest_file_has_24_bytes(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with GGUFFile(path) as file:
        assert (len(file), file.metadata, file.alignment) == (0, {}, 32)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 2, 0, 0))
    GGUFFile(path)


def test_the_last_tensor_ends_with_the_file_and_its_header_does_not(tmp_path):
    header = whole(records=[record()], data=b"")
    assert parse(header + b"\0" * 128).tensors["t"].nbytes == 128
    for data in (header + b"\0" * 127, header, header.rstrip(b"\0")):
        with pytest.raises(GGUFError):
            parse(data)


def test_limits_are_attained(monkeypatch):
    """What a limit names is read, one more is not."""
    long = entry(b"a" * 65535, 4, b"\0" * 4)
    assert list(parse(whole([long])).metadata) == ["a" * 65535]
    with pytest.raises(GGUFError, match="65,536 bytes long, at most 65,535"):
        parse(whole([entry(b"a" * 65536, 4, b"\0" * 4)]))
    assert list(parse(whole(records=[record(b"t" * 63)])).tensors) == ["t" * 63]
    four = record(shape=(4, 2, 2, 2))
    assert parse(whole(records=[four])).tensors["t"].shape == (2, 2, 2, 4)
    two = [record(), record(b"u", offset=128)]
    data = whole([entry(b"a", 0, b"\1"), entry(b"b", 0, b"\2")], two, b"\0" * 256)
    for name in ("MOST_ENTRIES", "MOST_TENSORS"):
        monkeypatch.setattr(reader, name, 2)
        assert len(parse(data).metadata) == len(parse(data).tensors) == 2
        monkeypatch.setattr(reader, name, 1)
        with pytest.raises(GGUFError, match=f"claims 2 {name[5:].lower()}"):
            parse(data)
        monkeypatch.setattr(reader, name, 2)


def test_strings_are_counted_over_all_arrays(monkeypatch):
    monkeypatch.setattr(reader, "MOST_STRINGS", 5)
    two, three, four = (entry(b"%d" % n, 9, strings(*[b"w"] * n)) for n in (2, 3, 4))
    assert parse(whole([two, three])).metadata == {"2": ["w"] * 2, "3": ["w"] * 3}
    for entries in ([three, four], [four, two], [entry(b"6", 9, strings(*[b"w"] * 6))]):
        with pytest.raises(GGUFError, match="more than any vocabulary has"):
            parse(whole(entries))
    # numbers are bounded by the bytes of the file alone
    many = entry(b"n", 9, struct.pack("<IQ", 0, 99) + b"\7" * 99)
    assert parse(whole([many, two])).metadata["n"].tolist() == [7] * 99


def test_a_name_is_as_long_as_its_bytes(tmp_path):
    """40 letters of two bytes are 80 bytes; 31 of them and an a are 63, the longest name."""
    long = "ü" * 40
    with pytest.raises(GGUFError, match="the name in tensor record 0 claims to be 80 bytes"):
        parse(whole(records=[record(long.encode())]))
    with pytest.raises(ValueError, match="write: GGUF cannot hold 'üüü"):
        write(tmp_path / "x", {}, {long: ("F32", (1,))}, lambda name: np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match="write: GGUF cannot hold 'üüü"):
        write(tmp_path / "x", {}, {"ü" * 32: ("F32", (1,))}, lambda name: np.zeros(4, np.uint8))
    longest = "ü" * 31 + "a"
    write(tmp_path / "x", {}, {longest: ("F32", (1,))}, lambda name: np.arange(4, dtype=np.uint8))
    with GGUFFile(tmp_path / "x") as file:
        assert file[longest].tolist() == [0, 1, 2, 3]


def aligned(value, type_id=4, code="<I"):
    return entry(b"general.alignment", type_id, struct.pack(code, value))


@pytest.mark.parametrize("alignment", [1, 8, 64, 1 << 20])
def test_tensors_begin_at_multiples_of_the_files_alignment(alignment):
    offset = -(-12 // alignment) * alignment
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 1) + aligned(alignment)
    head += record(shape=(3,)) + record(b"u", (2,), offset=offset)
    first = -(-len(head) // alignment) * alignment
    data = head + b"\0" * (first - len(head) + offset + 8)
    found = parse(data)
    assert found.alignment == alignment
    assert [r.start for r in found.tensors.values()] == [first, first + offset]
    with pytest.raises(GGUFError, match="'u' ends beyond the end"):
        parse(data[:-1])


def test_other_alignments_are_rejected():
    for made in (aligned(1 << 21), aligned(3), aligned(32, 10, "<Q"), aligned(32, 5, "<i")):
        with pytest.raises(GGUFError, match=r"general\.alignment is .* a power of two, as a u32"):
            parse(whole([made]))


def test_bools_are_bools():
    found = parse(whole([entry(b"a", 9, struct.pack("<IQ3B", 7, 3, 1, 0, 1))])).metadata["a"]
    assert (found.dtype, found.tolist()) == (np.dtype(bool), [True, False, True])
    assert parse(whole([entry(b"a", 9, struct.pack("<IQ", 7, 0))])).metadata["a"].size == 0
    with pytest.raises(GGUFError, match="a bool that is neither 0 nor 1"):
        parse(whole([entry(b"a", 9, struct.pack("<IQ3B", 7, 3, 1, 0, 2))]))


@given(st.data())
def test_every_prefix_of_a_file_is_rejected(file, data):
    raw = file.read_bytes()
    with pytest.raises(GGUFError):
        parse(raw[: data.draw(st.integers(0, len(raw) - 33))])


def test_short_files_are_rejected(tmp_path):
    for size in (0, 3, 23):
        (tmp_path / "x").write_bytes((b"GGUF" + b"\0" * 30)[:size])
        with pytest.raises(GGUFError, match=f"has {size} bytes, fewer than"):
            GGUFFile(tmp_path / "x")


def test_mutated_files_end_in_an_error_or_are_read():
    """A short run; ``python tests/fuzz_gguf.py`` is the long one."""
    seen = fuzz_gguf.run(3000, seed=0)
    assert seen["files"] == 3000 == seen["read"] + seen["rejected"]
    assert seen["past the magic"] >= 1500
    assert min(seen["read"], seen["rejected"]) > 100
    assert seen["slowest"] < 1


# --- what is not written ------------------------------------------------------------------


def test_values_without_a_type_are_rejected(tmp_path):
    for value in (3, 0.5, None, [1, 2], {"a": 1}, np.zeros((2, 2)), np.complex64(1)):
        with pytest.raises(ValueError, match="the value of 'a' has no GGUF type"):
            write(tmp_path / "x", {"a": value}, {}, lambda name: None)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_do_not_fit_are_rejected(tmp_path):
    for name, shape in (("t" * 64, (1,)), ("t", ()), ("t", (1, 1, 1, 1, 1)), ("t", (0, 3))):
        with pytest.raises(ValueError, match="GGUF cannot hold"):
            write(tmp_path / "x", {}, {name: ("F32", shape)}, lambda name: None)
    with pytest.raises(ValueError, match="Q4_0 stores blocks of 32"):
        write(tmp_path / "x", {}, {"t": ("Q4_0", (3, 33))}, lambda name: None)


def test_values_of_either_byte_order_and_empty_arrays_are_written(tmp_path):
    metadata = {
        "big": np.arange(3, dtype=">i4"),
        "one": np.array(7, dtype=">u2"),
        "none": np.zeros(0, dtype=np.float32),
        "words": [],
        "no": False,
        "flag": np.bool_(True),
    }
    write(tmp_path / "x", metadata, {}, lambda name: None)
    with GGUFFile(tmp_path / "x") as file:
        assert file.metadata["big"].tolist() == [0, 1, 2]
        assert file.metadata["one"] == 7
        assert file.metadata["none"].shape == (0,)
        assert file.metadata["words"] == []
        assert (file.metadata["no"], file.metadata["flag"]) == (False, True)


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")

    def read(name):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write(path, {}, {"t": ("F32", (3,))}, read)
    with pytest.raises(AssertionError, match="not the 12 of the plan"):
        write(path, {}, {"t": ("F32", (3,))}, lambda name: np.zeros(3, np.uint8))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
