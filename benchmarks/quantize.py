"""How fast weights are quantised: one large layer by GPTQ, a whole checkpoint, rounding.

    python benchmarks/quantize.py --threads 1 --output benchmarks/results/quantize.json
    python benchmarks/quantize.py --layers 16 --gptq-layers 16  # nothing projected: an hour

| part  | what is timed                                           | against                     |
|-------|---------------------------------------------------------|-----------------------------|
| layer | GPTQ of a 4096 × 4096 weight, 4 bits, groups of 128,    | the paper's loop in PyTorch |
|       | from its Hessian                                        |                             |
| model | random weights of Llama-3.2-1B's shapes, from files to  | the stages' shares, peak    |
|       | files                                                   | memory                      |
| rtn   | rounding and packing in one thread, GB of float32/s     | summing the same array      |

``--layers`` and ``--gptq-layers`` quantise a model of so many decoder layers; the whole is
then *projected*: the time of all stages but the writing, times 16 / layers. The record says
so.

On a machine that others use too, one thread and the processor's time (``cpu_…``) say more
than the wall's.

Left out: llm-compressor's and GPTQModel's own loops (a large install each; the loop in
PyTorch is theirs in form).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Worker, environment, finish, ratios, shown, spread, table

LLAMA = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
WHOLE = 16  # layers of Llama-3.2-1B
ONCE = ("writing",)  # stages that are not done layer by layer alone; the embedding is most of them
TARGETS = {"layer": 1.0, "rtn minutes": 3.0, "rtn gib": 8.0, "gptq minutes": 40.0}
AGREE = 0.02  # of the losses: scales differ by rounding, and one code changes what comes after it


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    record: dict[str, Any] = {
        "benchmark": "quantize",
        "environment": environment(
            ("torch",), {"refllm": options.threads, "torch": options.threads}
        ),
        "settings": {
            n: getattr(options, n)
            for n in ("size", "group", "layers", "gptq_layers", "tokens", "rounds", "threads")
        },
        "skipped": {},
        "results": [],
    }
    layer_part(options, record)
    rtn_part(options, record)
    model_part(options, record)
    finish(record, options.output)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast weights are quantised.")
    parser.add_argument(
        "--size", type=int, default=4096, help="rows and columns of the single weight"
    )
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument(
        "--layers", type=int, default=4, help="decoder layers for rtn; fewer than 16 are projected"
    )
    parser.add_argument("--gptq-layers", type=int, default=1, help="the same for gptq")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="of calibration text, in windows of 512 or fewer"
    )
    parser.add_argument("--methods", nargs="*", choices=("rtn", "gptq"), default=["rtn", "gptq"])
    parser.add_argument("--small", action="store_true", help="a tiny model (to try the program)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints go (3 GB); default: the temporary folder"
    )
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    return parser.parse_args(arguments)


# --- one layer ----------------------------------------------------------------------------


def layer_part(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Both engines in turn; their losses must agree, since both solve the same problem."""
    names = ["refllm", "torch"]
    if importlib.util.find_spec("torch") is None:
        names.remove("torch")
        record["skipped"]["torch"] = "pip install 'refllm[oracles]'"
        print(f"torch takes no part: {record['skipped']['torch']}", file=sys.stderr)
    task = {"size": options.size, "tokens": 2 * options.size, "bits": 4, "group": options.group}
    workers = {name: Worker(f"gptq_{name}", (), threads=options.threads) for name in names}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    try:
        for number in range(options.rounds + 1):
            print(f"layer: round {number} of {options.rounds}", file=sys.stderr)
            answers = {name: worker.ask(**task) for name, worker in workers.items()}
            check([answer["loss"] for answer in answers.values()])
            for name, answer in answers.items() if number else ():  # the first turn is the warm-up
                turns[name].append(answer)
    finally:
        for worker in workers.values():
            worker.close()
    seconds, cpu = (
        {name: [turn[key] for turn in of] for name, of in turns.items()}
        for key in ("seconds", "cpu")
    )
    ratio, busy = (
        ratios(s["torch"], s["refllm"]) if "torch" in s else None for s in (seconds, cpu)
    )
    row = {
        "part": "layer",
        "seconds": {n: spread(s) for n, s in seconds.items()},
        "cpu_seconds": {n: spread(s) for n, s in cpu.items()},
        "speed_to_torch": ratio,
        "cpu_speed_to_torch": busy,
        "target": TARGETS["layer"],
    }
    record["results"].append(row)
    table(
        f"GPTQ of one {options.size} x {options.size} layer, {options.threads} threads",
        ["engine", "seconds", "of a processor"],
        [
            [n, f"{seconds['median']:.2f}", f"{row['cpu_seconds'][n]['median']:.2f}"]
            for n, seconds in row["seconds"].items()
        ],
    )
    print(f"\n  speed of refllm / torch: {shown(ratio)}   target >= {TARGETS['layer']:g}x")
    print(f"  by processor time:       {shown(busy)}")


def check(losses: list[float]) -> None:
    if max(losses) - min(losses) > AGREE * max(losses):
        raise SystemExit(f"the engines' losses differ: {losses}: the comparison is void")


# --- rounding -----------------------------------------------------------------------------


def rtn_part(options: argparse.Namespace, record: dict[str, Any]) -> None:
    worker = Worker("rtn_refllm", (), threads=1)
    try:
        answers = [
            worker.ask(size=options.size, bits=4, group=options.group)
            for _ in range(options.rounds + 1)
        ][1:]
    finally:
        worker.close()
    rates = {name: spread([a[name] / 1e9 for a in answers]) for name in ("rtn", "memory")}
    share = ratios([a["rtn"] for a in answers], [a["memory"] for a in answers])
    record["results"].append({"part": "rtn", "gb_per_second": rates, "share_of_memory": share})
    table(
        "Rounding and packing to 4 bits, one thread (measured here)",
        ["what", "GB of float32 a second"],
        [
            ["round and pack", f"{rates['rtn']['median']:.2f}"],
            ["sum (reads all)", f"{rates['memory']['median']:.1f}"],
        ],
    )


# --- a model ------------------------------------------------------------------------------


class Repeated(Mapping[str, np.ndarray]):
    """Random tensors cut from one block of random numbers: a billion of them would take
    longer than the benchmark.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        rng = np.random.default_rng(0)
        self.shapes = shapes
        self.block = rng.standard_normal((1 << 22) + 1, dtype=np.float32) * np.float32(0.02)

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return np.resize(self.block, shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def random_model(path: Path, layers: int, sizes: Mapping[str, int]) -> Any:
    """A checkpoint in bfloat16 with a tokenizer of few words; returns its config."""
    from refllm import corpus
    from refllm.checkpoints.tensor_files import tensor_shapes
    from refllm.checkpoints.tokenizer import Tokenizer
    from refllm.checkpoints.writer import save
    from refllm.model.config import ModelConfig

    config = ModelConfig(
        "llama", **sizes, num_hidden_layers=layers, tie_word_embeddings=True, eos_token_ids=(0,)
    )
    tokenizer = Tokenizer.train((d.text for d in corpus.held_out_documents()[:1]), 512)
    save(path, config, Repeated(dict(tensor_shapes(config))), tokenizer, dtype="bfloat16")
    return config


def model_part(options: argparse.Namespace, record: dict[str, Any]) -> None:
    if not options.methods:
        return
    length = min(512, options.tokens)
    for method in options.methods:
        layers = options.gptq_layers if method == "gptq" else options.layers
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            source = Path(folder) / "model"
            output = Path(folder) / "quantised"
            print(f"model: {method}, {layers} layers", file=sys.stderr)
            config = random_model(source, layers, SMALL if options.small else LLAMA)
            worker = Worker("quantize_model", (), threads=options.threads)
            try:
                answer = worker.ask(
                    source=str(source),
                    output=str(output),
                    method=method,
                    group=options.group,
                    samples=options.tokens // length,
                    length=length,
                )
            finally:
                worker.close()
        record["results"].append(model_row(method, answer, layers, config.num_parameters))
        show_model(record["results"][-1])


def model_row(method: str, answer: dict[str, Any], layers: int, parameters: int) -> dict[str, Any]:
    """The whole model's time is measured where all layers were done, and projected
    otherwise.
    """
    stages = answer["stages"]
    whole = sum(
        seconds * (1 if name in ONCE else WHOLE / layers) for name, seconds in stages.items()
    )
    return {
        "part": "model",
        "method": method,
        "layers": layers,
        "parameters": parameters,
        "seconds": answer["seconds"],
        "cpu_seconds": answer["cpu"],
        "minutes_of_16_layers": whole / 60,
        "projected": layers != WHOLE,
        "target_minutes": TARGETS[f"{method} minutes"],
        "peak_gib": answer["peak_bytes"] / 2**30,
        "target_gib": TARGETS["rtn gib"] if method == "rtn" else None,
        "shares": {name: seconds / answer["seconds"] for name, seconds in stages.items()},
        "bits_per_weight": answer["bits_per_weight"],
        "bytes": answer["bytes"],
    }


def show_model(row: dict[str, Any]) -> None:
    kind = "projected" if row["projected"] else "measured here"
    table(
        f"{row['method']}, {row['layers']} layers of Llama-3.2-1B's shapes, "
        f"{row['seconds']:.0f} s, peak {row['peak_gib']:.2f} GiB",
        ["stage", "share"],
        [[name, f"{share:.1%}"] for name, share in row["shares"].items()],
    )
    print(f"\n  processor time {row['cpu_seconds']:.0f} s of {row['seconds']:.0f} s")
    print(
        f"  {WHOLE} layers: {row['minutes_of_16_layers']:.1f} min, {kind}   target <= "
        f"{row['target_minutes']:g}"
    )


if __name__ == "__main__":
    sys.exit(main())
