"""``refllm figures``: draw the committed figures, or check that they are up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from refllm.cli.options import BackendOption, flag, opt
from refllm.errors import InputError

CheckOption = Annotated[bool, flag("Draw nothing; fail if a figure is out of date.", "--check")]
OutputOption = Annotated[Path, opt("The folder of the figures.", metavar="DIR")]


def figures(
    check: CheckOption = False,
    output: OutputOption = Path("figures"),
    backend: BackendOption = "numpy",
) -> None:
    """Draw the project's figures.

    They are drawn from the recorded numbers in the folder's data/, each with the command
    that made them. --check ends with exit code 1 and one sentence for each figure that is
    missing or out of date.

    \b
    Examples:
      refllm figures
      refllm figures --check
    """
    from refllm.backend import get

    get(backend)
    if not (output / "data").is_dir():
        raise InputError(
            f"{output} has no data/ to draw from: run this in the repository, or name the "
            "folder with --output"
        )
    from refllm.figures import registry

    if check:
        complaints = registry.check(output)
        for complaint in complaints:
            typer.echo(complaint)
        raise typer.Exit(int(bool(complaints)))
    for path in registry.redraw(folder=output):
        typer.echo(path)
