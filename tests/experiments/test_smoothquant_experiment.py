"""The SmoothQuant experiment: its cases, that its networks are those of its cases,
and its record.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from refllm.api import Model
from refllm.checkpoints.writer import save
from refllm.experiments import held_out_bench, smoothquant
from refllm.experiments.held_out_bench import HeldOutBench
from refllm.experiments.smoothquant import Case, Experiment, cases
from refllm.formats.w8a8_linear import W8A8Linear
from refllm.measure.records import read
from refllm.model.weights import Dense
from refllm.quant.layer_io import ModelSource
from refllm.quant.smoothquant import LEVELS, activation_absmax
from tiny_models import byte_tokenizer, tiny_config, tiny_model, tiny_params


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    made = tiny_model(3, dtype="float32")
    return Experiment(
        HeldOutBench(Model(made.config, made.weights, made.tokenizer), "a digest", 3, 40, 2, 24)
    )


def test_the_cases_are_those_of_the_table():
    found = cases()
    assert len(found) == len(set(found)) == 3 + 3 * (4 + 6) + 4
    for level in LEVELS:
        assert {
            c.alpha for c in found if (c.outliers, c.level, c.keep) == ("norms", level, ())
        } == {None, *smoothquant.ALPHAS}
    assert found[0].name == "outliers in nothing, O1, not smoothed"
    assert found[-1].name == "outliers in MLP hidden, O1, alpha 0.5, down_proj kept"


def test_networks_with_outliers_compute_the_same_until_they_are_rounded(experiment):
    tokens = experiment.bench.text[0]
    model = experiment.bench.model
    exact = model.logits(tokens)

    def absmax(outliers: str, name: str) -> np.ndarray:
        """max |x| of each input channel of a projection of the first layer."""
        source = ModelSource(model.config, experiment.injected(outliers))
        return activation_absmax(source, experiment.bench.calibration(experiment.seed))[0][name]

    for outliers in ("norms", "MLP hidden"):
        weights = experiment.injected(outliers)
        # products of weights that lie elsewhere in memory may be added in another order
        again = Model(model.config, weights, model.tokenizer).logits(tokens)
        np.testing.assert_allclose(again, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
        name = "down_proj" if outliers == "MLP hidden" else "q_proj"
        grown = absmax(outliers, name) / absmax("nothing", name)
        expected = np.ones(len(grown))
        expected[experiment.channels(outliers)] = 128
        np.testing.assert_allclose(grown, expected, rtol=1e-4)


def test_a_row_is_the_network_that_its_case_says(experiment, tmp_path, monkeypatch):
    seen = []
    compare = held_out_bench.compare
    monkeypatch.setattr(
        held_out_bench, "compare", lambda m, *a, **k: seen.append(m) or compare(m, *a, **k)
    )
    wanted = [
        Case("norms", "O1", None),
        Case("norms", "O1", 0.5),
        Case("norms", "O3", 0.5, ("o_proj", "down_proj")),
        Case("nothing", "O2", None),
    ]
    rows = list(experiment.table(wanted, tmp_path))
    for row, model, case in zip(rows, seen, wanted, strict=True):
        assert row["increase"][0] == pytest.approx(
            row["bits per byte"] - row["full precision"], abs=1e-6
        )
        for layer in model.weights["layers"]:
            kept = [name for name, linear in layer.items() if isinstance(linear, Dense)]
            assert sorted(kept) == sorted(case.keep)
            assert isinstance(layer["q_proj"], W8A8Linear)
            assert (layer["q_proj"].static is not None) == (case.level == "O3")
    gains = [m.weights["layers"][0]["input_layernorm"] for m in seen]
    plain = experiment.bench.model.weights["layers"][0]["input_layernorm"]
    assert np.array_equal(gains[3], plain)
    assert np.abs(gains[0] / plain).max() == pytest.approx(128)
    assert not np.array_equal(gains[1], gains[0])
    assert list(experiment.table(wanted, tmp_path)) == rows  # from the cache
    assert len(seen) == 4


def test_outliers_break_what_smoothing_repairs(experiment):
    """KL; even on a random network of four heads."""
    broken, repaired = (
        experiment.measure(Case("norms", "O2", alpha))["kl"][0] for alpha in (None, 0.5)
    )
    assert broken > 5 * repaired
    hidden, kept = (
        experiment.measure(Case("MLP hidden", "O2", 0.5, k))["kl"][0] for k in ((), ("down_proj",))
    )
    assert hidden > 2 * kept  # no norm makes that input


def test_the_command_writes_what_the_figure_is_drawn_from(tmp_path, monkeypatch, capsys):
    directory = tmp_path / "tiny"
    save(
        directory,
        tiny_config(),
        tiny_params(tiny_config(), 0, "float32"),
        byte_tokenizer(),
        dtype="float32",
    )
    for name, value in (("LENGTH", 40), ("WINDOWS", 2), ("WINDOW", 24)):
        monkeypatch.setattr(held_out_bench, name, value)
    output = tmp_path / "smoothquant.json"
    paths = f"--model {directory} --output {output} --cache {tmp_path / 'c'}"
    smoothquant.main(f"{paths} --excerpts 2 --alphas 0.5 1".split())
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 + 3 * (4 + 1) + 4
    assert told[0].startswith("[1/22] outliers in nothing, O1, not smoothed: ")
    record = read(output)
    assert record.command == "python -m refllm.experiments.smoothquant"
    assert record.values["channels"].keys() == {"norms", "MLP hidden"}
    assert len(smoothquant.draw(record.values).axes) == 2


def test_the_committed_experiment_breaks_and_repairs():
    """Outliers of 128× cost at least 10 % of bits per byte; SmoothQuant at O1 and α = ½
    leaves less than 2 %.
    """
    values = read(
        Path(__file__).resolve().parents[2] / "figures" / "data" / "smoothquant.json"
    ).values
    loss = {
        (r["outliers"], r["level"], r["alpha"], tuple(r["keep"])): r["bits per byte"]
        / r["full precision"]
        - 1
        for r in values["rows"]
    }
    assert values["factor"] == 128
    assert [Case(*key) for key in loss] == cases()
    assert loss["norms", "O1", None, ()] >= 0.10
    assert loss["norms", "O1", 0.5, ()] <= 0.02
    # where no norm makes the input it does not help; keeping that input in floating point
    # does
    assert loss["MLP hidden", "O1", 0.5, ()] > 0.9 * loss["MLP hidden", "O1", None, ()] > 0.02
    assert loss["MLP hidden", "O1", 0.5, ("down_proj",)] <= 0.02


def test_each_dot_of_the_figure_is_that_of_its_case():
    """Every case has a KL and a loss of its own."""
    values = {"factor": 128.0, "rows": []}
    for i, case in enumerate(cases(), 1):
        row = {"outliers": case.outliers, "level": case.level, "alpha": case.alpha}
        row |= {"keep": list(case.keep), "kl": [i / 100, 0, 1], "full precision": 1.0}
        values["rows"].append(row | {"bits per byte": 1 + i / 100})
    place = {case: i for i, case in enumerate(cases(), 1)}
    both = ("o_proj", "down_proj")
    wanted = [
        Case("nothing", "O1", None),
        *(Case("norms", "O1", alpha, keep) for alpha in (None, 0.5) for keep in ((), both)),
        *(Case("MLP hidden", "O1", alpha) for alpha in (None, 0.5)),
        Case("MLP hidden", "O1", 0.5, ("down_proj",)),
    ]
    upper, lower = smoothquant.draw(values).axes
    assert [line.get_xdata()[0] for line in lower.lines] == [place[c] / 100 for c in wanted]
    texts = [text.get_text() for text in lower.texts]
    digits = [f"{place[c]:+.{0 if place[c] >= 10 else 1}f} %" for c in wanted]
    assert texts == [f"{text} bits per byte" for text in digits]
    dashed = [line.get_ydata()[0] for line in upper.lines if line.get_marker() == "None"]
    assert dashed == [place[Case("norms", level, None)] / 100 for level in LEVELS]
