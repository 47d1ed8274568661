"""The stacks of the pushdown automaton: persistent linked lists of frames, and forks of stacks.

Pushing and popping share what lies below, so a branch costs one frame. Stacks that differ but go on
alike can be joined: a ``Fork`` is a frame that stands for several stacks.

    {A·x, A·y, B·z}  →  Fork{A·Fork{x, y}, B·z}

Source: the persistent stack, XGrammar (arXiv 2411.15100, §3.4); joined stacks, Tomita's
graph-structured stack ("Efficient Parsing for Natural Language", 1986).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from refllm.decode.grammar.automaton import Terminal

# As ``Frame.resume`` returns them.
Entry: TypeAlias = "tuple[Terminal | None, Stack | None]"


class Frame(Protocol):
    """What surrounds a terminal: an object, an array, the rest of a rule. Immutable and hashable.

    ``captures``: whether ``resume`` needs the bytes of everything that was read above the frame
    since it was pushed.
    """

    @property
    def captures(self) -> bool: ...

    def resume(
        self, label_bits: int, text: bytes | None, below: Stack | None
    ) -> Iterable[tuple[Terminal | None, Stack | None]]:
        """What may follow once the terminal above this frame was read, with these labels.

        ``text`` is what was read above the frame if it ``captures``, else what the terminal
        directly above read if that captures, else None. ``below`` is the stack without this
        frame. Each alternative is a terminal and the stack under it, which extends ``below``;
        None in place of the terminal: nothing is read here, and the top of that stack is resumed
        at once, with label bits 1.
        """
        ...


class Stack:
    """A frame and the stack below it: a persistent linked list, None when empty."""

    __slots__ = ("__weakref__", "_hash", "below", "captures", "depth", "frame")

    def __init__(self, frame: Frame, below: Stack | None = None) -> None:
        self.frame = frame
        self.below = below
        # how many frames capture, this one included
        self.captures: int = frame.captures + (below.captures if below is not None else 0)
        self.depth: int = 1 + (below.depth if below is not None else 0)
        self._hash: int = hash((frame, below._hash if below is not None else 0))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stack):
            return NotImplemented
        mine: Stack | None = self
        theirs: Stack | None = other
        while mine is not theirs:  # equal stacks mostly share what is below
            if mine is None or theirs is None:
                return False
            if mine._hash != theirs._hash or mine.depth != theirs.depth:
                return False
            if mine.frame != theirs.frame:
                return False
            mine = mine.below
            theirs = theirs.below
        return True

    def __iter__(self) -> Iterator[Frame]:
        """The frames, top first."""
        at: Stack | None = self
        while at is not None:
            yield at.frame
            at = at.below

    def __reduce__(self) -> tuple[object, ...]:  # hashes of strings differ between processes
        return _stack_of, (tuple(self),)

    def __repr__(self) -> str:
        return f"Stack({list(self)})"


def _stack_of(frames: tuple[Frame, ...]) -> Stack | None:
    """The stack of these frames, top first."""
    stack = None
    for frame in reversed(frames):
        stack = Stack(frame, stack)
    return stack


class Joinable:
    """The base of frames whose ``resume`` depends on the stack below alone, not on labels or text:
    stacks with such tops may be joined.
    """

    captures = False


@dataclass(frozen=True)
class Fork(Joinable):
    """A frame that stands for several stacks: the text may go on with any of them."""

    stacks: frozenset[Stack | None]

    def resume(self, label_bits: int, text: bytes | None, below: Stack | None) -> Iterator[Entry]:
        """Each of the stacks, whose top is resumed at once."""
        for stack in self.stacks:
            yield None, stack


def join(stacks: Iterable[Stack | None]) -> Stack | None:
    """One stack for several, whose tops are ``Joinable``; None is the end of the text.

    >>> join([None]) is None, join([Stack(Fork(frozenset([None])))]) is None
    (True, True)
    """
    below: dict[Frame, set[Stack | None]] = {}
    found: set[Stack | None] = set()
    for stack in stacks:
        for part in parts(stack):
            if part is None:
                found.add(None)
            else:
                below.setdefault(part.frame, set()).add(part.below)
    for frame, several in below.items():
        found.add(Stack(frame, several.pop() if len(several) == 1 else _fork(several)))
    return found.pop() if len(found) == 1 else _fork(found)


# Each fork exists once: equal forks are the same object, or comparing them would visit their graphs
# along every path.
_FORKS: WeakValueDictionary[frozenset[Stack | None], Stack] = WeakValueDictionary()


def _fork(stacks: Iterable[Stack | None]) -> Stack:
    """A fork of stacks, none of which is one."""
    together = frozenset(part for stack in stacks for part in parts(stack))
    found = _FORKS.get(together)
    if found is None:
        found = Stack(Fork(together))
        _FORKS[together] = found
    return found


def parts(stack: Stack | None) -> Iterable[Stack | None]:
    """The stacks that a stack stands for."""
    if stack is not None and isinstance(stack.frame, Fork):
        return stack.frame.stacks
    return (stack,)
