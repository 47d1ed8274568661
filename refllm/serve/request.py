"""What a user asks for, and one sequence that is generated for it: plain Python, no model
and no arrays.

| name     | meaning                                                                       |
|----------|-------------------------------------------------------------------------------|
| request  | a prompt and how to continue it; it never changes                             |
| sequence | one of a request's n continuations, with the prompt: what the scheduler plans |
| tokens   | prompt + output so far                                                        |
| drafts   | guesses of the next tokens (speculative decoding), until they are verified    |
| computed | tokens [0, computed) have their keys and values in the cache                  |
| total    | len(tokens) + len(drafts): what a step tries to compute up to                 |

A sequence has no phase. It is ``total - computed`` tokens behind, and prefill, decode, a
sequence that returns after preemption and the verification of drafts differ in these two
counts only (the design of vLLM's V1 scheduler).

Left out: the model's limits (vocabulary, longest context): the engine checks them in
``submit``.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from enum import Enum
from math import inf
from numbers import Integral, Real
from typing import Any, TypeGuard, Unpack

from refllm.decode.constraint import Constraint, check_constraint
from refllm.decode.output_params import (
    GenerateOptions,
    OutputParams,
    check_min_tokens,
    split_options,
)
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.errors import InputError

# token ids, text, or the messages of a chat
Prompt = abc.Sequence[int] | str | abc.Sequence[abc.Mapping[str, Any]]


@dataclass(frozen=True, init=False)
class Request:
    """A prompt and how to continue it. ValueError names the field that makes no sense.

    ``prompt`` is token ids, text, or the messages of a chat; text and messages are encoded by
    the engine, which keeps the last ``truncate_prompt_tokens`` tokens (-1: as many as leave
    room for ``max_tokens``). A ``range`` of ids serves where only the length matters.
    ``max_tokens`` may be 0: the request then finishes at once, without output.

    ``sampling`` (default: greedy) says how tokens are chosen, ``output`` where the output ends
    and which log-probabilities come with it; the fields of both, such as ``temperature`` and
    ``stop``, are a shorthand as keywords. The ``n`` continuations of a prompt share its cache
    blocks; of ``best_of`` continuations the ``n`` of the highest Σ log p are returned. With
    ``beam`` they are the beams of one search, ranked by the sum of their log-probabilities
    divided by length ** ``length_penalty``.

    A lower ``priority`` is served first; ``arrival``, in seconds, breaks ties. After
    ``timeout`` seconds the request ends with what it has. Requests with different ``salt``
    never share cached prefixes. Every output is one of ``grammar`` (``decode.constraint``), or its
    beginning where ``max_tokens`` cuts it off; with ``jump_forward`` what the grammar forces is
    appended without sampling (``decode.jump_forward``). ``docs/requests.md`` has every field with
    its test.

    >>> request = Request([5, 9, 2], max_tokens=8)
    >>> request.max_cached_tokens  # the last token of the output is never computed
    10
    >>> Request([5, 9, 2], temperature=0.8).sampling == SamplingParams(temperature=0.8)
    True
    >>> Request([5, 9, 2], top_p=0.0)
    Traceback (most recent call last):
    refllm.errors.InputError: request None: top_p must be within (0, 1], got 0.0
    """

    prompt: Prompt
    max_tokens: int
    request_id: abc.Hashable  # None: the engine or the scheduler assigns one
    sampling: SamplingParams
    output: OutputParams
    seed: int | None
    n: int
    best_of: int | None
    beam: bool
    length_penalty: float
    priority: int
    arrival: float
    timeout: float | None
    truncate_prompt_tokens: int | None
    salt: str | None
    grammar: Constraint | None
    jump_forward: bool

    def __init__(
        self,
        prompt: Prompt,
        max_tokens: int = 16,
        request_id: abc.Hashable = None,
        *,
        sampling: SamplingParams | None = None,
        output: OutputParams | None = None,
        seed: int | None = None,
        n: int = 1,
        best_of: int | None = None,
        beam: bool = False,
        length_penalty: float = 1.0,
        priority: int = 0,
        arrival: float = 0.0,
        timeout: float | None = None,
        truncate_prompt_tokens: int | None = None,
        salt: str | None = None,
        grammar: Constraint | None = None,
        jump_forward: bool = False,
        **shorthand: Unpack[GenerateOptions],
    ):
        # written by hand for the shorthand's sake; past __setattr__, which frozen forbids
        vars(self).update(
            prompt=_checked_prompt(prompt),
            max_tokens=max_tokens,
            request_id=request_id,
            sampling=GREEDY if sampling is None else sampling,
            output=_DEFAULT_OUTPUT if output is None else output,
            seed=seed,
            n=n,
            best_of=best_of,
            beam=bool(beam),
            length_penalty=length_penalty,
            priority=priority,
            arrival=arrival,
            timeout=timeout,
            truncate_prompt_tokens=truncate_prompt_tokens,
            salt=salt,
            grammar=grammar,
            jump_forward=bool(jump_forward),
        )
        try:
            if shorthand:
                sampling, output = split_options(
                    sampling, output, shorthand, "Request", Request.__dataclass_fields__
                )
                vars(self).update(sampling=sampling, output=output)
            self._check()
        except InputError as error:
            raise InputError(f"request {_id_in_words(request_id)}: {error}") from None

    @property
    def stop(self) -> tuple[str, ...]:
        """The stop strings."""
        return self.output.stop  # type: ignore[return-value]  # a tuple since it was checked

    @property
    def ignore_eos(self) -> bool:
        """Whether the model's end tokens do not end the output."""
        return self.output.ignore_eos

    @property
    def num_sequences(self) -> int:
        """Continuations that are generated: n, or ``best_of``."""
        return self.best_of or self.n

    @property
    def prompt_ids(self) -> abc.Sequence[int]:
        """The prompt as token ids; ValueError for text and messages that are not encoded."""
        if self.is_encoded:
            return self.prompt  # type: ignore[return-value]
        raise InputError(
            f"request {self.request_id!r}: its prompt is no token ids yet: an Engine encodes it"
        )

    @property
    def is_encoded(self) -> bool:
        """Whether the prompt is token ids, and not text or messages."""
        return not isinstance(self.prompt, str) and not isinstance(self.prompt[0], abc.Mapping)

    def _check(self) -> None:
        """ValueError for a field that makes no sense."""
        for name, (allows, rule) in _RULES.items():
            value = getattr(self, name)
            if not allows(value):
                raise InputError(f"{name} must be {rule}, got {value!r}")
            if name in _PLAIN and value is not None:
                vars(self)[name] = _PLAIN[name](value)
        if not self.prompt:
            raise InputError("the prompt is empty: a model needs a token to continue")
        if self.best_of is not None and (self.beam or self.best_of < self.n):
            raise InputError(
                f"best_of must be at least n, {self.n}, and None for a beam search, "
                f"got {self.best_of}"
            )
        check_min_tokens(self.output, self.max_tokens)
        if self.grammar is not None or self.jump_forward:
            check_constraint(self.grammar, jumps=self.jump_forward)
        if self.jump_forward and (self.beam or self.best_of or self.output.logprobs is not None):
            raise InputError(
                "jump_forward appends tokens without their log-probabilities: leave out logprobs, "
                "best_of and beam, or jump_forward"
            )
        try:
            hash(self.request_id)
        except Exception as error:
            raise InputError(f"its id must be hashable, got {type(self.request_id)}") from error
        try:
            repr(self.request_id)
        except Exception as error:
            kind = type(self.request_id).__name__
            raise InputError(
                f"its id must have a repr, for messages: that of {kind} raises"
            ) from error

    @property
    def max_cached_tokens(self) -> int:
        """The most tokens of one sequence whose keys and values are ever cached."""
        return len(self.prompt_ids) + max(0, self.max_tokens - 1)


def _id_in_words(request_id: object) -> str:
    """How messages name a request, whatever its id is."""
    try:
        return repr(request_id)
    except Exception:
        return f"(an id of class {type(request_id).__name__})"


def _is_integer(x: object) -> TypeGuard[int]:
    return not isinstance(x, bool) and isinstance(x, Integral)


def _is_finite(x: object) -> TypeGuard[float]:
    if isinstance(x, bool) or not isinstance(x, Real):
        return False
    try:
        return -inf < float(x) < inf
    except Exception:  # an integer beyond all floats; a class of the caller's
        return False


# Which values a field may take, as a predicate and in words; ``decode.sampling_params`` has the
# rules of ``sampling``.
_RULES: dict[str, tuple[abc.Callable[[object], bool], str]] = {
    "max_tokens": (lambda x: _is_integer(x) and x >= 0, "an integer, 0 or more"),
    "sampling": (lambda x: isinstance(x, SamplingParams), "a SamplingParams(…)"),
    "seed": (lambda x: x is None or (_is_integer(x) and x >= 0), "None or an integer, 0 or more"),
    "output": (lambda x: isinstance(x, OutputParams), "an OutputParams(…)"),
    "n": (lambda x: _is_integer(x) and x >= 1, "an integer, 1 or more"),
    "best_of": (
        lambda x: x is None or (_is_integer(x) and x >= 1),
        "None or an integer, n or more",
    ),
    "timeout": (lambda x: x is None or (_is_finite(x) and x >= 0), "None or seconds, 0 or more"),
    "truncate_prompt_tokens": (
        lambda x: x is None or (_is_integer(x) and (x >= 1 or x == -1)),
        "None, 1 or more, or -1 for the model's positions",
    ),
    "length_penalty": (_is_finite, "a finite number"),
    "priority": (_is_integer, "an integer, lower first"),
    "arrival": (lambda x: _is_finite(x) and x >= 0, "seconds, 0 or more"),
    "salt": (lambda x: x is None or isinstance(x, str), "None or a string"),
}

# Fields that become plain Python values once they are checked, so that no number or string of
# the caller's own class is computed with, compared or hashed within a step.
_PLAIN: dict[str, abc.Callable[[Any], object]] = {
    "max_tokens": int,
    "seed": int,
    "best_of": int,
    "timeout": float,
    "truncate_prompt_tokens": int,
    "n": int,
    "length_penalty": float,
    "priority": int,
    "arrival": float,
    "salt": str.__str__,
}


_DEFAULT_OUTPUT = OutputParams()


def _checked_prompt(prompt: object) -> Prompt:
    """Text, messages as a tuple of dictionaries, or token ids; ValueError for anything else."""
    if isinstance(prompt, str):
        return str.__str__(prompt)
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], abc.Mapping):
        if not all(isinstance(message, abc.Mapping) for message in prompt):
            raise InputError("prompt must be messages alone, token ids or text")
        return tuple(dict(message) for message in prompt)
    return _token_ids(prompt)


def _token_ids(prompt: object) -> abc.Sequence[int]:
    """A prompt as a tuple of integers, or the range that it is; ValueError if it is neither."""
    if isinstance(prompt, range):
        if prompt and min(prompt[0], prompt[-1]) < 0:
            raise InputError(f"prompt must be token ids, 0 or more, got {prompt}")
        return prompt
    ids: object = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # arrays of the host
    if isinstance(ids, (str, bytes)) or not isinstance(ids, abc.Iterable):
        raise InputError(f"prompt must be token ids, text or messages, got {type(prompt).__name__}")
    tokens = tuple(ids)
    for position, token in enumerate(tokens):
        if not _is_integer(token) or token < 0:
            raise InputError(
                f"prompt must be token ids, 0 or more, got {token!r} at position {position}"
            )
    return tuple(int(token) for token in tokens)


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # in the queue: new, or preempted
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One continuation of a request while it is served; only the scheduler changes it.

    >>> sequence = Sequence(Request([5, 9, 2], max_tokens=8, request_id="a"), index=0, order=0)
    >>> sequence.tokens.append(7)
    >>> sequence.total - sequence.computed, sequence.output, sequence.remaining
    (4, [7], 7)
    >>> sequence
    Sequence('a'.0, 0/4, waiting)
    """

    __slots__ = (
        "accepted", "cached", "computed", "computed_from", "drafted", "drafts",
        "finish_reason", "index", "key", "order", "preemptions", "request", "slots",
        "status", "stop_reason", "tokens", "work",
    )  # fmt: skip

    def __init__(self, request: Request, index: int, order: int):
        """``index`` counts the sequences of the request, ``order`` the submitted requests."""
        self.request = request
        self.index = index
        self.order = order
        self.key: tuple[abc.Hashable, int] = (request.request_id, index)  # its name in plans
        self.tokens = list(request.prompt_ids)
        self.drafts: list[int] = []
        self.computed = 0
        # Sequence slots that it takes: sequence 0 forks into n once its prompt is computed.
        self.slots = request.num_sequences if index == 0 else 1
        self.status = SequenceStatus.WAITING
        # Why it finished: "length", "abort", "dropped", or what the engine gave.
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        # counts; tokens [computed_from, computed) were computed since the last admission
        self.preemptions = 0
        self.cached = 0  # tokens that the prefix cache had at the first admission
        self.computed_from = 0
        self.work = 0  # tokens computed before that, and rejected drafts
        self.drafted = 0
        self.accepted = 0

    @property
    def computed_tokens(self) -> int:
        """Tokens of it that went through the network."""
        return self.work + self.computed - self.computed_from

    @property
    def total(self) -> int:
        """What a step tries to compute up to."""
        return len(self.tokens) + len(self.drafts)

    @property
    def output(self) -> list[int]:
        """The tokens so far without the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def remaining(self) -> int:
        """How many more tokens it may generate."""
        return len(self.request.prompt) + self.request.max_tokens - len(self.tokens)

    def finish(self, finish_reason: str, stop_reason: int | str | None = None) -> Sequence:
        """Mark the sequence as finished; returns it."""
        self.status = SequenceStatus.FINISHED
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        return self

    def __repr__(self) -> str:
        progress = f"{self.computed}/{self.total}"
        return (
            f"Sequence({self.request.request_id!r}.{self.index}, {progress}, {self.status.value})"
        )
