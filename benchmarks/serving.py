"""The serving engine: against transformers and llama.cpp, against the bare network, and
what its bookkeeping costs.

    python benchmarks/serving.py --output benchmarks/results/serving.json

1. Batches of 32 and 64 requests, 32 prompt tokens and 48 new ones each, greedy, float32,
   one thread: new tokens per second over those of transformers' ``generate`` for the same
   prompts (padded to nothing: all are equally long, which is transformers' best case), and
   over those of a loop of continuous batching with llama.cpp where that is installed. Also
   over refllm's own static ``generate_batch``: what paging and planning cost.
2. The control plane: of a decode step, the share that is not the network: plan, tables,
   sampling, bookkeeping, results. The clock is around the network, within the same steps.
3. Bookkeeping alone: a pool operation in pools of 10³ and 10⁵ blocks (O(1): a ratio near 1),
   a radix match and insert per token at prompts of 10³ and 8·10³ tokens (linear: a ratio near
   1), a plan for 256 running requests.

Left out: arrivals over time and policies (``refllm simulate``), GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from common import environment, finish, network, ratios, shown, spread, table
from threadpoolctl import threadpool_limits

from decode import ENGINE_PACKAGES, ORACLES, Engine, agreement, held_out_prompts, measure, start
from refllm.api import Model, load
from refllm.kv.block_pool import BlockPool
from refllm.kv.radix_tree import RadixCache
from refllm.serve import model_runner
from refllm.serve.engine import Engine as ServingEngine
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.plan import SampledTokens
from refllm.serve.request import Request
from refllm.serve.scheduler import Scheduler

ENGINES = {
    "engine": Engine("serving_refllm", (), (), ""),
    "static": Engine("decode_refllm", (), (), ""),
    "transformers": Engine("decode_transformers", ("dynamic",), ("torch", "transformers"), ORACLES),
    "transformers, static cache": Engine(
        "decode_transformers", ("static",), ("torch", "transformers"), ORACLES
    ),
    "llama.cpp": Engine(
        "serving_llamacpp", (), ("llama_cpp", "gguf"), "pip install llama-cpp-python gguf"
    ),
}
SHARE = 0.10  # targets: of a step that is not the network; of a plan for 256 running requests
PLAN_MS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with network(options.model) as (path, about), contextlib.ExitStack() as stack:
        prompts = held_out_prompts(load(path, backend="numpy"), max(options.batch), options.prompt)
        workers, skipped = start(options.engines, path, stack, ENGINES)
        record: dict[str, Any] = {
            "benchmark": "serving",
            "environment": environment(ENGINE_PACKAGES, dict.fromkeys(workers, 1)),
            "model": {"name": about},
            "settings": {
                name: getattr(options, name)
                for name in ("prompt", "new", "batch", "rounds", "seconds")
            },
            "skipped": skipped,
            "agreement": agreement(
                workers, load(path, backend="numpy", dtype="float64"), prompts, options
            ),
        }
        record["rates"] = measure(workers, prompts, options)
        with threadpool_limits(limits=1, user_api="blas"):
            model = load(path, backend="numpy")
            control = {
                str(batch): control_plane(model, prompts[:batch], options)
                for batch in options.batch
            }
    record["results"] = {
        "throughput": [throughput(batch, record["rates"]) for batch in options.batch],
        "control_plane_share": control,
        "books": books(options),
    }
    show(record)
    finish(record, options.output)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The serving engine against other programs, as ratios."
    )
    parser.add_argument("--model", help="a checkpoint directory (default: the bundled model)")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64], metavar="B")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens a request")
    parser.add_argument("--new", type=int, default=48, help="new tokens a request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="shortest turn of an engine at one batch"
    )
    parser.add_argument(
        "--running", type=int, default=256, help="requests of the plan that is timed"
    )
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    return parser.parse_args(arguments)


def throughput(batch: int, rates: dict[str, Any]) -> dict[str, Any]:
    """The engine's new tokens per second, and their ratio to each other's of the same rounds."""
    wall = rates["wall"][str(batch)]
    row: dict[str, Any] = {
        "batch": batch,
        "tokens_per_second": {name: spread(r) for name, r in wall.items()},
    }
    others = [name for name in wall if name != "engine"]
    row["ratio"] = {name: ratios(wall["engine"], wall[name]) for name in others if "engine" in wall}
    return row


def control_plane(
    model: Model, prompts: list[list[int]], options: argparse.Namespace
) -> dict[str, float]:
    """The share of decode steps that is not the network: one median over the steps of each
    round.
    """
    inside: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            out = function(*arguments)
            inside[-1] += time.perf_counter() - began
            return out

        return call

    rounds = []
    with (
        mock.patch.object(model_runner, "forward", timed(model_runner.forward)),
        mock.patch.object(model_runner, "logits", timed(model_runner.logits)),
    ):
        for _ in range(options.rounds):
            engine = ServingEngine(model, num_blocks=10 * len(prompts), max_sequences=len(prompts))
            # a decode step; a prefill goes through the two above
            engine._runner._decode_step = timed(engine._runner._decode_step)
            for prompt in prompts:
                engine.submit(Request(prompt, options.new, ignore_eos=True))
            shares = []
            while engine.unfinished:
                inside.append(0.0)
                began = time.perf_counter()
                engine.step()
                shares.append(1 - inside[-1] / (time.perf_counter() - began))
            rounds.append(statistics.median(shares[1:]))  # the first step is the prefill
    return spread(rounds)


def books(options: argparse.Namespace) -> dict[str, Any]:
    """Ratios of a large case to a small one, in turn, and the time of a plan in
    milliseconds.
    """
    return {
        "pool_10^5_to_10^3": ratios(
            *_in_turn(lambda n: pool_operations(n), (10**5, 10**3), options.rounds)
        ),
        "radix_match_8000_to_1000": ratios(
            *_in_turn(lambda n: radix(n)[0], (8000, 1000), options.rounds)
        ),
        "radix_insert_8000_to_1000": ratios(
            *_in_turn(lambda n: radix(n)[1], (8000, 1000), options.rounds)
        ),
        "plan_ms": spread([plan_milliseconds(options.running) for _ in range(options.rounds)]),
        "running": options.running,
    }


def _in_turn(
    cost: Callable[[int], float], sizes: tuple[int, int], rounds: int
) -> tuple[list[float], list[float]]:
    pairs = [(cost(sizes[0]), cost(sizes[1])) for _ in range(rounds)]
    return [large for large, _ in pairs], [small for _, small in pairs]


def pool_operations(blocks: int, repeats: int = 20) -> float:
    """Seconds an operation: 100 blocks are allocated, forked, named, freed twice, beside
    all others in use.
    """
    pool = BlockPool(blocks, 16)
    others = [pool.allocate() for _ in range(blocks - 200)]
    samples = []
    for i in range(repeats):
        began = time.perf_counter()
        some = [pool.allocate() for _ in range(100)]
        for block in some:
            pool.remember(pool.fork(block), (i, block))
        for block in some:
            pool.free(block)
            pool.free(block)
        samples.append((time.perf_counter() - began) / 500)
    assert len(others) == pool.num_used
    return statistics.median(samples)


def radix(length: int, repeats: int = 20) -> tuple[float, float]:
    """Seconds a token of a match and of an insertion, half of the prompt being cached
    already.
    """
    matches = []
    inserts = []
    for i in range(repeats):
        cache = RadixCache()
        tokens = [(7 * i + t) % 4096 for t in range(length)]
        slots = list(range(length))
        cache.insert(tokens[: length // 2], slots[: length // 2])
        began = time.perf_counter()
        cache.match(tokens)
        middle = time.perf_counter()
        cache.insert(tokens, slots)
        matches.append((middle - began) / length)
        inserts.append((time.perf_counter() - middle) / length)
    return statistics.median(matches), statistics.median(inserts)


def plan_milliseconds(running: int, steps: int = 40) -> float:
    """Of a decode step's ``plan`` for so many requests of about 300 tokens."""
    scheduler = Scheduler(
        PagedKVManager(BlockPool(running * 25, 16)), max_batch_tokens=None, max_sequences=running
    )
    for i in range(running):
        scheduler.submit(Request(range(256 + i % 64), 64))
    samples = []
    for _ in range(steps):
        began = time.perf_counter()
        plan = scheduler.plan()
        samples.append(time.perf_counter() - began)
        scheduler.update(plan, [[SampledTokens([1])] for _ in plan.sampling])
    return 1e3 * statistics.median(samples[1:])


def show(record: dict[str, Any]) -> None:
    settings = record["settings"]
    results = record["results"]
    rows = results["throughput"]
    names = list(rows[0]["tokens_per_second"])
    print(
        f"\nServing, {record['model']['name']}: {settings['prompt']} prompt + "
        f"{settings['new']} new tokens, greedy, float32, one thread each, "
        f"{settings['rounds']} rounds in turn (measured here)"
    )
    rates = [
        [r["batch"], *(f"{r['tokens_per_second'][n]['median']:.0f}" for n in names)] for r in rows
    ]
    table("new tokens per second, median of the rounds", ["batch", *names], rates)
    others = list(rows[0]["ratio"])
    table(
        "engine / other",
        ["batch", *others],
        [[r["batch"], *(shown(r["ratio"][n]) for n in others)] for r in rows],
    )
    shares = results["control_plane_share"]
    table(
        "share of a decode step that is not the network",
        ["batch", "share", "target"],
        [[batch, f"{share['median']:.1%}", f"<= {SHARE:.0%}"] for batch, share in shares.items()],
    )
    some = results["books"]
    costs = [[name, shown(value)] for name, value in some.items() if "_to_" in name]
    table(
        "cost of the large case over the small one, an operation or a token",
        ["books", "ratio"],
        costs,
    )
    print(
        f"\nA plan for {some['running']} running requests: {some['plan_ms']['median']:.2f} "
        f"ms (target: <= {PLAN_MS:g} ms for 256)"
    )
    names = list(record["agreement"][str(rows[0]["batch"])])
    ties = {
        name: sum(len(at[name]["near_ties"]) for at in record["agreement"].values())
        for name in names
    }
    print(f"Sequences that part from the engine's at a near tie (all others are equal): {ties}")


if __name__ == "__main__":
    sys.exit(main())
