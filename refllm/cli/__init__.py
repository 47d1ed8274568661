"""The command line: how does a user reach all of this without writing Python?

Read ``generate`` first: it loads a model, makes the sampling parameters and prints a
stream. Heavy imports stand inside the commands, so that ``refllm --help`` starts at once.

- ``main``           the root: version and help, exceptions as messages, the process's memory
- ``options``        options that several commands share; ``threads``: how many threads compute
- ``generate``       ``refllm generate``: continue a prompt; ``sampling_options``,
                     ``draft_options`` (speculation) and ``cache_options`` (smaller KV caches)
                     belong to it
- ``chat``           ``refllm chat``: talk to a chat model; ``chat_loop`` reads and answers
- ``evaluate``       ``refllm eval``: perplexity, bits per byte, KL to a reference model
- ``info``           ``refllm info``: what a checkpoint holds, found by ``model_facts`` and
                     ``model_oddities``
- ``quantize``       ``refllm quantize``: a checkpoint in fewer bits
- ``convert``        ``refllm convert``: a checkpoint as a GGUF file
- ``train``          ``refllm train``: a small model from text files
- ``simulate``       ``refllm simulate``: serving with a clock instead of a model
- ``figures``        ``refllm figures``: draw the committed figures
- ``tour``           ``refllm tour``: everything on the bundled model
"""

from __future__ import annotations

import typer

from refllm.cli.chat import chat as chat_command
from refllm.cli.convert import convert as convert_command
from refllm.cli.evaluate import evaluate as evaluate_command
from refllm.cli.figures import figures as figures_command
from refllm.cli.generate import generate as generate_command
from refllm.cli.info import info as info_command
from refllm.cli.main import Commands, version_or_help
from refllm.cli.quantize import quantize as quantize_command
from refllm.cli.simulate import simulate as simulate_command
from refllm.cli.tour import tour as tour_command
from refllm.cli.train import train as train_command

__all__ = ["app"]

app = typer.Typer(
    name="refllm",
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,  # help as plain text: the same in a terminal, a pipe and a README
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.callback(invoke_without_command=True)(version_or_help)
app.command("tour")(tour_command)
app.command("info")(info_command)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("eval")(evaluate_command)
app.command("train")(train_command)
app.command("convert")(convert_command)
app.command("quantize")(quantize_command)
app.command("simulate")(simulate_command)
app.command("figures")(figures_command)
