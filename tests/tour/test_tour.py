"""Every stop of the tour can be visited alone, prints what it computed, and leaves its
figures in its output folder.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import fakecupy
from refllm.api import Model, load
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.writer import save
from refllm.cli import app
from refllm.figures import registry
from refllm.measure.device import DeviceSpec
from refllm.measure.records import read
from refllm.measure.roofline import step_cost
from refllm.terminal import printable
from refllm.tour import chat_stop, context, model_stops, stops
from tiny_models import byte_tokenizer, tiny_config, tiny_model, tiny_params

NAMES = [stop.name for stop in stops.STOPS]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tour") / "tiny"
    config = tiny_config(max_position_embeddings=512, eos_token_ids=())
    save(path, config, tiny_params(config, 0, "float32"), byte_tokenizer(), dtype="float32")
    return path


def not_installed(name: str) -> Path:
    """The real model is not there, wherever the tests run."""
    raise CheckpointError(f"{name!r} is not installed")


@pytest.fixture
def guide(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> context.Tour:
    """A tour of a tiny model on a machine of round numbers, which prints into
    ``guide.out.file``.
    """
    made = context.Tour(
        str(directory), "numpy", tmp_path / "figures", Console(file=io.StringIO(), width=10_000)
    )
    # measuring one takes a second
    made.__dict__["machine"] = DeviceSpec("a machine of round numbers", 1e11, 1e10)
    monkeypatch.setattr(chat_stop, "locate", not_installed)
    monkeypatch.setattr(model_stops, "REPEATS", 2)
    monkeypatch.setattr(model_stops, "SAMPLE_WINDOWS", 2)
    return made


def visit(guide: context.Tour, *names: str) -> str:
    stops.run(guide, names)
    text: str = guide.out.file.getvalue()
    return text


def test_the_list_names_every_stop_once():
    assert len(set(NAMES)) == len(NAMES)
    assert all(stop.title and stop.visit.__doc__ for stop in stops.STOPS)
    shown = CliRunner().invoke(app, ["tour", "--list"]).output.splitlines()
    assert [line.split()[0] for line in shown] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_can_be_visited_alone(guide, name):
    text = visit(guide, name)
    number = NAMES.index(name) + 1
    assert re.findall(r"^(\d+)  ", text, flags=re.M) == [str(number)]
    assert stops.STOPS[number - 1].title in text
    assert "nan" not in text.lower().split()
    assert "\x1b" not in text


def test_the_whole_tour_visits_all_stops_in_order_and_lists_its_figures(guide):
    text = visit(guide)
    assert re.findall(r"^(\d+)  (.*)", text, flags=re.M) == [
        (str(i + 1), s.title) for i, s in enumerate(stops.STOPS)
    ]
    assert guide.figures
    for path in guide.figures:
        assert f"figure: {path}" in text
        assert path.read_bytes().startswith(b"\x89PNG")
    assert registry.check(guide.output) == [
        complaint for complaint in registry.check(guide.output) if "no data" in complaint
    ]  # what was drawn is up to date with its record; the other figures are not the tour's


def test_an_unknown_stop_is_rejected_by_name(guide):
    with pytest.raises(ValueError, match="no stop 'nowhere'; its stops are meet"):
        stops.run(guide, ["meet", "nowhere"])
    assert guide.out.file.getvalue() == ""


def test_the_text_is_the_models_own(guide):
    expected = "".join(
        guide.model.stream(
            model_stops.PROMPT, model_stops.NEW_TOKENS, sampling=model_stops.SAMPLING, rng=1
        )
    )
    text = visit(guide, "write")
    assert model_stops.PROMPT in text
    shown = text.split(model_stops.PROMPT, 1)[1]
    # the console writes tabs as spaces; nothing else may differ
    assert printable(expected).replace("\t", "").replace(" ", "") in shown.replace(" ", "")


def test_the_costs_are_those_that_the_roofline_counts(guide):
    text = visit(guide, "cost")
    config = guide.model.config
    for batch in (1, 8, 32):
        c = step_cost(
            config,
            [(model_stops.CONTEXT, 1)] * batch,
            weight_bytes_per_param=4,
            kv_bytes_per_value=4,
        )
        row = next(line for line in text.splitlines() if line.startswith(f"decode, {batch} "))
        assert f"{c.flops / 1e6:,.1f}" in row.split()
        assert f"{c.intensity:.2f}" in row.split()
        assert ("memory" in row) == (c.intensity < 10)  # the ridge of the round machine
    values = read(guide.output / "data" / "roofline.json").values
    assert [p["label"] for p in values["points"]] == [
        line for line in _first_column(text) if "," in line
    ]


def test_a_gpu_is_timed_without_limits_that_were_not_measured(guide):
    made = tiny_model(xp=fakecupy, dtype="float32", max_position_embeddings=512)
    guide.__dict__["model"] = Model(made.config, made.weights, made.tokenizer)
    text = visit(guide, "cost")
    assert "The limits of a GPU are not measured here." in text
    assert "MFU" not in text
    assert len(_first_column(text)) == 4
    assert guide.figures == []


def _first_column(text: str) -> list[str]:
    return [
        re.split(r"\s{2,}", line)[0]
        for line in text.splitlines()
        if line.startswith(("decode,", "prefill,"))
    ]


def test_the_interval_holds_the_sample_mean(guide):
    mean, low, high = map(
        float,
        re.search(
            r"([\d.]+) bits per byte, 95 % interval ([\d.]+) to ([\d.]+)", visit(guide, "measure")
        ).groups(),
    )
    assert low <= mean <= high


def test_a_model_with_a_record_shows_its_training_curve(guide, directory, tmp_path):
    curve = [
        {"tokens": 64, "loss": 3.0, "held_out": 3.5},
        {"tokens": 128, "loss": 2.0, "held_out": 2.5},
    ]
    card = {
        "training": {"plan": {"phases": [{"steps": 4, "batch": 2, "length": 8}]}},
        "made with": {"python": "3.11", "numpy": "2"},
    }
    try:
        (directory / "curve.json").write_text(json.dumps(curve))
        (directory / "card.json").write_text(json.dumps(card))
        visit(guide, "meet")
    finally:
        (directory / "curve.json").unlink()
        (directory / "card.json").unlink()
    record = read(guide.output / "data" / "training_curve.json")
    assert list(record.values["runs"].values()) == [curve]
    assert record.values["phases"] == [[64, "earlier runs"], [128, "2 × 8 tokens"]]
    assert guide.figures == [guide.output / "training_curve.png"]


def test_the_bundled_model_is_shown_without_options():
    result = CliRunner().invoke(app, ["tour", "--stop", "write"])
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output


def test_a_tour_loads_its_model_once(guide, monkeypatch):
    loads = []
    monkeypatch.setattr(context, "load", lambda *a: loads.append(a) or _model(guide))
    visit(guide, "meet", "write")
    assert len(loads) == 1


def _model(guide: context.Tour) -> Model:
    return load(guide.name, "numpy")


def test_formats_prints_bits_and_error_of_the_matrix_itself(guide):
    from refllm.experiments import float_formats

    text = visit(guide, "formats")
    weight = guide.model.weights["layers"][0]["down_proj"].dequantize()
    found = float_formats.rows(weight)
    assert len(found) >= 3
    for name, bits, error, _ in found:
        assert re.search(rf"{re.escape(name)} +{bits:.3f} +{error:.2%}", text), name
