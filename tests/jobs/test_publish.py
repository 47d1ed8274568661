"""A finished directory says what was done, with numbers that anyone can compute again, and
holds no training text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refllm.api import Model, load
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.writer import file_sha256
from refllm.corpus import Document
from refllm.experiments import training_curves
from refllm.figures import registry
from refllm.jobs import card_page, model_card, publish
from refllm.measure.perplexity import evaluate
from refllm.train.data import Data, encode
from refllm.train.loop import train
from refllm.train.schedule import Phase, Plan
from tiny_models import byte_tokenizer, tiny_config, tiny_model

TEXT = [
    Document(f"part{i}.py", f"def function_number_{i}(argument):\n    return argument + {i}\n" * 8)
    for i in range(4)
]
DATA = Data(
    "a few functions", {"code": TEXT[:2], "more": TEXT[2:3]}, TEXT[3:], (2, 1), (1, 0), code=True
)
PLAN = Plan(
    (Phase(3, 2, 32, (2, 1)), Phase(1, 1, 64, (1, 0))), warmup=1, workers=1, evaluate_every=2
)
CONFIG = tiny_config(tie_word_embeddings=True, max_position_embeddings=64)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, model_card.Record]:
    """(state, directory, record) of a network that was trained for four steps."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = byte_tokenizer()
    streams = [encode(tokenizer, documents) for documents in DATA.streams.values()]
    train(CONFIG, streams, PLAN, folder, held_out=encode(tokenizer, DATA.held_out))
    state = folder / "state.safetensors"
    output = folder / "model"
    return (
        state,
        output,
        publish.finish(state, tokenizer, output, DATA, command="refllm train --output model"),
    )


def test_the_directory_loads_and_measures_as_its_card_says(finished):
    """What is measured is what is stored: the rounded weights."""
    _, output, record = finished
    assert record == json.loads((output / "card.json").read_text())
    model = load(output, backend="numpy")
    assert model.config == CONFIG
    assert record["parameters"] == CONFIG.num_parameters
    score = evaluate(model, DATA.held_out, window=64, stride=32)
    assert record["measured"]["bits per byte"] == score.bits_per_byte
    assert record["measured"]["documents"] == [
        {"name": d.name, "tokens": d.tokens, "bytes": d.bytes, "bits per byte": d.bits_per_byte}
        for d in score.documents
    ]
    assert sum(b["tokens"] for b in record["measured"]["by context"]) == score.tokens


def test_the_page_is_made_from_the_record_alone(finished):
    _, output, record = finished
    text = (output / "README.md").read_text(encoding="utf-8")
    assert text == card_page.page(json.loads((output / "card.json").read_text()))
    assert f"{record['measured']['bits per byte']:.3f} bits per byte" in text
    assert "refllm train --output model" in text


def test_the_record_counts_what_the_plan_did(finished):
    record = finished[2]
    assert record["training"]["tokens"] == 3 * 2 * 32 + 1 * 64
    assert publish.read_plan({"plan": json.dumps(record["training"]["plan"])}) == PLAN
    passed = sum(s["passes"] * s["tokens"] for s in record["data"]["streams"].values())
    assert passed == pytest.approx(record["training"]["tokens"], rel=1e-12)
    assert record["data"]["held out"]["documents"] == 1
    assert record["data"]["streams"]["code"]["bytes"] == sum(len(d.text) for d in TEXT[:2])


def test_what_is_stored_is_the_mean_of_both_ends_where_a_share_is_asked_for(finished, tmp_path):
    state, before, _ = finished
    first = load_file(before / "model.safetensors")
    save_file(
        {name: 3 * w for name, w in first.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    for name in ("config.json", "tokenizer.json", "card.json", "curve.json"):
        shutil.copy(before / name, tmp_path / name)
    share = {"start": tmp_path, "start_share": 0.25}
    publish.finish(state, byte_tokenizer(), tmp_path / "model", DATA, command="x", **share)
    mixed = load_file(tmp_path / "model" / "model.safetensors")
    for name, w in first.items():  # 0.75 w + 0.25 · 3 w, both ends rounded to float16 first
        np.testing.assert_allclose(
            mixed[name].astype(float), 1.5 * w.astype(float), rtol=2**-9, atol=2**-23
        )
    assert "0.75 of the last weights and 0.25 of those." in (
        tmp_path / "model" / "README.md"
    ).read_text("utf-8")
    with pytest.raises(ValueError, match=r"a share of 0\.25 for the first weights needs the model"):
        publish.finish(state, byte_tokenizer(), tmp_path / "n", DATA, command="x", start_share=0.25)


def test_the_card_names_the_weights_that_a_run_began_with(finished, tmp_path):
    state, before, _ = finished
    record = publish.finish(
        state,
        byte_tokenizer(),
        tmp_path / "model",
        DATA,
        command="refllm train --start ./model",
        start=before,
    )
    start = record["training"]["start"]
    assert start["sha256"] == {"model.safetensors": file_sha256(before / "model.safetensors")}
    assert start["training"]["command"] == "refllm train --output model"
    page = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert start["sha256"]["model.safetensors"][:12] in page
    assert "trained in several runs" in page
    assert "Before it 256 tokens were read in 1 run" in page
    assert "\n1. 4 steps, 256 tokens, which gave SHA-256 " in page
    assert (
        "…: `refllm train --output model`\n\nThe last run:\n\n```sh\nrefllm train --start "
        "./model\n```" in page
    )
    first, whole = (
        json.loads((d / "curve.json").read_text()) for d in (before, tmp_path / "model")
    )
    assert whole[:2] == first
    assert [(point["step"], point["tokens"]) for point in whole] == [
        (2, 128),
        (4, 256),
        (2, 256 + 128),
        (4, 512),
    ]
    assert training_curves.curve_values([tmp_path / "model"])["phases"] == [
        [256, "earlier runs"],
        [256 + 192, "2 × 32 tokens"],
        [512, "1 × 64 tokens"],
    ]


def test_the_curve_is_that_of_the_run(finished):
    _, output, _ = finished
    curve = json.loads((output / "curve.json").read_text())
    assert [(point["step"], point["tokens"]) for point in curve] == [(2, 128), (4, 256)]
    assert all(point["held_out"] > 0 for point in curve)


def test_the_manifest_lists_every_file_and_every_document(finished):
    _, output, _ = finished
    manifest = json.loads((output / "manifest.json").read_text())
    present = {p.name for p in output.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == present
    for name, entry in manifest["files"].items():
        assert entry == {
            "bytes": (output / name).stat().st_size,
            "sha256": file_sha256(output / name),
        }
    assert manifest["trained on"] == {
        name: {d.name: d.sha256 for d in documents} for name, documents in DATA.streams.items()
    }
    assert manifest["held out"] == {d.name: d.sha256 for d in DATA.held_out}
    assert publish.manifest(output, DATA) == manifest  # it does not list itself


def test_figures_are_drawn_from_the_directory(finished):
    _, output, record = finished
    assert training_curves.has_record(output)
    values = training_curves.curve_values([output])
    assert values["runs"] == {"model": json.loads((output / "curve.json").read_text())}
    assert values["phases"] == [[192, "2 × 32 tokens"], [256, "1 × 64 tokens"]]
    bins = training_curves.position_values([output])["lines"]["model"]
    assert sum(b[2] for b in bins) == record["measured"]["tokens"]
    assert sum(b[2] * b[3] for b in bins) > 0
    for name, draw in (
        ("training_curve", values),
        ("bits_by_position", {"lines": {"model": bins}}),
    ):
        assert registry.FIGURES[name][1](draw).axes
    assert not training_curves.has_record(output.parent)


def test_no_line_of_the_text_is_in_the_directory(finished):
    _, output, _ = finished
    for path in output.iterdir():
        content = path.read_bytes()
        for document in TEXT:
            assert document.text.splitlines()[0].encode() not in content, path.name


def test_a_run_that_is_not_over_is_not_finished(finished, tmp_path):
    state, _, _ = finished
    longer = tmp_path / "state.safetensors"
    more = Plan((Phase(9, 2, 32, (2, 1)),), workers=1)
    from refllm.train.state import load_state, save_state

    save_state(load_state(state)[0], longer, CONFIG, more)
    with pytest.raises(ValueError, match="4 of 9 steps"):
        publish.finish(longer, byte_tokenizer(), tmp_path / "out", DATA, command="x")
    assert not (tmp_path / "out").exists()


def test_a_finished_model_is_replaced_only_if_asked_for(finished):
    state, output, record = finished
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="not empty"):
        publish.finish(state, byte_tokenizer(), output, DATA, command="other")
    again = publish.finish(
        state, byte_tokenizer(), output, DATA, command="refllm train --output model", overwrite=True
    )
    assert again == record  # nothing in it depends on when it was made
    assert (output / "model.safetensors").read_bytes() == before


def test_a_draft_is_compared_with_its_teacher(finished, tmp_path):
    state, output, _ = finished
    record = publish.finish(
        state, byte_tokenizer(), tmp_path / "draft", DATA, command="x", teacher=output
    )
    near = record["measured"]["against the teacher"]
    # student and teacher are the same network here, and both are what is stored
    assert near["acceptance"] == pytest.approx(1.0, abs=1e-6)
    assert near["KL"] == [0.0, 0.0, 0.0]
    assert near["same first choice"] == [1.0, 1.0, 1.0]
    assert record["training"]["teacher"] == "model"
    assert "Distilled from model" in (tmp_path / "draft" / "README.md").read_text()


# --- the parts of the card ----------------------------------------------------------------


@pytest.mark.theorem(
    "Acceptance is the mean of Σ min(p, q)", source="Leviathan et al. 2023, theorem 3.5"
)
def test_acceptance_is_the_overlap_of_both_distributions():
    made = [tiny_model(seed) for seed in (0, 1)]
    draft, target = (Model(m.config, m.weights, m.tokenizer) for m in made)
    text = "def f(x): return x"
    tokens = [0, *draft.tokenizer.encode(text)]
    overlaps = []
    for at in range(1, len(tokens)):
        q, p = (np.exp(m.logits(tokens[:at])[-1]) for m in (draft, target))
        overlaps.append(sum(min(a, b) for a, b in zip(p / p.sum(), q / q.sum(), strict=True)))
    got = model_card.acceptance(draft, target, [Document("x", text)], window=64)
    assert got == pytest.approx(np.mean(overlaps), rel=1e-11)
    assert got == pytest.approx(
        model_card.acceptance(target, draft, [Document("x", text)], window=64), rel=1e-11
    )


def test_samples_are_measured_beside_real_text(finished):
    """63 tokens fit behind the beginning token; the functions above are cut within a line,
    which is trimmed.
    """
    samples = finished[2]["measured"]["samples"]
    assert samples["count"] == 100
    assert [x["tokens"] for x in samples["by length"]] == [63]
    assert samples["by length"][0]["share of real text"] == 1.0
    model = load(finished[1], backend="numpy")
    assert samples == model_card.sample_record(model, TEXT[:3], np.random.default_rng(PLAN.seed))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n", True),
        ("x = 1\ny = '", True),  # the last line is cut off, wherever it was cut
        ("", True),
        ("def f(", True),
        ("def f(\n", False),
        ('"""never closed\n', False),
        ("if x:\n        a\n    b\n", False),  # dedent to a level that was never opened
    ],
)
def test_what_tokenizes(text, expected):
    assert model_card.tokenizes(text) is expected
