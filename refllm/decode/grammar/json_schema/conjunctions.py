"""Formulas as lists of conjunctions: the disjunctive normal form, pruned while it grows.

A list of conjunctions stands for the values that fit any one of them. The simple rules are

    A and (B or C) = (A and B) or (A and C)
    exactly one of A and B = (A and not B) or (B and not A)

and what keeps the lists short is to simplify each conjunction at once and to drop those that no
value fits: alternatives that exclude each other, as in most uses of ``oneOf``, never multiply.
A conjunction that implies an alternative absorbs the whole ``or``.

Under *tracking* conjunctions carry ``Evaluation`` atoms, which say what they evaluate; then
"A or B" is written "A, B, or both", because both evaluate more than one.

Left out: the atoms' own rules, which come in as ``simplify`` and ``implied``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from refllm.decode.grammar.json_schema.formulas import (
    And,
    Apply,
    Atom,
    Conjunction,
    Evaluation,
    ExactlyOne,
    Formula,
    Or,
    absorb,
    flattened,
)
from refllm.decode.grammar.json_schema.string_rules import Format

MOST_CONJUNCTIONS = 4096  # of one node and kind
FEW = 12  # atoms that are worth asking one by one whether they are implied
EVERYTHING: Conjunction = frozenset()  # no atom: every value of the kind


class TooManyConjunctions(Exception):
    """A list would exceed ``MOST_CONJUNCTIONS``, or all lists together the allowed work."""


class Rules(Protocol):
    """What the expansion asks of the algebra, for one kind of value."""

    def simplify(self, kind: str, conjunction: Conjunction) -> Conjunction | None:
        """An equal conjunction with fewer atoms; None if no value fits it."""
        ...

    def implied(self, kind: str, conjunction: Conjunction, atom: Atom) -> bool:
        """Whether all values of a conjunction fit an atom, as far as is seen."""
        ...

    def disjoint(self, kind: str, one: Conjunction, other: Conjunction) -> bool:
        """Whether it is cheap to see that no value fits both."""
        ...

    def conjunctions(self, schema: Apply, kind: str, *, tracking: bool) -> list[Conjunction]:
        """The conjunctions of another schema."""
        ...

    def count_work(self) -> None:
        """Count one conjunction; ``TooManyConjunctions`` when there were too many."""
        ...


@dataclass(frozen=True)
class Expansion:
    """Expand formulas for one kind of value."""

    rules: Rules
    kind: str
    tracking: bool = False

    def extend(self, base: list[Conjunction], formula: Formula) -> list[Conjunction]:
        """The conjunctions of "fits one of ``base``, and fits ``formula``"."""
        match formula:
            case And():
                return self._all(base, flattened(formula))
            case Or(parts):
                return self._any(base, parts)
            case Apply():
                return self.product(base, self._conjunctions(formula))
            case ExactlyOne(parts, True):
                return self._exactly_one(base, parts)
            case ExactlyOne():
                return self.extend(base, formula.none_or_two())
            case Format():
                return self.extend(base, formula.expanded())
        atoms = frozenset({cast(Atom, formula)})
        return absorb(each for one in base if (each := self._joined(one, atoms)) is not None)

    def product(self, base: list[Conjunction], other: list[Conjunction]) -> list[Conjunction]:
        """The conjunctions of "fits one of ``base``, and one of ``other``"."""
        if base == [EVERYTHING]:
            return other
        found: list[Conjunction] = []
        for one in base:
            both = [self._joined(one, each) for each in other]
            if not self.tracking and one in both:
                found.append(one)
            else:
                found.extend(each for each in both if each is not None)
            if len(found) > MOST_CONJUNCTIONS:
                raise TooManyConjunctions
        return absorb(found)

    def _joined(self, one: Conjunction, other: Conjunction) -> Conjunction | None:
        """Both conjunctions at once, simplified; None if no value fits."""
        new = other - one
        if not self.tracking:
            new = frozenset(atom for atom in new if not isinstance(atom, Evaluation))
        if one and len(new) <= FEW:
            new = frozenset(a for a in new if not self.rules.implied(self.kind, one, a))
        if not new:
            return one
        self.rules.count_work()
        return self.rules.simplify(self.kind, one | new)

    def _all(self, base: list[Conjunction], parts: list[Formula]) -> list[Conjunction]:
        """Atoms first and together, then alternatives, ``oneOf`` last: it gains by context."""
        compound = (Or, Apply, ExactlyOne, Format)
        atoms = frozenset(cast(Atom, p) for p in parts if not isinstance(p, compound))
        rest = [part for part in parts if isinstance(part, compound)]
        if atoms:
            together = [self._joined(one, atoms) for one in base]
            base = absorb(each for each in together if each is not None)
        single = [part for part in rest if isinstance(part, Apply | Format)]
        several = [part for part in rest if isinstance(part, Or)]
        last = [part for part in rest if isinstance(part, ExactlyOne)]
        for part in single + sorted(several, key=lambda part: len(part.parts)) + last:
            if not base:
                break
            base = self.extend(base, part)
        return base

    def _any(self, base: list[Conjunction], parts: Sequence[Formula]) -> list[Conjunction]:
        """Each conjunction with each alternative; under tracking with each set of them."""
        found: list[Conjunction] = []
        for one in base:
            mine: list[Conjunction] = []
            for part in parts:
                new = self.extend([one], part)
                if not self.tracking and one in new:
                    mine = [one]
                    break
                together = self.extend(list(mine), part) if self.tracking else []
                mine = absorb([*mine, *new, *together])
                if len(mine) > MOST_CONJUNCTIONS:
                    raise TooManyConjunctions
            found.extend(mine)
            if len(found) > MOST_CONJUNCTIONS:
                raise TooManyConjunctions
        return absorb(found)

    def _exactly_one(self, base: list[Conjunction], parts: Sequence[Apply]) -> list[Conjunction]:
        """Each alternative without the others, as far as they overlap in this context."""
        untracked = Expansion(self.rules, self.kind)
        found: list[Conjunction] = []
        for i, part in enumerate(parts):
            mine = self.product(base, self._conjunctions(part))
            for other in (*parts[:i], *parts[i + 1 :]):
                mine = [each for one in mine for each in self._without(one, other, untracked)]
                if len(mine) > MOST_CONJUNCTIONS:
                    raise TooManyConjunctions
            found.extend(mine)
        return absorb(found)

    def _without(self, one: Conjunction, other: Apply, untracked: Expansion) -> list[Conjunction]:
        """The values of a conjunction that do not fit a schema."""
        others = untracked._conjunctions(other)
        if all(self.rules.disjoint(self.kind, one, each) for each in others):
            return [one]
        if not untracked.product([one], others):
            return [one]
        return untracked.product([one], untracked._conjunctions(other.negated()))

    def _conjunctions(self, schema: Apply | Formula) -> list[Conjunction]:
        """The conjunctions of another schema, tracked if it counts for the schema around it."""
        assert isinstance(schema, Apply)
        tracking = self.tracking and schema.evaluates
        return self.rules.conjunctions(schema, self.kind, tracking=tracking)
