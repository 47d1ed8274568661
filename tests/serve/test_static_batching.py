"""Static and Orca-style batches by hand: what is padded, what computes nothing, what is
reserved.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.kv.block_pool import BlockPool
from refllm.serve.factory import POLICIES, make
from refllm.serve.plan import PaddingRow, Plan, SampledTokens
from refllm.serve.request import Request


def plans(policy: str, lengths: list[tuple[int, int]], slots: int, **options: object) -> list[Plan]:
    """Every plan that serves prompts and outputs of these lengths."""
    scheduler = make(policy, BlockPool(slots, 1), **options)
    for prompt, output in lengths:
        scheduler.submit(Request(range(prompt), output))
    made = []
    while scheduler.unfinished:
        plan = scheduler.plan()
        plan.check()
        scheduler.update(plan, [[SampledTokens([7])] for _ in plan.sampling])
        scheduler.check()
        made.append(plan)
    assert scheduler.memory.allocated == 0
    return made


def test_a_padded_batch_runs_until_its_longest_member_has_ended():
    made = plans("static", [(2, 1), (4, 3), (1, 2)], 14)
    assert [plan.batch() for plan in made] == [
        [(0, 4), (0, 4)],  # the shorter prompt is padded; a third row would need 21 slots
        [(4, 1), (4, 1)],  # the first has ended and is computed all the same
        [(5, 1), (5, 1)],
        [(0, 1)],
        [(1, 1)],
    ]
    assert made[1].padding_rows == [PaddingRow(4, 1, 0)]
    assert [item.pad for item in made[0].items] == [2, 0]
    assert made[0].slots(made[0].items[0]) == [2, 3]  # a row of 4 + 3 columns, padded on the left
    assert made[0].slots(made[0].items[1]) == [7, 8, 9, 10]


def test_a_batch_is_closed_by_the_widest_row_that_is_allowed():
    made = plans("static", [(2, 6), (6, 2)], 1000, longest=9)
    # together a row would have 6 + 6 columns
    assert [len(plan.items) for plan in made] == [1] * 6 + [1] * 2
    assert len(plans("static", [(2, 6), (6, 2)], 1000, longest=12)) == 6


@given(outputs=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_conservation_a_static_batch_computes_its_rectangle(outputs):
    made = plans("static", [(3, output) for output in outputs], 1000)
    assert len(made) == max(outputs)
    assert sum(count for plan in made for _, count in plan.batch()) == len(outputs) * (
        3 + max(outputs) - 1
    )
    assert sum(plan.tokens for plan in made) == sum(3 + output - 1 for output in outputs)


@pytest.mark.parametrize(
    ("policy", "batch"),
    [("orca-max", 2), ("orca-pow2", 4), ("orca-oracle", 5), ("static", 5), ("fcfs", 10)],
)
def test_smaller_reservations_run_more_requests(policy, batch):
    # 64 slots; a prompt of 3, an output of 5 tokens: 32, 3 + 8 → 16, 8, 8, and the
    # tokens so far
    made = plans(
        policy, [(3, 5)] * 12, 40 if policy in ("orca-oracle", "static") else 64, longest=32
    )
    assert max(len(plan.items) for plan in made) >= batch
    if policy != "fcfs":
        assert max(len(plan.items) for plan in made) == batch


def test_orca_computes_a_prompt_in_one_step_and_joins_at_every_step():
    made = plans("orca-oracle", [(5, 2), (5, 4), (5, 2)], 17, buddy=False, max_batch_tokens=3)
    assert all(item.samples for plan in made for item in plan.items)
    assert [[item.key[0] for item in plan.items] for plan in made] == [
        [0, 1],
        [0, 1],
        [1, 2],
        [1, 2],
    ]


@pytest.mark.parametrize("policy", [p for p in POLICIES if p.startswith("orca") or p == "static"])
def test_reserving_policies_reject_forks_and_oversized_requests(policy):
    scheduler = make(policy, BlockPool(64, 1), longest=32)
    with pytest.raises(ValueError, match="cannot share: submit 2 requests"):
        scheduler.submit(Request([1], 2, n=2))
    with pytest.raises(ValueError, match="needs a r|longest sequence is 32"):
        scheduler.submit(Request(range(60), 30))


def test_unknown_policies_and_impossible_caches_are_rejected():
    pool = BlockPool(4, 4)
    with pytest.raises(ValueError, match="unknown policy 'best'"):
        make("best", pool)
    with pytest.raises(ValueError, match="unknown prefix cache 'trie'"):
        make("fcfs", pool, prefix_cache="trie")
    with pytest.raises(ValueError, match="can share no prefixes"):
        make("static", pool, prefix_cache="radix")
    with pytest.raises(ValueError, match="watermark"):
        make("fcfs", pool, watermark=1.0)
