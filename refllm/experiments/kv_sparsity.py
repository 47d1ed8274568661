"""What dropping tokens costs: the policies of ``kv.sparse`` beside two controls that hold
equally many.

    python -m refllm.experiments.kv_sparsity  # writes figures/data/kv_sparsity.json
    refllm figures                            # draws it

Held-out texts of ``PROMPT`` + ``NEW`` tokens: the prompt is read in full, then the policy
drops, and the rest is read token by token, each given the true tokens before it. What is
measured is KL to the same network with all tokens in its cache, over those ``NEW`` tokens,
in pairs with a control that keeps the newest tokens only.

| task          | text                                     | what it needs          |
|---------------|------------------------------------------|------------------------|
| "as it comes" | held-out code                            | mostly the last tokens |
| "a far copy"  | ``COPY`` tokens of code, other code, the | what stood there long  |
|               | first ones again                         | before                 |

A small network attends mostly to the last tokens, so the newest tokens are a strong control,
and on ordinary code the techniques lose to it. They were made for text that asks at the end
for something far back: the second task, where ``without`` says how much worse the network is
when the first copy is not in the text at all.

SnapKV and PyramidKV drop once, after the prompt, and keep all later tokens: they hold more
tokens than their budget. Their control does the same. All are drawn by the tokens that a
key head held at a step, in the mean. ``mass`` is the share of a text's last query's
attention, with all tokens there, that falls on what a policy kept at the end, drawn by what
it held then. What is kept at random is the mean of ``DRAWS`` draws; intervals resample the
texts.

PyramidKV has SnapKV's window here, so that only the budgets differ, and β = 4: with the
paper's 20 its top layer would hold fewer tokens than vote.

The figure stands in ``kv_sparsity_figure``. Left out: needles in haystacks (the network
answers no questions), speed (a fused kernel has no weights to sum).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from refllm.api import Model, load
from refllm.array_types import Json
from refllm.backend import asarray_like, to_numpy
from refllm.corpus import held_out_documents
from refllm.decode.sampling import log_probabilities
from refllm.errors import InputError
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
from refllm.measure.bootstrap import blocks, bootstrap_intervals
from refllm.measure.device import one_thread, versions
from refllm.measure.records import Record, write
from refllm.model.llama import forward, logits
from refllm.quant.layer_inputs import calibration_windows

PROMPT = 768
NEW = 128
TEXTS = 24
COPY = 192
DRAWS = 3
BUDGETS = (64, 128, 256, 512)
TASKS = ("as it comes", "a far copy")  # the names in the record
CONTROL = "newest only"
POLICIES: dict[str, Callable[[int], SparsePolicy]] = {
    CONTROL: recent_only,
    "at random": at_random,
    "StreamingLLM": streaming,
    "H2O": h2o,
    "TOVA": tova,
    "SnapKV": snapkv,
    "PyramidKV": lambda budget: pyramidkv(budget, window=32, beta=4.0),
}
BLOCK = 64  # tokens per block of the bootstrap


@dataclass(frozen=True)
class Run:
    """One policy over all texts."""

    kl: np.ndarray  # [texts, new], of each token
    held: float  # tokens held per key head, mean of the steps
    last: float  # at the end
    mass: float  # share of the last query's attention


class Experiment:
    """Texts of a task, read once with everything in the cache, and then with what each
    policy keeps.

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
            raise InputError(f"no task is called {task!r}; they are {', '.join(TASKS)}")
        most = (prompt + new) // 2
        if not new < copy <= most:
            raise InputError(
                f"two copies of {copy} tokens, the last {new} of them new, "
                f"need {copy} within {new + 1}..{most}"
            )
        self.model = model
        self.prompt = prompt
        self.new = new
        begin = []
        if model.config.bos_token_id is not None:
            begin.append(model.config.bos_token_id)
        length = prompt + new - len(begin)
        windows = calibration_windows(
            model.tokenizer, 2 * texts, length, 0, documents=held_out_documents()
        )
        drawn = [[int(t) for t in window] for window in windows]
        if task == TASKS[1]:
            pairs = zip(drawn, drawn[texts:], strict=False)
            drawn = [[*a[:copy], *b[: length - 2 * copy], *a[:copy]] for a, b in pairs]
        self.texts = [begin + tokens for tokens in drawn[:texts]]
        self.after = len(begin) + copy  # where the first copy has ended

    @cached_property
    def exact(self) -> np.ndarray:
        """log p of the network with all tokens, [texts, new, V]."""
        rows = slice(self.prompt - 1, self.prompt + self.new - 1)
        return np.stack([self._log_p(tokens)[rows] for tokens in self.texts])

    @cached_property
    def loss(self) -> tuple[float, float]:
        """Nats per new token, of the whole text and without its first ``copy`` tokens."""
        rows = slice(-self.new - 1, -1)
        without = np.stack([self._log_p(tokens[self.after :])[rows] for tokens in self.texts])
        return self._loss(self.exact), self._loss(without)

    def _log_p(self, tokens: list[int]) -> np.ndarray:
        """Log-probabilities after each token, [S, V]."""
        return to_numpy(log_probabilities(self.model.logits(tokens)))

    def _loss(self, log_p: np.ndarray) -> float:
        """Mean loss of the new tokens; log_p[texts, new, V]."""
        targets = np.array([tokens[self.prompt :] for tokens in self.texts])
        return -float(np.take_along_axis(log_p, targets[:, :, None], axis=-1).mean())

    def run(self, policy: SparsePolicy, seed: int = 0) -> Run:
        """The prompts one after another, each in one step; then all texts together, one
        token of each per step.
        """
        model = self.model
        count = len(self.texts)
        like = model.weights["norm"]
        cache = SparseCache(
            model.config, count, like=like, policy=policy, rng=np.random.default_rng(seed)
        )
        first = []
        for at, tokens in enumerate(self.texts):
            counts = [self.prompt if b == at else 0 for b in range(count)]
            first.append(self._step(cache, counts, tokens[: self.prompt])[-1:])
        cache.finish_prompt()
        kl = [self._kl(np.concatenate(first), 0)]
        held = []
        for i in range(self.new - 1):
            held.append(_tokens_held(cache))
            newest = [tokens[self.prompt + i] for tokens in self.texts]
            kl.append(self._kl(self._step(cache, [1] * count, newest), i + 1))
        heads = count * len(cache.layers) * model.config.num_key_value_heads
        return Run(
            kl=np.stack(kl, axis=1),
            held=float(np.mean(held)) / heads,
            last=_tokens_held(cache) / heads,
            mass=self._mass(cache),
        )

    def drawn(self, policy: SparsePolicy) -> Run:
        """``run``, or the mean of ``DRAWS`` runs if the policy drops at random."""
        if policy.score != "random":
            return self.run(policy)
        runs = [self.run(policy, seed) for seed in range(DRAWS)]
        kl = np.mean([r.kl for r in runs], axis=0)
        mass = float(np.mean([r.mass for r in runs]))
        return replace(runs[0], kl=kl, mass=mass)

    def _step(self, cache: SparseCache, counts: list[int], tokens: Sequence[int]) -> np.ndarray:
        """Log-probabilities after a step: of every sequence in a decode step, else of the last
        token.
        """
        weights = self.model.weights
        placed = asarray_like([list(tokens), cache.positions(counts)], weights["norm"], "int64")
        hidden = forward(weights, self.model.config, placed[0], placed[1], cache.view(counts))
        cache.advance(counts)
        if sum(counts) != len(counts):
            hidden = hidden[-1:]
        return to_numpy(log_probabilities(logits(weights, hidden)))

    def _kl(self, log_q: np.ndarray, i: int) -> np.ndarray:
        """KL of the i-th new token of each text, [texts]."""
        log_p = self.exact[:, i]
        kl: np.ndarray = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
        return kl

    @cached_property
    def attention(self) -> list[list[np.ndarray]]:
        """Attention of each text's last query over all its tokens, [texts][layers] of [G, S]."""
        found = []
        for tokens in self.texts:
            everything = SparseCache(
                self.model.config, 1, like=self.model.weights["norm"], policy=tova(len(tokens))
            )
            self._step(everything, [len(tokens) - 1], tokens[:-1])
            found.append([to_numpy(layer[0].scores) for layer in everything.layers])
        return found

    def _mass(self, cache: SparseCache) -> float:
        """The share of each text's last query's attention that falls on what is kept, the
        mean of texts and layers.
        """
        shares = [
            np.take_along_axis(scores, to_numpy(layer[b].positions), axis=1).sum(axis=1).mean()
            for b, layers in enumerate(self.attention)
            for scores, layer in zip(layers, cache.layers, strict=True)
        ]
        return float(np.mean(shares))


def _tokens_held(cache: SparseCache) -> int:
    """Tokens in all key heads of all layers and sequences."""
    return sum(int(k.positions.size) for layer in cache.layers for k in layer)


def rows(experiment: Experiment, task: str, budgets: Sequence[int] = BUDGETS) -> list[Json]:
    """The table of a task: every policy at every budget that its window fits into."""
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
    """[mean, low, high] of values [texts, new]."""
    texts = np.repeat(np.arange(len(each)), each.shape[1])
    rng = np.random.default_rng(0)
    found = bootstrap_intervals([each.reshape(-1)], blocks(texts, BLOCK), rng)[0]
    return [found.mean, found.low, found.high]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every policy and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.kv_sparsity", description=main.__doc__
    )
    add = parser.add_argument
    add("--model", default="stdlib", help="a bundled name or a checkpoint")
    add("--output", type=Path, default=Path("figures/data/kv_sparsity.json"))
    add("--texts", type=int, default=TEXTS, help="held-out texts")
    add("--prompt", type=int, default=PROMPT, help="tokens that are read in one step")
    add("--new", type=int, default=NEW, help="tokens that are read one by one and scored")
    add("--copy", type=int, default=COPY, help="tokens of a far copy")
    add("--budgets", type=int, nargs="+", default=BUDGETS)
    chosen = parser.parse_args(arguments)
    sizes = (chosen.texts, chosen.prompt, chosen.new, chosen.copy)
    table = []
    losses = {}
    with threadpool_limits(limits=1, user_api="blas"):
        model = load(chosen.model, backend="numpy")
        for task in TASKS:
            experiment = Experiment(model, task, *sizes)
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
        "versions": versions(),
    }
    command = "python -m refllm.experiments.kv_sparsity"
    write(chosen.output, Record(command, "A", one_thread(), values))


if __name__ == "__main__":
    main()
