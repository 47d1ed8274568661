"""Training in 8 bits against training in float32: how far the loss moves, beside how far
chance moves it.

    python -m refllm.experiments.fp8_training       # writes figures/data/fp8_training.json;
    `refllm figures` draws it

The whole bundled architecture learns the standard library, once for each row of ``RUNS``.
Its number is the mean loss of the last ``LAST`` steps, beside that of float32 with the same
first weights and, as in every run, the same windows in the same order: so what differs is
the arithmetic, and what seeds differ in is the first weights, not the text. Runs are kept
in ``--work`` with a checkpoint every ``SAVE`` steps: the command goes on where it was
stopped.

| run            | products of the projections                                     |
|----------------|-----------------------------------------------------------------|
| float32        | as they are                                                     |
| nudged         | as they are, from weights that differ by 10⁻⁶ of themselves     |
| tile           | all three in E4M3, scales by 1 × 128 tiles and 128 × 128 blocks |
| tensor         | all three in E4M3, one scale a tensor                           |
| E5M2 gradients | as "tile", but dY in E5M2                                       |

Two starts: random weights, where the loss falls fast, and the bundled ones, where most of a
difference is the rounding of the forward. Batches of 512 tokens and a slow warm-up keep
float32 itself from being chaotic, which "nudged" tests. Eight bits are a far larger nudge:
from random weights, runs of one method and several seeds end as far apart as seeds of
float32 do, some tenths of a percent. So there, at this size and length, the losing controls
do not lose: no method can be told from chance, and a bound of 0.25 % cannot be tested. From
the bundled weights it can: all methods stay within it, and tiles are the nearest to
float32, one scale a tensor next, E5M2 gradients last, but by very little.

Two measures need no training: ‖g₈ − g‖ / ‖g‖ of one gradient over all projections, and the
loss of one reading of held-out text while two channels are made 2ᵉ times as large without
changing the network (``planting``). The first hardly tells "tile" from "tensor": a trained
small network has no outliers, and a float forgives a bad scale. The second shows how wide
E4M3's range is, and where one scale a tensor leaves it.

Source: DeepSeek-V3 (2024), §3.3 (relative error of the loss below 0.25 % of BF16's) and
appendix B.

Left out: networks large enough to grow outliers by themselves.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refllm.checkpoints.loading import build_weights, iter_tensors, locate, read_config
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.corpus import held_out_documents, training_documents
from refllm.experiments.outlier_injection import INPUTS, inject_outliers
from refllm.measure.device import processor
from refllm.measure.records import Record, write
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS
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
    "float32": PLAIN, "nudged": PLAIN, "tile": Fp8(), "tensor": Fp8("tensor"), "E5M2 gradients": Fp8(gradients="e5m2"),
}  # fmt: skip
# In the order of what they are worth if there is no time for all.
RUNS = (
    *(("random weights", method, 0) for method in METHODS),
    *(("random weights", method, 1) for method in ("float32", "tile")),
    *(("bundled weights", method, 0) for method in METHODS),
    *(
        ("random weights", method, seed)
        for method, seed in (("tensor", 1), ("float32", 2), ("tile", 2))
    ),
)
CHANNELS = (3, 77)  # planted channels, of the first tile
POWERS = (0, 4, 8, 10, 12, 14, 16)
WINDOWS = 16


def first_weights(
    config: ModelConfig, bundled: Tensors, start: str, method: str, seed: int
) -> Tensors:
    """What a run begins with: copies, since training writes into them."""
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
    text: NDArray[Any],
    first: Tensors,
    method: str,
    rate: float,
    work: Path,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    length: int = LENGTH,
) -> list[float]:
    """The loss of every step of a run, nats per token; goes on from the checkpoint in
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


def gradient_errors(params: Tensors, config: ModelConfig, tokens: NDArray[Any]) -> dict[str, float]:
    """‖g₈ − g‖ / ‖g‖ of each 8-bit method over the gradients of all projections; tokens[B,
    S+1].
    """
    _, exact = loss_and_gradients(params, config, tokens)
    names = [name for name in exact if name.endswith("_proj.weight")]
    size = math.sqrt(sum(float(np.sum(np.square(exact[name], dtype=np.float64))) for name in names))
    found = {}
    for method, product in METHODS.items():
        if product is not PLAIN:
            _, rounded = loss_and_gradients(params, config, tokens, product=product)
            off = sum(
                float(np.sum(np.square(rounded[n] - exact[n], dtype=np.float64))) for n in names
            )
            found[method] = math.sqrt(off) / size
    return found


def planted(
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
        made |= {f"{at}{name}.weight": layer[key].dequantize() for key, name in PROJECTIONS.items()}
        made |= {
            f"{at}{key}.weight": layer[key]
            for key in ("input_layernorm", "post_attention_layernorm")
        }
    return made


def outliers(
    params: Tensors, config: ModelConfig, tokens: NDArray[Any], powers: Sequence[int] = POWERS
) -> dict[str, list[float]]:
    """How far above float32's the loss of tokens[B, S+1] lies (0.01 = 1 %), channels
    planted 2ᵉ times as large.
    """
    exact, _ = loss_and_gradients(params, config, tokens)
    found: dict[str, list[float]] = {"tile": [], "tensor": []}
    for power in powers:
        network = planted(params, config, 2.0**power)
        for method, row in found.items():
            row.append(
                loss_and_gradients(network, config, tokens, product=METHODS[method])[0] / exact - 1
            )
    return found


def values(runs: dict[str, dict[str, dict[str, list[float]]]], last: int = LAST) -> dict[str, Any]:
    """{start: {method: {seed: losses}}} → the means of the last steps, and how far they are
    apart.

    "against float32" is the relative difference to float32 with the same first weights;
    "spread of seeds" the largest relative difference between two seeds of float32.
    """
    means = {
        s: {m: {k: sum(c[-last:]) / last for k, c in by.items()} for m, by in of.items()}
        for s, of in runs.items()
    }
    against = {
        start: {
            m: {k: x / of["float32"][k] - 1 for k, x in by.items()}
            for m, by in of.items()
            if m != "float32"
        }
        for start, of in means.items()
    }
    spread = {
        start: max(of["float32"].values()) / min(of["float32"].values()) - 1
        for start, of in means.items()
    }
    return {"last": last, "means": means, "against float32": against, "spread of seeds": spread}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or go on training, and write the record that the figure is drawn from."""
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.fp8_training", description=main.__doc__
    )
    parser.add_argument(
        "--model", default="stdlib", help="whose architecture, tokenizer and weights are used"
    )
    parser.add_argument("--output", type=Path, default=Path("figures/data/fp8_training.json"))
    parser.add_argument(
        "--work", type=Path, default=Path("build/fp8_training"), help="where checkpoints are kept"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--runs", type=int, default=len(RUNS), help="how many of the runs, in their order"
    )
    chosen = parser.parse_args(arguments)
    from threadpoolctl import threadpool_limits

    directory = locate(chosen.model)
    config = read_config(directory)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    bundled = {name: np.asarray(t) for name, t in iter_tensors(directory, dtype="float32")}
    text = encode(tokenizer, training_documents()[:DOCUMENTS], config.bos_token_id or 0)
    print(f"{len(text):,} tokens; a run reads {chosen.steps * BATCH * LENGTH:,}", file=sys.stderr)
    digest = hashlib.sha256(b"".join(t.tobytes() for t in bundled.values())).hexdigest()[:8]
    runs: dict[str, dict[str, dict[str, list[float]]]] = {}
    with threadpool_limits(limits=1, user_api="blas"):
        for start, method, seed in RUNS[: chosen.runs]:
            first = first_weights(config, bundled, start, method, seed)
            # other weights are another run
            of = start if start == "random weights" else f"{start} {digest}"
            work = chosen.work / f"{of} {method} {seed}".replace(" ", "-")
            curve = losses(config, text, first, method, RATES[start], work, steps=chosen.steps)
            runs.setdefault(start, {}).setdefault(method, {})[str(seed)] = curve
            print(
                f"{start}, {method}, {seed}: {sum(curve[-LAST:]) / LAST:.4f}",
                file=sys.stderr,
                flush=True,
            )
        held = encode(tokenizer, held_out_documents(), config.bos_token_id or 0)
        window = held[: WINDOWS * (LENGTH + 1)].reshape(WINDOWS, LENGTH + 1)
        measured = {
            "gradient error": gradient_errors(bundled, config, window),
            "powers": list(POWERS),
            "planted": outliers(bundled, config, window),
        }
    hardware = (
        f"{processor()}, one thread, NumPy {np.__version__}, Python {platform.python_version()}"
    )
    made = (
        values(runs)
        | measured
        | {"steps": chosen.steps, "batch": BATCH, "length": LENGTH, "model": chosen.model}
    )
    some = f" --runs {chosen.runs}" if chosen.runs < len(RUNS) else ""
    write(
        chosen.output,
        Record(f"python -m refllm.experiments.fp8_training{some}", "A, B", hardware, made),
    )


if __name__ == "__main__":
    main()
