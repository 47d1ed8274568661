"""A request while the engine serves it: voices of its branches, its search, what it has said so far; and the seams.

| seam       | who fills it                                                                       |
|------------|------------------------------------------------------------------------------------|
| Record     | what is served: a ``Model``, or any record of config, weights and tokenizer        |
| Drafter    | ``decode.speculative.drafters``: guesses next tokens; the engine verifies them in one step       |
| Listener   | hears each ``Piece`` as it comes                                                   |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.speculative.drafters import Drafter
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights
from refllm.serve.beam_search import Search
from refllm.serve.outputs import Output, Piece, Result
from refllm.serve.request import Branch, Request
from refllm.serve.step import Event
from refllm.serve.voice import Voice

Listener = Callable[[Piece], object]


class Record(Protocol):
    """What is served."""

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer


def refuse(request: Request, config: ModelConfig) -> None:
    """ValueError if a model of this kind can never serve the request; the message says why."""
    name, prompt, vocab = request.id, request.prompt, config.vocab_size
    high = max(prompt)
    if high >= vocab:
        raise ValueError(
            f"request {name!r}: token {high} at position {prompt.index(high)} of the prompt is outside the vocabulary "
            f"of {vocab}"
        )
    if len(prompt) + request.max_tokens > config.max_position_embeddings:
        raise ValueError(
            f"request {name!r}: {len(prompt)} prompt tokens plus max_tokens {request.max_tokens} exceed the model's "
            f"{config.max_position_embeddings} positions: shorten one of them"
        )
    if request.beam:
        if request.temperature or request.stop:
            raise ValueError(f"request {name!r}: a beam search neither samples nor stops at strings: leave both out")
        if request.n > vocab - len(config.eos_token_ids):
            raise ValueError(f"request {name!r}: {request.n} beams need as many tokens to begin with, of {vocab}")


class Live:
    """What the engine knows of a request beside its branches."""

    def __init__(
        self, request: Request, listener: Listener | None, seed: int, model: Record,
        drafter: Callable[[], Drafter] | None = None,
    ):  # fmt: skip
        self.request, self.listener, self.seed, self.tokenizer = request, listener, seed, model.tokenizer
        self._drafter = drafter
        self.ends = frozenset() if request.ignore_eos else frozenset(model.config.eos_token_ids)
        self.search = Search(request, self.ends) if request.beam else None
        self.result = Result(request)
        self._voices: dict[int, Voice] = {}

    def voice(self, index: int) -> Voice:
        """The voice of branch ``index``."""
        voice = self._voices.get(index)
        if voice is None:
            text = self.listener is not None and self.search is None
            voice = Voice(self.request, index, self.seed, self.tokenizer, self.ends, text)
            voice.drafter = None if self._drafter is None else self._drafter()
            self._voices[index] = voice
        return voice

    def voices_of(self, branch: Branch) -> list[Voice]:
        """One for each continuation that the branch's next token may have: n where it is to fork into n."""
        together = branch.seats if self.search is None else 1
        if together == 1:  # as a rule
            return [self.voice(branch.index)]
        return [self.voice(branch.index + i) for i in range(together)]

    def rewind(self, branch: Branch) -> None:
        """The step under way has failed: what its voices heard in it was not said."""
        for voice in self.voices_of(branch):
            voice.rewind(branch.output)

    def hear(self, event: Event) -> Piece:
        """Tokens that a branch has got; its output, if it ended with them."""
        branch, tokens, reason = event
        voice = self.voice(branch.index)
        text = voice.take(ended=reason is not None)
        if reason is not None:
            said, whole = voice.said(branch.output, reason)
            self.result.outputs.append(Output(branch.index, said, whole, reason))
            self.result.preemptions += branch.preemptions
        return Piece(self.request.id, branch.index, tokens, text, reason)

    def found(self, beams: Sequence[Branch]) -> list[Piece]:
        """The search is over, ``beams`` were dropped: its hypotheses, the best first."""
        assert self.search is not None
        pieces = []
        for index, (score, tokens, reason) in enumerate(self.search.best):
            said = tokens[:-1] if reason == "end" else tokens
            text = self.tokenizer.decode(said)
            self.result.outputs.append(Output(index, said, text, reason, score))
            pieces.append(Piece(self.request.id, index, tokens, text, reason))
        self.result.preemptions += sum(branch.preemptions for branch in beams)
        return pieces
