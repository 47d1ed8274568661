"""The serving experiments at their smallest: what they count has its closed form, what they
draw is drawn.
"""

from __future__ import annotations

import math
from statistics import mean

import numpy as np
import pytest

from conftest import ROOT
from refllm.api import Model
from refllm.experiments import batching, paging, prefix_caching, prefix_caching_figure, unpadding
from refllm.measure.records import read
from refllm.serve.engine import Engine
from refllm.serve.request import Request
from refllm.simulate.workload import SHAREGPT
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def model():
    made = tiny_model(dtype="float32", max_position_embeddings=2048)
    return Model(made.config, made.weights, made.tokenizer)


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    """Prompts of a few lines, since the tiny model's tokens are bytes."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        unpadding, "held_out", lambda model: unpadding.Passages(rng.integers(1, 200, 5000).tolist())
    )
    monkeypatch.setattr(prefix_caching, "held_out", unpadding.held_out)


def test_the_recorded_batches_are_the_papers_within_eight_percent():
    record = read(ROOT / "figures" / "data" / "paging.json")
    assert record.kind == "A"
    rows = {row["policy"]: row for row in record.values["policies"]}
    for name, measured in paging.PAPER.items():
        assert len(rows[name]["batch"]) >= 5
        assert mean(rows[name]["batch"]) == pytest.approx(measured, rel=0.08)
    assert mean(rows["Orca (Max)"]["utilisation"]) < 0.25
    assert mean(rows["paged"]["utilisation"]) > 0.93
    # the same command gives the same values: one of the cells, computed again
    row = rows["Orca (Max)"]
    assert (
        paging.simulate_policy(
            "Orca (Max)", paging.sharegpt_requests(0, record.values["requests"])
        ).saturated.batch
        == row["batch"][0]
    )


def test_the_recorded_shares_of_useful_slots_are_about_those_of_the_closed_form():
    recorded = read(ROOT / "figures" / "data" / "batching.json").values
    useful = {row["batch"]: row for row in recorded["useful"]}
    for batch, share in {4: 0.49, 8: 0.37, 16: 0.30, 32: 0.25}.items():
        assert mean(useful[batch]["counted"]) == pytest.approx(share, abs=0.03)
    # the settings of the code are those of the record
    assert tuple(useful) == batching.BATCHES
    assert tuple(row["budget"] for row in recorded["chunks"]) == batching.BUDGETS
    assert tuple(recorded["goodput"]["rates"]) == batching.RATES
    limits = recorded["goodput"]["limits"]
    assert (limits["ttft"], limits["tpot"]) == (batching.LIMITS.ttft, batching.LIMITS.tpot)
    # what a cache costs where nothing is shared
    inside = read(ROOT / "figures" / "data" / "prefixes.json").values["inside"]
    assert all(share <= 0.02 for shares in inside.values() for share in shares)


def test_memory_is_given_out_as_the_table_says():
    asked = Request(range(100), 300)
    sizes = {
        name: paging.make_scheduler(name, 15_700).memory.size(asked)
        for name in paging.PAPER
        if name != "paged"
    }
    assert sizes == {"Orca (Max)": 2048, "Orca (Pow2)": 100 + 512, "Orca (Oracle)": 400}
    large = Request(range(900), 1100)
    assert paging.make_scheduler("Orca (Pow2)", 15_700).memory.size(large) == 2048  # not 900 + 2048
    assert paging.make_scheduler("static", 15_700).max_sequences == 7


def test_larger_blocks_hold_no_more():
    asked = paging.sharegpt_requests(1, 60)
    used = [
        paging.simulate_policy("paged", asked, block=b, slots=6000).saturated.utilisation
        for b in (1, 16, 256)
    ]
    assert used[0] > used[1] > used[2]


def test_a_mean_of_no_steps_is_rejected():
    run = paging.simulate_policy("paged", paging.sharegpt_requests(0, 2))
    with pytest.raises(ValueError, match="no step was counted"):
        _ = run.saturated.batch


def test_with_memory_for_every_request_paging_gains_nothing():
    batches = [row["batch"] for row in paging.plenty_data(60, max_sequences=8)]
    assert batches == [8.0] * 4


def test_useful_slots_are_those_of_the_closed_form(monkeypatch):
    monkeypatch.setattr(batching, "BATCHES", (1, 8))
    one, eight = batching.useful_data([0], 32)
    assert one["counted"] == [1.0]
    assert one["exact"] == 1
    assert eight["exact"] == pytest.approx(0.37, abs=0.03)
    # the ratio of two means, of 32 answers and of 4 batches, whose deviations are about 1.0
    # and 0.5 of their means
    assert eight["counted"][0] == pytest.approx(
        eight["exact"], rel=3 * math.hypot(1 / math.sqrt(32), 0.5 / 2)
    )
    exact = SHAREGPT.pmfs()[1]
    shares = [batching.useful_share(exact, b) for b in (4, 8, 16, 32)]
    assert shares == pytest.approx([0.49, 0.37, 0.30, 0.25], abs=0.03)


def test_chunks_goodput_and_swapping_are_projected(monkeypatch):
    monkeypatch.setattr(batching, "BUDGETS", (128, None))
    monkeypatch.setattr(batching, "RATES", (1, 40))
    small, whole = batching.chunks_data(20)
    assert small["itl"]["p99"] < whole["itl"]["p99"]
    assert small["ttft"]["p50"] > whole["ttft"]["p50"]  # where chunking loses
    lines = batching.goodput_data(30)["lines"]
    assert lines["paged, chunks of 512"]["capacity"] > lines["static"]["capacity"]
    assert all(0 <= share <= 1 for line in lines.values() for share in line["met"])
    rows = batching.swapping_data(12, slots=2048)
    assert all(row["swap"]["computed"] <= row["recompute"]["computed"] for row in rows)
    assert all(row["recompute"]["moved"] == 0 for row in rows)


@pytest.mark.theorem(
    "padding × kernel × batch = the whole", source="ratios of neighbours telescope"
)
def test_factors_multiply_to_the_whole(model):
    values = unpadding.unpadding_data(model, count=9, rounds=1, scale=1 / 16)
    rows = {row["run"]: row for row in values["rows"]}
    for clock in ("seconds", "processor"):
        parts = {name: ratio[0] for name, ratio in values["factors"][clock].items()}
        whole = parts.pop("all three")
        assert math.prod(parts.values()) == pytest.approx(whole, rel=1e-12)
    assert rows["static"]["with padding"] > rows["static"]["tokens"]  # padding was computed
    assert rows["Orca (Max)"]["with padding"] == rows["Orca (Max)"]["tokens"]
    assert (
        rows["static"]["steps"]
        > rows["Orca (Max)"]["steps"]
        == rows["paged, as few"]["steps"]
        > rows["paged"]["steps"]
    )
    upper, lower = unpadding.draw(values).axes
    # a bar per run, to the rate of its processor time; a bar per factor, to its median
    rates = [values["requests"] / np.asarray(row["processor"]) for row in values["rows"]]
    assert [bar.get_width() for bar in upper.patches] == pytest.approx(
        [np.median(each) for each in rates]
    )
    factors = [middle for middle, _, _ in values["factors"]["processor"].values()]
    assert [bar.get_width() for bar in lower.patches] == pytest.approx(factors)


def test_programs_are_measured_and_the_formula_stands_beside(model):
    values = prefix_caching.prefixes_data(model, size=3, rounds=1, sizes=(4,))
    assert len(values["programs"]) == 6
    for name, rows in values["programs"].items():
        hits = {(row["cache"], row["order"]): row["hit"] for row in rows}
        assert hits[None, "fcfs"] == 0
        # all serve equally much
        assert len({row["P"] for row in rows}) == len({row["O"] for row in rows}) == 1
        for row in rows:
            assert row["hit"] <= row["best"] + 1e-12 or row["preemptions"]
            if not row["preemptions"]:
                assert row["computed"] == pytest.approx(
                    row["P"] * (1 - row["hit"]) + row["O"] - _requests(rows, row)
                )
        assert (hits["radix", "lpm"] > 0.2) == (name != "unique")
    assert all(0 <= share < 1 for shares in values["inside"].values() for share in shares)
    hits, *_ = prefix_caching_figure.draw(values).axes
    drawn = {float(line.get_xdata()[0]) for line in hits.lines}
    for rows in values["programs"].values():
        assert {row["hit"] for row in rows if row["cache"]} | {rows[0]["best"]} <= drawn


def _requests(rows, row):
    """How many requests a program has: the last token of each answer is never computed."""
    plain = rows[0]
    return plain["P"] + plain["O"] - plain["computed"] if not plain["preemptions"] else 0


def test_a_cache_that_calls_itself_is_timed_once(model, monkeypatch):
    """On a clock that goes on by one at every look: the inner calls look when they begin,
    and add nothing.
    """
    engine = Engine(model, num_blocks=8, block_size=4, prefix_cache="radix")
    cache = engine.scheduler.memory.cache
    ticks = iter(range(100))
    cache.available = lambda: 7
    cache.match = lambda: cache.available() + cache.available()
    inside = prefix_caching._watch(engine)
    monkeypatch.setattr(prefix_caching.time, "process_time", lambda: next(ticks))
    assert cache.match() == 14
    assert inside == [3]  # from 0 to 3; the inner ones began at 1 and 2
    assert cache.available() == 7
    assert inside == [3 + 1]


def test_the_formula_at_its_ends():
    assert prefix_caching.speedup(1, 0, 100, 10, 0.9) == pytest.approx(10)
    assert prefix_caching.speedup(1, 1, 100, 100, 0.9) == pytest.approx(2 / 1.1)
    assert prefix_caching.speedup(1, 1, 100, 10, 0) == 1
