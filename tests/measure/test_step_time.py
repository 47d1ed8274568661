"""A step is timed at the batch and behind the past that it names."""

from __future__ import annotations

import pytest

from refllm.api import Model
from refllm.decode.fast.captured_step import make_decode_step
from refllm.measure import step_time
from refllm.measure.step_time import time_step
from refllm.model.llama import forward
from tiny_models import tiny_model


@pytest.mark.parametrize("batch", [[(8, 1)], [(8, 1)] * 3, [(0, 6)], [(4, 3), (0, 2)]])
def test_a_step_of_any_shape_is_timed_behind_its_past(batch, monkeypatch):
    made = tiny_model()
    seen = []

    def watched_forward(weights, config, tokens, positions, attend):
        seen.append(positions.tolist())
        return forward(weights, config, tokens, positions, attend)

    def watched_stepper(weights, config):
        step = make_decode_step(weights, config)
        return lambda tokens, positions, attend: (
            seen.append(positions),
            step(tokens, positions, attend),
        )[1]

    monkeypatch.setattr(step_time, "forward", watched_forward)
    monkeypatch.setattr(step_time, "make_decode_step", watched_stepper)
    assert time_step(Model(made.config, made.weights, made.tokenizer), batch, repeats=2) > 0
    assert seen == 3 * [[past + i for past, new in batch for i in range(new)]]  # one to warm up
