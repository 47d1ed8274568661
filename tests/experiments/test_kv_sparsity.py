"""The experiment on sparse caches: its texts, that a run is the policy that it names, its record
and its figure.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from refllm.api import Model
from refllm.checkpoints.writer import save
from refllm.experiments import kv_sparsity, kv_sparsity_figure
from refllm.experiments.kv_sparsity import CONTROL, POLICIES, TASKS, Experiment
from refllm.kv.sparse import at_random, h2o, recent_only, snapkv
from refllm.kv.sparse_cache import SparseCache
from refllm.measure.records import read
from refllm.model.attention import CausalAttend
from refllm.model.llama import forward, logits
from tiny_models import byte_tokenizer, tiny_config, tiny_model, tiny_params

SIZES = {"texts": 2, "prompt": 60, "new": 12, "copy": 20}


@pytest.fixture(scope="module")
def model() -> Model:
    made = tiny_model(3, dtype="float64")
    return Model(made.config, made.weights, made.tokenizer)


def test_texts_of_a_far_copy_end_as_they_began(model):
    plain, copies = (Experiment(model, task, **SIZES) for task in TASKS)
    assert {len(text) for text in plain.texts + copies.texts} == {72}
    for text, copy in zip(plain.texts, copies.texts, strict=True):
        assert text[0] == copy[0] == 0  # the beginning token
        assert copy[1:21] == copy[-20:] == text[1:21]
        assert copy[21:52] != text[21:52]  # other code between
    whole, without = copies.loss
    rest = np.stack([model.logits(text[21:])[-13:-1] for text in copies.texts])
    rest -= np.logaddexp.reduce(rest, axis=-1, keepdims=True)
    assert without == pytest.approx(
        -np.mean(
            [rest[b, i, text[60 + i]] for b, text in enumerate(copies.texts) for i in range(12)]
        )
    )
    exact = np.stack([model.logits(text)[59:71] for text in copies.texts])
    log_p = exact - np.logaddexp.reduce(exact, axis=-1, keepdims=True)
    assert whole == pytest.approx(
        -np.mean(
            [log_p[b, i, text[60 + i]] for b, text in enumerate(copies.texts) for i in range(12)]
        )
    )


def share_of_attention(experiment, caches) -> float:
    """What the last query of each text reads of the whole text, and how much of that is
    still in its cache.
    """
    config = experiment.model.config
    shares = []
    plain = CausalAttend([71])
    for text, cache in zip(experiment.texts, caches, strict=True):

        def attend(layer, q, k, v, cache=cache):
            for g, kept in enumerate(cache.layers[layer][0].positions):
                heads = q[-1].reshape(config.num_key_value_heads, -1, config.head_dim)[g]
                p = np.exp(heads @ k[:, g].T / np.sqrt(config.head_dim))  # [R, S]
                shares.append((p[:, kept].sum(axis=1) / p.sum(axis=1)).mean())
            return plain(layer, q, k, v)

        forward(experiment.model.weights, config, np.asarray(text[:-1]), np.arange(71), attend)
    return float(np.mean(shares))


@pytest.mark.parametrize("policy", [h2o(24), recent_only(24), snapkv(24, window=8)])
def test_a_run_is_what_the_cache_answers_text_by_text(model, policy):
    experiment = Experiment(model, TASKS[0], **SIZES)
    run = experiment.run(policy)
    config = model.config
    held = []
    kept = []
    caches = []
    for b, text in enumerate(experiment.texts):
        cache = SparseCache(config, 1, like=np.zeros(1), policy=policy)
        exact = model.logits(text)
        for start, stop in [(0, 60), *((t, t + 1) for t in range(60, 71))]:
            at = np.arange(start, stop)
            tokens = np.asarray(text[start:stop])
            held.append(
                [
                    cache.layers[layer][0].positions.shape[1]
                    for layer in range(config.num_hidden_layers)
                ]
            )
            z = logits(
                model.weights,
                forward(model.weights, config, tokens, at, cache.view([stop - start])),
            )[-1]
            cache.advance([stop - start])
            if start == 0:
                cache.finish_prompt()
                held.pop()
            log_p, log_q = (a - np.logaddexp.reduce(a) for a in (exact[stop - 1], z))
            kept.append((b, stop - 60, np.sum(np.exp(log_p) * (log_p - log_q))))
        caches.append(cache)
    for b, i, kl in kept:
        assert run.kl[b, i] == pytest.approx(kl, abs=1e-9)
    assert run.held == pytest.approx(np.mean(held))
    assert run.mass == pytest.approx(share_of_attention(experiment, caches))
    assert run.kl[:, 1:].max() > 1e-6


def test_what_drops_once_has_a_control_that_holds_as_many(model):
    experiment = Experiment(model, TASKS[0], **SIZES)
    rows = kv_sparsity.rows(experiment, TASKS[0], [40])
    snap = next(row for row in rows if row["policy"] == "SnapKV")
    control = experiment.run(replace(recent_only(40), every_step=False))
    assert (
        (control.held, control.last) == (snap["held"], snap["held at the end"]) == (40 + 5, 40 + 11)
    )
    own = experiment.run(snapkv(40))
    assert snap["against control"][0] == pytest.approx((own.kl - control.kl).mean(), abs=1e-12)
    draws = [experiment.run(at_random(40), seed) for seed in range(kv_sparsity.DRAWS)]
    chance = next(row for row in rows if row["policy"] == "at random")
    assert chance["kl"][0] == pytest.approx(np.mean([run.kl for run in draws]), abs=1e-12)
    assert len({run.mass for run in draws}) > 1


def test_everything_kept_costs_nothing(model):
    run = Experiment(model, TASKS[1], **SIZES).run(h2o(72))
    assert np.abs(run.kl).max() < 1e-9
    assert run.mass == pytest.approx(1.0)
    assert run.held == pytest.approx(np.mean(range(60, 71)))


def test_texts_that_cannot_be_made_are_rejected(model):
    for sizes in ({"copy": 12}, {"copy": 37}):
        with pytest.raises(ValueError, match=r"need \d+ within 13..36"):
            Experiment(model, TASKS[1], **SIZES | sizes)
    with pytest.raises(
        ValueError, match="no task is called 'songs'; they are as it comes, a far copy"
    ):
        Experiment(model, "songs", **SIZES)


def test_a_small_run_writes_a_record_that_is_drawn(tmp_path):
    config = tiny_config()
    save(
        tmp_path / "tiny",
        config,
        tiny_params(config, 0, "float32"),
        byte_tokenizer(),
        dtype="float32",
    )
    output = tmp_path / "sparse.json"
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    kv_sparsity.main(
        [
            "--model",
            str(tmp_path / "tiny"),
            "--output",
            str(output),
            *sizes,
            "--budgets",
            "16",
            "40",
        ]
    )
    values = read(output).values
    found = [(row["task"], row["policy"], row["budget"]) for row in values["rows"]]
    fits = {16: [n for n in POLICIES if n not in ("SnapKV", "PyramidKV")]}
    fits[40] = [n for n in POLICIES if n != "PyramidKV"]  # 10 of 40 in its top layer
    assert found == [
        (task, name, budget) for task in TASKS for budget in (16, 40) for name in fits[budget]
    ]
    for row in values["rows"]:
        assert (row["against control"] == [0, 0, 0]) == (row["policy"] == CONTROL)
        if row["policy"] != "SnapKV":
            control = next(
                r
                for r in values["rows"]
                if r["policy"] == CONTROL
                and (r["task"], r["budget"]) == (row["task"], row["budget"])
            )
            assert row["against control"][0] == pytest.approx(
                row["kl"][0] - control["kl"][0], abs=1e-12
            )
    # two tasks and the attention kept, a column for each policy beside the control
    assert len(kv_sparsity_figure.draw(values).axes) == 3 * (len(POLICIES) - 1)


def test_what_the_committed_record_says():
    """The sentences of the README and the notebook."""
    values = read(Path(ROOT) / "figures/data/kv_sparsity.json").values
    rows = {(r["task"], r["policy"], r["budget"]): r for r in values["rows"]}
    # on code as it comes none beats the newest tokens by what could matter
    for budget in (64, 128, 256, 512):
        found = {
            name: rows["as it comes", name, budget]
            for name in POLICIES
            if ("as it comes", name, budget) in rows
        }
        assert all(row["against control"][2] > -0.001 for row in found.values())
        assert found["SnapKV"]["against control"][1] > 0
        assert budget == 512 or found["H2O"]["against control"][1] > 0
    # with something far back they are not, nor is chance
    for name in ("H2O", "TOVA", "SnapKV", "at random"):
        assert rows["a far copy", name, 512]["against control"][2] < 0
    # its first tokens hold no copy
    assert rows["a far copy", "StreamingLLM", 512]["against control"][1] > -0.01
    for task in TASKS:  # more attention kept on the whole, and less where it matters
        assert rows[task, "PyramidKV", 512]["mass"] > rows[task, "SnapKV", 512]["mass"]
        assert rows[task, "PyramidKV", 512]["kl"][0] > rows[task, "SnapKV", 512]["kl"][0]
    loss = values["loss"]["a far copy"]
    assert loss["without"] > loss["whole"] + 0.3
