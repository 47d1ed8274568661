"""``refllm train``: a small model of your own, from text files to a directory that
``transformers`` loads.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from refllm.cli.main import keep_freed_memory
from refllm.cli.options import BackendOption, OverwriteOption, flag, opt
from refllm.errors import InputError, alternatives
from refllm.terminal import console, counted_bar, format_bytes, note, pairs

if TYPE_CHECKING:
    from refllm.jobs.train import TrainingJob
    from refllm.train.data import Data
    from refllm.train.schedule import Phase

_ROW = "{:>8}  {:>7}  {:>8}  {:>9}  {:>8}  {:>9}  {:>8}"


OutputOption = Annotated[
    Path, opt("Where the finished model goes.", "--output", "-o", metavar="DIR")
]
DataOption = Annotated[
    list[Path] | None,
    opt(
        "Text files or folders; may be repeated.",
        metavar="PATH",
        show_default="the standard library",
    ),
]
HeldOutOption = Annotated[
    list[Path] | None,
    opt("Held-out text to measure on.", metavar="PATH", show_default="5 % of the data"),
]
TestsOption = Annotated[
    bool, flag("Read the standard library's test package too.", "--tests/--no-tests")
]
InstallersOption = Annotated[
    bool,
    flag(
        "Read the installers that Python carries too: pip and setuptools.",
        "--installers/--no-installers",
    ),
]
VocabSizeOption = Annotated[int, opt("Tokens of the vocabulary.", min=257)]
WidthOption = Annotated[int, opt("Width of the network.", min=2)]
LayersOption = Annotated[int, opt("Number of layers.", min=1)]
HeadsOption = Annotated[int | None, opt("Query heads.", min=1, show_default="width / 64")]
KvHeadsOption = Annotated[int | None, opt("Key/value heads.", min=1, show_default="heads / 2")]
MlpOption = Annotated[int | None, opt("Width of the MLP.", min=1, show_default="3 x width")]
PositionsOption = Annotated[int, opt("Longest context of the model.", "--context", min=1)]
StepsOption = Annotated[int, opt("Optimizer steps in all.", min=1)]
BatchOption = Annotated[int, opt("Windows per step.", min=1)]
LengthOption = Annotated[int, opt("Tokens per window.", min=1)]
LongStepsOption = Annotated[
    int | None, opt("Final steps with long windows.", min=0, show_default="15 % of --steps")
]
LongLengthOption = Annotated[
    int, opt("Tokens per long window; the tokens per step stay the same.", min=1)
]
PhaseOption = Annotated[
    list[str] | None,
    opt(
        "A phase spelled out, in place of the options above; may be repeated.",
        metavar="STEPS,BATCH,LENGTH[,REPEATS…]",
    ),
]
RateOption = Annotated[float, opt("Highest learning rate.", metavar="X")]
WarmupOption = Annotated[int, opt("Steps of warm-up.", min=0)]
ScheduleOption = Annotated[str, opt("How the rate falls to zero.", metavar="linear|cosine")]
OptimizerOption = Annotated[str, opt("The optimizer.", metavar="adamw|muon")]
DecayOption = Annotated[float, opt("Weight decay of the matrices.", metavar="X", min=0)]
SeedOption = Annotated[
    int, opt("Seed of the initial weights and of the order of the windows.", min=0)
]
WorkersOption = Annotated[
    int,
    opt("Threads; they change the result by rounding only.", "--workers", "--threads", min=1),
]
TeacherOption = Annotated[
    str | None,
    opt(
        "Distil from this model, with its tokenizer.", "--teacher", "--draft-of", metavar="NAME|DIR"
    ),
]
StartOption = Annotated[
    str | None, opt("Start from this model's weights, with its tokenizer.", metavar="NAME|DIR")
]
StartShareOption = Annotated[
    float,
    opt(
        "Share of the --start weights in the stored average of weights.",
        metavar="X",
        min=0,
        max=1,
    ),
]
AlphaOption = Annotated[
    float, opt("Weight of the teacher's loss against the text's.", metavar="X", min=0, max=1)
]
TeacherFromOption = Annotated[int, opt("Step at which distillation begins.", min=0)]
EvaluateEveryOption = Annotated[int, opt("Steps between evaluations on held-out text.", min=1)]
SaveEveryOption = Annotated[int, opt("Steps between checkpoints.", min=1)]
WorkOption = Annotated[
    Path | None,
    opt("Where the run keeps its state.", metavar="DIR", show_default="OUTPUT.training"),
]


def train(
    context: typer.Context,
    output: OutputOption,
    data: DataOption = None,
    held_out: HeldOutOption = None,
    tests: TestsOption = True,
    installers: InstallersOption = False,
    vocab_size: VocabSizeOption = 4096,
    width: WidthOption = 256,
    layers: LayersOption = 4,
    heads: HeadsOption = None,
    kv_heads: KvHeadsOption = None,
    mlp: MlpOption = None,
    positions: PositionsOption = 2048,
    steps: StepsOption = 12_500,
    batch: BatchOption = 8,
    length: LengthOption = 256,
    long_steps: LongStepsOption = None,
    long_length: LongLengthOption = 1024,
    phase: PhaseOption = None,
    rate: RateOption = 3e-3,
    warmup: WarmupOption = 200,
    schedule: ScheduleOption = "linear",
    optimizer: OptimizerOption = "adamw",
    decay: DecayOption = 0.1,
    seed: SeedOption = 0,
    workers: WorkersOption = 2,
    teacher: TeacherOption = None,
    start: StartOption = None,
    start_share: StartShareOption = 0.0,
    alpha: AlphaOption = 1.0,
    teacher_from: TeacherFromOption = 0,
    evaluate_every: EvaluateEveryOption = 200,
    save_every: SaveEveryOption = 500,
    work: WorkOption = None,
    overwrite: OverwriteOption = False,
    backend: BackendOption = "numpy",
) -> None:
    """Train a small model of your own.

    It starts from random weights and ends as a Hugging Face directory with tokenizer, card,
    manifest and curve.

    An interrupted run continues from its last checkpoint when the same command is given
    again. Windows of --length tokens come first, then windows of --long-length. Of the
    standard library, code is read four times as often as tests, and code alone at the end.

    \b
    A small model in a few minutes, then a look at it:
      refllm train --output tiny --width 128 --layers 2 --steps 600
      refllm generate --model ./tiny 'def main(' --temperature 0.8
    Models like the bundled ones (hours; their cards have the full commands, run by run):
      refllm train --output stdlib
      refllm train --output stdlib-draft --width 64 --layers 2 --heads 4 \\
        --teacher ./stdlib --teacher-from 3000
    Your own text:
      refllm train --output mine --data ~/notes --vocab-size 2048 --steps 2000
    """
    from refllm.backend import get
    from refllm.checkpoints.sources import locate
    from refllm.jobs import train
    from refllm.jobs.train_options import TrainingOptions
    from refllm.train.optimizer import OPTIMIZERS, SCHEDULES
    from refllm.train.schedule import Plan

    if schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {schedule!r}; {alternatives(schedule, SCHEDULES)}")
    if optimizer not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {optimizer!r}; {alternatives(optimizer, OPTIMIZERS)}")
    if not 0 < rate < 1:
        raise InputError(f"the learning rate must be within (0, 1), got {rate}")
    # backend and output are checked before the text is read, which takes seconds
    get(backend)
    output = Path(os.path.expanduser(output))  # the shell leaves the ~ of --output=~/tiny as it is
    if output.name in ("", ".."):  # the current directory, or the one above
        output = Path(os.path.abspath(output))
    train.check_output(output, overwrite)
    if work is None:
        work = output.with_name(output.name + ".training")
    else:
        work = Path(os.path.expanduser(work))
    if start_share and start is None:
        raise InputError("--start-share is a share of the weights of --start: name that model, too")
    options = TrainingOptions(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        mlp=mlp,
        context=positions,
        steps=steps,
        batch=batch,
        length=length,
        long_steps=long_steps,
        long_length=long_length,
        explicit=tuple(_phase(text) for text in phase or ()),
    )
    plan = Plan(
        (),
        peak_rate=rate,
        warmup=warmup,
        schedule=schedule,
        optimizer=optimizer,
        weight_decay=decay,
        seed=seed,
        workers=workers,
        evaluate_every=evaluate_every,
        save_every=save_every,
    )
    job = train.prepare(
        output,
        work,
        _read_text(data, held_out, tests=tests, installers=installers),
        options,
        plan,
        overwrite=overwrite,
        teacher=None if teacher is None else locate(teacher),
        alpha=alpha,
        teacher_from=teacher_from,
        start=None if start is None else locate(start),
        note=note,
    )
    keep_freed_memory()
    _announce(job)
    with _display(job) as display:
        record = train.run(
            job,
            command=command_line(context),
            backend=backend,
            overwrite=overwrite,
            start_share=start_share,
            report=display.report,
            on_step=display.on_step,
            progress=display.progress,
        )
    measured = record["measured"]
    bits = f"{measured['bits per byte']:.3f} bits per byte"
    print(f"{output}: {bits} on {measured['tokens']:,} held-out tokens")
    size = sum(p.stat().st_size for p in job.work.iterdir() if p.is_file())
    note(f"computed with {workers} threads")
    note(f"the state of the run is kept in {job.work} ({format_bytes(size)}); it may be removed")


def _read_text(
    data: list[Path] | None, held_out: list[Path] | None, *, tests: bool, installers: bool
) -> Data:
    """The user's own files, or the standard library."""
    from refllm.train.data import standard_library, text_files

    if data:
        return text_files(data, held_out or ())
    if held_out:
        raise InputError(
            "--held-out belongs to --data; the standard library has its own held-out modules"
        )
    return standard_library(tests=tests, installers=installers)


def _phase(text: str) -> Phase:
    """A training phase from its spelling on the command line.

    >>> _phase("2500,8,256,4,1")
    Phase(steps=2500, batch=8, length=256, repeats=(4, 1))
    """
    from refllm.train.schedule import Phase

    try:
        steps, batch, length, *repeats = (int(word) for word in text.split(","))
    except ValueError as error:
        raise InputError(
            f"--phase takes STEPS,BATCH,LENGTH and the repeats of each stream, got {text!r}"
        ) from error
    return Phase(steps, batch, length, tuple(repeats))


def command_line(context: typer.Context) -> str:
    """The command with every setting that decides the result spelled out, so that it stays
    valid when defaults change.
    """
    left_out = {"output", "work", "overwrite", "backend", "evaluate_every", "save_every"}
    if context.params.get("phase"):  # phases replace these
        left_out |= {"steps", "batch", "length", "long_steps", "long_length"}
    words = ["refllm", "train", "--output", Path(context.params["output"]).name]
    for parameter in context.command.params:
        name = str(parameter.name)
        value = context.params.get(name)
        if name in left_out or value is None:
            continue
        flag = next(iter(parameter.opts))
        if isinstance(value, bool):
            words.append(flag if value else parameter.secondary_opts[0])
        elif isinstance(value, (list, tuple)):
            words += [word for item in value for word in (flag, str(item))]
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def _announce(job: TrainingJob) -> None:
    """What is about to be trained, to stderr."""
    out = console(stderr=True)
    out.print(job.output.name, style="bold")
    text = "; ".join(
        f"{name}: {len(documents):,} documents, {len(stream):,} tokens"
        for (name, documents), stream in zip(job.data.streams.items(), job.streams, strict=True)
    )
    phases = [
        f"{p.steps:,} steps of {p.batch} × {p.length} tokens" for p in job.plan.phases if p.steps
    ]
    state = f"{job.work}"
    if job.done:
        state += f", continued after {job.done:,} steps"
    lines = {
        "network": f"{job.config.summary}; {job.config.num_parameters:,} parameters",
        "text": f"{text}; held out: {len(job.held_out):,} tokens",
        "plan": ", then ".join(phases),
        "state": state,
    }
    if job.teacher is not None:
        lines["teacher"] = job.teacher.name
    pairs(out, lines)


class _Display(NamedTuple):
    """The callbacks of ``jobs.train.run``."""

    report: Callable[[dict[str, float]], None]
    on_step: Callable[[int, float], None]
    progress: Callable[[str, int, int], None]


@contextmanager
def _display(job: TrainingJob) -> Iterator[_Display]:
    """Callbacks that print a row per evaluation and, on a terminal, move a bar below the
    rows; all to stderr.
    """
    from rich.progress import TextColumn

    bar = counted_bar(TextColumn("{task.fields[detail]}"))
    task = bar.add_task("training", total=job.plan.steps, completed=job.done, detail="")
    tokens_of = [p.batch * p.length for p in job.plan.phases for _ in range(p.steps)]
    began = time.perf_counter()
    tokens = 0

    def speed() -> float:
        return tokens / max(1e-9, time.perf_counter() - began)

    def on_step(step: int, loss: float) -> None:
        nonlocal tokens
        tokens += tokens_of[step - 1]
        detail = f"loss {loss:.3f}  {speed():,.0f} tokens/s"
        bar.update(task, completed=step, detail=detail)

    def report(record: dict[str, float]) -> None:
        minutes, seconds = divmod(int(record["seconds"]), 60)
        held_out = record.get("held_out", float("nan"))
        row = (
            f"{int(record['step']):,}",
            f"{record['loss']:.3f}",
            f"{held_out:.3f}",
            f"{job.bits_per_byte(held_out):.3f}",
            f"{record['rate']:.2g}",
            f"{speed():,.0f}",
            f"{minutes}:{seconds:02}",
        )
        bar.console.print(_ROW.format(*row))

    def progress(label: str, done: int, total: int) -> None:
        bar.update(task, description=f"measuring: {label}", completed=done, total=total, detail="")

    with bar:
        if job.done < job.plan.steps:
            head = ("step", "loss", "held out", "bits/byte", "rate", "tokens/s", "time")
            bar.console.print(_ROW.format(*head), style="dim")
        yield _Display(report, on_step, progress)
