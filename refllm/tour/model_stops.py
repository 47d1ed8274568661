"""The tour's stops about the model itself: what it is, what it writes, how well it predicts,
what a step costs, and the two phases of a request.

Left out: quantisation, caches, speculation and serving, which have stops of their own.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping

import numpy as np

from refllm.backend import NUMPY, namespace
from refllm.checkpoints.sources import locate
from refllm.corpus import held_out_documents
from refllm.decode.generate import generate_tokens
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.experiments import training_curves
from refllm.experiments.roofline import roofline_data
from refllm.measure.latency import Stopwatch
from refllm.measure.memory import kv_bytes_per_token
from refllm.measure.protocol import describe_windows
from refllm.measure.roofline import Cost, mbu, mfu, step_cost
from refllm.measure.sampled_loss import sample_bits_per_byte
from refllm.measure.step_time import time_step
from refllm.measure.windows import default_windows
from refllm.terminal import format_bytes, printable, table
from refllm.tour.context import Tour

PROMPT = (
    'class Stack:\n    """A list with a top."""\n\n    def __init__(self, items=()):\n        self.'
)
NEW_TOKENS = 128
SAMPLING = SamplingParams(temperature=0.8, top_p=0.95)
SAMPLE_WINDOWS = 16  # of 1,024 tokens each: two to five seconds
CONTEXT = 256  # tokens cached in the steps that are timed
REPEATS = 15


def meet(tour: Tour) -> None:
    """Load the model and describe it."""
    began = time.perf_counter()
    model = tour.model
    seconds = time.perf_counter() - began
    directory = locate(tour.name)
    config = model.config
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    xp = namespace(model.weights["norm"])
    tour.say(f"{tour.name}, a {config.summary}.")
    tour.say(
        f"{config.num_parameters:,} parameters, {format_bytes(size)} on disk, loaded in "
        f"{seconds:.2f} s; each token of context takes "
        f"{kv_bytes_per_token(config, 32):,.0f} bytes of keys and values (float32)."
    )
    tour.say(f"It runs in {xp.__name__} {xp.__version__} on Python {platform.python_version()}.")
    if training_curves.has_record(directory):
        values = training_curves.curve_values([directory])
        tour.draw("training_curve", values, "B", training_curves.hardware([directory]))


def write(tour: Tour) -> None:
    """Write code from a prompt, shown token by token."""
    watch = Stopwatch()
    tour.out.print(PROMPT, end="", style="dim", soft_wrap=True)
    pieces = tour.model.stream(PROMPT, NEW_TOKENS, sampling=SAMPLING, rng=1, on_token=watch.tick)
    for piece in pieces:
        tour.out.print(printable(piece), end="", soft_wrap=True)
    tour.say("\n")
    tour.say(
        f"{watch.tokens} tokens at temperature {SAMPLING.temperature}: the first after "
        f"{1e3 * watch.ttft:.0f} ms, then one every {1e3 * watch.tpot:.2f} ms, which is "
        f"{watch.tokens_per_second:,.0f} tokens/s."
    )
    tour.say("It has the look of Python and no meaning.")


def measure(tour: Tour) -> None:
    """Bits per byte on held-out text, from a random sample of the windows that
    ``refllm eval`` scores.
    """
    documents = held_out_documents()
    began = time.perf_counter()
    sample = sample_bits_per_byte(tour.model, documents, SAMPLE_WINDOWS, np.random.default_rng(0))
    seconds = time.perf_counter() - began
    bits = sample.bits
    windows = default_windows(tour.model.config.max_position_embeddings)
    tour.say(
        f"{len(documents)} modules of Python {platform.python_version()} are held out from "
        f"the training of the bundled models. From the {sample.of} windows that cover "
        f"them ({describe_windows(*windows)}), {sample.windows} drawn at random: "
        f"{sample.tokens:,} tokens, "
        f"{format_bytes(sample.bytes)} of text, {seconds:.1f} s."
    )
    tour.out.print(
        f"{bits.mean:.3f} bits per byte, 95 % interval {bits.low:.3f} to {bits.high:.3f}",
        style="bold",
    )
    tour.say("The interval is a bootstrap over those windows; `refllm eval` scores every token.")


def cost(tour: Tour) -> None:
    """What a step costs in FLOP and bytes, against the limits of this machine."""
    config = tour.model.config
    on_host = namespace(tour.model.weights["norm"]) is NUMPY
    steps = {f"decode, {b} sequence{'s' * (b > 1)}": [(CONTEXT, 1)] * b for b in (1, 8, 32)}
    steps[f"prefill, {CONTEXT} tokens"] = [(0, CONTEXT)]
    costs = {
        name: step_cost(config, batch, weight_bytes_per_param=4, kv_bytes_per_value=4)
        for name, batch in steps.items()
    }
    times = {name: time_step(tour.model, batch, REPEATS) for name, batch in steps.items()}
    heads = ["step", "MFLOP", "MB", "FLOP/byte", "ms"]
    limits: Mapping[str, tuple[str, str, str]] = {}
    if on_host:
        heads += ["bound by", "MFU", "MBU"]
        limits = _against_limits(tour, costs, times)
        _draw_roofline(tour, costs, times)
    made = table(*heads)
    for name, c in costs.items():
        made.add_row(
            name,
            f"{c.flops / 1e6:,.1f}",
            f"{c.bytes / 1e6:,.1f}",
            f"{c.intensity:.2f}",
            f"{1e3 * times[name]:.2f}",
            *limits.get(name, ()),
        )
    tour.out.print(made)
    tour.say()
    shares = "The limits of a GPU are not measured here."
    if on_host:
        shares = (
            "MFU and MBU are the shares of the two limits that were reached. More than "
            "100 % is no error: weights that stay in a CPU cache never wait for memory, "
            "and on a busy machine the limits may have been higher when the step ran."
        )
    tour.say(
        f"{CONTEXT} tokens of context. FLOP and bytes are counted; times are measured, "
        f"medians of {REPEATS}. {shares}"
    )
    tour.say(
        "A step reads every weight once, however many sequences share it: that is the "
        "gain of batching."
    )


def _against_limits(
    tour: Tour, costs: Mapping[str, Cost], times: Mapping[str, float]
) -> dict[str, tuple[str, str, str]]:
    """Print this machine's limits; per step, which one binds and how much of each was reached."""
    machine = tour.machine
    tour.say(
        f"Limits of one core, measured: {machine.peak_flops / 1e9:.0f} GFLOP/s and "
        f"{machine.peak_bandwidth / 1e9:.0f} GB/s. A step of fewer than "
        f"{machine.ridge:.1f} FLOP per byte is bound by memory."
    )
    return {
        name: (
            "memory" if c.intensity < machine.ridge else "compute",
            f"{mfu(c, times[name], machine):.0%}",
            f"{mbu(c, times[name], machine):.0%}",
        )
        for name, c in costs.items()
    }


def _draw_roofline(tour: Tour, costs: Mapping[str, Cost], times: Mapping[str, float]) -> None:
    """The steps as points below the roofline of this machine."""
    machine = tour.machine
    points = [
        {"label": name, "intensity": c.intensity, "flops_per_second": c.flops / times[name]}
        for name, c in costs.items()
    ]
    title = f"Steps of {tour.name} on this machine"
    values = roofline_data([machine], {}) | {"points": points, "title": title}
    tour.draw("roofline", values, "B", f"{machine.name}. {machine.source}")


def phases(tour: Tour) -> None:
    """Prefill and decode of one request: the same network at two speeds."""
    model = tour.model
    text = "".join(d.text for d in held_out_documents())
    prompt = model.tokenizer.encode(text[: 8 * CONTEXT], special=True)[:CONTEXT]
    # the first round, of one token, warms up caches and is not reported
    for count in (1, NEW_TOKENS):
        watch = Stopwatch()
        rng = np.random.default_rng(0)
        for _ in generate_tokens(model.weights, model.config, [prompt], count, GREEDY, rng):
            watch.tick()
    prefill = watch.ttft
    decode = watch.e2el - watch.ttft
    made = table("phase", "tokens", "ms", "ms/token", "tokens/s")
    for name, tokens, seconds in (
        ("prefill", len(prompt), prefill),
        ("decode", watch.tokens - 1, decode),
    ):
        each = seconds / tokens
        made.add_row(
            name, f"{tokens}", f"{1e3 * seconds:.1f}", f"{1e3 * each:.3f}", f"{1 / each:,.0f}"
        )
    tour.out.print(made)
    tour.say()
    tour.say(
        f"First token after {1e3 * watch.ttft:.0f} ms (TTFT), each further one "
        f"{1e3 * watch.tpot:.2f} ms (TPOT), the request {1e3 * watch.e2el:.0f} ms. A "
        f"generated token costs {watch.tpot * len(prompt) / prefill:.1f} times a prompt "
        "token: prefill reads the weights once for all of its tokens, decode once per "
        "token."
    )
    tour.say(
        "Decoding has a different speed at each stop, because the work differs: stop 2 "
        "samples from probabilities over the whole vocabulary, at a short context; stop 4 "
        f"repeats one step at {CONTEXT} tokens; here the context grows from {CONTEXT} to "
        f"{CONTEXT + NEW_TOKENS}, and the largest logit is taken."
    )
