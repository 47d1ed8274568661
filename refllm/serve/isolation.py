"""An error that one request causes ends that request, and no other.

A step serves many requests. Where it uses something that belongs to one of them, what that
raises must not reach the others: the request ends with ``finish_reason`` ``"error"`` and a
sentence in ``RequestOutput.error``. An error of the engine's own (the model, memory,
``on_plan``) has no request to end: the step is rolled back, and the error is raised.

``POINTS`` lists every place where a step uses something of a request. The engine's tests make
each of them fail, and notice one that is listed without a test, or used without being listed.

How a failure is kept apart:

- what is used for one request is called within ``try``, and added to ``Failures``;
- what is computed for several requests at once is computed again for each alone where it
  fails (``compute_isolated``): those for which it fails alone are the cause;
- inside the scheduler a ``RequestFailure`` carries the request to where it can be ended.

KeyboardInterrupt and SystemExit end the program, wherever they are raised: they reach the caller of
``step``. Every other exception of a function of the user's is its request's, those that are no
``Exception``, too (asyncio.CancelledError).

``submit`` is no such point: it raises to its caller, and the engine is unchanged.

Left out: a function of a request that never returns, or takes all memory (only a limit on
time or another process could stop it); an id whose ``__hash__`` or ``__eq__`` begins to fail.
"""

from __future__ import annotations

from collections import abc
from typing import Protocol, TypeVar

from refllm.decode.constraint import ConstraintFailure, NoTokenLeft
from refllm.errors import message

# point → what the sentence says has failed
POINTS = {
    "state": "preparing its sequence",  # drafter, generator and detokenizer are made
    "draft": "the drafter",
    "prefix": "hashing its prefix",  # at admission and when blocks become full
    "grammar": "the grammar",  # its masks and states, for logits, drafts and the output's end
    "processor": "a logits processor",  # of the user
    "logits": "processing its logits",  # masks, biases and penalties
    "sampling": "sampling with its parameters",
    "verification": "verifying its drafts",
    "text": "decoding its text",  # while it runs, and at its end
    "observe": "the drafter, told what was accepted,",
    "beam search": "its beam search",
    "callback": "the callback",
}


class RequestFailure(Exception):
    """Something of one request has failed at one of ``POINTS``."""

    def __init__(self, request_id: abc.Hashable, point: str, error: Exception):
        super().__init__(sentence(point, error))
        self.request_id = request_id


# Points at which a MemoryError, too, is the request's: a function of the user's, or after the
# step. Elsewhere memory is short for the whole engine, and the step is repeated.
OWN_MEMORY = ("grammar", "processor", "text", "callback")


def sentence(point: str, error: BaseException) -> str:
    """What ``RequestOutput.error`` says. Raises ``error`` itself if it is no single request's:
    a MemoryError outside ``OWN_MEMORY``. What a grammar raises is the grammar's, whatever ``point``
    it was used at; that no token is left needs no introduction.

    >>> sentence("callback", KeyError("lost"))
    "the callback raised KeyError: 'lost'"
    """
    if isinstance(error, MemoryError) and point not in OWN_MEMORY:
        raise error
    if isinstance(error, NoTokenLeft):
        return str(error)
    if isinstance(error, ConstraintFailure):  # whatever was done when it was asked
        point = "grammar"
        error = error.error
    return f"{POINTS[point]} raised {type(error).__name__}: {message(error)}"


class Failures(dict[abc.Hashable, str]):
    """The requests that have failed in the current step, with the sentence of the first error."""

    def add(self, request_id: abc.Hashable, point: str, error: BaseException) -> None:
        """Note that something of a request has raised ``error``."""
        self.setdefault(request_id, sentence(point, error))


class Share(Protocol):
    """One request's share of what is computed together."""

    def fail(self, point: str, error: Exception) -> None:
        """Something of the request has raised ``error``."""


S = TypeVar("S", bound=Share)
Result = TypeVar("Result")


def compute_isolated(
    shares: list[S], compute: abc.Callable[[list[S]], Result], point: str
) -> tuple[list[S], Result | None]:
    """``compute(shares)``, or the same without the shares for which it fails alone, which
    ``fail``; returns the shares that took part, and None for the result if none did.

    ``compute`` must change nothing. Raises what it raises if it fails for all together and
    for none alone: then no single request is the cause.
    """
    if not shares:
        return [], None
    try:
        return shares, compute(shares)
    except MemoryError:
        raise
    except Exception:
        healthy: list[S] = []
        for share in shares:
            try:
                compute([share])
            except Exception as error:
                share.fail(point, error)
            else:
                healthy.append(share)
        if len(healthy) == len(shares):
            raise
    return healthy, compute(healthy) if healthy else None
