"""The engine keeps nothing that is stale: keys and values of old weights, blocks that a copy
has still to read, a plan that was broken off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.api import Model
from refllm.serve.engine import Engine
from refllm.serve.plan import Plan, ScheduledSequence
from refllm.serve.request import Request
from serving import alone, served_model
from tiny_models import tiny_model

PROMPT = [*range(1, 13), 3]
CACHES = ["hash", "radix"]


def fresh_model(seed: int = 3) -> Model:
    """A model whose weights may be replaced."""
    record = tiny_model(seed, vocab_size=257, max_position_embeddings=96)
    layers = [dict(layer) for layer in record.weights["layers"]]
    return Model(record.config, {**record.weights, "layers": layers}, record.tokenizer)


def greedy(model: Model, text: list[int], count: int) -> list[int]:
    """The next tokens, each from a full forward."""
    text = list(text)
    for _ in range(count):
        text.append(int(np.asarray(model.logits(text))[-1].argmax()))
    return text[len(text) - count :]


def replace_weights(model: Model, how: str, other: Model) -> None:
    """All at once, one matrix of a layer, or the values of one in place."""
    if how == "record":
        model.weights = other.weights
    elif how == "layer":
        model.weights["layers"][0]["up_proj"] = other.weights["layers"][0]["up_proj"]
    else:
        model.weights["norm"] *= np.linspace(0.2, 3, model.weights["norm"].size)


@pytest.mark.theorem(
    "After weights were replaced, every further token is that of the new weights: no key or "
    "value of the old ones is read, of cached prefixes or of running sequences",
    source="serve/engine.py",
)
@pytest.mark.parametrize("cache", [*CACHES, None])
@pytest.mark.parametrize("how", ["record", "layer", "in place"])
@pytest.mark.parametrize("steps", [0, 3])
def test_no_key_of_old_weights_is_read(cache, how, steps):
    model = fresh_model()
    engine = Engine(model, num_blocks=40, block_size=4, prefix_cache=cache)
    engine.submit(Request(PROMPT, 4, ignore_eos=True))
    engine.run()
    name = engine.submit(Request(PROMPT, 8, ignore_eos=True))
    for _ in range(steps):
        engine.step()
    old = list(engine.scheduler.running[0].output) if steps else []
    assert len(old) == steps
    replace_weights(model, how, fresh_model(4))
    if how == "in place":
        engine.reset_prefix_cache()
    assert engine.run()[name].tokens == old + greedy(model, PROMPT + old, 8 - steps)
    engine.check()


@pytest.mark.parametrize("cache", CACHES)
def test_a_reset_prefix_cache_finds_nothing_and_fills_again(cache):
    engine = Engine(served_model(), num_blocks=40, block_size=4, prefix_cache=cache, poison=True)
    found = []
    for reset in (False, False, True, False):
        if reset:
            engine.reset_prefix_cache()
            assert engine.pool.num_free == 40
            assert engine.cached_blocks == 0
        before = engine.cached_tokens
        name = engine.submit(Request(PROMPT, 4, ignore_eos=True))
        assert engine.run()[name].tokens == alone(Request(PROMPT, 4, ignore_eos=True))[0]
        found.append(engine.cached_tokens - before)
        engine.check()
    assert found == [0, 12, 0, 12]


@pytest.mark.parametrize("cache", [*CACHES, None])
@pytest.mark.parametrize("moment", ["plan", "callback"])
def test_a_reset_within_a_step_keeps_every_token(cache, moment):
    engine = Engine(served_model(), num_blocks=40, block_size=4, prefix_cache=cache, poison=True)
    calls = []

    def reset(what: object) -> None:
        calls.append(what)
        if len(calls) == 3:
            engine.reset_prefix_cache()

    if moment == "plan":
        engine.on_plan = reset
    requests = [
        Request(PROMPT, 6, 0, ignore_eos=True),
        Request(PROMPT, 5, 1, n=2, temperature=1.0, seed=3, ignore_eos=True),
    ]
    for request in requests:
        engine.submit(request, reset if moment == "callback" else None)
    while engine.unfinished:
        engine.step()
        engine.check()
    assert engine.preemptions > 0
    results = engine.run()
    for request in requests:
        for output in results[request.request_id].outputs:
            assert output.tokens == alone(request, output.index)[0]


# --- copies -------------------------------------------------------------------------------


@pytest.mark.theorem(
    "Nothing in a plan frees, copies into or writes what one of its copies reads, whichever "
    "sequence is preempted in it",
    source="Kwon et al. 2023, section 4.4; serve/plan.py",
)
@given(
    blocks=st.integers(5, 9),
    long_prefill=st.sampled_from([0, 2]),
    order=st.permutations(range(3)),
    n=st.integers(2, 3),
    length=st.integers(5, 9),
    cache=st.sampled_from(["hash", "radix", None]),
)
def test_a_copy_reads_what_it_was_planned_to_read(blocks, long_prefill, order, n, length, cache):
    engine = Engine(
        served_model(),
        num_blocks=blocks,
        block_size=4,
        long_prefill=long_prefill,
        prefix_cache=cache,
        poison=True,
        on_plan=Plan.check,
    )
    requests = [
        Request(range(100, 110), 2, 0, ignore_eos=True),
        Request(range(50, 50 + length), 6, 1, n=n, temperature=1.0, seed=2, ignore_eos=True),
        Request(range(30, 37), 6, 2, n=2, temperature=1.0, seed=3, ignore_eos=True),
    ]
    requests = [requests[i] for i in order]
    accepted = [r for r in requests if engine.scheduler.rejection_reason(r) is None]
    for request in accepted:
        engine.submit(request)
    results = run_checked(engine)
    for request in accepted:
        assert results[request.request_id].error is None
        for output in results[request.request_id].outputs:
            assert output.tokens == alone(request, output.index)[0]
    assert engine.pool.num_used == engine.cached_blocks


def run_checked(engine: Engine) -> dict[Any, Any]:
    while engine.unfinished:
        engine.step()
        engine.check()
    return engine.run()


def test_a_source_that_is_preempted_in_the_same_plan_is_copied_first():
    """Its last owner is preempted, and its block given away, before the copy is made."""
    engine = Engine(
        served_model(),
        num_blocks=5,
        block_size=4,
        long_prefill=2,
        prefix_cache=None,
        poison=True,
        on_plan=Plan.check,
    )
    engine.submit(Request(range(100, 110), 2, 0, ignore_eos=True))
    engine.submit(Request(range(50, 57), 6, 1, n=2, temperature=1.0, seed=2, ignore_eos=True))
    results = run_checked(engine)
    assert engine.preemptions > 0
    for request_id, n in ((0, 1), (1, 2)):
        for output in results[request_id].outputs:
            assert output.finish_reason == "length"
            assert output.tokens == alone(results[request_id].request, output.index)[0]
        assert len(results[request_id].outputs) == n


def test_plans_whose_copies_race_are_recognised():
    def plan(*copies: tuple[int, int], start: int = 2, other: int = 2) -> Plan:
        items = [
            ScheduledSequence(("a", 0), start, 1, (0, 2), 1),
            ScheduledSequence(("b", 0), other, 1, (1, 3), 1),
        ]
        return Plan(0, items, copies=list(copies), block_size=2)

    plan((4, 2)).check()
    plan((3, 2), start=3, other=3).check()  # b writes behind the one token that is copied
    with pytest.raises(AssertionError, match="written where a copy reads"):
        plan((3, 2), start=3, other=2).check()
    with pytest.raises(AssertionError, match="a copy reads what another one writes"):
        plan((4, 2), (2, 3)).check()


# --- errors of the engine's own -----------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["reserve", "admit", "match", "blocks", "hold", "release"])
@pytest.mark.parametrize("cache", ["hash", "radix", None])
def test_a_failure_of_planning_itself_is_raised_and_no_token_is_lost(
    monkeypatch, error, method, cache
):
    requests = [
        Request(PROMPT, 9, 0, n=2, temperature=1.0, seed=2, ignore_eos=True),
        Request(PROMPT[::-1], 9, 1, ignore_eos=True),
        Request(PROMPT[4:], 9, 2, n=2, beam=True, ignore_eos=True),
    ]
    engine = Engine(
        served_model(), num_blocks=12, block_size=4, prefix_cache=cache, poison=True,
        long_prefill=5,
    )  # fmt: skip
    for request in requests:
        engine.submit(request)
    memory = engine.scheduler.memory
    real = getattr(memory, method)
    calls = [0]

    def fails_now_and_then(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] % 7 == 5 and engine.scheduler.step is None and planning:
            raise error("lost")
        return real(*arguments, **options)

    planning = False
    raised = 0
    monkeypatch.setattr(memory, method, fails_now_and_then)
    plan = engine.scheduler.plan

    def planned() -> Plan:
        nonlocal planning
        planning = True
        try:
            return plan()
        finally:
            planning = False

    monkeypatch.setattr(engine.scheduler, "plan", planned)
    for _ in range(200):
        if not engine.unfinished:
            break
        try:
            engine.step()
        except error:
            raised += 1
        engine.check()
    monkeypatch.undo()
    results = engine.run()
    for request in requests[:2]:
        for output in results[request.request_id].outputs:
            assert output.tokens == alone(request, output.index)[0]
    assert engine.used_blocks == 0
    assert raised or method in ("hold",)


@pytest.mark.parametrize("in_place", [False, True])
def test_prompt_logprobs_are_of_one_network_where_weights_change_within_the_prompt(in_place):
    first, second = (
        tiny_model(seed, vocab_size=257, max_position_embeddings=96, eos_token_ids=(5,))
        for seed in (3, 4)
    )
    model = Model(first.config, first.weights, first.tokenizer)
    engine = Engine(model, num_blocks=40, block_size=4, max_batch_tokens=4)
    prompt = list(range(10, 24))
    engine.submit(Request(prompt, 2, "r", prompt_logprobs=0, ignore_eos=True))
    engine.step()
    engine.step()
    if in_place:
        first.weights["norm"][:] = second.weights["norm"] * 1.5
        engine.reset_prefix_cache()
    else:
        model.weights = second.weights
    found = engine.run()["r"].prompt_logprobs
    other = Engine(model, num_blocks=40, block_size=4)
    other.submit(Request(prompt, 2, "r", prompt_logprobs=0, ignore_eos=True))
    expected = other.run()["r"].prompt_logprobs
    assert len(found) == len(expected) == len(prompt)
    for entry, of_one in zip(found[1:], expected[1:], strict=True):
        ((token, one),) = entry.items()
        assert abs(one.logprob - of_one[token].logprob) <= 1e-12
