"""Records keep their provenance: round trip, and what has none is rejected."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.measure.records import Record, read, write

json_values = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text("aé漢"),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@given(values=json_values, kind=st.sampled_from(["A", "B", "C", "B, C"]))
def test_round_trip(tmp_path_factory, values, kind):
    path = tmp_path_factory.mktemp("records") / "deep" / "x.json"
    record = Record("make x", kind, "a machine", values)
    write(path, record)
    assert read(path) == record
    before = path.read_bytes()
    write(path, read(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_rejected_with_their_place(tmp_path, value):
    with pytest.raises(ValueError, match=r"values\.a\[1\]\.b"):
        write(tmp_path / "x.json", Record("make x", "A", "none", {"a": [0, {"b": value}]}))
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("command", "kind", "hardware"), [("", "A", "none"), ("x", "A", " "), ("x", "D", "none")]
)
def test_a_record_without_provenance_is_rejected(command, kind, hardware):
    with pytest.raises(ValueError, match="record"):
        Record(command, kind, hardware, {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"command": "x"}',
        '{"command": 1, "kind": "A", "oops": 2}',
        '{"command": 1, "kind": "A", "hardware": "none", "values": {}}',
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json: not a record"):
        read(path)


def test_provenance_reads_as_a_sentence():
    assert Record("make x", "A", "none", {}).provenance() == "Counted (A). Made by: make x"
    both = Record("make x", "B, C", "EPYC, 1 thread.", {})
    assert both.provenance() == "Measured (B) and projected (C). EPYC, 1 thread. Made by: make x"
