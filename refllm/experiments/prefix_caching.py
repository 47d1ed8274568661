"""What prefix caching gains on the real engine: six programs, two caches, two orders, three
sizes of memory.

Source: Zheng et al. 2024 (SGLang), sections 3 and 6, whose headline is up to 6.4 times the
throughput (Lu 2025, "Transformer Notes (VII): Deployment Optimization", §2.4: 5 to 6 times).

| symbol  | name                      | value                                          |
|---------|---------------------------|------------------------------------------------|
| h       | hit rate                  | prompt tokens found cached / all of them       |
| P, O    | prompt and output tokens  | sums over a program's requests                 |
| c_p     | seconds per prompt token  | measured without a cache, answers of one token |
| c_d     | seconds per output token  | measured: what the other output tokens add     |
| speedup | what the formula predicts | (c_p·P + c_d·O) / (c_p·P·(1 − h) + c_d·O)      |

With h = 0.9 the speedup is 10 where nothing is generated, and below 2 where decoding takes
as long as prefill. A cache saves prefill alone, so it is worth most for short answers to
long shared prompts, and nothing for ``unique``: there the time inside the cache's calls is
all that it costs.

Hit rates are counted; seconds are measured, in turn within a round.

Left out: arrivals over time; caches beyond the pool.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from refllm.api import Model, load
from refllm.array_types import Json
from refllm.experiments.unpadding import hardware, held_out
from refllm.measure.records import Record, write
from refllm.serve.engine import Engine
from refllm.serve.prefix_caching import HashKVManager, RadixKVManager
from refllm.simulate import programs
from refllm.simulate.programs import Passages, Program, best_hit_rate, shuffled

# (prefix cache, order of admission)
CONFIGURATIONS = (
    (None, "fcfs"),
    ("hash", "fcfs"),
    ("hash", "lpm"),
    ("radix", "fcfs"),
    ("radix", "lpm"),
)
SIZES = (1, 2, 4)  # of memory, in longest requests
BLOCK = 16


def six(model: Model, size: int = 4) -> dict[str, Callable[[], Program]]:
    """Functions that make the programs, with the same tokens in every call; ``size`` ≥ 3
    scales the number of requests.
    """

    def made(make: Callable[[Passages], Program]) -> Callable[[], Program]:
        # requests of different users arrive mixed: in the order of the program FCFS would be
        # the tree's own order
        return lambda: shuffled(make(held_out(model)), np.random.default_rng(0))

    rng = np.random.default_rng
    return {
        "few-shot": made(lambda t: programs.few_shot(t, 4 * size)),
        "self-consistency": made(
            lambda t: programs.self_consistency(t, size // 2, samples=8, answer=12)
        ),
        "chat": made(lambda t: programs.chat(t, size, turns=4)),
        "tree of thought": made(
            lambda t: programs.tree_of_thought(t, max(1, size // 2), branches=2, depth=3)
        ),
        "RAG": made(lambda t: programs.rag(t, 4 * size, rng(1), documents=2 * size)),
        "unique": made(lambda t: programs.unique(t, 2 * size)),
    }


def run(
    model: Model,
    program: Program,
    cache: str | None,
    order: str,
    blocks: int,
    *,
    watched: bool = False,
) -> Json:
    """One program through the engine: seconds, tokens, hits; ``watched`` also measures the
    share of time inside cache calls.
    """
    engine = Engine(
        model,
        num_blocks=blocks,
        block_size=BLOCK,
        policy=order,
        prefix_cache=cache,
        max_sequences=None,
    )
    inside = [0.0]
    if watched:
        inside = _watch(engine)
    began = time.perf_counter()
    busy = time.process_time()
    for request in program.requests:
        engine.submit(request)
    prompts = []
    answers = []
    while engine.unfinished:
        engine.step()
        for name in list(engine.results):
            result = engine.results.pop(name)
            prompts.append(result.request.prompt_ids)
            answers.append(result.tokens)
            for request in program.follow(result.request, result.tokens):
                engine.submit(request)
    busy = time.process_time() - busy
    return {
        "seconds": time.perf_counter() - began,
        "processor": busy,
        "inside": inside[0] / busy,
        "hit": engine.hit_rate,
        "P": sum(map(len, prompts)),
        "O": engine.sampled_tokens,
        "steps": engine.steps,
        "best": best_hit_rate(prompts, answers),
        "computed": engine.computed_tokens,
        "preemptions": engine.preemptions,
    }


def longest(program: Program) -> int:
    """Tokens of the longest request, including the requests that follow from answers (of
    which only the length counts).
    """
    queue = list(program.requests)
    most = 0
    while queue:
        request = queue.pop()
        most = max(most, request.max_cached_tokens)
        queue += program.follow(request, [0] * request.max_tokens)
    return most


def measure(model: Model, make: Callable[[], Program], size: int, rounds: int) -> list[Json]:
    """All configurations of one program at one size of memory, in turn, with the speedup that
    the formula predicts for each.
    """
    blocks = size * -(-(longest(make()) + 1) // BLOCK)
    runs: list[list[Json]] = [[] for _ in CONFIGURATIONS]
    prefill = []
    for _ in range(rounds):
        prefill.append(run(model, _prefill_only(make()), None, "fcfs", blocks)["processor"])
        for i, (cache, order) in enumerate(CONFIGURATIONS):
            runs[i].append(run(model, make(), cache, order, blocks))
    plain = runs[0]
    c_p = statistics.median(prefill) / plain[0]["P"]
    c_d = (
        max(0.0, statistics.median(r["processor"] for r in plain) - c_p * plain[0]["P"])
        / plain[0]["O"]
    )
    rows = []
    for (cache, order), several in zip(CONFIGURATIONS, runs, strict=True):
        one = several[0]
        row: Json = {"cache": cache, "order": order, "memory": size}
        row |= {
            key: one[key] for key in ("hit", "best", "P", "O", "steps", "computed", "preemptions")
        }
        for clock in ("seconds", "processor"):
            ratios = [a[clock] / b[clock] for a, b in zip(plain, several, strict=True)]
            row[clock] = [r[clock] for r in several]
            row[f"speedup, {clock}"] = [statistics.median(ratios), min(ratios), max(ratios)]
        rows.append(row | {"formula": speedup(c_p, c_d, one["P"], one["O"], one["hit"])})
    return rows


def speedup(
    c_p: float,
    c_d: float,
    P: int,
    O: int,  # noqa: E741 (the symbols of the table)
    hit: float,
) -> float:
    """The speedup of a cache with this hit rate, if the time of a step is the sum over its tokens.

    >>> round(speedup(c_p=1, c_d=0, P=100, O=10, hit=0.9), 2)  # nothing but prefill
    10.0
    >>> round(speedup(c_p=1, c_d=1, P=100, O=100, hit=0.9), 2)
    1.82
    """
    return (c_p * P + c_d * O) / (c_p * P * (1 - hit) + c_d * O)


def overhead_data(model: Model, make: Callable[[], Program], rounds: int) -> dict[str, list[float]]:
    """On the control, where nothing is shared: the share of the processor's time inside the
    calls of each cache.
    """
    blocks = 4 * -(-(longest(make()) + 1) // BLOCK)
    return {
        cache: [
            run(model, make(), cache, "fcfs", blocks, watched=True)["inside"] for _ in range(rounds)
        ]
        for cache in ("hash", "radix")
    }


def prefixes_data(
    model: Model, *, size: int = 4, rounds: int = 3, sizes: tuple[int, ...] = SIZES
) -> Json:
    """Values of the figure ``prefixes``."""
    made = six(model, size)
    with threadpool_limits(limits=1, user_api="blas"):
        rows = {
            name: [row for m in sizes for row in measure(model, make, m, rounds)]
            for name, make in made.items()
        }
        inside = overhead_data(model, made["unique"], rounds)
    return {"programs": rows, "inside": inside}


def _prefill_only(program: Program) -> Program:
    """The same prompts with answers of one token: the requests of all turns at once, so that
    none follows from an answer.
    """
    queue = list(program.requests)
    every = []
    while queue:
        request = queue.pop(0)
        every.append(replace(request, max_tokens=1))
        queue += program.follow(request, [0] * request.max_tokens)
    return Program(program.name, every)


def _watch(engine: Engine) -> list[float]:
    """Sum the processor's time inside the cache's own calls from now on, in a list of one."""
    memory = engine.scheduler.memory
    total = [0.0]
    depth = [0]
    assert isinstance(memory, (HashKVManager, RadixKVManager))

    def timed(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object, **more: object) -> object:
            depth[0] += 1
            began = time.process_time()
            try:
                return call(*arguments, **more)
            finally:
                depth[0] -= 1
                if depth[0] == 0:  # calls of a cache to itself count once
                    total[0] += time.process_time() - began

        return wrapper

    for name in ("match", "insert", "take", "available", "lock", "unlock", "evict"):
        if hasattr(memory.cache, name):
            setattr(memory.cache, name, timed(getattr(memory.cache, name)))
    return total


def main(folder: str = "figures/data", rounds: int = 3) -> None:
    """Write the data of the figure ``prefixes``: minutes per round."""
    where = hardware()
    values = prefixes_data(load("stdlib", backend="numpy"), rounds=rounds)
    command = f"python -m refllm.experiments.prefix_caching {rounds}"
    write(f"{folder}/prefixes.json", Record(command, "A, B", where, values))


if __name__ == "__main__":
    main(rounds=int(sys.argv[1]) if sys.argv[1:] else 3)
