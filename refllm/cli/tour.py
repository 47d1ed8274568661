"""``refllm tour``: what refllm does, on the bundled model, in a minute and a half."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from refllm.cli.options import BackendOption, ModelOption, flag, opt
from refllm.terminal import console

StopOption = Annotated[
    list[str] | None, opt("Visit this stop only; may be repeated.", metavar="NAME")
]
ListOption = Annotated[bool, flag("List the stops and exit.", "--list")]
OutputOption = Annotated[Path, opt("The folder for figures.", metavar="DIR")]


def tour(
    stop: StopOption = None,
    listed: ListOption = False,
    output: OutputOption = Path("figures/tour"),
    model: ModelOption = "stdlib",
    backend: BackendOption = "numpy",
) -> None:
    """See refllm at work, in a minute and a half.

    Every number is computed while you watch, on this machine.

    \b
    Examples:
      refllm tour
      refllm tour --stop write --stop measure
      refllm tour --model ./my-model --output /tmp/figures
    """
    from refllm.tour.context import Tour
    from refllm.tour.stops import STOPS, run

    if listed:
        for place in STOPS:
            console().print(f"{place.name:10} {place.title}")
        return
    run(Tour(model, backend, output, console(prose=True)), stop or ())
