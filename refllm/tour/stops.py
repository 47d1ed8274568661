"""The stops of the tour in their order, each a function that prints to the tour's console.

A stop may draw figures, takes less than ten seconds on two cores, and can be visited alone.
Every number is computed during the visit: counted (parameters, FLOP, bytes) or measured here
(seconds, GFLOP/s), never projected.

Left out: comparisons with other programs (``benchmarks/``), explanations (``notebooks/``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refllm.errors import InputError
from refllm.tour.chat_stop import chat
from refllm.tour.context import Tour
from refllm.tour.model_stops import cost, measure, meet, phases, write
from refllm.tour.serving_stop import serve
from refllm.tour.speculation_stop import speculate
from refllm.tour.technique_stops import cache, formats, shrink


@dataclass(frozen=True)
class Stop:
    """A name to visit it by, a title to print above it, and the function that visits it."""

    name: str
    title: str
    visit: Callable[[Tour], None]


STOPS = [
    Stop("meet", "The model", meet),
    Stop("write", "Writing code from a prompt", write),
    Stop("measure", "Predicting held-out text", measure),
    Stop("cost", "What a step costs", cost),
    Stop("phases", "Prefill and decode", phases),
    Stop("shrink", "Four bits per weight", shrink),
    Stop("formats", "One matrix in every format", formats),
    Stop("cache", "Two bits per key and value", cache),
    Stop("speculate", "Several tokens per step", speculate),
    Stop("serve", "Serving a burst of prompts", serve),
    Stop("chat", "A chat with a real model", chat),
]


def run(tour: Tour, names: Sequence[str] = ()) -> None:
    """Visit the named stops, or all, in the order of ``STOPS``.

    Raises
    ------
    ValueError
        for a name that no stop has.
    """
    from threadpoolctl import threadpool_limits

    known = [stop.name for stop in STOPS]
    for name in names:
        if name not in known:
            raise InputError(f"the tour has no stop {name!r}; its stops are {', '.join(known)}")
    chosen = [stop for stop in STOPS if not names or stop.name in names]
    began = time.perf_counter()
    with threadpool_limits(limits=1, user_api="blas"):
        for stop in chosen:
            number = known.index(stop.name) + 1
            tour.out.print(f"\n{number}  {stop.title}", style="bold")
            stop.visit(tour)
    tour.say()
    for path in tour.figures:
        tour.out.print(f"figure: {path}", soft_wrap=True)
    seconds = time.perf_counter() - began
    tour.say(f"{seconds:.0f} s in all. Next: `refllm --help`, or the notebooks.")
