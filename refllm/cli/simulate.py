"""``refllm simulate``: serving without a model, on the clock of the roofline."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refllm.cli.options import BackendOption, JsonOption, opt
from refllm.cli.simulate_setup import (
    MAX_BLOCKS,
    device_slots,
    find_device,
    make_scheduler,
    make_workload,
    model_config,
)
from refllm.terminal import console, pairs, progress, table

if TYPE_CHECKING:
    from refllm.array_types import Json
    from refllm.measure.device import DeviceSpec
    from refllm.serve.base_scheduler import BaseScheduler
    from refllm.simulate.metrics import Limits
    from refllm.simulate.timeline import Trace
    from refllm.simulate.totals import SimulationResult

TRACED_BLOCK_TABLES = 200


ModelOption = Annotated[
    str,
    opt(
        "A bundled model, smollm2, a directory with a config.json, a GGUF file, llama-8b or "
        "llama-70b.",
        "--model",
        "-m",
        metavar="NAME|DIR|FILE",
    ),
]
DeviceOption = Annotated[str, opt("h200, a100, or here: this machine, measured.", metavar="NAME")]
TrafficOption = Annotated[
    str,
    opt(
        "Lengths: sharegpt, alpaca, azure-chat, azure-code. Or a program whose prompts "
        "share prefixes: few-shot, self-consistency, chat, tree, rag, unique.",
        metavar="NAME",
    ),
]
RequestsOption = Annotated[int, opt("Number of requests; of questions for a program.", min=1)]
RateOption = Annotated[float | None, opt("Arrivals per second.", min=0, show_default="all at once")]
BurstinessOption = Annotated[
    float, opt("Shape of the arrival gaps: 1 is Poisson, less is bursty.", min=0)
]
PolicyOption = Annotated[
    str, opt("fcfs, priority, lpm; orca-max, orca-pow2, orca-oracle; static.", metavar="NAME")
]
PrefixCacheOption = Annotated[str | None, opt("hash or radix.", metavar="NAME")]
PreemptOption = Annotated[str, opt("recompute, or swap to host memory.", metavar="NAME")]
SlotsOption = Annotated[
    int | None,
    opt(
        "Tokens of keys and values that fit into memory.",
        min=1,
        show_default="device memory minus weights",
    ),
]
BlockSizeOption = Annotated[int, opt("Tokens per block.", min=1)]
MaxBatchTokensOption = Annotated[int, opt("Token budget of a step.", min=1)]
MaxSequencesOption = Annotated[int, opt("Requests that may run at once.", min=1)]
BitsOption = Annotated[float, opt("Bits per weight; keys and values have 16.", min=1)]
TtftOption = Annotated[
    float | None, opt("Goodput: limit on the time to the first token, ms.", min=0)
]
TpotOption = Annotated[float | None, opt("Goodput: limit on the time per output token, ms.", min=0)]
SeedOption = Annotated[int, opt("Seed of lengths and arrivals.", min=0)]
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

    A step takes the time of the roofline for the device: a lower bound, projected, not
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
    config = model_config(model)
    machine = find_device(device)
    clock = RooflineClock(config, machine, weight_bytes_per_param=bits / 8)
    if slots is None:
        slots = min(device_slots(clock, device), MAX_BLOCKS * block_size)
    scheduler = make_scheduler(
        policy,
        slots,
        block_size,
        prefix_cache=prefix_cache,
        preempt=preempt,
        longest=min(2048, config.max_position_embeddings),
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
    )
    arriving, follow = make_workload(traffic, requests, rate, burstiness, seed)
    steps = None if trace is None else _trace_of(scheduler)
    simulator = Simulator(scheduler, clock, jumps=steps is None, on_step=steps)
    with progress("serving") as advance:
        run = simulator.run(arriving, follow, advance)
    if trace is not None and steps is not None:
        _write_trace(trace, steps, scheduler, machine)
    limits = Limits(_seconds(ttft), _seconds(tpot))
    facts = _facts(run, limits) | {"slots": slots, "device": machine.name, "policy": policy}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts, limited=ttft is not None or tpot is not None)


def _seconds(limit: float | None) -> float:
    """A limit in milliseconds as seconds; None is no limit."""
    return math.inf if limit is None else limit / 1e3


def _trace_of(scheduler: BaseScheduler) -> Trace:
    """A trace of the steps, with block tables where memory is paged."""
    from refllm.serve.kv_manager import PagedKVManager
    from refllm.simulate.timeline import Trace

    if isinstance(scheduler.memory, PagedKVManager):
        return Trace(scheduler, blocks=TRACED_BLOCK_TABLES)
    return Trace(scheduler)


def _write_trace(path: Path, steps: Trace, scheduler: BaseScheduler, machine: DeviceSpec) -> None:
    """Write the trace as a record that ``refllm.figures`` can draw."""
    from refllm.measure.records import Record, write
    from refllm.serve.prefix_caching import RadixKVManager
    from refllm.simulate.timeline import tree

    values: Json = {"occupancy": steps.occupancy(), "blocks": steps.blocks()}
    if isinstance(scheduler.memory, RadixKVManager):
        values["tree"] = tree(scheduler.memory.cache)
    command = f"refllm {' '.join(sys.argv[1:])}"
    write(path, Record(command, "C", f"{machine.name}, by the roofline", values))


def _facts(run: SimulationResult, limits: Limits) -> Json:
    """The results as plain data, times in seconds."""
    summary = run.summary(limits)
    times = {}
    for name in ("ttft", "tpot", "itl", "e2el"):
        spread = getattr(summary, name)
        times[name] = spread and spread._asdict()
    rest = {key: value for key, value in vars(summary).items() if key not in times}
    steps = max(1, run.all.steps)  # there are none if no request asks for a token
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


def _show(facts: Json, *, limited: bool) -> None:
    """Throughput and memory in lines, latencies in a table."""
    out = console()
    title = f"{facts['completed']} requests, projected by the roofline for {facts['device']}"
    out.print(title, style="bold")
    lines = {
        "duration": f"{facts['duration']:.4g} s, {facts['steps']:,} steps",
        "throughput": f"{facts['request_throughput']:.4g} requests/s, "
        f"{facts['output_throughput']:,.0f} output tokens/s, "
        f"{facts['total_throughput']:,.0f} tokens/s with prompts",
    }
    if limited:
        lines["goodput"] = f"{facts['goodput']:.4g} requests/s within the limits"
    lines |= {
        "batch": f"{facts['batch']:.1f} requests per step",
        "memory": f"{facts['held']:.0%} of {facts['slots']:,} token slots allocated on average",
        "prefix cache": f"{facts['hit rate']:.1%} of the prompt tokens hit",
        "preemptions": f"{facts['preemptions']}, {facts['swapped tokens']:,} tokens swapped",
    }
    pairs(out, lines)
    out.print()
    shown = table("time (ms)", "mean", "median", "p90", "p99", "max")
    for name, spread in facts["times"].items():
        if spread is not None:
            shown.add_row(name.upper(), *(_digits(1e3 * value) for value in spread.values()))
    out.print(shown)


def _digits(number: float) -> str:
    """Two decimals, or two digits where the number is small.

    >>> _digits(1234.5678), _digits(0.01234)
    ('1,234.57', '0.012')
    """
    # a step of a small model on a large device takes microseconds
    return f"{number:,.2f}" if number >= 0.1 else f"{number:.2g}"
