"""Which items may follow in an array: the bookkeeping of one ``ArrayShape``.

A state is the index of the next item and, per ``ItemCount`` of the shape (``contains``), how many
items have counted so far. A thread chooses for each item whether it counts:

- with an upper limit, an item fits the counted node (one more) or its negation;
- without one, an item counts while fewer than ``low`` have, or need not be looked at.

So every array has a path, and an item is legal if the rest of the array can still be filled.
Which numbers n of further items can fill it is a set of integers per state, held as a bit set:

    fills(i, c) = {0 if c has reached every low}  ∪  {1 + n : n in fills(i + 1, c') for a choice c'}

Behind the prefix the choices no longer depend on i, and n matters only up to the sum of all
limits: with more items than that some choice leaves the counts as they are, and can be repeated.

| symbol | name | type |
|---|---|---|
| i | ``ArrayState.index`` | int, capped where larger ones change nothing |
| c | ``ArrayState.counts`` | tuple of int, capped at ``low`` (at ``high`` if there is one) |

Left out: which values are equal (``distinct.py``), the text, the stack (``array_frames.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_scalars.json_values import Frozen
from refllm.decode.grammar.json_schema.shapes import ArrayShape, ItemCount, Node, NodeExpander

MOST_COUNTS = 20_000  # combinations of counts of one array


class ArrayState(NamedTuple):
    """What the rest of an array depends on."""

    index: int = 0  # type: ignore[assignment]  # of the next item, not the method of tuples
    counts: tuple[int, ...] = ()
    used: frozenset[Frozen] = frozenset()  # the items so far, if they must be distinct


class Item(NamedTuple):
    """A choice for the next item: its node, and the state after it (without its value)."""

    node: Node
    after: ArrayState


class ArrayTable:
    """The items that may follow in each state of a shape."""

    def __init__(self, shape: ArrayShape, shapes: NodeExpander) -> None:
        self.shape = shape
        self._shapes = shapes
        self._limits = tuple(
            count.low if count.high is None else count.high for count in shape.counts
        )
        # from this index on, all items have the same choices
        self.uniform = max([len(shape.prefix), *(count.start for count in shape.counts)])
        self._period = sum(self._limits) + 1
        combinations = 1
        for limit in self._limits:
            combinations *= limit + 1
        if combinations * self._period > MOST_COUNTS * 50 or combinations > MOST_COUNTS:
            raise GrammarError(
                f"an array counts its items in more than {MOST_COUNTS} ways: use a smaller "
                "minContains or maxContains",
                keyword="contains",
            )
        self._last = max(self.uniform, shape.minimum)
        self._choices: dict[tuple[int, tuple[int, ...]], tuple[tuple[Node, tuple[int, ...]], ...]]
        self._choices = {}
        self._fills: dict[tuple[int, tuple[int, ...]], int] = {}
        self._items: dict[tuple[int, tuple[int, ...]], tuple[Item, ...]] = {}
        self.start = ArrayState(0, (0,) * len(shape.counts))

    def node(self, index: int) -> Node:
        """The node of the item at an index, counts apart."""
        prefix = self.shape.prefix
        return prefix[index] if index < len(prefix) else self.shape.rest

    def nodes(self) -> Iterator[Node]:
        """Every node that an item may have to fit, whatever was read before."""
        self.feasible(self.start)  # looks at the choices in all states
        for choices in self._choices.values():
            for node, _ in choices:
                yield node

    def closes(self, state: ArrayState) -> bool:
        """Whether the array may end."""
        return state.index >= self.shape.minimum and self._satisfied(state.counts)

    def items(self, state: ArrayState) -> tuple[Item, ...]:
        """The choices for the next item after which the array can be completed."""
        summary = state.index, state.counts
        if summary not in self._items:
            self._items[summary] = tuple(self._compute_items(*summary))
        items = self._items[summary]
        if not state.used:
            return items
        return tuple(Item(node, after._replace(used=state.used)) for node, after in items)

    def feasible(self, state: ArrayState) -> bool:
        """Whether the array can be completed; equal items are not looked at."""
        maximum = self.shape.maximum
        if maximum is not None and self.shape.minimum > maximum:
            return False
        fills = self._fills_of(min(state.index, self.uniform), state.counts)
        # ``n`` further items; all n from ``period`` (+ prefix left) on are alike
        stationary = self._period + max(0, self.uniform - state.index)
        least = min(max(0, self.shape.minimum - state.index), stationary)
        fills >>= least
        if maximum is None:
            return fills != 0
        most = min(maximum - state.index, stationary)
        return most >= least and fills & ((2 << (most - least)) - 1) != 0

    def _compute_items(self, index: int, counts: tuple[int, ...]) -> list[Item]:
        following = index + 1
        if self.shape.maximum is None:
            following = min(following, self._last)
        items = []
        for node, more in self._choices_of(min(index, self.uniform), counts):
            after = ArrayState(following, more)
            if self.feasible(ArrayState(index + 1, more)):
                items.append(Item(node, after))
        return items

    def _satisfied(self, counts: tuple[int, ...]) -> bool:
        return all(
            count >= wanted.low for count, wanted in zip(counts, self.shape.counts, strict=True)
        )

    def _choices_of(
        self, index: int, counts: tuple[int, ...]
    ) -> tuple[tuple[Node, tuple[int, ...]], ...]:
        """Node and counts after the item, for each inhabited choice; index up to ``uniform``."""
        if (index, counts) not in self._choices:
            options: list[list[tuple[Node, int]]] = [
                _options(wanted, count) if index >= wanted.start else [(frozenset(), count)]
                for wanted, count in zip(self.shape.counts, counts, strict=True)
            ]
            found: dict[tuple[Node, tuple[int, ...]], None] = {}
            for chosen in product(*options):
                node = self.node(index).union(*(extra for extra, _ in chosen))
                if self._shapes.inhabited(node):
                    found[node, tuple(count for _, count in chosen)] = None
            self._choices[index, counts] = tuple(found)
        return self._choices[index, counts]

    def _fills_of(self, index: int, counts: tuple[int, ...]) -> int:
        """The bit set of the numbers of further items that complete the array (see above)."""
        # Work list in place of recursion: prefixes and limits may be longer than Python's stack.
        pending = [(index, counts)]
        while pending:
            here = pending[-1]
            if here in self._fills:
                pending.pop()
                continue
            at, now = here
            repeats = False
            following = []
            for _, after in self._choices_of(at, now):
                if at == self.uniform and after == now:
                    repeats = True
                else:
                    following.append((min(at + 1, self.uniform), after))
            unknown = [state for state in following if state not in self._fills]
            if unknown:
                pending.extend(unknown)
                continue
            fills = int(self._satisfied(now))
            for state in following:
                fills |= self._fills[state] << 1
            stationary = self._period + self.uniform - at
            whole = (2 << stationary) - 1
            if repeats and fills:
                lowest = fills & -fills
                fills |= whole & ~(lowest - 1)
            elif fills >> stationary + 1:  # every larger n like ``stationary``
                fills |= 1 << stationary
            self._fills[here] = fills & whole
            pending.pop()
        return self._fills[index, counts]


def _options(wanted: ItemCount, count: int) -> list[tuple[Node, int]]:
    """What an item may be asked to fit for one ``ItemCount``, and the count after it."""
    anything: Node = frozenset()
    if wanted.high is None:
        if count >= wanted.low:
            return [(anything, count)]
        return [(wanted.value, count + 1), (anything, count)]
    if count >= wanted.high:
        return [(wanted.negation, count)]
    return [(wanted.value, count + 1), (wanted.negation, count)]
