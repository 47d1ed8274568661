"""Training in 8 bits against training in float32: how far the loss moves, compared with how
far chance moves it.

    python -m refllm.experiments.fp8_training  # writes figures/data/fp8_training.json
    refllm figures                             # draws it

The bundled architecture learns the standard library, once for each row of ``RUNS``. What
counts is the mean loss of the last ``LAST`` steps, against that of float32 with the same
first weights and, as in every run, the same windows in the same order: so only the
arithmetic differs, and seeds differ in the first weights, not in the text. Runs are kept in
``--work`` with a checkpoint every ``SAVE`` steps: a command that was interrupted continues
there.

| run            | products of the projections                                    |
|----------------|----------------------------------------------------------------|
| float32        | in float32                                                     |
| nudged         | in float32, from weights that differ by 10⁻⁶ of themselves     |
| tile           | all three in E4M3, scales per 1 × 128 tile and 128 × 128 block |
| tensor         | all three in E4M3, one scale per tensor                        |
| E5M2 gradients | as "tile", but dY in E5M2                                      |

Two starts: random weights, where the loss falls fast, and the bundled ones, where most of a
difference is the rounding of the forward pass. Batches of 512 tokens and a slow warm-up keep
float32 itself from being chaotic, which "nudged" tests. Eight bits are a far larger
perturbation: from random weights, runs of one method and several seeds end as far apart as
seeds of float32 do, some tenths of a per cent. So there, at this size and length, no method
can be told from chance, and a bound of 0.25 % cannot be tested. From the bundled weights it
can: all methods stay within it; tiles are the nearest to float32, one scale per tensor next,
E5M2 gradients last, but by very little.

Two measures need no training: ‖g₈ − g‖ / ‖g‖ of one gradient over all projections, and the
loss of one forward pass over held-out text while two channels are made 2ᵉ times as large
without changing the network (``outlier_injection``). The first hardly separates "tile" from
"tensor": a trained small network has no outliers, and a float tolerates a bad scale. The
second shows how wide E4M3's range is, and where one scale per tensor leaves it.

Source: DeepSeek-V3 (2024), §3.3 (relative error of the loss below 0.25 % of BF16's) and
appendix B.

The figure stands in ``fp8_training_figure``. Left out: networks large enough to develop
outliers in training.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from refllm.array_types import Array, Json
from refllm.backend import to_numpy
from refllm.checkpoints.loading import build_weights, iter_tensors, read_config
from refllm.checkpoints.sources import locate
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.corpus import held_out_documents, training_documents
from refllm.experiments.outlier_injection import INPUTS, inject_outliers
from refllm.measure.device import one_thread
from refllm.measure.records import Record, write
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS, projection_name
from refllm.train.backward import PLAIN, Product, Tensors, loss_and_gradients
from refllm.train.data import encode
from refllm.train.fp8 import Fp8
from refllm.train.loop import initialize, train
from refllm.train.schedule import Phase, Plan

STEPS = 320
BATCH = 4
LENGTH = 128
WARMUP = 60
LAST = 50
SAVE = 40
RATES = {"random weights": 1e-3, "bundled weights": 3e-4}  # at the peak
DOCUMENTS = 120  # of the training text: more tokens than the runs read
NUDGE = 1e-6  # about ten float32 roundings
METHODS: dict[str, Product] = {
    "float32": PLAIN,
    "nudged": PLAIN,
    "tile": Fp8(),
    "tensor": Fp8("tensor"),
    "E5M2 gradients": Fp8(gradients="e5m2"),
}
# (start, method, seed), the most informative first: ``--runs`` stops after some
RUNS = (
    *(("random weights", method, 0) for method in METHODS),
    *(("random weights", method, 1) for method in ("float32", "tile")),
    *(("bundled weights", method, 0) for method in METHODS),
    *(
        ("random weights", method, seed)
        for method, seed in (("tensor", 1), ("float32", 2), ("tile", 2))
    ),
)
CHANNELS = (3, 77)  # that become outliers; both lie in the first tile
POWERS = (0, 4, 8, 10, 12, 14, 16)
WINDOWS = 16


def first_weights(
    config: ModelConfig, bundled: Tensors, start: str, method: str, seed: int
) -> Tensors:
    """The weights that a run starts with: copies, since training writes into them."""
    random = start == "random weights"
    if random:
        params = initialize(config, np.random.default_rng([seed, 0]))
    else:
        params = bundled
    rng = np.random.default_rng([seed, 1])
    size = NUDGE if method == "nudged" else 0.0
    return {
        n: (t * (1 + size * rng.standard_normal(t.shape))).astype(np.float32)
        for n, t in params.items()
    }


def losses(
    config: ModelConfig,
    text: NDArray[np.integer],
    first: Tensors,
    method: str,
    rate: float,
    work: Path,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    length: int = LENGTH,
) -> list[float]:
    """The loss of every step of a run, nats per token; continues from the checkpoint in
    ``work``, if there is one.
    """
    plan = Plan(
        (Phase(steps, batch, length),),
        peak_rate=rate,
        warmup=min(WARMUP, steps // 4),
        workers=1,
        evaluate_every=1,
        save_every=SAVE,
    )
    state = train(config, [text], plan, work, start=first, product=METHODS[method])
    return [record["loss"] for record in state.curve]


def gradient_errors(
    params: Tensors, config: ModelConfig, tokens: NDArray[np.integer]
) -> dict[str, float]:
    """‖g₈ − g‖ / ‖g‖ of each 8-bit method over the gradients of all projections; tokens[B, S+1]."""
    _, exact = loss_and_gradients(params, config, tokens)
    names = [name for name in exact if name.endswith("_proj.weight")]
    size = math.sqrt(sum(_squared(exact[name]) for name in names))
    found = {}
    for method, product in METHODS.items():
        if product is not PLAIN:
            _, rounded = loss_and_gradients(params, config, tokens, product=product)
            off = sum(_squared(rounded[name] - exact[name]) for name in names)
            found[method] = math.sqrt(off) / size
    return found


def _squared(x: Array) -> float:
    """Sum of squares, in float64."""
    return float(np.sum(np.square(to_numpy(x), dtype=np.float64)))


def with_outliers(
    params: Tensors, config: ModelConfig, factor: float, channels: Sequence[int] = CHANNELS
) -> Tensors:
    """The same network with ``channels`` of all inputs of a norm and of down_proj
    ``factor`` times as large.
    """
    layers = inject_outliers(build_weights(config, params), channels, factor, tuple(INPUTS))[
        "layers"
    ]
    made = dict(params)
    for i, layer in enumerate(layers):
        at = f"model.layers.{i}."
        made |= {
            f"{projection_name(i, key)}.weight": layer[key].dequantize() for key in PROJECTIONS
        }
        made |= {
            f"{at}{key}.weight": layer[key]
            for key in ("input_layernorm", "post_attention_layernorm")
        }
    return made


def outlier_losses(
    params: Tensors,
    config: ModelConfig,
    tokens: NDArray[np.integer],
    powers: Sequence[int] = POWERS,
) -> dict[str, list[float]]:
    """By how much the loss of tokens[B, S+1] exceeds float32's (0.01 = 1 %), with outlier
    channels 2ᵉ times as large.
    """
    exact, _ = loss_and_gradients(params, config, tokens)
    found: dict[str, list[float]] = {"tile": [], "tensor": []}
    for power in powers:
        network = with_outliers(params, config, 2.0**power)
        for method, row in found.items():
            row.append(
                loss_and_gradients(network, config, tokens, product=METHODS[method])[0] / exact - 1
            )
    return found


def values(runs: dict[str, dict[str, dict[str, list[float]]]], last: int = LAST) -> Json:
    """{start: {method: {seed: losses}}} → the means of the last steps, and how far they are apart.

    "against float32" is the relative difference to float32 with the same first weights;
    "spread of seeds" the largest relative difference between two seeds of float32.
    """
    means = {
        start: {
            method: {seed: sum(curve[-last:]) / last for seed, curve in seeds.items()}
            for method, seeds in methods.items()
        }
        for start, methods in runs.items()
    }
    against = {}
    spread = {}
    for start, methods in means.items():
        exact = methods["float32"]
        against[start] = {
            method: {seed: loss / exact[seed] - 1 for seed, loss in seeds.items()}
            for method, seeds in methods.items()
            if method != "float32"
        }
        spread[start] = max(exact.values()) / min(exact.values()) - 1
    return {"last": last, "means": means, "against float32": against, "spread of seeds": spread}


def train_all(
    config: ModelConfig,
    bundled: Tensors,
    text: NDArray[np.integer],
    work: Path,
    steps: int,
    count: int,
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """{start: {method: {seed: losses}}} of the first ``count`` of ``RUNS``."""
    digest = hashlib.sha256(b"".join(to_numpy(t).tobytes() for t in bundled.values())).hexdigest()[
        :8
    ]
    runs: dict[str, dict[str, dict[str, list[float]]]] = {}
    for start, method, seed in RUNS[:count]:
        first = first_weights(config, bundled, start, method, seed)
        # runs from other bundled weights have another folder
        name = start if start == "random weights" else f"{start} {digest}"
        folder = work / f"{name} {method} {seed}".replace(" ", "-")
        curve = losses(config, text, first, method, RATES[start], folder, steps=steps)
        runs.setdefault(start, {}).setdefault(method, {})[str(seed)] = curve
        mean = sum(curve[-LAST:]) / LAST
        print(f"{start}, {method}, {seed}: {mean:.4f}", file=sys.stderr, flush=True)
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or continue training, and write the record that the figure is drawn from."""
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.fp8_training", description=main.__doc__
    )
    add = parser.add_argument
    add("--model", default="stdlib", help="whose architecture, tokenizer and weights are used")
    add("--output", type=Path, default=Path("figures/data/fp8_training.json"))
    add("--work", type=Path, default=Path("build/fp8_training"), help="where checkpoints are kept")
    add("--steps", type=int, default=STEPS)
    add("--runs", type=int, default=len(RUNS), help="how many of the runs, in their order")
    chosen = parser.parse_args(arguments)
    directory = locate(chosen.model)
    config = read_config(directory)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    begin = config.bos_token_id or 0
    bundled: Tensors = {name: np.asarray(t) for name, t in iter_tensors(directory, dtype="float32")}
    text = encode(tokenizer, training_documents()[:DOCUMENTS], begin)
    print(f"{len(text):,} tokens; a run reads {chosen.steps * BATCH * LENGTH:,}", file=sys.stderr)
    with threadpool_limits(limits=1, user_api="blas"):
        runs = train_all(config, bundled, text, chosen.work, chosen.steps, chosen.runs)
        held = encode(tokenizer, held_out_documents(), begin)
        window = held[: WINDOWS * (LENGTH + 1)].reshape(WINDOWS, LENGTH + 1)
        measured = {
            "gradient error": gradient_errors(bundled, config, window),
            "powers": list(POWERS),
            "planted": outlier_losses(bundled, config, window),
        }
    settings = {"steps": chosen.steps, "batch": BATCH, "length": LENGTH, "model": chosen.model}
    command = "python -m refllm.experiments.fp8_training"
    if chosen.runs < len(RUNS):
        command += f" --runs {chosen.runs}"
    made = values(runs) | measured | settings
    write(chosen.output, Record(command, "A, B", one_thread(), made))


if __name__ == "__main__":
    main()
