"""The tour: what refllm does, on a real model, in a minute and a half; every number is
computed while you watch.

One function a stop, in ``STOPS``: each prints to the tour's console, may leave figures,
takes less than ten seconds on two cores, and can be visited alone. A later capability adds
a function and a line to the list; those that show a technique are in ``techniques``.

Kinds of number (design, §4): counted (parameters, FLOP, bytes), measured here (seconds,
GFLOP/s), never projected.

Left out: comparisons with other programs (``benchmarks/``), explanations (``notebooks/``).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from refllm.backend import namespace
from refllm.checkpoints.loading import locate
from refllm.corpus import held_out_documents
from refllm.decode.generate import generate_tokens
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.experiments import training_curves
from refllm.experiments.roofline import roofline_data
from refllm.measure.latency import Stopwatch
from refllm.measure.memory import kv_bytes_per_token
from refllm.measure.roofline import Cost, mbu, mfu, step_cost
from refllm.measure.sampled_loss import sample_bits_per_byte
from refllm.measure.step_time import time_step
from refllm.terminal import format_bytes, printable, table
from refllm.tour.context import Tour
from refllm.tour.techniques import cache, formats, serve, shrink, speculate

if TYPE_CHECKING:
    pass

PROMPT = (
    'class Stack:\n    """A list with a top."""\n\n    def __init__(self, items=()):\n        self.'
)
WRITTEN = 128  # tokens
WRITING = SamplingParams(temperature=0.8, top_p=0.95)
SAMPLE_WINDOWS = 16  # of 1,024 tokens each: two to five seconds
CONTEXT = 256  # tokens cached in the steps that are timed
REPEATS = 15


@dataclass(frozen=True)
class Stop:
    """A name to visit it by, a title to print above it, and what happens there."""

    name: str
    title: str
    visit: Callable[[Tour], None]


def run(tour: Tour, names: Sequence[str] = ()) -> None:
    """Visit the named stops, or all, in their order.

    Raises
    ------
    ValueError
        for a name that no stop has.
    """
    from threadpoolctl import threadpool_limits

    known = [stop.name for stop in STOPS]
    for name in names:
        if name not in known:
            raise ValueError(f"the tour has no stop {name!r}; its stops are {', '.join(known)}")
    chosen = [stop for stop in STOPS if not names or stop.name in names]
    began = time.perf_counter()
    with threadpool_limits(limits=1, user_api="blas"):
        for stop in chosen:
            tour.out.print(f"\n{known.index(stop.name) + 1}  {stop.title}", style="bold")
            stop.visit(tour)
    tour.say()
    for path in tour.figures:
        tour.say(f"figure: {path}")
    tour.say(
        f"{time.perf_counter() - began:.0f} s in all. Next: `refllm --help`, or the notebooks."
    )


def meet(tour: Tour) -> None:
    """Load the model and say what it is."""
    began = time.perf_counter()
    model = tour.model
    seconds = time.perf_counter() - began
    directory = locate(tour.name)
    config = model.config
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    xp = namespace(model.weights["norm"])
    tour.say(f"{tour.name}, a {config.summary}.")
    tour.say(
        f"{config.num_parameters:,} parameters, {format_bytes(size)} on disk, loaded in {seconds:.2f} s; each token of "
        f"context will keep {kv_bytes_per_token(config, 32):,.0f} bytes of keys and values (float32)."
    )
    tour.say(f"It runs in {xp.__name__} {xp.__version__} on Python {platform.python_version()}.")
    if training_curves.has_record(directory):
        tour.draw(
            "training_curve",
            training_curves.curve_values([directory]),
            "B",
            training_curves.hardware([directory]),
        )


def write(tour: Tour) -> None:
    """Write code from a prompt, shown token by token."""
    watch = Stopwatch()
    tour.out.print(PROMPT, end="", style="dim", soft_wrap=True)
    for piece in tour.model.stream(PROMPT, WRITTEN, sampling=WRITING, rng=1, on_token=watch.tick):
        tour.out.print(printable(piece), end="", soft_wrap=True)
    tour.say("\n")
    tour.say(
        f"{watch.tokens} tokens at temperature {WRITING.temperature}: the first after {1e3 * watch.ttft:.0f} ms, then "
        f"one every {1e3 * watch.tpot:.2f} ms, which is {watch.tokens_per_second:,.0f} tokens/s."
    )
    tour.say("It has the look of Python and no meaning.")


def measure(tour: Tour) -> None:
    """Bits per byte on text that the model never saw, from a random sample of the
    evaluation's own windows.
    """
    documents = held_out_documents()
    began = time.perf_counter()
    sample = sample_bits_per_byte(tour.model, documents, SAMPLE_WINDOWS, np.random.default_rng(0))
    seconds = time.perf_counter() - began
    bits = sample.bits
    tour.say(
        f"{len(documents)} modules of Python {platform.python_version()} were kept out of training. From the "
        f"{sample.of} windows that cover them, {sample.windows} drawn at random: {sample.tokens:,} tokens, "
        f"{format_bytes(sample.bytes)} of text, {seconds:.1f} s."
    )
    tour.out.print(
        f"{bits.mean:.3f} bits per byte, 95 % interval {bits.low:.3f} to {bits.high:.3f}",
        style="bold",
    )
    tour.say("The interval is a bootstrap over those windows; `refllm eval` scores every token.")


def cost(tour: Tour) -> None:
    """What a step costs in FLOP and bytes, against what this machine can do."""
    config = tour.model.config
    on_host = namespace(tour.model.weights["norm"]) is np
    steps = {f"decode, {b} sequence{'s' * (b > 1)}": [(CONTEXT, 1)] * b for b in (1, 8, 32)}
    steps[f"prefill, {CONTEXT} tokens"] = [(0, CONTEXT)]
    costs = {
        name: step_cost(config, b, weight_bytes_per_param=4, kv_bytes_per_value=4)
        for name, b in steps.items()
    }
    times = {name: time_step(tour.model, batch, REPEATS) for name, batch in steps.items()}
    rows = [
        [
            n,
            f"{c.flops / 1e6:,.1f}",
            f"{c.bytes / 1e6:,.1f}",
            f"{c.intensity:.2f}",
            f"{1e3 * times[n]:.2f}",
        ]
        for n, c in costs.items()
    ]
    header = ["step", "MFLOP", "MB", "FLOP/byte", "ms"]
    if on_host:
        header += ["waits for", "MFU", "MBU"]
        _against_limits(tour, costs, times, rows)
    made = table(*header)
    for row in rows:
        made.add_row(*row)
    tour.out.print(made)
    tour.say()
    shares = (
        "MFU and MBU are the shares of both limits that were used. More than 100 % is no error: weights that stay in a "
        "cache never wait for memory, and on a busy machine the limits were measured at another moment."
    )
    tour.say(
        f"{CONTEXT} tokens of context. FLOP and bytes are counted; times are measured, medians of {REPEATS}. "
        + (shares if on_host else "The limits of a GPU are not measured here.")
    )
    tour.say(
        "A step reads every weight once, however many sequences share it: that is what batching buys."
    )


def _against_limits(
    tour: Tour, costs: dict[str, Cost], times: dict[str, float], rows: list[list[str]]
) -> None:
    """Say this machine's limits, add to each row how near it came to them, and draw the
    roofline.
    """
    machine = tour.machine
    points = []
    tour.say(
        f"Limits of one core, measured: {machine.peak_flops / 1e9:.0f} GFLOP/s and {machine.peak_bandwidth / 1e9:.0f} "
        f"GB/s. A step of fewer than {machine.ridge:.1f} FLOP a byte waits for memory."
    )
    for row, (name, c) in zip(rows, costs.items(), strict=True):
        row.append("memory" if c.intensity < machine.ridge else "products")
        row += [f"{mfu(c, times[name], machine):.0%}", f"{mbu(c, times[name], machine):.0%}"]
        points.append(
            {"label": name, "intensity": c.intensity, "flops_per_second": c.flops / times[name]}
        )
    values = roofline_data([machine], {}) | {
        "points": points,
        "title": f"Steps of {tour.name} on this machine",
    }
    tour.draw("roofline", values, "B", f"{machine.name}. {machine.source}")


def phases(tour: Tour) -> None:
    """Prefill and decode of one request: the same network at two speeds."""
    model = tour.model
    text = "".join(d.text for d in held_out_documents())
    prompt = model.tokenizer.encode(text[: 8 * CONTEXT], special=True)[:CONTEXT]
    # one token first: what is touched for the first time is not what is measured
    for count in (1, WRITTEN):
        watch = Stopwatch()
        for _ in generate_tokens(
            model.weights, model.config, [prompt], count, GREEDY, np.random.default_rng(0)
        ):
            watch.tick()
    prefill = watch.ttft
    decode = watch.e2el - watch.ttft
    made = table("phase", "tokens", "ms", "ms a token", "tokens/s")
    for name, count, seconds in (
        ("prefill", len(prompt), prefill),
        ("decode", watch.tokens - 1, decode),
    ):
        each = seconds / count
        made.add_row(
            name, f"{count}", f"{1e3 * seconds:.1f}", f"{1e3 * each:.3f}", f"{1 / each:,.0f}"
        )
    tour.out.print(made)
    tour.say()
    tour.say(
        f"First token after {1e3 * watch.ttft:.0f} ms (TTFT), each further one {1e3 * watch.tpot:.2f} ms (TPOT), the "
        f"request {1e3 * watch.e2el:.0f} ms. A generated token costs {watch.tpot * len(prompt) / prefill:.1f} times a "
        "prompt token: prefill reads the weights once for all of its tokens, decode once for each."
    )
    tour.say(
        "Decoding has another speed at each stop, because the work is another: stop 2 draws from probabilities over "
        f"the whole vocabulary, at a short context; stop 4 repeats one step at {CONTEXT} tokens; here the context "
        f"grows from {CONTEXT} to {CONTEXT + WRITTEN}, and the largest logit is taken."
    )


STOPS = [
    Stop("meet", "The model", meet),
    Stop("write", "Writing code from a prompt", write),
    Stop("measure", "Predicting text that it never saw", measure),
    Stop("cost", "What a step costs", cost),
    Stop("phases", "Prefill and decode", phases),
    Stop("shrink", "Four bits a weight", shrink),
    Stop("formats", "One matrix in every format", formats),
    Stop("cache", "Two bits a key and a value", cache),
    Stop("speculate", "Several tokens a step", speculate),
    Stop("serve", "Serving a burst of prompts", serve),
]
