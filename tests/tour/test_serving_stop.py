"""A burst through the engine: the same tokens whatever the memory, and a shared prefix
computed once.
"""

from __future__ import annotations

import pytest

from refllm.api import Model
from refllm.tour.serving_stop import prompts, run_engine
from tiny_models import tiny_model


def test_a_shared_prefix_is_computed_once_and_few_blocks_change_no_token():
    record = tiny_model(1, max_position_embeddings=512)
    model = Model(record.config, record.weights, record.tokenizer)
    requests = prompts([i % 250 for i in range(64 + 5 * 8)], 64, 8, 5)
    assert all(prompt[:64] == requests[0][:64] for prompt in requests)
    plain = run_engine(model, requests, 6, cached=False)
    tree = run_engine(model, requests, 6, cached=True)
    scarce = run_engine(model, requests, 6, cached=True, share=0.25)
    assert plain.outputs == tree.outputs == scarce.outputs
    assert (plain.cached, plain.computed) == (0, 5 * (72 + 5))
    assert tree.cached == 4 * 64
    assert tree.computed == plain.computed - tree.cached
    assert scarce.peak_blocks <= scarce.blocks < tree.blocks
    assert scarce.steps > tree.steps


def test_a_text_that_is_too_short_is_rejected():
    with pytest.raises(ValueError, match="need 30, got 3"):
        prompts([1, 2, 3], 10, 10, 2)
