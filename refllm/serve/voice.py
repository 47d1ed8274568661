"""What the engine keeps of a branch beside its tokens: its random numbers, its text so far, when that ends.

Random numbers belong to places: token i of the output is drawn with uniform i of the branch's own generator. So what
is drawn does not depend on who else is in the batch, on preemption, or on drafts.

| generator of branch i      | seeded by                                                                |
|----------------------------|--------------------------------------------------------------------------|
| i = 0                      | the request's seed: the same tokens as ``Model.generate(…, rng=seed)``   |
| i > 0                      | (seed, i)                                                                |

Left out: log-probabilities of what was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.generate import Sampling
from refllm.decode.speculative.drafters import Drafter
from refllm.decode.text import StopStrings, Utf8Stream
from refllm.serve.request import Request
from refllm.serve.step import Continuation


class Voice:
    """One branch as its reader hears it. ``seed`` is the request's own or one that the engine drew for it."""

    def __init__(self, request: Request, index: int, seed: int, tokenizer: Tokenizer, ends: frozenset[int], text: bool):
        self.request, self.tokenizer, self.ends = request, tokenizer, ends
        self.streams = text or bool(request.stop)  # text is made while it grows only if somebody looks
        self.rng = np.random.default_rng(seed if index == 0 else [seed, index])
        self.drafter: Drafter | None = None
        self.how = Sampling(
            request.temperature, request.top_k, request.top_p, request.min_p, request.repetition_penalty
        )
        self._uniforms: list[float] = []
        self.text = self._piece = ""  # taken, and heard since
        self._characters, self._stops = Utf8Stream(tokenizer), StopStrings(request.stop)

    def uniform(self, place: int) -> float:
        """The uniform that token ``place`` of the output is drawn with."""
        while len(self._uniforms) <= place:
            self._uniforms.append(self.rng.random())
        return self._uniforms[place]

    def hear(self, tokens: Sequence[int]) -> Continuation:
        """The next tokens as far as the text goes: up to an end token, or the one that completes a stop string."""
        if not self.streams and self.ends.isdisjoint(tokens):
            return Continuation(tokens)
        for i, token in enumerate(tokens):
            if token in self.ends:
                self._flush()
                return Continuation(tokens[: i + 1], "end")
            if self.streams:
                self._piece += self._stops.push(self._characters.push(token))
                if self._stops.stopped:
                    return Continuation(tokens[: i + 1], "stop")
        return Continuation(tokens)

    def take(self, ended: bool) -> str:
        """The text that is new since it was taken the last time; all of it if no more will come."""
        if not self.streams:
            return ""
        if ended:
            self._flush()
        piece, self._piece = self._piece, ""
        self.text += piece
        return piece

    def rewind(self, output: Sequence[int]) -> None:
        """Back to where the text of ``output`` was taken: what was heard since has not happened."""
        self._characters, self._stops = Utf8Stream(self.tokenizer), StopStrings(self.request.stop)
        self.text = self._piece = ""
        self.hear(output)
        self.text, self._piece = self._piece, ""

    def _flush(self) -> None:
        if self.streams and not self._stops.stopped:
            self._piece += self._stops.push(self._characters.flush())
            if not self._stops.stopped:
                self._piece += self._stops.flush()

    def said(self, output: Sequence[int], reason: str) -> tuple[list[int], str]:
        """(tokens, text) of a whole output: without its end token; the text without its stop string."""
        tokens = list(output[:-1] if reason == "end" else output)
        return tokens, self.text if self.streams else self.tokenizer.decode(tokens)
