"""What the frames of objects and arrays have in common: a value was read, a container closed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from refllm.decode.grammar.automaton import Entry, Stack
from refllm.decode.grammar.json_scalars.json_values import Frozen


@runtime_checkable
class ValueFrame(Protocol):
    """A frame above which a JSON value is read."""

    def after_value(self, value: Frozen, below: Stack | None) -> Iterator[Entry]:
        """What follows ``value``; it is None where the frame does not ask for values."""
        ...


def closed(
    container: tuple[Frozen, ...] | frozenset[tuple[str, Frozen]] | None, below: Stack | None
) -> Iterator[Entry]:
    """What follows when an array or object is complete; None if its value is not asked for."""
    if container is None:
        yield None, below
        return
    assert below is not None
    assert isinstance(below.frame, ValueFrame)
    yield from below.frame.after_value(container, below.below)
