"""Sets of object keys, kept as symbols: names, patterns, and schemas that keys fit.

Most schemas never need a DFA of keys: which of the named keys a set contains is asked one key at
a time, and "all keys but these" needs no automaton either. ``object_rules.py`` asks for the DFAs
where patterns make them necessary.

Left out: equality of sets that are written differently (they are compared as symbols).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from refllm.decode.grammar.json_schema.shapes import Location
from refllm.errors import InputError

SignedLocation = tuple[Location, bool]
Base = str | SignedLocation  # a pattern that is found in the key, or a schema that the key fits


@dataclass(frozen=True)
class KeySet:
    """The keys in ``names`` or in the language of one of ``bases``; negated, all others."""

    names: frozenset[str] = frozenset()
    bases: frozenset[Base] = frozenset()
    negated: bool = False

    def complement(self) -> KeySet:
        """All keys that are not in the set."""
        return KeySet(self.names, self.bases, not self.negated)

    def contains(self, key: str, matches: Callable[[Base, str], bool]) -> bool:
        """Whether a key is in the set; ``matches(base, key)`` decides for a base."""
        found = key in self.names or any(matches(base, key) for base in self.bases)
        return found != self.negated

    def only(self) -> str | None:
        """The key, if the set is one name alone."""
        if self.negated or self.bases or len(self.names) != 1:
            return None
        return next(iter(self.names))

    @property
    def everything(self) -> bool:
        """Whether the set has all keys, as far as its symbols tell."""
        return self.negated and not self.names and not self.bases

    @property
    def nothing(self) -> bool:
        """Whether the set has no key, as far as its symbols tell."""
        return not (self.negated or self.names or self.bases)

    def within(self, other: KeySet) -> bool:
        """Whether every key is in ``other``, as far as the symbols tell (False: unknown)."""
        if self == other or self.nothing or other.everything:
            return True
        if self.negated and other.negated:
            return other.names <= self.names and other.bases <= self.bases
        if not self.negated and not other.negated:
            return self.names <= other.names and self.bases <= other.bases
        if not self.negated and other.negated:
            return not self.bases and not other.bases and not self.names & other.names
        return False


ALL_KEYS = KeySet(negated=True)


def named(*names: str) -> KeySet:
    """A set of names.

    >>> named("a", "b").complement().contains("c", lambda base, key: False)
    True
    """
    return KeySet(frozenset(names))


def union(sets: Iterable[KeySet]) -> KeySet:
    """The union of sets of which at most one is negated.

    >>> union([named("a"), named("b")]) == named("a", "b")
    True
    >>> union([named("a"), ALL_KEYS]) == ALL_KEYS
    True
    """
    names: frozenset[str] = frozenset()
    bases: frozenset[Base] = frozenset()
    for each in sets:
        if each.everything:
            return ALL_KEYS
        if each.negated:
            raise InputError(f"the union of a negated set of keys has no symbol: {each}")
        names = names | each.names
        bases = bases | each.bases
    return KeySet(names, bases)
