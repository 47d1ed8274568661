"""Decoding speed of refllm against other programs: the same weights, prompts and number of
tokens, one thread each.

    python benchmarks/decode.py --rounds 5 --output benchmarks/results/decode.json

Greedy, 32 prompt tokens and 48 new ones per sequence, batches of 1, 8 and 32, float32 in
every engine, the end token ignored. Each engine runs in a process of its own; in every
round each takes its turn at every batch, and a ratio is refllm's tokens/s over the other
engine's in the same round. Of transformers' two caches the faster one counts, by the median of
this run. The prefill is included, as it is for a user.

The engines must produce the same tokens: they may differ only where
the two best logits are closer than rounding in float32 can tell apart (checked in float64).

llama.cpp takes part where it is installed (``make test-llamacpp`` compiles it). Left out:
sampling other than greedy, prompts of different lengths, GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import Worker, environment, finish, network, ratios, shown, spread, table

from refllm import corpus
from refllm.api import Model, load


class Engine(NamedTuple):
    """How to start an engine, and what it needs installed."""

    module: str  # in engines/
    arguments: tuple[str, ...]
    needs: tuple[str, ...]  # importable names
    install: str


ENGINE_PACKAGES = ("torch", "transformers", "llama-cpp-python", "gguf")
ORACLES = "pip install 'refllm[oracles]'"
ENGINES = {
    "refllm": Engine("decode_refllm", (), (), ""),
    "transformers": Engine("decode_transformers", ("dynamic",), ("torch", "transformers"), ORACLES),
    "transformers, static cache": Engine(
        "decode_transformers", ("static",), ("torch", "transformers"), ORACLES
    ),
    "llama.cpp": Engine(
        "decode_llamacpp", (), ("llama_cpp", "gguf"), "pip install llama-cpp-python gguf"
    ),
}
CLOCKS = ("wall", "processor")
TARGETS = {1: 4.0, 8: 3.0, 32: 2.0}  # times the tokens/s of transformers


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with network(options.model) as (path, about), contextlib.ExitStack() as stack:
        model = load(path, backend="numpy", dtype="float64")
        prompts = held_out_prompts(model, max(options.batch), options.prompt)
        workers, skipped = start(options.engines, path, stack)
        record = {
            "benchmark": "decode",
            "environment": environment(ENGINE_PACKAGES, dict.fromkeys(workers, 1)),
            "model": {"name": about, "parameters": model.config.num_parameters},
            "settings": {
                name: getattr(options, name)
                for name in ("prompt", "new", "batch", "rounds", "seconds")
            },
            "skipped": skipped,
            "agreement": agreement(workers, model, prompts, options),
        }
        rates = measure(workers, prompts, options)
    record["rates"] = rates
    record["results"] = [result(batch, rates) for batch in options.batch]
    show(record)
    finish(record, options.output)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Decoding speed against transformers and llama.cpp, as ratios."
    )
    parser.add_argument("--model", help="a checkpoint directory (default: the bundled model)")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="B")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens a sequence")
    parser.add_argument("--new", type=int, default=48, help="new tokens a sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="shortest turn of an engine at one batch"
    )
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    return parser.parse_args(arguments)


def held_out_prompts(model: Model, count: int, length: int) -> list[list[int]]:
    """[count][length]: consecutive pieces of text that the bundled model has not seen."""
    ids: list[int] = []
    for document in corpus.held_out_documents():
        ids += model.tokenizer.encode(document.text)
        if len(ids) >= count * length:
            return [ids[i * length : (i + 1) * length] for i in range(count)]
    raise ValueError(
        f"the held-out text has {len(ids)} tokens, fewer than {count} prompts of {length}"
    )


def start(
    names: Sequence[str],
    path: Path,
    stack: contextlib.ExitStack,
    engines: Mapping[str, Engine] = ENGINES,
) -> tuple[dict[str, Worker], dict[str, str]]:
    """Workers of the engines that are installed, and the install line of each that is not."""
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    for name in names:
        engine = engines[name]
        if any(importlib.util.find_spec(package) is None for package in engine.needs):
            skipped[name] = engine.install
            print(f"{name} is not installed and takes no part: {engine.install}", file=sys.stderr)
            continue
        workers[name] = Worker(engine.module, (str(path), *engine.arguments), threads=1)
        stack.callback(workers[name].close)
    return workers, skipped


def measure(workers: dict[str, Worker], prompts: list[list[int]], options: Any) -> dict[str, Any]:
    """rates[clock][batch][engine][round]: new tokens per second, of all sequences together,
    by wall and processor.
    """
    rates: dict[str, Any] = {
        clock: {str(batch): {name: [] for name in workers} for batch in options.batch}
        for clock in CLOCKS
    }
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for batch in options.batch:
            for name, worker in workers.items():
                answer = worker.ask(
                    prompts=prompts[:batch], new=options.new, seconds=options.seconds
                )
                for clock in CLOCKS:
                    rates[clock][str(batch)][name].append(answer[clock])
    return rates


def agreement(
    workers: dict[str, Worker], model: Model, prompts: list[list[int]], options: Any
) -> dict[str, Any]:
    """How many sequences are equal to the first engine's, for each batch and engine; also
    the warm-up.
    """
    out: dict[str, Any] = {}
    for batch in options.batch:
        answers = {
            name: worker.ask(prompts=prompts[:batch], new=options.new, seconds=0)["tokens"]
            for name, worker in workers.items()
        }
        first = next(iter(answers.values()))
        for name, tokens in answers.items():
            pairs = list(zip(prompts[:batch], first, tokens, strict=True))
            parted = [
                near_tie(model, prompt, ours, theirs, name)
                for prompt, ours, theirs in pairs
                if ours != theirs
            ]
            out.setdefault(str(batch), {})[name] = {
                "equal": batch - len(parted),
                "near_ties": parted,
            }
    return out


def near_tie(
    model: Model, prompt: list[int], ours: list[int], theirs: list[int], name: str
) -> dict[str, float]:
    """Where two continuations part, and by how little the choice was made; SystemExit if it
    was clear.

    Logits of two float32 engines differ by up to 2 · 10⁻⁵ of the largest, those of
    llama.cpp by 3 · 10⁻⁴ (the bounds of the tests), and each of the two best may move.
    """
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        raise SystemExit(f"{name} gave {len(theirs)} tokens where {len(ours)} were expected")
    z = model.logits([*prompt, *ours[:at]])[-1]
    margin = abs(float(z[ours[at]] - z[theirs[at]]))
    if name.startswith("llama.cpp"):
        tolerance = 6e-4
    else:
        tolerance = 4e-5 * float(np.abs(z).max())
    if margin > tolerance:
        raise SystemExit(
            f"{name} parts from refllm at token {at} by a margin of {margin:.1e}: the "
            "comparison is void"
        )
    return {"token": at, "margin": margin}


def result(batch: int, rates: dict[str, Any]) -> dict[str, Any]:
    """The row of the table: median rates, and refllm's ratio to each other engine and to the faster
    transformers.
    """
    wall, processor = (rates[clock][str(batch)] for clock in CLOCKS)
    row: dict[str, Any] = {
        "batch": batch,
        "tokens_per_second": {name: spread(r) for name, r in wall.items()},
    }
    if "refllm" not in wall:
        return row | {"ratio": {}, "ratio_processor_time": {}}
    others = [name for name in wall if name != "refllm"]
    row["ratio"] = {name: ratios(wall["refllm"], wall[name]) for name in others}
    row["ratio_processor_time"] = {
        name: ratios(processor["refllm"], processor[name]) for name in others
    }
    if caches := [name for name in others if name.startswith("transformers")]:
        fastest = max(caches, key=lambda name: statistics.median(wall[name]))
        row |= {
            "peer": fastest,
            "ratio_to_peer": row["ratio"][fastest],
            "target": TARGETS.get(batch),
        }
    return row


def show(record: dict[str, Any]) -> None:
    settings = record["settings"]
    results = record["results"]
    names = list(results[0]["tokens_per_second"])
    others = [name for name in names if name != "refllm"]
    print(
        f"\nDecoding, {record['model']['name']}: {settings['prompt']} prompt + "
        f"{settings['new']} new tokens, greedy, float32, one thread each, "
        f"{settings['rounds']} rounds in turn (measured here)"
    )
    rows = [
        [r["batch"], *(f"{r['tokens_per_second'][n]['median']:.0f}" for n in names)]
        for r in results
    ]
    table("new tokens per second, median of the rounds", ["batch", *names], rows)
    targets = [[f">= {r['target']:g}x" if r.get("target") else "-"] for r in results]
    rows = [[r["batch"], *(shown(r["ratio"].get(n)) for n in others)] for r in results]
    table(
        "refllm / other engine: median and range of the rounds; the target holds for the faster "
        "of transformers' two caches",
        ["batch", *others, "target"],
        [row + target for row, target in zip(rows, targets, strict=True)],
    )
    rows = [
        [r["batch"], *(shown(r["ratio_processor_time"].get(n)) for n in others)] for r in results
    ]
    table(
        "the same by processor time, which a busy machine distorts less", ["batch", *others], rows
    )
    ties = {
        name: sum(len(at[name]["near_ties"]) for at in record["agreement"].values())
        for name in names
    }
    print(f"\nSequences that part from refllm's at a near tie (all others are equal): {ties}")


if __name__ == "__main__":
    sys.exit(main())
