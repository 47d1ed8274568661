"""Alphabets of automata: integers in a few classes, and each class a union of intervals.

An automaton over Unicode reads one of 1,114,112 symbols, but tells only a few classes apart: for
``[a-z]+`` there are two, the letters a to z and everything else. So a table has one column per
class, and an :class:`Alphabet` says which interval of symbols belongs to which class.

===========  ==============================================================================
``size``     symbols are 0 … size-1: 256 bytes (``BYTES``) or Unicode code points
             (``CHARACTERS``), of which surrogates are in no language
``starts``   the first symbol of each interval, ascending; ``starts[0]`` is 0
``classes``  the class of each interval, 0 … count-1; class 0 is that of symbol 0
===========  ==============================================================================
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

BYTES = 256
CHARACTERS = 0x110000
SURROGATES = (0xD800, 0xDFFF)  # code points that no Unicode text contains

Interval = tuple[int, int]  # the symbols low … high, both included


@dataclass(frozen=True)
class Alphabet:
    """A partition of the symbols 0 … size-1 into classes (see the module's table)."""

    size: int
    starts: tuple[int, ...]
    classes: tuple[int, ...]

    @cached_property
    def count(self) -> int:
        """The number of classes."""
        return max(self.classes) + 1

    @cached_property
    def representatives(self) -> tuple[int, ...]:
        """The first symbol of each class."""
        first: dict[int, int] = {}
        for start, cls in zip(self.starts, self.classes, strict=True):
            first.setdefault(cls, start)
        return tuple(first[cls] for cls in range(self.count))

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """The number of symbols in each class."""
        sizes = [0] * self.count
        for low, high, cls in self.intervals():
            sizes[cls] += high - low + 1
        return tuple(sizes)

    def intervals(self) -> Iterator[tuple[int, int, int]]:
        """``(low, high, class)`` of each interval, in ascending order."""
        ends = (*(start - 1 for start in self.starts[1:]), self.size - 1)
        return zip(self.starts, ends, self.classes, strict=True)

    def class_of(self, symbol: int) -> int:
        """The class of a symbol in 0 … size-1."""
        return self.classes[bisect_right(self.starts, symbol) - 1]


def alphabet_of(
    size: int, sets: Sequence[Sequence[Interval]]
) -> tuple[Alphabet, list[tuple[int, ...]]]:
    """The coarsest alphabet whose classes are inside or outside of each set of symbols.

    Returns it with, for each set, the classes that make it up. ``sets`` are lists of disjoint
    intervals. One sweep over all interval ends, in ascending order.
    """
    changes: dict[int, int] = {0: 0}  # symbol → bit set of the sets that begin or end there
    for index, intervals in enumerate(sets):
        bit = 1 << index
        for low, high in intervals:
            changes[low] = changes.get(low, 0) ^ bit
            changes[high + 1] = changes.get(high + 1, 0) ^ bit
    changes.pop(size, None)
    members: dict[int, int] = {}  # bit set of the sets around a symbol → its class
    starts: list[int] = []
    classes: list[int] = []
    inside = 0
    for symbol in sorted(changes):
        inside ^= changes[symbol]
        cls = members.setdefault(inside, len(members))
        if not classes or classes[-1] != cls:
            starts.append(symbol)
            classes.append(cls)
    alphabet = Alphabet(size, tuple(starts), tuple(classes))
    parts = [
        tuple(cls for inside, cls in members.items() if inside >> index & 1)
        for index in range(len(sets))
    ]
    return alphabet, parts


def merged(alphabet: Alphabet, group: Sequence[int]) -> Alphabet:
    """The alphabet in which class ``c`` became class ``group[c]``; equal neighbours are joined."""
    starts: list[int] = []
    classes: list[int] = []
    for start, cls in zip(alphabet.starts, alphabet.classes, strict=True):
        if not classes or classes[-1] != group[cls]:
            starts.append(start)
            classes.append(group[cls])
    return Alphabet(alphabet.size, tuple(starts), tuple(classes))


@lru_cache(maxsize=1024)
def _refinement(a: Alphabet, b: Alphabet) -> tuple[Alphabet, tuple[int, ...], tuple[int, ...]]:
    """The coarsest alphabet that refines both; the class in a, and in b, of each of its classes."""
    pairs: dict[tuple[int, int], int] = {}
    starts: list[int] = []
    classes: list[int] = []
    for start in sorted({*a.starts, *b.starts}):
        cls = pairs.setdefault((a.class_of(start), b.class_of(start)), len(pairs))
        if not classes or classes[-1] != cls:
            starts.append(start)
            classes.append(cls)
    alphabet = Alphabet(a.size, tuple(starts), tuple(classes))
    return alphabet, tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def common_alphabet(alphabets: Iterable[Alphabet]) -> tuple[Alphabet, list[tuple[int, ...]]]:
    """The coarsest alphabet that refines all; for each one, its class for every new class."""
    first, *others = alphabets
    result = first
    maps = [tuple(range(first.count))]
    for other in others:
        if other == result:
            maps.append(tuple(range(result.count)))
            continue
        result, old, new = _refinement(result, other)
        maps = [tuple(column[cls] for cls in old) for column in maps]
        maps.append(new)
    return result, maps
