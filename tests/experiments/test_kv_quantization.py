"""The experiment on quantised caches: its cases, that a row is the cache that it names, its
record and its figure.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from refllm.api import Model
from refllm.checkpoints.writer import save
from refllm.experiments import kv_quantization
from refllm.experiments.kv_quantization import CHOICES, Case, Experiment, cases, memory
from refllm.kv.kivi import Kivi
from refllm.kv.kivi_cache import KiviCache
from refllm.measure.memory import LLAMA_70B, kv_bytes
from refllm.measure.records import read
from refllm.model.llama import forward, logits
from tiny_models import byte_tokenizer, tiny_config, tiny_model, tiny_params

SHAPE = {"head_dim": 8, "hidden_size": 32}


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    made = tiny_model(3, dtype="float64", **SHAPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_quantization, "GROUP", 8)
        yield Experiment(Model(made.config, made.weights, made.tokenizer), 2, 80)


def test_the_cases_are_those_of_the_table():
    found = cases()
    assert len(found) == len(set(found)) == 2 * 3 * 4 + 4
    assert [c.residual for c in found[-4:]] == [32, 64, 256, 512]
    assert {c.choice for c in found} == set(CHOICES)


def test_a_row_is_what_its_cache_answers_token_by_token(experiment):
    """KL of the network that decodes through a KIVI cache, computed here from its logits."""
    case = Case("as it is", "KIVI", 2, 32)
    found = experiment.compare(case)
    expected = []
    for tokens in experiment.text:
        m = experiment.model
        tokens = np.asarray([m.config.bos_token_id, *tokens])
        exact = m.logits(tokens)
        cache = KiviCache(m.config, 1, len(tokens), like=np.zeros(1), kivi=Kivi(2, 2, 8, 32))
        for t in range(len(tokens) - 1):
            z = logits(
                m.weights,
                forward(m.weights, m.config, tokens[t : t + 1], np.asarray([t]), cache.view([1])),
            )[0]
            cache.advance([1])
            log_p, log_q = (a - np.logaddexp.reduce(a) for a in (exact[t], z))
            expected.append(np.sum(np.exp(log_p) * (log_p - log_q)))
    np.testing.assert_allclose(found.token_kl, expected, rtol=0, atol=1e-9)
    assert max(expected) > 1e-4
    row = experiment.row(case)
    assert row["against KIVI"] == [0, 0, 0]
    other = experiment.row(Case("as it is", "keys by token", 2, 32))
    assert other["against KIVI"][0] == pytest.approx(other["kl"][0] - row["kl"][0])
    assert row["kl"][0] == pytest.approx(np.mean(expected))
    # 80 scored, 10 a part
    np.testing.assert_allclose(np.mean(row["kl by position"]), row["kl"][0], rtol=1e-9)
    assert row["kl by position"][:2] == pytest.approx([0, 0], abs=1e-12)  # in the residual window


def test_key_outliers_change_nothing_for_scales_per_channel_and_much_for_scales_per_token(
    experiment,
):
    kl = {
        (network, choice): experiment.row(Case(network, choice, 2, 32))["kl"][0]
        for network in ("as it is", "planted")
        for choice in ("KIVI", "keys by token")
    }
    assert kl["planted", "KIVI"] == pytest.approx(kl["as it is", "KIVI"], rel=1e-9)
    assert kl["planted", "keys by token"] > 2 * kl["as it is", "keys by token"]


def test_shares_of_memory_are_bytes_of_codes_scales_and_residual_window():
    shares = memory((64, 128, 4096))
    assert shares["2 bits"][0] == 1.0  # all within the residual window
    group = kv_quantization.GROUP  # 32, or what these tests make of it
    # 128 keys are codes, 128 values are in the window
    assert shares["2 bits"][1] == (1 + (2 + 32 / group) / 16) / 2
    assert shares["4 bits"][2] * kv_bytes(LLAMA_70B, 4096) == Kivi(4, 4, group).nbytes(
        LLAMA_70B, 4096
    )


def test_a_small_run_writes_a_record_that_is_drawn(tmp_path, monkeypatch):
    config = tiny_config(**SHAPE)
    save(
        tmp_path / "tiny",
        config,
        tiny_params(config, 0, "float32"),
        byte_tokenizer(),
        dtype="float32",
    )
    monkeypatch.setattr(kv_quantization, "GROUP", 8)
    output = tmp_path / "kv.json"
    kv_quantization.main(
        [
            "--model",
            str(tmp_path / "tiny"),
            "--output",
            str(output),
            "--texts",
            "2",
            "--length",
            "160",
        ]
    )
    record = read(output)
    assert len(record.values["rows"]) == len(cases())
    assert record.values["group"] == 8
    assert len(kv_quantization.draw(record.values).axes) == 4


def test_what_the_committed_record_says():
    """The sentences of the README and the notebook."""
    values = read(Path(ROOT) / "figures/data/kv_quantization.json").values
    kl = {
        (r["network"], r["choice"], r["bits"]): r["kl"]
        for r in values["rows"]
        if r["residual"] == 128
    }
    paired = {
        (r["choice"], r["bits"]): r["against KIVI"]
        for r in values["rows"]
        if r["network"] == "as it is"
    }
    for bits in (4, 3, 2):
        assert paired["keys by token", bits][1] > 0  # the interval leaves zero out
        assert kl["planted", "keys by token", bits][1] > kl["planted", "KIVI", bits][2]
        assert kl["planted", "KIVI", bits][0] == pytest.approx(
            kl["as it is", "KIVI", bits][0], rel=1e-3
        )
    assert kl["planted", "keys by token", 2][0] > 40 * kl["planted", "KIVI", 2][0]
    waiting = {
        r["residual"]: r["kl"][0]
        for r in values["rows"]
        if (r["network"], r["choice"], r["bits"]) == ("as it is", "KIVI", 2)
    }
    assert [waiting[r] for r in sorted(waiting)] == sorted(waiting.values(), reverse=True)
