"""Speculation on the command line: who drafts, drafted tokens in colour as they are judged,
and the count at the end.

The colours are on a terminal only. There the text comes step by step: what was accepted in
green, in red and struck through what was drafted and rejected, and in the terminal's own
colour the token that the target chose itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from refllm.terminal import printable

if TYPE_CHECKING:
    from refllm.checkpoints.tokenizer import Tokenizer
    from refllm.decode.speculative.loop import Step


def draft_named(names: str, gamma: int | None, tree: bool, backend: str) -> Any:
    """The drafter that ``--draft`` names: ``ngram``, a draft model, or several, asked in
    turn; γ as given, or its own.

    With ``tree`` a model proposes trees.
    """
    from refllm.api import load
    from refllm.decode.speculative.drafters import Cascade, ModelDrafter, NGramDrafter
    from refllm.decode.speculative.tree_drafter import TreeDrafter

    options: Any = {} if gamma is None else {"gamma": gamma}
    kind = TreeDrafter if tree else ModelDrafter
    if Path(names).is_dir():
        wanted = [names]
    else:
        wanted = [name.strip() for name in names.split(",")]
    if not all(wanted):
        raise ValueError(f"--draft names drafters with commas between them, got {names!r}")
    if tree and set(wanted) == {"ngram"}:
        raise ValueError(
            "--tree says how a draft model drafts, and n-grams are none: name one with --draft"
        )
    drafters = [
        NGramDrafter(**options) if name == "ngram" else kind(load(name, backend), **options)
        for name in wanted
    ]
    if len(drafters) == 1:
        return drafters[0]
    return Cascade(*drafters)


class Speculation:
    """Counts steps as they are judged, and colours the text by them."""

    def __init__(self, drafter: Any, tokenizer: Tokenizer):
        from refllm.decode.detokenizer import Utf8Stream
        from refllm.decode.speculative.acceptance import Acceptance

        self.drafter = drafter
        self.tokenizer = tokenizer
        self.stats = Acceptance()
        self._characters = Utf8Stream(tokenizer)
        # (text, what it is), of the steps that were judged
        self._marked: deque[tuple[str, str]] = deque()

    def judged(self, step: Step) -> None:
        """A step of the target; the first is the prefill's, which drafts nothing."""
        self.stats.add(len(step.drafts), step.accepted, step.judged)
        for token in step.drafts[: step.accepted]:
            self._marked.append((self._characters.push(token), "accepted"))
        if rejected := step.drafts[step.accepted :]:
            self._marked.append((self.tokenizer.decode(rejected), "rejected"))
        self._marked.append((self._characters.push(step.token), "chosen"))

    def shown(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces of a stream in colour, and between them what was rejected there.

        They hold the same characters as the tokens that were judged, in the same order;
        where the text ends (an end token, a stop string) is their business.
        """
        for piece in pieces:
            left = len(piece)
            while left and self._marked:
                text, kind = self._marked.popleft()
                if kind == "rejected":
                    yield typer.style(printable(text), fg="red", strikethrough=True)
                    continue
                if len(text) > left:
                    self._marked.appendleft((text[left:], kind))
                    text = text[:left]
                left -= len(text)
                if text:
                    yield (
                        typer.style(printable(text), fg="green")
                        if kind == "accepted"
                        else printable(text)
                    )

    def summary(self) -> str:
        """One line: what was drafted, what of it was accepted, and tokens a step."""
        s = self.stats
        return (
            f"{s.accepted} of {s.proposed} drafted tokens accepted ({s.rate:.0%}; {s.alpha:.0%} of those that were "
            f"judged), {s.length:.2f} tokens a step of the target"
        )
