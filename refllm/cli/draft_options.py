"""Speculative decoding on the command line: which drafter ``--draft`` names, drafted tokens in
colour as they are verified, and the statistics at the end.

On a terminal the text appears step by step: accepted drafts in green, rejected ones in red and
struck through, and the token that the target chose itself in the terminal's own colour.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refllm.cli.options import flag, opt
from refllm.errors import InputError
from refllm.terminal import printable

if TYPE_CHECKING:
    from refllm.checkpoints.tokenizer import Tokenizer
    from refllm.decode.speculative.interface import Drafter
    from refllm.decode.speculative.loop import SpeculativeStep

DraftOption = Annotated[
    str | None,
    opt(
        "Speculate: a draft model, ngram, or several separated by commas, asked in turn.",
        metavar="NAME|DIR|ngram[,…]",
        show_default="off",
    ),
]
GammaOption = Annotated[
    int | None, opt("Drafted tokens per step.", min=1, show_default="4; ngram: 8; tree: 3")
]
TreeOption = Annotated[
    bool, flag("Draft a tree: a chain while the draft is confident, then a fan.", "--tree")
]


def drafter_from_options(
    names: str | None, gamma: int | None, tree: bool, backend: str
) -> Drafter | None:
    """The drafter that ``--draft`` names: n-grams, a draft model, or several asked in turn.

    γ is ``gamma`` or the drafter's own default. With ``tree`` models propose trees. None
    without ``--draft``; ValueError for options that do not fit together.
    """
    from refllm.api import load
    from refllm.decode.speculative.cascade import Cascade
    from refllm.decode.speculative.model_drafter import ModelDrafter
    from refllm.decode.speculative.ngram_drafter import NGramDrafter
    from refllm.decode.speculative.tree_drafter import TreeDrafter

    if names is None:
        if gamma is not None:
            raise InputError("--gamma is the number of drafted tokens: add --draft")
        if tree:
            raise InputError("--tree says how a model drafts: name the model with --draft")
        return None
    if Path(names).is_dir():
        wanted = [names]
    else:
        wanted = [name.strip() for name in names.split(",")]
    if not all(wanted):
        raise InputError(f"--draft takes names separated by commas, got {names!r}")
    if tree and set(wanted) == {"ngram"}:
        raise InputError("--tree needs a draft model, and ngram is none: name one with --draft")
    gammas = () if gamma is None else (gamma,)
    model_drafter = TreeDrafter if tree else ModelDrafter
    drafters: list[Drafter] = []
    for name in wanted:
        if name == "ngram":
            drafters.append(NGramDrafter(*gammas))
        else:
            drafters.append(model_drafter(load(name, backend), *gammas))
    if len(drafters) == 1:
        return drafters[0]
    return Cascade(*drafters)


class DraftDisplay:
    """Counts the steps of speculative decoding and colours the text by their outcome."""

    def __init__(self, tokenizer: Tokenizer):
        from refllm.decode.detokenizer import Utf8Stream
        from refllm.decode.speculative.acceptance import Acceptance

        self.tokenizer = tokenizer
        self.stats = Acceptance()
        self._characters = Utf8Stream(tokenizer)
        self._marked: deque[tuple[str, str]] = deque()  # (text, "accepted" | "rejected" | "chosen")

    def record(self, step: SpeculativeStep) -> None:
        """Take a step of the target; the first is the prefill's, which drafts nothing."""
        self.stats.add(len(step.drafts), step.accepted, step.judged)
        for token in step.drafts[: step.accepted]:
            self._marked.append((self._characters.push(token), "accepted"))
        if rejected := step.drafts[step.accepted :]:
            self._marked.append((self.tokenizer.decode(rejected), "rejected"))
        self._marked.append((self._characters.push(step.token), "chosen"))

    def coloured(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces of a stream in colour, with rejected drafts between them.

        The pieces hold the same characters as the recorded tokens, in the same order; where
        the text ends (an end token, a stop string) is the stream's decision.
        """
        for piece in pieces:
            left = len(piece)  # characters of the piece that are not printed yet
            while left and self._marked:
                text, outcome = self._marked.popleft()
                if outcome == "rejected":
                    yield typer.style(printable(text), fg="red", strikethrough=True)
                    continue
                if len(text) > left:
                    self._marked.appendleft((text[left:], outcome))
                    text = text[:left]
                left -= len(text)
                if text and outcome == "accepted":
                    yield typer.style(printable(text), fg="green")
                elif text:
                    yield printable(text)

    def summary(self) -> str:
        """One line: drafted and accepted tokens, and tokens per step."""
        s = self.stats
        return (
            f"{s.accepted} of {s.proposed} drafted tokens accepted ({s.rate:.0%}; "
            f"{s.alpha:.0%} of those that were verified), {s.length:.2f} tokens per target "
            "step"
        )
