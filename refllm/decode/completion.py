"""One output from its tokens: where it ends, its text in whole characters, its
log-probabilities.

| record             | meaning                                                            |
|--------------------|--------------------------------------------------------------------|
| ``StreamChunk``    | what is new of an output; the last one says why it ended           |
| ``CompletionOutput`` | a finished output                                                |

| finish_reason | stop_reason     | the output ended because                                    |
|---------------|-----------------|-------------------------------------------------------------|
| ``stop``      | None            | the model generated an end token                            |
| ``stop``      | the stop token  | it generated one of ``stop_token_ids``                      |
| ``stop``      | the stop string | its text reached one of ``stop``                            |
| ``stop``      | None            | it is complete in its grammar: nothing but an end token may |
|               |                 | follow, which is not sampled                                |
| ``length``    | None            | it has ``max_tokens``                                       |

The words are vLLM's; the engine has a few more (``serve.outputs``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.constraint import Constraint, ConstraintStates
from refllm.decode.detokenizer import StopStrings, Utf8Stream
from refllm.decode.logits_processors import LogitsProcessors, with_token_ids
from refllm.decode.logprobs import PromptLogprobs, TokenLogprobs
from refllm.decode.output_params import OutputParams, StopTokens
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.interface import ModelLike
from refllm.errors import InputError


class OutputRules(NamedTuple):
    """``OutputParams`` and ``SamplingParams`` for one model."""

    stop_tokens: StopTokens
    processors: LogitsProcessors


def output_rules(
    params: OutputParams,
    sampling: SamplingParams,
    model: ModelLike,
    grammar: Constraint | None = None,
    sequences: int = 1,
) -> OutputRules:
    """What ends an output of ``model``, and what changes its logits.

    ``min_tokens`` masks the end tokens also where ``ignore_eos`` lets them pass later, as vLLM
    does. A ``grammar`` constrains ``sequences`` outputs. ValueError for a token outside the
    vocabulary, or a bad word without tokens.
    """
    assert params.stop_token_ids is not None
    ends = frozenset(model.config.eos_token_ids)
    stops = frozenset(params.stop_token_ids)
    vocabulary = model.config.vocab_size
    if stops and max(stops) >= vocabulary:
        raise InputError(
            f"stop_token_ids: token {max(stops)} is outside the vocabulary of {vocabulary}"
        )
    sampling = with_token_ids(sampling, model.tokenizer)
    constraint = None
    if grammar is not None:
        if params.ignore_eos:
            raise InputError(
                "ignore_eos generates beyond the end of the text, and a grammar ends there: leave "
                "one of them out"
            )
        constraint = ConstraintStates(grammar, vocabulary, ends, sequences)
    processors = LogitsProcessors(sampling, params.min_tokens, ends | stops, constraint)
    processors.check_vocabulary(vocabulary)
    if params.ignore_eos:
        ends = frozenset()
    return OutputRules(StopTokens(ends, stops, params.min_tokens), processors)


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What is new of an output. ``text`` may lag behind ``tokens``: it has whole characters
    only, and no part of a stop string.
    """

    text: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None  # None: more will come
    stop_reason: int | str | None = None
    index: int = 0  # of n continuations


@dataclass(frozen=True)
class CompletionOutput:
    """One finished continuation of a prompt.

    ``logprobs`` has an entry for each token that was sampled: one more than ``tokens`` where
    these end before an end or stop token. ``score`` is that of a beam. ``prompt_logprobs``
    are those of ``Model.generate``; the engine has them once for all continuations, in
    ``RequestOutput``. ``jumped_tokens`` counts the tokens that ``jump_forward`` appended, each
    of which saves a forward pass.
    """

    index: int
    tokens: list[int]
    text: str
    finish_reason: str
    stop_reason: int | str | None = None
    score: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    jumped_tokens: int = 0

    @property
    def cumulative_logprob(self) -> float | None:
        """Σ log p of the sampled tokens; None where they have no log-probabilities."""
        if self.logprobs is None:
            return None
        return cumulative_logprob(self.logprobs)


def cumulative_logprob(entries: Iterable[TokenLogprobs]) -> float:
    """Σ log p of the tokens that the entries are of: the first of each."""
    return sum(next(iter(entry.values())).logprob for entry in entries)


class OutputReader:
    """Reads the tokens of one output as they are sampled, until it ends.

    Attributes: ``tokens``, ``finish_reason``, ``stop_reason`` so far.

    >>> reader = OutputReader(OutputParams(), StopTokens(frozenset([5])), None)
    >>> reader.push(7).tokens, reader.push(5).tokens, reader.finish_reason
    ([7], [], 'stop')
    """

    def __init__(
        self,
        params: OutputParams,
        stops: StopTokens,
        tokenizer: Tokenizer | None,
        recorded: list[TokenLogprobs] | None = None,
        constraint: ConstraintStates | None = None,
    ):
        """``recorded`` has the log-probabilities of the tokens as they come. Without a
        ``tokenizer`` chunks have no text, and ``params.stop`` must be empty. A ``constraint``
        ends the output where it is complete.
        """
        self.params = params
        self.stops = stops
        self.tokenizer = tokenizer
        self.recorded = recorded
        self.constraint = constraint
        self.sampled = 0
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._pieces: list[str] = []
        self._characters = None
        self._strings = None
        if tokenizer is not None:
            self._characters = Utf8Stream(tokenizer)
            self._strings = StopStrings(
                params.stop or (), include=params.include_stop_str_in_output
            )

    def push(self, token: int) -> StreamChunk:
        """Take the next token; return what is new."""
        self.sampled += 1
        if self.stops.ends(token, self.sampled):
            return self._end(token)
        if self._is_complete(token):
            return self._complete(token)
        if self._characters is None or self._strings is None:
            return self._chunk("", [token])
        counts = self.sampled > self.params.min_tokens
        text = self._strings.push(self._characters.push(token), stopping=counts)
        if self._strings.stopped:
            return self._chunk(text, [token], "stop", self._strings.matched)
        return self._chunk(text, [token])

    def finish(self) -> StreamChunk:
        """No more tokens will come: return the text that was held back."""
        text, matched = self._rest()
        if matched is not None:
            return self._chunk(text, [], "stop", matched)
        return self._chunk(text, [], "length")

    def completion(self, index: int, tokenizer: Tokenizer) -> CompletionOutput:
        """The whole output, once it has ended."""
        assert self.finish_reason is not None
        text = "".join(self._pieces)
        if self.tokenizer is None:
            text = tokenizer.decode(self.tokens)
        logprobs = None if self.recorded is None else self.recorded[: self.sampled]
        return CompletionOutput(
            index, self.tokens, text, self.finish_reason, self.stop_reason, logprobs=logprobs
        )

    def _end(self, token: int) -> StreamChunk:
        """The chunk of a token that ends the output."""
        text, matched = self._rest()
        if matched is not None:  # a character that was held back completes it
            return self._chunk(text, [], "stop", matched)
        reason = self.stops.reason(token)
        if not self.params.include_stop_str_in_output:
            return self._chunk(text, [], "stop", reason)
        if self.tokenizer is not None:
            text += self.tokenizer.decode([token])
        return self._chunk(text, [token], "stop", reason)

    def _is_complete(self, token: int) -> bool:
        """Whether ``token`` makes the output complete, which may not be before ``min_tokens``."""
        if self.constraint is None or self.sampled < self.params.min_tokens:
            return False
        return self.constraint.is_complete([*self.tokens, token])

    def _complete(self, token: int) -> StreamChunk:
        """The chunk of a token with which the output is complete in its grammar."""
        if self._characters is None or self._strings is None:
            return self._chunk("", [token], "stop")
        stopping = self.sampled > self.params.min_tokens
        text = self._strings.push(self._characters.push(token), stopping=stopping)
        if not self._strings.stopped:
            text += self._rest()[0]
        return self._chunk(text, [token], "stop", self._strings.matched)

    def _rest(self) -> tuple[str, str | None]:
        """The text that is held back, up to a stop string, and which one."""
        if self._characters is None or self._strings is None:
            return "", None
        stopping = len(self.tokens) > self.params.min_tokens
        text = self._strings.push(self._characters.flush(), stopping=stopping)
        text += self._strings.flush()
        return text, self._strings.matched

    def _chunk(
        self,
        text: str,
        tokens: list[int],
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> StreamChunk:
        """Note what is new, and return it."""
        first = len(self.tokens)
        self.tokens += tokens
        self._pieces.append(text)
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        logprobs = None
        if self.recorded is not None:
            logprobs = self.recorded[first : self.sampled]
        return StreamChunk(text, tokens, logprobs, finish_reason, stop_reason)
