"""The times of a streamed answer satisfy the identities that define them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.measure.latency import Stopwatch


def run(start: int, gaps: list[int]) -> Stopwatch:
    """A stopwatch whose clock shows whole seconds: sums of them are exact."""
    times = iter([start, *(start + sum(gaps[: i + 1]) for i in range(len(gaps)))])
    watch = Stopwatch(lambda: float(next(times)))
    for token in range(len(gaps)):
        watch.tick(token)
    return watch


@pytest.mark.theorem(
    "TTFT ≤ E2EL = TTFT + Σ ITL, and O = 1 + len(ITL)", source="definitions of vLLM's bench serve"
)
@given(st.integers(0, 1000), st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_times_of_a_request_add_up(start, gaps):
    watch = run(start, gaps)
    assert watch.ttft == gaps[0]
    assert watch.ttft <= watch.e2el == watch.ttft + sum(watch.gaps)
    assert watch.tokens == 1 + len(watch.gaps) == len(gaps)
    if len(gaps) > 1:
        assert watch.tpot == sum(gaps[1:]) / (len(gaps) - 1)
        assert (
            math.isnan(watch.tokens_per_second)
            if watch.tpot == 0
            else watch.tokens_per_second == 1 / watch.tpot
        )


def test_what_is_not_known_yet_is_nan():
    none = run(5, [])
    one = run(5, [3])
    assert none.tokens == 0
    assert none.gaps == one.gaps == []
    assert all(math.isnan(x) for x in (none.ttft, none.e2el, none.tpot, none.tokens_per_second))
    assert math.isnan(one.tpot)
    assert one.ttft == one.e2el == 3
