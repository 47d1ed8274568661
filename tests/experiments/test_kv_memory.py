"""The data of the figure of cache sizes are those of the formula."""

from __future__ import annotations

from refllm.experiments.kv_memory import kv_memory_data


def test_the_figure_shows_the_formula():
    data = kv_memory_data((1, 1000))
    assert data["lines"]["70B shape, 64 KV heads"] == [2_621_440, 2_621_440_000]
    assert (
        data["lines"]["70B shape, 8 KV heads, 4-bit cache"][0] * 4
        == data["lines"]["70B shape, 8 KV heads"][0]
    )
