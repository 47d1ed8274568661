"""What dropping tokens costs: the policies of ``kv.sparse`` beside two controls that hold
as many.

    python -m refllm.experiments.kv_sparsity        # writes figures/data/kv_sparsity.json;
    `refllm figures` draws it

Held-out texts of ``PROMPT`` + ``NEW`` tokens: the prompt is read in full, then the policy
drops, and the rest is read token by token, each given the true ones before. What is
measured is KL to the same network with all tokens in its cache, over those ``NEW`` tokens,
in pairs with a control that keeps the newest tokens only.

| task          | text                                                     | what it asks for             |
|---------------|----------------------------------------------------------|------------------------------|
| "as it comes" | held-out code                                            | mostly the neighbourhood     |
| "a far copy"  | ``COPY`` tokens of code, other code, the same ones again | what stood there long before |

A small network looks at its neighbourhood, so the newest tokens are a strong control, and
on code as it comes the techniques lose to it. They were made for something far back that is
asked for at the end: the second task, of which ``without`` says how much worse the network
is when the first copy is not in the text at all.

SnapKV and PyramidKV drop once, after the prompt, and keep what comes then: they hold more
tokens than their budget. Their control does the same. All are drawn by the tokens that a
key head held at a step, in the mean. ``mass`` is the share of a text's last query's
attention, with all tokens there, that falls on what a policy kept at the end, drawn by what
it held then. What is kept at random is the mean of ``DRAWS`` draws; intervals are those of
the texts.

PyramidKV has SnapKV's window here, so that the budgets alone differ, and β = 4: with the
paper's 20 its top layer would hold fewer tokens than vote.

Left out: needles in haystacks (the network answers no questions), speed (a fused kernel has
no weights to sum).
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import refllm
from refllm.api import Model, load
from refllm.backend import asarray_like, to_numpy
from refllm.corpus import held_out_documents
from refllm.decode.sampling import log_probabilities
from refllm.kv.sparse import (
    SparsePolicy,
    at_random,
    h2o,
    pyramidkv,
    recent_only,
    snapkv,
    streaming,
    tova,
)
from refllm.kv.sparse_cache import SparseCache
from refllm.measure.bootstrap import Interval, blocks, bootstrap_intervals
from refllm.measure.device import processor
from refllm.measure.records import Record, write
from refllm.model.llama import forward, logits
from refllm.quant.calibration_data import calibration_windows

PROMPT = 768
NEW = 128
TEXTS = 24
COPY = 192
DRAWS = 3
BUDGETS = (64, 128, 256, 512)
TASKS = ("as it comes", "a far copy")
CONTROL = "newest only"
POLICIES: dict[str, Callable[[int], SparsePolicy]] = {
    CONTROL: recent_only, "at random": at_random, "StreamingLLM": streaming, "H2O": h2o, "TOVA": tova,
    "SnapKV": snapkv, "PyramidKV": lambda budget: pyramidkv(budget, window=32, beta=4.0),
}  # fmt: skip
BLOCK = 64  # tokens a block of the bootstrap


@dataclass(frozen=True)
class Run:
    """One policy over all texts: KL of each token [texts, new], tokens held a key head,
    share of attention.
    """

    kl: np.ndarray
    held: float  # mean of the steps
    last: float  # at the end
    mass: float


class Experiment:
    """Texts of a task, read once with everything in the cache, and then as each policy
    keeps it.

    In "a far copy" the last ``new`` tokens end the second copy of ``copy`` > ``new`` ones,
    begun within the prompt.
    """

    def __init__(
        self,
        model: Model,
        task: str = TASKS[0],
        texts: int = TEXTS,
        prompt: int = PROMPT,
        new: int = NEW,
        copy: int = COPY,
    ):
        if task not in TASKS:
            raise ValueError(f"no task is called {task!r}; they are {', '.join(TASKS)}")
        if not new < copy <= (prompt + new) // 2:
            raise ValueError(
                f"two copies of {copy} tokens, the last {new} of them new, need {copy} within "
                f"{new + 1}.."
                f"{(prompt + new) // 2}"
            )
        self.model = model
        self.prompt = prompt
        self.new = new
        if model.config.bos_token_id is None:
            begin = []
        else:
            begin = [model.config.bos_token_id]
        length = prompt + new - len(begin)
        drawn = [
            [int(t) for t in text]
            for text in calibration_windows(
                model.tokenizer, 2 * texts, length, 0, documents=held_out_documents()
            )
        ]
        if task == TASKS[1]:
            drawn = [
                [*a[:copy], *b[: length - 2 * copy], *a[:copy]]
                for a, b in zip(drawn, drawn[texts:], strict=False)
            ]
        self.texts = [begin + text for text in drawn[:texts]]
        self.after = len(begin) + copy  # where what follows the first copy begins

    @cached_property
    def exact(self) -> np.ndarray:
        """log p of the network with all tokens, [texts, new, V]."""
        rows = slice(self.prompt - 1, self.prompt + self.new - 1)
        return np.stack(
            [to_numpy(log_probabilities(self.model.logits(text)[rows])) for text in self.texts]
        )

    @cached_property
    def loss(self) -> tuple[float, float]:
        """Nats a new token, of the whole text and without its first ``copy`` tokens."""
        return self._loss(self.exact), self._loss(
            np.stack(
                [
                    to_numpy(
                        log_probabilities(self.model.logits(text[self.after :])[-self.new - 1 : -1])
                    )
                    for text in self.texts
                ]
            )
        )

    def _loss(self, log_p: np.ndarray) -> float:
        targets = np.array([text[self.prompt :] for text in self.texts])
        return -float(np.take_along_axis(log_p, targets[:, :, None], axis=-1).mean())

    def run(self, policy: SparsePolicy, seed: int = 0) -> Run:
        """The prompt at once, text by text; then all texts together, a token of each a
        step.
        """
        model = self.model
        count = len(self.texts)
        like = model.weights["norm"]
        cache = SparseCache(
            model.config, count, like=like, policy=policy, rng=np.random.default_rng(seed)
        )
        first = [
            self._step(cache, [self.prompt * (b == at) for b in range(count)], text[: self.prompt])[
                -1:
            ]
            for at, text in enumerate(self.texts)
        ]
        cache.finish_prompt()
        kl = [self._kl(np.concatenate(first), 0)]
        held = []
        for i in range(self.new - 1):
            held.append(sum(k.positions.size for layer in cache.layers for k in layer))
            z = self._step(cache, [1] * count, [text[self.prompt + i] for text in self.texts])
            kl.append(self._kl(z, i + 1))
        heads = count * len(cache.layers) * model.config.num_key_value_heads
        last = sum(k.positions.size for layer in cache.layers for k in layer)
        return Run(
            np.stack(kl, axis=1), float(np.mean(held)) / heads, last / heads, self._mass(cache)
        )

    def drawn(self, policy: SparsePolicy) -> Run:
        """``run``, or the mean of some if the policy drops at random."""
        if policy.score != "random":
            return self.run(policy)
        runs = [self.run(policy, seed) for seed in range(DRAWS)]
        kl = np.mean([r.kl for r in runs], axis=0)
        mass = float(np.mean([r.mass for r in runs]))
        return replace(runs[0], kl=kl, mass=mass)

    def _step(self, cache: SparseCache, counts: list[int], tokens: Sequence[int]) -> np.ndarray:
        weights = self.model.weights
        config = self.model.config
        placed = asarray_like([list(tokens), cache.positions(counts)], weights["norm"], "int64")
        hidden = forward(weights, config, placed[0], placed[1], cache.view(counts))
        cache.advance(counts)
        return to_numpy(
            log_probabilities(
                logits(weights, hidden if sum(counts) == len(counts) else hidden[-1:])
            )
        )

    def _kl(self, log_q: np.ndarray, i: int) -> np.ndarray:
        log_p = self.exact[:, i]
        kl: np.ndarray = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
        return kl

    @cached_property
    def read(self) -> list[list[np.ndarray]]:
        """What each text's last query reads of all its tokens, [texts][layers] of [G, S]."""
        found = []
        for text in self.texts:
            everything = SparseCache(
                self.model.config, 1, like=self.model.weights["norm"], policy=tova(len(text))
            )
            self._step(everything, [len(text) - 1], text[:-1])
            found.append([to_numpy(layer[0].scores) for layer in everything.layers])
        return found

    def _mass(self, cache: SparseCache) -> float:
        """The share of what each text's last query reads that falls on what is kept, the
        mean of texts and layers.
        """
        shares = [
            np.take_along_axis(read, to_numpy(layer[b].positions), axis=1).sum(axis=1).mean()
            for b, layers in enumerate(self.read)
            for read, layer in zip(layers, cache.layers, strict=True)
        ]
        return float(np.mean(shares))


def rows(
    experiment: Experiment, task: str, budgets: Sequence[int] = BUDGETS
) -> list[dict[str, Any]]:
    """The table of a task: every policy at every budget that holds what it must."""
    found = []
    for budget in budgets:
        controls: dict[bool, Run] = {}  # by whether tokens are dropped at every step
        for name, make in POLICIES.items():
            try:
                policy = make(budget)
            except ValueError:  # its window is larger than the budget
                continue
            run = experiment.drawn(policy)
            if policy.every_step not in controls:
                newest = replace(recent_only(budget), every_step=policy.every_step)
                controls[policy.every_step] = run if newest == policy else experiment.run(newest)
            control = controls[policy.every_step]
            found.append(
                {
                    "task": task,
                    "policy": name,
                    "budget": budget,
                    "held": run.held,
                    "held at the end": run.last,
                    "mass": run.mass,
                    "kl": _interval(run.kl),
                    "against control": _interval(run.kl - control.kl),
                }
            )
            print(
                f"{task}: {name}, {budget} tokens: holds {run.held:.0f}, KL {run.kl.mean():.4f}",
                file=sys.stderr,
            )
    return found


def _interval(each: np.ndarray) -> list[float]:
    texts = np.repeat(np.arange(len(each)), each.shape[1])
    got: Interval = bootstrap_intervals(
        [each.reshape(-1)], blocks(texts, BLOCK), np.random.default_rng(0)
    )[0]
    return [got.mean, got.low, got.high]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every policy and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.kv_sparsity", description=main.__doc__
    )
    parser.add_argument("--model", default="stdlib", help="a bundled name or a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("figures/data/kv_sparsity.json"))
    parser.add_argument("--texts", type=int, default=TEXTS, help="held-out texts")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens that are read at once")
    parser.add_argument(
        "--new", type=int, default=NEW, help="tokens that are read one by one and scored"
    )
    parser.add_argument("--copy", type=int, default=COPY, help="tokens of a far copy")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    chosen = parser.parse_args(arguments)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        model = load(chosen.model, backend="numpy")
        table = []
        losses = {}
        for task in TASKS:
            experiment = Experiment(
                model, task, chosen.texts, chosen.prompt, chosen.new, chosen.copy
            )
            table += rows(experiment, task, chosen.budgets)
            losses[task] = dict(zip(("whole", "without"), experiment.loss, strict=True))
        values = {
            "model": Path(chosen.model).name,
            "texts": chosen.texts,
            "prompt": chosen.prompt,
            "new": chosen.new,
            "copy": chosen.copy,
            "loss": losses,
            "rows": table,
            "versions": {
                "refllm": refllm.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
            },
        }
    hardware = (
        f"{processor()}, one thread, NumPy {np.__version__}, Python {platform.python_version()}"
    )
    write(chosen.output, Record("python -m refllm.experiments.kv_sparsity", "A", hardware, values))


if __name__ == "__main__":
    main()
