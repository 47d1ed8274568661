"""The minimal engine: the definition in loops says the same tokens, and so does the engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.serve.engine import Engine
from refllm.serve.minimal import MinimalEngine
from refllm.serve.request import Request
from serving import TOLERANCE, alone, served_model

END = 5  # the served model's end token


def greedy(prompt: list[int], max_tokens: int) -> tuple[list[int], float]:
    """(output without the end token, smallest lead of a largest logit) by full forwards."""
    tokens, nearest = alone(Request(prompt, max_tokens, seed=0))
    return [t for t in tokens if t != END], nearest


prompts = st.lists(st.integers(6, 40), min_size=1, max_size=12)
requests = st.lists(st.tuples(prompts, st.integers(1, 9)), min_size=1, max_size=6)


@pytest.mark.theorem(
    "Continuous batching over a paged cache changes no greedy output: each request gets the "
    "tokens that it gets alone, without a cache",
    source="Yu et al. 2022, section 3; Kwon et al. 2023, section 4",
)
@given(wanted=requests, size=st.sampled_from([1, 2, 5, 16]), spare=st.integers(0, 30))
def test_invariance_a_request_in_any_batch_says_what_it_says_alone(wanted, size, spare):
    most = max(-(-(len(prompt) + count - 1) // size) for prompt, count in wanted)
    engine = MinimalEngine(served_model(), num_blocks=most + spare, block_size=size)
    names = [engine.submit(prompt, count) for prompt, count in wanted]
    outputs = engine.run()
    for name, (prompt, count) in zip(names, wanted, strict=True):
        expected, nearest = greedy(prompt, count)
        if nearest > TOLERANCE:
            assert outputs[name] == expected
    engine.cache.pool.check()
    assert engine.cache.pool.num_used == 0, "blocks of requests that have ended are free"


@pytest.mark.theorem(
    "The engine, whatever its policy, budget, prefix cache and preemption, gives greedy requests "
    "the tokens of the minimal engine",
    source="refllm.serve.minimal",
)
@given(
    wanted=requests,
    policy=st.sampled_from(["fcfs", "priority", "lpm"]),
    cached=st.sampled_from(["hash", "radix", None]),
    budget=st.sampled_from([3, 7, 200]),
    blocks=st.integers(11, 30),
)
def test_oracle_the_engine_says_what_the_minimal_engine_says(
    wanted, policy, cached, budget, blocks
):
    oracle = MinimalEngine(served_model(), num_blocks=100)
    names = [oracle.submit(prompt, count) for prompt, count in wanted]
    expected = oracle.run()
    engine = Engine(
        served_model(),
        num_blocks=blocks,
        block_size=2,
        policy=policy,
        prefix_cache=cached,
        max_batch_tokens=budget,
    )
    for i, (prompt, count) in enumerate(wanted):
        engine.submit(Request(prompt, count, request_id=i))
    results = engine.run()
    for i, (name, (prompt, count)) in enumerate(zip(names, wanted, strict=True)):
        if greedy(prompt, count)[1] > TOLERANCE:
            assert results[i].tokens == expected[name]


def test_requests_join_and_leave_between_steps():
    """Two requests in a pool for one and a half: the third joins when the first has left."""
    engine = MinimalEngine(served_model(), num_blocks=3, block_size=4)
    first = engine.submit([10, 11], 3)  # 1 block
    second = engine.submit([12] * 5, 4)  # 2 blocks
    third = engine.submit([13], 2)  # waits for a block
    engine.step()
    assert [one.request_id for one in engine.running] == [first, second]
    assert [one.request_id for one in engine.waiting] == [third]
    while any(one.request_id == first for one in engine.running):
        engine.step()
    engine.step()
    assert third not in [one.request_id for one in engine.waiting]
    assert set(engine.run()) == {first, second, third}


def test_first_come_first_served_a_small_request_does_not_overtake_a_large_one():
    engine = MinimalEngine(served_model(), num_blocks=2, block_size=4)
    engine.submit([10] * 3, 2)  # 1 block
    large = engine.submit([11] * 5, 3)  # 2 blocks: has to wait
    small = engine.submit([12], 1)  # 1 block would be there
    engine.step()
    assert [one.request_id for one in engine.waiting] == [large, small]


@given(wanted=requests)
def test_conservation_every_token_but_the_last_is_computed_once(wanted):
    engine = MinimalEngine(served_model(), num_blocks=100, block_size=4)
    names = [engine.submit(prompt, count) for prompt, count in wanted]
    outputs = engine.run()
    expected = 0
    for name, (prompt, count) in zip(names, wanted, strict=True):
        sampled = min(count, len(outputs[name]) + 1)  # an end token was sampled, too
        expected += len(prompt) + sampled - 1
    assert engine.computed == expected


def test_requests_that_come_later_get_names_of_their_own():
    engine = MinimalEngine(served_model(), num_blocks=4, block_size=4)
    names = [engine.submit([20], 1), engine.submit([21], 6)]
    engine.step()  # the first has ended, the second runs
    names.append(engine.submit([22] * 9, 4))  # waits
    names.append(engine.submit([23], 2))
    assert sorted(engine.run()) == sorted(set(names)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "the prompt is empty"),
        ([7], 0, "max_tokens >= 1"),
        ([7] * 9, 8, "4 of 3 blocks"),
        ([-1], 1, "token ids, 0 or more"),
        ([1.5], 1, "token ids"),
        ([257], 1, "outside the vocabulary of 257"),
        ([7] * 90, 7, "exceed the model's 96 positions"),
        ([7], 2.5, "max_tokens must be an integer"),
        ("ab", 1, "no token ids yet"),
    ],
)
def test_what_can_never_be_served_is_rejected(prompt, max_tokens, message):
    engine = MinimalEngine(served_model(), num_blocks=3, block_size=4)
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, max_tokens)
    assert not engine.waiting
