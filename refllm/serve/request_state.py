"""What the engine keeps of a sequence beside its tokens: its random numbers, its text so far,
when that ends.

Random numbers belong to places: token i of the output is drawn with uniform i of the
sequence's own generator. So what is drawn does not depend on who else is in the batch, on
preemption, or on drafts.

| generator of sequence i      | seeded by                                                                |
|----------------------------|--------------------------------------------------------------------------|
| i = 0                      | the request's seed: the same tokens as ``Model.generate(…, rng=seed)``   |
| i > 0                      | (seed, i)                                                                |

Left out: log-probabilities of what was chosen.

<<MERGED>> A request while the engine serves it: voices of its sequences, its search, what it
has said so far; and the seams.

| seam       | who fills it                                                                       |
|------------|------------------------------------------------------------------------------------|
| Record     | what is served: a ``Model``, or any record of config, weights and tokenizer        |
| Drafter    | ``decode.speculative.drafters``: guesses next tokens; the engine verifies them in one step       |
| StreamCallback   | hears each ``StreamChunk`` as it comes                                                   |
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from typing import Protocol

import numpy as np

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.detokenizer import StopStrings, Utf8Stream
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.interface import Drafter
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights
from refllm.serve.beam_search import BeamSearch
from refllm.serve.outputs import CompletionOutput, RequestOutput, StreamChunk
from refllm.serve.plan import SampledTokens, SequenceUpdate
from refllm.serve.request import Request, Sequence


class SequenceState:
    """One sequence as its reader hears it. ``seed`` is the request's own or one that the
    engine drew for it.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        seed: int,
        tokenizer: Tokenizer,
        ends: frozenset[int],
        text: bool,
    ):
        self.request = request
        self.tokenizer = tokenizer
        self.ends = ends
        # text is made while it grows only if somebody looks
        self.streams = text or bool(request.stop)
        self.rng = np.random.default_rng(seed if index == 0 else [seed, index])
        self.drafter: Drafter | None = None
        self.how = SamplingParams(
            request.temperature,
            request.top_k,
            request.top_p,
            request.min_p,
            request.repetition_penalty,
        )
        self._uniforms: list[float] = []
        self.text = ""  # taken, and heard since
        self._piece = ""
        self._characters = Utf8Stream(tokenizer)
        self._stops = StopStrings(request.stop)

    def uniform(self, place: int) -> float:
        """The uniform that token ``place`` of the output is drawn with."""
        while len(self._uniforms) <= place:
            self._uniforms.append(self.rng.random())
        return self._uniforms[place]

    def hear(self, tokens: abc.Sequence[int]) -> SampledTokens:
        """The next tokens as far as the text goes: up to an end token, or the one that
        completes a stop string.
        """
        if not self.streams and self.ends.isdisjoint(tokens):
            return SampledTokens(tokens)
        for i, token in enumerate(tokens):
            if token in self.ends:
                self._flush()
                return SampledTokens(tokens[: i + 1], "end")
            if self.streams:
                self._piece += self._stops.push(self._characters.push(token))
                if self._stops.stopped:
                    return SampledTokens(tokens[: i + 1], "stop")
        return SampledTokens(tokens)

    def take(self, ended: bool) -> str:
        """The text that is new since it was taken the last time; all of it if no more will
        come.
        """
        if not self.streams:
            return ""
        if ended:
            self._flush()
        piece = self._piece
        self._piece = ""
        self.text += piece
        return piece

    def rewind(self, output: abc.Sequence[int]) -> None:
        """Back to where the text of ``output`` was taken: what was heard since has not
        happened.
        """
        self._characters = Utf8Stream(self.tokenizer)
        self._stops = StopStrings(self.request.stop)
        self.text = ""
        self._piece = ""
        self.hear(output)
        self.text = self._piece
        self._piece = ""

    def _flush(self) -> None:
        if self.streams and not self._stops.stopped:
            self._piece += self._stops.push(self._characters.flush())
            if not self._stops.stopped:
                self._piece += self._stops.flush()

    def said(self, output: abc.Sequence[int], reason: str) -> tuple[list[int], str]:
        """(tokens, text) of a whole output: without its end token; the text without its
        stop string.
        """
        tokens = list(output[:-1] if reason == "end" else output)
        return tokens, self.text if self.streams else self.tokenizer.decode(tokens)


StreamCallback = Callable[[StreamChunk], object]


class Record(Protocol):
    """What is served."""

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer


def refuse(request: Request, config: ModelConfig) -> None:
    """ValueError if a model of this kind can never serve the request; the message says why."""
    name = request.id
    prompt = request.prompt
    vocab = config.vocab_size
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
            raise ValueError(
                f"request {name!r}: a beam search neither samples nor stops at strings: leave both out"
            )
        if request.n > vocab - len(config.eos_token_ids):
            raise ValueError(
                f"request {name!r}: {request.n} beams need as many tokens to begin with, of {vocab}"
            )


class RequestState:
    """What the engine knows of a request beside its sequences."""

    def __init__(
        self,
        request: Request,
        listener: StreamCallback | None,
        seed: int,
        model: Record,
        drafter: Callable[[], Drafter] | None = None,
    ):
        self.request = request
        self.listener = listener
        self.seed = seed
        self.tokenizer = model.tokenizer
        self._drafter = drafter
        self.ends = frozenset() if request.ignore_eos else frozenset(model.config.eos_token_ids)
        self.search = BeamSearch(request, self.ends) if request.beam else None
        self.result = RequestOutput(request)
        self._voices: dict[int, SequenceState] = {}

    def voice(self, index: int) -> SequenceState:
        """The voice of sequence ``index``."""
        voice = self._voices.get(index)
        if voice is None:
            text = self.listener is not None and self.search is None
            voice = SequenceState(self.request, index, self.seed, self.tokenizer, self.ends, text)
            voice.drafter = None if self._drafter is None else self._drafter()
            self._voices[index] = voice
        return voice

    def voices_of(self, sequence: Sequence) -> list[SequenceState]:
        """One for each continuation that the sequence's next token may have: n where it is to
        fork into n.
        """
        together = sequence.seats if self.search is None else 1
        if together == 1:  # as a rule
            return [self.voice(sequence.index)]
        return [self.voice(sequence.index + i) for i in range(together)]

    def rewind(self, sequence: Sequence) -> None:
        """The step under way has failed: what its voices heard in it was not said."""
        for voice in self.voices_of(sequence):
            voice.rewind(sequence.output)

    def hear(self, event: SequenceUpdate) -> StreamChunk:
        """Tokens that a sequence has got; its output, if it ended with them."""
        sequence, tokens, reason = event
        voice = self.voice(sequence.index)
        text = voice.take(ended=reason is not None)
        if reason is not None:
            said, whole = voice.said(sequence.output, reason)
            self.result.outputs.append(CompletionOutput(sequence.index, said, whole, reason))
            self.result.preemptions += sequence.preemptions
        return StreamChunk(self.request.id, sequence.index, tokens, text, reason)

    def found(self, beams: abc.Sequence[Sequence]) -> list[StreamChunk]:
        """The search is over, ``beams`` were dropped: its hypotheses, the best first."""
        assert self.search is not None
        pieces = []
        for index, (score, tokens, reason) in enumerate(self.search.best):
            said = tokens[:-1] if reason == "end" else tokens
            text = self.tokenizer.decode(said)
            self.result.outputs.append(CompletionOutput(index, said, text, reason, score))
            pieces.append(StreamChunk(self.request.id, index, tokens, text, reason))
        self.result.preemptions += sum(sequence.preemptions for sequence in beams)
        return pieces
