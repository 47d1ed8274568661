"""Outcomes that do not fit are rejected before anything has changed; forks, drops and ends
add up.
"""

from __future__ import annotations

from typing import Any

import pytest

from refllm.kv.block_pool import BlockPool
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.plan import Outcome, SampledTokens
from refllm.serve.request import Request
from refllm.serve.scheduler import Scheduler


def scheduler(*requests: Request, **options: Any) -> Scheduler:
    made = Scheduler(PagedKVManager(BlockPool(20, 2)), **options)
    for request in requests:
        made.submit(request)
    return made


def go(*tokens: int, finish_reason: str | None = None) -> SampledTokens:
    return SampledTokens(tokens, finish_reason)


@pytest.mark.parametrize(
    ("outcomes", "why"),
    [
        ([], "3 sequences were sampled, got 0"),
        ([[go(1)], [go(1)]], "3 sequences were sampled, got 2"),
        ([[go()], [go(1)], [go(1)]], "yields 1 to 1 tokens, got 0"),
        ([[go(1, 2)], [go(1)], [go(1)]], "yields 1 to 1 tokens, got 2"),
        ([[go(1), go(2)], [go(1)], [go(1)]], "may fork into 1, got 2"),
        ([[go(1)], [go(1), go(2), go(3)], [go(1)]], "may fork into 2, got 3"),
        ([[go(1)], [go(1)], [go(1), go(2), go(3)]], "n = 2 sequences"),
    ],
)
def test_an_outcome_that_does_not_fit_changes_nothing(outcomes: list[Outcome], why: str):
    made = scheduler(
        Request([1, 2], 4), Request([1, 2], 4, n=2), Request([1, 2], 4, n=2, beam=True)
    )
    plan = made.plan()
    with pytest.raises(ValueError, match=why):
        made.update(plan, outcomes)
    made.update(plan, [[go(1)], [go(1), go(2)], [go(1), go(2)]])
    made.check()
    assert [(b.key, b.output) for b in made.running] == [
        ((0, 0), [1]),
        ((1, 0), [1]),
        ((1, 1), [2]),
        ((2, 0), [1]),
        ((2, 1), [2]),
    ]


def test_tokens_that_were_not_drafted_are_not_accepted():
    made = scheduler(Request([1, 2], 9))
    made.update(made.plan(), [[go(1)]])
    assert made.propose((0, 0), [4, 5]) == 2
    plan = made.plan()
    for wrong in ([[go(5, 5)]], [[go(4, 5, 6, 7)]], [[go(4), go(5)]]):
        with pytest.raises(ValueError, match="accepted|yields|may fork"):
            made.update(plan, wrong)
    (update,) = made.update(plan, [[go(4, 5, 6)]])
    assert (update.tokens, made.running[0].computed, made.sampled) == ([4, 5, 6], 5, 4)


def test_no_more_is_drafted_than_a_sequence_may_generate():
    made = scheduler(Request([1, 2], 3), Request([1, 2, 3], 9, n=2), max_batch_tokens=4)
    plan = made.plan()
    made.update(plan, [[go(1)] for _ in plan.sampling])
    assert made.propose((0, 0), [1, 2, 3]) == 1  # two tokens are left, one of which is sampled
    assert made.propose((1, 0), [1]) == 0  # it is in the middle of its prompt
    assert made.propose(("unknown", 0), [1]) == 0


def test_a_sequence_may_end_without_a_token_if_it_has_a_reason():
    made = scheduler(Request([1, 2], 3))
    (update,) = made.update(made.plan(), [[go(finish_reason="error")]])
    assert (update.tokens, update.finish_reason) == ([], "error")
    assert not made.unfinished
    assert made.memory.allocated == 0


def test_beams_fork_and_drop_and_keep_their_slots():
    made = scheduler(Request([1, 2], 9, n=3, beam=True), max_sequences=3)
    made.update(made.plan(), [[go(1), go(2), go(3)]])
    other = made.submit(Request([1], 1, request_id="other"))
    updates = made.update(made.plan(), [[], [go(4), go(5), go(6)], []])
    assert [(update.sequence.index, update.finish_reason) for update in updates] == [
        (0, "dropped"),
        (1, None),
        (3, None),
        (4, None),
        (2, "dropped"),
    ]
    made.check()
    made.update(made.plan(), [[], [go(7)], []])
    made.check()
    assert sum(b.slots for b in made.running) == 3
    assert made.plan().waiting == 1  # a search of three keeps three slots while it has one beam
    assert made.has_request(other)


def test_a_request_that_finishes_without_a_step_is_reported_with_the_next():
    made = scheduler(Request([1], 0, request_id="nothing", n=2))
    assert made.unfinished
    plan = made.plan()
    assert plan.items == []
    assert [(update.sequence.key, update.finish_reason) for update in made.update(plan, [])] == [
        (("nothing", 0), "length"),
        (("nothing", 1), "length"),
    ]
    assert not made.unfinished


def test_ids_are_assigned_and_unique():
    made = scheduler(Request([1], 2, request_id=0))
    assert made.submit(Request([1], 2)) == 1
    with pytest.raises(ValueError, match="request 0 is being served"):
        made.submit(Request([1], 2, request_id=0))
    made.abort(0)
    assert made.submit(Request([1], 2, request_id=0)) == 0
