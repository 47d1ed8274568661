"""The tour's stop for serving: a burst of prompts with a shared prefix through the engine.

The burst is served without a prefix cache, with a radix tree, and with a radix tree and too
few blocks. Everything except the seconds is counted by engine, scheduler and block pool.

Left out: arrivals over time (``simulate.simulator``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from refllm.api import Model
from refllm.corpus import held_out_documents
from refllm.errors import InputError
from refllm.serve.engine import Engine
from refllm.serve.request import Request
from refllm.terminal import table
from refllm.tour.context import Tour

BLOCK = 16  # tokens
SHARED = 192  # prompt tokens that all requests share
OWN = 16  # prompt tokens of each request alone
REQUESTS = 16
NEW_TOKENS = 24
SCARCE = 0.2  # share of the blocks that the requests need side by side


def serve(tour: Tour) -> None:
    """A burst of prompts with a shared prefix: with and without a prefix cache, and with too
    little memory.
    """
    text = "".join(d.text for d in held_out_documents())
    tokens = tour.model.tokenizer.encode(text[: 8 * (SHARED + OWN * REQUESTS)], special=True)
    requests = prompts(tokens, SHARED, OWN, REQUESTS)
    settings = {
        "none": (False, 1.0),
        "radix tree": (True, 1.0),
        "radix tree, few blocks": (True, SCARCE),
    }
    made = table(
        "prefix cache", "steps", "computed", "cached", "preempted", "peak blocks", "seconds"
    )
    runs = []
    for name, (cached, share) in settings.items():
        run = run_engine(tour.model, requests, NEW_TOKENS, cached=cached, share=share)
        runs.append(run)
        made.add_row(
            name,
            f"{run.steps}",
            f"{run.computed:,}",
            f"{run.cached / run.prompt_tokens:.0%}",
            f"{run.preemptions}",
            f"{run.peak_blocks}/{run.blocks}",
            f"{run.seconds:.2f}",
        )
    tour.out.print(made)
    tour.say()
    same = sum(a == b == c for a, b, c in zip(*(run.outputs for run in runs), strict=True))
    tour.say(
        f"{REQUESTS} prompts with the same first {SHARED} tokens and {OWN} of their own, "
        f"{NEW_TOKENS} new tokens each, submitted at once; computed tokens, and the share "
        "of prompt tokens found in the cache. Each step follows a plan: which request "
        f"computes how many tokens in which blocks of {BLOCK}. With a tree the first "
        "prompt is prefilled before the others, which reuse its blocks; with few blocks "
        f"requests wait, or are preempted and recomputed. {same} of {REQUESTS} outputs are "
        "the same in all three runs; others differ where two logits are equal up to "
        "float32 rounding."
    )


@dataclass(frozen=True)
class BurstResult:
    """The outputs of one burst, and what the engine counted."""

    outputs: list[list[int]]
    steps: int
    prompt_tokens: int
    computed: int  # tokens through the network; recomputed ones count again
    cached: int
    preemptions: int
    peak_blocks: int
    blocks: int
    seconds: float


def prompts(tokens: list[int], shared: int, own: int, count: int) -> list[list[int]]:
    """``count`` prompts that share their first ``shared`` tokens and have ``own`` tokens each
    after them.

    >>> prompts([7, 8, 1, 2, 3, 4], shared=2, own=1, count=3)
    [[7, 8, 1], [7, 8, 2], [7, 8, 3]]
    """
    needed = shared + own * count
    if len(tokens) < needed:
        raise InputError(
            f"{count} prompts of {shared} shared and {own} own tokens need {needed}, got "
            f"{len(tokens)}"
        )
    starts = range(shared, needed, own)
    return [tokens[:shared] + tokens[start : start + own] for start in starts]


def run_engine(
    model: Model, requests: list[list[int]], new: int, *, cached: bool, share: float = 1.0
) -> BurstResult:
    """Serve all prompts at once, ``new`` tokens each, from ``share`` of the blocks that they
    need side by side.
    """
    needed = [-(-(len(prompt) + new) // BLOCK) for prompt in requests]
    blocks = max(max(needed), int(share * sum(needed)))
    engine = Engine(
        model,
        num_blocks=blocks,
        block_size=BLOCK,
        max_batch_tokens=512,
        policy="lpm" if cached else "fcfs",
        prefix_cache="radix" if cached else None,
    )
    began = time.perf_counter()
    names = [engine.submit(Request(prompt, new, ignore_eos=True)) for prompt in requests]
    results = engine.run()
    seconds = time.perf_counter() - began
    return BurstResult(
        [results[name].tokens for name in names],
        engine.steps,
        sum(map(len, requests)),
        engine.computed_tokens,
        engine.cached_tokens,
        engine.preemptions,
        engine.peak_blocks,
        blocks,
        seconds,
    )
