"""How the next token is chosen: the options of commands that write text."""

from __future__ import annotations

from typing import Annotated

from refllm.cli.options import opt

TemperatureOption = Annotated[
    float, opt("0 takes the most probable token.", "--temperature", "-t", metavar="X")
]
TopKOption = Annotated[int, opt("Keep the N most probable tokens; 0 is off.")]
TopPOption = Annotated[
    float, opt("Keep the fewest tokens of this joint probability; 1 is off.", metavar="X")
]
MinPOption = Annotated[
    float, opt("Keep tokens of this share of the largest probability.", metavar="X")
]
RepetitionPenaltyOption = Annotated[
    float, opt("Above 1, tokens that already occurred become less likely.", metavar="X")
]
SeedOption = Annotated[
    int | None, opt("The same seed gives the same text.", min=0, show_default="a random one")
]


def seed_or_random(seed: int | None) -> int:
    """The seed that was given, or a random one, which a command can print."""
    import numpy as np

    return int(np.random.default_rng().integers(2**32)) if seed is None else seed
