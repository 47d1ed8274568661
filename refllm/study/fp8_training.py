"""Training in 8 bits against training in float32: how far the loss moves, beside how far another seed moves it.

    python -m refllm.study.fp8_training       # writes figures/data/fp8_training.json; `refllm figures` draws it

The whole bundled architecture learns the standard library from random weights, once for each row of ``RUNS``; those
of one seed begin with the same weights and read the same windows in the same order. Its number is the mean loss of the
last ``LAST`` steps. Runs are kept in ``--work`` with a checkpoint every ``SAVE`` steps, so the command goes on where
it was stopped; finished ones are not run again.

| run             | products of the projections                                             |
|-----------------|-------------------------------------------------------------------------|
| float32         | as they are                                                             |
| tile            | all three in E4M3, scales by 1 × 128 tiles and 128 × 128 blocks         |
| tensor          | all three in E4M3, one scale a tensor                                   |
| E5M2 gradients  | as "tile", but dY in E5M2                                               |

A short run cannot tell methods apart that differ by less than the order of float32's sums does. What can is the error
of one gradient: ‖g₈ − g‖ / ‖g‖ over all projections, at the weights of the bundled model, on the same text.

Source: DeepSeek-V3 (2024), §3.3 (relative error of the loss below 0.25 % of BF16's) and appendix B.

Left out: networks large enough to grow outliers; there one scale a tensor loses more.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refllm.api import locate
from refllm.model.backward import PLAIN, Product, Tensors, loss_and_gradients
from refllm.model.checkpoint import iter_tensors, read_config
from refllm.model.config import ModelConfig
from refllm.model.corpus import training_documents
from refllm.model.fp8 import Fp8
from refllm.model.plan import Phase, Plan
from refllm.model.streams import encode
from refllm.model.tokenizer import Tokenizer
from refllm.model.train import train
from refllm.study.machine import processor
from refllm.study.records import Record, write

STEPS, BATCH, LENGTH, LAST, SAVE = 320, 1, 256, 50, 20
DOCUMENTS = 120  # of the training text: more tokens than the runs read
METHODS: dict[str, Product] = {
    "float32": PLAIN, "tile": Fp8(), "tensor": Fp8("tensor"), "E5M2 gradients": Fp8(gradients="e5m2"),
}  # fmt: skip
# In the order of what they are worth if there is no time for all.
RUNS = (
    *(("float32", 0), ("tile", 0), ("float32", 1), ("tensor", 0), ("E5M2 gradients", 0), ("float32", 2)),
    *(("tile", 1), ("tile", 2)),
)


def losses(
    config: ModelConfig, text: NDArray[Any], method: str, seed: int, work: Path, *, steps: int = STEPS,
    batch: int = BATCH, length: int = LENGTH,
) -> list[float]:  # fmt: skip
    """The loss of every step of a run, nats per token; goes on from the checkpoint in ``work``, if there is one."""
    plan = Plan(
        (Phase(steps, batch, length),), peak_rate=2e-3, warmup=min(30, steps // 4), seed=seed, workers=1,
        evaluate_every=1, save_every=SAVE,
    )  # fmt: skip
    state = train(config, [text], plan, work / f"{method.replace(' ', '-')}-{seed}", product=METHODS[method])
    return [record["loss"] for record in state.curve]


def gradient_errors(params: Tensors, config: ModelConfig, tokens: NDArray[Any]) -> dict[str, float]:
    """‖g₈ − g‖ / ‖g‖ of each 8-bit method over the gradients of all projections; tokens[B, S+1]."""
    _, exact = loss_and_gradients(params, config, tokens)
    names = [name for name in exact if name.endswith("_proj.weight")]
    size = math.sqrt(sum(float(np.sum(np.square(exact[name], dtype=np.float64))) for name in names))
    found = {}
    for method, product in METHODS.items():
        if product is not PLAIN:
            _, rounded = loss_and_gradients(params, config, tokens, product=product)
            off = sum(float(np.sum(np.square(rounded[n] - exact[n], dtype=np.float64))) for n in names)
            found[method] = math.sqrt(off) / size
    return found


def values(runs: dict[str, dict[str, list[float]]], errors: dict[str, float], last: int = LAST) -> dict[str, Any]:
    """What the figure draws: {method: {seed: losses}}, the means of the last steps, and how far they are apart.

    "against float32" is the relative difference to float32 of the same seed; "spread of seeds" the largest relative
    difference between two seeds of float32.
    """
    means = {m: {s: sum(curve[-last:]) / last for s, curve in by.items()} for m, by in runs.items()}
    plain = means["float32"]
    against = {
        m: {s: mean / plain[s] - 1 for s, mean in by.items() if s in plain}
        for m, by in means.items() if m != "float32"
    }  # fmt: skip
    rounded = {m: {s: [round(x, 5) for x in curve] for s, curve in by.items()} for m, by in runs.items()}
    return {
        "losses": rounded, "last": last, "means": means, "against float32": against,
        "spread of seeds": max(plain.values()) / min(plain.values()) - 1, "gradient error": errors,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or go on training, and write the record that the figure is drawn from."""
    parser = argparse.ArgumentParser(prog="python -m refllm.study.fp8_training", description=main.__doc__)
    parser.add_argument("--model", default="stdlib", help="whose architecture, tokenizer and weights are used")
    parser.add_argument("--output", type=Path, default=Path("figures/data/fp8_training.json"))
    parser.add_argument("--work", type=Path, default=Path("build/fp8_training"), help="where checkpoints are kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--runs", type=int, default=len(RUNS), help="how many of the runs, in their order")
    chosen = parser.parse_args(arguments)
    from threadpoolctl import threadpool_limits

    directory = locate(chosen.model)
    runs: dict[str, dict[str, list[float]]] = {}
    config, tokenizer = read_config(directory), Tokenizer.from_file(directory / "tokenizer.json")
    text = encode(tokenizer, training_documents()[:DOCUMENTS], config.bos_token_id or 0)
    print(f"{len(text):,} tokens; a run reads {chosen.steps * BATCH * LENGTH:,}", file=sys.stderr)
    with threadpool_limits(limits=1, user_api="blas"):
        for method, seed in RUNS[: chosen.runs]:
            curve = losses(config, text, method, seed, chosen.work, steps=chosen.steps)
            runs.setdefault(method, {})[str(seed)] = curve
            print(f"{method}, seed {seed}: {sum(curve[-LAST:]) / LAST:.4f}", file=sys.stderr, flush=True)
        params = {name: np.asarray(t) for name, t in iter_tensors(directory, dtype="float32")}
        window = text[-4 * LENGTH - 4 :].reshape(4, LENGTH + 1)
        errors = gradient_errors(params, config, window)
    hardware = f"{processor()}, one thread, NumPy {np.__version__}, Python {platform.python_version()}"
    made = values(runs, errors) | {"steps": chosen.steps, "batch": BATCH, "length": LENGTH, "model": chosen.model}
    write(chosen.output, Record("python -m refllm.study.fp8_training", "A, B", hardware, made))


if __name__ == "__main__":
    main()
