"""Numbers of a JSON Schema: ``integer``, ranges, ``multipleOf`` and constants.

A conjunction of number atoms becomes one DFA over the bytes of a number's JSON text
(``json_numbers.py``). Ranges are merged and constants filtered first, so that most schemas need
one automaton and no product.

Left out: how numbers are spelled (``json_numbers.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, floor

from refllm.decode.grammar.automata import dfa_operations
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_scalars import json_numbers
from refllm.decode.grammar.json_schema.formulas import Atom, Conjunction, Formula, either

MOST_CONSTANTS = 5_000  # numbers of one enum
Number = int | float


@dataclass(frozen=True)
class Integer:
    """Integers; 1.0 is one unless ``draft4``. With ``positive`` False all other numbers."""

    draft4: bool = False
    positive: bool = True

    def negated(self) -> Formula:
        """The other numbers."""
        return replace(self, positive=not self.positive)


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds (None: no bound), bounds included unless ``exclusive``."""

    minimum: Number | None = None
    maximum: Number | None = None
    exclusive_minimum: bool = False
    exclusive_maximum: bool = False

    def negated(self) -> Formula:
        """Numbers below or above."""
        ranges = []
        if self.minimum is not None:
            ranges.append(Range(maximum=self.minimum, exclusive_maximum=not self.exclusive_minimum))
        if self.maximum is not None:
            ranges.append(Range(minimum=self.maximum, exclusive_minimum=not self.exclusive_maximum))
        return either(ranges)

    def contains(self, value: Number) -> bool:
        """Whether a number lies in the range."""
        low, high = self.minimum, self.maximum
        above = low is None or value > low or (value == low and not self.exclusive_minimum)
        below = high is None or value < high or (value == high and not self.exclusive_maximum)
        return above and below

    def narrowed(self, other: Range) -> Range:
        """The intersection of two ranges."""
        low, low_open = self.minimum, self.exclusive_minimum
        if other.minimum is not None and (
            low is None or (other.minimum, other.exclusive_minimum) > (low, low_open)
        ):
            low, low_open = other.minimum, other.exclusive_minimum
        high, high_open = self.maximum, self.exclusive_maximum
        if other.maximum is not None and (
            high is None or (-other.maximum, other.exclusive_maximum) > (-high, high_open)
        ):
            high, high_open = other.maximum, other.exclusive_maximum
        return Range(low, high, low_open, high_open)

    def empty(self, *, integer: bool) -> bool:
        """Whether no number, or no integer, lies in the range."""
        if self.minimum is None or self.maximum is None:
            return False
        if not integer:
            closed = not (self.exclusive_minimum or self.exclusive_maximum)
            return self.minimum > self.maximum or (self.minimum == self.maximum and not closed)
        first = floor(self.minimum) + 1 if self.exclusive_minimum else ceil(self.minimum)
        last = ceil(self.maximum) - 1 if self.exclusive_maximum else floor(self.maximum)
        return first > last


@dataclass(frozen=True)
class Multiple:
    """Multiples of ``divisor``, or all other numbers."""

    divisor: Number
    positive: bool = True

    def negated(self) -> Formula:
        """The other numbers."""
        return replace(self, positive=not self.positive)


@dataclass(frozen=True)
class Values:
    """The numbers of a set, by value (1 is 1.0), or all others."""

    values: frozenset[Number]
    positive: bool = True

    def negated(self) -> Formula:
        """The other numbers."""
        return replace(self, positive=not self.positive)


def number_formula(keywords: Mapping[str, object]) -> list[Formula]:
    """What the number keywords of a schema ask of a number, ``type`` left out."""
    found: list[Formula] = []
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        bound = keywords.get(key)
        if not isinstance(bound, int | float):
            continue
        exclusive = key.startswith("exclusive")
        if key.lower().endswith("minimum"):
            found.append(Range(minimum=bound, exclusive_minimum=exclusive))
        else:
            found.append(Range(maximum=bound, exclusive_maximum=exclusive))
    divisor = keywords.get("multipleOf")
    if isinstance(divisor, int | float):
        found.append(Multiple(divisor))
    return found


def accepts(atom: Atom, value: Number) -> bool:
    """Whether a number fits a number atom (``Integer(draft4=True)``: in some spelling)."""
    match atom:
        case Integer(_, positive):
            return (value == floor(value)) == positive
        case Range():
            return atom.contains(value)
        case Multiple(divisor, positive):
            text = json.dumps(value).encode()
            return json_numbers.multiple_of(divisor).matches(text) == positive
        case Values(values, positive):
            return (value in values) == positive
    raise TypeError(f"not an atom of numbers: {atom}")


def simplify(conjunction: Conjunction) -> Conjunction | None:
    """An equal conjunction with fewer atoms; None if no number fits it, as far as is seen."""
    whole = Range()
    for atom in conjunction:
        if isinstance(atom, Range):
            whole = whole.narrowed(atom)
        if not isinstance(atom, Range) and atom.negated() in conjunction:
            return None
    textual = frozenset(a for a in conjunction if isinstance(a, Integer) and a.draft4)
    allowed = [a.values for a in conjunction if isinstance(a, Values) and a.positive]
    if allowed:
        spelled = {a for a in textual if not (isinstance(a, Integer) and not a.positive)}
        values = frozenset.intersection(*allowed)
        tested = (conjunction - textual) | spelled
        fitting = frozenset(v for v in values if all(accepts(a, v) for a in tested))
        return frozenset({Values(fitting)}) | textual if fitting else None
    integer = any(isinstance(a, Integer) and a.positive for a in conjunction)
    if integer and Integer(positive=False) in conjunction:
        return None
    if whole.empty(integer=integer):
        return None
    excluded: frozenset[Number] = frozenset()
    kept: set[Atom] = set()
    for atom in conjunction:
        if isinstance(atom, Values):
            excluded |= atom.values
        elif not isinstance(atom, Range):
            kept.add(atom)
    if whole != Range():
        kept.add(whole)
    if excluded:
        kept.add(Values(excluded, positive=False))
    return frozenset(kept)


def implied(conjunction: Conjunction, atom: Atom) -> bool:
    """Whether every number of a conjunction fits ``atom``, as far as is seen."""
    for each in conjunction:
        if isinstance(each, Values) and each.positive:
            textual = isinstance(atom, Integer) and atom.draft4
            return atom in conjunction or (
                not textual and all(accepts(atom, value) for value in each.values)
            )
        if isinstance(each, Range) and isinstance(atom, Range) and each.narrowed(atom) == each:
            return True
    return atom in conjunction


@lru_cache(4096)
def language(conjunction: Conjunction) -> DFA:
    """The DFA over bytes of a simplified conjunction."""
    parts = [_part(atom) for atom in sorted(conjunction, key=repr)]
    if not parts:
        return json_numbers.number()
    return parts[0] if len(parts) == 1 else dfa_operations.intersect(*parts)


def _part(atom: Atom) -> DFA:
    """The DFA of one atom."""
    match atom:
        case Integer(draft4, positive):
            return json_numbers.integer(draft4=draft4, positive=positive)
        case Multiple(divisor, positive):
            return json_numbers.multiple_of(divisor, positive=positive)
        case Values(values, positive):
            if len(values) > MOST_CONSTANTS:
                raise GrammarError(
                    f"a list of more than {MOST_CONSTANTS:,} numbers needs too large an automaton",
                    keyword="enum",
                )
            return json_numbers.values(tuple(sorted(values)), positive=positive)
        case Range(minimum, maximum, exclusive_minimum, exclusive_maximum):
            return json_numbers.interval(
                minimum,
                maximum,
                exclusive_minimum=exclusive_minimum,
                exclusive_maximum=exclusive_maximum,
            )
    raise TypeError(f"not an atom of numbers: {atom}")


@lru_cache(4096)
def union_language(conjunctions: frozenset[Conjunction]) -> DFA:
    """The DFA of the numbers that fit any one of the conjunctions; no shape has labels."""
    languages = [language(each) for each in sorted(conjunctions, key=repr)]
    return languages[0] if len(languages) == 1 else dfa_operations.union(*languages)
