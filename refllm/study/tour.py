"""The tour: what refllm does, on a real model, in about a minute; every number is computed while you watch.

One function a stop, in ``STOPS``: each prints to the tour's console, may leave figures, takes less than ten seconds
on two cores, and can be visited alone. A later capability adds a function and a line to the list.

Kinds of number (design, §4): counted (parameters, FLOP, bytes), measured here (seconds, GFLOP/s), never projected.

Left out: comparisons with other programs (``benchmarks/``), explanations (``notebooks/``).
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refllm.api import Model, load, locate
from refllm.backend import namespace, to_numpy
from refllm.decode.generate import GREEDY, Sampling, generate_tokens
from refllm.formats.affine import Scheme
from refllm.model.config import ModelConfig
from refllm.model.corpus import held_out_documents
from refllm.quant.passages import calibration_windows
from refllm.quant.recipe import quantize_model
from refllm.study import burst, curves, guessing
from refllm.study.bundle import architecture
from refllm.study.machine import Device, measure_machine
from refllm.study.memory import kv_bytes_per_token
from refllm.study.perplexity import compare, keep
from refllm.study.quick import sample_bits_per_byte, time_step
from refllm.study.records import Record
from refllm.study.records import write as write_record
from refllm.study.roofline import Cost, mbu, mfu, roofline_data, step_cost
from refllm.study.terminal import bytes_text, printable, table
from refllm.study.timing import Stopwatch

if TYPE_CHECKING:
    from rich.console import Console

PROMPT = 'class Stack:\n    """A list with a top."""\n\n    def __init__(self, items=()):\n        self.'
WRITTEN = 128  # tokens
WRITING = Sampling(temperature=0.8, top_p=0.95)
SAMPLE_WINDOWS = 16  # of 1,024 tokens each: two to five seconds
CONTEXT = 256  # tokens cached in the steps that are timed
REPEATS = 15
SHRUNK_TEXT = (8, 256)  # excerpts of so many tokens, to judge quantised weights by
CALIBRATION = (8, 512)  # windows of so many tokens that GPTQ looks at
BURST = (192, 16, 16, 24)  # tokens that all prompts share, tokens of their own, prompts, new tokens each
SCARCE = 0.2  # of the blocks that the burst needs side by side


@dataclass
class Tour:
    """What the stops share: the model, where to print, where figures go."""

    name: str
    backend: str
    output: Path
    out: Console
    figures: list[Path] = field(default_factory=list)

    @cached_property
    def model(self) -> Model:
        return load(self.name, self.backend)

    @cached_property
    def machine(self) -> Device:
        """The limits of one core: the stops run on one BLAS thread, where two would wait for each other."""
        return measure_machine(threads=1)

    def say(self, text: str = "") -> None:
        self.out.print(text)

    def draw(self, name: str, values: dict[str, Any], kind: str, hardware: str) -> None:
        """Record the numbers below ``output/data`` and draw the registered figure ``name`` from them."""
        from refllm.study import figures  # matplotlib takes a second to import

        record = Record(f"refllm tour --model {self.name}", kind, hardware, values)
        write_record(self.output / "data" / f"{name}.json", record)
        self.figures += figures.redraw([name], self.output)


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
    tour.say(f"{time.perf_counter() - began:.0f} s in all. Next: `refllm --help`, or the notebooks.")


def meet(tour: Tour) -> None:
    """Load the model and say what it is."""
    began = time.perf_counter()
    model = tour.model
    seconds = time.perf_counter() - began
    directory, config = locate(tour.name), model.config
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    xp = namespace(model.weights["norm"])
    tour.say(f"{tour.name}, a {architecture(config)}.")
    tour.say(
        f"{config.num_parameters:,} parameters, {bytes_text(size)} on disk, loaded in {seconds:.2f} s; each token of "
        f"context will keep {kv_bytes_per_token(config, 32):,.0f} bytes of keys and values (float32)."
    )
    tour.say(f"It runs in {xp.__name__} {xp.__version__} on Python {platform.python_version()}.")
    if curves.has_record(directory):
        tour.draw("training_curve", curves.curve_values([directory]), "B", curves.hardware([directory]))


def write(tour: Tour) -> None:
    """Write code from a prompt, shown token by token."""
    watch = Stopwatch()
    tour.out.print(PROMPT, end="", style="dim", soft_wrap=True)
    for piece in tour.model.stream(PROMPT, WRITTEN, how=WRITING, rng=1, on_token=watch.tick):
        tour.out.print(printable(piece), end="", soft_wrap=True)
    tour.say("\n")
    tour.say(
        f"{watch.tokens} tokens at temperature {WRITING.temperature}: the first after {1e3 * watch.ttft:.0f} ms, then "
        f"one every {1e3 * watch.tpot:.2f} ms, which is {watch.tokens_per_second:,.0f} tokens/s."
    )
    tour.say("It has the look of Python and no meaning.")


def measure(tour: Tour) -> None:
    """Bits per byte on text that the model never saw, from a random sample of the evaluation's own windows."""
    documents = held_out_documents()
    began = time.perf_counter()
    sample = sample_bits_per_byte(tour.model, documents, SAMPLE_WINDOWS, np.random.default_rng(0))
    seconds = time.perf_counter() - began
    bits = sample.bits
    tour.say(
        f"{len(documents)} modules of Python {platform.python_version()} were kept out of training. From the "
        f"{sample.of} windows that cover them, {sample.windows} drawn at random: {sample.tokens:,} tokens, "
        f"{bytes_text(sample.bytes)} of text, {seconds:.1f} s."
    )
    tour.out.print(f"{bits.mean:.3f} bits per byte, 95 % interval {bits.low:.3f} to {bits.high:.3f}", style="bold")
    tour.say("The interval is a bootstrap over those windows; `refllm eval` scores every token.")


def cost(tour: Tour) -> None:
    """What a step costs in FLOP and bytes, against what this machine can do."""
    config, on_host = tour.model.config, namespace(tour.model.weights["norm"]) is np
    steps = {f"decode, {b} sequence{'s' * (b > 1)}": [(CONTEXT, 1)] * b for b in (1, 8, 32)}
    steps[f"prefill, {CONTEXT} tokens"] = [(0, CONTEXT)]
    costs = {name: step_cost(config, b, weight_bytes_per_param=4, kv_bytes_per_number=4) for name, b in steps.items()}
    times = {name: time_step(tour.model, batch, REPEATS) for name, batch in steps.items()}
    rows = [
        [n, f"{c.flops / 1e6:,.1f}", f"{c.bytes / 1e6:,.1f}", f"{c.intensity:.2f}", f"{1e3 * times[n]:.2f}"]
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
    tour.say("A step reads every weight once, however many sequences share it: that is what batching buys.")


def _against_limits(tour: Tour, costs: dict[str, Cost], times: dict[str, float], rows: list[list[str]]) -> None:
    """Say this machine's limits, add to each row how near it came to them, and draw the roofline."""
    machine, points = tour.machine, []
    tour.say(
        f"Limits of one core, measured: {machine.peak_flops / 1e9:.0f} GFLOP/s and {machine.peak_bandwidth / 1e9:.0f} "
        f"GB/s. A step of fewer than {machine.ridge:.1f} FLOP a byte waits for memory."
    )
    for row, (name, c) in zip(rows, costs.items(), strict=True):
        row.append("memory" if c.intensity < machine.ridge else "products")
        row += [f"{mfu(c, times[name], machine):.0%}", f"{mbu(c, times[name], machine):.0%}"]
        points.append({"label": name, "intensity": c.intensity, "flops_per_second": c.flops / times[name]})
    values = roofline_data([machine], {}) | {"points": points, "title": f"Steps of {tour.name} on this machine"}
    tour.draw("roofline", values, "B", f"{machine.name}. {machine.source}")


def phases(tour: Tour) -> None:
    """Prefill and decode of one request: the same network at two speeds."""
    model = tour.model
    text = "".join(d.text for d in held_out_documents())
    prompt = model.tokenizer.encode(text[: 8 * CONTEXT], special=True)[:CONTEXT]
    for count in (1, WRITTEN):  # one token first: what is touched for the first time is not what is measured
        watch = Stopwatch()
        for _ in generate_tokens(model.weights, model.config, [prompt], count, GREEDY, np.random.default_rng(0)):
            watch.tick()
    prefill, decode = watch.ttft, watch.e2el - watch.ttft
    made = table("phase", "tokens", "ms", "ms a token", "tokens/s")
    for name, count, seconds in (("prefill", len(prompt), prefill), ("decode", watch.tokens - 1, decode)):
        each = seconds / count
        made.add_row(name, f"{count}", f"{1e3 * seconds:.1f}", f"{1e3 * each:.3f}", f"{1 / each:,.0f}")
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


def shrink(tour: Tour) -> None:
    """Four bits a weight, by rounding to nearest and by GPTQ: how many bytes it saves, and what it costs."""
    model, scheme = tour.model, _four_bits(tour.model.config)
    text = list(calibration_windows(model.tokenizer, *SHRUNK_TEXT, 0, documents=held_out_documents()))
    calibration = calibration_windows(model.tokenizer, *CALIBRATION, 0, begin=model.config.bos_token_id)
    reference = keep(model, text)
    made = table("weights", "bits a weight", "size", "quantised in", "bits per byte", "KL", "same first choice")
    kls = []
    for method in ("rtn", "gptq"):
        quantised, report = quantize_model(model, method, scheme, calibration if method == "gptq" else None)
        found = compare(quantised, reference, text, rng=np.random.default_rng(0))
        kls.append(found.kl.mean)
        if method == "rtn":
            size = bytes_text(4 * report.weights)
            made.add_row("as they were", "32.00", size, "", f"{found.reference.bits_per_byte:.4f}", "0", "100%")
        made.add_row(
            {"rtn": "rounded to nearest", "gptq": "GPTQ"}[method], f"{report.bits_per_weight:.2f}",
            bytes_text(report.nbytes), f"{report.seconds:.2f} s", f"{found.model.bits_per_byte:.4f}",
            f"{found.kl.mean:.4f}", f"{found.agreement.mean:.1%}",
        )  # fmt: skip
    tour.out.print(made)
    tour.say()
    share = f"{scheme.group_size} weights" if scheme.group_size else "the weights of a row"
    tour.say(
        f"All projections, 4 bits and a scale for {share}; embedding and norms stay as they were. {len(text)} excerpts "
        f"of held-out text; GPTQ saw {calibration.size:,} tokens of training text, none of these."
    )
    if kls[1] < kls[0]:
        tour.say(f"GPTQ lets the weights to come make up for each rounding: {kls[0] / kls[1]:.1f} times less KL.")
    tour.say("NumPy multiplies no faster for it: on a CPU quantisation saves memory, on a GPU also time.")


def speculate(tour: Tour) -> None:
    """A small model and a table of n-grams guess, the model checks: the same text in fewer steps."""
    guessing.visit(tour.model, "stdlib-draft", tour.backend, tour.say, tour.out)


def _four_bits(config: ModelConfig) -> Scheme:
    """Four bits, a scale for as many weights as divide every row, 128 at most."""
    columns = math.gcd(config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    group = next((g for g in (128, 64, 32, 16, 8) if columns % g == 0), None)
    if group is None:
        return Scheme(4, "half_integer", "channel")
    return Scheme(4, "half_integer", "group", group)


def serve(tour: Tour) -> None:
    """A burst of prompts that begin alike, through the serving engine: with and without a prefix cache."""
    shared, own, count, new = BURST
    text = "".join(d.text for d in held_out_documents())
    tokens = tour.model.tokenizer.encode(text[: 8 * (shared + own * count)], special=True)
    texts = burst.prompts(tokens, shared, own, count)
    kinds = {"no prefix cache": (False, 1.0), "radix tree": (True, 1.0), "radix tree, few blocks": (True, SCARCE)}
    made = table("engine", "steps", "tokens computed", "found in cache", "preemptions", "blocks at most", "s")
    runs = []
    for name, (cached, share) in kinds.items():
        run = burst.serve(tour.model, texts, new, cached=cached, share=share)
        runs.append(run)
        made.add_row(
            name, f"{run.steps}", f"{run.computed:,}", f"{run.cached / run.prompt_tokens:.0%}", f"{run.preemptions}",
            f"{run.peak_blocks} of {run.blocks}", f"{run.seconds:.2f}",
        )  # fmt: skip
    tour.out.print(made)
    tour.say()
    same = sum(a == b == c for a, b, c in zip(*(run.outputs for run in runs), strict=True))
    tour.say(
        f"{count} prompts with the same first {shared} tokens and {own} of their own, {new} new tokens each, all at "
        f"once. A plan a step says who computes what in which blocks of {burst.BLOCK} tokens. With a tree the first "
        "prompt goes ahead and the others find what it computed; with few blocks they wait, or give theirs up and "
        f"compute them again. {same} of {count} say the same three times; others part where two logits are as good as "
        "equal in float32."
    )


def formats(tour: Tour) -> None:
    """One weight matrix in every format: bits, error, and a few of its numbers as each has them."""
    from refllm.study import floats  # the block formats are not needed at the other stops

    weight = to_numpy(tour.model.weights["layers"][0]["down_proj"].dequantize()).astype(np.float32)
    shown = weight[0, :8]
    made = table("format", "bits a weight", "error", f"8 of its {weight.size:,} numbers, in thousandths")
    made.add_row("float32", "32.00", "0", _thousandths(shown))
    rows = floats.rows(weight)
    for name, bits, error, back in rows:
        made.add_row(name, f"{bits:.3f}", f"{error:.2%}", _thousandths(back[0, :8]))
    tour.out.print(made)
    tour.say()
    tour.say(
        f"The down projection of the first layer, {weight.shape[0]} × {weight.shape[1]}. Bits are counted with scales; "
        "the error is that of the whole matrix, ‖Ŵ − W‖ / ‖W‖."
    )
    eight = {name: error for name, bits, error, _ in rows if 8 <= bits < 9}
    best, worst = min(eight, key=lambda name: eight[name]), max(eight, key=lambda name: eight[name])
    tour.say(f"Of about eight bits, {best} is nearest and {worst} farthest: an exponent costs mantissa.")


def _thousandths(numbers: np.ndarray) -> str:
    return " ".join(f"{1e3 * x:5.0f}" for x in numbers.tolist())


STOPS = [
    Stop("meet", "The model", meet),
    Stop("write", "Writing code from a prompt", write),
    Stop("measure", "Predicting text that it never saw", measure),
    Stop("cost", "What a step costs", cost),
    Stop("phases", "Prefill and decode", phases),
    Stop("shrink", "Four bits a weight", shrink),
    Stop("formats", "One matrix in every format", formats),
    Stop("speculate", "Several tokens a step", speculate),
    Stop("serve", "Serving a burst of prompts", serve),
]
