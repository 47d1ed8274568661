"""What the engine keeps of a request beside the scheduler's sequences: random numbers, text,
drafters, its beam search and its output so far.

Each position of the output has its own uniform: token i is drawn with the i-th uniform of
the sequence's generator. So a token does not depend on the rest of the batch, on preemption
or on drafts.

| generator of sequence i | seeded by                                              |
|-------------------------|--------------------------------------------------------|
| i = 0                   | the request's seed, as ``Model.generate(…, rng=seed)`` |
| i > 0                   | (seed, i)                                              |
"""

from __future__ import annotations

import time
from collections import abc
from dataclasses import replace

import numpy as np

from refllm.decode.completion import CompletionOutput, OutputRules, output_rules
from refllm.decode.constraint import ConstraintStates
from refllm.decode.jump_forward import JumpForward
from refllm.decode.logprobs import TokenLogprobs
from refllm.decode.output_params import StopTokens
from refllm.decode.speculative.interface import DraftConstraint, Drafter, ModelLike
from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.serve.beam_search import BeamSearch
from refllm.serve.detokenizer import Detokenizer
from refllm.serve.outputs import RequestOutput
from refllm.serve.plan import SampledTokens, SequenceUpdate
from refllm.serve.request import Request, Sequence

Callback = abc.Callable[[SequenceUpdate], object]


def validate_request(request: Request, config: ModelConfig) -> None:
    """ValueError if a model of this configuration can never serve the request."""
    prompt = request.prompt_ids
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
    elif request.beam and request.sampling.temperature:
        reason = "a beam search does not sample: leave the temperature out"
    elif request.beam and request.n > vocabulary - len(config.eos_token_ids):
        reason = f"{request.n} beams need as many first tokens, of {vocabulary}"
    if reason is not None:
        raise InputError(f"request {request.request_id!r}: {reason}")


def rules_of(request: Request, model: ModelLike) -> OutputRules:
    """What ends the request's outputs, and what changes their logits; ValueError names the
    request.
    """
    try:
        return output_rules(
            request.output, request.sampling, model, request.grammar, request.num_sequences
        )
    except InputError as error:
        raise InputError(f"request {request.request_id!r}: {error}") from None


class SequenceState:
    """One sequence: its generator, its drafter, and its detokenizer if text is needed early."""

    def __init__(
        self,
        request: Request,
        index: int,
        seed: int,
        stops: StopTokens,
        detokenizer: Detokenizer | None,
        drafter: Drafter | None,
        constraint: ConstraintStates | None = None,
        jump: JumpForward | None = None,
    ):
        self.request = request
        self.constraint = constraint
        self.jump = jump
        self.jumped_at: list[int] = []  # places in the output of tokens that were not sampled
        self.stops = stops
        self.logprobs: list[TokenLogprobs] = []  # of the output, if the request asks for them
        self.ended_by: int | None = None  # the end or stop token that ended the output
        self._ending = stops.tokens
        self.detokenizer = detokenizer
        self.drafter = drafter
        self.rng = np.random.default_rng(seed if index == 0 else [seed, index])
        self._uniforms: list[float] = []

    def uniform(self, position: int) -> float:
        """The uniform that token ``position`` of the output is drawn with."""
        while len(self._uniforms) <= position:
            self._uniforms.append(self.rng.random())
        return self._uniforms[position]

    def consume(self, tokens: abc.Sequence[int], sequence: Sequence) -> SampledTokens:
        """What follows in ``sequence``, of the ``tokens`` that were sampled and, after them, those
        that the grammar forces, up to where the output ends.
        """
        if self.jump is None:
            return self._read(tokens, sequence)
        most = sequence.remaining - len(tokens) + 1
        replaced = self.jump.replace_last([*sequence.output, *tokens], most)
        found = self._read([*tokens[:-1], *replaced], sequence)
        jumped = max(0, len(found.tokens) - len(tokens))
        end = len(sequence.output) + len(found.tokens)
        self.jumped_at += range(end - jumped, end)
        return found._replace(jumped=jumped)

    def _read(self, tokens: abc.Sequence[int], sequence: Sequence) -> SampledTokens:
        """The next tokens of ``sequence`` up to an end or stop token, or to the one that
        completes a stop string.
        """
        plain = self.detokenizer is None and self.constraint is None
        if plain and self._ending.isdisjoint(tokens):
            return SampledTokens(tokens)
        position = len(sequence.tokens) - len(self.request.prompt)  # tokens of output before
        for count, token in enumerate(tokens, 1):
            if self.stops.ends(token, position + count):
                return SampledTokens(tokens[:count], "stop", self._end(token))
            if self.detokenizer is not None:
                self.detokenizer.push(token)
                if self.detokenizer.stopped:
                    return SampledTokens(tokens[:count], "stop", self.detokenizer.matched)
            if self._is_complete(tokens[:count], sequence):
                return SampledTokens(tokens[:count], "stop", self._flush())
        return SampledTokens(tokens)

    def _is_complete(self, tokens: abc.Sequence[int], sequence: Sequence) -> bool:
        """Whether the output with these tokens is complete in its grammar, and long enough."""
        if self.constraint is None:
            return False
        output = [*sequence.output, *tokens]
        return len(output) >= self.stops.min_tokens and self.constraint.is_complete(output)

    def _flush(self) -> int | str | None:
        """The output is complete: returns the stop string that held back characters complete."""
        if self.detokenizer is None:
            return None
        self.detokenizer.flush()
        return self.detokenizer.matched if self.detokenizer.stopped else None

    def _end(self, token: int) -> int | str | None:
        """The output ends with an end or stop token: returns the ``stop_reason``."""
        self.ended_by = token
        if self.detokenizer is not None:
            self.detokenizer.flush()
            if self.detokenizer.stopped:
                # half a character that was held back completes it
                return self.detokenizer.matched
            if self.request.output.include_stop_str_in_output:
                self.detokenizer.append_end(token)
        return self.stops.reason(token)

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
        self.ended_by = None
        del self.logprobs[len(output) :]
        self.jumped_at = [at for at in self.jumped_at if at < len(output)]
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
        rules: OutputRules | None = None,
        clock: abc.Callable[[], float] = time.monotonic,
    ):
        """``rules`` are those of ``rules_of``, computed here if they are missing."""
        self.request = request
        self.callback = callback
        self.seed = request.seed or 0  # the engine draws one for a request that has none
        self.tokenizer = model.tokenizer
        self.stops, processors = rules or rules_of(request, model)
        self.processors = processors if processors.active else None
        self.constraint = processors.constraint
        self.jump = None
        if request.jump_forward and self.constraint is not None:
            self.jump = JumpForward(self.constraint, model.tokenizer)
        self.search: BeamSearch | None = None
        if request.beam:
            detokenizer = Detokenizer(self.tokenizer, request.output) if request.stop else None
            self.search = BeamSearch(request, self.stops, detokenizer, self.constraint)
        # log-probabilities of the outputs: how many tokens beside the sampled one, or None
        self.num_logprobs = request.output.logprobs
        self.streams_logprobs = self.num_logprobs is not None
        if self.num_logprobs is None and request.num_sequences > request.n:
            self.num_logprobs = 0  # best_of ranks by them
        self.clock = clock
        self.output = RequestOutput(request, submitted_at=clock())
        if request.output.prompt_logprobs is not None:
            start = min(request.output.prompt_logprobs_start, len(request.prompt))
            self.output.prompt_logprobs = [None] * max(1, start)
        # no text, and no log-probabilities, before the end
        self._quiet = callback is None and not request.stop and not self.streams_logprobs
        self._make_drafter = make_drafter
        self._sequences: dict[int, SequenceState] = {}

    @property
    def draft_constraint(self) -> DraftConstraint | None:
        """Which drafts the request's grammar allows; None if it has none."""
        if self.constraint is None:
            return None
        return DraftConstraint(self.constraint, len(self.request.prompt))

    def sequence_state(self, index: int) -> SequenceState:
        """The state of sequence ``index``, made at the first call."""
        state = self._sequences.get(index)
        if state is None:
            detokenizer = None
            streams = self.callback is not None and self.search is None
            streams = streams and self.tokenizer.available
            if streams or self.request.stop:
                detokenizer = Detokenizer(self.tokenizer, self.request.output)
            drafter = None if self._make_drafter is None else self._make_drafter()
            state = SequenceState(
                self.request,
                index,
                self.seed,
                self.stops,
                detokenizer,
                drafter,
                self.constraint,
                self.jump,
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
        output = self.output
        if self._quiet and update.finish_reason is None and output.first_token_at is not None:
            return  # one more token, without text: nearly all updates
        sequence = update.sequence
        if output.error is None:
            output.error = update.error
        if output.first_token_at is None and update.tokens:
            output.first_token_at = self.clock()
        if update.finish_reason in ("abort", "error", "timeout"):
            self._record_cut_off(update)
            return
        state = self.sequence_state(sequence.index)
        if state.detokenizer is not None:
            update.text = state.take_text(finished=update.finish_reason is not None)
        if self.streams_logprobs:
            last = len(sequence.output)
            update.logprobs = state.logprobs[last - len(update.tokens) : last]
        if update.finish_reason is None:
            return
        if update.finish_reason == "length" and state.detokenizer and state.detokenizer.stopped:
            # half a character that was held back completes a stop string
            update.finish_reason = "stop"
            sequence.finish("stop", state.detokenizer.matched)
        # the text of a detokenizer ends before a stop string
        text = None if state.detokenizer is None else state.detokenizer.text
        ended_by = state.ended_by if update.finish_reason == "stop" else None
        self._add_output(sequence, text, ended_by, self._logprobs(sequence))
        self.count(sequence)

    def count(self, sequence: Sequence) -> None:
        """Add what a finished sequence has counted to the request's output."""
        output = self.output
        output.preemptions += sequence.preemptions
        output.cached_tokens += sequence.cached
        output.computed_tokens += sequence.computed_tokens
        output.drafted_tokens += sequence.drafted
        output.accepted_tokens += sequence.accepted

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
        self._add_output(sequence, text, None, self._logprobs(sequence))
        self.count(sequence)

    def _logprobs(self, sequence: Sequence) -> list[TokenLogprobs] | None:
        """The log-probabilities of a sequence's output; None if they are not asked for."""
        if self.num_logprobs is None or self.search is not None:
            return None
        state = self._sequences.get(sequence.index)
        return [] if state is None else state.logprobs[: len(sequence.output)]

    def _decode(self, tokens: abc.Sequence[int]) -> str:
        """The text of an output, up to a stop string."""
        detokenizer = Detokenizer(self.tokenizer, self.request.output)
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
        for rank, one in enumerate(self.search.best):
            found = Sequence(self.request, rank, dropped[0].order)
            found.tokens += one.tokens
            found.finish(one.finish_reason, one.stop_reason)
            logprobs = None if self.num_logprobs is None else one.logprobs
            text = self._add_output(found, one.text, one.ended_by, logprobs, one.score)
            update = SequenceUpdate(found, one.tokens, one.finish_reason, text, logprobs)
            updates.append(update)
        return updates

    def _add_output(
        self,
        sequence: Sequence,
        text: str | None,
        ended_by: int | None,
        logprobs: list[TokenLogprobs] | None,
        score: float | None = None,
    ) -> str:
        """Keep the output of a finished sequence, as a rule without the token that it
        ``ended_by``; returns its text.
        """
        tokens = sequence.output
        assert sequence.finish_reason is not None
        if ended_by is not None and not self.request.output.include_stop_str_in_output:
            tokens = tokens[:-1]
        if text is None and self.tokenizer.available:
            text = self.tokenizer.decode(tokens)
        text = text or ""  # ids alone
        self.output.outputs.append(
            CompletionOutput(
                sequence.index,
                tokens,
                text,
                sequence.finish_reason,
                sequence.stop_reason,
                score,
                logprobs,
                jumped_tokens=self._jumped(sequence, len(tokens)),
            )
        )
        return text

    def _jumped(self, sequence: Sequence, length: int) -> int:
        """How many of the first ``length`` tokens of an output were appended without sampling."""
        if self.jump is None or sequence.index not in self._sequences:
            return 0
        return sum(at < length for at in self._sequences[sequence.index].jumped_at)

    def add_prompt_logprobs(self, start: int, entries: list[TokenLogprobs]) -> None:
        """Keep the entries of prompt tokens after position ``start``; those that are known
        already were computed before a preemption.
        """
        known = self.output.prompt_logprobs
        assert known is not None
        assert len(known) > start, "a part of the prompt was not computed"
        known += entries[len(known) - start - 1 :]

    def best_outputs(self) -> list[CompletionOutput]:
        """The outputs in their order; of ``best_of`` the n of the highest Σ log p, the best
        first; what was cut off, which has fewer terms, comes after what is complete.
        """
        outputs = sorted(self.output.outputs, key=lambda one: one.index)
        if self.request.num_sequences == self.request.n:
            return outputs
        complete = ("stop", "length")
        outputs.sort(
            key=lambda one: (one.finish_reason not in complete, -(one.cumulative_logprob or 0.0))
        )
        keeps = self.request.output.logprobs is not None
        return [
            replace(one, index=i, logprobs=one.logprobs if keeps else None)
            for i, one in enumerate(outputs[: self.request.n])
        ]
