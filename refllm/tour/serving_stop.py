"""A burst of prompts with a shared beginning through the serving engine: what was computed,
found and held.

Everything but the seconds is counted by engine, scheduler and pool themselves (kind A). The
same burst is served without a prefix cache, with a radix tree, and with a tree and too few
blocks.

Left out: arrivals over time (``simulate.simulator``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from refllm.api import Model
from refllm.serve.engine import Engine
from refllm.serve.request import Request

BLOCK = 16


@dataclass(frozen=True)
class Served:
    """What one engine made of the burst."""

    outputs: list[list[int]]
    steps: int
    prompt_tokens: int
    computed: int  # tokens that went through the network, those that preemption threw away twice
    cached: int
    preemptions: int
    peak_blocks: int
    blocks: int
    seconds: float


def prompts(tokens: list[int], shared: int, own: int, count: int) -> list[list[int]]:
    """``count`` prompts that begin with the same ``shared`` tokens and go on with ``own``
    tokens each of their own.
    """
    needed = shared + own * count
    if len(tokens) < needed:
        raise ValueError(
            f"{count} prompts of {shared} shared and {own} own tokens need {needed}, got {len(tokens)}"
        )
    return [
        tokens[:shared] + tokens[shared + i * own : shared + (i + 1) * own] for i in range(count)
    ]


def serve(
    model: Model, texts: list[list[int]], new: int, *, cached: bool, share: float = 1.0
) -> Served:
    """Serve all texts at once, ``new`` tokens each, from ``share`` of the blocks that they
    need side by side.
    """
    each = max(-(-(len(text) + new) // BLOCK) for text in texts)
    blocks = max(each, int(share * sum(-(-(len(text) + new) // BLOCK) for text in texts)))
    engine = Engine(
        model,
        num_blocks=blocks,
        block_size=BLOCK,
        max_batch_tokens=512,
        policy="lpm" if cached else "fcfs",
        prefix_cache="radix" if cached else None,
    )
    began = time.perf_counter()
    names = [engine.submit(Request(text, new, ignore_eos=True)) for text in texts]
    results = engine.run()
    seconds = time.perf_counter() - began
    return Served(
        [results[name].tokens for name in names],
        engine.steps,
        sum(map(len, texts)),
        engine.computed_tokens,
        engine.cached_tokens,
        engine.preemptions,
        engine.peak_blocks,
        blocks,
        seconds,
    )
