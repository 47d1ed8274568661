"""The loop that every decoding engine serves: generate, timed here, where no pipe and no start-up is counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common import Channel

Tokens = list[list[int]]
Generate = Callable[[Tokens, int], Tokens]  # prompts, number of new tokens → the new tokens of each


def serve(generate: Generate, **about: Any) -> None:
    """Answer requests ``{prompts, new, seconds}``: generate again and again for at least ``seconds``."""
    channel = Channel()
    channel.send(**about)
    while (request := channel.receive()) is not None:
        prompts, new = request["prompts"], request["new"]
        calls, began = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - began < request["seconds"]:
            tokens = generate(prompts, new)
            calls += 1
        seconds = time.perf_counter() - began
        channel.send(tokens=tokens, calls=calls, rate=calls * len(prompts) * new / seconds)
