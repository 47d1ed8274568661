"""A model trained from start to finish: text, tokenizer, plan, training, and the finished
directory.

| step     | what happens                                                                         |
|----------|--------------------------------------------------------------------------------------|
| prepare  | read the text, train or reuse the tokenizer, encode, derive network and plan         |
| run      | ``train.loop.train`` in ``work``, continuing from a state that it finds there;       |
|          | ``publish.finish`` then measures and writes the card and the directory               |

``work`` keeps the tokenizer and the state (three times the float32 weights), so an
interrupted run continues from its last checkpoint, with the same tokens.

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

import numpy as np
from numpy.typing import NDArray

from refllm.array_types import Json
from refllm.atomic import write_atomic
from refllm.backend import Namespace, get
from refllm.checkpoints.loading import iter_tensors, read_config
from refllm.checkpoints.tensor_files import CheckpointError, tensor_shapes
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.checkpoints.writer import check_target, file_sha256
from refllm.errors import InputError
from refllm.jobs import model_card, publish
from refllm.jobs.train_options import TrainingOptions
from refllm.model.config import ModelConfig
from refllm.train.data import Data, encode, fingerprint
from refllm.train.distill import make_teacher
from refllm.train.loop import train
from refllm.train.loss import Teacher
from refllm.train.schedule import Plan
from refllm.train.state import load_state

STATE = "state.safetensors"
TOKENIZER = "tokenizer.json"
TEXT_DIGEST = "text.sha256"
ORIGIN = "lesson.json"  # the teacher and the initial weights of the run, by their digests

Note = Callable[[str], None]


@dataclass
class TrainingJob:
    """What ``prepare`` has checked and ``run`` needs."""

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
    start: Path | None = None  # the model whose weights the run starts from
    done: int = 0  # steps that an earlier, interrupted run has done

    def bits_per_byte(self, nats: float) -> float:
        """Nats per token of the held-out stream as bits per byte of its text."""
        size = sum(len(d.text.encode()) for d in self.data.held_out)
        tokens = len(self.held_out) - len(self.data.held_out)  # begin tokens are not predicted
        return nats / math.log(2) * tokens / size


def check_output(output: Path, overwrite: bool) -> None:
    """CheckpointError if ``output`` is taken: checked before hours of training, not after."""
    if not overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            f"{output} exists already: choose another --output, or pass --overwrite"
        )
    # even then, only a checkpoint is replaced
    check_target(Path(os.path.realpath(output)), overwrite=True)


def prepare(
    output: Path,
    work: Path,
    data: Data,
    options: TrainingOptions,
    plan: Plan,
    *,
    teacher: Path | None = None,
    alpha: float = 1.0,
    teacher_from: int = 0,
    start: Path | None = None,
    overwrite: bool = False,
    note: Note = lambda text: None,
) -> TrainingJob:
    """Check everything and encode the text; ``plan``'s phases are replaced by those of ``options``.

    ``start`` is the directory of a model of the same shape to continue from, with its
    tokenizer; None starts from random weights.

    Raises
    ------
    ValueError
        for a network, a plan, or data that do not fit together.
    CheckpointError
        if ``output`` is taken.
    """
    check_output(output, overwrite)
    plan = replace(plan, phases=options.phases(data))
    # numbers that make no network are reported before a tokenizer is trained
    options.config(options.vocab_size, 0)
    source = teacher or start  # its tokenizer is kept
    source_config = None if source is None else read_config(source)
    tokenizer = _tokenizer(work, data, options.vocab_size, source, note)
    begin = 0
    vocab_size = tokenizer.vocab_size
    if source_config is not None:
        begin = source_config.bos_token_id or 0
        vocab_size = source_config.vocab_size
    config = options.config(vocab_size, begin)
    note("encoding the text")
    if start is not None and shape_of(read_config(start)) != shape_of(config):
        raise InputError(
            f"{start} is not of the shape that the options describe: it cannot be the start"
        )
    job = TrainingJob(
        output,
        work,
        data,
        tokenizer,
        config,
        plan,
        [encode(tokenizer, documents, begin) for documents in data.streams.values()],
        encode(tokenizer, data.held_out, begin),
        teacher,
        alpha,
        teacher_from,
        start,
    )
    _check_lengths(job)
    _check_text(job)
    if (work / STATE).exists():
        _continue(job, note)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(work / TOKENIZER)
    write_atomic(work / TEXT_DIGEST, _digest(data) + "\n")
    write_atomic(work / ORIGIN, json.dumps(_origin(job), indent=1) + "\n")
    return job


def run(
    job: TrainingJob,
    *,
    command: str,
    backend: str = "numpy",
    overwrite: bool = False,
    start_share: float = 0.0,
    report: Callable[[dict[str, float]], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    progress: model_card.Progress = lambda label, done, total: None,
) -> Json:
    """Train to the end of the plan, finish the directory, and return the card's record."""
    xp = get(backend)
    if job.done < job.plan.steps:
        train(
            job.config,
            job.streams,
            job.plan,
            job.work,
            like=xp.zeros(1, dtype=xp.float32),
            held_out=job.held_out,
            teacher=_teacher(job, xp),
            teacher_from=job.teacher_from,
            report=report,
            on_step=on_step,
            start=None if job.start is None else dict(iter_tensors(job.start, "float32")),
        )
    return publish.finish(
        job.work / STATE,
        job.tokenizer,
        job.output,
        job.data,
        command=command,
        teacher=job.teacher,
        start=job.start,
        start_share=start_share,
        overwrite=overwrite,
        progress=progress,
    )


def shape_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor: equal for two networks that can exchange weights."""
    return dict(tensor_shapes(config))


def _check_lengths(job: TrainingJob) -> None:
    """Every stream must hold a window of every phase that reads it: the last phase comes
    after hours.
    """
    for phase in job.plan.phases:
        read = [s for s, repeats in zip(job.streams, phase.repeats, strict=True) if repeats]
        shortest = min(map(len, [*read, job.held_out]))
        if phase.steps and shortest <= phase.length:
            raise InputError(
                f"a stream of the text has {shortest} tokens, too few for windows of "
                f"{phase.length}: give more text to train on or to hold out, or shorten "
                "--length and --long-length"
            )


def _check_text(job: TrainingJob) -> None:
    """A continued run must read the same text: its card will name every document read."""
    digest = job.work / TEXT_DIGEST
    if not (job.work / STATE).exists() or not digest.exists():
        return
    if digest.read_text("utf-8").strip() != _digest(job.data):
        raise InputError(
            f"{job.work} was begun with other text, or another Python: choose another --work"
        )


def _continue(job: TrainingJob, note: Note) -> None:
    """Continue from the state in ``work``. A finished run is not trained again, so its
    settings must be the requested ones.
    """
    state, about = load_state(job.work / STATE)
    job.done = state.optimizer.step
    if ModelConfig.from_hf(json.loads(about["config"])) != job.config:
        raise InputError(
            f"{job.work} holds a run of another network: choose another --work, or remove it"
        )
    origin = _origin(job)
    path = job.work / ORIGIN
    recorded = json.loads(path.read_text("utf-8")) if path.exists() else origin
    if recorded["start"] != origin["start"]:
        raise InputError(
            f"{job.work} was begun from other weights: give its --start, or choose another --work"
        )
    # workers change the result by rounding only, the other two only what is reported
    begun, requested = (
        replace(plan, workers=1, evaluate_every=1, save_every=1)
        for plan in (publish.read_plan(about), job.plan)
    )
    same = {"plan": begun == requested, "teacher, or weight of it": recorded == origin}
    for setting, unchanged in same.items():
        if not unchanged and job.done >= job.plan.steps:
            raise InputError(
                f"{job.work} holds {job.done:,} steps of another {setting}: choose another "
                "--work, or remove it"
            )
        if not unchanged:
            note(f"{job.work} was begun with another {setting}; it continues with this one")


def _origin(job: TrainingJob) -> Json:
    """What decides the weights besides text and plan: the files of teacher and start, and how
    the teacher is used.
    """
    origin: Json = {}
    for role, path in (("teacher", job.teacher), ("start", job.start)):
        origin[role] = None
        if path is not None:
            files = sorted(path.glob("*.safetensors"))
            origin[role] = {file.name: file_sha256(file) for file in files}
    if job.teacher is not None:
        origin |= {"alpha": job.alpha, "teacher_from": job.teacher_from}
    return origin


def _digest(data: Data) -> str:
    """SHA-256 of the fingerprints of all documents."""
    parts = {**data.streams, "held out": data.held_out}
    documents = {name: fingerprint(part) for name, part in parts.items()}
    return hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest()


def _tokenizer(
    work: Path, data: Data, vocab_size: int, source: Path | None, note: Note
) -> Tokenizer:
    """The tokenizer of ``source``; else that of the interrupted run; else a new one, trained
    on the first stream.
    """
    if source is not None:  # student and teacher are compared token by token
        return Tokenizer.from_file(source / TOKENIZER)
    if (work / STATE).exists():
        return Tokenizer.from_file(work / TOKENIZER)
    note(f"training a tokenizer of {vocab_size:,} tokens")
    return Tokenizer.train((d.text for d in next(iter(data.streams.values()))), vocab_size)


def _teacher(job: TrainingJob, xp: Namespace) -> Teacher | None:
    """The teacher on the job's backend."""
    if job.teacher is None:
        return None
    params = {name: xp.asarray(w) for name, w in iter_tensors(job.teacher, "float32")}
    return make_teacher(params, read_config(job.teacher), alpha=job.alpha)
