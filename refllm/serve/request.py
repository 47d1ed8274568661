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

from refllm.decode.sampling_params import (
    GREEDY,
    SamplingOptions,
    SamplingParams,
    sampling_params,
)
from refllm.errors import InputError


@dataclass(frozen=True, init=False)
class Request:
    """A prompt and how to continue it. ValueError names the field that makes no sense.

    ``prompt`` may be a ``range`` where only lengths matter. ``max_tokens`` 0 is allowed: the
    request finishes at once, without output. ``sampling`` (default: greedy) says how tokens
    are chosen; ``temperature``, ``top_k``, ``top_p``, ``min_p`` and ``repetition_penalty`` are
    a shorthand for it. The ``n`` continuations of a prompt share its cache blocks; with
    ``beam`` they are the beams of one search, ranked by the sum of their log-probabilities
    divided by length ** ``length_penalty``. A lower ``priority`` is served first. ``arrival``
    is in seconds. Requests with different ``salt`` never share cached prefixes.

    >>> request = Request([5, 9, 2], max_tokens=8)
    >>> request.max_cached_tokens  # the last token of the output is never computed
    10
    >>> Request([5, 9, 2], temperature=0.8).sampling == SamplingParams(temperature=0.8)
    True
    >>> Request([5, 9, 2], top_p=0.0)
    Traceback (most recent call last):
    refllm.errors.InputError: request None: top_p must be within (0, 1], got 0.0
    """

    prompt: abc.Sequence[int]
    max_tokens: int
    request_id: abc.Hashable  # None: the engine or the scheduler assigns one
    sampling: SamplingParams
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    n: int
    beam: bool
    length_penalty: float
    priority: int
    arrival: float
    salt: str | None

    def __init__(
        self,
        prompt: abc.Sequence[int],
        max_tokens: int = 16,
        request_id: abc.Hashable = None,
        *,
        sampling: SamplingParams | None = None,
        seed: int | None = None,
        stop: str | abc.Sequence[str] | None = (),
        ignore_eos: bool = False,
        n: int = 1,
        beam: bool = False,
        length_penalty: float = 1.0,
        priority: int = 0,
        arrival: float = 0.0,
        salt: str | None = None,
        **shorthand: Unpack[SamplingOptions],
    ):
        # written by hand for the shorthand's sake; past __setattr__, which frozen forbids
        vars(self).update(
            prompt=_token_ids(prompt),
            max_tokens=max_tokens,
            request_id=request_id,
            sampling=GREEDY if sampling is None else sampling,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            ignore_eos=bool(ignore_eos),
            n=n,
            beam=bool(beam),
            length_penalty=length_penalty,
            priority=priority,
            arrival=arrival,
            salt=salt,
        )
        if shorthand:
            vars(self).update(sampling=self._from_shorthand(sampling, shorthand))
        self._check()

    def _from_shorthand(
        self, sampling: SamplingParams | None, shorthand: SamplingOptions
    ) -> SamplingParams:
        """The settings of the shorthand; ValueError if ``sampling`` was given, too."""
        try:
            return sampling_params(sampling, shorthand)
        except ValueError as error:
            raise InputError(f"request {self.request_id!r}: {error}") from None

    def _check(self) -> None:
        """ValueError for a field that makes no sense."""
        for name, (allows, rule) in _RULES.items():
            value = getattr(self, name)
            if not allows(value):
                raise InputError(
                    f"request {self.request_id!r}: {name} must be {rule}, got {value!r}"
                )
            if name in _PLAIN and value is not None:
                vars(self)[name] = _PLAIN[name](value)
        if not self.prompt:
            raise InputError(
                f"request {self.request_id!r}: the prompt is empty: "
                "a model needs a token to continue"
            )
        try:
            hash(self.request_id)
        except Exception as error:
            raise InputError(f"a request's id must be hashable, got {self.request_id!r}") from error

    @property
    def max_cached_tokens(self) -> int:
        """The most tokens of one sequence whose keys and values are ever cached."""
        return len(self.prompt) + max(0, self.max_tokens - 1)


def _is_integer(x: object) -> TypeGuard[int]:
    return not isinstance(x, bool) and isinstance(x, Integral)


def _is_finite(x: object) -> TypeGuard[float]:
    if isinstance(x, bool) or not isinstance(x, Real):
        return False
    try:
        return -inf < float(x) < inf
    except Exception:  # an integer beyond all floats; a class of the caller's
        return False


def _are_nonempty_strings(x: object) -> bool:
    return isinstance(x, tuple) and all(isinstance(s, str) and s for s in x)


# Which values a field may take, as a predicate and in words; ``decode.sampling_params`` has the
# rules of ``sampling``.
_RULES: dict[str, tuple[abc.Callable[[object], bool], str]] = {
    "max_tokens": (lambda x: _is_integer(x) and x >= 0, "an integer, 0 or more"),
    "sampling": (lambda x: isinstance(x, SamplingParams), "a SamplingParams(…)"),
    "seed": (lambda x: x is None or (_is_integer(x) and x >= 0), "None or an integer, 0 or more"),
    "stop": (_are_nonempty_strings, "strings that are not empty"),
    "n": (lambda x: _is_integer(x) and x >= 1, "an integer, 1 or more"),
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
    "stop": lambda stops: tuple(str.__str__(stop) for stop in stops),
    "n": int,
    "length_penalty": float,
    "priority": int,
    "arrival": float,
    "salt": str.__str__,
}


def _token_ids(prompt: object) -> abc.Sequence[int]:
    """A prompt as a tuple of integers, or the range that it is; ValueError if it is neither."""
    if isinstance(prompt, range):
        if prompt and min(prompt[0], prompt[-1]) < 0:
            raise InputError(f"prompt must be token ids, 0 or more, got {prompt}")
        return prompt
    ids: object = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # arrays of the host
    if isinstance(ids, (str, bytes)) or not isinstance(ids, abc.Iterable):
        raise InputError(
            f"prompt must be token ids, got {type(prompt).__name__}: tokenise text first"
        )
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
        "computed", "drafts", "finish_reason", "index", "key", "order", "preemptions",
        "request", "slots", "status", "stop_reason", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, index: int, order: int):
        """``index`` counts the sequences of the request, ``order`` the submitted requests."""
        self.request = request
        self.index = index
        self.order = order
        self.key: tuple[abc.Hashable, int] = (request.request_id, index)  # its name in plans
        self.tokens = list(request.prompt)
        self.drafts: list[int] = []
        self.computed = 0
        # Sequence slots that it takes: sequence 0 forks into n once its prompt is computed.
        self.slots = request.n if index == 0 else 1
        self.status = SequenceStatus.WAITING
        # Why it finished: "length", "abort", "dropped", or what the engine gave.
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.preemptions = 0

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
