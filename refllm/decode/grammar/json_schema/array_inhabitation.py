"""Whether some array fits a shape.

Without counts and ``uniqueItems``, the first ``minimum`` items must each be possible. Counts
(``contains``) are followed item by item: the set of the vectors of counts that an array of this
length can have. For ``uniqueItems``, the values of nodes with few values are listed, and items
are matched to values that differ (augmenting paths); nodes with many values never run out.

Left out: counts beyond ``MOST_STEPS``, and more than ``MOST_WAYS`` ways to count items that
differ; both raise a ``GrammarError``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import product
from typing import Protocol

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.shapes import ArrayShape, ItemCount, Node

MOST_STEPS = 200_000  # items times vectors of counts
MOST_WAYS = 2_000  # to count items that differ
Ask = Callable[[Node], bool]
Vector = tuple[int, ...]


class Values(Protocol):
    """What arrays ask beside ``ask``."""

    def join(self, *nodes: Node) -> Node:
        """The node of the values that fit all nodes."""
        ...

    def values(self, node: Node, limit: int, ask: Ask) -> Sequence[Hashable] | None:
        """All values that fit a node, or None if there are ``limit`` of them or more."""
        ...


def inhabited(shape: ArrayShape, values: Values, ask: Ask) -> bool:
    """Whether any array fits a shape. ``ask(node)``: whether any value fits a node."""
    if shape.maximum is not None and shape.minimum > shape.maximum:
        return False
    if shape.minimum == 0 and all(count.low == 0 for count in shape.counts):
        return True
    longer = shape.minimum > 1 or any(count.low and count.start for count in shape.counts)
    unique = shape.unique and (longer or sum(count.low for count in shape.counts) > 1)
    if shape.counts:
        return _countable(shape, values, ask) and (
            not unique or _distinct_and_counted(shape, values, ask)
        )
    answers = [ask(node) for node in _first_nodes(shape)]  # ask about all of them at once
    if not all(answers):
        return False
    return not unique or _distinct(shape, values, ask)


def _first_nodes(shape: ArrayShape) -> Iterator[Node]:
    """The nodes of the first ``minimum`` items, that of the rest once."""
    yield from shape.prefix[: shape.minimum]
    if shape.minimum > len(shape.prefix):
        yield shape.rest


def _distinct(shape: ArrayShape, values: Values, ask: Ask) -> bool:
    """Whether the first ``minimum`` items can have values that differ from each other."""
    nodes = list(shape.prefix[: shape.minimum])
    count = shape.minimum - len(nodes)
    if count > 0:
        rest = values.values(shape.rest, shape.minimum, ask)
        if rest is not None and len(rest) < count:
            return False
        if rest is not None:
            nodes += [shape.rest] * count
    return _assignable([values.values(node, shape.minimum, ask) for node in nodes])


def _assignable(choices: Sequence[Sequence[Hashable] | None]) -> bool:
    """Whether each item can have a value of its own; None: it has enough of them."""
    owner: dict[Hashable, int] = {}  # which item has a value
    return all(
        found is None or _assign(item, choices, owner, set()) for item, found in enumerate(choices)
    )


def _assign(
    item: int,
    choices: Sequence[Sequence[Hashable] | None],
    owner: dict[Hashable, int],
    tried: set[Hashable],
) -> bool:
    """Give an item a value of its own, moving other items to other values if need be."""
    for value in choices[item] or ():
        if value not in tried:
            tried.add(value)
            if value not in owner or _assign(owner[value], choices, owner, tried):
                owner[value] = item
                return True
    return False


def _countable(shape: ArrayShape, values: Values, ask: Ask) -> bool:
    """Whether the counts of matching items can all be in range."""
    counts = shape.counts
    horizon = max(len(shape.prefix), shape.minimum, *(count.start for count in counts))
    vectors = 1
    for count in counts:
        vectors *= 2 + (count.low if count.high is None else count.high)
    longest = horizon + sum(count.low for count in counts)
    if longest * vectors > MOST_STEPS:
        raise GrammarError("the counts of matching items are too large", keyword="contains")
    reached: set[Vector] = {(0,) * len(counts)}
    patterns: dict[int, list[Vector]] = {}
    seen: set[frozenset[Vector]] = set()
    length = 0
    while reached:
        if length >= shape.minimum and any(_in_range(each, counts) for each in reached):
            return True
        if length == shape.maximum or (length > horizon and frozenset(reached) in seen):
            return False
        if length > horizon:
            seen.add(frozenset(reached))
        place = min(length, horizon)
        if place not in patterns:
            patterns[place] = [vector for vector, _ in _patterns(shape, place, values, ask)]
        added = product(reached, patterns[place])
        sums = (_sum(vector, pattern, counts) for vector, pattern in added)
        reached = {vector for vector in sums if vector is not None}
        length += 1
    return False


def _patterns(shape: ArrayShape, index: int, values: Values, ask: Ask) -> list[tuple[Vector, Node]]:
    """Which counts an item at ``index`` can add to, as vectors of 0 and 1, and its node then.

    Without an upper limit an item that fits need not be counted.
    """
    own = shape.prefix[index] if index < len(shape.prefix) else shape.rest
    found: list[tuple[Vector, Node]] = [((), own)]
    for count in shape.counts:
        longer: list[tuple[Vector, Node]] = []
        for vector, node in found:
            if count.start > index:
                longer.append(((*vector, 0), node))
                continue
            longer.append(((*vector, 1), values.join(node, count.value)))
            other = node if count.high is None else values.join(node, count.negation)
            longer.append(((*vector, 0), other))
        found = [(vector, node) for vector, node in longer if ask(node)]
    return found


def _distinct_and_counted(shape: ArrayShape, values: Values, ask: Ask) -> bool:
    """Whether the counts can be in range with items that differ, by trying all ways."""
    start = max(count.start for count in shape.counts)
    longest = max(len(shape.prefix), shape.minimum, start) + sum(c.low for c in shape.counts)
    if shape.maximum is not None:
        longest = min(longest, shape.maximum)
    steps = 0
    pending: list[tuple[Vector, tuple[Node, ...]]] = [((0,) * len(shape.counts), ())]
    while pending:
        vector, nodes = pending.pop()
        steps += 1
        if steps > MOST_WAYS:
            raise GrammarError(
                "items that differ and are counted by contains have too many ways to do so",
                keyword="uniqueItems",
            )
        choices = [values.values(node, longest, ask) for node in nodes]
        if not _assignable(choices):
            continue
        if len(nodes) >= shape.minimum and _in_range(vector, shape.counts):
            return True
        if len(nodes) < longest:
            for pattern, node in _patterns(shape, len(nodes), values, ask):
                total = _sum(vector, pattern, shape.counts)
                if total is not None:
                    pending.append((total, (*nodes, node)))
    return False


def _sum(vector: Vector, pattern: Vector, counts: Sequence[ItemCount]) -> Vector | None:
    """The counts after one more item, None if one is exceeded; no count above ``low`` is kept
    where there is no limit.
    """
    total = []
    for old, more, count in zip(vector, pattern, counts, strict=True):
        new = old + more
        if count.high is not None and new > count.high:
            return None
        total.append(new if count.high is not None else min(new, count.low))
    return tuple(total)


def _in_range(vector: Vector, counts: Sequence[ItemCount]) -> bool:
    """Whether every count has reached its lower limit."""
    return all(found >= count.low for found, count in zip(vector, counts, strict=True))
