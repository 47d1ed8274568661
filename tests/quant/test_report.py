"""The report adds up what its rows say, and its errors are what their definitions say."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import to_host
from refllm.formats.quantized_linear import quantize
from refllm.formats.uniform import Scheme
from refllm.model.weights import Dense
from refllm.quant.report import Report, TensorReport, relative_error, row

SCHEME = Scheme(4, "half_integer", "group", 8)


def made(layer: int, name: str, nbytes: int, **more) -> TensorReport:
    options = {"weight_error": 0.25, "output_error": None, "loss": None, "seconds": 0.5} | more
    return TensorReport(layer, name, "rtn", (6, 16), nbytes, **options)


def test_totals_are_the_sums_of_the_rows():
    report = Report(
        "rtn", SCHEME, (made(0, "q_proj", 60), made(1, "down_proj", 84, note="odd")), 2.0
    )
    assert (report.nbytes, report.weights, report.bits_per_weight) == (144, 192, 6.0)
    assert [t.bits for t in report.tensors] == [5.0, 7.0]
    assert report.notes == ["model.layers.1.mlp.down_proj: odd"]
    assert Report("rtn", SCHEME, (), 0.0).bits_per_weight == 0.0


def test_the_table_has_a_line_a_tensor_and_one_for_all():
    rows = (made(0, "q_proj", 60), made(10, "down_proj", 84, output_error=0.001234, loss=12.5))
    lines = Report("rtn", SCHEME, rows, 2.0).table().splitlines()
    assert len(lines) == 4
    assert lines[0].split() == [
        "tensor",
        "shape",
        "bits",
        "weight",
        "error",
        "output",
        "error",
        "loss",
        "s",
    ]
    assert lines[1].split() == [
        "model.layers.0.self_attn.q_proj",
        "6",
        "×",
        "16",
        "5.000",
        "0.25",
        "-",
        "-",
        "0.50",
    ]
    assert lines[2].split()[4:] == ["7.000", "0.25", "0.00123", "12.5", "0.50"]
    assert lines[3].split() == ["all", "192", "6.000", "2.00"]
    assert len({len(line) for line in lines}) == 1  # numbers end in one column


def test_errors_are_relative_sums_of_squares(xp):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 16))
    x = rng.standard_normal((5, 16))
    q = quantize(xp.asarray(weight), SCHEME)
    found = row(3, "v_proj", "rtn", xp.asarray(weight), q, xp.asarray(x), 1.5, 7.0, "note")
    off = to_host(q.dequantize()) - weight
    assert found.weight_error == pytest.approx((off**2).sum() / (weight**2).sum(), rel=1e-12)
    assert found.output_error == pytest.approx(
        ((x @ off.T) ** 2).sum() / ((x @ weight.T) ** 2).sum(), rel=1e-9
    )
    assert (found.layer, found.name, found.method, found.loss, found.note) == (
        3,
        "v_proj",
        "rtn",
        7.0,
        "note",
    )
    assert (found.shape, found.nbytes, found.seconds) == ((6, 16), q.nbytes, 1.5)
    assert found.tensor == "model.layers.3.self_attn.v_proj"
    assert (
        row(
            0, "v_proj", "rtn", xp.asarray(weight), Dense(xp.asarray(weight)), None, 0.0
        ).output_error
        is None
    )


def test_an_error_relative_to_nothing():
    zero = np.zeros((2, 2))
    one = np.ones((2, 2))
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, one) == np.inf
    assert relative_error(one, zero) == 1.0
