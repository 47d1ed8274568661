"""What the figure of observers says is what the observers do."""

from __future__ import annotations

import numpy as np
import pytest

from refllm.experiments import observer_ranges
from refllm.experiments.observer_ranges import batches, observed, observers, values
from refllm.formats.quantized_linear import fake_quantize
from refllm.formats.uniform import Scheme
from refllm.measure.records import read


def test_errors_and_cuts_are_those_of_the_ranges():
    parts = batches(1)
    x = np.concatenate(parts)
    for bits in (8, 4):
        rows = {row["observer"]: row for row in observed(parts, bits)}
        assert rows.keys() == observers(bits).keys()
        whole = rows["min-max"]
        assert whole["cut"] == np.abs(x).max()
        assert whole["beyond"] == 0
        nearest = fake_quantize(x[None], Scheme(bits, "half_integer", "tensor"))[0]
        assert whole["error"] == pytest.approx(
            np.sum((nearest - x) ** 2.0) / np.sum(x**2.0), rel=1e-4
        )
        for row in rows.values():
            assert row["cut"] <= whole["cut"]
            assert row["beyond"] == np.mean(np.abs(x) > np.float32(row["cut"]))
        # of all ranges that it tries, min-max among them, the search takes the best
        assert rows["MSE"]["error"] == min(row["error"] for row in rows.values())


def test_what_the_figure_shows():
    """At 8 bits cutting much costs more than it brings, at 4 bits not cutting does; and the
    first batch decides.
    """
    rows = {(row["bits"], row["observer"]): row for row in values()["rows"]}
    assert (
        rows[8, "min-max"]["error"]
        < rows[8, "entropy"]["error"]
        < rows[8, "percentile 99.9"]["error"]
    )
    assert rows[4, "min-max"]["error"] > 2 * rows[4, "entropy"]["error"]
    first = float(np.abs(batches()[0]).max())
    # 93 % of its weight, after eight batches
    assert abs(rows[8, "moving average"]["cut"] - first) < 0.5 * first
    assert rows[8, "min-max"]["cut"] > 5 * first


def test_the_density_is_one_and_the_command_writes_it(tmp_path):
    output = tmp_path / "observer_ranges.json"
    observer_ranges.main(["--output", str(output)])
    made = read(output).values
    share = np.sum(np.asarray(made["density"]) * np.diff(made["edges"]))
    assert 0.98 < share <= 1 + 1e-12  # the smallest elements lie before the first edge
    assert made["rows"] == values()["rows"]
    assert len(made["rows"]) == 2 * len(observers(8))
