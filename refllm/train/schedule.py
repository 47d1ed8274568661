"""The plan of a training run: phases, learning rates and, derived from them, the token
windows of each step.

| symbol | name                                     | value                       |
|--------|------------------------------------------|-----------------------------|
| B      | ``Phase.batch``, windows per step        |                             |
| S      | ``Phase.length``, predictions per window | a window holds S + 1 tokens |

A plan is plain Python data, so it can be tested and plotted without a network. The batch of
step i depends only on the plan, its seed and the lengths of the streams, so a resumed run
sees the same batches as an uninterrupted one.

Left out: packing by document (windows are cut from the concatenated stream and may span
several documents, which ``<|endoftext|>`` separates), and weights for single documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from refllm.errors import InputError

Window = tuple[int, int]  # (stream, offset of its first token)


@dataclass(frozen=True)
class Phase:
    """Consecutive steps with one batch shape and one mixture of streams.

    ``repeats[j]`` is the number of passes through stream j in one epoch of the mixture; 0
    leaves it out. ValueError for a negative value, or an empty batch or window.
    """

    steps: int
    batch: int
    length: int
    repeats: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or self.length < 1 or min(self.repeats, default=0) < 0:
            raise InputError(
                f"a phase needs steps ≥ 0, batch ≥ 1, length ≥ 1 and repeats ≥ 0: {self}"
            )


@dataclass(frozen=True)
class Plan:
    """All hyperparameters of a run except the network's shape; ValueError for values that
    make no sense.
    """

    phases: tuple[Phase, ...]
    peak_rate: float = 3e-3
    warmup: int = 100
    schedule: str = "cosine"
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    workers: int = 2
    evaluate_every: int = 200
    save_every: int = 500

    def __post_init__(self) -> None:
        if min(self.workers, self.evaluate_every, self.save_every) < 1:
            raise InputError("a plan needs workers, evaluate_every and save_every of at least 1")
        # a negative rate or limit would increase the loss, and with NaN nothing is clipped
        if not (0 <= self.peak_rate < inf and 0 <= self.weight_decay < inf and self.clip > 0):
            raise InputError(
                "a plan needs a rate and a decay that are finite and not negative, and a clip "
                f"above 0: {self.peak_rate}, {self.weight_decay}, {self.clip}"
            )
        if self.warmup < 0 or self.seed < 0:
            raise InputError(
                f"a plan needs warmup and seed of 0 or more, got {self.warmup} and {self.seed}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(p.steps for p in self.phases)


def window_starts(lengths: Sequence[int], phase: Phase, rng: np.random.Generator) -> list[Window]:
    """All windows of a phase, in training order: steps · batch pairs (stream, offset).

    ``lengths[j]`` is the number of tokens of stream j. Each pass cuts a stream from a new
    random offset into windows that do not overlap, so a target is seen at most once per
    pass and fewer than 2·length are left out; the windows of all streams are then shuffled.

    >>> phase = Phase(steps=2, batch=2, length=3)
    >>> window_starts([13], phase, np.random.default_rng(0))  # 13 tokens
    [(0, 8), (0, 2), (0, 5), (0, 6)]

    Raises
    ------
    ValueError
        if a stream is shorter than a window, or the phase uses no stream.
    """
    if len(lengths) != len(phase.repeats):
        raise InputError(
            f"the phase mixes {len(phase.repeats)} streams, but {len(lengths)} are given"
        )
    if phase.steps and not any(phase.repeats):
        raise InputError("every stream is left out: a phase needs at least one repeat above zero")
    wanted = phase.steps * phase.batch
    starts: list[Window] = []
    while len(starts) < wanted:
        epoch: list[Window] = []
        for stream, (count, repeats) in enumerate(zip(lengths, phase.repeats, strict=True)):
            for _ in range(repeats):
                spare = count - 1 - phase.length  # tokens beyond one window
                if spare < 0:
                    raise InputError(
                        f"stream {stream} has {count} tokens: too few for windows of {phase.length}"
                    )
                first = int(rng.integers(0, min(phase.length, spare + 1)))
                epoch += [(stream, at) for at in range(first, count - phase.length, phase.length)]
        starts += [epoch[i] for i in rng.permutation(len(epoch))]
    return starts[:wanted]


def batches(
    plan: Plan, lengths: Sequence[int], first: int = 0
) -> Iterator[tuple[int, Phase, list[Window]]]:
    """(step, its phase, the windows of its batch) for every step of the plan from ``first`` on."""
    step = 0  # the first of the phase
    for number, phase in enumerate(plan.phases):
        if first < step + phase.steps:  # phases that are done cost nothing on resume
            starts = window_starts(lengths, phase, np.random.default_rng([plan.seed, 1, number]))
            for i in range(max(0, first - step), phase.steps):
                yield step + i, phase, starts[i * phase.batch : (i + 1) * phase.batch]
        step += phase.steps
