"""What the commands share: options, progress bars, notes. Results go to stdout, everything
else to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from refllm.backend import ENVIRONMENT_VARIABLE
from refllm.terminal import console, printable

Advance = Callable[[int, int], None]  # (done, total)


def opt(text: str, *flags: str, **rules: Any) -> Any:
    """An option with its help first; numbers are called N in the help, whatever their
    range.
    """
    return typer.Option(*flags, help=text, **{"metavar": "N", **rules})


def flag(text: str, *flags: str) -> Any:
    """An option that is either there or not."""
    return typer.Option(*flags, help=text)


BackendOption = Annotated[
    str,
    opt(
        "Compute with NumPy, or CuPy on a GPU.",
        "--backend",
        metavar="numpy|cupy",
        envvar=ENVIRONMENT_VARIABLE,
    ),
]
ModelOption = Annotated[
    str, opt("A bundled model or a Hugging Face directory.", "--model", "-m", metavar="NAME|DIR")
]
AnyModelOption = Annotated[
    str,
    opt(
        "A bundled model, a Hugging Face directory or a GGUF file.",
        "--model",
        "-m",
        metavar="NAME|DIR|FILE",
    ),
]
JsonOption = Annotated[bool, flag("Print one JSON object instead of text.", "--json")]


def bar_column() -> Any:
    """The bar itself, in one quiet colour."""
    from rich.progress import BarColumn

    return BarColumn(30, complete_style="cyan", finished_style="cyan", pulse_style="cyan")


@contextmanager
def progress(what: str) -> Iterator[Advance]:
    """A bar on stderr while the block runs; yields what moves it. Nothing where stderr is
    no terminal.
    """
    err = console(stderr=True)
    if not err.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        bar_column(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def note(text: str) -> None:
    """One line about the run, to stderr, dim on a terminal."""
    console(stderr=True).print(text, style="dim")


def emit(text: str) -> None:
    """Write text to stdout at once; made printable on a terminal, untouched in a pipe."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
