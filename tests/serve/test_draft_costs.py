"""What drafting costs: the formulas by hand, and what is timed, with clocks that count."""

from __future__ import annotations

import pytest

from drafting import random_model
from networks import NETWORKS
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.serve import draft_costs
from refllm.serve.draft_costs import Costs, measure_costs

CONFIG = NETWORKS["llama"]
TARGET = random_model(CONFIG, 1)
DRAFT = random_model(CONFIG, 2)

COSTS = Costs(steps=[(2, 1.0), (4, 3.0)], drafts=[(1, 0.5, 0.25), (3, 1.5, 0.75)])


def test_a_step_is_interpolated_between_measured_sizes_and_in_proportion_beyond():
    assert [COSTS.step(n) for n in (1, 2, 3, 4, 8, 6)] == [1.0, 1.0, 2.0, 3.0, 6.0, 4.5]


def test_the_first_draft_costs_more_than_those_after_it():
    assert [COSTS.drafting(1, gamma) for gamma in (0, 1, 2, 4)] == [0.0, 0.5, 0.75, 1.25]
    assert COSTS.drafting(2, 3) == 1.0 + 2 * 0.5
    assert COSTS.drafting(3, 2) == 1.5 + 0.75
    assert COSTS.drafting(6, 2) == 2 * (1.5 + 0.75)  # twice the largest batch that was measured


def test_the_rate_is_the_expected_tokens_over_the_time_of_target_and_drafts():
    # one token certainly, then ½ and ¼; a step of 3 tokens and two drafts
    assert COSTS.rate(0.5, 1, 2) == pytest.approx(1.75 / (2.0 + 0.75))
    assert COSTS.rate(0.5, 1, 0) == 1.0 / COSTS.step(1)
    # per sequence: a batch of two takes longer, and each gets as many
    assert COSTS.rate(1.0, 2, 1) == pytest.approx(2 / (3.0 + 1.0))


def test_the_best_gamma_may_be_the_most_and_ties_go_to_fewer_drafts():
    free = Costs(steps=[(1, 1.0), (1000, 1.0)])
    assert [free.best_gamma(1.0, 1, most) for most in (0, 1, 5)] == [0, 1, 5]
    assert free.best_gamma(0.0, 1, 5) == 0  # no draft is ever accepted: all are as good as none


def test_every_measured_time_is_that_of_one_call(monkeypatch):
    """By a clock that moves by 1 whenever it is read."""
    now = iter(range(10**6))
    monkeypatch.setattr(draft_costs.time, "perf_counter", lambda: float(next(now)))
    costs = measure_costs(TARGET, ModelDrafter(DRAFT, 3, sequences=2), most=3, context=8, rounds=2)
    assert costs.steps == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert costs.drafts == [(1, 1.0, 0.0), (2, 1.0, 0.0)]


def test_drafts_are_timed_with_what_the_draft_model_has_to_catch_up(monkeypatch):
    """By a clock that counts the tokens that the draft model computes: one or two that are
    new to it for the first draft, then one for each further draft.
    """
    draft = ModelDrafter(DRAFT, 3, sequences=2)
    monkeypatch.setattr(draft_costs.time, "perf_counter", lambda: float(draft.computed))
    costs = measure_costs(TARGET, draft, most=1, context=8, rounds=1)
    assert costs.drafts == [(1, 1.5, 1.0), (2, 3.0, 2.0)]


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 3, 4]), (8, [1, 2, 3, 4, 6, 8])]
)
def test_steps_are_measured_at_powers_of_two_and_between_them(most, sizes):
    costs = measure_costs(TARGET, most=most, context=3, rounds=1)
    assert [n for n, _ in costs.steps] == sizes
    assert costs.drafts == []


def test_the_context_is_cut_to_the_positions_of_both_models():
    draft = ModelDrafter(DRAFT, 3)
    costs = measure_costs(TARGET, draft, most=1, context=10**9, rounds=1)
    assert costs.steps[0][1] > 0
    assert costs.drafts[0][1] > 0
