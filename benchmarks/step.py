"""Where the time of a decode step goes, by batch size: products, attention, elementwise
layers, choosing, the rest.

    python benchmarks/step.py --output benchmarks/results/step.json

The real loop runs (``decode.generate``: 32 prompt tokens, then 48 steps, greedy) with a
clock around the functions it calls; the prefill is left out. Each part is the lower
quartile over all steps, which interruptions by other programs do not reach; ``whole`` is
the same of an uninstrumented run, and ``rest`` is what of it no part explains: residual
sums, reshapes, Python itself.

``floor`` is the whole step of a network with as many layers and heads but every width cut
to 64: the same array calls with almost nothing to compute. It is what NumPy's and Python's
own work costs, spread over all the parts.

One thread, one process, float32. Left out: other programs (``decode.py``), GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from common import environment, finish, network, table
from threadpoolctl import threadpool_limits

from refllm.api import load
from refllm.decode import generate
from refllm.decode.fast import captured_step
from refllm.kv.contiguous import ContiguousCache
from refllm.model import llama
from refllm.model.config import ModelConfig
from refllm.model.weights import Dense
from refllm.train.loop import initialize

PARTS = ("products", "attention", "elementwise", "choosing", "rest")
ELEMENTWISE = ("norm", "rotate", "activate")


class Clock:
    """Seconds a part, summed over the calls since ``lap``. The parts do not call each
    other.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def lap(self) -> dict[str, float]:
        done = self.seconds
        self.seconds = defaultdict(float)
        return done

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            out = function(*arguments)
            self.seconds[part] += time.perf_counter() - began
            return out

        return timed

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Put the clock around the parts of a decode step for as long as the block runs."""
        view = ContiguousCache.view
        bind = Dense.bind
        patches = [
            mock.patch.object(
                captured_step, name, self.around("elementwise", getattr(captured_step, name))
            )
            for name in ELEMENTWISE
        ]
        patches += [
            mock.patch.object(Dense, "bind", lambda *a: self.around("products", bind(*a))),
            mock.patch.object(
                ContiguousCache, "view", lambda *a: self.around("attention", view(*a))
            ),
            mock.patch.object(
                generate, "choose_tokens", self.around("choosing", generate.choose_tokens)
            ),
        ]
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield


def steps(
    weights: Any, config: ModelConfig, prompts: list[list[int]], new: int, clock: Clock
) -> list[dict[str, float]]:
    """Seconds of each decode step, and of each part that ``clock`` watched."""
    out = []
    tokens = generate.generate_tokens(
        weights, config, prompts, new, generate.SamplingParams(), np.random.default_rng(0)
    )
    next(tokens)  # the prefill
    clock.lap()
    began = time.perf_counter()
    for _ in tokens:
        now = time.perf_counter()
        out.append({"whole": now - began, **clock.lap()})
        began = time.perf_counter()
    return out


def narrow(config: ModelConfig) -> tuple[Any, ModelConfig]:
    """The network of the floor: 64 wide, which still takes the layout in blocks (see
    ``Dense``).
    """
    small = dataclasses.replace(
        config, hidden_size=64, intermediate_size=64, vocab_size=64, head_dim=32
    )
    return llama.build(small, initialize(small, np.random.default_rng(0))), small


def measure(model: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a batch size; the three variants take turns within a round."""
    small, small_config = narrow(model.config)
    rng = np.random.default_rng(0)
    clock = Clock()
    laps: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    for number in range(options.rounds + 1):
        for batch in options.batch:
            prompts = rng.integers(0, small_config.vocab_size, (batch, options.prompt)).tolist()
            whole = steps(model.weights, model.config, prompts, options.new, clock)
            with clock.watching():
                parts = steps(model.weights, model.config, prompts, options.new, clock)
            floor = steps(small, small_config, prompts, options.new, clock)
            if number:  # the first is the warm-up
                for name, lap in (("whole", whole), ("parts", parts), ("floor", floor)):
                    laps[batch, name] += lap
    return [
        row(batch, *(laps[batch, name] for name in ("whole", "parts", "floor")))
        for batch in options.batch
    ]


def row(batch: int, whole: Any, parts: Any, floor: Any) -> dict[str, Any]:
    """Lower quartiles in microseconds."""

    def quartile(laps: list[dict[str, float]], name: str) -> float:
        return round(1e6 * float(np.percentile([lap[name] for lap in laps], 25)), 1)

    micro = {name: quartile(parts, name) for name in PARTS if name != "rest"}
    total = quartile(whole, "whole")
    micro["rest"] = round(max(0.0, total - sum(micro.values())), 1)
    return {
        "batch": batch,
        "whole_us": total,
        "parts_us": micro,
        "floor_us": quartile(floor, "whole"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with threadpool_limits(1), network(options.model) as (path, about):
        model = load(path, backend="numpy")
        record = {
            "benchmark": "step",
            "environment": environment((), {"refllm": 1}),
            "model": {"name": about, "parameters": model.config.num_parameters},
            "settings": {
                name: getattr(options, name) for name in ("prompt", "new", "batch", "rounds")
            },
            "results": measure(model, options),
        }
    print(
        f"\nA decode step of {about}, {options.prompt} to {options.prompt + options.new} "
        "tokens of context (measured here)"
    )
    rows = []
    for r in record["results"]:
        shares = (f"{us:.0f} ({us / r['whole_us']:.0%})" for us in r["parts_us"].values())
        rows.append(
            [
                r["batch"],
                f"{r['whole_us']:.0f}",
                *shares,
                f"{r['floor_us']:.0f} ({r['floor_us'] / r['whole_us']:.0%})",
            ]
        )
    table(
        "microseconds a step, lower quartile, and share",
        ["batch", "whole", *PARTS, "floor, in all parts"],
        rows,
    )
    finish(record, options.output)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Where the time of a decode step goes.")
    parser.add_argument("--model", help="a checkpoint directory (default: the bundled model)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="B")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens a sequence")
    parser.add_argument("--new", type=int, default=48, help="new tokens a sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
