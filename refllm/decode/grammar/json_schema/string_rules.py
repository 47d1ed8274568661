"""Strings of a JSON Schema: ``pattern``, ``format``, ``minLength``, ``maxLength`` and constants.

A conjunction of string atoms becomes one ``StringShape``. Constants stay sets of words as long as
possible: words are filtered by the other atoms one by one, so that most schemas build no product
of automata at all.

Left out: how characters are spelled in JSON text (``utf8.py``); ``contentMediaType`` and its
kind, which are annotations.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

from refllm.decode.grammar.automata import dfa_operations
from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa import ACCEPT, DFA
from refllm.decode.grammar.automata.dfa_builders import anything, from_words
from refllm.decode.grammar.errors import GrammarError, about
from refllm.decode.grammar.json_scalars import formats
from refllm.decode.grammar.json_schema.formulas import (
    Atom,
    Conjunction,
    Count,
    Formula,
    count_of,
    either,
    every,
)
from refllm.decode.grammar.json_schema.shapes import StringShape
from refllm.decode.grammar.patterns import regex


@dataclass(frozen=True)
class Words:
    """The strings of a set or, with ``positive`` False, all others."""

    words: frozenset[str]
    positive: bool = True

    def negated(self) -> Formula:
        """All other strings."""
        return replace(self, positive=not self.positive)


@dataclass(frozen=True)
class Pattern:
    """Strings in which a regular expression is found (ECMA 262), or those without it.

    Of a pattern such as ``^[a-z]{1,255}$`` the atom is ``^[a-z]*$``, beside a ``Count``.
    """

    pattern: str
    positive: bool = True

    def negated(self) -> Formula:
        """The other strings."""
        return replace(self, positive=not self.positive)


@dataclass(frozen=True)
class FormatLanguage:
    """One of the languages of which a format, or the opposite of a format, is the union."""

    name: str
    accepted: bool
    index: int

    def negated(self) -> Formula:
        """Never asked: ``Format`` is negated as a whole."""
        raise NotImplementedError


@dataclass(frozen=True)
class Format:
    """Strings that a format accepts, or with ``positive`` False those that it rejects."""

    name: str
    positive: bool = True

    def negated(self) -> Formula:
        """The other strings."""
        return replace(self, positive=not self.positive)

    def expanded(self) -> Formula:
        """Its languages as atoms; GrammarError where the opposite has no automaton."""
        languages = format_languages(self.name, self.positive)
        return either(
            every((FormatLanguage(self.name, self.positive, i), Count(minimum, maximum)))
            for i, (_, minimum, maximum) in enumerate(languages)
        )


def format_languages(name: str, accepted: bool) -> tuple[tuple[DFA, int, int | None], ...]:
    """(DFA, least length, greatest length) of a known format, or of its opposite."""
    rule = formats.format_rule(name)
    assert rule is not None, name
    return rule.accepted if accepted else rule.rejected()


@lru_cache(1024)
def word_language(words: frozenset[str]) -> DFA:
    """The DFA of a set of words."""
    return from_words(dict.fromkeys(sorted(words), ACCEPT), size=CHARACTERS)


def pattern_language(pattern: str) -> DFA:
    """The language of a ``Pattern``; GrammarError if there is no DFA for it."""
    return regex.from_pattern_with_length(pattern)[0]


def string_formula(keywords: Mapping[str, object]) -> list[Formula]:
    """What the string keywords of a schema ask of a string.

    Unknown formats ask for nothing (JSON Schema validation, 7.2.3).
    """
    found: list[Formula] = []
    minimum = cast(int, keywords.get("minLength", 0))
    maximum = cast("int | None", keywords.get("maxLength"))
    if minimum or maximum is not None:
        found.append(Count(minimum, maximum))
    pattern = keywords.get("pattern")
    if isinstance(pattern, str):
        with about("pattern"):
            _, low, high = regex.from_pattern_with_length(pattern)
        found.append(every((Pattern(pattern), Count(low, high))))
    name = keywords.get("format")
    if isinstance(name, str) and formats.format_rule(name) is not None:
        found.append(Format(name))
    return found


def accepts(atom: Atom, text: str) -> bool:
    """Whether a string fits a string atom."""
    match atom:
        case Count():
            return atom.contains(len(text))
        case Words(words, positive):
            return (text in words) == positive
        case Pattern(pattern, positive):
            return pattern_language(pattern).matches(text) == positive
        case FormatLanguage(name, accepted, index):
            return format_languages(name, accepted)[index][0].matches(text)
    raise TypeError(f"not an atom of strings: {atom}")


def rejects(atom: Atom, text: str) -> bool:
    """Whether a string is sure not to fit a string atom.

    Some formats have strings of which neither automaton is sure; those are not rejected here, so
    that alternatives of ``oneOf`` are not taken for disjoint.
    """
    if not isinstance(atom, FormatLanguage):
        return not accepts(atom, text)
    with suppress(GrammarError):  # the opposite of some formats is not known
        opposite = format_languages(atom.name, not atom.accepted)
        return any(
            dfa.matches(text) and Count(low, high).contains(len(text))
            for dfa, low, high in opposite
        )
    return False


def simplify(conjunction: Conjunction) -> Conjunction | None:
    """An equal conjunction with fewer atoms; None if no string fits it, as far as is seen.

    With constants the answer is exact: the words that fit all atoms. Atoms of formats stay beside
    words that they may or may not fit.
    """
    allowed = [a.words for a in conjunction if isinstance(a, Words) and a.positive]
    if allowed:
        words = frozenset.intersection(*allowed)
        possible = frozenset(w for w in words if not any(rejects(a, w) for a in conjunction))
        unsure = {
            atom
            for atom in conjunction
            if isinstance(atom, FormatLanguage) and not all(accepts(atom, w) for w in possible)
        }
        return frozenset({Words(possible), *unsure}) if possible else None
    count = count_of(conjunction)
    if count.empty:
        return None
    excluded: frozenset[str] = frozenset()
    kept: set[Atom] = set()
    for atom in conjunction:
        if isinstance(atom, Words):
            excluded |= atom.words
        elif isinstance(atom, Pattern) and replace(atom, positive=not atom.positive) in conjunction:
            return None
        elif not isinstance(atom, Count):
            kept.add(atom)
    if count != Count():
        kept.add(count)
    if excluded:
        kept.add(Words(excluded, positive=False))
    return frozenset(kept)


def implied(conjunction: Conjunction, atom: Atom) -> bool:
    """Whether every string of a conjunction fits ``atom``, as far as is seen."""
    words = [a for a in conjunction if isinstance(a, Words) and a.positive]
    if words:
        return all(accepts(atom, w) for w in words[0].words)
    if isinstance(atom, Count):
        count = count_of(conjunction)
        return count.narrowed(atom) == count
    return atom in conjunction


def merge(conjunctions: list[Conjunction]) -> list[Conjunction]:
    """An equal list in which all constants stand in one conjunction."""
    words: frozenset[str] = frozenset()
    others: list[Conjunction] = []
    for each in conjunctions:
        constant = constants(each)
        if constant is None:
            others.append(each)
        else:
            words |= constant
    return [frozenset({Words(words)}), *others] if words else others


def language(conjunction: Conjunction) -> DFA:
    """The DFA over characters of a simplified conjunction, lengths left out."""
    parts: list[DFA] = []
    for atom in sorted(conjunction, key=repr):
        match atom:
            case Words(words, True):
                parts.append(word_language(words))
            case Words(words, False):
                parts.append(dfa_operations.complement(word_language(words)))
            case Pattern(pattern, True):
                parts.append(pattern_language(pattern))
            case Pattern(pattern, False):
                parts.append(dfa_operations.complement(pattern_language(pattern)))
            case FormatLanguage(name, accepted, index):
                parts.append(format_languages(name, accepted)[index][0])
    if not parts:
        return anything(CHARACTERS)
    return parts[0] if len(parts) == 1 else dfa_operations.intersect(*parts)


@lru_cache(1024)
def shape(conjunction: Conjunction) -> StringShape:
    """The shape of a simplified conjunction."""
    count = count_of(conjunction)
    return StringShape(language(conjunction), count.minimum, count.maximum)


def constants(conjunction: Conjunction) -> frozenset[str] | None:
    """The words of a simplified conjunction that is a set of them, else None."""
    atom = next(iter(conjunction)) if len(conjunction) == 1 else None
    return atom.words if isinstance(atom, Words) and atom.positive else None


def inhabited(shape: StringShape) -> bool:
    """Whether some string fits a shape: whether the DFA has a word of an allowed length."""
    shortest = shape.dfa.distance()
    if shortest is None:
        return False
    if shape.minimum <= shortest:
        return shape.maximum is None or shortest <= shape.maximum
    if shape.maximum is None and not shape.dfa.finite:
        return True  # words grow without bound
    return _some_length(shape.dfa, shape.minimum, shape.maximum)


def _some_length(dfa: DFA, minimum: int, maximum: int | None) -> bool:
    """Whether a word of ``minimum`` to ``maximum`` symbols is accepted, by sets of states.

    The sets that are reached after 0, 1, 2 … symbols repeat, so that a long way is cut short.
    """
    reached = frozenset({dfa.start})
    length = 0
    before: dict[frozenset[int], int] = {}
    while reached and length < minimum:
        if reached in before:
            period = length - before[reached]
            length += (minimum - length) // period * period
            before = {}
            continue
        before[reached] = length
        reached = _successors(dfa, reached)
        length += 1
    checked: set[frozenset[int]] = set()
    while reached and reached not in checked and (maximum is None or length <= maximum):
        if any(dfa.accepting(state) for state in reached):
            return True
        checked.add(reached)
        reached = _successors(dfa, reached)
        length += 1
    return False


def _successors(dfa: DFA, states: frozenset[int]) -> frozenset[int]:
    """The live states that one more symbol leads to."""
    return frozenset(target for state in states for target in dfa.successors[state])
