"""What a user asks of an output beside how its tokens are chosen: where it ends, and which
log-probabilities come with it.

Source: the fields of these names in vLLM's ``SamplingParams`` (vllm/sampling_params.py), and
``check_stop`` (vllm/v1/core/sched/utils.py).

| field                          | meaning                                                     |
|--------------------------------|-------------------------------------------------------------|
| ``stop``                       | strings that end the text, which ends before them           |
| ``stop_token_ids``             | tokens that end the output as the model's end tokens do     |
| ``ignore_eos``                 | the model's end tokens do not end the output                |
| ``min_tokens``                 | until the output has as many: end and stop tokens are masked|
|                                | (``decode.logits_processors``), stop strings do not count   |
| ``include_stop_str_in_output`` | the stop string, end token or stop token stays in the output|
| ``logprobs``                   | log-probabilities of each sampled token and the k best      |
| ``prompt_logprobs``            | the same of each token of the prompt                        |
| ``prompt_logprobs_start``      | from this position of the prompt on; what lies before may be|
|                                | read from a prefix cache                                    |
| ``logprobs_mode``              | before or after the logits processors: ``decode.logprobs``  |

Differences to vLLM: the token that ended an output is part of ``tokens`` only with
``include_stop_str_in_output`` (its log-probability always comes); ``logprobs_mode`` is
chosen per request; of several stop strings the first that is complete counts, not the first of
the list.

``prompt_logprobs_start`` is SGLang's ``logprob_start_len``.

Left out: ``detokenize``, ``skip_special_tokens``, ``allowed_token_ids``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import TypedDict

from refllm.decode.logprobs import MODES, LogprobsRecorder
from refllm.decode.sampling_params import (
    SamplingOptions,
    SamplingParams,
    is_token,
    sampling_params,
)
from refllm.errors import InputError, did_you_mean


class OutputOptions(TypedDict, total=False):
    """The fields of ``OutputParams`` as keywords."""

    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    min_tokens: int
    include_stop_str_in_output: bool
    logprobs: int | None
    prompt_logprobs: int | None
    prompt_logprobs_start: int
    logprobs_mode: str


@dataclass(frozen=True)
class OutputParams:
    """Where an output ends, and which log-probabilities come with it. ValueError names the
    field that makes no sense.

    >>> OutputParams(stop="def ", min_tokens=2).stop
    ('def ',)
    >>> OutputParams(min_tokens=-1)
    Traceback (most recent call last):
    refllm.errors.InputError: min_tokens must be an integer, 0 or more, got -1
    """

    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    logprobs_mode: str = "raw_logprobs"

    def __post_init__(self) -> None:
        _check_logprobs("logprobs", self.logprobs)
        _check_logprobs("prompt_logprobs", self.prompt_logprobs)
        _check_mode(self.logprobs_mode)
        if not is_token(self.min_tokens):
            raise InputError(f"min_tokens must be an integer, 0 or more, got {self.min_tokens!r}")
        if not is_token(self.prompt_logprobs_start):
            raise InputError(
                "prompt_logprobs_start must be a position of the prompt, 0 or more, got "
                f"{self.prompt_logprobs_start!r}"
            )
        # plain values: nothing of the caller's own classes is used within a step
        vars(self).update(
            stop=_strings(self.stop),
            stop_token_ids=_tokens(self.stop_token_ids),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=index(self.min_tokens),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            logprobs=None if self.logprobs is None else index(self.logprobs),
            prompt_logprobs=None if self.prompt_logprobs is None else index(self.prompt_logprobs),
            prompt_logprobs_start=index(self.prompt_logprobs_start),
            logprobs_mode=str.__str__(self.logprobs_mode),
        )

    @property
    def asks_for_logprobs(self) -> bool:
        """Whether any log-probabilities are wanted."""
        return self.logprobs is not None or self.prompt_logprobs is not None

    def recorder(self, sequences: int = 1) -> LogprobsRecorder | None:
        """What collects the log-probabilities of a static batch; None if none are asked for."""
        if not self.asks_for_logprobs:
            return None
        return LogprobsRecorder(
            self.logprobs,
            self.prompt_logprobs,
            self.logprobs_mode,
            sequences,
            self.prompt_logprobs_start,
        )


def _check_logprobs(name: str, count: int | None) -> None:
    """ValueError unless ``count`` is None, -1 (all tokens) or a number of tokens."""
    if count is not None and not is_token(count) and count != -1:
        raise InputError(
            f"{name} must be None, a number of tokens, 0 or more, or -1 for all, got {count!r}"
        )


def _check_mode(mode: str) -> None:
    """ValueError unless it is a mode."""
    if mode not in MODES:
        raise InputError(f"logprobs_mode must be {' or '.join(MODES)}, got {mode!r}")


def _strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple of plain strings."""
    strings = (stop,) if isinstance(stop, str) else stop or ()
    listed = isinstance(strings, Iterable)
    if not listed or not all(isinstance(s, str) and s for s in strings):
        raise InputError(f"stop must be strings that are not empty, got {stop!r}")
    return tuple(str.__str__(s) for s in strings)


def _tokens(tokens: Sequence[int] | None) -> tuple[int, ...]:
    """Stop tokens as a tuple of integers."""
    listed = tokens is None or isinstance(tokens, Iterable)
    if not listed or not all(is_token(t) for t in tokens or ()):
        raise InputError(f"stop_token_ids must be token ids, 0 or more, got {tokens!r}")
    return tuple(index(t) for t in tokens or ())


class GenerateOptions(SamplingOptions, OutputOptions, total=False):
    """The fields of ``SamplingParams`` and ``OutputParams`` as keywords."""


def split_options(
    sampling: SamplingParams | None,
    output: OutputParams | None,
    shorthand: GenerateOptions,
    caller: str = "SamplingParams",
    parameters: Iterable[str] = (),
) -> tuple[SamplingParams, OutputParams]:
    """Both records, each given as such or by its fields as keywords; ValueError for both.

    A keyword that is neither is a TypeError of ``caller``, whose other keywords are
    ``parameters``: the nearest one is named.

    >>> sampling, output = split_options(None, None, {"top_k": 3, "stop": "x"})
    >>> sampling.top_k, output.stop
    (3, ('x',))
    """
    fields = dict(shorthand)
    known = [*parameters, *SamplingOptions.__annotations__, *OutputOptions.__annotations__]
    for name in fields:
        if name not in known:
            raise TypeError(
                f"{caller}() got an unexpected keyword argument {name!r}{did_you_mean(name, known)}"
            )
    of_output = {name: fields.pop(name) for name in list(fields) if name in _OUTPUT_FIELDS}
    if output is None:
        output = OutputParams(**of_output)  # type: ignore[arg-type]
    elif not isinstance(output, OutputParams):
        raise InputError(f"output must be an OutputParams(…), got {output!r}")
    elif of_output:
        names = ", ".join(of_output)
        raise InputError(f"give either output=OutputParams(…) or its shorthand ({names}), not both")
    return sampling_params(sampling, fields), output  # type: ignore[arg-type]


_OUTPUT_FIELDS = frozenset(OutputOptions.__annotations__)


def check_min_tokens(params: OutputParams, max_tokens: int) -> None:
    """ValueError if an output cannot have as many tokens as it must have."""
    if is_token(max_tokens) and params.min_tokens > max_tokens:
        raise InputError(
            f"min_tokens must be at most max_tokens, {max_tokens}, got {params.min_tokens}"
        )


def truncate_prompt(ids: list[int], keep: int | None, context: int) -> list[int]:
    """The last ``keep`` tokens of a prompt; None keeps all, -1 as many as leave
    room for the output, ``context``.

    >>> truncate_prompt([1, 2, 3], 2, context=9), truncate_prompt([1, 2, 3], -1, context=1)
    ([2, 3], [3])
    """
    if keep is None:
        return ids
    if not (is_token(keep) and keep > 0) and keep != -1:
        raise InputError(
            f"truncate_prompt_tokens must be None, 1 or more, or -1 to leave room for the output, "
            f"got {keep!r}"
        )
    return ids[-(context if keep == -1 else index(keep)) :]


@dataclass(frozen=True)
class StopTokens:
    """The tokens that end an output, once it has ``min_tokens``.

    >>> stops = StopTokens(frozenset([5]), frozenset([9]), min_tokens=2)
    >>> stops.ends(5, count=1), stops.ends(5, count=2), stops.reason(5), stops.reason(9)
    (False, True, None, 9)
    """

    end_tokens: frozenset[int] = frozenset()  # of the model
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0

    @property
    def tokens(self) -> frozenset[int]:
        """All of them."""
        return self.end_tokens | self.stop_token_ids

    def ends(self, token: int, count: int) -> bool:
        """Whether ``token`` ends an output of ``count`` tokens, itself included."""
        return count >= self.min_tokens and (
            token in self.end_tokens or token in self.stop_token_ids
        )

    def reason(self, token: int) -> int | None:
        """The ``stop_reason`` of a token that ends the output: None for an end token."""
        return None if token in self.end_tokens else token
