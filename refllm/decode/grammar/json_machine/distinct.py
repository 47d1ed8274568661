"""Distinct items (``uniqueItems``): which values a node has, if they are few.

An item must differ from all items before it. Where endless many values remain that is checked
when the item ends. Where few remain, the check must come early enough that no dead end arises:
after ``["a", "b", `` there may be no legal item left, and after ``{"k": "a"`` the object may have
no way to close but the forbidden one. So the frames ask here

- ``values``: all values of a node, if they are at most a given number;
- ``has_other``: whether a node has a value outside of a forbidden set;
- ``object_completes``, ``array_completes``: whether what was read of a container can become
  something that is not forbidden;
- ``fillable``: whether the items still required can all be distinct.

All answers come from one search, which stops as soon as there are more values than asked for.
A node that contains itself has endless many values, as every node is inhabited.

Left out: containers that must have more than ``DEEP`` items or keys, or all keys of a class of
very many, and shortage of values that shows only when more than ``MOST_SEARCHED`` ways to fill an
array were tried. All of them count as possible.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_operations import with_length
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_machine.array_table import ArrayState, ArrayTable
from refllm.decode.grammar.json_machine.object_table import ObjectState, ObjectTable
from refllm.decode.grammar.json_scalars.json_values import (
    Frozen,
    FrozenArray,
    FrozenObject,
    Truth,
    read_value,
)
from refllm.decode.grammar.json_scalars.number_texts import TEXTS_PER_NUMBER, canonical
from refllm.decode.grammar.json_schema.shapes import Node, NumberShape, StringShape

if TYPE_CHECKING:
    from refllm.decode.grammar.json_machine.json_frames import JsonFrames

LITERALS: dict[str, Frozen] = {"null": None, "true": Truth.TRUE, "false": Truth.FALSE}
BATCH = 128  # limits are rounded up to multiples, so that answers are found again
DEEP = 200
MOST_SEARCHED = 10_000


class _TooMany(Exception):
    """There are more values than asked for."""


class DistinctValues:
    """The values of nodes, as far as they are few; answers are kept."""

    def __init__(self, frames: JsonFrames) -> None:
        self._frames = frames
        self._values: dict[tuple[Node, int], frozenset[Frozen] | None] = {}
        self._pending: set[Node] = set()

    def values(self, node: Node, limit: int) -> frozenset[Frozen] | None:
        """All values of a node; None if there are more than ``limit``."""
        limit = -(-max(limit, 1) // BATCH) * BATCH
        if node in self._pending:
            return None
        if (node, limit) not in self._values:
            self._pending.add(node)
            try:
                self._values[node, limit] = self._all_values(node, limit)
            except _TooMany:
                self._values[node, limit] = None
            finally:
                self._pending.discard(node)
        return self._values[node, limit]

    def has_other(self, node: Node, forbidden: frozenset[Frozen]) -> bool:
        """Whether a node has a value that is not in ``forbidden``."""
        if not forbidden:
            return True
        values = self.values(node, len(forbidden))
        return values is None or not values <= forbidden

    def object_completes(
        self, table: ObjectTable, state: ObjectState, forbidden: frozenset[FrozenObject]
    ) -> bool:
        """Whether an object can be completed with other pairs than one of ``forbidden``."""
        try:
            found = self._objects(table, state, len(forbidden))
        except _TooMany:
            return True
        return not found <= forbidden

    def array_completes(
        self, table: ArrayTable, state: ArrayState, forbidden: frozenset[FrozenArray]
    ) -> bool:
        """Whether an array can be completed with other items than one of ``forbidden``."""
        try:
            found = self._arrays(table, state, len(forbidden))
        except _TooMany:
            return True
        return not found <= forbidden

    def fillable(self, table: ArrayTable, state: ArrayState) -> bool:
        """Whether an array whose items must differ can be completed."""
        return self._fillable(table, state, [MOST_SEARCHED])

    def scarce(self, table: ArrayTable, state: ArrayState) -> frozenset[Frozen]:
        """Values that an item now might take away from the items that must follow it."""
        found: set[Frozen] = set()
        wanted = table.shape.minimum - state.index + len(state.used)
        nodes = {table.node(index) for index in range(state.index + 1, table.shape.minimum)}
        if len(nodes) == 1 and not table.shape.counts and table.node(state.index) in nodes:
            return frozenset()  # all alike: any distinct values will do
        if not table.closes(state):
            for index, count in enumerate(table.shape.counts):
                if state.counts[index] < count.low:
                    nodes |= {item.node for item in table.items(state)}
        for node in nodes:
            found.update(self.values(node, wanted) or ())
        return frozenset(found - state.used)

    def _fillable(self, table: ArrayTable, state: ArrayState, budget: list[int]) -> bool:
        if table.closes(state):
            return True
        budget[0] -= 1
        if budget[0] < 0 or len(state.used) > DEEP:
            return True
        missing = table.shape.minimum - state.index
        if state.index >= table.uniform and not table.shape.counts:
            values = self.values(table.shape.rest, missing + len(state.used))
            return values is None or len(values - state.used) >= missing
        for node, after in table.items(state):
            values = self.values(node, missing + len(state.used))
            # a value that no other item needs stands for the endless many
            options: Iterable[Frozen] = (
                [("new", len(state.used))] if values is None else values - state.used
            )
            for value in options:
                if self._fillable(table, after._replace(used=state.used | {value}), budget):
                    return True
        return False

    def _all_values(self, node: Node, limit: int) -> frozenset[Frozen]:
        shapes = self._frames.shapes.expand(node)
        found: set[Frozen] = {LITERALS[literal] for literal in shapes.literals}
        for string in shapes.strings:
            found |= _strings(string, limit)
        for number in shapes.numbers:
            found |= _numbers(number, limit)
        for array in shapes.arrays:
            table = self._frames.array_text(array).table
            if table.feasible(table.start):
                found |= self._arrays(table, table.start, limit)
        for shape in shapes.objects:
            keys = self._frames.object_text(shape).table
            if keys.feasible(keys.start):
                found |= self._objects(keys, keys.start, limit)
        if len(found) > limit:
            raise _TooMany
        return frozenset(found)

    def _known(self, node: Node, limit: int) -> frozenset[Frozen]:
        values = self.values(node, limit)
        if values is None:
            raise _TooMany
        return values

    def _objects(self, table: ObjectTable, state: ObjectState, limit: int) -> set[FrozenObject]:
        """The pairs that may complete an object; keys are added in the order of their labels."""
        found: set[FrozenObject] = set()

        def search(state: ObjectState, pairs: FrozenObject, least: int) -> None:
            moves = table.moves(state)
            if moves.closes:
                found.add(pairs)
            if len(found) > limit or len(pairs) > DEEP:
                raise _TooMany
            seen = {key for _, key in state.extras}
            for label, values in moves.values.items():
                if label < least or table.skips_required(state, label):
                    continue
                texts = table.texts(label, limit)
                if texts is None:
                    raise _TooMany
                for text in texts:
                    if text in seen:
                        continue
                    for value in values:
                        after = table.after(state, label, text, value.owed)
                        for mine in self._known(value.node, limit):
                            search(after, pairs | {(text, mine)}, label)

        search(state, frozenset(), 0)
        return found

    def _arrays(self, table: ArrayTable, state: ArrayState, limit: int) -> set[FrozenArray]:
        """The items that may complete an array."""
        found: set[FrozenArray] = set()

        def search(state: ArrayState, items: FrozenArray) -> None:
            if table.closes(state):
                found.add(items)
            if len(found) > limit or len(items) > DEEP:
                raise _TooMany
            for node, after in table.items(state):
                for mine in self._known(node, limit):
                    if table.shape.unique:
                        if mine in state.used:
                            continue
                        after = after._replace(used=state.used | {mine})
                    search(after, (*items, mine))

        search(state, ())
        return found


def _strings(shape: StringShape, limit: int) -> set[Frozen]:
    """All strings of a shape."""
    dfa = shape.dfa
    if not dfa.finite and (shape.maximum is None or shape.maximum > limit):
        raise _TooMany
    try:
        dfa = with_length(dfa, shape.minimum, shape.maximum)
    except GrammarError:  # too many states
        raise _TooMany from None
    return {"".join(map(chr, word)) for word in _words(dfa, limit)}


def _numbers(shape: NumberShape, limit: int) -> set[Frozen]:
    """All numbers of a shape."""
    texts = _words(canonical(shape.dfa), limit * TEXTS_PER_NUMBER)
    return {read_value(bytes(text)) for text in texts}


def _words(dfa: DFA, limit: int) -> list[tuple[int, ...]]:
    count = dfa.cardinality
    if count is None or count > limit:
        raise _TooMany
    return dfa.words(count)
