"""Speed on a real pretrained model, SmolLM2-135M-Instruct: the same weights and prompts, the same
number of threads, in turns.

    python benchmarks/real.py --output benchmarks/results/real.json

With one and with two threads: new tokens per second at batch 1 and 8 (greedy, 32 prompt tokens
and 24 new ones per sequence, prefill included), and the prefill of 512 tokens. Of refllm alone:
a step of 1 to 16 tokens at context 128, and the bytes per second of a step of one token against
a plain matrix-vector product over a matrix of the model's size.

| engine                   | what                                                              |
|--------------------------|-------------------------------------------------------------------|
| refllm                   | as the command line runs it: ``refllm/openblas.py`` picks kernels |
| refllm, KERNELS kernels  | the other family of OpenBLAS, where this processor has it         |
| transformers             | float32, the same GGUF file, the faster of two caches             |
| llama.cpp, F32           | the same file, written as float32 by llama.cpp                    |
| llama.cpp, Q4_1          | the file as it is: it reads a fifth of the bytes                  |

Engines that compute in float32 must produce the same tokens: they may differ only where the two
best logits are closer than float32 can tell apart. llama.cpp on Q4_1 rounds activations too: its
tokens are counted, not required. What is not installed is recorded as not run.

Left out: sampling, contexts above 600 tokens, GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import numpy as np
from common import Worker, environment, finish, ratios, shown, spread, table

from decode import ENGINE_PACKAGES, ORACLES
from refllm.api import Model, load, locate
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.openblas import VARIABLE, fast_kernels, read_cpuinfo

FAMILIES = ("SkylakeX", "Haswell")
ASK_FAMILY = """
import numpy
from threadpoolctl import threadpool_info
numpy.ones((64, 64), "float32") @ numpy.ones((64, 64), "float32")
print(*(p.get("architecture") for p in threadpool_info() if p["user_api"] == "blas"))
"""
LLAMACPP = "pip install llama-cpp-python gguf"
TARGETS = {(1, 1): 2.0, (2, 1): 2.4, (1, 8): 1.6, (2, 8): 1.8}  # (threads, batch)
PREFILL_TARGET = 0.8  # times transformers
LLAMACPP_TARGET = 0.9  # times llama.cpp in float32, batch 1
BANDWIDTH_TARGET = 0.85  # of the plain product's bytes per second
# Logits of float32 engines differ by up to 2 · 10⁻⁵ of the largest (llama.cpp: 3 · 10⁻⁴), and
# each of the two best may move.
TOLERANCE = {"llama.cpp, F32": 6e-4}
TOLERANCE_ELSE = 4e-5


class Engine(NamedTuple):
    """How to start an engine, and what it needs installed."""

    module: str  # in engines/
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # importable names
    install: str = ""
    kernels: str | None = None  # of OpenBLAS


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        path = locate(options.model)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error  # with the command that installs the model
    model = load(path, backend="numpy", weights="float")
    prompts = text_prompts(model, max(options.batch), options.prompt)
    long = text_prompts(model, 1, options.prefill)
    engines, missing = engines_here(options.engines)
    with contextlib.ExitStack() as stack:
        workers, skipped = start(engines, path, options.threads, stack)
        compared = {
            f"{count} threads": agreement(w, model, prompts, options.new)
            for count, w in workers.items()
        }
        record: dict[str, Any] = {
            "benchmark": "real",
            "environment": environment(
                ENGINE_PACKAGES,
                {name: max(options.threads) for name in next(iter(workers.values()))},
            ),
            "model": {"name": options.model, "parameters": model.config.num_parameters},
            "settings": {
                key: value
                for key, value in vars(options).items()
                if key not in ("output", "engines", "model")
            },
            "engines": {
                f"{name}, threads {count}": worker.about
                for count, those in workers.items()
                for name, worker in those.items()
            },
            "skipped": missing | skipped,
            "agreement": compared,
        }
        rounds = measure(workers, prompts, long, options)
    record["rounds"] = rounds
    record["results"] = results(workers, rounds, options)
    show(record)
    finish(record, options.output)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed on a real pretrained model, as ratios.")
    parser.add_argument("--model", default="smollm2", help="smollm2, a GGUF file or a directory")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["refllm", "families", "transformers", "llama.cpp"],
        choices=["refllm", "families", "transformers", "llama.cpp"],
        help="families: refllm on the other kernels of OpenBLAS too",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens per sequence")
    parser.add_argument("--new", type=int, default=24, help="new tokens per sequence")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16])
    parser.add_argument("--context", type=int, default=128, help="cached tokens before a step")
    parser.add_argument("--repeats", type=int, default=7, help="steps per turn: the fastest counts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="shortest turn of decoding")
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    return parser.parse_args(arguments)


def text_prompts(model: Model, count: int, length: int) -> list[list[int]]:
    """[count][length]: consecutive pieces of the language reference that comes with Python."""
    ids: list[int] = []
    for name in sorted(topics.topics):
        ids += model.tokenizer.encode(topics.topics[name])
        if len(ids) >= count * length:
            return [ids[i * length : (i + 1) * length] for i in range(count)]
    raise ValueError(f"the text has {len(ids)} tokens, fewer than {count} prompts of {length}")


# --- engines ------------------------------------------------------------------------------


def engines_here(wanted: Sequence[str]) -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines by name, and why a family of kernels takes no part."""
    asked = os.environ.get(VARIABLE) or fast_kernels(read_cpuinfo())
    usual = family(asked)
    engines = {"refllm": Engine("real_refllm", kernels=asked)}
    missing = {}
    if "families" in wanted:
        for name in FAMILIES:
            if name == usual:
                continue
            if family(name) == name:
                engines[f"refllm, {name} kernels"] = Engine("real_refllm", kernels=name)
            else:
                missing[f"refllm, {name} kernels"] = "this processor or BLAS has no such kernels"
    torch = ("torch", "transformers", "gguf")
    if "transformers" in wanted:
        engines["transformers"] = Engine("real_transformers", (), torch, ORACLES)
    if "llama.cpp" in wanted:
        for name, how in (("F32", "F32"), ("Q4_1", "stored")):
            engines[f"llama.cpp, {name}"] = Engine(
                "real_llamacpp", (how,), ("llama_cpp", "gguf"), LLAMACPP
            )
    return engines, missing


def family(core_type: str | None) -> str:
    """The kernels that a new process computes with under ``OPENBLAS_CORETYPE``; "" if it dies."""
    own = {} if core_type is None else {VARIABLE: core_type}
    done = subprocess.run(
        [sys.executable, "-c", ASK_FAMILY],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


Workers = dict[int, dict[str, Worker]]  # by threads, then by engine


def start(
    engines: dict[str, Engine], path: Path, threads: Sequence[int], stack: contextlib.ExitStack
) -> tuple[Workers, dict[str, str]]:
    """A process per engine and number of threads; the install line of what is not installed."""
    workers: Workers = {count: {} for count in threads}
    skipped = {}
    for name, engine in engines.items():
        if any(importlib.util.find_spec(package) is None for package in engine.needs):
            skipped[name] = engine.install
            print(f"{name} is not installed and takes no part: {engine.install}", file=sys.stderr)
            continue
        for count in threads:
            print(f"starting {name}, threads {count}", file=sys.stderr)
            worker = Worker(
                engine.module,
                (str(path), *engine.arguments),
                threads=count,
                extra={} if engine.kernels is None else {VARIABLE: engine.kernels},
            )
            workers[count][name] = worker
            stack.callback(worker.close)
    return workers, skipped


def agreement(
    workers: dict[str, Worker], model: Model, prompts: list[list[int]], new: int
) -> dict[str, Any]:
    """How many sequences are equal to refllm's, and where the others part; also the warm-up."""
    answers = {
        name: [w.ask(prompts=[p], new=new, seconds=0)["tokens"][0] for p in prompts[:1]]
        + w.ask(prompts=prompts, new=new, seconds=0)["tokens"]
        for name, w in workers.items()
    }
    first = answers["refllm"]
    out: dict[str, Any] = {}
    for name, tokens in answers.items():
        parted = [
            _parting(model, prompt, ours, theirs, name)
            for prompt, ours, theirs in zip([*prompts[:1], *prompts], first, tokens, strict=True)
            if ours != theirs
        ]
        out[name] = {"equal": len(first) - len(parted), "of": len(first), "parted": parted}
    return out


def _parting(
    model: Model, prompt: list[int], ours: list[int], theirs: list[int], name: str
) -> dict[str, float]:
    """Where two continuations part, and by how little the choice was made; SystemExit if an
    engine in float32 parts by a clear margin.
    """
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    z = np.asarray(model.logits([*prompt, *ours[:at]])[-1], dtype=np.float64)
    margin = abs(float(z[ours[at]] - z[theirs[at]]))
    tolerance = TOLERANCE.get(name, TOLERANCE_ELSE) * float(np.abs(z).max())
    if margin > tolerance and name != "llama.cpp, Q4_1":
        raise SystemExit(
            f"{name} parts from refllm at token {at} by a margin of {margin:.1e}: the "
            "comparison is void"
        )
    return {"token": at, "margin": margin}


# --- rounds -------------------------------------------------------------------------------


def measure(
    workers: Workers, prompts: list[list[int]], long: list[list[int]], options: argparse.Namespace
) -> dict[str, Any]:
    """rounds[threads][what][engine]: a list of one value per round."""
    for those in workers.values():  # the first call of a shape allocates, and chooses a cache
        for worker in those.values():
            for batch in options.batch:
                worker.ask(prompts=prompts[:batch], new=options.new, seconds=0)
            worker.ask(prompts=long, new=1, seconds=0)
    rounds: dict[str, Any] = {}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for threads, those in workers.items():
            here = rounds.setdefault(str(threads), {})
            for batch in options.batch:
                for name, worker in those.items():
                    answer = worker.ask(
                        prompts=prompts[:batch], new=options.new, seconds=options.seconds
                    )
                    _note(here, f"batch {batch}", name, answer["wall"])
            for name, worker in those.items():
                answer = worker.ask(prompts=long, new=1, seconds=0)
                _note(here, "prefill", name, answer["wall"] * len(long[0]))
            for name, worker in those.items():
                if name.startswith("refllm"):
                    measure_steps(here, name, worker, options)
    return rounds


def measure_steps(
    here: dict[str, Any], name: str, worker: Worker, options: argparse.Namespace
) -> None:
    """Steps of n tokens, and before and after them the plain product."""
    ask = functools.partial(worker.ask, repeats=options.repeats)
    plain = ask(measure="plain product")
    for count in options.steps:
        answer = ask(measure="step", tokens=count, context=options.context)
        _note(here, f"step {count}", name, answer["seconds"])
        if count == 1:
            _note(here, "step bytes per second", name, worker.about["bytes"] / answer["seconds"])
            again = ask(measure="plain product")
            fastest = min(plain["seconds"], again["seconds"])
            _note(here, "plain bytes per second", name, plain["bytes"] / fastest)


def _note(here: dict[str, Any], what: str, name: str, value: float) -> None:
    here.setdefault(what, {}).setdefault(name, []).append(value)


def results(workers: Workers, rounds: dict[str, Any], options: argparse.Namespace) -> list[Any]:
    """The rows of the tables."""
    rows: list[Any] = []
    for threads in options.threads:
        here = rounds[str(threads)]
        for what in (*(f"batch {batch}" for batch in options.batch), "prefill"):
            rates = here[what]
            rows.append(
                {
                    "threads": threads,
                    "what": what,
                    "tokens_per_second": {name: spread(values) for name, values in rates.items()},
                    "ratio": {
                        name: ratios(rates["refllm"], values)
                        for name, values in rates.items()
                        if name != "refllm"
                    },
                    "targets": targets(threads, what),
                }
            )
        for name in workers[threads]:
            if name.startswith("refllm"):
                rows.append(steps_row(threads, name, here, options.steps))
    return rows


def steps_row(
    threads: int, name: str, here: dict[str, Any], steps: Sequence[int]
) -> dict[str, Any]:
    """Steps of n tokens in milliseconds and relative to one, and bytes per second."""
    times = {count: here[f"step {count}"][name] for count in steps}
    row: dict[str, Any] = {
        "threads": threads,
        "what": "steps",
        "engine": name,
        "milliseconds": {n: spread([1e3 * s for s in seconds]) for n, seconds in times.items()},
    }
    if 1 in times:
        ours = here["step bytes per second"][name]
        plain = here["plain bytes per second"][name]
        row |= {
            "to_one": {n: ratios(seconds, times[1]) for n, seconds in times.items()},
            "step_gb_per_second": spread([v / 1e9 for v in ours]),
            "plain_gb_per_second": spread([v / 1e9 for v in plain]),
            "bandwidth_ratio": ratios(ours, plain),
            "bandwidth_target": BANDWIDTH_TARGET,
        }
    return row


def targets(threads: int, what: str) -> dict[str, float]:
    """What refllm ÷ engine should reach at least."""
    if what == "prefill":
        return {"transformers": PREFILL_TARGET}
    batch = int(what.removeprefix("batch "))
    found = {}
    if (threads, batch) in TARGETS:
        found["transformers"] = TARGETS[threads, batch]
    if batch == 1:
        found["llama.cpp, F32"] = LLAMACPP_TARGET
    return found


# --- tables -------------------------------------------------------------------------------


def show(record: dict[str, Any]) -> None:
    settings = record["settings"]
    print(
        f"\n{record['model']['name']}, {record['model']['parameters']:,} parameters: "
        f"{settings['prompt']} prompt + {settings['new']} new tokens, greedy, "
        f"{settings['rounds']} rounds in turn (measured here)"
    )
    rated = [r for r in record["results"] if "ratio" in r]
    names = list(rated[0]["tokens_per_second"])
    table(
        "tokens per second, median of the rounds",
        ["threads", "what", *names],
        [
            [
                r["threads"],
                r["what"],
                *(f"{r['tokens_per_second'][name]['median']:.0f}" for name in names),
            ]
            for r in rated
        ],
    )
    table(
        "refllm / engine, by round, and what it should reach",
        ["threads", "what", "engine", "ratio", "target"],
        [
            [
                r["threads"],
                r["what"],
                name,
                shown(ratio),
                f">= {r['targets'][name]:g}x" if name in r["targets"] else "-",
            ]
            for r in rated
            for name, ratio in r["ratio"].items()
        ],
    )
    stepped = [r for r in record["results"] if r["what"] == "steps"]
    counts = list(stepped[0]["milliseconds"])
    table(
        "a step of n tokens, milliseconds (and relative to one)",
        ["threads", "engine", *(f"n={n}" for n in counts)],
        [[r["threads"], r["engine"], *(_step(r, n) for n in counts)] for r in stepped],
    )
    table(
        "GB/s: a step of one token, and a plain product over a matrix of the model's size",
        ["threads", "engine", "step", "plain", "step / plain", "target"],
        [
            [
                r["threads"],
                r["engine"],
                f"{r['step_gb_per_second']['median']:.1f}",
                f"{r['plain_gb_per_second']['median']:.1f}",
                shown(r["bandwidth_ratio"]),
                f">= {r['bandwidth_target']:g}x",
            ]
            for r in stepped
            if "bandwidth_ratio" in r
        ],
    )
    for name, about in record["engines"].items():
        if "bytes" in about:
            print(f"{name}: {about['bytes'] / 1e6:.0f} MB per token", end="; ")
    print()
    for threads, those in record["agreement"].items():
        equal = ", ".join(f"{name} {found['equal']}/{found['of']}" for name, found in those.items())
        print(f"Texts equal to refllm's, {threads}: {equal}")
    for name, why in record["skipped"].items():
        print(f"not run: {name} ({why})")


def _step(row: dict[str, Any], n: Any) -> str:
    text = f"{row['milliseconds'][n]['median']:.1f}"
    return f"{text} ({row['to_one'][n]['median']:.2f})" if "to_one" in row else text


if __name__ == "__main__":
    sys.exit(main())
