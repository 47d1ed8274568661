"""The loop that every decoding engine serves: generate, timed here, where no pipe and no
start-up is counted.

Two clocks: the wall's, which is the result, and the processor time of the process, which a
neighbour on a busy machine distorts less (it still shares caches and memory).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from common import Channel

Tokens = list[list[int]]
Generate = Callable[[Tokens, int], Tokens]  # prompts, number of new tokens → the new tokens of each
Measure = Callable[[dict[str, Any]], dict[str, Any]]  # request → answer


def serve(generate: Generate, measures: Mapping[str, Measure] | None = None, **about: Any) -> None:
    """Answer requests ``{prompts, new, seconds}``: generate again and again for at least
    ``seconds``. A request ``{measure, …}`` goes to the function of that name.
    """
    channel = Channel()
    channel.send(**about)
    while (request := channel.receive()) is not None:
        if "measure" in request:
            channel.send(**(measures or {})[request["measure"]](request))
            continue
        prompts = request["prompts"]
        new = request["new"]
        calls = 0
        began = time.perf_counter()
        worked = time.process_time()
        while calls == 0 or time.perf_counter() - began < request["seconds"]:
            tokens = generate(prompts, new)
            calls += 1
        produced = calls * len(prompts) * new
        wall = time.perf_counter() - began
        processor = time.process_time() - worked
        channel.send(tokens=tokens, wall=produced / wall, processor=produced / processor)
