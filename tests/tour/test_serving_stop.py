"""A burst through the engine: the same tokens whatever the memory, and a shared beginning
computed once.
"""

from __future__ import annotations

import pytest

from refllm.api import Model
from refllm.tour.serving_burst import prompts, serve
from tiny_models import tiny_model


def test_a_shared_beginning_is_computed_once_and_scarcity_changes_no_token():
    record = tiny_model(1, max_position_embeddings=512)
    model = Model(record.config, record.weights, record.tokenizer)
    texts = prompts([i % 250 for i in range(64 + 5 * 8)], 64, 8, 5)
    assert all(text[:64] == texts[0][:64] for text in texts)
    plain = serve(model, texts, 6, cached=False)
    tree = serve(model, texts, 6, cached=True)
    scarce = serve(model, texts, 6, cached=True, share=0.25)
    assert plain.outputs == tree.outputs == scarce.outputs
    assert (plain.cached, plain.computed) == (0, 5 * (72 + 5))
    assert tree.cached == 4 * 64
    assert tree.computed == plain.computed - tree.cached
    assert scarce.peak_blocks <= scarce.blocks < tree.blocks
    assert scarce.steps > tree.steps


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="need 30, got 3"):
        prompts([1, 2, 3], 10, 10, 2)
