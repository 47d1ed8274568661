"""The command line: ``refllm info | generate | eval | train | quantize | convert | tour |
figures``.

One file a command; what they share is in ``terminal`` (what is printed, and where) and
``errors`` (what becomes of bad input). A command imports what it needs when it runs, so
that ``refllm --help`` is there at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from refllm import __version__
from refllm.cli.convert import convert as convert_command
from refllm.cli.errors import Commands
from refllm.cli.evaluate import evaluate as evaluate_command
from refllm.cli.figures import figures as figures_command
from refllm.cli.generate import generate as generate_command
from refllm.cli.info import info as info_command
from refllm.cli.quantize import quantize as quantize_command
from refllm.cli.simulate import simulate as simulate_command
from refllm.cli.tour import tour as tour_command
from refllm.cli.train import train as train_command

app = typer.Typer(
    name="refllm",
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,  # help as plain text: the same in a terminal, a pipe and a README
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.")
    ] = False,
) -> None:
    """The deployment stack of a language model in readable NumPy, on a GPU through CuPy.

    Every command takes --help, which shows examples. To begin: refllm tour
    """
    if version:
        typer.echo(f"refllm {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("tour")(tour_command)
app.command("info")(info_command)
app.command("generate")(generate_command)
app.command("eval")(evaluate_command)
app.command("train")(train_command)
app.command("convert")(convert_command)
app.command("quantize")(quantize_command)
app.command("simulate")(simulate_command)
app.command("figures")(figures_command)
