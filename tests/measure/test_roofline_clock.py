"""The clock of simulated serving tells the roofline's time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.measure.device import DEVICES, DeviceSpec
from refllm.measure.memory import LLAMA_8B, kv_bytes_per_token, weight_bytes
from refllm.measure.roofline import projected_seconds, step_cost
from refllm.measure.roofline_clock import RooflineClock

CONFIGS = {
    "grouped": LLAMA_8B,
    "window": replace(LLAMA_8B, family="mistral", sliding_window=40),
    "tied": replace(LLAMA_8B, tie_word_embeddings=True),
}
batches = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), min_size=1, max_size=6)


@pytest.mark.theorem(
    "The clock's step = max(FLOP/peak, bytes/peak) + overhead of step_cost", source="the roofline"
)
@given(
    st.sampled_from(sorted(CONFIGS)), batches, st.floats(0.5, 4), st.floats(0.5, 4), st.booleans()
)
def test_a_step_takes_what_its_cost_says(name, batch, weights, kv, slow):
    config = CONFIGS[name]
    device = DeviceSpec("slow to compute", 1e11, 1e12, overhead=1e-3) if slow else DEVICES["h200"]
    clock = RooflineClock(config, device, weights, kv)
    cost = step_cost(config, batch, weight_bytes_per_param=weights, kv_bytes_per_value=kv)
    # four sums of positive terms, in another order
    assert clock.step(batch, len(batch)) == pytest.approx(
        projected_seconds(cost, device), rel=1e-14
    )


@given(
    st.sampled_from(sorted(CONFIGS)),
    st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    st.integers(1, 60),
)
def test_decoding_takes_its_steps_one_after_the_other(name, pasts, count):
    for device in (DEVICES["h200"], DeviceSpec("slow to compute", 1e11, 1e12, overhead=1e-3)):
        clock = RooflineClock(CONFIGS[name], device)
        steps = [clock.step([(past + i, 1) for past in pasts], len(pasts)) for i in range(count)]
        assert clock.decode(pasts, count) == pytest.approx(steps, rel=1e-14)


def test_a_step_without_logits_saves_the_head():
    clock = RooflineClock(LLAMA_8B, DEVICES["a100"])
    cost = step_cost(LLAMA_8B, [(0, 8)], logits_rows=0)
    assert clock.step([(0, 8)], 0) == pytest.approx(projected_seconds(cost, DEVICES["a100"]))
    assert clock.step([], 0) == 0


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_moving_costs_bytes_and_copies(tokens, size):
    clock = RooflineClock(LLAMA_8B, DEVICES["a100"], link=1e10, latency=1e-6)
    blocks = -(-tokens // size)
    expected = tokens * kv_bytes_per_token(LLAMA_8B) / 1e10 + blocks * 64 * 1e-6
    assert clock.move(tokens, blocks) == pytest.approx(expected)
    assert clock.move(tokens, tokens) >= clock.move(tokens, blocks)  # small blocks are many copies


def test_slots_are_what_the_weights_leave():
    clock = RooflineClock(LLAMA_8B, DEVICES["a100"])
    n = clock.slots(40e9)
    assert weight_bytes(LLAMA_8B) + n * 131_072 <= 40e9 < weight_bytes(LLAMA_8B) + (n + 1) * 131_072
    with pytest.raises(ValueError, match="too little for 8.03 billion parameters"):
        clock.slots(10e9)
    with pytest.raises(ValueError, match="a link needs"):
        RooflineClock(LLAMA_8B, DEVICES["a100"], link=0)


@pytest.mark.parametrize(("link", "latency"), [(0.5, 0.0), (1e9, 0.0), (0.5, 2.0)])
def test_a_slow_link_and_copies_without_latency_are_accepted(link, latency):
    clock = RooflineClock(LLAMA_8B, DEVICES["a100"], link=link, latency=latency)
    assert clock.move(1, 1) == kv_bytes_per_token(LLAMA_8B) / link + 64 * latency


@pytest.mark.parametrize(("link", "latency"), [(0.0, 0.0), (-1.0, 0.0), (1e9, -1e-9)])
def test_a_link_without_speed_or_with_negative_latency_is_rejected(link, latency):
    with pytest.raises(ValueError, match="a link needs"):
        RooflineClock(LLAMA_8B, DEVICES["a100"], link=link, latency=latency)
