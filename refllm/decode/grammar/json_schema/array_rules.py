"""Arrays of a JSON Schema: items by position, lengths, ``contains``, ``uniqueItems``.

Atoms, each with its opposite:

| atom | opposite |
|---|---|
| every item from ``start`` on fits S | at least one item from ``start`` on does not |
| item ``index``, if there is one, fits S | there is one, and it does not |
| ``low`` to ``high`` items from ``start`` on fit S | fewer, or more |
| the length is in a range | it is below or above |
| items differ from each other | no shape has it: rejected by name, unless the length decides |

Left out: the text of arrays (``json_frames.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, cast

from refllm.decode.grammar.json_schema.formulas import (
    Atom,
    Conjunction,
    Count,
    Evaluation,
    Formula,
    count_of,
    either,
    every,
)
from refllm.decode.grammar.json_schema.shapes import ArrayShape, ItemCount, Location, Node

SignedLocation = tuple[Location, bool]
NEVER: SignedLocation = ("false", True)  # fits no value
ALWAYS: SignedLocation = ("false", False)


class Nodes(Protocol):
    """What the rules of arrays and objects ask of the algebra."""

    def node(self, schemas: Iterable[SignedLocation]) -> Node:
        """The node of schemas that hold together."""
        ...

    def quickly_empty(self, node: Node) -> bool:
        """Whether it is cheap to see that no value fits the node."""
        ...


def opposite(schema: SignedLocation) -> SignedLocation:
    """The schema that holds where this one does not."""
    return schema[0], not schema[1]


@dataclass(frozen=True)
class Items:
    """Every item from index ``start`` on fits a schema."""

    start: int
    schema: SignedLocation

    def negated(self) -> Formula:
        """Some item from ``start`` on does not fit."""
        if self.schema == NEVER:
            return Count(self.start + 1, None)
        return Matches(self.start, opposite(self.schema), 1, None)


@dataclass(frozen=True)
class Item:
    """Item ``index`` fits a schema, or the array is too short to have it."""

    index: int
    schema: SignedLocation

    def negated(self) -> Formula:
        """There is an item ``index``, and it does not fit."""
        return every((Count(self.index + 1, None), Item(self.index, opposite(self.schema))))


@dataclass(frozen=True)
class Matches:
    """From ``low`` to ``high`` of the items from index ``start`` on fit a schema."""

    start: int
    schema: SignedLocation
    low: int
    high: int | None

    def negated(self) -> Formula:
        """Fewer or more of them fit."""
        counts = []
        if self.low > 0:
            counts.append(replace(self, low=0, high=self.low - 1))
        if self.high is not None:
            counts.append(replace(self, low=self.high + 1, high=None))
        return either(counts)


@dataclass(frozen=True)
class Unique:
    """No two items are equal; with ``positive`` False some two are."""

    positive: bool = True

    def negated(self) -> Formula:
        """The opposite."""
        return Unique(not self.positive)


@dataclass(frozen=True)
class EvaluatedItems(Evaluation):
    """The first ``count`` items (None: all), and those that fit ``matching``, are evaluated."""

    count: int | None = 0
    matching: Location = None


def array_formula(keywords: Mapping[str, object]) -> list[Formula]:
    """What the array keywords of a schema ask of an array, ``unevaluatedItems`` left out."""
    found: list[Formula] = []
    minimum = cast(int, keywords.get("minItems", 0))
    maximum = cast("int | None", keywords.get("maxItems"))
    if minimum or maximum is not None:
        found.append(Count(minimum, maximum))
    prefix = cast("list[Location]", keywords.get("prefixItems", []))
    if prefix:
        found.extend(Item(index, (each, True)) for index, each in enumerate(prefix))
        found.append(EvaluatedItems(len(prefix)))
    if "items" in keywords:
        found.append(Items(len(prefix), (keywords["items"], True)))
        found.append(EvaluatedItems(None))
    if "contains" in keywords:
        schema = (keywords["contains"], True)
        low = cast(int, keywords.get("minContains", 1))
        high = cast("int | None", keywords.get("maxContains"))
        if low or high is not None:
            found.append(Matches(0, schema, low, high))
        found.append(EvaluatedItems(0, keywords["contains"]))
    if keywords.get("uniqueItems") is True:
        found.append(Unique())
    return found


class ItemSchemas:
    """The schemas that the items of a conjunction fit, by index."""

    def __init__(self, conjunction: Conjunction) -> None:
        self.single: dict[int, list[SignedLocation]] = {}
        self.several = [atom for atom in conjunction if isinstance(atom, Items)]
        for atom in conjunction:
            if isinstance(atom, Item):
                self.single.setdefault(atom.index, []).append(atom.schema)
        starts = [atom.start for atom in self.several]
        # from this index on all items fit the same schemas
        self.length = max([0, *starts, *(index + 1 for index in self.single)])

    def at(self, index: int) -> list[SignedLocation]:
        """The schemas that item ``index`` fits."""
        shared = [atom.schema for atom in self.several if atom.start <= index]
        return self.single.get(index, []) + shared


def simplify(conjunction: Conjunction, nodes: Nodes) -> Conjunction | None:
    """An equal conjunction with fewer atoms; None if no array fits it, as far as is seen."""
    count = count_of(conjunction)
    low = count.minimum
    high = count.maximum
    kept: set[Atom] = set()
    for atom in _merged_counts(conjunction):
        if atom.high is not None and atom.low > atom.high:
            return None
        low = max(low, atom.start + atom.low if atom.low else 0)
        if atom.high == 0:
            kept.add(Items(atom.start, opposite(atom.schema)))
        elif atom.low and Items(atom.start, opposite(atom.schema)) in conjunction:
            return None
        else:
            kept.add(atom)
    kept.update(a for a in conjunction if not isinstance(a, Count | Matches))
    found = frozenset(kept)
    items = ItemSchemas(found)
    for index in range(items.length + 1):
        if high is not None and index >= high:
            break
        if nodes.quickly_empty(nodes.node(items.at(index))):
            high = index
    if high is not None and low > high:
        return None
    if high is not None and high <= 1:
        if Unique(False) in found:
            return None
        found -= {Unique()}
    if Unique() in found and Unique(False) in found:
        return None
    return found | {Count(low, high)} if low or high is not None else found


def _merged_counts(conjunction: Conjunction) -> list[Matches]:
    """The counts of the conjunction, one for each schema and start."""
    found: dict[tuple[int, SignedLocation], Matches] = {}
    for atom in conjunction:
        if isinstance(atom, Matches):
            key = atom.start, atom.schema
            old = found.get(key, replace(atom, low=0, high=None))
            highs = [each.high for each in (old, atom) if each.high is not None]
            low = max(old.low, atom.low)
            found[key] = replace(atom, low=low, high=min(highs) if highs else None)
    return list(found.values())


def implied(conjunction: Conjunction, atom: Atom, nodes: Nodes) -> bool:
    """Whether every array of a conjunction fits ``atom``, as far as is seen."""
    if atom in conjunction:
        return True
    count = count_of(conjunction)
    high = count.maximum
    items = ItemSchemas(conjunction)
    match atom:
        case Count():
            return count.narrowed(atom) == count
        case Item(index, schema):
            if high is not None and high <= index:
                return True
            return nodes.quickly_empty(nodes.node([*items.at(index), opposite(schema)]))
        case Items(start, schema):
            last = max(items.length, start)
            return all(
                nodes.quickly_empty(nodes.node([*items.at(i), opposite(schema)]))
                for i in range(start, last + 1)
                if high is None or i < high
            )
    return False


def shape(conjunction: Conjunction, nodes: Nodes, reject: Callable[[str], Exception]) -> ArrayShape:
    """The shape of a simplified conjunction; ``reject(keyword)`` makes the error to raise."""
    if Unique(False) in conjunction:
        raise reject("uniqueItems")
    count = count_of(conjunction)
    items = ItemSchemas(conjunction)
    counts = [
        ItemCount(nodes.node([a.schema]), nodes.node([opposite(a.schema)]), a.low, a.high, a.start)
        for a in sorted((a for a in conjunction if isinstance(a, Matches)), key=repr)
    ]
    return ArrayShape(
        prefix=tuple(nodes.node(items.at(i)) for i in range(items.length)),
        rest=nodes.node(items.at(items.length)),
        minimum=count.minimum,
        maximum=count.maximum,
        counts=tuple(counts),
        unique=Unique() in conjunction,
    )
