"""What the engines of ``grammar.py`` share: judging the instances of a schema token by token, and
the clock around each mask.

Times are processor time of the thread that calls. ``first`` is the first mask of a state, ``again``
the second one right after it: refllm keeps masks, the others compute them again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from common import Channel

TOO_LARGE = 20.0  # seconds of masks after which a schema's times end


class Rejected(Exception):
    """The engine does not compile the schema; the message is its own."""


class Matcher(Protocol):
    """A text that is being read."""

    def mask(self) -> object:
        """The legal tokens, in the engine's own form (refllm: unpacked)."""

    def accept(self, token: int) -> bool:
        """Read a token; False if it is illegal."""

    def accepting(self) -> bool:
        """Whether the text may end here."""


class Engine(Protocol):
    """A library of grammars, for one tokenizer."""

    name: str

    def compile(self, schema: str) -> Callable[[], Matcher]:
        """A maker of matchers; Rejected if the schema cannot be compiled."""


def serve(channel: Channel, make: Callable[[str], Engine]) -> None:
    """Answer requests; the first names the tokenizer's model."""
    engines: dict[str, Engine] = {}
    while (request := channel.receive()) is not None:
        model = request["model"]
        if model not in engines:
            engines[model] = make(model)
        channel.send(**judge(engines[model], request))


def judge(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Compile a schema and read its instances; with ``timed`` also their masks."""
    began = time.thread_time()
    try:
        start = engine.compile(request["schema"])
    except Rejected as error:
        return {"rejected": str(error)[:200]}
    seconds = time.thread_time() - began
    verdicts = []
    times: dict[str, list[float]] = {"first": [], "again": []}
    for tokens in request["instances"]:
        verdicts.append(_read(start(), tokens, times if request["timed"] else None))
    return {"rejected": None, "compile": seconds, "verdicts": verdicts, **times}


def _read(matcher: Matcher, tokens: list[int], times: dict[str, list[float]] | None) -> bool:
    for token in tokens:
        if times is not None and sum(times["first"]) < TOO_LARGE:
            for which in ("first", "again"):
                began = time.thread_time()
                matcher.mask()
                times[which].append(time.thread_time() - began)
        if not matcher.accept(token):
            return False
    return matcher.accepting()
