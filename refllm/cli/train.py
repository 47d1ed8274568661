"""``refllm train``: one's own small model, from text files to a directory that
``transformers`` loads.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refllm.cli.main import keep_freed_memory
from refllm.cli.options import BackendOption, OverwriteOption, flag, opt
from refllm.terminal import console, counted_bar, format_bytes, note, pairs

if TYPE_CHECKING:
    from refllm.jobs.train import Run
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
    list[Path] | None, opt("Text to measure on.", metavar="PATH", show_default="5 % of the data")
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
PositionsOption = Annotated[int, opt("Longest context that the model states.", "--context", min=1)]
StepsOption = Annotated[int, opt("Steps in all.", min=1)]
BatchOption = Annotated[int, opt("Windows in a step.", min=1)]
LengthOption = Annotated[int, opt("Tokens in a window.", min=1)]
LongStepsOption = Annotated[
    int | None, opt("Steps at the end with long windows.", min=0, show_default="15 % of --steps")
]
LongLengthOption = Annotated[
    int, opt("Tokens in a long window; as many tokens a step as before.", min=1)
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
ScheduleOption = Annotated[str, opt("From the highest rate to zero.", metavar="linear|cosine")]
OptimizerOption = Annotated[str, opt("What turns gradients into steps.", metavar="adamw|muon")]
DecayOption = Annotated[float, opt("Weight decay of the matrices.", metavar="X", min=0)]
SeedOption = Annotated[int, opt("Decides the first weights and the order of the windows.", min=0)]
WorkersOption = Annotated[int, opt("Threads; the result depends on them by rounding only.", min=1)]
TeacherOption = Annotated[
    str | None,
    opt(
        "Distil from this model, with its tokenizer.", "--teacher", "--draft-of", metavar="NAME|DIR"
    ),
]
StartOption = Annotated[
    str | None, opt("Go on from this model's weights, with its tokenizer.", metavar="NAME|DIR")
]
StartShareOption = Annotated[
    float,
    opt(
        "Share of those first weights in what is stored: a mean of two ends.",
        metavar="X",
        min=0,
        max=1,
    ),
]
AlphaOption = Annotated[
    float, opt("Weight of the teacher against the text.", metavar="X", min=0, max=1)
]
TeacherFromOption = Annotated[
    int, opt("Step at which distillation begins; the text alone before.", min=0)
]
EvaluateEveryOption = Annotated[int, opt("Steps between looks at the held-out text.", min=1)]
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
    """Train a small model of one's own.

    It starts from random weights and ends as a Hugging Face directory with tokenizer, card,
    manifest and curve.

    An interrupted run goes on from its last checkpoint when the same command is given
    again. Windows of --length tokens come first, then windows of --long-length; of the
    standard library's own text, its code is read four times for each time that its tests
    are, and alone at the end.

    \b
    A small model in a few minutes, then a look at it:
      refllm train --output tiny --width 128 --layers 2 --steps 600
      refllm generate --model ./tiny 'def main(' --temperature 0.8
    Models like the bundled ones (hours; their cards have the full commands, run by run):
      refllm train --output stdlib
      refllm train --output stdlib-draft --width 64 --layers 2 --heads 4 \\
        --teacher ./stdlib --teacher-from 3000
    One's own text:
      refllm train --output mine --data ~/notes --vocab-size 2048 --steps 2000
    """
    from refllm.backend import get
    from refllm.checkpoints.loading import locate
    from refllm.jobs import train
    from refllm.train.data import own_files, standard_library
    from refllm.train.optimizer import OPTIMIZERS, SCHEDULES
    from refllm.train.schedule import Plan

    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
    if not 0 < rate < 1:
        raise ValueError(f"the learning rate must be within (0, 1), got {rate}")
    # this and the next before the text is read: what cannot end well should end at once
    get(backend)
    output = Path(os.path.expanduser(output))  # the shell leaves the ~ of --output=~/tiny as it is
    if output.name in ("", ".."):  # the folder that one stands in, or the one above
        output = Path(os.path.abspath(output))
    train.check_output(output, overwrite)
    if work is None:
        work = output.with_name(output.name + ".training")
    else:
        work = Path(os.path.expanduser(work))
    if start_share and start is None:
        raise ValueError("--start-share is a share of the weights of --start: name that model, too")
    if held_out and not data:
        raise ValueError(
            "--held-out belongs to --data; the standard library has its own held-out modules"
        )
    if data:
        source = own_files(data, held_out or ())
    else:
        source = standard_library(tests=tests, installers=installers)
    shape = train.Shape(
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
    run = train.prepare(
        output,
        work,
        source,
        shape,
        plan,
        overwrite=overwrite,
        teacher=None if teacher is None else locate(teacher),
        alpha=alpha,
        teacher_from=teacher_from,
        start=None if start is None else locate(start),
        note=note,
    )
    keep_freed_memory()
    _announce(run)
    with _display(run) as shown:
        record = train.go(
            run,
            command=command_line(context),
            backend=backend,
            overwrite=overwrite,
            start_share=start_share,
            **shown,
        )
    measured = record["measured"]
    print(
        f"{output}: {measured['bits per byte']:.3f} bits per byte on {measured['tokens']:,} held-out tokens"
    )
    note(
        f"the state of the run stays in {run.work} ({format_bytes(_size(run.work))}); remove it when you are done"
    )


def _phase(text: str) -> Phase:
    """``2500,8,256,4,1`` → 2,500 steps of 8 windows of 256 tokens, the streams repeated 4
    and 1 times an epoch.
    """
    from refllm.train.schedule import Phase

    try:
        steps, batch, length, *repeats = (int(word) for word in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"--phase takes STEPS,BATCH,LENGTH and the repeats of each stream, got {text!r}"
        ) from error
    return Phase(steps, batch, length, tuple(repeats))


def command_line(context: typer.Context) -> str:
    """The command with every setting that decides the result spelled out, so that later
    defaults do not matter.
    """
    left_out = {"output", "work", "overwrite", "backend", "evaluate_every", "save_every"}
    if context.params.get("phase"):  # they replace these
        left_out |= {"steps", "batch", "length", "long_steps", "long_length"}
    words = ["refllm", "train", "--output", Path(context.params["output"]).name]
    for parameter in context.command.params:
        name = str(parameter.name)
        value = context.params.get(name)
        if name in left_out or value is None or name not in context.params:
            continue
        flag = next(iter(parameter.opts))
        if isinstance(value, bool):
            words.append(flag if value else parameter.secondary_opts[0])
        elif isinstance(value, (list, tuple)):
            words += [word for item in value for word in (flag, str(item))]
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def _announce(run: Run) -> None:

    out = console(stderr=True)
    out.print(run.output.name, style="bold")
    text = "; ".join(
        f"{name}: {len(documents):,} documents, {len(stream):,} tokens"
        for (name, documents), stream in zip(run.data.streams.items(), run.streams, strict=True)
    )
    phases = ", then ".join(
        f"{p.steps:,} steps of {p.batch} × {p.length} tokens" for p in run.plan.phases if p.steps
    )
    lines = {
        "network": f"{run.config.summary}; {run.config.num_parameters:,} parameters",
        "text": f"{text}; held out: {len(run.held_out):,} tokens",
        "plan": phases,
        "state": f"{run.work}" + (f", continued after {run.done:,} steps" if run.done else ""),
    }
    if run.teacher is not None:
        lines["teacher"] = run.teacher.name
    pairs(out, lines)


@contextmanager
def _display(run: Run) -> Iterator[dict[str, Any]]:
    """Callbacks that print a row for each evaluation and, on a terminal, keep a bar below
    them; all to stderr.
    """
    from rich.progress import TextColumn

    bar = counted_bar(TextColumn("{task.fields[what]}"))
    task = bar.add_task("training", total=run.plan.steps, completed=run.done, what="")
    tokens_of = [p.batch * p.length for p in run.plan.phases for _ in range(p.steps)]
    meter = {"began": time.perf_counter(), "tokens": 0.0}

    def speed() -> float:
        return meter["tokens"] / max(1e-9, time.perf_counter() - meter["began"])

    def on_step(step: int, loss: float) -> None:
        meter["tokens"] += tokens_of[step - 1]
        bar.update(task, completed=step, what=f"loss {loss:.3f}  {speed():,.0f} tokens/s")

    def report(record: dict[str, float]) -> None:
        minutes, seconds = divmod(int(record["seconds"]), 60)
        held = record.get("held_out", float("nan"))
        row = (
            f"{int(record['step']):,}",
            f"{record['loss']:.3f}",
            f"{held:.3f}",
            f"{run.bits_per_byte(held):.3f}",
            f"{record['rate']:.2g}",
            f"{speed():,.0f}",
            f"{minutes}:{seconds:02}",
        )
        bar.console.print(_ROW.format(*row))

    def progress(what: str, done: int, total: int) -> None:
        bar.update(task, description=f"measuring: {what}", completed=done, total=total, what="")

    with bar:
        if run.done < run.plan.steps:
            head = ("step", "loss", "held out", "bits/byte", "rate", "tokens/s", "time")
            bar.console.print(_ROW.format(*head), style="dim")
        yield {"report": report, "on_step": on_step, "progress": progress}


def _size(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.iterdir() if p.is_file())
