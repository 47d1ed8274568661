"""Training speed of refllm against PyTorch on the CPU: the same network, weights, batches
and optimizer.

    python benchmarks/training.py --rounds 5 --output benchmarks/results/training.json

The bundled model's shape (4.2 M parameters), 8 windows of 256 tokens per step, float32, two
cores: refllm as it trains by itself (two Python threads with half a batch each, one BLAS
thread per product), PyTorch with two threads. Each engine runs in a process of its own; in
every round each takes its turn of a few steps. The losses must agree, since all start from
the same weights and see the same batches.

A third engine is refllm once more with glibc told to keep the memory that it frees
(``MALLOC_*``). By default every array of some megabytes is returned to the kernel when it is
freed, and the next one is mapped and zeroed again, page by page: the page faults of each turn
are counted.

Left out: ``torch.compile``, bfloat16, GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Worker, bundled_shape, environment, finish, ratios, shown, spread, table
from engines.training import Task

THREADS = 2
TARGET = 0.7  # times the tokens/s of PyTorch
KEEP = {
    "MALLOC_MMAP_THRESHOLD_": str(
        4 << 30
    ),  # no array is so large that it gets a mapping of its own
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),  # nor is so much free that the kernel gets it back
    "MALLOC_TOP_PAD_": str(256 << 20),
}
KEEPING = "refllm, memory kept"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.layers is None:
        config = bundled_shape()
    else:
        config = small(options.layers)
    task = Task(
        config.to_hf(), options.batch, options.length, options.steps, options.rounds + 1, THREADS
    )
    with contextlib.ExitStack() as stack:
        workers, skipped = start(options.engines, stack)
        record = {
            "benchmark": "training",
            "environment": environment(("torch", "transformers"), dict.fromkeys(workers, THREADS)),
            "model": {"name": "random weights", "parameters": config.num_parameters},
            "settings": {
                name: getattr(options, name) for name in ("batch", "length", "steps", "rounds")
            },
            "skipped": skipped,
        }
        turns = measure(workers, task, options.rounds)
    record["rounds"] = turns
    record["results"] = [result(turns)]
    show(record)
    finish(record, options.output)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = ["refllm", KEEPING, "torch"]
    parser = argparse.ArgumentParser(description="Training speed against PyTorch, as a ratio.")
    parser.add_argument("--engines", nargs="+", choices=names, default=names, metavar="ENGINE")
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--layers", type=int, help="a tiny network of so many layers (to try the program)"
    )
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    return parser.parse_args(arguments)


def small(layers: int) -> Any:
    return dataclasses.replace(
        bundled_shape(),
        num_hidden_layers=layers,
        hidden_size=64,
        intermediate_size=64,
        head_dim=16,
        vocab_size=256,
    )


def start(
    names: Sequence[str], stack: contextlib.ExitStack
) -> tuple[dict[str, Worker], dict[str, str]]:
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    for name in names:
        if name == "torch" and any(
            importlib.util.find_spec(p) is None for p in ("torch", "transformers")
        ):
            skipped[name] = "pip install 'refllm[oracles]'"
        elif name == KEEPING and platform.libc_ver()[0] != "glibc":
            skipped[name] = "needs glibc"
        else:
            # refllm's own two threads ask for products of one thread each
            module, threads = ("train_torch", THREADS) if name == "torch" else ("train_refllm", 1)
            workers[name] = Worker(
                module, (), threads=threads, extra=KEEP if name == KEEPING else None
            )
            stack.callback(workers[name].close)
    for name, line in skipped.items():
        print(f"{name} takes no part: {line}", file=sys.stderr)
    return workers, skipped


def measure(
    workers: dict[str, Worker], task: Task, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """turns[engine][round]: tokens/s, loss of the last step, page faults; the first turn is
    the warm-up.
    """
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr)
        answers = {name: worker.ask(**dataclasses.asdict(task)) for name, worker in workers.items()}
        check([answer["loss"] for answer in answers.values()], number)
        if number:
            for name, answer in answers.items():
                turns[name].append(answer)
    return turns


def check(losses: list[float], number: int) -> None:
    """Rounding grows from step to step, so only the first turn is held to float32's
    precision.
    """
    tolerance = 1e-4 if number == 0 else 1e-2
    if max(losses) - min(losses) > tolerance * max(losses):
        raise SystemExit(
            f"the engines' losses part in turn {number}: {losses}: the comparison is void"
        )


def result(turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    rates = {name: [turn["rate"] for turn in of] for name, of in turns.items()}
    row: dict[str, Any] = {
        "tokens_per_second": {name: spread(rate) for name, rate in rates.items()},
        "target": TARGET,
    }
    for key, ours, other in (
        ("ratio_to_torch", "refllm", "torch"),
        ("ratio_to_torch_memory_kept", KEEPING, "torch"),
        ("ratio_of_memory_kept", KEEPING, "refllm"),
    ):
        row[key] = ratios(rates[ours], rates[other]) if ours in rates and other in rates else None
    return row


def show(record: dict[str, Any]) -> None:
    (row,) = record["results"]
    settings = record["settings"]
    rows = []
    for name, rate in row["tokens_per_second"].items():
        faults = [turn.get("page_faults") for turn in record["rounds"][name]]
        known = [f / settings["steps"] for f in faults if f is not None]
        shown_faults = f"{sum(known) / len(known):.0f}" if known else "-"
        rows.append(
            [name, f"{rate['median']:.0f}", f"{rate['low']:.0f}-{rate['high']:.0f}", shown_faults]
        )
    title = (
        f"Training, {record['model']['parameters'] / 1e6:.1f} M parameters, "
        f"{settings['batch']} x {settings['length']} tokens a step, {THREADS} threads, "
        f"{settings['rounds']} rounds in turn (measured here)"
    )
    table(title, ["engine", "tokens/s", "range", "page faults a step"], rows)
    print(
        f"\n  refllm / torch:               {shown(row['ratio_to_torch'])}   target >= {TARGET:g}x"
    )
    print(f"  refllm, memory kept / torch:  {shown(row['ratio_to_torch_memory_kept'])}")
    print(f"  memory kept / refllm:         {shown(row['ratio_of_memory_kept'])}")


if __name__ == "__main__":
    sys.exit(main())
