"""Arrays as frames: the bracket or comma before an item, the item, and what comes after it.

    [ item , item ]
    └┘    └─┘    └┘  separators, shared by all arrays (``json_text.py``)

Which items may follow is decided by ``ArrayTable``. With ``uniqueItems`` the values read are part
of the state and forbidden for the items that follow; an item is also forbidden if it would take
a value that a later item needs (``distinct.py``). Where an array with ``uniqueItems`` lies below,
the frame keeps its items (``items``) and the arrays that it must not become (``forbidden``).

Left out: nothing of the shape; how long the whole text may become.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refllm.decode.grammar.automaton import Entry, Stack, Terminal
from refllm.decode.grammar.json_machine.array_table import ArrayState, ArrayTable
from refllm.decode.grammar.json_machine.json_text import CLOSE, ITEM, item_dfa
from refllm.decode.grammar.json_machine.value_frames import closed
from refllm.decode.grammar.json_scalars.json_values import Frozen, FrozenArray, read_value
from refllm.decode.grammar.json_schema.shapes import ArrayShape, Node

if TYPE_CHECKING:
    from refllm.decode.grammar.json_machine.json_frames import JsonFrames


class ArrayText:
    """The terminals of one shape."""

    def __init__(self, shape: ArrayShape, frames: JsonFrames) -> None:
        self.frames = frames
        self.table = ArrayTable(shape, frames.shapes)
        self._terminals = {
            (opening, allowed): Terminal(item_dfa(opening, frames.whitespace), allowed)
            for opening in (False, True)
            for allowed in (CLOSE, ITEM, CLOSE | ITEM)
        }

    def terminal(self, opening: bool, closes: bool, continues: bool) -> Terminal | None:
        """What is read before an item or at the end; None if neither is legal."""
        allowed = (CLOSE if closes else 0) | (ITEM if continues else 0)
        return self._terminals.get((opening, allowed))


@dataclass(frozen=True)
class ArrayFrame:
    """An array that is being read. ``reads_item``: the terminal above it is of an item, which
    ``state`` then counts already.
    """

    text: ArrayText
    reads_item: bool
    state: ArrayState
    items: FrozenArray | None = None  # read so far, where items are compared below
    forbidden: frozenset[FrozenArray] = frozenset()

    @property
    def captures(self) -> bool:
        """False: the frame reads texts from its terminals alone."""
        return False

    @property
    def compares(self) -> bool:
        """Whether the values of the items matter."""
        return self.items is not None or self.text.table.shape.unique

    def resume(self, label_bits: int, text: bytes | None, below: Stack | None) -> Iterator[Entry]:
        """What follows the separator or the item that was read (``Frame.resume``)."""
        if self.reads_item:
            value = read_value(text) if self.compares and text is not None else None
            yield from self.after_value(value, below)
            return
        if label_bits & CLOSE:
            yield from closed(self.items, below)
        if label_bits & ITEM:
            for node, after, forbidden in self._choices():
                frame = ArrayFrame(self.text, True, after, self.items, self.forbidden)
                yield from self.text.frames.threads(node, Stack(frame, below), forbidden)

    def after_value(self, value: Frozen, below: Stack | None) -> Iterator[Entry]:
        """What follows an item; ``value`` matters only where items are compared."""
        state, items, forbidden = self.state, self.items, self.forbidden
        if self.compares:
            if not self._may_be(state, value):
                return
            if self.text.table.shape.unique:
                state = state._replace(used=state.used | {value})
            if items is not None:
                forbidden = _agreeing(forbidden, items, value)
                items = (*items, value)
        frame = ArrayFrame(self.text, False, state, items, forbidden)
        terminal = frame.before_item(opening=False)
        if terminal is not None:
            yield terminal, Stack(frame, below)

    def before_item(self, opening: bool) -> Terminal | None:
        """The terminal before the next item or the closing bracket; None if neither is legal."""
        closes = self.text.table.closes(self.state) and self.items not in self.forbidden
        return self.text.terminal(opening, closes, any(self._choices()))

    def _choices(self) -> Iterator[tuple[Node, ArrayState, frozenset[Frozen] | None]]:
        """The items that may follow: node, state after it, and the values that are forbidden
        (None: values are not compared).
        """
        table = self.text.table
        if not self.compares:
            for node, after in table.items(self.state):
                yield node, after, None
            return
        distinct = self.text.frames.distinct
        here = self.state.index if self.items is None else len(self.items)
        candidates = {other[here] for other in self.forbidden if len(other) > here}
        if table.shape.unique:
            candidates |= self.state.used | distinct.scarce(table, self.state)
        for node, after in table.items(self.state):
            forbidden = frozenset(value for value in candidates if not self._may_be(after, value))
            if distinct.has_other(node, forbidden):
                yield node, after, forbidden

    def _may_be(self, after: ArrayState, value: Frozen) -> bool:
        """Whether the next item, after which the state is ``after``, may have this value."""
        table = self.text.table
        distinct = self.text.frames.distinct
        if table.shape.unique:
            if value in after.used:
                return False
            after = after._replace(used=after.used | {value})
            if not distinct.fillable(table, after):
                return False
        if self.items is None:
            return True
        agreeing = _agreeing(self.forbidden, self.items, value)
        if not agreeing:
            return True
        rest = frozenset(other[len(self.items) + 1 :] for other in agreeing)
        return distinct.array_completes(table, after, rest)


def _agreeing(
    forbidden: frozenset[FrozenArray], items: FrozenArray, value: Frozen
) -> frozenset[FrozenArray]:
    """The arrays of ``forbidden`` whose next item after ``items`` is ``value``."""
    here = len(items)
    return frozenset(other for other in forbidden if len(other) > here and other[here] == value)


def open_array(
    text: ArrayText, forbidden: frozenset[FrozenArray] | None
) -> tuple[Terminal, ArrayFrame] | None:
    """The terminal and the frame that begin an array; None if no array can be completed."""
    table = text.table
    if not table.feasible(table.start):
        return None
    if table.shape.unique and not text.frames.distinct.fillable(table, table.start):
        return None
    items = None if forbidden is None else ()
    frame = ArrayFrame(text, False, table.start, items, forbidden or frozenset())
    terminal = frame.before_item(opening=True)
    return None if terminal is None else (terminal, frame)
