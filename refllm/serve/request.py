"""What a user asks for, and the state of one continuation while it is served: plain Python,
no model, no arrays.

| name      | meaning                                                                                   |
|-----------|-------------------------------------------------------------------------------------------|
| request   | a prompt and how to continue it; never changes                                            |
| sequence    | one of a request's n continuations: its tokens, and how many have keys and values cached  |
| tokens    | prompt + output so far                                                                    |
| drafts    | guesses for the next tokens (speculation); they count to ``total`` until they are judged  |
| computed  | tokens [0, computed) have their keys and values in memory                                 |
| total     | len(tokens) + len(drafts): what a step tries to compute up to                             |

A sequence does not know whether it is in prefill or in decode, and nothing here asks: it is
``total - computed`` tokens behind. Prefill, decode, a resumed request and a verification of
drafts differ in these two numbers only (vLLM's second scheduler has it so).

Left out: the model's limits (its vocabulary, its longest context): the engine checks them
on ``submit``.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from math import inf
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it. ValueError names the field that makes no sense.

    ``max_tokens`` 0 is allowed and ends at once, with nothing. ``n`` continuations of the
    prompt share its memory; with ``beam`` they are the beams of one search, which advance
    in step: hypotheses are ranked by the sum of their log-probabilities divided by length
    ** ``length_penalty``. Lower ``priority`` first. ``arrival`` is in seconds. Requests
    with different ``salt`` never share cached prefixes. ``prompt`` may be a ``range`` where
    only lengths matter.
    """

    prompt: abc.Sequence[int]
    max_tokens: int = 16
    id: Hashable = None  # None: the scheduler gives one
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: abc.Sequence[str] = ()
    ignore_eos: bool = False
    n: int = 1
    beam: bool = False
    length_penalty: float = 1.0
    priority: int = 0
    arrival: float = 0.0
    salt: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _tokens(self.prompt))
        object.__setattr__(
            self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        )
        rules: dict[str, tuple[bool, str]] = {
            "max_tokens": (
                _whole(self.max_tokens) and self.max_tokens >= 0,
                "a whole number, 0 or more",
            ),
            "temperature": (
                _number(self.temperature) and self.temperature >= 0,
                "0 (greedy) or finite and above",
            ),
            "top_k": (_whole(self.top_k) and self.top_k >= 0, "0 (off) or a whole number above"),
            "top_p": (_number(self.top_p) and 0 < self.top_p <= 1, "within (0, 1]"),
            "min_p": (_number(self.min_p) and 0 <= self.min_p <= 1, "within [0, 1]"),
            "repetition_penalty": (
                _number(self.repetition_penalty) and self.repetition_penalty > 0,
                "above 0",
            ),
            "seed": (
                self.seed is None or (_whole(self.seed) and self.seed >= 0),
                "None or a whole number, 0 or more",
            ),
            "stop": (
                all(isinstance(s, str) and s for s in self.stop),
                "strings that are not empty",
            ),
            "n": (_whole(self.n) and self.n >= 1, "a whole number, 1 or more"),
            "length_penalty": (_number(self.length_penalty), "a finite number"),
            "priority": (_whole(self.priority), "a whole number, lower first"),
            "arrival": (_number(self.arrival) and self.arrival >= 0, "seconds, 0 or more"),
            "salt": (self.salt is None or isinstance(self.salt, str), "None or a string"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(
                    f"request {self.id!r}: {name} must be {rule}, got {getattr(self, name)!r}"
                )
        if not self.prompt:
            raise ValueError(
                f"request {self.id!r}: the prompt is empty: a model needs a token to continue"
            )
        try:
            hash(self.id)
        except TypeError as error:
            raise ValueError(f"a request's id must be hashable, got {self.id!r}") from error

    @property
    def longest(self) -> int:
        """Tokens that can need memory at one time: the last one that is sampled is never
        computed.
        """
        return len(self.prompt) + max(0, self.max_tokens - 1)


def _tokens(prompt: Any) -> abc.Sequence[int]:
    if isinstance(prompt, range):
        if prompt and min(prompt[0], prompt[-1]) < 0:
            raise ValueError(f"prompt must be token ids, 0 or more, got {prompt}")
        return prompt
    ids: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # arrays of the host
    if isinstance(ids, (str, bytes)) or not hasattr(ids, "__iter__"):
        raise ValueError(
            f"prompt must be token ids, got {type(prompt).__name__}: tokenise text first"
        )
    ids = tuple(ids)
    wrong = next((i for i, t in enumerate(ids) if not _whole(t) or t < 0), None)
    if wrong is not None:
        raise ValueError(
            f"prompt must be token ids, 0 or more, got {ids[wrong]!r} at position {wrong}"
        )
    return tuple(int(t) for t in ids)


def _whole(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _number(x: Any) -> bool:
    return not isinstance(x, bool) and isinstance(x, Real) and -inf < float(x) < inf


class Status(Enum):
    """Where a sequence is."""

    WAITING = "waiting"  # in the queue: new, or preempted
    RUNNING = "running"
    ENDED = "ended"


class Sequence:
    """One continuation of a request while it is served; the scheduler alone changes it."""

    __slots__ = (
        "computed", "drafts", "index", "key", "order", "preemptions", "reason", "request", "seats", "status", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, index: int, order: int):
        self.request = request
        self.index = index
        self.order = order
        self.key: tuple[Hashable, int] = (request.id, index)  # its name in plans
        self.tokens = list(request.prompt)
        self.drafts: list[int] = []
        self.computed = 0
        # it will become so many once its prompt is computed
        self.seats = request.n if index == 0 else 1
        self.status = Status.WAITING
        # why it ended: "length", "aborted", "dropped", or what the engine said
        self.reason: str | None = None
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
    def left(self) -> int:
        """How many more tokens it may get."""
        return len(self.request.prompt) + self.request.max_tokens - len(self.tokens)

    def __repr__(self) -> str:
        return f"Sequence({self.request.id!r}.{self.index}, {self.computed}/{self.total}, {self.status.value})"
