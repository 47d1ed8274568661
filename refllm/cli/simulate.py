"""``refllm simulate``: serving without a model, by the roofline's clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refllm.cli.options import BackendOption, JsonOption, opt
from refllm.terminal import console, pairs, progress, table

if TYPE_CHECKING:
    from refllm.measure.device import Device
    from refllm.model.config import ModelConfig
    from refllm.serve.base_scheduler import BaseScheduler
    from refllm.simulate.simulator import SimulationResult

SHAPES = ("llama-8b", "llama-70b")
# a few hundred MB of Python's integers; a device that holds more than this is never full
MOST_BLOCKS = 1 << 22


ModelOption = Annotated[
    str,
    opt(
        "A bundled model, a directory with a config.json, llama-8b or llama-70b.",
        "--model",
        "-m",
        metavar="NAME|DIR",
    ),
]
DeviceOption = Annotated[str, opt("h200, a100, or here: this machine, measured.", metavar="NAME")]
TrafficOption = Annotated[
    str,
    opt(
        "Lengths: sharegpt, alpaca, azure-chat, azure-code. Or one of the programs that share prefixes: "
        "few-shot, self-consistency, chat, tree, rag, unique.",
        metavar="NAME",
    ),
]
RequestsOption = Annotated[int, opt("Requests of the traffic; questions of a program.", min=1)]
RateOption = Annotated[float | None, opt("Arrivals a second.", min=0, show_default="all at once")]
BurstinessOption = Annotated[float, opt("Shape of the gaps: 1 is Poisson, less is bursty.", min=0)]
PolicyOption = Annotated[
    str, opt("fcfs, priority, lpm; orca-max, orca-pow2, orca-oracle; static.", metavar="NAME")
]
PrefixCacheOption = Annotated[str | None, opt("hash or radix.", metavar="NAME")]
PreemptOption = Annotated[str, opt("recompute, or swap to host memory.", metavar="NAME")]
SlotsOption = Annotated[
    int | None,
    opt(
        "Tokens of keys and values that fit.",
        min=1,
        show_default="what the device has beside the weights",
    ),
]
BlockSizeOption = Annotated[int, opt("Tokens in a block.", min=1)]
MaxBatchTokensOption = Annotated[int, opt("Tokens that a step may compute.", min=1)]
MaxSequencesOption = Annotated[int, opt("Requests that may run at a time.", min=1)]
BitsOption = Annotated[float, opt("Bits of a weight; keys and values have 16.", min=1)]
TtftOption = Annotated[
    float | None, opt("Limit on the time to the first token, ms, for the goodput.", min=0)
]
TpotOption = Annotated[float | None, opt("Limit on the time of each further token, ms.", min=0)]
SeedOption = Annotated[int, opt("Of lengths and arrivals.", min=0)]
TraceOption = Annotated[
    Path | None,
    opt("Write every step, the first 200 block tables and the radix tree.", metavar="FILE"),
]


def simulate(
    model: ModelOption = "llama-8b",
    device: DeviceOption = "h200",
    traffic: TrafficOption = "sharegpt",
    requests: RequestsOption = 500,
    rate: RateOption = None,
    burstiness: BurstinessOption = 1.0,
    policy: PolicyOption = "fcfs",
    prefix_cache: PrefixCacheOption = None,
    preempt: PreemptOption = "recompute",
    slots: SlotsOption = None,
    block_size: BlockSizeOption = 16,
    max_batch_tokens: MaxBatchTokensOption = 2048,
    max_sequences: MaxSequencesOption = 256,
    bits: BitsOption = 16,
    ttft: TtftOption = None,
    tpot: TpotOption = None,
    seed: SeedOption = 0,
    trace: TraceOption = None,
    as_json: JsonOption = False,
    backend: BackendOption = "numpy",
) -> None:
    """Simulate serving: the real scheduler and memory, with a clock instead of a model.

    Steps take the time of the roofline for the device: a lower bound, projected, not
    measured. No weight is read.

    \b
    Examples:
      refllm simulate
      refllm simulate --model llama-70b --bits 4 --rate 2 --ttft 500 --tpot 50
      refllm simulate --traffic chat --prefix-cache radix --policy lpm --trace run.json
    """
    from refllm.backend import get
    from refllm.measure.roofline_clock import RooflineClock
    from refllm.simulate.metrics import Limits
    from refllm.simulate.simulator import Simulator

    get(backend)
    config = _config(model)
    machine = _device(device)
    clock = RooflineClock(config, machine, weight_bytes_per_param=bits / 8)
    if slots is None:
        room = min(_slots(clock, device), MOST_BLOCKS * block_size)
    else:
        room = slots
    scheduler = _scheduler(
        policy,
        room,
        block_size,
        prefix_cache,
        preempt,
        config,
        {"max_batch_tokens": max_batch_tokens, "max_sequences": max_sequences},
    )
    asked, follow = _asked(traffic, requests, rate, burstiness, seed)
    watcher = _watcher(scheduler, trace)
    simulator = Simulator(scheduler, clock, jumps=trace is None, on_step=watcher)
    with progress("serving") as advance:
        run = simulator.run(asked, follow, advance)
    if trace is not None:
        _write(trace, watcher, scheduler, machine)
    inf = float("inf")
    limits = Limits(inf if ttft is None else ttft / 1e3, inf if tpot is None else tpot / 1e3)
    facts = _facts(run, limits) | {"slots": room, "device": machine.name, "policy": policy}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts, limited=ttft is not None or tpot is not None)


def _config(name: str) -> ModelConfig:
    from refllm.measure import memory

    if name in SHAPES:
        return {"llama-8b": memory.LLAMA_8B, "llama-70b": memory.LLAMA_70B}[name]
    from refllm.checkpoints.loading import locate, read_config

    return read_config(locate(name))


def _device(name: str) -> Device:
    from refllm.measure.device import DEVICES, measure_machine

    if name == "here":
        return measure_machine()
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)}, here")
    return DEVICES[name]


def _slots(clock: Any, device: str) -> int:
    from refllm.measure.roofline_clock import MEMORY

    if device not in MEMORY:
        raise ValueError(
            f"the memory of {device!r} is not known: say how many tokens fit with --slots"
        )
    return int(clock.slots(0.9 * MEMORY[device]))  # a tenth for activations, as servers keep it


def _scheduler(
    policy: str,
    slots: int,
    block_size: int,
    cache: str | None,
    preempt: str,
    config: ModelConfig,
    limits: Any,
) -> BaseScheduler:
    from refllm.kv.block_pool import BlockPool
    from refllm.serve import factory
    from refllm.serve.scheduler import Scheduler
    from refllm.serve.swapping import SwappingKVManager

    if slots < block_size:
        raise ValueError(
            f"{slots} slots hold no block of {block_size}: take more slots or smaller blocks"
        )
    if slots // block_size > MOST_BLOCKS:
        raise ValueError(
            f"{slots:,} slots in blocks of {block_size} are more than {MOST_BLOCKS:,} blocks, of which "
            "books can be kept: take fewer slots or larger blocks"
        )
    pool = BlockPool(slots // block_size, block_size)
    if preempt not in ("recompute", "swap"):
        raise ValueError(f"unknown way to preempt {preempt!r}; choose recompute or swap")
    if preempt == "swap":
        if cache is not None or policy not in factory.CONTINUOUS:
            raise ValueError(
                "--preempt swap goes with fcfs, priority or lpm, and without a prefix cache"
            )
        return Scheduler(SwappingKVManager(pool), order=policy, **limits)
    longest = min(2048, config.max_position_embeddings)
    if policy == "static":
        limits = {"max_sequences": limits["max_sequences"]}
    return factory.make(policy, pool, prefix_cache=cache, longest=longest, **limits)


def _asked(name: str, count: int, rate: float | None, shape: float, seed: int) -> tuple[Any, Any]:
    """(requests, what follows from their answers)"""
    import numpy as np

    from refllm.simulate import programs
    from refllm.simulate.workload import TRAFFIC, Distinct, requests

    rng = np.random.default_rng(seed)
    tokens = Distinct()
    rate = float("inf") if rate is None else rate
    if name in TRAFFIC:
        return requests(TRAFFIC[name], count, rng, rate=rate, shape=shape), None
    made = {
        "few-shot": lambda: programs.few_shot(tokens, count),
        "self-consistency": lambda: programs.self_consistency(tokens, count),
        "chat": lambda: programs.chat(tokens, count),
        "tree": lambda: programs.tree_of_thought(tokens, count),
        "rag": lambda: programs.rag(tokens, count, rng),
        "unique": lambda: programs.unique(tokens, count),
    }
    if name not in made:
        raise ValueError(f"unknown traffic {name!r}; choose one of {', '.join([*TRAFFIC, *made])}")
    if rate != float("inf"):
        raise ValueError(
            f"--rate is for traffic: the requests of {name} come together, and when answers call for them"
        )
    program = made[name]()
    return program.requests, program.follow


def _watcher(scheduler: BaseScheduler, trace: Path | None) -> Any:
    from refllm.serve.kv_manager import PagedKVManager
    from refllm.simulate.timeline import Trace

    if trace is None:
        return None
    return Trace(scheduler, blocks=200 if isinstance(scheduler.memory, PagedKVManager) else 0)


def _write(path: Path, watcher: Any, scheduler: BaseScheduler, machine: Device) -> None:
    import sys

    from refllm.measure.records import Record, write
    from refllm.serve.prefix_caching import RadixKVManager
    from refllm.simulate.timeline import tree

    values = {"occupancy": watcher.occupancy(), "blocks": watcher.blocks()}
    if isinstance(scheduler.memory, RadixKVManager):
        values["tree"] = tree(scheduler.memory.cache)
    write(
        path,
        Record(f"refllm {' '.join(sys.argv[1:])}", "C", f"{machine.name}, by the roofline", values),
    )


def _facts(run: SimulationResult, limits: Any) -> dict[str, Any]:
    report = run.summary(limits)
    times = {
        name: spread and spread._asdict()
        for name in ("ttft", "tpot", "itl", "e2el")
        for spread in [getattr(report, name)]
    }
    rest = {key: value for key, value in vars(report).items() if key not in times}
    steps = max(1, run.all.steps)  # none where nobody asked for a token
    return rest | {
        "times": times,
        "steps": run.all.steps,
        "tokens": run.all.tokens,
        "batch": run.all.rows / steps,
        "held": run.all.allocated / (steps * run.all.slots),
        "hit rate": run.hit_rate,
        "preemptions": run.preemptions,
        "swapped tokens": run.moved.tokens,
    }


def _show(facts: dict[str, Any], *, limited: bool) -> None:
    out = console()
    out.print(
        f"{facts['completed']} requests, projected for {facts['device']} (kind C)", style="bold"
    )
    if limited:
        within = {"goodput": f"{facts['goodput']:.4g} requests/s within the limits"}
    else:
        within = {}
    pairs(
        out,
        {
            "duration": f"{facts['duration']:.4g} s, {facts['steps']:,} steps over {facts['slots']:,} slots",
            "throughput": f"{facts['request_throughput']:.4g} requests/s, {facts['output_throughput']:,.0f} tokens/s "
            f"written, {facts['total_throughput']:,.0f} with those read",
            **within,
            "batch": f"{facts['batch']:.1f} requests a step; {facts['held']:.0%} of the slots are held",
            "found cached": f"{facts['hit rate']:.1%} of the prompt tokens",
            "preemptions": f"{facts['preemptions']}, {facts['swapped tokens']:,} tokens moved by swapping",
        },
    )
    out.print()
    shown = table("time (ms)", "mean", "median", "p90", "p99", "longest")
    for name, spread in facts["times"].items():
        if spread is not None:
            shown.add_row(name.upper(), *(_digits(1e3 * value) for value in spread.values()))
    out.print(shown)


def _digits(number: float) -> str:
    """Two decimals, or two digits of what is smaller: a step of a small model on a large
    device takes microseconds.
    """
    if number >= 0.1:
        return f"{number:,.2f}"
    return f"{number:.2g}"
