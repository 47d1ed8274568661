"""A training run from start to finish: data, tokenizer, plan, training, and the finished
directory.

| step      | what happens                                                                             |
|-----------|------------------------------------------------------------------------------------------|
| prepare   | read the text, train or reuse the tokenizer, encode, lay out network and plan            |
| train     | ``train.loop.train`` in ``work``, which continues from the state that it finds there    |
| finish    | ``bundle.finish``: measure, write the card and the directory                              |

``work`` keeps the tokenizer and the state (three times the float32 weights), so that an
interrupted run goes on where its last checkpoint was, with the same tokens.

Left out: searching for good settings.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refllm.backend import get
from refllm.checkpoints.loading import iter_tensors, read_config
from refllm.checkpoints.tensor_files import CheckpointError, tensor_shapes
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.checkpoints.writer import check_target, file_sha256, write_whole
from refllm.jobs import model_card, publish
from refllm.model.config import ModelConfig
from refllm.train.data import Data, encode, fingerprint
from refllm.train.distill import teacher_of
from refllm.train.loop import train
from refllm.train.loss import Teacher
from refllm.train.schedule import Phase, Plan
from refllm.train.state import load_state

STATE = "state.safetensors"
TOKENIZER = "tokenizer.json"
TEXT = "text.sha256"
LESSON = "lesson.json"  # by whom the run was taught, and which weights it began with
LONG_SHARE = 0.15  # of the steps, at the end, read long windows
# parameters; with gradients and moments, 16 bytes each: more than any one device holds
LARGEST = 10**10

Note = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """The network and the schedule as a user gives them; None is derived from the others."""

    vocab_size: int = 4096
    width: int = 256
    layers: int = 4
    heads: int | None = None  # one for 64 columns of width
    kv_heads: int | None = None  # half the heads, or the next smaller number that divides them
    mlp: int | None = None  # three times the width
    context: int = 2048
    steps: int = 12_500
    batch: int = 8
    length: int = 256
    long_steps: int | None = None  # of the steps
    long_length: int = 1024
    # phases spelled out; they replace everything from ``steps`` on
    explicit: tuple[Phase, ...] = ()

    def config(self, vocab_size: int, begin: int) -> ModelConfig:
        """The network; ValueError if the numbers make none."""
        heads = self.heads or max(1, self.width // 64)
        if self.width % heads:
            raise ValueError(f"a width of {self.width} does not divide into {heads} heads")
        shared = next(g for g in range(max(1, heads // 2), 0, -1) if heads % g == 0)
        config = ModelConfig(
            "llama",
            vocab_size,
            self.width,
            self.mlp or 3 * self.width,
            self.layers,
            heads,
            self.kv_heads or shared,
            self.width // heads,
            tie_word_embeddings=True,
            max_position_embeddings=self.context,
            bos_token_id=begin,
            eos_token_ids=(begin,),
        )
        if config.num_parameters > LARGEST:
            raise ValueError(
                f"{config.num_parameters:,} parameters are more than is trained here: {LARGEST:,}"
            )
        return config

    def phases(self, data: Data) -> tuple[Phase, ...]:
        """Short windows, then long ones with about as many tokens a step; ValueError if
        they do not fit.
        """
        if self.explicit:
            return self._checked(data)
        if self.steps < 1:
            raise ValueError(f"a run needs at least one step, got {self.steps}")
        if self.long_steps is None:
            long = int(LONG_SHARE * self.steps)
        else:
            long = self.long_steps
        if not 0 <= long <= self.steps:
            raise ValueError(f"{long} long steps do not fit into {self.steps} steps")
        longest = max(self.length, self.long_length if long else 0)
        if longest > self.context:
            raise ValueError(
                f"windows of {longest} tokens are longer than the context of {self.context}"
            )
        long_batch = max(1, self.batch * self.length // self.long_length)
        short = Phase(self.steps - long, self.batch, self.length, data.repeats)
        if long:
            return (short, Phase(long, long_batch, self.long_length, data.last_repeats))
        return (short,)

    def _checked(self, data: Data) -> tuple[Phase, ...]:
        """The explicit phases, their repeats filled in from the data where they give none."""
        phases = tuple(p if p.repeats else replace(p, repeats=data.repeats) for p in self.explicit)
        for p in phases:
            if p.length > self.context:
                raise ValueError(
                    f"windows of {p.length} tokens are longer than the context of {self.context}"
                )
            if len(p.repeats) != len(data.streams):
                raise ValueError(
                    f"a phase has {len(p.repeats)} repeats for {len(data.streams)} streams of text"
                )
            if p.steps and not any(p.repeats):
                raise ValueError(
                    "a phase leaves out every stream of text: it needs a repeat above zero"
                )
        if not any(p.steps for p in phases):
            raise ValueError("a run needs at least one step, the phases have none")
        return phases


@dataclass
class Run:
    """Everything that ``go`` needs."""

    output: Path
    work: Path
    data: Data
    tokenizer: Tokenizer
    config: ModelConfig
    plan: Plan
    streams: list[NDArray[np.int32]]
    held_out: NDArray[np.int32]
    teacher: Path | None = None
    alpha: float = 1.0
    teacher_from: int = 0  # the step at which distillation begins
    start: Path | None = None  # the model whose weights the first step finds
    done: int = 0  # steps of an earlier start

    def bits_per_byte(self, nats: float) -> float:
        """Nats per token of the held-out stream as bits per byte of its text."""
        size = sum(len(d.text.encode()) for d in self.data.held_out)
        return nats / math.log(2) * (len(self.held_out) - len(self.data.held_out)) / size


def check_output(output: Path, overwrite: bool) -> None:
    """CheckpointError if ``output`` is taken: to be asked before hours of training, not
    after.
    """
    if not overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            f"{output} exists already: choose another --output, or pass --overwrite"
        )
    # only a checkpoint is replaced, even so
    check_target(Path(os.path.realpath(output)), overwrite=True)


def prepare(
    output: Path,
    work: Path,
    data: Data,
    shape: Shape,
    plan: Plan,
    *,
    teacher: Path | None = None,
    alpha: float = 1.0,
    teacher_from: int = 0,
    start: Path | None = None,
    overwrite: bool = False,
    note: Note = lambda text: None,
) -> Run:
    """Make a run ready; ``plan``'s phases are replaced by those of ``shape``.

    ``start`` is the directory of a model of the same shape to go on from, with its
    tokenizer; None starts from random weights.

    Raises
    ------
    ValueError
        for a network, a plan, or data that do not fit together.
    CheckpointError
        if ``output`` is taken.
    """
    check_output(output, overwrite)
    plan = replace(plan, phases=shape.phases(data))
    shape.config(shape.vocab_size, 0)  # numbers that make no network, before a tokenizer is trained
    given = teacher or start  # whose tokenizer is kept
    taught = None if given is None else read_config(given)
    tokenizer = _tokenizer(work, data, shape.vocab_size, given, note)
    if taught is None or taught.bos_token_id is None:
        begin = 0
    else:
        begin = taught.bos_token_id
    config = shape.config(tokenizer.vocab_size if taught is None else taught.vocab_size, begin)
    note("encoding the text")
    if start is not None and shape_of(read_config(start)) != shape_of(config):
        raise ValueError(
            f"{start} is not of the shape that the options describe: it cannot be the start"
        )
    streams = [encode(tokenizer, documents, begin) for documents in data.streams.values()]
    run = Run(
        output,
        work,
        data,
        tokenizer,
        config,
        plan,
        streams,
        encode(tokenizer, data.held_out, begin),
        teacher,
        alpha,
        teacher_from,
        start,
    )
    _check_lengths(run)
    _check_text(run)
    if (work / STATE).exists():
        _continue(run, note)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(work / TOKENIZER)
    write_whole(work / TEXT, _digest(data) + "\n")
    write_whole(work / LESSON, json.dumps(_lesson(run), indent=1) + "\n")
    return run


def go(
    run: Run,
    *,
    command: str,
    backend: str = "numpy",
    overwrite: bool = False,
    start_share: float = 0.0,
    report: Callable[[dict[str, float]], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    progress: model_card.Progress = lambda what, done, total: None,
) -> model_card.Record:
    """Train to the end of the plan, finish the directory, and return the card's record."""
    xp = get(backend)
    if run.done < run.plan.steps:
        train(
            run.config,
            run.streams,
            run.plan,
            run.work,
            like=xp.zeros(1, dtype=xp.float32),
            held_out=run.held_out,
            teacher=_teacher(run, xp),
            teacher_from=run.teacher_from,
            report=report,
            on_step=on_step,
            start=None if run.start is None else dict(iter_tensors(run.start, "float32")),
        )
    return publish.finish(
        run.work / STATE,
        run.tokenizer,
        run.output,
        run.data,
        command=command,
        teacher=run.teacher,
        start=run.start,
        start_share=start_share,
        overwrite=overwrite,
        progress=progress,
    )


def shape_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What two networks must share for one to take the other's weights."""
    return dict(tensor_shapes(config))


def _check_lengths(run: Run) -> None:
    """Every stream must hold a window of every phase that reads it: the last phase comes
    after hours.
    """
    for phase in run.plan.phases:
        read = [s for s, repeats in zip(run.streams, phase.repeats, strict=True) if repeats]
        shortest = min(map(len, [*read, run.held_out]))
        if phase.steps and shortest <= phase.length:
            raise ValueError(
                f"a stream of the text has {shortest} tokens, too few for windows of {phase.length}: give more text "
                "to train on or to hold out, or shorten --length and --long-length"
            )


def _check_text(run: Run) -> None:
    """A run that goes on must go on with the same text: its card will name every document
    that it read.
    """
    digest = run.work / TEXT
    if (
        (run.work / STATE).exists()
        and digest.exists()
        and digest.read_text("utf-8").strip() != _digest(run.data)
    ):
        raise ValueError(
            f"{run.work} was begun with other text, or another Python: choose another --work"
        )


def _continue(run: Run, note: Note) -> None:
    """Take up the state in ``work``. A finished run is not trained again, so it must be the
    one that is asked for.
    """
    state, about = load_state(run.work / STATE)
    run.done = state.optimizer.step
    if ModelConfig.from_hf(json.loads(about["config"])) != run.config:
        raise ValueError(
            f"{run.work} holds a run of another network: choose another --work, or remove it"
        )
    lesson = _lesson(run)
    path = run.work / LESSON
    known = json.loads(path.read_text("utf-8")) if path.exists() else lesson
    if known["start"] != lesson["start"]:
        raise ValueError(
            f"{run.work} was begun from other weights: give its --start, or choose another --work"
        )
    # what is left out here decides nothing but rounding and what is reported
    began, asked = (
        replace(p, workers=1, evaluate_every=1, save_every=1)
        for p in (publish.read_plan(about), run.plan)
    )
    for what, same in (("plan", began == asked), ("teacher, or weight of it", known == lesson)):
        if not same and run.done >= run.plan.steps:
            raise ValueError(
                f"{run.work} holds {run.done:,} steps of another {what}: choose another --work, or remove it"
            )
        if not same:
            note(f"{run.work} was begun with another {what}; it goes on with this one")


def _lesson(run: Run) -> dict[str, Any]:
    """What decides the weights beside text and plan: the other models, by their files, and
    how they are used.
    """
    hashes = {
        role: None
        if path is None
        else {f.name: file_sha256(f) for f in sorted(path.glob("*.safetensors"))}
        for role, path in (("teacher", run.teacher), ("start", run.start))
    }
    if run.teacher is not None:
        how = {"alpha": run.alpha, "teacher_from": run.teacher_from}
    else:
        how = {}
    return {**hashes, **how}


def _digest(data: Data) -> str:
    documents = {
        name: fingerprint(part)
        for name, part in {**data.streams, "held out": data.held_out}.items()
    }
    return hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest()


def _tokenizer(
    work: Path, data: Data, vocab_size: int, given: Path | None, note: Note
) -> Tokenizer:
    """The given model's; or the one that the run began with; or a new one, trained on the
    first stream.
    """
    if given is not None:  # a student that is compared token by token must read the same tokens
        return Tokenizer.from_file(given / TOKENIZER)
    if (work / STATE).exists():
        return Tokenizer.from_file(work / TOKENIZER)
    note(f"training a tokenizer of {vocab_size:,} tokens")
    return Tokenizer.train((d.text for d in next(iter(data.streams.values()))), vocab_size)


def _teacher(run: Run, xp: Any) -> Teacher | None:
    if run.teacher is None:
        return None
    params = {name: xp.asarray(w) for name, w in iter_tensors(run.teacher, "float32")}
    return teacher_of(params, read_config(run.teacher), alpha=run.alpha)
