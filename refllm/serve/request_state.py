"""What the engine keeps of a request beside the scheduler's sequences: random numbers, text,
drafters, its beam search and its output so far.

Each position of the output has its own uniform: token i is drawn with the i-th uniform of
the sequence's generator. So a token does not depend on the rest of the batch, on preemption
or on drafts.

| generator of sequence i | seeded by                                              |
|-------------------------|--------------------------------------------------------|
| i = 0                   | the request's seed, as ``Model.generate(…, rng=seed)`` |
| i > 0                   | (seed, i)                                              |

Left out: log-probabilities of the chosen tokens.
"""

from __future__ import annotations

from collections import abc
from dataclasses import replace

import numpy as np

from refllm.decode.logits_processors import LogitsProcessors, with_token_ids
from refllm.decode.speculative.interface import Drafter, ModelLike
from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.serve.beam_search import BeamSearch
from refllm.serve.detokenizer import Detokenizer
from refllm.serve.outputs import CompletionOutput, RequestOutput
from refllm.serve.plan import SampledTokens, SequenceUpdate
from refllm.serve.request import Request, Sequence

Callback = abc.Callable[[SequenceUpdate], object]


def validate_request(request: Request, config: ModelConfig) -> None:
    """ValueError if a model of this configuration can never serve the request."""
    prompt = request.prompt
    vocabulary = config.vocab_size
    context = config.max_position_embeddings
    largest = max(prompt)
    reason = None
    if largest >= vocabulary:
        reason = (
            f"token {largest} at position {prompt.index(largest)} of the prompt is outside the "
            f"vocabulary of {vocabulary}"
        )
    elif len(prompt) + request.max_tokens > context:
        reason = (
            f"{len(prompt)} prompt tokens plus max_tokens {request.max_tokens} exceed the model's "
            f"{context} positions: shorten one of them"
        )
    elif request.beam and (request.sampling.temperature or request.stop):
        reason = "a beam search neither samples nor stops at strings: leave both out"
    elif request.beam and request.n > vocabulary - len(config.eos_token_ids):
        reason = f"{request.n} beams need as many first tokens, of {vocabulary}"
    if reason is not None:
        raise InputError(f"request {request.request_id!r}: {reason}")


def logits_processors(request: Request, model: ModelLike) -> LogitsProcessors | None:
    """What changes the request's logits; None if nothing does. ValueError for a token outside
    the vocabulary, or a bad word without tokens.
    """
    processors = LogitsProcessors(with_token_ids(request.sampling, model.tokenizer))
    processors.check_vocabulary(model.config.vocab_size)
    return processors if processors.active else None


class SequenceState:
    """One sequence: its generator, its drafter, and its detokenizer if text is needed early."""

    def __init__(
        self,
        request: Request,
        index: int,
        seed: int,
        end_tokens: frozenset[int],
        detokenizer: Detokenizer | None,
        drafter: Drafter | None,
    ):
        self.request = request
        self.end_tokens = end_tokens
        self.detokenizer = detokenizer
        self.drafter = drafter
        self.rng = np.random.default_rng(seed if index == 0 else [seed, index])
        self._uniforms: list[float] = []

    def uniform(self, position: int) -> float:
        """The uniform that token ``position`` of the output is drawn with."""
        while len(self._uniforms) <= position:
            self._uniforms.append(self.rng.random())
        return self._uniforms[position]

    def consume(self, tokens: abc.Sequence[int]) -> SampledTokens:
        """The next tokens up to an end token, or to the one that completes a stop string."""
        if self.detokenizer is None and self.end_tokens.isdisjoint(tokens):
            return SampledTokens(tokens)
        for count, token in enumerate(tokens, 1):
            if token in self.end_tokens:
                return SampledTokens(tokens[:count], "stop")
            if self.detokenizer is not None:
                self.detokenizer.push(token)
                if self.detokenizer.stopped:
                    return SampledTokens(tokens[:count], "stop", self.detokenizer.matched)
        return SampledTokens(tokens)

    def take_text(self, finished: bool) -> str:
        """The text that is new since the last call; all that is left if the sequence has
        finished.
        """
        if self.detokenizer is None:
            return ""
        if finished:
            self.detokenizer.flush()
        return self.detokenizer.take()

    def roll_back(self, output: abc.Sequence[int]) -> None:
        """Discard what was consumed after ``output``: the step failed."""
        if self.detokenizer is not None:
            self.detokenizer.restart(output)


class RequestState:
    """A request while the engine serves it: the states of its sequences, and its output."""

    def __init__(
        self,
        request: Request,
        callback: Callback | None,
        model: ModelLike,
        make_drafter: abc.Callable[[], Drafter] | None = None,
        processors: LogitsProcessors | None = None,
    ):
        """``processors`` are those of ``logits_processors``."""
        self.request = request
        self.callback = callback
        self.seed = request.seed or 0  # the engine draws one for a request that has none
        self.tokenizer = model.tokenizer
        self.end_tokens: frozenset[int] = frozenset()
        if not request.ignore_eos:
            self.end_tokens = frozenset(model.config.eos_token_ids)
        self.processors = processors
        self.search = BeamSearch(request, self.end_tokens) if request.beam else None
        self.output = RequestOutput(request)
        self._make_drafter = make_drafter
        self._sequences: dict[int, SequenceState] = {}

    def sequence_state(self, index: int) -> SequenceState:
        """The state of sequence ``index``, made at the first call."""
        state = self._sequences.get(index)
        if state is None:
            detokenizer = None
            streams = self.callback is not None and self.search is None
            streams = streams and self.tokenizer.available
            if streams or self.request.stop:
                detokenizer = Detokenizer(self.tokenizer, self.request.stop)
            drafter = None if self._make_drafter is None else self._make_drafter()
            state = SequenceState(
                self.request, index, self.seed, self.end_tokens, detokenizer, drafter
            )
            self._sequences[index] = state
        return state

    def continuation_states(self, sequence: Sequence) -> list[SequenceState]:
        """One state for each continuation of the next token: n where a sequence forks."""
        if sequence.slots == 1 or self.search is not None:  # it does not fork here
            return [self.sequence_state(sequence.index)]
        indices = range(sequence.index, sequence.index + sequence.slots)
        return [self.sequence_state(index) for index in indices]

    def roll_back(self, sequence: Sequence) -> None:
        """The current step has failed: discard the text of the tokens sampled in it."""
        for state in self.continuation_states(sequence):
            state.roll_back(sequence.output)

    def record(self, update: SequenceUpdate) -> None:
        """Fill in the text of an update; keep the sequence's output if it has finished.

        Raises what the tokenizer raises, before the output is kept; never for a sequence
        that was aborted or has failed.
        """
        sequence = update.sequence
        if self.output.error is None:
            self.output.error = update.error
        if update.finish_reason in ("abort", "error"):
            self._record_cut_off(update)
            return
        state = self.sequence_state(sequence.index)
        update.text = state.take_text(finished=update.finish_reason is not None)
        if update.finish_reason is None:
            return
        # the text of a detokenizer ends before a stop string
        text = None if state.detokenizer is None else state.detokenizer.text
        self._add_output(sequence, text)
        self.output.preemptions += sequence.preemptions

    def _record_cut_off(self, update: SequenceUpdate) -> None:
        """Keep what a sequence has that was aborted or has failed, perhaps in the middle of a
        step: its text is decoded again, as its detokenizer may be ahead of its tokens.
        """
        sequence = update.sequence
        state = self._sequences.get(sequence.index)
        published = ""
        if state is not None and state.detokenizer is not None:
            published = state.detokenizer.text
        try:
            text = self._decode(sequence.output)
        except Exception:  # this may be the very reason why it has failed
            text = published
        if state is not None and state.detokenizer is not None:
            update.text = text[len(published) :]
        self._add_output(sequence, text)
        self.output.preemptions += sequence.preemptions

    def _decode(self, tokens: abc.Sequence[int]) -> str:
        """The text of an output, up to a stop string."""
        detokenizer = Detokenizer(self.tokenizer, self.request.stop)
        for token in tokens:
            detokenizer.push(token)
        detokenizer.flush()
        return detokenizer.take()

    def mark_failed(self, update: SequenceUpdate) -> None:
        """The output of an update is kept already, and could not be delivered."""
        self.output.outputs = [
            replace(output, finish_reason="error") if output.index == update.index else output
            for output in self.output.outputs
        ]

    def finish_search(self, dropped: list[Sequence]) -> list[SequenceUpdate]:
        """The search is over, and its beams were ``dropped``: one update for each hypothesis,
        the best first.
        """
        assert self.search is not None
        updates = []
        for rank, (score, tokens, finish_reason) in enumerate(self.search.best):
            found = Sequence(self.request, rank, dropped[0].order)
            found.tokens += tokens
            found.finish(finish_reason)
            text = self._add_output(found, None, score)
            updates.append(SequenceUpdate(found, tokens, finish_reason, text))
        return updates

    def _add_output(self, sequence: Sequence, text: str | None, score: float | None = None) -> str:
        """Keep the output of a finished sequence, without its end token; returns its text."""
        tokens = sequence.output
        assert sequence.finish_reason is not None
        if sequence.finish_reason == "stop" and not isinstance(sequence.stop_reason, str):
            tokens = tokens[:-1]
        if text is None and self.tokenizer.available:
            text = self.tokenizer.decode(tokens)
        text = text or ""  # ids alone
        self.output.outputs.append(
            CompletionOutput(
                sequence.index, tokens, text, sequence.finish_reason, sequence.stop_reason, score
            )
        )
        return text
