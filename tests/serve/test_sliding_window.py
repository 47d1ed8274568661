"""Blocks behind a sliding window are freed while a sequence runs: the same tokens, fewer
blocks, the same prefixes found.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from refllm.api import Model
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.kv.block_pool import NO_BLOCK
from refllm.serve.engine import Engine
from refllm.serve.request import Request
from tiny_models import tiny_model

WINDOW = 6


def network(window: int | None = WINDOW) -> Model:
    record = tiny_model(
        3, family="mistral", sliding_window=window, max_position_embeddings=96, eos_token_ids=()
    )
    return Model(record.config, record.weights, record.tokenizer)


MODEL = network()


def expected(request: Request) -> list[int]:
    return MODEL.generate(list(request.prompt), request.max_tokens)


@pytest.mark.theorem(
    "Freeing the blocks behind a sliding window changes no token, in chunks, with drafts, beams, "
    "forks, preemption and cached prefixes; a freed block that were read would be NaN",
    source="kv/block_pool.py; vLLM's sliding window manager",
)
@pytest.mark.parametrize("cache", [None, "hash", "radix"])
@pytest.mark.parametrize("drafter", [None, lambda: NGramDrafter(3, shortest=1)])
def test_tokens_are_those_of_the_whole_memory(cache, drafter):
    slid = 0
    for seed in range(6):
        rng = random.Random(seed)
        size = rng.choice([1, 2, 4])
        engine = Engine(
            MODEL,
            num_blocks=(rng.randint(34, 50) + size - 1) // size,
            block_size=size,
            prefix_cache=cache,
            drafter=drafter,
            max_batch_tokens=rng.choice([5, 9, 200]),
            poison=True,
        )
        asked = []
        for i in range(6):
            prompt = [1, 2, 3, *range(4, rng.randint(5, 16)), i % 2]
            n = rng.choice([1, 1, 2])
            asked.append(Request(prompt, rng.randint(3, 16), request_id=i, n=n))
        for request in asked:
            engine.submit(request)
            for _ in range(rng.choice([0, 0, 2])):
                engine.step()
        while engine.unfinished:
            engine.step()
            engine.check()
            tables = engine.scheduler.memory._tables.values()
            slid += sum(table.dropped for table in tables)
        for request in asked:
            for output in engine.results[request.request_id].outputs:
                assert output.tokens == expected(request)
        assert engine.used_blocks == 0
    assert (slid > 0) == (cache != "radix")


def most_blocks(model: Model, cache: str | None) -> int:
    engine = Engine(model, num_blocks=40, block_size=2, prefix_cache=cache, poison=True)
    engine.submit(Request(range(20), 30, n=2, ignore_eos=True))
    most = 0
    while engine.unfinished:
        engine.step()
        most = max(most, engine.used_blocks if engine.scheduler.steps > 1 else 0)
    return most


@pytest.mark.parametrize("cache", [None, "hash"])
def test_bound_a_sequence_holds_the_blocks_of_its_window(cache):
    """A window of 6 tokens touches at most 4 blocks of 2; the control holds all 50 tokens'."""
    assert most_blocks(MODEL, cache) <= 2 * 4
    assert most_blocks(network(window=None), cache) >= 25


def test_a_search_slides_too():
    wide = Engine(MODEL, num_blocks=90, block_size=1, prefix_cache="radix")
    narrow = Engine(MODEL, num_blocks=90, block_size=1, prefix_cache=None, poison=True)
    for engine in (wide, narrow):
        engine.submit(Request(range(9), 12, n=3, beam=True, request_id="r"))
    found, slid = wide.run()["r"], narrow.run()["r"]
    assert [o.tokens for o in found.outputs] == [o.tokens for o in slid.outputs]
    np.testing.assert_allclose(
        [o.score for o in found.outputs], [o.score for o in slid.outputs], atol=1e-11
    )
    assert narrow.peak_blocks < wide.peak_blocks


def test_a_prefix_whose_blocks_were_freed_is_still_found():
    engine = Engine(MODEL, num_blocks=40, block_size=2, prefix_cache="hash", poison=True)
    first = Request(range(20), 6)
    engine.submit(first)
    engine.run()
    again = engine.submit(Request([*range(20), 7], 6))
    result = engine.run()[again]
    assert result.cached_tokens == 20
    assert result.tokens == expected(Request([*range(20), 7], 6))
    plans: list[tuple[int, ...]] = []
    engine.on_plan = lambda plan: plans.extend(item.blocks for item in plan.items)
    engine.submit(first)
    engine.run()
    assert plans[-1][0] == NO_BLOCK
    assert plans[-1][-1] != NO_BLOCK
