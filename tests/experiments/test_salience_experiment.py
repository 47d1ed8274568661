"""The 1 % experiment on a network: what is kept is kept, and the rest is round to nearest."""

from __future__ import annotations

import numpy as np
import pytest

from refllm.api import Model
from refllm.checkpoints.writer import save
from refllm.experiments import held_out_bench, salience
from refllm.experiments.held_out_bench import HeldOutBench
from refllm.experiments.salience import Choice, Experiment, choices
from refllm.formats.uniform import Scheme
from refllm.measure.comparison import compare
from refllm.measure.records import read
from refllm.quant.recipe import quantize_model
from refllm.quant.salience import BY
from tiny_models import byte_tokenizer, tiny_config, tiny_model, tiny_params

SCHEME = Scheme(3, "half_integer", "group", 8)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    made = tiny_model(3, dtype="float32")
    return Experiment(
        HeldOutBench(Model(made.config, made.weights, made.tokenizer), "a digest", 3, 40, 2, 24),
        SCHEME,
    )


def test_the_choices_are_fractions_by_ways_of_choosing():
    found = choices()
    assert len(found) == len(set(found)) == (1 + 3 * (1 + 1 + 3)) + (1 + 5)
    assert {c.by for c in found} == {None, *BY}
    assert all((c.seed is None) == (c.by != "random") for c in found)
    assert {c.fraction for c in found if c.network == "planted"} == {0.0, 0.01}
    assert found[1].name == "as it is, 1% by activation"
    assert found[-1].name == "planted, 1% by random, seed 2"


def test_keeping_none_is_round_to_nearest_and_keeping_all_is_the_network(experiment):
    row = experiment.measure(Choice("as it is", None, 0.0))
    quantised, _ = quantize_model(experiment.bench.model, "rtn", SCHEME, scale_dtype=None)
    found = compare(
        quantised, experiment.bench.reference, experiment.bench.text, rng=np.random.default_rng(0)
    )
    assert row["kl"] == pytest.approx([found.kl.mean, found.kl.low, found.kl.high], rel=1e-3)
    everything = experiment.measure(Choice("as it is", "weight", 1.0))
    assert abs(everything["kl"][0]) < 1e-6 * row["kl"][0]
    assert everything["bytes"] > row["bytes"]


def test_the_kept_channels_are_exact_and_chosen_by_their_inputs(experiment):
    weights, _ = experiment.protected(Choice("as it is", "activation", 0.2))
    dense, inputs = experiment.network("as it is")
    for layer, old, seen in zip(weights["layers"], dense["layers"], inputs, strict=True):
        for name, x in seen.items():
            size = np.abs(x).mean(axis=0)
            kept = layer[name].kept
            assert len(kept) == int(np.ceil(0.2 * x.shape[1]))
            assert size[kept].min() >= np.delete(size, kept).max()
            assert np.array_equal(
                layer[name].dequantize()[:, kept], old[name].dequantize()[:, kept]
            )


def test_injected_outliers_are_what_the_activations_find(experiment):
    """A sixteenth of the channels is one here; with three outliers in sixteen, a fifth keeps
    all of them.
    """
    rows = {
        by: experiment.measure(Choice("planted", by, 0.19, 0 if by == "random" else None))["kl"][0]
        for by in (None, *BY)
    }
    assert rows["activation"] < min(rows["weight"], rows["random"])
    assert rows["activation"] < rows[None]


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
    output = tmp_path / "salience.json"
    paths = f"--model {directory} --output {output} --cache {tmp_path / 'c'}"
    command = f"{paths} --excerpts 2 --group 8".split()
    salience.main(command)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(choices())
    assert told[0].startswith("[1/22] as it is, none kept: KL ")
    record = read(output)
    assert record.command == "python -m refllm.experiments.salience"
    assert len(salience.draw(record.values).axes) == 2
    before = output.read_bytes()
    monkeypatch.setattr(held_out_bench, "compare", None)  # everything is in the cache
    salience.main(command)
    assert output.read_bytes() == before
