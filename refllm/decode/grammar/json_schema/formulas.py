"""Boolean formulas over atomic constraints, and their negation.

Each keyword of a schema is written once, as the formula of the values that it allows, for one
JSON type. ``negate`` gives the formula of all other values of that type. That is possible because
atomic constraints are closed under negation: "every key of K has a value in S" is the opposite of
"some key of K has a value outside S", "key k is required" of "key k is absent", a range of counts
of the two ranges beside it.

=================  ==============================================================================
``And``, ``Or``    of formulas; ``TRUE`` is the empty ``And``, ``FALSE`` the empty ``Or``
``Exactly one``    ``ExactlyOne`` of schemas: ``oneOf``
``Apply``          another schema, applied to the same value
an atom            any other object; it has ``negated() -> Formula``
=================  ==============================================================================

``schema_algebra.py`` writes a formula as a list of *conjunctions*, the sets of atoms that hold
together; the value is allowed if all atoms of any one conjunction hold.

Left out: the atoms (``string_rules.py``, ``number_rules.py``, ``array_rules.py``,
``object_rules.py``).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

from refllm.decode.grammar.json_schema.shapes import Location


class Formula(Protocol):
    """A condition on values of one JSON type."""

    def negated(self) -> Formula:
        """The condition that holds exactly where this one does not."""
        ...


class Atom(Formula, Hashable, Protocol):
    """A condition that is not split further."""


Conjunction = frozenset[Atom]  # all of them hold; the empty one holds for every value


@dataclass(frozen=True)
class And:
    """All parts hold."""

    parts: tuple[Formula, ...]

    def negated(self) -> Formula:
        """Some part does not hold."""
        return Or(tuple(part.negated() for part in self.parts))


@dataclass(frozen=True)
class Or:
    """Some part holds."""

    parts: tuple[Formula, ...]

    def negated(self) -> Formula:
        """No part holds."""
        return And(tuple(part.negated() for part in self.parts))


@dataclass(frozen=True)
class Apply:
    """The value fits the schema at ``location`` or, with ``positive`` False, does not.

    ``evaluates`` says whether the keys and items that the schema evaluates count as evaluated
    for the schema around it (JSON Schema core, 7.7.1.1: not those of a negated schema).
    """

    location: Location
    positive: bool = True
    evaluates: bool = True

    def negated(self) -> Formula:
        """The value fits where it did not, and the other way round."""
        return Apply(self.location, not self.positive, evaluates=False)


@dataclass(frozen=True)
class ExactlyOne:
    """The value fits exactly one of the schemas (``oneOf``) or, negated, any other number."""

    parts: tuple[Apply, ...]
    positive: bool = True

    def negated(self) -> Formula:
        """The value fits none or at least two of them."""
        untracked = tuple(Apply(p.location, p.positive, evaluates=False) for p in self.parts)
        return ExactlyOne(untracked, not self.positive)

    def none_or_two(self) -> Formula:
        """The formula of the negation: no schema fits, or some pair of them does."""
        parts = self.parts
        none = And(tuple(part.negated() for part in parts))
        pairs = [And((a, b)) for i, a in enumerate(parts) for b in parts[i + 1 :]]
        return Or((none, *pairs))


@dataclass(frozen=True)
class Evaluation:
    """Notes what a schema evaluates and asks nothing of the value (``unevaluated*``).

    A negated schema evaluates nothing: in the opposite of "fits S and evaluates K" only the
    opposite of the first part is left.
    """

    def negated(self) -> Formula:
        """Never true."""
        return FALSE


@dataclass(frozen=True)
class Count:
    """From ``minimum`` to ``maximum`` characters of a string, items of an array, or keys of an
    object; None: no limit.
    """

    minimum: int = 0
    maximum: int | None = None

    def negated(self) -> Formula:
        """Fewer or more."""
        ranges: list[Formula] = []
        if self.minimum > 0:
            ranges.append(Count(0, self.minimum - 1))
        if self.maximum is not None:
            ranges.append(Count(self.maximum + 1, None))
        return either(ranges)

    def contains(self, count: int) -> bool:
        """Whether a count is in the range."""
        return self.minimum <= count and (self.maximum is None or count <= self.maximum)

    @property
    def empty(self) -> bool:
        """Whether no count is in the range."""
        return self.maximum is not None and self.minimum > self.maximum

    def narrowed(self, other: Count) -> Count:
        """The intersection of two ranges.

        >>> Count(2, None).narrowed(Count(0, 5))
        Count(minimum=2, maximum=5)
        """
        limits = [each for each in (self.maximum, other.maximum) if each is not None]
        return Count(max(self.minimum, other.minimum), min(limits) if limits else None)


TRUE: Formula = And(())
FALSE: Formula = Or(())


def either(parts: Iterable[Formula]) -> Formula:
    """Some part holds."""
    return Or(tuple(parts))


def every(parts: Iterable[Formula]) -> Formula:
    """All parts hold."""
    return And(tuple(parts))


def implies(condition: Formula, consequence: Formula) -> Formula:
    """If ``condition`` holds, ``consequence`` does; the two alternatives exclude each other."""
    return Or((condition.negated(), And((condition, consequence))))


def count_of(conjunction: Conjunction) -> Count:
    """The intersection of the counts of a conjunction."""
    found = Count()
    for atom in conjunction:
        if isinstance(atom, Count):
            found = found.narrowed(atom)
    return found


def flattened(formula: And) -> list[Formula]:
    """The parts of an ``And``, those of an ``And`` inside it too."""
    parts: list[Formula] = []
    for part in formula.parts:
        if isinstance(part, And):
            parts.extend(flattened(part))
        else:
            parts.append(part)
    return parts


def absorb(conjunctions: Iterable[Conjunction], most: int = 300) -> list[Conjunction]:
    """Leave out conjunctions that allow less than another one: A or (A and B) is A.

    One that evaluates more than the other stays. Lists of more than ``most`` conjunctions are
    freed from duplicates alone.
    """
    distinct = list(dict.fromkeys(conjunctions))
    if len(distinct) > most or len(distinct) < 2:
        return distinct
    split = []
    for each in distinct:
        evaluated = frozenset(atom for atom in each if isinstance(atom, Evaluation))
        split.append((each - evaluated, evaluated))
    split.sort(key=lambda pair: (len(pair[0]), -len(pair[1])))
    kept: list[tuple[Conjunction, Conjunction]] = []
    for asked, evaluated in split:
        if not any(other <= asked and evaluated <= more for other, more in kept):
            kept.append((asked, evaluated))
    return [asked | evaluated for asked, evaluated in kept]
